//! Everything that can be made to go wrong.

use super::host::{Host, Memory, Pair, REMOTE, Request, is_readable, last_errno};
use crate::{
    testing::fake_verbs::{Behaviour, Fabric, FakeVerbs, Mode, QueuePairId, Violation},
    transport::verbs::sys,
};

struct Setup {
    _fake: FakeVerbs,
    fabric: Fabric,
    pair: Pair,
    source: Memory,
    target: Memory,
    a: QueuePairId,
}

fn setup(preset: Behaviour) -> Setup {
    let fake = FakeVerbs::new(preset);
    let mut pair = Pair::new(&fake);
    let source = pair.a.register(64, 5, 0);
    let target = pair.b.register(64, 0, REMOTE);
    Setup {
        fabric: fake.fabric(),
        a: pair.a.id(pair.qa),
        _fake: fake,
        pair,
        source,
        target,
    }
}

impl Setup {
    fn write(&self, id: u64) -> Request {
        let list = vec![self.source.sge(0, 8)];
        Request::write(id, list, self.target.addr + 8 * id, self.target.key)
    }

    fn post(&self, ids: impl IntoIterator<Item = u64>) -> (i32, usize) {
        let write = |id| self.write(id).signalled();
        let mut chain: Vec<Request> = ids.into_iter().map(write).collect();
        self.pair.a.post(self.pair.qa, &mut chain)
    }

    fn landed(&self) -> Vec<bool> {
        self.target
            .bytes()
            .chunks(8)
            .map(|row| row == [5; 8])
            .collect()
    }
}

#[test]
fn a_post_fails_at_the_request_that_was_asked_for() {
    let setup = setup(Behaviour::erdma_compat());
    setup.fabric.fail_post(setup.a, 2, libc::EIO);
    assert_eq!(setup.post(0..5), (-libc::EIO, 2));
    assert_eq!(
        setup.landed()[..3],
        [true, true, false],
        "what was taken is executed"
    );
    assert_eq!(setup.post(2..5), (0, 3), "and it fails once");
}

#[test]
fn a_completion_is_dropped() {
    let setup = setup(Behaviour::erdma_compat());
    setup.fabric.drop_completion(setup.a, 1);
    assert_eq!(setup.post(0..3), (0, 3));
    let ok = sys::IBV_WC_SUCCESS;
    assert_eq!(setup.pair.a.outcomes(), [(0, ok), (2, ok)]);
    assert_eq!(setup.fabric.counters().completions_lost, 1);
}

#[test]
fn every_status_can_be_injected_with_and_without_the_bytes() {
    for flushes in [true, false] {
        for lands in [true, false] {
            for status in sys::IBV_WC_LOC_LEN_ERR..=sys::IBV_WC_GENERAL_ERR {
                let mut preset = Behaviour::erdma_compat();
                preset.flushes = flushes;
                let setup = setup(preset);
                setup.fabric.fail_request(setup.a, 1, status, lands);
                assert_eq!(setup.post(0..4), (0, 4));
                let mut expected = vec![(0, sys::IBV_WC_SUCCESS), (1, status)];
                if flushes {
                    expected.extend([2, 3].map(|id| (id, sys::IBV_WC_WR_FLUSH_ERR)));
                }
                assert_eq!(setup.pair.a.outcomes(), expected);
                assert_eq!(setup.landed()[..4], [true, lands, false, false]);
                assert!(!setup.fabric.is_ready(setup.a));
            }
        }
    }
}

#[test]
fn held_completions_come_late_and_in_order() {
    let setup = setup(Behaviour::erdma_compat());
    setup.fabric.hold_completions(0, true);
    assert_eq!(setup.post(0..2), (0, 2));
    setup.pair.a.arm(false);
    assert_eq!(setup.landed()[..2], [true, true]);
    assert_eq!(setup.pair.a.outcomes(), []);
    assert!(!is_readable(setup.pair.a.completion_fd()));
    setup.fabric.hold_completions(0, false);
    assert!(is_readable(setup.pair.a.completion_fd()));
    let ok = sys::IBV_WC_SUCCESS;
    assert_eq!(setup.pair.a.outcomes(), [(0, ok), (1, ok)]);
}

