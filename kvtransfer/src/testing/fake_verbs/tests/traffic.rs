//! Bytes, messages, keys and fences.

use super::host::{Host, Memory, Pair, REMOTE, Request, attributes, is_readable, last_errno};
use crate::{
    testing::fake_verbs::{Behaviour, FakeVerbs, Mode},
    transport::verbs::sys,
};

fn presets() -> [Behaviour; 2] {
    [Behaviour::erdma_compat(), Behaviour::roce()]
}

#[test]
fn a_chain_of_gathers_lands_and_its_notice_is_received_after_it() {
    for preset in presets() {
        let fake = FakeVerbs::new(preset);
        let mut pair = Pair::new(&fake);
        let source = pair.a.register(4096, 7, 0);
        let target = pair.b.register(4096, 0, REMOTE);
        let inbox = pair.b.register(64, 0, sys::IBV_ACCESS_LOCAL_WRITE);
        assert_eq!(pair.b.receive(pair.qb, 99, vec![inbox.sge(0, 64)]), 0);
        let gather = vec![
            source.sge(0, 100),
            source.sge(1000, 28),
            source.sge(4000, 96),
        ];
        let mut chain = [
            Request::write(1, gather, target.addr + 10, target.key),
            Request::write(2, vec![source.sge(0, 5)], target.addr + 1000, target.key),
            Request::send(3, vec![source.sge(0, 16)])
                .signalled()
                .inline(),
        ];
        pair.a.post_ok(pair.qa, &mut chain);
        let mut expected = vec![0; 4096];
        expected[10..234].fill(7);
        expected[1000..1005].fill(7);
        assert_eq!(target.bytes(), expected);
        let sent = pair.a.poll();
        assert_eq!(sent.len(), 1, "only the notice was signalled");
        assert_eq!((sent[0].wr_id, sent[0].status), (3, sys::IBV_WC_SUCCESS));
        let got = pair.b.poll();
        assert_eq!((got[0].wr_id, got[0].byte_len), (99, 16));
        assert_eq!(got[0].opcode, sys::IBV_WC_RECV);
        assert_eq!(got[0].qp_num, pair.b.id(pair.qb).number);
        assert_eq!(inbox.bytes()[..16], [7; 16]);
        let counters = fake.fabric().counters();
        assert_eq!(counters.queues.send_doorbells, 1);
        assert_eq!(counters.queues.send_requests, 3);
        assert_eq!(counters.queues.send_completions, 1);
        assert_eq!(counters.bytes_written, 229);
        fake.fabric().assert_clean();
    }
}

#[test]
fn inline_bytes_are_taken_at_the_post_and_others_when_the_adapter_reads_them() {
    let fake = FakeVerbs::new(Behaviour::erdma_compat());
    let mut pair = Pair::new(&fake);
    fake.fabric().set_mode(Mode::Manual);
    let source = pair.a.register(64, 1, 0);
    let target = pair.b.register(64, 0, REMOTE);
    let mut chain = [
        Request::write(1, vec![source.sge(0, 16)], target.addr, target.key).inline(),
        Request::write(2, vec![source.sge(0, 16)], target.addr + 16, target.key),
    ];
    pair.a.post_ok(pair.qa, &mut chain);
    source.fill(2);
    assert_eq!(fake.fabric().run(), 2);
    assert_eq!(target.bytes()[..32], [[1; 16], [2; 16]].concat());
}

#[test]
fn immediate_data_takes_a_receive_where_it_exists_and_is_refused_where_not() {
    let fake = FakeVerbs::new(Behaviour::erdma_compat());
    let mut pair = Pair::new(&fake);
    let source = pair.a.register(64, 5, 0);
    let target = pair.b.register(64, 0, REMOTE);
    assert_eq!(pair.b.receive(pair.qb, 4, vec![]), 0);
    let to = (target.addr, target.key);
    let imm = 0xdead_u32.to_be();
    let mut write = [Request::write_imm(1, vec![source.sge(0, 64)], to, imm).signalled()];
    pair.a.post_ok(pair.qa, &mut write);
    let got = pair.b.poll();
    assert_eq!(got[0].opcode, sys::IBV_WC_RECV_RDMA_WITH_IMM);
    assert_eq!((got[0].imm_data, got[0].byte_len), (imm, 64));
    assert_ne!(got[0].wc_flags & sys::IBV_WC_WITH_IMM, 0);
    assert_eq!(target.bytes(), [5; 64]);

    fake.fabric()
        .adjust(|behaviour| behaviour.immediate = false);
    assert_eq!(pair.a.post(pair.qa, &mut write), (-libc::EINVAL, 0));
}

