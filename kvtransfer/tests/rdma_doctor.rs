//! The doctor on real (software) devices: what it sees, and its trial between two of them.

use kvtransfer::doctor::collect::{Host, collect};
use kvtransfer::doctor::exchange::{Caller, Served};
use kvtransfer::doctor::rails::Mode;
use kvtransfer::doctor::report::{PeerReport, Report};
use kvtransfer::doctor::steps::{self, Done, Outcome, Step};

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

#[test]
#[ignore = "needs RDMA"]
fn the_trial_moves_bytes_and_meets_faults() {
    let (report, peer) = asked("rxe1");
    assert!(!report.has_failed(), "{}", report.text());
    assert_eq!(peer.path.pairs, [("rxe1".to_owned(), "rxe0".to_owned())]);
    for step in steps::steps(&peer.path) {
        match (step, outcome(&peer, step)) {
            (Step::EmptyReceiveQueue, Outcome::Seen { what, figures }) => {
                assert!(
                    what.contains("RNR_RETRY_EXC_ERR") && figures.len() == 1,
                    "{what}"
                );
            }
            (Step::BadKey, Outcome::Seen { what, figures }) => {
                assert!(
                    what.contains("REM_ACCESS_ERR") && figures.len() == 1,
                    "{what}"
                );
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
fn a_pair_that_needs_rdma_cm_says_why_it_was_not_tried() {
    let (report, peer) = asked("siw0");
    assert!(!report.has_failed(), "{}", report.text());
    assert_eq!(peer.path.path, "rdma");
    let outcome = outcome(&peer, Step::WriteAndSend);
    assert!(
        matches!(outcome, Outcome::NotRun { why } if why.contains("rdma_cm")),
        "{outcome:?}"
    );
}
