//! A rail that goes away in the middle of a transfer: another one takes over; without another the room fails by its
//! deadline and says why; and when the rail comes back it is used again.

use std::{path::Path, time::Duration};

use kvtransfer::{clock, engine::Engine, error::TransferError};

use super::{
    child::Path as Wire,
    pair::{Pair, arrived, config, is_active, lanes, pages, queue_pairs, restore, run, until},
    rig::{self, WATCHDOG},
};

/// Pages of the room during which a rail goes.
const LARGE: i32 = 1000;
/// Long enough that bytes move and the rail goes well before it, on a busy emulated machine too.
const DEADLINE: Duration = Duration::from_secs(4);
/// The goal is 50 ms; an emulated machine needs slack before this is called broken.
const LATE_MAX: Duration = Duration::from_millis(500);

/// How a rail is taken away.
#[derive(Clone, Copy)]
enum Fault {
    /// Its network interface goes down, and with it the port.
    Down { interface: &'static str },
    /// Its address goes, and its connections are reset: none can be made anew. For siw, whose driver looks through its queue
    /// pairs without a lock when an interface goes down, and brings the kernel down if one is destroyed meanwhile.
    Lost {
        interface: &'static str,
        address: &'static str,
    },
}

/// The lab's second siw device, which has an interface of its own.
const SIW1_LOST: Fault = Fault::Lost {
    interface: "dummy1",
    address: "10.77.1.1",
};

/// A rail that is gone until this goes out of scope.
struct Gone(Fault);

impl Gone {
    fn new(fault: Fault) -> Self {
        // From here on it is brought back, also if the rest fails: later tests need it.
        let gone = Self(fault);
        match fault {
            Fault::Down { interface } => drop(run(&format!("ip link set {interface} down"))),
            Fault::Lost { interface, address } => {
                run(&format!("ip address delete {address}/24 dev {interface}"));
                // Without this they would stay, silent, until the kernel has sent everything again for minutes.
                let closed = run(&format!("ss --kill --numeric --tcp src {address}"));
                let count = closed.lines().filter(|line| line.contains(address)).count();
                assert!(count > 0, "no connection was reset: {closed}");
            }
        }
        gone
    }
}

impl Drop for Gone {
    fn drop(&mut self) {
        match self.0 {
            Fault::Down { interface } => restore("ip", &["link", "set", interface, "up"]),
            Fault::Lost { interface, address } => {
                let address = format!("{address}/24");
                restore("ip", &["address", "add", &address, "dev", interface]);
            }
        }
    }
}

/// Descriptors of the device that this process has open.
fn opened(device: &str) -> usize {
    let nodes = std::fs::read_dir("/sys/class/infiniband_verbs").expect("the kernel's list");
    let node = nodes.flatten().find(|node| {
        std::fs::read_to_string(node.path().join("ibdev")).is_ok_and(|name| name.trim() == device)
    });
    let node = node.expect("the device is there").file_name();
    let path = Path::new("/dev/infiniband").join(node);
    let all = std::fs::read_dir("/proc/self/fd").expect("our descriptors");
    let names = all
        .flatten()
        .filter_map(|entry| std::fs::read_link(entry.path()).ok());
    names.filter(|name| *name == path).count()
}

/// A Soft-RoCE device of the test's own. The lab's two share a wire, so they cannot fail one by one.
struct OwnDevice;

impl OwnDevice {
    const NET: &'static str = "kvtfault0";
    const RDMA: &'static str = "rxefault";
    const DOWN: Fault = Fault::Down {
        interface: Self::NET,
    };

