//! Connecting: out of band in every device's manner, and through the connection manager.
#![expect(unsafe_code, reason = "the tests call C functions")]

use std::{ffi::c_void, net::Ipv4Addr, ptr};

use super::host::{Host, REMOTE, Request, attributes, is_readable, last_errno, nonblocking};
use crate::{
    testing::fake_verbs::{Behaviour, FakeVerbs, QueuePairId, Violation},
    transport::verbs::{library::CmCalls, sys},
};

#[test]
fn compat_mode_sends_and_receives_from_rtr_on_and_ignores_the_rest() {
    let fake = FakeVerbs::new(Behaviour::erdma_compat());
    let (mut a, mut b) = (Host::new(&fake, 0), Host::new(&fake, 1));
    let (qa, qb) = (a.queue(), b.queue());
    // No INIT, no RTS.
    assert_eq!((a.to_rtr(qa, &b, qb), b.to_rtr(qb, &a, qa)), (0, 0));
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
    assert_eq!(target.bytes(), [5; 8]);
    // A second RTR, to a stranger, changes nothing: there is no recycling of queue pairs.
    let stranger = b.queue();
    assert_eq!(a.to_rtr(qa, &b, stranger), 0);
    target.fill(0);
    a.post_ok(
        qa,
        &mut [Request::write(
            2,
            vec![source.sge(0, 8)],
            target.addr,
            target.key,
        )],
    );
    assert_eq!(target.bytes(), [5; 8]);
}

#[test]
fn what_is_sent_before_the_peer_reached_rtr_waits_for_it() {
    let fake = FakeVerbs::new(Behaviour::erdma_compat());
    let (mut a, mut b) = (Host::new(&fake, 0), Host::new(&fake, 1));
    let (qa, qb) = (a.queue(), b.queue());
    let source = a.register(8, 5, 0);
    let target = b.register(8, 0, REMOTE);
    assert_eq!(a.to_rtr(qa, &b, qb), 0);
    let write = Request::write(1, vec![source.sge(0, 8)], target.addr, target.key);
    a.post_ok(qa, &mut [write.signalled()]);
    assert_eq!(a.outcomes(), []);
    assert_eq!(b.to_rtr(qb, &a, qa), 0);
    assert_eq!(a.outcomes(), [(1, sys::IBV_WC_SUCCESS)]);
    assert_eq!(target.bytes(), [5; 8]);
}

#[test]
fn a_wrong_gid_index_or_an_unknown_peer_is_found() {
    let fake = FakeVerbs::new(Behaviour::erdma_compat());
    let (mut a, b) = (Host::new(&fake, 0), Host::new(&fake, 1));
    let qa = a.queue();
    let (index, _) = a.gid();
    let (_, peer) = b.gid();
    for wrong in [0, index - 1, index + 1, 200] {
        assert_eq!(
            a.to_rtr_at(qa, peer, wrong, 2, 0),
            libc::EINVAL,
            "index {wrong}"
        );
    }
    let nobody = sys::ibv_gid { raw: [9; 16] };
    assert_eq!(
        a.to_rtr_at(qa, nobody, index, 2, 0),
        0,
        "nothing says that it is nobody"
    );
    a.post_ok(qa, &mut [Request::send(1, vec![])]);
    fake.fabric().tick(24);
    assert_eq!(a.outcomes(), [(1, sys::IBV_WC_RETRY_EXC_ERR)]);
}

#[test]
fn roce_checks_states_and_masks() {
    let fake = FakeVerbs::new(Behaviour::roce());
    let (mut a, mut b) = (Host::new(&fake, 0), Host::new(&fake, 1));
    let (qa, qb) = (a.queue(), b.queue());
    assert_eq!(
        a.post(qa, &mut [Request::send(1, vec![])]),
        (libc::EINVAL, 0)
    );
    assert_eq!(a.receive(qa, 1, vec![]), libc::EINVAL, "not before INIT");
    assert_eq!(a.to_rtr(qa, &b, qb), libc::EINVAL, "INIT comes first");
    assert_eq!(
        a.to_state(qa, sys::IBV_QPS_INIT),
        libc::EINVAL,
        "with its attributes"
    );
    assert_eq!(a.to_init(qa), 0);
    assert_eq!(a.receive(qa, 1, vec![]), 0);
    assert_eq!(a.to_rts(qa, 7), libc::EINVAL, "RTR comes first");
    assert_eq!(a.to_rtr(qa, &b, qb), 0);
    assert_eq!(
        a.post(qa, &mut [Request::send(1, vec![])]),
        (libc::EINVAL, 0)
    );
    assert_eq!(a.to_rts(qa, 7), 0);
    assert_eq!(a.post(qa, &mut [Request::send(1, vec![])]).0, 0);
}

