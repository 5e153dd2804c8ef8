//! What packing saves, when it is chosen, and what a notice of a packed batch may not say.

use std::time::Duration;

use kvtransfer::{
    config::{RdmaConfig, SameHost},
    engine::RailCounts,
    telemetry::snapshot::RailStat,
    testing::{
        conformance::{Bench, Deal, EngineFabric, FakeNetwork, Path, SOON},
        fake_verbs::{Behaviour, Forgery},
        model::Model,
    },
    transfer::NodeConfig,
    wire::{
        lane::{BatchFields, BatchHeader, PayloadMode},
        rdma::Frame,
    },
};

use super::{
    queues::no_path,
    rig::{
        Rig, bulk, bulk_deal, bulk_rig, compat, devices, forbid_new_queues, gone, opened, push,
        rig, settled,
    },
};

/// Three ranks with the engine's own idea of what to pack, or with nothing packed.
struct Ranks<const PACK_BELOW: u64>;

impl<const PACK_BELOW: u64> Path for Ranks<PACK_BELOW> {
    const SAME_HOST: SameHost = SameHost::Off;
    const NAME: &'static str = "verbs";
    const STAGING_BYTES: u64 = 64 << 20;
    type Network = FakeNetwork;

    fn network() -> FakeNetwork {
        let mut network = FakeNetwork::new(&Behaviour::erdma_compat(), 3, 1);
        network.config.pack_below = PACK_BELOW;
        network.config.batch_bytes = RdmaConfig::default().batch_bytes;
        network
    }

    fn rdma(network: &FakeNetwork, rank: usize) -> RdmaConfig {
        network.rdma(rank)
    }
}

/// A model whose head slices between unequal ranks have 512 bytes.
fn sliced() -> Model {
    Model {
        pages: 160,
        page_size: 64,
        head_bytes: 512,
        heads: 2,
        has_state: false,
        ..Model::default()
    }
}

/// Pages of the room.
const PAGES: usize = 150;

/// Work requests of the sources for one room, and slices of one token that it moves.
fn cost<const PACK_BELOW: u64>(
    model: &Model,
    pages: usize,
    sources: u32,
    targets: u32,
) -> (u64, u64) {
    let node = NodeConfig::default();
    let mut bench =
        Bench::<EngineFabric<Ranks<PACK_BELOW>>>::new(model, (sources, 1), targets, &node);
    bench.run(&Deal::new(model, 1, &[pages]));
    let ranks = 0..usize::try_from(sources).expect("few");
    let counts = ranks.flat_map(|rank| bench.fabric.engine(rank).rail_counts());
    let requests = counts.map(|counts| counts.work_requests).sum();
    let slices =
        pages as u64 * u64::from(model.page_size * model.layers * 2 * sources.max(targets));
    (requests, slices)
}

/// The engine's own idea of a small piece.
const DEFAULT: u64 = 4096;

#[test]
fn unequal_ranks_take_a_hundredth_of_the_work_requests() {
    assert_eq!(RdmaConfig::default().pack_below, DEFAULT);
    for (sources, targets) in [(1, 2), (2, 1)] {
        let (packed, slices) = cost::<DEFAULT>(&sliced(), PAGES, sources, targets);
        let (direct, _) = cost::<0>(&sliced(), PAGES, sources, targets);
        println!(
            "TP {sources} to {targets}: {slices} slices, {direct} work requests, packed {packed} (1/{})",
            slices / packed
        );
        assert!(packed * 100 <= slices, "{packed} for {slices} slices");
        // Six elements a WRITE where the target lies together; one where it does not.
        assert!(direct * 7 >= slices, "{direct} for {slices} slices");
        assert!(targets > 1 || direct >= slices, "{direct} for {slices}");
    }
}

#[test]
#[ignore = "moves 1.3 GB, four times"]
fn what_a_prompt_of_8192_tokens_costs_between_unequal_ranks() {
    let model = Model {
        pages: 128,
        layers: 80,
        ..sliced()
    };
    for (sources, targets) in [(1, 2), (2, 1)] {
        let (packed, slices) = cost::<DEFAULT>(&model, 128, sources, targets);
        let (direct, _) = cost::<0>(&model, 128, sources, targets);
        println!(
            "TP {sources} to {targets}, 80 layers, 8192 tokens: {slices} slices, {direct} work requests, packed {packed} (1/{} of the slices, 1/{} of the work requests)",
            slices / packed,
            direct / packed
        );
        assert!(packed * 500 <= slices, "{packed} for {slices} slices");
    }
}

fn counts(rig: &Rig, rank: usize) -> RailCounts {
    let mut counts = rig.fabric.engine(rank).rail_counts();
    assert_eq!(counts.len(), 1);
    counts.remove(0)
}

