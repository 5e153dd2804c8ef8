//! The doctor on real (software) devices: what it sees, and its trial between two of them.

use kvtransfer::config::{EngineConfig, RdmaConfig, RdmaUse};
use kvtransfer::doctor::collect::{Host, collect};
use kvtransfer::doctor::engine;
use kvtransfer::doctor::exchange::{Caller, Served};
use kvtransfer::doctor::rails::Mode;
use kvtransfer::doctor::report::{PeerReport, Report};
use kvtransfer::doctor::steps::{self, Done, Outcome, Step};

#[path = "doctor/engine.rs"]
mod one;

/// Serves this host's facts to itself and asks for the path from `device`.
fn asked(device: &str) -> (Report, PeerReport) {
    let facts = collect(&Host::this());
    let served = Served::bind(([127, 0, 0, 1], 0).into(), &facts).expect("loopback");
    let addr = served.local_addr().expect("it is bound").to_string();
    // Serves until the test's process ends.
    std::thread::spawn(move || served.run());
    let wanted = [device.to_owned()];
    let mut report = Report::of(facts, Some(&wanted));
    let mut caller = Caller::connect(&addr).expect("it serves");
    let theirs = caller.facts().clone();
    report.add_peer(&addr, theirs, Some(&wanted), |path, rails| {
        caller.choose(path, rails);
        steps::run(&steps::steps(path), |step| caller.perform(step))
    });
    let peer = report.peer.clone().expect("the peer was added");
    (report, peer)
}

fn outcome(peer: &PeerReport, step: Step) -> &Outcome {
    let same = |done: &&Done| done.step == step;
    &peer
        .steps
        .iter()
        .find(same)
        .expect("the step is listed")
        .outcome
}

#[test]
#[ignore = "needs RDMA"]
fn devices_are_seen_and_probed() {
    let report = Report::of(collect(&Host::this()), None);
    assert!(!report.has_failed(), "{}", report.text());
    let mode = |name: &str| {
        let rail = report.rails.iter().find(|rail| rail.device == name);
        rail.expect("a device of the lab").mode
    };
    assert_eq!((mode("rxe0"), mode("siw0")), (Mode::Roce, Mode::Iwarp));
    for device in &report.facts.devices {
        let verbs = device.verbs.as_ref().expect("it was opened");
        assert_eq!(verbs.problem, None, "{}", device.name);
        assert_eq!((verbs.dmabuf, verbs.active_mtu), (Some(false), Some(4096)));
    }
}

/// Runs the trial from `device` to `remote`: every measuring step passes, and the faults are told in these words.
fn tried(device: &str, remote: &str, starved: &str, misled: &str) {
    let (report, peer) = asked(device);
    assert!(!report.has_failed(), "{}", report.text());
    assert_eq!(peer.path.pairs, [(device.to_owned(), remote.to_owned())]);
    for step in steps::steps(&peer.path) {
        match (step, outcome(&peer, step)) {
            (Step::EmptyReceiveQueue, Outcome::Seen { what, figures }) => {
                assert!(what.contains(starved) && figures.len() == 1, "{what}");
            }
            (Step::BadKey, Outcome::Seen { what, figures }) => {
                assert!(what.contains(misled) && figures.len() == 1, "{what}");
            }
            (_, Outcome::Passed(figures)) => {
                assert!(
                    figures.iter().all(|figure| figure.value > 0.0),
                    "{figures:?}"
                );
            }
            (step, other) => panic!("{step:?}: {other:?}"),
        }
    }
}

#[test]
#[ignore = "needs RDMA"]
fn the_trial_moves_bytes_and_meets_faults() {
    tried("rxe1", "rxe0", "RNR_RETRY_EXC_ERR", "REM_ACCESS_ERR");
}

#[test]
#[ignore = "needs RDMA"]
fn the_trial_connects_through_rdma_cm() {
    // siw reports neither fault of the peer as a failed request: the connection ends.
    tried("siw1", "siw0", "rdma_cm", "rdma_cm");
}

#[test]
#[ignore = "needs RDMA"]
fn an_engine_is_asked_which_devices_would_meet() {
    let mut config = EngineConfig::default();
    config.listen = Some("127.0.0.1:0".parse().expect("an address"));
    config.rdma = RdmaConfig::default();
    config.rdma.usage = RdmaUse::Required;
    config.rdma.devices = "siw0".to_owned();
    let engine = one::engine(config);
    let address = engine.local_addr().expect("it listens").to_string();
    let face = engine::look(&address, "").expect("it answers");
    let rails = Report::of(collect(&Host::this()), None).rails;
    let said = |device: &str| {
        let ours: Vec<_> = rails
            .iter()
            .filter(|rail| rail.device == device)
            .cloned()
            .collect();
        engine::judge(&address, &face, &ours).remove(0)
    };
    let met = said("siw1");
    assert!(met.what.ends_with("siw1 to siw0 (standard)"), "{met:?}");
    let missed = said("rxe1");
    assert!(
        missed.why.contains("compat mode here and in standard mode"),
        "{missed:?}"
    );
}
