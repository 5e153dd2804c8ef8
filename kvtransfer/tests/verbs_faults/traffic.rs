//! What traffic costs in doorbells and completions.

use kvtransfer::{
    testing::{conformance::Deal, fake_verbs::QueueCounters, model::Model},
    transfer::NodeConfig,
};

use super::rig::{Rig, compat, devices, rig, settled};

/// What the living queue pairs of rank 0 have counted.
fn sent(rig: &Rig) -> QueueCounters {
    let fabric = devices(rig);
    let all = fabric.queues(0).into_iter();
    let all = all.filter_map(|queue| fabric.queue_counters(queue));
    all.fold(QueueCounters::default(), |sum, one| QueueCounters {
        send_doorbells: sum.send_doorbells + one.send_doorbells,
        send_requests: sum.send_requests + one.send_requests,
        send_completions: sum.send_completions + one.send_completions,
        writes: sum.writes + one.writes,
        ..sum
    })
}

/// A bulk room over one page size: work requests per doorbell and per completion at the sender.
fn ratios(immediate: bool, model: &Model, pages: usize) {
    let mut network = compat(1);
    network.config.immediate = immediate;
    network.config.batch_bytes = 2 << 20;
    let mut rig = rig(network, model, &NodeConfig::default());
    settled(&rig);
    let before = sent(&rig);
    rig.run(&Deal::new(model, 1, &[pages]));
    let after = sent(&rig);
    let requests = after.send_requests - before.send_requests;
    let doorbells = after.send_doorbells - before.send_doorbells;
    let completions = after.send_completions - before.send_completions;
    let writes = after.writes - before.writes;
    assert!(
        writes >= 4 * pages as u64,
        "{writes} writes for {pages} pages"
    );
    assert!(
        completions * 32 <= requests,
        "{completions} completions for {requests} requests"
    );
    assert!(
        doorbells * 16 <= requests,
        "{doorbells} doorbells for {requests} requests"
    );
}

#[test]
fn bulk_blocks_of_64_kib_cost_few_doorbells_and_completions() {
    let model = Model {
        pages: 128,
        page_size: 64,
        head_bytes: 256,
        has_state: false,
        ..Model::default()
    };
    for immediate in [false, true] {
        ratios(immediate, &model, 96);
    }
}

#[test]
fn scattered_pages_of_4_kib_cost_few_doorbells_and_completions() {
    let model = Model {
        pages: 1024,
        page_size: 16,
        head_bytes: 64,
        has_state: false,
        ..Model::default()
    };
    for immediate in [false, true] {
        ratios(immediate, &model, 1000);
    }
}