#[test]
fn iwarp_refuses_out_of_band_each_in_its_own_way() {
    for (preset, rtr, rts) in [
        (Behaviour::siw(), libc::ENODATA, libc::ENODATA),
        (Behaviour::erdma_standard(), 0, libc::EINVAL),
    ] {
        let fake = FakeVerbs::new(preset);
        let mut a = Host::new(&fake, 0);
        let qa = a.queue();
        assert_eq!(a.to_init(qa), 0);
        let gid = sys::ibv_gid { raw: [0; 16] };
        assert_eq!(a.to_rtr_at(qa, gid, 0, 2, 0), rtr);
        assert_eq!(a.to_rts(qa, 7), rts);
        assert!(!fake.fabric().is_ready(a.id(qa)));
    }
}

#[test]
fn compat_mode_has_no_connection_manager() {
    let fake = FakeVerbs::new(Behaviour::erdma_compat());
    assert!(fake.library().cm().is_err());
}

/// An event, copied out and acknowledged.
#[derive(Debug, PartialEq)]
struct Event {
    kind: u32,
    status: i32,
    private: Vec<u8>,
}

/// An identifier with its channel and queue pair.
struct End {
    cm: CmCalls,
    host: Host,
    channel: *mut sys::rdma_event_channel,
    id: *mut sys::rdma_cm_id,
    /// What a listener was asked for.
    accepted: *mut sys::rdma_cm_id,
}

fn socket_address(address: Ipv4Addr, port: u16) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: libc::AF_INET.cast_unsigned().try_into().expect("small"),
        sin_port: port.to_be(),
        sin_addr: libc::in_addr {
            s_addr: u32::from(address).to_be(),
        },
        sin_zero: [0; 8],
    }
}

impl End {
    fn new(fake: &FakeVerbs, device: usize) -> Self {
        let host = Host::open(fake, device, true, 256);
        let cm = *host.library.cm().expect("a connection manager");
        // SAFETY: the call has no preconditions.
        let channel = unsafe { (cm.rdma_create_event_channel)() };
        let mut id = ptr::null_mut();
        // SAFETY: the channel is alive.
        let code =
            unsafe { (cm.rdma_create_id)(channel, &raw mut id, ptr::null_mut(), sys::RDMA_PS_TCP) };
        assert_eq!(code, 0);
        // SAFETY: the channel is alive.
        nonblocking(unsafe { (*channel).fd });
        let accepted = ptr::null_mut();
        Self {
            cm,
            host,
            channel,
            id,
            accepted,
        }
    }

    fn bind(&self, address: Ipv4Addr, port: u16) -> i32 {
        let mut address = socket_address(address, port);
        // SAFETY: the identifier and the address are alive.
        unsafe { (self.cm.rdma_bind_addr)(self.id, (&raw mut address).cast()) }
    }

    fn listen(&self, backlog: i32) -> i32 {
        // SAFETY: the identifier is alive.
        unsafe { (self.cm.rdma_listen)(self.id, backlog) }
    }

    fn port(&self) -> u16 {
        // SAFETY: the identifier is alive.
        u16::from_be(unsafe { (self.cm.rdma_get_src_port)(self.id) })
    }