    fn new() -> Self {
        let net = Self::NET;
        run(&format!("ip link add {net} type dummy"));
        let own = Self;
        for switch in ["accept_local", "rp_filter"] {
            let value = if switch == "rp_filter" { "0" } else { "1" };
            let path = format!("/proc/sys/net/ipv4/conf/{net}/{switch}");
            std::fs::write(path, value).expect("a switch of the kernel");
        }
        run(&format!("ip link set {net} mtu 8500 up"));
        run(&format!("ip address add 10.77.9.1/24 dev {net}"));
        run(&format!(
            "rdma link add {} type rxe netdev {net}",
            Self::RDMA
        ));
        until("the new device's port", || is_active(Self::RDMA));
        own
    }
}

impl Drop for OwnDevice {
    fn drop(&mut self) {
        // The device first: with it in use, the kernel would wait for its network interface and let nobody else near one.
        restore("rdma", &["link", "delete", Self::RDMA]);
        restore("ip", &["link", "delete", Self::NET]);
    }
}

/// Batches that each lane has delivered, by the lane's number; 0 for one that is not there.
fn batches(engine: &Engine, lanes: usize) -> Vec<u64> {
    let rails = engine.snapshot().rails;
    let of = |lane: usize| {
        let name = format!("verbs/{lane}");
        let found = rails.iter().find(|rail| rail.rail == name);
        found.map_or(0, |rail| rail.batches_total)
    };
    (0..lanes).map(of).collect()
}

/// Two rails with two lanes each: lanes 1 and 3 are over the second one, which fails and comes back.
fn second_rail_fails(path: Wire, devices: &str, failing: &str, fault: Fault) {
    let pair = Pair::new(&config(path, 2), [devices, devices]);
    until("four lanes", || lanes(&pair.first).len() == 4);
    let all = pages(0..LARGE);
    for round in 1..=3 {
        rig::fill(&pair.first, round, &all);
        let number = round * 10;
        let room = pair.open(number, &all, &all, WATCHDOG);
        until("bytes", || arrived(&pair.second, number) > 1 << 20);
        let opened = clock::now();
        let gone_rail = Gone::new(fault);
        assert_eq!(room.results(), [Ok(()), Ok(())], "round {round}");
        let took = clock::now().since(opened);
        assert_eq!(rig::wrong(&pair.second, round, &all, &all), 0);
        let gone = until("the failed rail's lanes went", || {
            lanes(&pair.first) == ["verbs/0", "verbs/2"]
        });
        // Other rooms take the other rail at once.
        let next = pair.deliver(number + 1, &all[..8], &all[..8]);
        drop(gone_rail);
        let back = until("its lanes came back", || {
            lanes(&pair.first).len() == 4 && lanes(&pair.second).len() == 4
        });
        assert_eq!(queue_pairs(failing), 4, "two lanes, both ends on {failing}");
        let before = batches(&pair.first, 4);
        pair.deliver(number + 2, &all, &all);
        let after = batches(&pair.first, 4);
        assert!(
            after[1] + after[3] > before[1] + before[3],
            "the rail that came back carries batches: {before:?}, {after:?}"
        );
        println!(
            "{}, {failing} gone: room ended {took:?} later, lanes gone {gone:?} after that; a small room took {next:?}; \
             lanes back after {back:?}",
            path.name()
        );
    }
}

/// The only rail fails.
fn only_rail_fails(path: Wire, devices: [&str; 2], fault: Fault) {
    let pair = Pair::new(&config(path, 2), devices);
    until("two lanes", || lanes(&pair.first).len() == 2);
    let all = pages(0..LARGE);
    rig::fill(&pair.first, 1, &all);
    let opened = clock::now();
    let room = pair.open(1, &all, &all, DEADLINE);
    until("bytes", || arrived(&pair.second, 1) > 1 << 20);
    let gone_rail = Gone::new(fault);
    let ends = room.results();
    let took = clock::now().since(opened);
    println!(
        "{}, no rail: reported {:?} after the deadline: {ends:?}",
        path.name(),
        took.saturating_sub(DEADLINE)
    );
    assert!(took < DEADLINE + LATE_MAX, "{took:?}");
    let reasons = ends.iter().filter_map(|end| match end {
        Err(TransferError::NoPath { reason, .. }) => Some(reason.as_str()),
        _ => None,
    });
    let reasons: Vec<&str> = reasons.collect();
    assert!(
        reasons
            .iter()
            .any(|reason| devices.iter().any(|device| reason.contains(device))),
        "one side names its device: {ends:?}"
    );
    assert!(
        ends.iter().all(|end| matches!(
            end,
            Err(TransferError::NoPath { .. } | TransferError::PeerFailed { .. })
        )),
        "{ends:?}"
    );
    // A room that is opened meanwhile succeeds when the rail comes back before its deadline.
    let waiting = pair.open(2, &all, &all, WATCHDOG);
    drop(gone_rail);
    let back = until("both lanes", || lanes(&pair.first).len() == 2);
    assert_eq!(waiting.results(), [Ok(()), Ok(())]);
    assert_eq!(rig::wrong(&pair.second, 1, &all, &all), 0);
    println!("{}, no rail: lanes back after {back:?}", path.name());
}

#[test]
#[ignore = "needs the RDMA lab"]
fn another_rail_takes_over_over_siw() {
    second_rail_fails(Wire::Siw, "siw0,siw1", "siw1", SIW1_LOST);
}

#[test]
#[ignore = "needs the RDMA lab"]
fn another_rail_takes_over_over_rxe_compat() {
    let own = OwnDevice::new();
    let devices = format!("rxe0,{}", OwnDevice::RDMA);
    second_rail_fails(Wire::RxeCompat, &devices, OwnDevice::RDMA, OwnDevice::DOWN);
    // What is open here keeps the kernel from taking the device away.
    until("the engines let go of the device", || {
        opened(OwnDevice::RDMA) == 0
    });
    drop(own);
}

#[test]
#[ignore = "needs the RDMA lab"]
fn without_a_rail_a_room_fails_by_its_deadline_over_siw() {
    only_rail_fails(Wire::Siw, ["siw1", "siw1"], SIW1_LOST);
}

#[test]
#[ignore = "needs the RDMA lab"]
fn without_a_rail_a_room_fails_by_its_deadline_over_rxe_compat() {
    let own = OwnDevice::new();
    only_rail_fails(
        Wire::RxeCompat,
        [OwnDevice::RDMA, OwnDevice::RDMA],
        OwnDevice::DOWN,
    );
    // What is open here keeps the kernel from taking the device away.
    until("the engines let go of the device", || {
        opened(OwnDevice::RDMA) == 0
    });
    drop(own);
}
