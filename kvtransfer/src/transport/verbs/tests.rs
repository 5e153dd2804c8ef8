//! The safe layer against real providers: siw and rxe in the lab's virtual machine (`cargo rdma-test`).
//!
//! The lab has siw0 at 10.77.0.1 and rxe0 at 10.77.2.1. Each test makes both ends of a connection on one device, and
//! moves a gathered WRITE and a notice through it.
#![expect(unsafe_code, reason = "the tests lend memory to an adapter")]

mod faults;

use std::{
    net::SocketAddr,
    os::fd::BorrowedFd,
    sync::{Arc, OnceLock},
    time::Duration,
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{
    chain::{Chain, Flags, RemotePlace, Sge},
    cm::{CmEvent, CmId, EventChannel, PrivateData},
    context::Context,
    cq::{Completion, Cq, POLL_MAX},
    device::{self, Transport},
    error::CompletionStatus,
    library::Library,
    mr::{Access, RegisteredRegion},
    pd::Pd,
    probe,
    qp::{LocalPath, Qp, QpAddress, QpCaps},
    select::{self, Candidate, HostLimits, IbDevice},
    slots::Slots,
    sys,
};
use crate::clock;

const PATIENCE: Duration = Duration::from_secs(10);
const REGION_BYTES: usize = 64 << 10;
/// Small, so that pages of a region lie in different chunks.
const CHUNK_BYTES: u64 = 16 << 10;
const NOTICE: &[u8; 16] = b"sixteen-byte-msg";

fn library() -> Arc<Library> {
    static LIBRARY: OnceLock<Arc<Library>> = OnceLock::new();
    Arc::clone(LIBRARY.get_or_init(|| Library::open().expect("the lab has rdma-core")))
}

/// Waits for a descriptor that the adapter or the connection manager makes readable.
fn await_readable(fd: BorrowedFd<'_>, what: &str) {
    let timeout = Timespec::try_from(PATIENCE).expect("a short time");
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    let ready = poll(&mut fds, Some(&timeout)).expect("poll works");
    assert_eq!(ready, 1, "nothing happened in {PATIENCE:?}: {what}");
}

/// Memory that the adapter uses, alive for as long as its registration.
struct Memory {
    // Declared before the bytes, and so dropped before them.
    region: RegisteredRegion,
    bytes: *mut [u8],
}

impl Memory {
    fn new(pd: &Arc<Pd>, access: Access) -> Self {
        let bytes = Box::into_raw(vec![0u8; REGION_BYTES].into_boxed_slice());
        let base = bytes.cast::<u8>().expose_provenance() as u64;
        // SAFETY: the bytes are freed after the registration, in drop, and touched only through the raw pointer.
        let region = unsafe {
            RegisteredRegion::register(pd, base, REGION_BYTES as u64, CHUNK_BYTES, access)
        };
        Self {
            region: region.expect("memory can be registered"),
            bytes,
        }
    }

    fn fill(&self, seed: u8) {
        for index in 0..REGION_BYTES {
            let value = u8::try_from(index % 251).expect("small") ^ seed;
            let place = self.bytes.cast::<u8>().wrapping_add(index);
            // SAFETY: the place is inside the bytes, and nothing is in flight while a test fills them.
            unsafe { place.write_volatile(value) };
        }
    }

    fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        let at = |index: usize| {
            assert!(index < REGION_BYTES);
            let place = self.bytes.cast::<u8>().wrapping_add(index);
            // SAFETY: the place is inside the bytes; a completion has said that the write to it is done.
            unsafe { place.read_volatile() }
        };
        (offset..offset + len).map(at).collect()
    }

    fn sge(&self, offset: u64, bytes: u32) -> Sge {
        let piece = self.region.piece(offset).expect("inside");
        assert!(u64::from(bytes) <= piece.bytes, "within one chunk");
        Sge {
            address: piece.address,
            bytes,
            lkey: piece.lkey,
        }
    }

    fn place(&self, offset: u64) -> RemotePlace {
        let piece = self.region.piece(offset).expect("inside");
        RemotePlace {
            address: piece.address,
            rkey: piece.rkey,
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // A use after free would be the test's own fault: every test drops its queue pairs first, and the adapter is
        // done with memory whose queue pairs are gone.
        // SAFETY: the pointer came from Box::into_raw and is dropped once.
        drop(unsafe { Box::from_raw(self.bytes) });
    }
}

/// One end of a connection. The queue pair goes first.
struct End {
    qp: Qp,
    cq: Arc<Cq>,
    source: Memory,
    target: Memory,
    notices: Memory,
}

const CAPS: QpCaps = QpCaps {
    max_send_wr: 32,
    max_recv_wr: 16,
    max_send_sge: 4,
    max_inline_bytes: 32,
    wr_bytes_max: 1 << 20,
};

impl End {
    fn new(context: &Arc<Context>, make: impl FnOnce(&Arc<Pd>, &Arc<Cq>) -> Qp) -> Self {
        let pd = Pd::create(context).expect("a domain");
        let cq = Cq::create(context, CAPS.completions(), true, 0).expect("a queue");
        let end = Self {
            qp: make(&pd, &cq),
            cq,
            source: Memory::new(&pd, Access::Local),
            target: Memory::new(&pd, Access::WriteTarget),
            notices: Memory::new(&pd, Access::Local),
        };
        end.source.fill(0x5a);
        let second = Qp::create(&pd, &end.cq, &end.cq, CAPS);
        assert!(second.is_err(), "the completion queue has no entries left");
        end.cq.arm(false).expect("armed");
        end
    }

    fn post_receives(&mut self) {
        for index in 0..8u64 {
            let buffer = self.notices.sge(index * 64, 64);
            self.qp
                .post_recv(index, buffer.address, buffer.bytes, buffer.lkey)
                .expect("a receive");
        }
    }

    /// The next completion, awaited on the channel.
    fn next(&self) -> Completion {
        let mut found = [Completion::default(); POLL_MAX];
        loop {
            let count = self.cq.poll(&mut found).expect("polled");
            assert!(count <= 1, "the tests have one in flight at a time");
            if count == 1 {
                return found[0];
            }
            await_readable(self.cq.fd().expect("a channel"), "a completion");
            self.cq.drain_events().expect("drained");
            self.cq.arm(false).expect("armed");
        }
    }
}

/// Three gathered WRITEs and a notice, from one end to the other.
fn transfer(from: &mut End, to: &mut End) {
    let mut slots = Slots::new(CAPS.max_send_wr, 4, 77);
    let mut chain = Chain::new(16, 4, CAPS.wr_bytes_max);
    let id = slots.enter(4, ()).expect("empty");
    for write in 0..3u64 {
        let sges: Vec<_> = (0..4u64)
            .map(|part| from.source.sge((write * 4 + part) * 5000 / 64 * 64, 300))
            .collect();
        let place = to.target.place(write * CHUNK_BYTES + 40);
        chain
            .write(id, &sges, place, Flags::default())
            .expect("room");
    }
    let last = Flags {
        signalled: true,
        solicited: true,
    };
    chain.send_inline(id, NOTICE, last).expect("room");
    from.qp.post(&mut chain).expect("posted");
    let sent = from.next();
    assert!(sent.status().is_success(), "{}", sent.status());
    assert_eq!(sent.qp_num, from.qp.qp_num());
    slots.complete(sent.wr_id).expect("ours");
    assert_eq!(slots.outstanding(), 0);
    let received = to.next();
    assert!(received.status().is_success(), "{}", received.status());
    assert!(received.is_receive());
    assert_eq!(received.byte_len, 16);
    assert_eq!(received.qp_num, to.qp.qp_num());
    let buffer = usize::try_from(received.wr_id * 64).expect("small");
    assert_eq!(to.notices.read(buffer, 16), NOTICE);
    for write in 0..3usize {
        let expected: Vec<u8> = (0..4)
            .flat_map(|part| from.source.read((write * 4 + part) * 5000 / 64 * 64, 300))
            .collect();
        let at = write * usize::try_from(CHUNK_BYTES).expect("small") + 40;
        assert_eq!(to.target.read(at, 1200), expected, "write {write}");
    }
}

fn connect_out_of_band(device: &str) -> (End, End) {
    let context = Context::open(&library(), device).expect("opened");
    assert!(
        Arc::ptr_eq(
            &context,
            &Context::open(&library(), device).expect("opened")
        ),
        "a device is opened once"
    );
    let port = context.port(1).expect("a port");
    assert!(port.is_active());
    let gids = context.gids(1);
    let gid = select::choose_gid(&gids, None).expect("a GID").clone();
    let make = |pd: &Arc<Pd>, cq: &Arc<Cq>| Qp::create(pd, cq, cq, CAPS).expect("a queue pair");
    let mut ends = [End::new(&context, make), End::new(&context, make)];
    let addresses = ends.each_ref().map(|end| QpAddress {
        gid: gid.gid,
        lid: port.lid,
        qp_num: end.qp.qp_num(),
        psn: end.qp.qp_num() ^ 0x00ab_cdef,
    });
    for (index, end) in ends.iter_mut().enumerate() {
        let path = LocalPath {
            port: 1,
            gid_index: gid.index,
            mtu: port.active_mtu,
            psn: addresses[index].psn,
        };
        end.qp.enter_init(1).expect("INIT");
        end.post_receives();
        end.qp.enter_rtr(&path, &addresses[1 - index]).expect("RTR");
        end.qp.enter_rts(&path).expect("RTS");
    }
    ends.into()
}

fn next_event(channel: &Arc<EventChannel>, expected: u32) -> CmEvent {
    loop {
        if let Some(event) = channel.next_event().expect("an event") {
            assert_eq!(event.kind, expected, "{} ({})", event.words(), event.status);
            return event;
        }
        await_readable(channel.fd(), "a connection event");
    }
}

/// Both ends of an rdma_cm connection, with their ids and channels: (active, passive).
struct Connected {
    active: End,
    passive: End,
    active_id: CmId,
    passive_id: CmId,
    active_channel: Arc<EventChannel>,
    passive_channel: Arc<EventChannel>,
}

fn connect_by_cm(device: &str, address: &str, words: [&[u8]; 2]) -> Connected {
    connect_with(device, address, words, CAPS)
}

fn connect_with(device: &str, address: &str, words: [&[u8]; 2], caps: QpCaps) -> Connected {
    let library = library();
    let context = Context::open_for_cm(&library, device).expect("opened");
    let active_channel = EventChannel::open(&library).expect("a channel");
    let passive_channel = EventChannel::open(&library).expect("a channel");
    let any_port: SocketAddr = format!("{address}:0").parse().expect("an address");
    let mut listener = CmId::create(&passive_channel).expect("an id");
    listener.bind(any_port).expect("bound");
    listener.listen(4).expect("listening");
    let target = SocketAddr::new(any_port.ip(), listener.local_port());

    let mut active_id = CmId::create(&active_channel).expect("an id");
    active_id
        .resolve_addr(None, target, PATIENCE)
        .expect("started");
    let event = next_event(&active_channel, sys::RDMA_CM_EVENT_ADDR_RESOLVED);
    assert_eq!(event.id, active_id.key());
    assert_eq!(active_id.device_name().as_deref(), Some(device));
    active_id.resolve_route(PATIENCE).expect("started");
    next_event(&active_channel, sys::RDMA_CM_EVENT_ROUTE_RESOLVED);
    let mut active = End::new(&context, |pd, cq| {
        active_id.create_qp(pd, cq, cq, caps).expect("a queue pair")
    });
    active.post_receives();
    let hello = PrivateData::new(words[0]).expect("short");
    active_id.connect(&hello).expect("started");

    let request = next_event(&passive_channel, sys::RDMA_CM_EVENT_CONNECT_REQUEST);
    assert_eq!(request.id, listener.key());
    assert_eq!(request.private_data, Some(hello), "padded or not");
    let mut passive_id = request.request.expect("a request has an id");
    assert_eq!(
        passive_id.peer_address().map(|peer| peer.ip()),
        Some(any_port.ip())
    );
    let mut passive = End::new(&context, |pd, cq| {
        passive_id
            .create_qp(pd, cq, cq, caps)
            .expect("a queue pair")
    });
    passive.post_receives();
    let welcome = PrivateData::new(words[1]).expect("short");
    passive_id.accept(&welcome).expect("started");
    let event = next_event(&active_channel, sys::RDMA_CM_EVENT_ESTABLISHED);
    assert_eq!(event.private_data, Some(welcome));
    next_event(&passive_channel, sys::RDMA_CM_EVENT_ESTABLISHED);
    Connected {
        active,
        passive,
        active_id,
        passive_id,
        active_channel,
        passive_channel,
    }
}

fn transfer_by_cm(device: &str, address: &str) {
    let mut connected = connect_by_cm(device, address, [b"hello", b"welcome"]);
    transfer(&mut connected.active, &mut connected.passive);
    transfer(&mut connected.passive, &mut connected.active);
    connected.active_id.disconnect().expect("started");
    next_event(&connected.passive_channel, sys::RDMA_CM_EVENT_DISCONNECTED);
    // InfiniBand and RoCE tell the active side only when the passive side has answered; iWARP may say that there is
    // nothing left to disconnect.
    let answer = connected.passive_id.disconnect();
    assert!(answer.is_ok() || answer.is_err_and(|error| error.errno() == Some(libc::EINVAL)));
    next_event(&connected.active_channel, sys::RDMA_CM_EVENT_DISCONNECTED);
    assert_ne!(connected.passive_id.key(), connected.active_id.key());
}

#[test]
#[ignore = "needs RDMA"]
fn siw_moves_bytes_over_rdma_cm() {
    transfer_by_cm("siw0", "10.77.0.1");
}

#[test]
#[ignore = "needs RDMA"]
fn rxe_moves_bytes_over_rdma_cm() {
    transfer_by_cm("rxe0", "10.77.2.1");
}

#[test]
#[ignore = "needs RDMA"]
fn rxe_moves_bytes_out_of_band() {
    let (mut first, mut second) = connect_out_of_band("rxe0");
    transfer(&mut first, &mut second);
    transfer(&mut second, &mut first);
}

#[test]
#[ignore = "needs RDMA"]
fn a_wrong_key_fails_the_request_and_flushes_the_rest() {
    let (mut first, second) = connect_out_of_band("rxe0");
    let mut chain = Chain::new(2, 1, 1 << 20);
    let mut place = second.target.place(0);
    place.rkey ^= 0x5500;
    let sge = first.source.sge(0, 64);
    chain
        .write(5, &[sge], place, Flags::default())
        .expect("room");
    first.qp.post(&mut chain).expect("posted");
    // The failed request first, then every receive, flushed. No state was changed by us.
    let started = clock::now();
    let mut done = Vec::new();
    let mut found = [Completion::default(); POLL_MAX];
    while done.len() < 9 {
        let count = first.cq.poll(&mut found).expect("polled");
        done.extend_from_slice(&found[..count]);
        let waited = clock::now().since(started);
        assert!(waited < PATIENCE, "{} of 9", done.len());
        std::thread::yield_now();
    }
    assert_eq!(done[0].wr_id, 5, "told although it was not signalled");
    let status = done[0].status();
    assert_eq!(
        status,
        CompletionStatus(sys::IBV_WC_REM_ACCESS_ERR),
        "{status}"
    );
    assert!(done[1..].iter().all(|flushed| flushed.status().is_flush()));
    first.qp.enter_error().expect("ERR again");
    assert_eq!(second.target.read(0, 64), [0; 64], "nothing was written");
}

#[test]
#[ignore = "needs RDMA"]
fn devices_show_what_they_are_and_can() {
    let library = library();
    let devices = device::list(&library).expect("a list");
    let transport = |name: &str| {
        let found = devices.iter().find(|device| device.name == name);
        found.map(|device| device.transport)
    };
    assert_eq!(transport("siw0"), Some(Transport::Iwarp));
    assert_eq!(transport("rxe0"), Some(Transport::Ib));

    let siw = Context::open(&library, "siw0").expect("opened");
    let siw = probe::capabilities(&siw, 1).expect("probed");
    assert_eq!(siw.send_sge.value, 6, "{}", siw.send_sge.reason);
    assert!(!siw.immediate.value, "{}", siw.immediate.reason);
    assert_eq!(siw.wr_bytes_max.value, 1 << 30);
    assert!(!siw.dmabuf.value, "{}", siw.dmabuf.reason);

    let context = Context::open(&library, "rxe0").expect("opened");
    assert_eq!(context.next_event(), Ok(None), "and it did not block");
    let rxe = probe::capabilities(&context, 1).expect("probed");
    assert_eq!(rxe.send_sge.value, 16, "{}", rxe.send_sge.reason);
    assert_eq!(
        rxe.immediate.reason, "a loopback WRITE with immediate arrived",
        "{rxe:?}"
    );
    assert_eq!(rxe.wr_bytes_max.value, 8 << 20);
    assert_eq!(probe::capabilities(&context, 1), Ok(rxe), "kept");

    let candidates: Vec<_> = devices
        .iter()
        .map(|device| {
            let context = Context::open(&library, &device.name).expect("opened");
            let port = context.port(1).expect("a port");
            Candidate {
                name: device.name.clone(),
                transport: device.transport,
                port_state: Some(port.state),
                link_layer: port.link_layer,
                gids: context.gids(1),
            }
        })
        .collect();
    let limits = HostLimits {
        memlock: super::error::memlock_limit(),
        has_cm: library.cm().is_ok(),
    };
    let setting = IbDevice::parse("rxe0,siw0").expect("a list");
    let chosen = select::choose(&setting, 0, &candidates, limits, |name| {
        (name == "rxe0").then_some([10, 77, 2, 1].into())
    });
    let chosen = chosen.expect("both are usable");
    assert_eq!(chosen[1].gid, None, "iWARP connects by address");
    let gid = chosen[0].gid.as_ref().expect("RoCE connects by GID");
    assert_eq!(gid.ipv4(), Some([10, 77, 2, 1].into()));
}
