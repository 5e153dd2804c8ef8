//! Memory of a device over RDMA: how it is reached is decided by trying, told with its reason, and nothing is done that is not
//! needed. That every byte arrives is shown by `conformance_device.rs`.

use kvtransfer::{
    doctor::gpus::GpuPath,
    testing::{
        conformance::{
            Bench, Deal, DeviceRails, DmaBufRails, EngineFabric, Fabric, HalfRails, Path,
            PeerMemoryRails, SOON, StagedRails, to_send, wait_for,
        },
        fake_verbs::Mode,
        model::Model,
    },
    transfer::NodeConfig,
};

/// Pages in four buffers of 4 KiB, each large enough to be written by itself.
fn model() -> Model {
    Model {
        pages: 64,
        page_size: 16,
        head_bytes: 64,
        ..Model::default()
    }
}

fn bench<P: Path>() -> Bench<EngineFabric<P>> {
    Bench::new(&model(), (1, 1), 1, &NodeConfig::default())
}

/// The bytes that the devices of both ranks copied to and from host memory while a room moved, and how it was reached.
fn moved<P: Path<Network = DeviceRails>>() -> (u64, u64, [Vec<GpuPath>; 2]) {
    let mut bench = bench::<P>();
    let deal = Deal::new(&model(), 1, &[40]);
    bench.fill(1);
    bench.fill_rank(1, 2);
    let counts = |bench: &Bench<EngineFabric<P>>| {
        let devices = &bench.fabric.network().devices;
        [0, 1].map(|rank| devices.of(rank).counts())
    };
    let before = counts(&bench);
    let receive = bench.receive(&deal);
    let send = bench.send(1);
    bench.fabric.wait_ready(&send).expect("it is granted");
    for chunk in deal.pushes() {
        bench.fabric.push(&send, &chunk).expect("it is taken");
    }
    for side in [&send, &receive] {
        let end = bench.fabric.wait(side, SOON).expect("it ends in time");
        end.expect("it succeeds");
    }
    let after = counts(&bench);
    let paths = [0, 1].map(|rank| {
        let verdicts = bench.fabric.engine(rank).gpu_direct();
        verdicts.into_iter().map(|verdict| verdict.path).collect()
    });
    (
        after[0].gathered - before[0].gathered,
        after[1].scattered - before[1].scattered,
        paths,
    )
}

#[test]
fn memory_in_reach_is_not_copied_and_memory_out_of_reach_is_copied_once() {
    let both = |path| [vec![path], vec![path]];
    let (gathered, scattered, paths) = moved::<DmaBufRails>();
    assert_eq!((gathered, scattered), (0, 0));
    assert_eq!(paths, both(GpuPath::DmaBuf));
    let (gathered, scattered, paths) = moved::<PeerMemoryRails>();
    assert_eq!((gathered, scattered), (0, 0));
    assert_eq!(paths, both(GpuPath::Peermem));
    let (gathered, scattered, paths) = moved::<StagedRails>();
    assert!(gathered >= 40 * 4 * 4096, "{gathered}");
    assert_eq!(gathered, scattered);
    assert_eq!(paths, both(GpuPath::Staged));
    let (gathered, host, paths) = moved::<HalfRails>();
    assert_eq!((gathered, host), (0, scattered), "the source is the host's");
    assert_eq!(paths, [vec![], vec![GpuPath::Staged]]);
}

#[test]
fn the_reason_is_shown_with_the_path() {
    let bench = bench::<StagedRails>();
    for rank in 0..2 {
        let rails = bench.fabric.engine(rank).snapshot().rails;
        assert!(!rails.is_empty());
        for rail in rails {
            let reason = &rail.path_reason;
            assert!(reason.contains("GPU memory: staged"), "{reason}");
            assert!(reason.contains("its driver exports none"), "{reason}");
            assert!(reason.contains("ibv_reg_mr"), "{reason}");
        }
    }
}

/// A fabric whose devices' kernels see writes of RDMA devices after a flush only, and that packs pieces of fewer bytes.
struct Flushed<const PACK_BELOW: u64>;

impl<const PACK_BELOW: u64> Path for Flushed<PACK_BELOW> {
    const SAME_HOST: kvtransfer::config::SameHost = DmaBufRails::SAME_HOST;
    const NAME: &'static str = DmaBufRails::NAME;
    const STAGING_BYTES: u64 = DmaBufRails::STAGING_BYTES;
    type Network = DeviceRails;

    fn network() -> DeviceRails {
        let mut rails = DmaBufRails::network();
        (0..2).for_each(|rank| rails.devices.of(rank).require_flushes());
        rails.network.config.pack_below = PACK_BELOW;
        // What goes over one of them keeps its order.
        rails.network.config.queue_pairs = 1;
        rails
    }

    fn rdma(rails: &DeviceRails, rank: usize) -> kvtransfer::config::RdmaConfig {
        DmaBufRails::rdma(rails, rank)
    }

    fn region(
        rails: &DeviceRails,
        rank: usize,
        index: usize,
        len: usize,
    ) -> kvtransfer::memory::Region {
        DmaBufRails::region(rails, rank, index, len)
    }
}

