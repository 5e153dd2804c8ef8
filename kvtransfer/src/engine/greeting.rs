//! What is said and checked before two engines trust each other with pages: identity, token, layouts, same-host paths.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use subtle::ConstantTimeEq;

use super::{
    devices::PeerMemory,
    hub::Hub,
    lanes::Stage,
    link::{Agreement, Link},
};
use crate::{
    clock,
    config::{RING_SLOTS, SameHost},
    ids::LaneId,
    layout::Layout,
    memory::Region,
    plan::pairing::pair,
    time::Time,
    transfer::LaneSetup,
    transport::{
        DataLane,
        lane::{Lane, LaneContext, Ring},
        sys,
    },
    wire::{
        control::{Control, ControlDecoder},
        hello::{Face, Hello, HostIdentity, RegionAddress},
        lane::{NULL_BATCH_BYTES_MAX, PayloadMode},
    },
};

/// Our introduction.
pub(super) fn introduce(hub: &Hub, link: u64, lanes: u8) -> Hello {
    let same_host = hub.config.same_host != SameHost::Off;
    let shared = hub.devices.shared();
    let offers_socket = same_host && hub.config.listen.is_some();
    Hello {
        instance: hub.instance,
        generation: hub.generation,
        link,
        lanes,
        token: token_of(hub),
        host: HostIdentity {
            boot_id: super::boot_id().unwrap_or_default(),
            user_id: rustix::process::geteuid().as_raw(),
            socket_name: if offers_socket {
                socket_name(hub)
            } else {
                String::new()
            },
            probe_address: std::ptr::from_ref(&*hub.probe_cookie).addr() as u64,
            probe_cookie: *hub.probe_cookie,
        },
        regions: hub
            .regions()
            .iter()
            .zip(&shared.places)
            .map(|(region, place)| RegionAddress {
                base: region.base_address(),
                len: region.len() as u64,
                place: *place,
            })
            .collect(),
        shares: shared.shares.clone(),
        by_address: hub.config.writable_by_address,
        null_wire: hub.config.null_wire,
        layout: hub.layout.clone(),
        rails: hub.rails().offers(),
    }
}

/// What somebody who only looks is shown.
pub(super) fn face(hub: &Hub) -> Face {
    let (rails, refusal) = hub.rails().faces();
    Face {
        boot_id: super::boot_id().unwrap_or_default(),
        rails,
        refusal,
    }
}

pub(super) fn token_of(hub: &Hub) -> Vec<u8> {
    hub.config.token.clone().unwrap_or_default().into_bytes()
}

/// Name of the abstract socket on which an engine takes same-host lanes.
pub(super) fn socket_name(hub: &Hub) -> String {
    format!("kvtransfer-{}", hub.instance)
}

/// Whether a peer knows our token. Takes the same time however much of it is right.
pub(super) fn check_token(hub: &Hub, token: &[u8]) -> Result<(), String> {
    match &hub.config.token {
        Some(expected) if !bool::from(expected.as_bytes().ct_eq(token)) => {
            Err("wrong or missing token; start both engines with the same one".into())
        }
        _ => Ok(()),
    }
}

/// Checks a peer's introduction and pairs the layouts both ways.
///
/// # Errors
/// A sentence that both sides can log.
pub(super) fn agree(hub: &Hub, peer: Hello, address: String) -> Result<Agreement, String> {
    check_token(hub, &peer.token)?;
    if let Some(released) = hub.released() {
        return Err(released.to_string());
    }
    if peer.null_wire != hub.config.null_wire {
        return Err("only one of the two engines has null_wire set, which moves no bytes; it is for measurements between two that both have it".into());
    }
    if peer.instance == hub.instance {
        return Err("this is the same engine; an engine cannot be its own peer".into());
    }
    peer.layout
        .validate()
        .map_err(|error| format!("the peer's layout: {error}"))?;
    let lengths: Vec<u64> = peer.regions.iter().map(|region| region.len).collect();
    check_regions(&peer.layout, &lengths).map_err(|why| format!("the peer's layout: {why}"))?;
    for rail in &peer.rails {
        rail.check(lengths.iter().copied())
            .map_err(|why| format!("the peer's {why}"))?;
    }
    let outgoing = pair(&hub.layout, &peer.layout)
        .map(Arc::new)
        .map_err(|e| e.to_string());
    let incoming = pair(&peer.layout, &hub.layout)
        .map(Arc::new)
        .map_err(|e| e.to_string());
    // Ranks that only write each other's memory by address need no layouts that fit.
    let is_by_address = hub.config.writable_by_address || peer.by_address;
    if let (Err(why), Err(_), false) = (&outgoing, &incoming, is_by_address) {
        return Err(why.clone());
    }
    Ok(Agreement {
        instance: peer.instance,
        generation: peer.generation,
        link: peer.link,
        lanes: peer.lanes,
        address,
        host: peer.host,
        regions: peer.regions.into(),
        shares: peer.shares.into(),
        by_address: peer.by_address,
        rails: peer.rails.into(),
        outgoing,
        incoming,
    })
}