/// What the sender of one signalled WRITE to a bad place sees, and what happens to both queue pairs.
fn bad_write(preset: Behaviour, spoil: impl Fn(&mut Pair, &Memory) -> (u64, u32)) -> Seen {
    let fake = FakeVerbs::new(preset);
    let mut pair = Pair::new(&fake);
    let source = pair.a.register(64, 5, 0);
    let target = pair.b.register(64, 0, REMOTE);
    let (addr, key) = spoil(&mut pair, &target);
    let mut chain = [
        Request::write(1, vec![source.sge(0, 64)], addr, key).signalled(),
        Request::write(2, vec![source.sge(0, 64)], target.addr, target.key).signalled(),
    ];
    pair.a.post_ok(pair.qa, &mut chain);
    let counters = fake.fabric().counters();
    assert_eq!(
        target.bytes(),
        [0; 64],
        "nothing landed, the good one neither"
    );
    assert!(!fake.fabric().is_ready(pair.b.id(pair.qb)));
    assert!(!fake.fabric().is_ready(pair.a.id(pair.qa)));
    Seen {
        sender: pair.a.outcomes(),
        target_event: pair.b.async_event().map(|(kind, _)| kind),
        refused: [
            counters.refused_key,
            counters.refused_bounds,
            counters.refused_domain,
            counters.refused_access,
        ],
    }
}

#[derive(Debug, PartialEq)]
struct Seen {
    sender: Vec<(u64, u32)>,
    target_event: Option<u32>,
    refused: [u64; 4],
}

#[test]
fn a_bad_key_completes_with_success_on_erdma_and_with_an_error_on_roce() {
    let bad_key = |_: &mut Pair, target: &Memory| (target.addr, target.key + 0x5500);
    // A naive sender believes this completion.
    assert_eq!(
        bad_write(Behaviour::erdma_compat(), bad_key),
        Seen {
            sender: vec![(1, sys::IBV_WC_SUCCESS)],
            target_event: Some(sys::IBV_EVENT_QP_FATAL),
            refused: [1, 0, 0, 0],
        }
    );
    assert_eq!(
        bad_write(Behaviour::roce(), bad_key),
        Seen {
            sender: vec![
                (1, sys::IBV_WC_REM_ACCESS_ERR),
                (2, sys::IBV_WC_WR_FLUSH_ERR)
            ],
            target_event: Some(sys::IBV_EVENT_QP_ACCESS_ERR),
            refused: [1, 0, 0, 0],
        }
    );
}

#[test]
fn bounds_and_domains_are_refused_like_keys() {
    let past_end = |_: &mut Pair, target: &Memory| (target.addr + 1, target.key);
    let seen = bad_write(Behaviour::erdma_compat(), past_end);
    assert_eq!(seen.sender, [(1, sys::IBV_WC_SUCCESS)]);
    assert_eq!(seen.refused, [0, 1, 0, 0]);

    let other_domain = |pair: &mut Pair, _: &Memory| {
        let other = pair.b.second_domain();
        let memory = pair
            .b
            .try_register(other, 64, 0, REMOTE)
            .expect("registered");
        (memory.addr, memory.key)
    };
    let seen = bad_write(Behaviour::roce(), other_domain);
    assert_eq!(seen.refused, [0, 0, 1, 0]);
}

#[test]
fn compat_mode_lets_peers_write_memory_that_was_not_registered_for_it() {
    for (preset, lands) in [
        (Behaviour::erdma_compat(), true),
        (Behaviour::roce(), false),
    ] {
        let fake = FakeVerbs::new(preset);
        let mut pair = Pair::new(&fake);
        let source = pair.a.register(8, 5, 0);
        let target = pair.b.register(8, 0, sys::IBV_ACCESS_LOCAL_WRITE);
        let mut write = [Request::write(
            1,
            vec![source.sge(0, 8)],
            target.addr,
            target.key,
        )];
        pair.a.post_ok(pair.qa, &mut write);
        assert_eq!(target.bytes() == [5; 8], lands);
        assert_eq!(fake.fabric().counters().refused_access, u64::from(!lands));
    }
}