    /// Resolves up to a route, with a queue pair.
    fn resolve(&self, address: Ipv4Addr, port: u16) -> Result<(), Event> {
        let mut address = socket_address(address, port);
        let target = (&raw mut address).cast();
        // SAFETY: the identifier and the address are alive.
        let code = unsafe { (self.cm.rdma_resolve_addr)(self.id, ptr::null_mut(), target, 1000) };
        assert_eq!(code, 0);
        let event = self.event().expect("an answer");
        if event.kind != sys::RDMA_CM_EVENT_ADDR_RESOLVED {
            return Err(event);
        }
        // SAFETY: the identifier is alive.
        assert_eq!(unsafe { (self.cm.rdma_resolve_route)(self.id, 1000) }, 0);
        let event = self.event().expect("an answer");
        assert_eq!(event.kind, sys::RDMA_CM_EVENT_ROUTE_RESOLVED);
        assert_eq!(self.create_queue(self.id), 0);
        Ok(())
    }

    fn create_queue(&self, id: *mut sys::rdma_cm_id) -> i32 {
        let mut attr = attributes(&self.host);
        // SAFETY: the identifier and the host's objects are alive.
        unsafe { (self.cm.rdma_create_qp)(id, self.host.pd, &raw mut attr) }
    }

    fn param(private: &[u8]) -> sys::rdma_conn_param {
        sys::rdma_conn_param {
            private_data: private.as_ptr().cast::<c_void>(),
            private_data_len: u8::try_from(private.len()).expect("short"),
            responder_resources: 1,
            initiator_depth: 1,
            flow_control: 0,
            retry_count: 7,
            rnr_retry_count: 7,
            srq: 0,
            qp_num: 0,
        }
    }

    fn connect(&self, private: &[u8]) -> i32 {
        let mut param = Self::param(private);
        // SAFETY: the identifier is alive, the private data until the call returns.
        unsafe { (self.cm.rdma_connect)(self.id, &raw mut param) }
    }

    fn accept(&self, private: &[u8]) -> i32 {
        let mut param = Self::param(private);
        // SAFETY: as for `connect`.
        unsafe { (self.cm.rdma_accept)(self.accepted, &raw mut param) }
    }

    fn reject(&self, private: &[u8]) -> i32 {
        let data = private.as_ptr().cast();
        let len = u8::try_from(private.len()).expect("short");
        // SAFETY: as for `connect`.
        unsafe { (self.cm.rdma_reject)(self.accepted, data, len) }
    }

    fn next(&self) -> Option<*mut sys::rdma_cm_event> {
        let mut event = ptr::null_mut();
        // SAFETY: the channel is alive.
        let code = unsafe { (self.cm.rdma_get_cm_event)(self.channel, &raw mut event) };
        (code == 0).then_some(event)
    }

    fn event(&self) -> Option<Event> {
        self.event_with(|_| ())
    }

    /// Takes a connection request and remembers its identifier.
    fn request(&mut self) -> Event {
        let mut accepted = ptr::null_mut();
        let event = self.event_with(|id| accepted = id).expect("a request");
        assert_eq!(event.kind, sys::RDMA_CM_EVENT_CONNECT_REQUEST);
        self.accepted = accepted;
        event
    }

    fn event_with(&self, look: impl FnOnce(*mut sys::rdma_cm_id)) -> Option<Event> {
        let raw = self.next()?;
        // SAFETY: the event is alive until it is acknowledged.
        let event = unsafe { &*raw };
        // SAFETY: all events of this port space carry connection parameters.
        let conn = unsafe { event.param.conn };
        let private = if conn.private_data.is_null() {
            Vec::new()
        } else {
            let len = usize::from(conn.private_data_len);
            // SAFETY: the event holds so many bytes until it is acknowledged.
            unsafe { std::slice::from_raw_parts(conn.private_data.cast::<u8>(), len) }.to_vec()
        };
        look(event.id);
        let copied = Event {
            kind: event.event,
            status: event.status,
            private,
        };
        // SAFETY: the event was got and is acknowledged once.
        assert_eq!(unsafe { (self.cm.rdma_ack_cm_event)(raw) }, 0);
        Some(copied)
    }

    fn kinds(&self) -> Vec<u32> {
        std::iter::from_fn(|| self.event())
            .map(|event| event.kind)
            .collect()
    }

