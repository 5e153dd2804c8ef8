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
    pair::{is_active, opened, restore, run, until},
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

#[test]
#[ignore = "needs the RDMA lab"]
fn a_device_whose_port_is_down_is_refused_with_the_fix() {
    let device = DownDevice::new();
    let both = format!("siw0,{}", DownDevice::RDMA);
    assert_says(
        &refusal(&both),
        &[
            "names siwfault",
            "its port is down",
            "bring its network interface up",
        ],
    );
    run(&format!("ip link set {} up", DownDevice::NET));
    run(&format!(
        "ip address add 10.77.8.1/24 dev {}",
        DownDevice::NET
    ));
    until("the port is up", || is_active(DownDevice::RDMA));
    let mut config = EngineConfig::default();
    config.rdma.usage = RdmaUse::Required;
    config.rdma.devices = both;
    let engine = Engine::start(config, rig::memory(), rig::layout()).expect("it is up now");
    drop(engine);
    until("the engine lets go of the device", || {
        opened(DownDevice::RDMA) == 0
    });
    drop(device);
}

/// Set for the process that has a small limit on locked memory.
const POOR: &str = "KVT_POOR";
const NOBODY: u32 = 65_534;

#[test]
#[ignore = "needs the RDMA lab"]
fn a_small_memlock_limit_is_named_with_the_fix() {
    if std::env::var_os(POOR).is_some() {
        println!("refused: {}", refusal("siw0"));
        return;
    }
    // Root is not held to the limit. The guest gives its device nodes to root alone.
    for entry in std::fs::read_dir("/dev/infiniband").expect("device nodes") {
        let path = entry.expect("an entry").path();
        let all = std::fs::Permissions::from_mode(0o666);
        std::fs::set_permissions(path, all).expect("we are root");
    }
    let name = "refusals::a_small_memlock_limit_is_named_with_the_fix";
    let line = format!("ulimit -l 64 && exec \"$0\" --exact {name} --include-ignored --nocapture");
    let this = std::env::current_exe().expect("this binary");
    let output = Command::new("sh")
        .arg("-c")
        .arg(line)
        .arg(this)
        .env(POOR, "1")
        .uid(NOBODY)
        .gid(NOBODY)
        .output()
        .expect("a shell");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    let refused = text.lines().find(|line| line.contains("refused: "));
    assert_says(
        refused.unwrap_or_else(|| panic!("no refusal in: {text}{errors}")),
        &[
            "locked-memory limit is 64 KiB",
            "ulimit -l unlimited",
            "LimitMEMLOCK",
            "CAP_IPC_LOCK",
        ],
    );
}