#[test]
fn an_old_key_reaches_whatever_took_its_slot() {
    let fake = FakeVerbs::new(Behaviour::erdma_compat());
    let mut pair = Pair::new(&fake);
    let source = pair.a.register(8, 5, 0);
    let old = pair.b.register(8, 0, REMOTE);
    assert_eq!(old.key & 0xff, 0, "the key byte is always zero");
    pair.b.deregister(&old);
    let new = pair.b.register(8, 0, REMOTE);
    assert_eq!(new.key, old.key);
    let mut write = [Request::write(1, vec![source.sge(0, 8)], new.addr, old.key)];
    pair.a.post_ok(pair.qa, &mut write);
    assert_eq!(new.bytes(), [5; 8], "the stale key opened the new region");
}

#[test]
fn a_message_without_a_receive_kills_on_erdma_and_waits_on_roce() {
    let fake = FakeVerbs::new(Behaviour::erdma_compat());
    let mut pair = Pair::new(&fake);
    let source = pair.a.register(8, 5, 0);
    let mut send = [Request::send(1, vec![source.sge(0, 8)]).signalled()];
    pair.a.post_ok(pair.qa, &mut send);
    assert_eq!(
        pair.a.outcomes(),
        [(1, sys::IBV_WC_SUCCESS)],
        "lost, and a success"
    );
    let number = pair.b.id(pair.qb).number;
    assert_eq!(
        pair.b.async_event(),
        Some((sys::IBV_EVENT_QP_FATAL, number))
    );
    assert_eq!(fake.fabric().counters().empty_receives, 1);
    // A post on the dead queue pair is taken, and nothing ever comes back.
    pair.a.post_ok(pair.qa, &mut send);
    fake.fabric().tick(1000);
    assert_eq!(pair.a.outcomes(), []);

    let fake = FakeVerbs::new(Behaviour::roce());
    let mut pair = Pair::new(&fake);
    let source = pair.a.register(8, 5, 0);
    let inbox = pair.b.register(8, 0, sys::IBV_ACCESS_LOCAL_WRITE);
    let mut send = [Request::send(1, vec![source.sge(0, 8)]).signalled()];
    pair.a.post_ok(pair.qa, &mut send);
    fake.fabric().tick(1000);
    assert_eq!(pair.a.outcomes(), [], "rnr_retry 7 waits for ever");
    assert_eq!(pair.b.receive(pair.qb, 2, vec![inbox.sge(0, 8)]), 0);
    assert_eq!(pair.a.outcomes(), [(1, sys::IBV_WC_SUCCESS)]);
    assert_eq!(pair.b.outcomes(), [(2, sys::IBV_WC_SUCCESS)]);
}

#[test]
fn rnr_retries_of_roce_run_out() {
    let fake = FakeVerbs::new(Behaviour::roce());
    let mut a = Host::new(&fake, 0);
    let mut b = Host::new(&fake, 1);
    let (qa, qb) = (a.queue(), b.queue());
    assert_eq!((a.to_init(qa), b.to_init(qb)), (0, 0));
    assert_eq!((a.to_rtr(qa, &b, qb), b.to_rtr(qb, &a, qa)), (0, 0));
    assert_eq!((a.to_rts(qa, 3), b.to_rts(qb, 3)), (0, 0));
    let source = a.register(8, 5, 0);
    a.post_ok(qa, &mut [Request::send(1, vec![source.sge(0, 8)])]);
    fake.fabric().tick(1000);
    assert_eq!(a.outcomes(), [(1, sys::IBV_WC_RNR_RETRY_EXC_ERR)]);
}