    fn qp_of(id: *mut sys::rdma_cm_id) -> *mut sys::ibv_qp {
        // SAFETY: identifiers' structures live as long as their fabric.
        unsafe { (*id).qp }
    }

    fn queue_id(&self, id: *mut sys::rdma_cm_id) -> QueuePairId {
        self.host.id(Self::qp_of(id))
    }

    fn destroy_id(&mut self, id: *mut sys::rdma_cm_id) -> i32 {
        // SAFETY: the identifier is alive.
        unsafe { (self.cm.rdma_destroy_id)(id) }
    }
}

impl Drop for End {
    fn drop(&mut self) {
        for id in [self.accepted, self.id] {
            if !id.is_null() {
                // SAFETY: the identifier is alive.
                unsafe { (self.cm.rdma_destroy_qp)(id) };
                // SAFETY: as above; its events are acknowledged.
                unsafe { (self.cm.rdma_destroy_id)(id) };
            }
        }
        // SAFETY: its identifiers are gone.
        unsafe { (self.cm.rdma_destroy_event_channel)(self.channel) };
    }
}

/// A listener on device 1 and who wants to reach it from device 0.
fn ends(fake: &FakeVerbs) -> (End, End) {
    let passive = End::new(fake, 1);
    assert_eq!(passive.bind(fake.address(1), 0), 0);
    assert_eq!(passive.listen(4), 0);
    let active = End::new(fake, 0);
    active
        .resolve(fake.address(1), passive.port())
        .expect("the address is a device's");
    (active, passive)
}

fn cm_presets() -> [Behaviour; 3] {
    [
        Behaviour::erdma_standard(),
        Behaviour::siw(),
        Behaviour::roce(),
    ]
}

#[test]
fn a_connection_carries_bytes_and_ends_on_both_sides() {
    for preset in cm_presets() {
        let fake = FakeVerbs::new(preset);
        let (mut active, mut passive) = ends(&fake);
        assert_eq!(active.connect(b"hello"), 0);
        // SAFETY: the channel is alive.
        assert!(is_readable(unsafe { (*passive.channel).fd }));
        passive.request();
        assert_eq!(passive.create_queue(passive.accepted), 0);
        assert_eq!(passive.accept(b"yes"), 0);
        assert_eq!(active.kinds(), [sys::RDMA_CM_EVENT_ESTABLISHED]);
        assert_eq!(passive.kinds(), [sys::RDMA_CM_EVENT_ESTABLISHED]);
        let (qa, qb) = (End::qp_of(active.id), End::qp_of(passive.accepted));
        let source = active.host.register(8, 5, 0);
        let target = passive.host.register(8, 0, REMOTE);
        assert_eq!(passive.host.receive(qb, 3, vec![target.sge(0, 8)]), 0);
        active
            .host
            .post_ok(qa, &mut [Request::send(1, vec![source.sge(0, 8)])]);
        assert_eq!(passive.host.outcomes(), [(3, sys::IBV_WC_SUCCESS)]);
        assert_eq!(target.bytes(), [5; 8]);
        // Now the passive side may answer.
        assert_eq!(active.host.receive(qa, 4, vec![]), 0);
        passive.host.post_ok(qb, &mut [Request::send(1, vec![])]);
        assert_eq!(active.host.outcomes(), [(4, sys::IBV_WC_SUCCESS)]);
        // SAFETY: the identifier is alive.
        assert_eq!(unsafe { (active.cm.rdma_disconnect)(active.id) }, 0);
        assert_eq!(active.kinds(), [sys::RDMA_CM_EVENT_DISCONNECTED]);
        assert_eq!(passive.kinds(), [sys::RDMA_CM_EVENT_DISCONNECTED]);
        assert!(!fake.fabric().is_ready(passive.queue_id(passive.accepted)));
        fake.fabric().assert_clean();
    }
}

