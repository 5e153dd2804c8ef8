//! Two engines over fake devices, and rooms between them.

use std::{ops::Range, time::Duration};

use kvtransfer::{
    config::{RdmaConfig, SameHost},
    engine::Transfer,
    layout::Shard,
    testing::{
        conformance::{
            Bench, Deal, EngineFabric, Fabric, FakeNetwork, PACKED_STAGING_BYTES, Path, SOON,
            to_send, wait_for,
        },
        fake_verbs::{Behaviour, Fabric as Devices, QueuePairId},
        model::{KV_REGION, Model, item_ranges},
        sim::RankSpec,
    },
    transfer::NodeConfig,
};

/// What target pages hold before a room.
pub(crate) const BLANK: u64 = 0xB1A2;

/// Engines over the devices of a [`FakeNetwork`].
pub(crate) struct FakePath;

impl Path for FakePath {
    const SAME_HOST: SameHost = SameHost::Off;
    const NAME: &'static str = "verbs";
    type Network = FakeNetwork;
    const STAGING_BYTES: u64 = PACKED_STAGING_BYTES;

    fn network() -> FakeNetwork {
        compat(1)
    }

    fn rdma(network: &FakeNetwork, rank: usize) -> RdmaConfig {
        network.rdma(rank)
    }
}

/// Rank 0 sends, rank 1 receives.
pub(crate) type Rig = Bench<EngineFabric<FakePath>>;

/// eRDMA "compat", the most treacherous of the presets: no flushes, no RNR, full queues that overrun, keys that repeat.
pub(crate) fn compat(rails: usize) -> FakeNetwork {
    network(&Behaviour::erdma_compat(), rails)
}

/// Two ranks with so many devices each, which pack or do not, as the binary of tests says.
pub(crate) fn network(behaviour: &Behaviour, rails: usize) -> FakeNetwork {
    let network = FakeNetwork::new(behaviour, 2, rails);
    if super::IS_PACKED {
        network.packed()
    } else {
        network
    }
}

/// Pages of 4 KiB in four buffers, so that a room of 100 takes 25 batches.
pub(crate) fn bulk() -> Model {
    Model {
        pages: 128,
        page_size: 16,
        head_bytes: 64,
        ..Model::default()
    }
}

/// A room with many batches.
pub(crate) fn bulk_deal(room: u64) -> Deal {
    Deal::new(&bulk(), room, &[100])
}

/// Two ranks that do not know each other yet.
pub(crate) fn strangers(network: FakeNetwork, model: &Model, node: &NodeConfig) -> Rig {
    let (layout, regions) = model.rank(Shard::ONE, Shard::ONE);
    let spec = RankSpec {
        layout: layout.clone(),
        regions,
        node: node.clone(),
    };
    Bench {
        fabric: EngineFabric::on(network, vec![spec.clone(), spec]),
        layouts: vec![layout.clone(), layout],
        sources: 1,
    }
}

/// Two connected ranks.
pub(crate) fn rig(network: FakeNetwork, model: &Model, node: &NodeConfig) -> Rig {
    let mut rig = strangers(network, model, node);
    rig.fabric.connect(1, 0).expect("the devices work");
    rig
}

/// Two connected ranks with the bulk model.
pub(crate) fn bulk_rig(network: FakeNetwork) -> Rig {
    rig(network, &bulk(), &NodeConfig::default())
}

pub(crate) fn devices(rig: &Rig) -> Devices {
    rig.fabric.network().fabric()
}

/// Waits until every queue pair that there should be is there and can send; those of rank 0.
#[track_caller]
pub(crate) fn settled(rig: &Rig) -> Vec<QueuePairId> {
    let network = rig.fabric.network();
    let (fabric, each) = (network.fabric(), usize::from(network.config.queue_pairs));
    let rails = network.fake.device_names().len() / 2;
    wait_for("every queue pair", || {
        let all = (0..2 * rails).map(|device| fabric.queues(device));
        let all: Vec<_> = all.collect();
        let is_full = all.iter().all(|queues| queues.len() == each);
        let is_ready = all.iter().flatten().all(|queue| fabric.is_ready(*queue));
        (is_full && is_ready).then(|| all[..rails].concat())
    })
}

/// Waits until a queue pair has been destroyed.
#[track_caller]
pub(crate) fn gone(rig: &Rig, queue: QueuePairId) {
    let fabric = devices(rig);
    wait_for("a broken queue pair to be destroyed", || {
        let is_gone = !fabric.queues(queue.device).contains(&queue);
        is_gone.then_some(())
    });
}

/// From here on no queue pair can be made: what breaks stays broken.
pub(crate) fn forbid_new_queues(rig: &Rig) {
    devices(rig).adjust(|behaviour| behaviour.queue_depth_max = 1);
}

/// Both sides of a room, granted; nothing is pushed yet. Source and target hold their patterns.
pub(crate) fn opened(rig: &mut Rig, deal: &Deal, timeout: Duration) -> (Transfer, Transfer) {
    rig.fill(deal.room);
    rig.fill_rank(1, BLANK);
    let mut request = rig.receive_of(1, deal);
    request.timeout = timeout * 10;
    let receive = rig.fabric.receive(1, &request).expect("it opens");
    // The sender is the first to give up, so that it says why.
    let send = rig
        .fabric
        .send(0, &to_send(deal.room, timeout.min(SOON / 2)));
    let send = send.expect("it opens");
    rig.fabric.wait_ready(&send).expect("it is granted");
    (send, receive)
}

/// Pushes all of a room.
pub(crate) fn push(rig: &mut Rig, deal: &Deal, send: &Transfer) {
    for chunk in deal.pushes() {
        rig.fabric.push(send, &chunk).expect("it is taken");
    }
}

/// Both sides must succeed, and every byte be there.
#[track_caller]
pub(crate) fn succeeded(rig: &mut Rig, deal: &Deal, send: &Transfer, receive: &Transfer) {
    for side in [receive, send] {
        let end = side.wait(SOON);
        end.expect("it ends in time").expect("it succeeds");
    }
    rig.check(1, deal, deal.room, BLANK);
}

/// Moves a whole room while `fault` happens after its first work requests were posted.
#[track_caller]
pub(crate) fn run_with_fault(rig: &mut Rig, deal: &Deal, fault: impl FnOnce(&Rig)) {
    use kvtransfer::testing::fake_verbs::Mode;
    let fabric = devices(rig);
    let (send, receive) = opened(rig, deal, SOON);
    fabric.set_mode(Mode::Manual);
    push(rig, deal, &send);
    wait_for("work requests", || (fabric.waiting() > 0).then_some(()));
    fault(rig);
    fabric.set_mode(Mode::Auto);
    succeeded(rig, deal, &send, &receive);
}

/// The addresses of a deal's KV pages at a rank.
pub(crate) fn addresses(rig: &Rig, rank: usize, items: &[i32]) -> Vec<Range<u64>> {
    let kv = &rig.layouts[rank].components[0];
    let region = rig.fabric.engine(rank).region(KV_REGION);
    let base = region.expect("it exists").base_address();
    let pages = items.iter().flat_map(|item| item_ranges(kv, *item));
    pages
        .map(|(_, offset, len)| base + offset..base + offset + len)
        .collect()
}