#[test]
fn a_message_longer_than_its_receive_fails_at_the_receiver() {
    for (preset, sender) in [
        (Behaviour::erdma_compat(), sys::IBV_WC_SUCCESS),
        (Behaviour::roce(), sys::IBV_WC_REM_INV_REQ_ERR),
    ] {
        let fake = FakeVerbs::new(preset);
        let mut pair = Pair::new(&fake);
        let source = pair.a.register(64, 5, 0);
        let inbox = pair.b.register(8, 0, sys::IBV_ACCESS_LOCAL_WRITE);
        assert_eq!(pair.b.receive(pair.qb, 2, vec![inbox.sge(0, 8)]), 0);
        pair.a.post_ok(
            pair.qa,
            &mut [Request::send(1, vec![source.sge(0, 9)]).signalled()],
        );
        assert_eq!(pair.a.outcomes(), [(1, sender)]);
        let got = pair.b.poll();
        assert_eq!((got[0].wr_id, got[0].status), (2, sys::IBV_WC_LOC_LEN_ERR));
        assert_ne!(got[0].vendor_err, 0);
        assert_eq!(inbox.bytes(), [0; 8]);
    }
}

#[test]
fn a_local_key_that_does_not_cover_the_source_is_the_senders_error() {
    let fake = FakeVerbs::new(Behaviour::erdma_compat());
    let mut pair = Pair::new(&fake);
    let source = pair.a.register(64, 5, 0);
    let target = pair.b.register(64, 0, REMOTE);
    let mut write = [Request::write(
        1,
        vec![source.sge(1, 64)],
        target.addr,
        target.key,
    )];
    pair.a.post_ok(pair.qa, &mut write);
    assert_eq!(
        pair.a.outcomes(),
        [(1, sys::IBV_WC_LOC_PROT_ERR)],
        "though unsignalled"
    );
    assert_eq!(target.bytes(), [0; 64]);
}

#[test]
fn a_read_of_two_entries_silently_uses_one_on_erdma() {
    for (preset, read) in [(Behaviour::erdma_compat(), 64), (Behaviour::roce(), 128)] {
        let fake = FakeVerbs::new(preset);
        let mut pair = Pair::new(&fake);
        let sink = pair.a.register(128, 0, sys::IBV_ACCESS_LOCAL_WRITE);
        let access = sys::IBV_ACCESS_REMOTE_READ;
        let source = pair.b.register(128, 9, access);
        let list = vec![sink.sge(0, 64), sink.sge(64, 64)];
        let mut request = [Request::read(1, list, source.addr, source.key).signalled()];
        pair.a.post_ok(pair.qa, &mut request);
        let done = pair.a.poll();
        assert_eq!(
            (done[0].status, done[0].byte_len),
            (sys::IBV_WC_SUCCESS, read)
        );
        let got = sink.bytes().iter().filter(|byte| **byte == 9).count();
        assert_eq!(got, read as usize);

        let mut none = [Request::read(2, vec![], source.addr, source.key)];
        assert_eq!(pair.a.post(pair.qa, &mut none).1, 0);
        assert_eq!(
            fake.fabric().violations().len(),
            1,
            "a null pointer was followed"
        );
    }
}

#[test]
fn the_sink_of_a_read_must_be_remotely_writable_on_strict_iwarp() {
    let mut preset = Behaviour::erdma_compat();
    preset.read_sink_needs_remote_write = true;
    preset.forces_remote_write = false;
    let fake = FakeVerbs::new(preset);
    let mut pair = Pair::new(&fake);
    let sink = pair.a.register(8, 0, sys::IBV_ACCESS_LOCAL_WRITE);
    let source = pair.b.register(8, 9, sys::IBV_ACCESS_REMOTE_READ);
    let mut request = [Request::read(
        1,
        vec![sink.sge(0, 8)],
        source.addr,
        source.key,
    )];
    pair.a.post_ok(pair.qa, &mut request);
    assert_eq!(pair.a.outcomes(), [(1, sys::IBV_WC_LOC_PROT_ERR)]);
}

