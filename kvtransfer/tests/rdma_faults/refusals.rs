//! An engine that cannot have its rails says what is missing and how to get it.

use std::{
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    process::Command,
};

use kvtransfer::{
    config::{EngineConfig, RdmaUse},
    engine::Engine,
};

use super::{
    pair::{is_active, restore, run, until},
    rig,
};

/// Why no engine starts with these devices.
fn refusal(devices: &str) -> String {
    let mut config = EngineConfig::default();
    config.rdma.usage = RdmaUse::Required;
    config.rdma.devices = devices.to_owned();
    let started = Engine::start(config, rig::memory(), rig::layout());
    let Err(error) = started else {
        panic!("an engine with {devices}");
    };
    error.to_string()
}

fn assert_says(text: &str, words: &[&str]) {
    println!("{text}");
    for word in words {
        assert!(text.contains(word), "{word:?} is not in: {text}");
    }
}

#[test]
#[ignore = "needs the RDMA lab"]
fn an_unknown_device_is_refused_with_those_that_are_there() {
    let text = refusal("siw9");
    assert_says(
        &text,
        &[
            "siw9, which this host lacks",
            "siw0",
            "siw1",
            "rxe0",
            "rxe1",
        ],
    );
}

/// An iWARP device of the test's own whose network interface is not up yet. None of the lab's is taken down for this: siw
/// looks through its queue pairs without a lock when an interface goes down, and one that is destroyed meanwhile, by whichever
/// test came before, brings the kernel down.
struct DownDevice;

impl DownDevice {
    const NET: &'static str = "kvtfault1";
    const RDMA: &'static str = "siwfault";

    fn new() -> Self {
        let (net, rdma) = (Self::NET, Self::RDMA);
        run(&format!("ip link add {net} type dummy"));
        let own = Self;
        run(&format!("ip link set {net} mtu 8500"));
        run(&format!("rdma link add {rdma} type siw netdev {net}"));
        own
    }
}

impl Drop for DownDevice {
    fn drop(&mut self) {
        // The device first, which waits for its last queue pair: so the interface goes down without any.
        restore("rdma", &["link", "delete", Self::RDMA]);
        restore("ip", &["link", "delete", Self::NET]);
    }
}

/// Set for the process that starts an engine with the devices that it names.
const STARTS: &str = "KVT_STARTS";
/// What it prints if it could.
const STARTED: &str = "started: ";
/// What it prints if not, with the reason.
const REFUSED: &str = "refused: ";

/// Runs one test of this binary in a process of its own, which a shell line and `prepare` make special; the line that says how its engine fared.
fn in_child(first: &str, test: &str, prepare: impl FnOnce(&mut Command)) -> String {
    let line = format!("{first} && exec \"$0\" --exact {test} --include-ignored --nocapture");
    let mut command = Command::new("sh");
    let this = std::env::current_exe().expect("this binary");
    command.arg("-c").arg(line).arg(this);
    prepare(&mut command);
    let output = command.output().expect("a shell");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    let is_outcome = |line: &&str| line.contains(STARTED) || line.contains(REFUSED);
    let outcome = text.lines().find(is_outcome);
    let outcome = outcome.unwrap_or_else(|| panic!("no engine in: {text}{errors}"));
    outcome.to_owned()
}

#[test]
#[ignore = "needs the RDMA lab"]
fn a_device_whose_port_is_down_is_refused_with_the_fix() {
    if let Ok(devices) = std::env::var(STARTS) {
        let mut config = EngineConfig::default();
        config.rdma.usage = RdmaUse::Required;
        config.rdma.devices = devices;
        match Engine::start(config, rig::memory(), rig::layout()) {
            Ok(_) => println!("{STARTED}it works"),
            Err(error) => println!("{REFUSED}{error}"),
        }
        return;
    }
    let (net, rdma) = (DownDevice::NET, DownDevice::RDMA);
    let device = DownDevice::new();
    // librdmacm has its devices open as long as the process lives, and then the kernel does not take one away.
    let name = "refusals::a_device_whose_port_is_down_is_refused_with_the_fix";
    let devices = format!("siw0,{rdma}");
    let start = || {
        in_child("true", name, |command| {
            command.env(STARTS, &devices);
        })
    };
    assert_says(
        &start(),
        &[
            REFUSED,
            "names siwfault",
            "its port is down",
            "bring its network interface up",
        ],
    );
    run(&format!("ip link set {net} up"));
    run(&format!("ip address add 10.77.8.1/24 dev {net}"));
    until("the port is up", || is_active(rdma));
    assert_says(&start(), &[STARTED]);
    drop(device);
}

/// Set for the process that has a small limit on locked memory.
const POOR: &str = "KVT_POOR";
const NOBODY: u32 = 65_534;

#[test]
#[ignore = "needs the RDMA lab"]
fn a_small_memlock_limit_is_named_with_the_fix() {
    if std::env::var_os(POOR).is_some() {
        println!("{REFUSED}{}", refusal("siw0"));
        return;
    }
    // Root is not held to the limit. The guest gives its device nodes to root alone.
    for entry in std::fs::read_dir("/dev/infiniband").expect("device nodes") {
        let path = entry.expect("an entry").path();
        let all = std::fs::Permissions::from_mode(0o666);
        std::fs::set_permissions(path, all).expect("we are root");
    }
    let refused = in_child(
        "ulimit -l 64",
        "refusals::a_small_memlock_limit_is_named_with_the_fix",
        |command| {
            command.env(POOR, "1").uid(NOBODY).gid(NOBODY);
        },
    );
    assert_says(
        &refused,
        &[
            "locked-memory limit is 64 KiB",
            "ulimit -l unlimited",
            "LimitMEMLOCK",
            "CAP_IPC_LOCK",
        ],
    );
}
