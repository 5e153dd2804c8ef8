//! The standard mode's order: the passive side of a connection posts nothing before it has heard the active side. A user who
//! does is caught by the fabric: `a_passive_side_that_sends_first_kills_the_connect_in_standard_mode` of its own tests.

use std::{thread, time::Duration};

use kvtransfer::testing::{
    conformance::{FakeNetwork, SOON, wait_for},
    fake_verbs::{Behaviour, Fabric as Devices, Mode, QueuePairId},
};

use super::rig::{
    bulk_deal, bulk_rig, devices, gone, network, opened, push, run_with_fault, settled, succeeded,
};

/// Rounds in which both queue pairs are made anew.
const ROUNDS: u64 = 16;
/// How long the passive side is looked at while it has data and no word of the active side.
const LOOKS: u32 = 40;
const LOOK: Duration = Duration::from_micros(250);

fn standard() -> FakeNetwork {
    network(&Behaviour::erdma_standard(), 1)
}

fn posted(fabric: &Devices, queues: &[QueuePairId]) -> Vec<u64> {
    let counters = queues.iter().map(|queue| fabric.queue_counters(*queue));
    let sends = counters.map(|counters| counters.map_or(0, |counters| counters.send_requests));
    sends.collect()
}

/// Rank 0 sends. It was dialled, so it is the passive side of every connection, and it has a room full of pages to post.
#[test]
fn the_passive_side_posts_nothing_before_it_has_heard_the_active_side() {
    let mut rig = bulk_rig(standard());
    let fabric = devices(&rig);
    for number in 1..=ROUNDS {
        let old = settled(&rig);
        let theirs = fabric.queues(1);
        let deal = bulk_deal(number);
        let (send, receive) = opened(&mut rig, &deal, SOON);
        // From here on nothing that is posted moves: a hello stays where it is.
        fabric.set_mode(Mode::Manual);
        for queue in &old {
            fabric.kill(*queue);
        }
        push(&mut rig, &deal, &send);
        // Queue pairs are made one after the other: one at least has both ends now.
        let passive = wait_for("an active side's hello", || {
            let [ours, theirs] = [(0, &old), (1, &theirs)].map(|(device, old)| {
                let queues = fabric.queues(device).into_iter();
                queues
                    .filter(|queue| !old.contains(queue))
                    .collect::<Vec<_>>()
            });
            let has_spoken = posted(&fabric, &theirs).iter().any(|count| *count > 0);
            (!ours.is_empty() && has_spoken).then_some(ours)
        });
        for _ in 0..LOOKS {
            let sends = posted(&fabric, &passive);
            let is_silent = sends.iter().all(|count| *count == 0);
            assert!(is_silent, "round {number}: it spoke first: {sends:?}");
            thread::sleep(LOOK);
        }
        fabric.set_mode(Mode::Auto);
        succeeded(&mut rig, &deal, &send, &receive);
        assert_eq!(fabric.violations(), []);
        let now = fabric.queues(0);
        let is_alive = passive.iter().all(|queue| now.contains(queue));
        assert!(is_alive, "a connection died of it: {passive:?}, {now:?}");
    }
}

/// The same at full speed: what is posted moves at once.
#[test]
fn connections_that_are_made_under_traffic_carry_it() {
    let mut rig = bulk_rig(standard());
    for number in 1..=2 * ROUNDS {
        let queues = settled(&rig);
        run_with_fault(&mut rig, &bulk_deal(number), |rig| {
            for queue in &queues {
                devices(rig).kill(*queue);
            }
        });
        for queue in queues {
            gone(&rig, queue);
        }
        assert_eq!(devices(&rig).violations(), []);
    }
}