#[test]
fn only_the_destruction_of_the_target_fences_late_writes() {
    // What is done to the target before the late WRITE arrives, and whether it lands.
    let cases: [(&str, bool); 4] = [
        ("nothing", true),
        ("moved to ERR", true),
        ("destroyed", false),
        ("destroyed and replaced under its number", false),
    ];
    for (case, lands) in cases {
        let fake = FakeVerbs::new(Behaviour::erdma_compat());
        let fabric = fake.fabric();
        let mut pair = Pair::new(&fake);
        fabric.set_mode(Mode::Manual);
        let source = pair.a.register(8, 5, 0);
        let target = pair.b.register(8, 0, REMOTE);
        let write = Request::write(1, vec![source.sge(0, 8)], target.addr, target.key);
        pair.a.post_ok(pair.qa, &mut [write.signalled()]);
        // The sender gives up: its queue pair is gone, its memory is re-used, and it was told that all is over.
        let sender = pair.a.id(pair.qa).number;
        assert_eq!(pair.a.destroy(pair.qa), 0);
        pair.a.deregister(&source);
        source.fill(6);
        let number = pair.b.id(pair.qb).number;
        match case {
            "moved to ERR" => assert_eq!(pair.b.to_state(pair.qb, sys::IBV_QPS_ERR), 0),
            "destroyed" => assert_eq!(pair.b.destroy(pair.qb), 0),
            "destroyed and replaced under its number" => {
                assert_eq!(pair.b.destroy(pair.qb), 0);
                fabric.set_next_queue_number(1, number);
                let (_, gid) = pair.a.gid();
                let new = pair.b.queue();
                assert_eq!(pair.b.id(new).number, number);
                let index = pair.b.gid().0;
                assert_eq!(pair.b.to_rtr_at(new, gid, index, sender, 0), 0);
            }
            _ => {}
        }
        let watch = fabric.watch(target.addr..target.addr + 8);
        assert_eq!(fabric.waiting(), 1, "one WRITE is on the wire");
        assert_eq!(fabric.run(), 1);
        assert_eq!(target.bytes() == [5; 8], lands, "{case}");
        let counters = fabric.counters();
        assert_eq!(counters.zombies_landed, u64::from(lands), "{case}");
        assert_eq!(counters.zombies_refused, u64::from(!lands), "{case}");
        assert_eq!(counters.late_writes, u64::from(lands), "{case}");
        assert_eq!(pair.a.outcomes(), [], "nobody is told");
        fabric.unwatch(watch);
    }
}

#[test]
fn the_error_state_fences_where_the_specification_is_kept() {
    let fake = FakeVerbs::new(Behaviour::roce());
    let mut pair = Pair::new(&fake);
    fake.fabric().set_mode(Mode::Manual);
    let source = pair.a.register(8, 5, 0);
    let target = pair.b.register(8, 0, REMOTE);
    let mut write = [Request::write(
        1,
        vec![source.sge(0, 8)],
        target.addr,
        target.key,
    )];
    pair.a.post_ok(pair.qa, &mut write);
    assert_eq!(pair.b.to_state(pair.qb, sys::IBV_QPS_ERR), 0);
    assert_eq!(fake.fabric().run(), 0);
    fake.fabric().tick(1000);
    assert_eq!(pair.a.outcomes(), [(1, sys::IBV_WC_RETRY_EXC_ERR)]);
    assert_eq!(target.bytes(), [0; 8]);
}

#[test]
fn deregistering_the_target_refuses_late_writes_too() {
    let fake = FakeVerbs::new(Behaviour::erdma_compat());
    let mut pair = Pair::new(&fake);
    fake.fabric().set_mode(Mode::Manual);
    let source = pair.a.register(8, 5, 0);
    let target = pair.b.register(8, 0, REMOTE);
    let mut write = [Request::write(
        1,
        vec![source.sge(0, 8)],
        target.addr,
        target.key,
    )];
    pair.a.post_ok(pair.qa, &mut write);
    assert_eq!(pair.a.destroy(pair.qa), 0);
    pair.b.deregister(&target);
    assert_eq!(fake.fabric().run(), 1);
    assert_eq!(fake.fabric().counters().zombies_refused, 1);
    assert_eq!(target.bytes(), [0; 8]);
}