#[test]
fn stepping_executes_one_request_at_a_time_in_the_order_of_posting() {
    let mut setup = setup(Behaviour::erdma_compat());
    setup.fabric.set_mode(Mode::Manual);
    let (qc, qd) = (setup.pair.a.queue(), setup.pair.b.queue());
    Pair::join(&setup.pair.a, qc, &setup.pair.b, qd);
    assert_eq!(setup.post([0]), (0, 1));
    setup.pair.a.post_ok(qc, &mut [setup.write(1).signalled()]);
    assert_eq!(setup.post([2]), (0, 1));
    for done in 1..=3 {
        assert!(setup.fabric.step());
        assert_eq!(setup.landed().iter().filter(|row| **row).count(), done);
        assert!(setup.landed()[..done].iter().all(|row| *row));
    }
    assert!(!setup.fabric.step());
    let ids: Vec<u64> = setup.pair.a.poll().iter().map(|wc| wc.wr_id).collect();
    assert_eq!(ids, [0, 1, 2]);
    assert_eq!(setup.post([3]), (0, 1));
    setup.fabric.set_mode(Mode::Auto);
    assert!(setup.landed()[3], "going automatic executes what waits");
}

#[test]
fn a_cut_link_answers_nothing_until_retries_run_out() {
    let setup = setup(Behaviour::erdma_compat());
    setup.fabric.cut(1, 0);
    assert_eq!(setup.post(0..2), (0, 2));
    setup.fabric.tick(23);
    assert_eq!(setup.pair.a.outcomes(), []);
    assert_eq!(setup.fabric.waiting(), 2);
    setup.fabric.tick(1);
    assert_eq!(setup.pair.a.outcomes(), [(0, sys::IBV_WC_RETRY_EXC_ERR)]);
    setup.fabric.mend(0, 1);
    setup.fabric.run();
    assert_eq!(setup.landed()[..2], [false, false]);
}

#[test]
fn a_link_mended_in_time_loses_nothing() {
    let setup = setup(Behaviour::erdma_compat());
    setup.fabric.cut(0, 1);
    assert_eq!(setup.post(0..2), (0, 2));
    setup.fabric.tick(20);
    setup.fabric.mend(0, 1);
    let ok = sys::IBV_WC_SUCCESS;
    assert_eq!(setup.pair.a.outcomes(), [(0, ok), (1, ok)]);
    setup.fabric.tick(100);
    assert_eq!(setup.pair.a.outcomes(), []);
}

#[test]
fn a_dead_peer_is_invisible_until_something_is_sent() {
    let Setup {
        mut pair,
        fabric,
        source,
        target,
        ..
    } = setup(Behaviour::erdma_compat());
    assert_eq!(pair.b.destroy(pair.qb), 0);
    fabric.tick(1000);
    assert_eq!(pair.a.async_event(), None);
    let write = Request::write(1, vec![source.sge(0, 8)], target.addr, target.key);
    pair.a.post_ok(pair.qa, &mut [write]);
    fabric.tick(24);
    assert_eq!(pair.a.outcomes(), [(1, sys::IBV_WC_RETRY_EXC_ERR)]);
    assert_eq!(target.bytes(), [0; 64]);
}

#[test]
fn a_port_goes_down_and_up_with_its_events() {
    let setup = setup(Behaviour::erdma_compat());
    let fd = setup.pair.b.async_fd();
    assert!(!is_readable(fd));
    setup.fabric.set_port(1, false);
    setup.fabric.set_port(1, false);
    assert!(is_readable(fd));
    assert_eq!(
        setup.pair.b.async_event(),
        Some((sys::IBV_EVENT_PORT_ERR, 0))
    );
    assert_eq!(setup.pair.b.async_event(), None);
    assert_eq!(setup.pair.b.port().state, sys::IBV_PORT_DOWN);
    assert_eq!(setup.post([0]), (0, 1));
    assert!(!setup.landed()[0]);
    setup.fabric.set_port(1, true);
    assert_eq!(
        setup.pair.b.async_event(),
        Some((sys::IBV_EVENT_PORT_ACTIVE, 0))
    );
    assert!(setup.landed()[0]);
    assert_eq!(setup.pair.b.port().state, sys::IBV_PORT_ACTIVE);
}