#[test]
fn private_data_is_exact_on_iwarp_and_padded_on_roce() {
    for (preset, longest, seen) in [
        (Behaviour::erdma_standard(), 255, 5),
        (Behaviour::siw(), 251, 5),
        (Behaviour::roce(), 56, 56),
    ] {
        let fake = FakeVerbs::new(preset);
        let (active, mut passive) = ends(&fake);
        let long = vec![1; longest + 1];
        if longest < 255 {
            assert_eq!(active.connect(&long), -1, "{longest} is the most");
            assert_eq!(last_errno(), libc::EINVAL);
        }
        assert_eq!(active.connect(b"hello"), 0);
        let mut expected = b"hello".to_vec();
        expected.resize(seen, 0);
        assert_eq!(passive.request().private, expected);
    }
}

#[test]
fn nobody_listening_and_a_reject_look_alike() {
    for preset in cm_presets() {
        let iwarp = preset.looks_iwarp;
        let fake = FakeVerbs::new(preset);
        let (active, mut passive) = ends(&fake);
        assert_eq!(active.connect(&[]), 0);
        passive.request();
        assert_eq!(passive.reject(b"no"), 0);
        let event = active.event().expect("told");
        assert_eq!(event.kind, sys::RDMA_CM_EVENT_REJECTED);
        assert_eq!(event.status, if iwarp { -libc::ECONNREFUSED } else { 28 });
        assert_eq!(event.private[..2], *b"no");

        let lonely = End::new(&fake, 0);
        lonely
            .resolve(fake.address(1), 9)
            .expect("the address is a device's");
        assert_eq!(lonely.connect(&[]), 0);
        assert_eq!(lonely.kinds(), [sys::RDMA_CM_EVENT_REJECTED]);

        let lost = End::new(&fake, 0);
        let nowhere = Ipv4Addr::new(192, 0, 2, 1);
        let event = lost.resolve(nowhere, 9).expect_err("no such device");
        assert_eq!(event.kind, sys::RDMA_CM_EVENT_ADDR_ERROR);

        let cut = End::new(&fake, 0);
        cut.resolve(fake.address(1), passive.port()).expect("known");
        fake.fabric().cut(0, 1);
        assert_eq!(cut.connect(&[]), 0);
        assert_eq!(cut.kinds(), [sys::RDMA_CM_EVENT_UNREACHABLE]);
    }
}

#[test]
fn a_passive_side_that_sends_first_kills_the_connect_in_standard_mode() {
    for (preset, dies) in [
        (Behaviour::erdma_standard(), true),
        (Behaviour::siw(), false),
    ] {
        let fake = FakeVerbs::new(preset);
        let (active, mut passive) = ends(&fake);
        assert_eq!(active.host.receive(End::qp_of(active.id), 4, vec![]), 0);
        assert_eq!(active.connect(&[]), 0);
        passive.request();
        assert_eq!(passive.create_queue(passive.accepted), 0);
        assert_eq!(passive.accept(&[]), 0);
        assert_eq!(
            passive.kinds(),
            [sys::RDMA_CM_EVENT_ESTABLISHED],
            "so it may send?"
        );
        let qb = End::qp_of(passive.accepted);
        let sender = passive.queue_id(passive.accepted);
        assert_eq!(passive.host.post(qb, &mut [Request::send(1, vec![])]).0, 0);
        if dies {
            let event = active.event().expect("told");
            assert_eq!(event.kind, sys::RDMA_CM_EVENT_CONNECT_ERROR);
            assert_eq!(event.status, -libc::EPROTO);
            assert_eq!(passive.kinds(), [sys::RDMA_CM_EVENT_DISCONNECTED]);
            let caught = Violation::PassiveSentFirst { queue: sender };
            assert_eq!(fake.fabric().violations(), [caught]);
        } else {
            assert_eq!(active.kinds(), [sys::RDMA_CM_EVENT_ESTABLISHED]);
            assert_eq!(active.host.outcomes(), [(4, sys::IBV_WC_SUCCESS)]);
        }
    }
}

