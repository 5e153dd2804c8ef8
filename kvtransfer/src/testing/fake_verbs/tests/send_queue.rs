//! Send queue space: what a user must count, and what happens to one who does not.

use super::host::{DEPTH, Pair, REMOTE, Request, attributes};
use crate::{
    testing::fake_verbs::{Behaviour, Fabric, FakeVerbs, Mode, SendQueueRule, Violation},
    transport::verbs::sys,
};

struct Setup {
    _fake: FakeVerbs,
    fabric: Fabric,
    pair: Pair,
    source: super::host::Memory,
    target: super::host::Memory,
}

fn setup(preset: Behaviour) -> Setup {
    let fake = FakeVerbs::new(preset);
    let mut pair = Pair::new(&fake);
    let source = pair.a.register(4096, 5, 0);
    let target = pair.b.register(4096, 0, REMOTE);
    Setup {
        fabric: fake.fabric(),
        _fake: fake,
        pair,
        source,
        target,
    }
}

impl Setup {
    fn write(&self, id: u64, segments: u32) -> Request {
        let list = (0..segments).map(|at| self.source.sge(at * 8, 8)).collect();
        Request::write(id, list, self.target.addr, self.target.key)
    }
}

#[test]
fn unsignalled_requests_fill_the_queue_for_good_where_real_providers_count() {
    for (preset, room) in [
        // WRITEs of one segment take two blocks of the 4 × 64: twice what was asked for is taken, by luck.
        (Behaviour::erdma_compat(), 2 * DEPTH),
        (Behaviour::roce(), DEPTH),
    ] {
        let negative = preset.negative_errno;
        let setup = setup(preset);
        let pair = &setup.pair;
        for id in 0..room {
            pair.a
                .post_ok(pair.qa, &mut [setup.write(u64::from(id), 1)]);
        }
        let code = if negative {
            -libc::ENOMEM
        } else {
            libc::ENOMEM
        };
        for _ in 0..3 {
            let refused = pair.a.post(pair.qa, &mut [setup.write(1, 1).signalled()]);
            assert_eq!(refused, (code, 0));
            assert_eq!(
                pair.a.outcomes(),
                [],
                "there is nothing to poll, so it stays full"
            );
        }
        let counters = setup.fabric.counters().queues;
        assert_eq!((counters.full, counters.overruns), (3, 0));
        assert_eq!(counters.past_depth, u64::from(room - DEPTH));
    }
}

#[test]
fn a_lenient_provider_hides_that() {
    let mut preset = Behaviour::erdma_compat();
    preset.send_queue = SendQueueRule::Lenient;
    let setup = setup(preset);
    for id in 0..200 {
        setup
            .pair
            .a
            .post_ok(setup.pair.qa, &mut [setup.write(id, 1)]);
    }
    assert!(
        setup.fabric.counters().queues.past_depth > 0,
        "but it is told"
    );
}

#[test]
fn a_polled_completion_gives_back_everything_before_it() {
    let setup = setup(Behaviour::erdma_compat());
    let pair = &setup.pair;
    for round in 0..20 {
        let mut chain: Vec<Request> = (0..u64::from(DEPTH) - 1)
            .map(|id| setup.write(id, 4))
            .collect();
        chain.push(setup.write(1000 + round, 4).signalled());
        pair.a.post_ok(pair.qa, &mut chain);
        assert_eq!(pair.a.outcomes(), [(1000 + round, sys::IBV_WC_SUCCESS)]);
    }
    let counters = setup.fabric.counters();
    assert_eq!(counters.queues.outstanding_max, u64::from(DEPTH));
    assert_eq!(counters.queues.past_depth, 0);
    assert!(counters.completions_per_request() <= 1.0 / 32.0);
    assert!(counters.doorbells_per_request() <= 1.0 / 16.0);
    setup.fabric.assert_clean();
}

#[test]
fn a_user_who_posts_until_the_provider_says_full_overruns() {
    let mut preset = Behaviour::erdma_compat();
    preset.flushes = true;
    let setup = setup(preset);
    setup.fabric.set_mode(Mode::Manual);
    let pair = &setup.pair;
    // Three blocks each do not divide 256, so the last one taken runs over the first.
    let mut posted = 0;
    while pair.a.post(pair.qa, &mut [setup.write(posted, 4)]).0 == 0 {
        posted += 1;
    }
    assert_eq!(posted, 86);
    let counters = setup.fabric.counters().queues;
    assert_eq!(counters.overruns, 1);
    let caught = setup.fabric.violations();
    let depth = DEPTH;
    assert!(
        matches!(caught[..], [Violation::SendQueueOverrun { wr_id: 85, outstanding: 86, depth: d, .. }] if d == depth),
        "{caught:?}"
    );
    // And one request of the 86 was really lost.
    assert_eq!(setup.fabric.run(), 85);
}

#[test]
fn a_full_queue_in_the_middle_of_a_chain_says_which_request_was_first_not_taken() {
    let setup = setup(Behaviour::roce());
    let pair = &setup.pair;
    let mut chain: Vec<Request> = (0..u64::from(DEPTH) + 5)
        .map(|id| setup.write(id, 1))
        .collect();
    let taken = pair.a.post(pair.qa, &mut chain);
    assert_eq!(taken, (libc::ENOMEM, DEPTH as usize));
    assert_eq!(setup.fabric.counters().queues.send_doorbells, 1);
}