#[test]
fn a_removed_device_fails_everything() {
    let Setup {
        mut pair,
        fabric,
        source,
        target,
        ..
    } = setup(Behaviour::erdma_compat());
    fabric.remove_device(0);
    assert_eq!(pair.a.async_event(), Some((sys::IBV_EVENT_DEVICE_FATAL, 0)));
    let write = Request::write(1, vec![source.sge(0, 8)], target.addr, target.key);
    assert_eq!(pair.a.post(pair.qa, &mut [write]), (-libc::EIO, 0));
    assert_eq!(pair.a.receive(pair.qa, 1, vec![]), -libc::EIO);
    assert_eq!(pair.a.poll_code(), -libc::EIO);
    assert_eq!(pair.a.to_state(pair.qa, sys::IBV_QPS_ERR), libc::EIO);
    let attr = super::host::attributes(&pair.a);
    assert_eq!(pair.a.try_queue(attr), Err(libc::EIO));
    let pd = pair.a.pd;
    assert_eq!(pair.a.try_register(pd, 8, 0, REMOTE).err(), Some(libc::EIO));
    assert_eq!(pair.a.destroy(pair.qa), 0, "what is there can be destroyed");
    fabric.assert_clean();
}

#[test]
fn a_frozen_host_hears_nothing_while_its_adapter_lets_writes_in() {
    let setup = setup(Behaviour::erdma_compat());
    assert_eq!(setup.pair.b.receive(setup.pair.qb, 9, vec![]), 0);
    setup.pair.b.arm(false);
    setup.fabric.freeze(1);
    assert_eq!(setup.post([0]), (0, 1));
    let send = Request::send(1, vec![]);
    setup.pair.a.post_ok(setup.pair.qa, &mut [send]);
    setup.fabric.set_port(1, false);
    assert!(setup.landed()[0]);
    assert_eq!(setup.pair.b.outcomes(), []);
    assert!(!is_readable(setup.pair.b.completion_fd()));
    assert!(!is_readable(setup.pair.b.async_fd()));
    setup.fabric.thaw(1);
    assert!(is_readable(setup.pair.b.completion_fd()));
    assert_eq!(setup.pair.b.outcomes(), [(9, sys::IBV_WC_SUCCESS)]);
    assert_eq!(
        setup.pair.b.async_event(),
        Some((sys::IBV_EVENT_PORT_ERR, 0))
    );
}

#[test]
fn a_queue_pair_dies_of_itself() {
    let setup = setup(Behaviour::erdma_compat());
    setup.fabric.kill(setup.a);
    let number = setup.a.number;
    assert_eq!(
        setup.pair.a.async_event(),
        Some((sys::IBV_EVENT_QP_FATAL, number))
    );
    // eRDMA's provider does not know it, and takes posts until somebody asks for the state.
    assert_eq!(setup.post([0]), (0, 1));
    assert_eq!(setup.pair.a.outcomes(), []);
    assert_eq!(setup.pair.a.to_state(setup.pair.qa, sys::IBV_QPS_ERR), 0);
    assert_eq!(setup.post([0]), (-libc::EINVAL, 0));
}

#[test]
fn the_error_state_flushes_where_stacks_flush() {
    for flushes in [true, false] {
        let mut preset = Behaviour::erdma_compat();
        preset.flushes = flushes;
        let setup = setup(preset);
        setup.fabric.set_mode(Mode::Manual);
        assert_eq!(setup.pair.a.receive(setup.pair.qa, 7, vec![]), 0);
        assert_eq!(setup.post(0..2), (0, 2));
        assert_eq!(setup.pair.a.to_state(setup.pair.qa, sys::IBV_QPS_ERR), 0);
        let flushed = sys::IBV_WC_WR_FLUSH_ERR;
        let expected: &[(u64, u32)] = if flushes {
            &[(0, flushed), (1, flushed), (7, flushed)]
        } else {
            &[]
        };
        assert_eq!(setup.pair.a.outcomes(), expected);
        // Flushed is not "did not happen": both were on the wire already.
        assert_eq!(setup.fabric.run(), 2);
        assert_eq!(setup.landed()[..2], [true, true]);
    }
}