#[test]
fn a_receiving_device_is_flushed_once_for_each_room_where_it_must() {
    let mut bench = bench::<Flushed<0>>();
    for room in 1..4 {
        bench.run(&Deal::new(&model(), room, &[40, 3]));
    }
    let flushes = [0, 1].map(|rank| bench.fabric.network().devices.of(rank).flushes());
    assert_eq!(flushes, [0, 3]);
    let mut other = self::bench::<DmaBufRails>();
    other.run(&Deal::new(&model(), 1, &[40]));
    assert_eq!(other.fabric.network().devices.of(1).flushes(), 0);
}

#[test]
fn what_was_written_before_a_packed_last_batch_is_flushed_too() {
    let model = Model {
        has_state: false,
        ..model()
    };
    let node = NodeConfig::default();
    let mut bench = Bench::<EngineFabric<Flushed<8192>>>::new(&model, (1, 1), 1, &node);
    let deal = Deal::new(&model, 1, &[1, 7]);
    let receive = bench.receive(&deal);
    let send = bench.send(1);
    bench.fabric.wait_ready(&send).expect("it is granted");
    let fabric = bench.fabric.network().network.fabric();
    // Nothing is answered, so the row of the last batch follows the packed pages before it.
    fabric.set_mode(Mode::Manual);
    for chunk in deal.pushes() {
        bench.fabric.push(&send, &chunk).expect("it is taken");
    }
    let packed = |bench: &Bench<EngineFabric<Flushed<8192>>>, rank: usize| {
        let counts = bench.fabric.engine(rank).rail_counts();
        (counts[0].packed_batches, counts[0].unpacked_batches)
    };
    wait_for("the last of three packed batches", || {
        (packed(&bench, 0) == (3, 0)).then_some(())
    });
    fabric.set_mode(Mode::Auto);
    for side in [&send, &receive] {
        let end = bench.fabric.wait(side, SOON).expect("it ends in time");
        end.expect("it succeeds");
    }
    assert_eq!(packed(&bench, 1), (0, 3), "of four, not the first");
    let batches = bench.fabric.engine(0).snapshot().rails;
    assert_eq!(
        batches.iter().map(|rail| rail.batches_total).sum::<u64>(),
        4
    );
    let flushes = [0, 1].map(|rank| bench.fabric.network().devices.of(rank).flushes());
    assert_eq!(flushes, [0, 1]);
}

#[test]
fn a_device_that_cannot_be_flushed_ends_the_room_with_its_words() {
    let mut bench = bench::<Flushed<0>>();
    let deal = Deal::new(&model(), 1, &[40]);
    let receive = bench.receive(&deal);
    let send = bench.send(1);
    bench.fabric.wait_ready(&send).expect("it is granted");
    bench.fabric.network().devices.of(1).break_copies();
    for chunk in deal.pushes() {
        bench.fabric.push(&send, &chunk).expect("it is taken");
    }
    for side in [&send, &receive] {
        let end = bench.fabric.wait(side, SOON).expect("it ends in time");
        let error = end.expect_err("nobody could see the bytes").to_string();
        assert!(error.contains("the device is broken"), "{error}");
    }
}

#[test]
fn a_device_that_breaks_while_it_is_staged_ends_the_room_with_its_words_on_both_sides() {
    for broken in 0..2 {
        let mut bench = bench::<StagedRails>();
        let deal = Deal::new(&model(), 1, &[40]);
        let receive = bench.receive(&deal);
        let send = bench.fabric.send(0, &to_send(1, SOON)).expect("it opens");
        bench.fabric.wait_ready(&send).expect("it is granted");
        bench.fabric.network().devices.of(broken).break_copies();
        for chunk in deal.pushes() {
            bench.fabric.push(&send, &chunk).expect("it is taken");
        }
        for side in [&send, &receive] {
            let end = bench.fabric.wait(side, SOON).expect("it ends in time");
            let error = end.expect_err("the device is broken").to_string();
            assert!(error.contains("the device is broken"), "{broken}: {error}");
        }
    }
}

#[test]
fn without_landing_memory_out_of_reach_there_is_no_queue_pair_and_the_reason_is_told() {
    struct Bare;
    impl Path for Bare {
        const SAME_HOST: kvtransfer::config::SameHost = StagedRails::SAME_HOST;
        const NAME: &'static str = StagedRails::NAME;
        type Network = DeviceRails;

        fn network() -> DeviceRails {
            let mut rails = StagedRails::network();
            rails.network.config.landing_bytes = 0;
            rails
        }

        fn rdma(rails: &DeviceRails, rank: usize) -> kvtransfer::config::RdmaConfig {
            StagedRails::rdma(rails, rank)
        }

        fn region(
            rails: &DeviceRails,
            rank: usize,
            index: usize,
            len: usize,
        ) -> kvtransfer::memory::Region {
            StagedRails::region(rails, rank, index, len)
        }
    }
    let (layout, regions) = model().rank(
        kvtransfer::layout::Shard::ONE,
        kvtransfer::layout::Shard::ONE,
    );
    let spec = kvtransfer::testing::sim::RankSpec {
        layout,
        regions,
        node: NodeConfig::default(),
    };
    let mut fabric = EngineFabric::<Bare>::start(vec![spec.clone(), spec]);
    let refused = fabric.connect(1, 0).expect_err("no byte could be moved");
    assert!(refused.contains("rdma.landing_bytes"), "{refused}");
}