#[test]
fn a_destroyed_queue_pair_disconnects_on_iwarp_and_is_silent_on_roce() {
    for preset in cm_presets() {
        let iwarp = preset.looks_iwarp;
        let fake = FakeVerbs::new(preset);
        let (active, mut passive) = ends(&fake);
        assert_eq!(active.connect(&[]), 0);
        passive.request();
        assert_eq!(passive.create_queue(passive.accepted), 0);
        assert_eq!(passive.accept(&[]), 0);
        assert_eq!(active.kinds(), [sys::RDMA_CM_EVENT_ESTABLISHED]);
        assert_eq!(passive.kinds(), [sys::RDMA_CM_EVENT_ESTABLISHED]);
        // SAFETY: the identifier is alive.
        unsafe { (active.cm.rdma_destroy_qp)(active.id) };
        let told: &[u32] = if iwarp {
            &[sys::RDMA_CM_EVENT_DISCONNECTED]
        } else {
            &[]
        };
        assert_eq!(passive.kinds(), told);
    }
}

#[test]
fn listeners_are_exclusive_and_their_backlog_is_bounded() {
    let fake = FakeVerbs::new(Behaviour::siw());
    let listener = End::new(&fake, 1);
    assert_eq!(listener.bind(fake.address(1), 4000), 0);
    assert_eq!(listener.listen(2), 0);
    let second = End::new(&fake, 1);
    assert_eq!(second.bind(fake.address(1), 4000), -1);
    assert_eq!(last_errno(), libc::EADDRINUSE);
    assert_eq!(second.bind(Ipv4Addr::new(192, 0, 2, 1), 1), -1);
    assert_eq!(last_errno(), libc::ENODEV);
    let callers: Vec<End> = (0..3)
        .map(|_| {
            let caller = End::new(&fake, 0);
            caller.resolve(fake.address(1), 4000).expect("known");
            assert_eq!(caller.connect(&[]), 0);
            caller
        })
        .collect();
    assert!(callers[0].kinds().is_empty());
    assert!(callers[1].kinds().is_empty());
    assert_eq!(callers[2].kinds(), [sys::RDMA_CM_EVENT_REJECTED]);
    // A listener that goes away refuses who still waits.
    drop(listener);
    assert_eq!(callers[0].kinds(), [sys::RDMA_CM_EVENT_REJECTED]);
}

#[test]
fn an_identifier_with_events_not_acknowledged_cannot_go() {
    let fake = FakeVerbs::new(Behaviour::siw());
    let mut end = End::new(&fake, 0);
    let mut target = socket_address(fake.address(1), 1);
    let target = (&raw mut target).cast();
    // SAFETY: the identifier and the address are alive.
    let code = unsafe { (end.cm.rdma_resolve_addr)(end.id, ptr::null_mut(), target, 1000) };
    assert_eq!(code, 0);
    let event = end.next().expect("resolved");
    let id = end.id;
    assert_eq!(end.destroy_id(id), -1);
    assert_eq!(last_errno(), libc::EBUSY);
    let call = "destroy_id";
    assert_eq!(
        fake.fabric().violations(),
        [Violation::EventsNotAcknowledged { call, count: 1 }]
    );
    // SAFETY: the event was got and is acknowledged once.
    assert_eq!(unsafe { (end.cm.rdma_ack_cm_event)(event) }, 0);
}

#[test]
fn the_queue_pair_of_a_connection_needs_the_managers_own_context() {
    let fake = FakeVerbs::new(Behaviour::siw());
    let (active, _passive) = ends(&fake);
    let other = Host::new(&fake, 0);
    let mut attr = attributes(&other);
    // SAFETY: the identifier and the host's objects are alive.
    let code = unsafe { (active.cm.rdma_create_qp)(active.id, other.pd, &raw mut attr) };
    assert_eq!((code, last_errno()), (-1, libc::EINVAL));
}

#[test]
fn freezing_and_removal_reach_connections() {
    let fake = FakeVerbs::new(Behaviour::erdma_standard());
    let (active, mut passive) = ends(&fake);
    fake.fabric().freeze(1);
    assert_eq!(active.connect(&[]), 0);
    assert!(passive.kinds().is_empty());
    fake.fabric().thaw(1);
    passive.request();
    fake.fabric().remove_device(0);
    assert_eq!(active.kinds(), [sys::RDMA_CM_EVENT_DEVICE_REMOVAL]);
}