/// Checks that every buffer of a layout lies in its region.
///
/// # Errors
/// A sentence with the numbers.
pub(super) fn check_regions(layout: &Layout, lengths: &[u64]) -> Result<(), String> {
    for component in &layout.components {
        for (index, entry) in component.entries.iter().enumerate() {
            let size = entry.item_len.checked_mul(entry.item_count);
            let end = size.and_then(|size| size.checked_add(entry.offset));
            let region = entry.region.0;
            let Some(len) = lengths.get(region as usize) else {
                let kind = &component.kind;
                return Err(format!(
                    "{kind:?} entry {index} names region {region}, which is not there"
                ));
            };
            if end.is_none_or(|end| end > *len) {
                let kind = &component.kind;
                let (offset, items, item) = (entry.offset, entry.item_count, entry.item_len);
                return Err(format!(
                    "{kind:?} entry {index}: {items} items of {item} bytes at {offset} do not fit region {region} of {len} bytes"
                ));
            }
        }
    }
    Ok(())
}

/// Messages over a stream in blocking mode, with a deadline and at most one descriptor passed along.
pub(super) struct Talk<'a> {
    stream: BorrowedFd<'a>,
    decoder: ControlDecoder,
    deadline: Time,
    passed: Option<OwnedFd>,
}

impl<'a> Talk<'a> {
    pub(super) fn new(stream: &'a impl AsFd, timeout: Duration) -> Self {
        Self {
            stream: stream.as_fd(),
            decoder: ControlDecoder::for_stranger(),
            deadline: clock::now() + timeout,
            passed: None,
        }
    }

    fn left(&self) -> io::Result<Duration> {
        let left = self.deadline.since(clock::now());
        if left.is_zero() {
            Err(io::ErrorKind::TimedOut.into())
        } else {
            Ok(left)
        }
    }