#[test]
fn roce_takes_posts_in_error_and_flushes_them() {
    let setup = setup(Behaviour::roce());
    assert_eq!(setup.pair.a.to_state(setup.pair.qa, sys::IBV_QPS_ERR), 0);
    assert_eq!(setup.post([0]), (0, 1));
    assert_eq!(setup.pair.a.outcomes(), [(0, sys::IBV_WC_WR_FLUSH_ERR)]);
    assert_eq!(setup.pair.a.receive(setup.pair.qa, 1, vec![]), 0);
    assert_eq!(setup.pair.a.outcomes(), [(1, sys::IBV_WC_WR_FLUSH_ERR)]);
}

#[test]
fn reset_does_nothing_on_erdma_and_everything_on_roce() {
    for (preset, still_connected) in [
        (Behaviour::erdma_compat(), true),
        (Behaviour::roce(), false),
    ] {
        let setup = setup(preset);
        assert_eq!(setup.pair.a.to_state(setup.pair.qa, sys::IBV_QPS_RESET), 0);
        let posted = setup.post([0]);
        assert_eq!(posted.0 == 0, still_connected);
        assert_eq!(setup.landed()[0], still_connected);
    }
}

#[test]
fn destroying_with_events_not_acknowledged_is_told_instead_of_hanging() {
    let Setup {
        mut pair,
        fabric,
        a,
        ..
    } = setup(Behaviour::erdma_compat());
    fabric.kill(a);
    let event = pair.a.unacked_async_event().expect("QP_FATAL");
    assert_eq!(pair.a.destroy(pair.qa), libc::EBUSY);
    let call = "destroy_qp";
    assert_eq!(
        fabric.violations(),
        [Violation::EventsNotAcknowledged { call, count: 1 }]
    );
    pair.a.ack_async_event(event);
    assert_eq!(pair.a.destroy(pair.qa), 0);
}

#[test]
fn events_of_a_destroyed_queue_pair_are_taken_back() {
    let Setup {
        mut pair,
        fabric,
        a,
        ..
    } = setup(Behaviour::erdma_compat());
    fabric.kill(a);
    assert!(is_readable(pair.a.async_fd()));
    assert_eq!(pair.a.destroy(pair.qa), 0);
    assert!(!is_readable(pair.a.async_fd()));
    assert_eq!(pair.a.async_event(), None);
    assert_eq!(last_errno(), libc::EAGAIN);
}

#[test]
fn a_queue_pair_number_used_again_is_another_connection() {
    let Setup {
        mut pair,
        fabric,
        source,
        target,
        ..
    } = setup(Behaviour::erdma_compat());
    let write = |id| Request::write(id, vec![source.sge(0, 8)], target.addr, target.key);
    pair.a.post_ok(pair.qa, &mut [write(1)]);
    let number = pair.b.id(pair.qb).number;
    assert_eq!(pair.b.destroy(pair.qb), 0);
    fabric.set_next_queue_number(1, number);
    let new = pair.b.queue();
    assert_eq!(pair.b.to_rtr(new, &pair.a, pair.qa), 0);
    target.fill(0);
    pair.a.post_ok(pair.qa, &mut [write(2)]);
    assert_eq!(
        target.bytes(),
        [0; 64],
        "the old sequence numbers mean nothing to it"
    );
    fabric.tick(24);
    assert_eq!(pair.a.outcomes(), [(2, sys::IBV_WC_RETRY_EXC_ERR)]);
}

#[test]
fn threads_may_post_and_poll_at_once() {
    let fake = FakeVerbs::new(Behaviour::erdma_compat());
    let fabric = fake.fabric();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let fake = &fake;
            scope.spawn(move || {
                let mut one = Host::new(fake, 0);
                let mut other = Host::new(fake, 1);
                let (qa, qb) = (one.queue(), other.queue());
                Pair::join(&one, qa, &other, qb);
                let source = one.register(4096, 5, 0);
                let target = other.register(4096, 0, REMOTE);
                for id in 0..500 {
                    let list = vec![source.sge(0, 4096)];
                    let write = Request::write(id, list, target.addr, target.key);
                    one.post_ok(qa, &mut [write.signalled()]);
                    assert_eq!(one.outcomes(), [(id, sys::IBV_WC_SUCCESS)]);
                }
                assert_eq!(target.bytes(), [5; 4096]);
            });
        }
    });
    assert_eq!(fabric.counters().bytes_written, 2 * 500 * 4096);
}