#[test]
fn a_request_larger_than_the_queue_pair_was_made_for_is_refused() {
    let setup = setup(Behaviour::erdma_compat());
    let pair = &setup.pair;
    let refused = (-libc::EINVAL, 0);
    assert_eq!(pair.a.post(pair.qa, &mut [setup.write(1, 5)]), refused);
    let long = Request::send(1, vec![setup.source.sge(0, 33)]).inline();
    assert_eq!(pair.a.post(pair.qa, &mut [long]), refused);
    // The second of a chain: the first was taken and executed.
    let mut chain = [setup.write(1, 1).signalled(), setup.write(2, 5)];
    assert_eq!(pair.a.post(pair.qa, &mut chain), (-libc::EINVAL, 1));
    assert_eq!(pair.a.outcomes(), [(1, sys::IBV_WC_SUCCESS)]);
}

#[test]
fn receives_beyond_the_depth_are_refused() {
    let setup = setup(Behaviour::erdma_compat());
    let pair = &setup.pair;
    for id in 0..u64::from(DEPTH) {
        assert_eq!(pair.b.receive(pair.qb, id, vec![]), 0);
    }
    assert_eq!(pair.b.receive(pair.qb, 0, vec![]), -libc::ENOMEM);
    assert_eq!(
        setup.fabric.counters().queues.recv_requests,
        u64::from(DEPTH)
    );
}

#[test]
fn a_completion_queue_that_is_too_small_loses_completions_and_is_told() {
    let fake = FakeVerbs::new(Behaviour::roce());
    let mut pair = Pair::with_entries(&fake, 4);
    let source = pair.a.register(8, 5, 0);
    let target = pair.b.register(8, 0, REMOTE);
    for id in 0..6 {
        let write = Request::write(id, vec![source.sge(0, 8)], target.addr, target.key);
        pair.a.post_ok(pair.qa, &mut [write.signalled()]);
    }
    assert_eq!(pair.a.outcomes().len(), 4);
    assert_eq!(pair.a.async_event(), Some((sys::IBV_EVENT_CQ_ERR, 0)));
    assert_eq!(fake.fabric().counters().completions_lost, 2);
    assert_eq!(
        fake.fabric().violations()[0],
        Violation::CompletionQueueOverrun {
            device: 0,
            capacity: 4
        }
    );
}

#[test]
fn the_completions_of_a_destroyed_queue_pair_never_come() {
    let setup = setup(Behaviour::erdma_compat());
    let Setup {
        mut pair, fabric, ..
    } = setup;
    let mut chain: Vec<Request> = (0..3)
        .map(|id| Request::send(id, vec![]).signalled())
        .collect();
    for id in 0..3 {
        assert_eq!(pair.b.receive(pair.qb, id, vec![]), 0);
    }
    pair.a.post_ok(pair.qa, &mut chain);
    assert_eq!(pair.a.destroy(pair.qa), 0);
    assert_eq!(pair.a.outcomes(), []);
    assert_eq!(fabric.counters().completions_lost, 3);
    assert_eq!(fabric.counters().queues.send_requests, 3, "counts survive");
    // A second destroy, and a post, are use after free on real hardware.
    assert_ne!(pair.a.destroy(pair.qa), 0);
    assert_ne!(pair.a.post(pair.qa, &mut chain).0, 0);
    assert_eq!(
        fabric.violations(),
        [
            Violation::UseAfterDestroy { call: "destroy_qp" },
            Violation::UseAfterDestroy { call: "post_send" },
        ]
    );
}

#[test]
fn a_queue_pair_must_not_be_destroyed_while_its_completions_are_polled() {
    // One thread polls without end; the other destroys. Whether they meet is chance, so this asks the count that the
    // check uses: a queue that nobody polls is free to go.
    let setup = setup(Behaviour::erdma_compat());
    let Setup {
        mut pair, fabric, ..
    } = setup;
    assert_eq!(pair.a.destroy(pair.qa), 0);
    fabric.assert_clean();
    let another = pair.a.queue();
    let id = pair.a.id(another);
    pair.a.pretend_to_poll(1);
    assert_eq!(pair.a.destroy(another), 0);
    pair.a.pretend_to_poll(-1);
    assert_eq!(
        fabric.violations(),
        [Violation::DestroyedDuringPoll { queue: id }]
    );
}

#[test]
fn queue_pair_numbers_come_round() {
    let fake = FakeVerbs::new(Behaviour::erdma_compat());
    let mut pair = Pair::new(&fake);
    fake.fabric().set_next_queue_number(0, (1 << 24) - 1);
    let last = pair.a.queue();
    assert_eq!(pair.a.id(last).number, (1 << 24) - 1);
    let next = pair.a.queue();
    assert_eq!(pair.a.id(next).number, 3, "2 is in use");
    let attr = attributes(&pair.a);
    assert!(pair.a.try_queue(attr).is_ok());
}