    pub(super) fn say(
        &mut self,
        message: &Control,
        pass: Option<BorrowedFd<'_>>,
    ) -> io::Result<()> {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        let mut pass = pass;
        let mut sent = 0;
        while sent < bytes.len() {
            let left = self.left()?;
            rustix::net::sockopt::set_socket_timeout(
                self.stream,
                rustix::net::sockopt::Timeout::Send,
                Some(left),
            )?;
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fds = pass.map(|fd| [fd]);
            if let Some(fds) = &fds {
                control.push(SendAncillaryMessage::ScmRights(fds));
            }
            let part = [IoSlice::new(&bytes[sent..])];
            match sendmsg(self.stream, &part, &mut control, SendFlags::NOSIGNAL) {
                Ok(done) => {
                    sent += done;
                    pass = None;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    pub(super) fn hear(&mut self) -> io::Result<Control> {
        loop {
            let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
            if let Some(message) = self.decoder.next().map_err(invalid)? {
                return Ok(message);
            }
            let left = self.left()?;
            rustix::net::sockopt::set_socket_timeout(
                self.stream,
                rustix::net::sockopt::Timeout::Recv,
                Some(left),
            )?;
            let mut bytes = [0; 16 << 10];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let got = {
                let mut parts = [IoSliceMut::new(&mut bytes)];
                match recvmsg(
                    self.stream,
                    &mut parts,
                    &mut control,
                    RecvFlags::CMSG_CLOEXEC,
                ) {
                    Ok(message) => message.bytes,
                    Err(rustix::io::Errno::INTR) => continue,
                    Err(rustix::io::Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
                    Err(error) => return Err(error.into()),
                }
            };
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(fds) = message {
                    // Keep the first; the rest, if a peer sends more, are closed here.
                    for fd in fds {
                        self.passed.get_or_insert(fd);
                    }
                }
            }
            if got == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.decoder.push(&bytes[..got]);
        }
    }

    /// The decoder with what was read too far, and the descriptor that came along.
    pub(super) fn finish(self) -> (ControlDecoder, Option<OwnedFd>) {
        (self.decoder, self.passed)
    }
}

/// The two ends of a lane's same-host path.
pub(super) struct LocalPath {
    /// The peer's process.
    pub(super) pid: i32,
    /// We can read its memory.
    pub(super) can_pull: bool,
    /// Its device's memory.
    pub(super) memory: PeerMemory,
    /// Our ring, whose descriptor goes to the peer.
    pub(super) ring_out: Region,
}

impl LocalPath {
    /// Looks at the peer on a Unix stream: who is it, can its memory be read?
    pub(super) fn probe(hub: &Hub, stream: BorrowedFd<'_>, link: &Link) -> io::Result<Self> {
        let host = &link.agreement.host;
        let credentials = rustix::net::sockopt::socket_peercred(stream)?;
        if credentials.uid != rustix::process::geteuid() {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let pid = credentials.pid.as_raw_nonzero().get();
        let wanted = hub.config.same_host != SameHost::RingOnly;
        let can_pull = wanted
            && sys::peek::<16>(pid, host.probe_address).is_ok_and(|got| got == host.probe_cookie);
        let memory = if can_pull {
            link.peer_memory(hub)
        } else {
            PeerMemory::Host
        };
        let can_pull = can_pull && !matches!(memory, PeerMemory::Refused(_));
        let ring_out = Region::memfd("kvtransfer-ring", ring_len(hub)).map_err(io::Error::other)?;
        Ok(Self {
            pid,
            can_pull,
            memory,
            ring_out,
        })
    }
}

fn ring_len(hub: &Hub) -> usize {
    // A whole number of slots, each a whole number of pages.
    let slots = usize::try_from(RING_SLOTS).unwrap_or(8);
    let bytes = match hub.devices.device() {
        Some(_) => hub.config.device_ring_bytes,
        None => hub.config.ring_bytes,
    };
    bytes / (slots * 4096) * (slots * 4096)
}

/// Everything known when a lane's handshake is through.
pub(super) struct LaneStart {
    pub(super) socket: OwnedFd,
    pub(super) lane: LaneId,
    pub(super) rest: Vec<u8>,
    /// `None` on TCP.
    pub(super) local: Option<LocalPath>,
    /// The peer says that it can read our memory.
    pub(super) peer_can_pull: bool,
    /// The peer's ring.
    pub(super) ring_in: Option<OwnedFd>,
    /// Why the path is not a better one.
    pub(super) reason: String,
}

/// How a lane carries its payload.
fn setup_of(hub: &Hub, link: &Link, start: &LaneStart) -> LaneSetup {
    let config = &hub.config;
    let on_device = hub.devices.device().is_some();
    let batch_bytes = |host, device| if on_device { device } else { host };
    match &start.local {
        _ if config.null_wire => LaneSetup {
            mode: PayloadMode::Null,
            path: "null",
            path_reason: "null_wire is set: bytes are planned and counted, not moved".into(),
            batch_bytes: NULL_BATCH_BYTES_MAX,
            window: config.lane_window,
        },
        None => LaneSetup {
            mode: PayloadMode::Inline,
            path: "tcp",
            path_reason: start.reason.clone(),
            batch_bytes: batch_bytes(config.batch_bytes, config.staged_batch_bytes),
            window: config.lane_window,
        },
        Some(_) if start.peer_can_pull => LaneSetup {
            mode: PayloadMode::Pull,
            path: if on_device { "device-pull" } else { "shm-pull" },
            path_reason: start.reason.clone(),
            batch_bytes: batch_bytes(config.pull_batch_bytes, config.device_pull_batch_bytes),
            window: 4,
        },
        Some(_) => LaneSetup {
            mode: PayloadMode::Ring,
            path: "shm-ring",
            path_reason: if config.same_host == SameHost::RingOnly {
                "pull is switched off by configuration".into()
            } else if let PeerMemory::Refused(reason) = link.peer_memory(hub) {
                reason
            } else {
                "the peer may not read this process's memory (ptrace scope or container)".into()
            },
            batch_bytes: ring_len(hub) as u64 / RING_SLOTS,
            window: usize::try_from(RING_SLOTS).unwrap_or(8),
        },
    }
}

/// Starts a lane whose handshake is through.
pub(super) fn start_lane(hub: &Arc<Hub>, link: &Link, start: LaneStart) -> io::Result<()> {
    let setup = setup_of(hub, link, &start);
    let slot = ring_len(hub) as u64 / RING_SLOTS;
    let ring_in = match start.ring_in {
        Some(fd) if start.local.is_some() => {
            let len = usize::try_from(rustix::fs::fstat(&fd)?.st_size).unwrap_or(0);
            let ring = Region::peer_memfd(fd, len).map_err(io::Error::other)?;
            let used = start.local.as_ref().is_some_and(|local| !local.can_pull);
            let device = hub.devices.device().filter(|_| used);
            // The peer has cut its ring into as many slots, perhaps of another size.
            Some(Ring::new(ring, len as u64 / RING_SLOTS).pinned(device))
        }
        _ => None,
    };
    let pulled = start.local.as_ref().filter(|local| local.can_pull);
    let attached = match pulled.map(|local| &local.memory) {
        Some(PeerMemory::Attached(regions)) => Some(Arc::clone(regions)),
        _ => None,
    };
    let pid = pulled.map(|local| local.pid);
    let sends = hub.devices.device().filter(|_| !start.peer_can_pull);
    let context = LaneContext {
        hub: Arc::clone(hub),
        peer: link.peer,
        lane: start.lane,
        peer_pid: pid,
        peer_regions: Arc::clone(&link.agreement.regions),
        attached,
        ring_in,
        ring_out: start
            .local
            .map(|local| Ring::new(local.ring_out, slot).pinned(sends)),
    };
    link.note_path(&setup);
    // The node must know the lane before its thread asks for work.
    // Streams carry nothing of a room that has failed: there is no failure to wait for.
    hub.lane_up(link.peer, start.lane, setup, 0);
    let lane = Lane::start(start.socket, context, &start.rest)?;
    link.lanes
        .add(DataLane::Stream(Arc::clone(&lane)), Stage::Up);
    // It may have ended before the link knew it.
    if lane.is_over() {
        link.lanes.remove(lane.id);
    }
    // Pages pushed after its thread had looked for work, but before the link knew it, kicked nobody.
    lane.kick();
    Ok(())
}