#[test]
fn what_was_packed_is_counted_on_both_sides() {
    let mut rig = bulk_rig(compat(1));
    settled(&rig);
    rig.run(&bulk_deal(1));
    let (sent, got) = (counts(&rig, 0), counts(&rig, 1));
    assert!(sent.packed_batches >= 7, "{sent:?}");
    assert_eq!(sent.packed_batches, got.unpacked_batches);
    assert!(sent.packed_bytes >= 100 * 4096, "{sent:?}");
    assert_eq!((got.packed_batches, sent.unpacked_batches), (0, 0));
    let rails = rig.fabric.engine(0).snapshot().rails;
    let total = |of: fn(&RailStat) -> u64| rails.iter().map(of).sum::<u64>();
    let packed = total(|rail| rail.packed_batches_total);
    assert_eq!(packed, sent.packed_batches);
    let operations = total(|rail| rail.wire_operations_total);
    assert_eq!(operations, sent.work_requests, "{rails:?}");
}

#[test]
fn few_pieces_and_large_ones_are_written_to_their_pages() {
    let large = Model {
        pages: 64,
        page_size: 64,
        head_bytes: 64,
        has_state: false,
        ..Model::default()
    };
    for (model, pages) in [(&large, 40), (&bulk(), 1)] {
        let mut network = compat(1);
        network.config.pack_below = 4096;
        let mut rig = rig(network, model, &NodeConfig::default());
        settled(&rig);
        rig.run(&Deal::new(model, 1, &[pages]));
        assert_eq!(counts(&rig, 0).packed_batches, 0, "{pages} pages");
    }
}

#[test]
fn queue_pairs_without_landing_memory_write_to_the_pages() {
    let mut network = compat(1);
    // More than all of the fabric's.
    network.config.landing_bytes = 16 << 20;
    let mut rig = bulk_rig(network);
    settled(&rig);
    rig.run(&bulk_deal(1));
    assert_eq!(counts(&rig, 0).packed_batches, 0);
}

/// The notice of a packed batch, changed.
fn changed(bytes: &[u8], change: fn(&mut BatchFields)) -> Option<Vec<u8>> {
    let (frame, credits) = Frame::parse(bytes).ok()?;
    let Frame::Batch(header) = frame else {
        return None;
    };
    let mut fields = BatchFields {
        mode: header.mode(),
        last: header.is_last(),
        component: header.component,
        room: header.room,
        epoch: header.epoch(),
        seq: header.seq,
        window_start: header.window_start,
        window_len: header.window_len,
        offset: header.offset,
        len: header.len,
        place: header.place,
    };
    change(&mut fields);
    let mut out = [0; Frame::LEN_MAX];
    let len = Frame::Batch(BatchHeader::new(fields)).encode(credits, &mut out);
    Some(out[..len].to_vec())
}

/// Lies, and what they are called.
fn lies() -> [(Forgery, &'static str); 5] {
    [
        // From the second batch on the place is taken.
        (
            |bytes| changed(bytes, |fields| fields.place = 0),
            "was next",
        ),
        (
            |bytes| changed(bytes, |fields| fields.place += 64),
            "was next",
        ),
        (
            |bytes| changed(bytes, |fields| fields.place = u64::MAX),
            "was next",
        ),
        (
            |bytes| changed(bytes, |fields| fields.len = 1 << 20),
            "the landing memory takes 1 to 65536",
        ),
        (
            |bytes| changed(bytes, |fields| fields.mode = PayloadMode::Ring),
            "not written by RDMA",
        ),
    ]
}

#[test]
fn a_notice_that_lies_costs_the_queue_pair_and_is_told_in_words() {
    for (forgery, words) in lies() {
        let mut network = compat(1);
        network.config.queue_pairs = 1;
        network.config.drain = Duration::ZERO;
        let mut rig = bulk_rig(network);
        let queue = settled(&rig)[0];
        let deal = bulk_deal(1);
        let (send, receive) = opened(&mut rig, &deal, Duration::from_millis(300));
        forbid_new_queues(&rig);
        devices(&rig).forge(queue, forgery);
        push(&mut rig, &deal, &send);
        let reason = no_path(send.wait(SOON));
        assert!(reason.contains(words), "{words}: {reason}");
        assert!(receive.wait(SOON).expect("it ends in time").is_err());
    }
}

#[test]
fn after_a_notice_that_lies_the_room_goes_on_over_another_queue_pair() {
    for (forgery, _) in lies() {
        let mut rig = bulk_rig(compat(1));
        let queue = settled(&rig)[0];
        devices(&rig).forge(queue, forgery);
        rig.run(&bulk_deal(1));
        gone(&rig, queue);
    }
}

#[test]
fn a_packed_batch_without_landing_memory_is_refused() {
    let mut network = compat(1);
    network.config.pack_below = 0;
    network.config.queue_pairs = 1;
    network.config.drain = Duration::ZERO;
    let mut rig = bulk_rig(network);
    let queue = settled(&rig)[0];
    let deal = bulk_deal(1);
    let (send, _receive) = opened(&mut rig, &deal, Duration::from_millis(300));
    forbid_new_queues(&rig);
    let forgery: Forgery = |bytes| changed(bytes, |fields| fields.mode = PayloadMode::Packed);
    devices(&rig).forge(queue, forgery);
    push(&mut rig, &deal, &send);
    let reason = no_path(send.wait(SOON));
    assert!(reason.contains("no landing memory was offered"), "{reason}");
}