#[test]
fn completion_events_need_arming_and_do_not_tell_what_was_there_before() {
    let fake = FakeVerbs::new(Behaviour::erdma_compat());
    let mut pair = Pair::new(&fake);
    let source = pair.a.register(8, 5, 0);
    let target = pair.b.register(8, 0, REMOTE);
    let fd = pair.a.completion_fd();
    let post = |pair: &Pair, id| {
        let write = Request::write(id, vec![source.sge(0, 8)], target.addr, target.key);
        pair.a.post_ok(pair.qa, &mut [write.signalled()]);
    };
    post(&pair, 1);
    pair.a.arm(false);
    assert!(
        !is_readable(fd),
        "who arms without polling again sleeps for ever"
    );
    post(&pair, 2);
    assert!(is_readable(fd));
    post(&pair, 3);
    assert_eq!(pair.a.completion_event(), Some(pair.a.cq));
    assert_eq!(pair.a.completion_event(), None, "one event per arming");
    assert_eq!(last_errno(), libc::EAGAIN);
    assert_eq!(pair.a.outcomes().len(), 3);
    pair.a.ack_completion_events(1);
    fake.fabric().assert_clean();
}

#[test]
fn a_solicited_waiter_sleeps_through_plain_messages() {
    let fake = FakeVerbs::new(Behaviour::roce());
    let mut pair = Pair::new(&fake);
    let source = pair.a.register(8, 5, 0);
    let inbox = pair.b.register(16, 0, sys::IBV_ACCESS_LOCAL_WRITE);
    for id in 0..2 {
        assert_eq!(pair.b.receive(pair.qb, id, vec![inbox.sge(0, 8)]), 0);
    }
    pair.b.arm(true);
    let fd = pair.b.completion_fd();
    let plain = Request::send(1, vec![source.sge(0, 8)]);
    pair.a.post_ok(pair.qa, &mut [plain]);
    assert!(!is_readable(fd));
    let solicited = Request::send(2, vec![source.sge(0, 8)]).solicited();
    pair.a.post_ok(pair.qa, &mut [solicited]);
    assert!(is_readable(fd));
}

#[test]
fn the_null_device_completes_at_once_and_touches_nothing() {
    let fake = FakeVerbs::new(Behaviour::null());
    let mut pair = Pair::new(&fake);
    let target = pair.b.register(8, 0, REMOTE);
    // An address that would fault: nothing reads it.
    let wild = sys::ibv_sge {
        addr: 8,
        length: 1 << 20,
        lkey: 0,
    };
    for round in 0..100 {
        let mut chain = [
            Request::write(round, vec![wild], target.addr, target.key),
            Request::write(round, vec![wild], target.addr, target.key).signalled(),
        ];
        pair.a.post_ok(pair.qa, &mut chain);
        assert_eq!(pair.a.outcomes(), [(round, sys::IBV_WC_SUCCESS)]);
    }
    let counters = fake.fabric().counters();
    assert_eq!(counters.queues.send_requests, 200);
    assert!((counters.completions_per_request() - 0.5).abs() < 1e-9);
    assert!((counters.doorbells_per_request() - 0.5).abs() < 1e-9);
    assert_eq!(target.bytes(), [0; 8]);
}

#[test]
fn a_device_may_talk_to_itself() {
    let fake = FakeVerbs::new(Behaviour::erdma_compat());
    let mut host = Host::new(&fake, 0);
    let (one, other) = (host.queue(), host.queue());
    Pair::join(&host, one, &host, other);
    let source = host.register(8, 5, 0);
    let target = host.register(8, 0, REMOTE);
    let write = Request::write(1, vec![source.sge(0, 8)], target.addr, target.key);
    host.post_ok(one, &mut [write.signalled()]);
    assert_eq!(target.bytes(), [5; 8]);
    assert_eq!(host.outcomes(), [(1, sys::IBV_WC_SUCCESS)]);
}

#[test]
fn a_queue_that_signals_everything_needs_no_flag() {
    let fake = FakeVerbs::new(Behaviour::roce());
    let mut a = Host::new(&fake, 0);
    let mut b = Host::new(&fake, 1);
    let mut attr = attributes(&a);
    attr.sq_sig_all = 1;
    let (qa, qb) = (a.try_queue(attr).expect("made"), b.queue());
    Pair::join(&a, qa, &b, qb);
    let source = a.register(8, 5, 0);
    let target = b.register(8, 0, REMOTE);
    a.post_ok(
        qa,
        &mut [Request::write(
            1,
            vec![source.sge(0, 8)],
            target.addr,
            target.key,
        )],
    );
    assert_eq!(a.outcomes(), [(1, sys::IBV_WC_SUCCESS)]);
}
