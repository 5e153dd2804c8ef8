//! Memory that goes away and comes back: nobody touches it meanwhile, and everybody is told (P1, P2).
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(unsafe_code, reason = "takes the memory away for real")]

use std::{thread, time::Duration};

use kvtransfer::{
    config::{RdmaConfig, SameHost},
    engine::MemoryError,
    error::SubmitError,
    layout::RegionId,
    testing::{
        conformance::{
            Bench, Deal, EngineFabric, Fabric, FakeNetwork, Path, PullPath, RingPath, SOON,
            TcpPath, to_send, wait_for,
        },
        fake_verbs::Behaviour,
        model::Model,
    },
};

struct Verbs;

impl Path for Verbs {
    const SAME_HOST: SameHost = SameHost::Off;
    const NAME: &'static str = "verbs";
    type Network = FakeNetwork;

    fn network() -> FakeNetwork {
        FakeNetwork::new(&Behaviour::erdma_compat(), 2, 1)
    }

    fn rdma(network: &FakeNetwork, rank: usize) -> RdmaConfig {
        network.rdma(rank)
    }
}

const BOTH: [RegionId; 2] = [RegionId(0), RegionId(1)];
const PAGE: usize = 4096;
const BRIEFLY: Duration = Duration::from_millis(30);

/// Lets a rank's whole pages be used, or nobody.
fn protect<P: Path>(bench: &Bench<EngineFabric<P>>, rank: usize, allowed: bool) {
    let how = if allowed {
        libc::PROT_READ | libc::PROT_WRITE
    } else {
        libc::PROT_NONE
    };
    for region in BOTH {
        let region = bench.fabric.engine(rank).region(region).unwrap();
        let len = region.len() / PAGE * PAGE;
        let base = usize::try_from(region.base_address()).unwrap();
        assert_eq!(base % PAGE, 0, "regions start at a page");
        let base = std::ptr::with_exposed_provenance_mut(base);
        // SAFETY: whole pages of a region of ours; nothing else lies in them, and it is given back before it is freed.
        let done = unsafe { libc::mprotect(base, len, how) };
        assert_eq!(done, 0);
    }
}

fn away_and_back<P: Path>(rank: usize, objects_left: impl Fn(&P::Network, usize) -> usize) {
    let model = Model {
        pages: 256,
        ..Model::default()
    };
    let mut bench = Bench::<EngineFabric<P>>::duo(&model);
    bench.run(&Deal::new(&model, 1, &[20, 3]));
    let engine = bench.fabric.engine(rank);
    engine.release_memory(&BOTH, SOON).unwrap();
    engine
        .release_memory(&BOTH[..1], SOON)
        .expect("once more is the same");
    assert_eq!(objects_left(bench.fabric.network(), rank), 0);
    protect(&bench, rank, false);
    let other = 1 - rank;
    let refused = if rank == 0 {
        bench.fabric.send(0, &to_send(2, SOON)).err()
    } else {
        let request = bench.receive_of(1, &Deal::new(&model, 2, &[4]));
        let opened = bench.fabric.receive(1, &request);
        opened
            .err()
            .filter(|error| *error != SubmitError::UnknownPeer)
            .or(Some(
                // Over RDMA there is no peer to name any more.
                SubmitError::Released { region: 0 },
            ))
    };
    assert_eq!(refused, Some(SubmitError::Released { region: 0 }));
    let sentence = bench.fabric.connect(other, rank).unwrap_err();
    assert!(sentence.contains("region 0 is released"), "{sentence}");
    protect(&bench, rank, true);
    let engine = bench.fabric.engine(rank);
    engine.restore_memory(&BOTH[1..]).unwrap();
    let still = bench.fabric.send(0, &to_send(3, SOON));
    assert_eq!(still.is_err(), rank == 0, "one region is still gone");
    drop(still);
    let engine = bench.fabric.engine(rank);
    engine.restore_memory(&BOTH[..1]).unwrap();
    wait_for("a connection", || {
        let known = (0..2).all(|rank| bench.fabric.is_connected(rank, 1 - rank));
        known
            .then_some(())
            .or_else(|| bench.fabric.connect(1, 0).ok())
    });
    bench.run(&Deal::new(&model, 4, &[20, 3]));
}

#[test]
fn memory_goes_away_and_comes_back_over_tcp() {
    away_and_back::<TcpPath>(0, |(), _| 0);
    away_and_back::<TcpPath>(1, |(), _| 0);
}

#[test]
fn memory_goes_away_and_comes_back_on_one_host() {
    away_and_back::<RingPath>(1, |(), _| 0);
    away_and_back::<PullPath>(0, |(), _| 0);
    away_and_back::<PullPath>(1, |(), _| 0);
}

#[test]
fn memory_goes_away_and_comes_back_with_new_keys_over_rdma() {
    let objects = |network: &FakeNetwork, rank| network.fabric().objects(network.device(rank, 0));
    away_and_back::<Verbs>(0, objects);
    away_and_back::<Verbs>(1, objects);
}

fn busy<P: Path>() {
    let model = Model::default();
    let mut bench = Bench::<EngineFabric<P>>::duo(&model);
    let deal = Deal::new(&model, 5, &[4]);
    let receive = bench.receive(&deal);
    let send = bench.send(5);
    send.wait_ready(SOON).unwrap();
    for rank in 0..2 {
        let error = bench
            .fabric
            .engine(rank)
            .release_memory(&BOTH, BRIEFLY)
            .unwrap_err();
        let wanted = MemoryError::Busy {
            transfers: 1,
            waited: BRIEFLY,
        };
        assert_eq!(error, wanted);
        assert!(
            error
                .to_string()
                .starts_with("1 transfers still use the memory"),
            "{error}"
        );
    }
    // Nothing has changed: the room goes on, and the next ones open.
    send.push(&deal.pushes()[0]).unwrap();
    assert!(receive.wait(SOON).unwrap().is_ok());
    assert!(send.wait(SOON).unwrap().is_ok());
    bench.run(&Deal::new(&model, 6, &[4]));
    // One that ends in time is waited for.
    let receive = bench.receive(&Deal::new(&model, 7, &[4]));
    thread::scope(|scope| {
        let engine = bench.fabric.engine(1);
        let release = scope.spawn(|| engine.release_memory(&BOTH, SOON));
        wait_for("the release to begin", || {
            bench.fabric.engine(1).is_memory_released().then_some(())
        });
        receive.cancel_with("weights");
        release.join().unwrap().unwrap();
    });
    bench.fabric.engine(1).restore_memory(&BOTH).unwrap();
}

#[test]
fn live_transfers_are_waited_for_or_named() {
    busy::<TcpPath>();
    busy::<PullPath>();
    busy::<Verbs>();
}

#[test]
fn unknown_regions_and_stopped_engines_say_so() {
    let bench = Bench::<EngineFabric<TcpPath>>::duo(&Model::default());
    let engine = bench.fabric.engine(0);
    let region = RegionId(7);
    let unknown = engine.release_memory(&[region], SOON);
    assert_eq!(unknown, Err(MemoryError::Unknown { region }));
    assert_eq!(
        engine.restore_memory(&[region]),
        Err(MemoryError::Unknown { region })
    );
    engine.shut_down();
    assert_eq!(
        engine.release_memory(&BOTH, SOON),
        Err(MemoryError::Shutdown)
    );
}
