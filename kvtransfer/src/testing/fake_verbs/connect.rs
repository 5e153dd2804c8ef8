//! A connection manager: what `librdmacm` and the kernel do, as a table of identifiers.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};

use super::{QueuePairId, behaviour::CmRules, events::EventQueue, queue::Hardware, state::State};
use crate::transport::verbs::sys;

/// First port handed out when port 0 is bound.
const EPHEMERAL_FIRST: u16 = 40_000;
/// Most connection requests that wait at a listener which asked for no particular backlog.
const BACKLOG_DEFAULT: usize = 128;
/// The reason code of an InfiniBand reject that the listener's application sent (`IB_CM_REJ_CONSUMER_DEFINED`).
const REJECT_CONSUMER: i32 = 28;
/// The reason code of an InfiniBand reject because nobody listens (`IB_CM_REJ_INVALID_SERVICE_ID`).
const REJECT_NO_LISTENER: i32 = 8;

/// How far an identifier has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    New,
    Listening {
        backlog: usize,
    },
    Resolved,
    Routed,
    Connecting,
    /// A request that waits for accept or reject.
    Requested,
    /// Active side: the reply has arrived, ESTABLISHED has not been taken yet.
    Replied,
    /// Passive side on InfiniBand: accepted, the active side has not been heard of since.
    Accepted,
    Connected,
    Over,
}

/// An `rdma_cm_id`.
#[derive(Debug)]
pub(super) struct Identifier {
    /// Address of the C structure; zero for a request whose event nobody has taken.
    pub(super) handle: usize,
    pub(super) channel: u64,
    pub(super) device: Option<usize>,
    pub(super) local: (u32, u16),
    pub(super) remote: (u32, u16),
    pub(super) queue: Option<QueuePairId>,
    pub(super) peer: Option<u64>,
    pub(super) listener: Option<u64>,
    pub(super) is_active: bool,
    pub(super) phase: Phase,
    pub(super) unacked: u32,
}

/// An `rdma_cm_event` before it has a C structure.
#[derive(Clone, Debug)]
pub(super) struct ConnectEvent {
    pub(super) id: u64,
    pub(super) listener: Option<u64>,
    pub(super) kind: u32,
    pub(super) status: i32,
    pub(super) private: Vec<u8>,
}

/// All identifiers and event channels of a fabric.
#[derive(Debug, Default)]
pub(super) struct ConnectionTable {
    pub(super) ids: BTreeMap<u64, Identifier>,
    pub(super) channels: BTreeMap<u64, EventQueue<ConnectEvent>>,
    next: u64,
    next_port: u16,
    frozen: BTreeSet<usize>,
    held: Vec<(usize, u64, ConnectEvent)>,
}

/// What a call fails with: an errno.
pub(super) type Errno = i32;

impl ConnectionTable {
    pub(super) fn new_number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    pub(super) fn add_id(&mut self, channel: u64) -> u64 {
        let number = self.new_number();
        self.ids.insert(
            number,
            Identifier {
                handle: 0,
                channel,
                device: None,
                local: (0, 0),
                remote: (0, 0),
                queue: None,
                peer: None,
                listener: None,
                is_active: false,
                phase: Phase::New,
                unacked: 0,
            },
        );
        number
    }

    fn free_port(&mut self) -> u16 {
        loop {
            self.next_port = self.next_port.wrapping_add(1).max(EPHEMERAL_FIRST);
            let port = self.next_port;
            if self.ids.values().all(|id| id.local.1 != port) {
                return port;
            }
        }
    }

    pub(super) fn set_frozen(&mut self, device: usize, frozen: bool) {
        if frozen {
            self.frozen.insert(device);
            return;
        }
        self.frozen.remove(&device);
        let (due, kept) = std::mem::take(&mut self.held)
            .into_iter()
            .partition(|(at, _, _)| *at == device);
        self.held = kept;
        let due: Vec<(usize, u64, ConnectEvent)> = due;
        for (_, channel, event) in due {
            if let Some(channel) = self.channels.get_mut(&channel) {
                channel.push(event);
            }
        }
    }

    fn tell(&mut self, event: ConnectEvent) {
        let about = event.listener.unwrap_or(event.id);
        let Some(id) = self.ids.get(&about) else {
            return;
        };
        let channel = id.channel;
        if let Some(device) = id.device.filter(|device| self.frozen.contains(device)) {
            self.held.push((device, channel, event));
        } else if let Some(channel) = self.channels.get_mut(&channel) {
            channel.push(event);
        }
    }

    pub(super) fn notify(&mut self, id: u64, kind: u32, status: i32) {
        self.tell(ConnectEvent {
            id,
            listener: None,
            kind,
            status,
            private: Vec::new(),
        });
    }

    fn listener_at(&self, (address, port): (u32, u16)) -> Option<(u64, usize)> {
        self.ids.iter().find_map(|(&number, id)| match id.phase {
            Phase::Listening { backlog }
                if id.local.1 == port && (id.local.0 == 0 || id.local.0 == address) =>
            {
                Some((number, backlog))
            }
            _ => None,
        })
    }
}

/// Private data as the other side sees it.
fn delivered(private: &[u8], size: u8, pads: bool) -> Vec<u8> {
    let mut seen = private.to_vec();
    if pads {
        seen.resize(usize::from(size), 0);
    }
    seen
}

impl State {
    fn rules(&self) -> Result<CmRules, Errno> {
        self.behaviour.cm.ok_or(libc::ENOSYS)
    }

    fn device_at(&self, address: u32) -> Option<usize> {
        self.devices
            .iter()
            .position(|device| device.address == address && !device.removed)
    }

    pub(super) fn id_mut(&mut self, number: u64) -> Result<&mut Identifier, Errno> {
        self.connections.ids.get_mut(&number).ok_or(libc::EINVAL)
    }

    /// `rdma_bind_addr`.
    pub(super) fn cm_bind(&mut self, number: u64, local: (u32, u16)) -> Result<(), Errno> {
        let (address, mut port) = local;
        let device = self.device_at(address);
        if address != 0 && device.is_none() {
            return Err(libc::ENODEV);
        }
        let taken = |id: &Identifier| {
            port != 0 && id.local == (address, port) && matches!(id.phase, Phase::Listening { .. })
        };
        if self.connections.ids.values().any(taken) {
            return Err(libc::EADDRINUSE);
        }
        if port == 0 {
            port = self.connections.free_port();
        }
        let id = self.id_mut(number)?;
        if id.phase != Phase::New {
            return Err(libc::EINVAL);
        }
        id.local = (address, port);
        id.device = device;
        Ok(())
    }

    /// `rdma_listen`.
    pub(super) fn cm_listen(&mut self, number: u64, backlog: i32) -> Result<(), Errno> {
        let id = self.id_mut(number)?;
        if id.phase != Phase::New || id.local.1 == 0 {
            return Err(libc::EINVAL);
        }
        let backlog = usize::try_from(backlog).unwrap_or(0);
        id.phase = Phase::Listening {
            backlog: if backlog == 0 {
                BACKLOG_DEFAULT
            } else {
                backlog
            },
        };
        Ok(())
    }

    /// `rdma_resolve_addr`: finds the local device; a target that is no device of the fabric is an ADDR_ERROR.
    pub(super) fn cm_resolve_address(
        &mut self,
        number: u64,
        source: Option<(u32, u16)>,
        target: (u32, u16),
    ) -> Result<(), Errno> {
        if let Some(source) = source {
            self.cm_bind(number, source)?;
        }
        let reachable = self.device_at(target.0).is_some();
        let first = self.devices.iter().position(|device| !device.removed);
        let id = self.id_mut(number)?;
        if id.phase != Phase::New {
            return Err(libc::EINVAL);
        }
        let device = id.device.or(first).ok_or(libc::ENODEV)?;
        id.device = Some(device);
        id.remote = target;
        id.is_active = true;
        if !reachable {
            let kind = sys::RDMA_CM_EVENT_ADDR_ERROR;
            self.connections.notify(number, kind, -libc::ETIMEDOUT);
            return Ok(());
        }
        id.phase = Phase::Resolved;
        let address = self.devices[device].address;
        let port = self.connections.free_port();
        let id = self.id_mut(number)?;
        id.local.0 = address;
        if id.local.1 == 0 {
            id.local.1 = port;
        }
        let kind = sys::RDMA_CM_EVENT_ADDR_RESOLVED;
        self.connections.notify(number, kind, 0);
        Ok(())
    }

    /// `rdma_resolve_route`.
    pub(super) fn cm_resolve_route(&mut self, number: u64) -> Result<(), Errno> {
        let id = self.id_mut(number)?;
        if id.phase != Phase::Resolved {
            return Err(libc::EINVAL);
        }
        id.phase = Phase::Routed;
        let kind = sys::RDMA_CM_EVENT_ROUTE_RESOLVED;
        self.connections.notify(number, kind, 0);
        Ok(())
    }

    /// `rdma_connect`.
    pub(super) fn cm_connect(&mut self, number: u64, private: &[u8]) -> Result<(), Errno> {
        let rules = self.rules()?;
        if private.len() > usize::from(rules.connect_private_max) {
            return Err(libc::EINVAL);
        }
        let id = self.id_mut(number)?;
        if id.phase != Phase::Routed || id.queue.is_none() {
            return Err(libc::EINVAL);
        }
        let (device, remote, local) = (id.device.ok_or(libc::EINVAL)?, id.remote, id.local);
        id.phase = Phase::Connecting;
        let there = self.device_at(remote.0);
        let Some(there) = there.filter(|&there| self.path_is_up(device, there)) else {
            self.end(number, sys::RDMA_CM_EVENT_UNREACHABLE, -libc::ETIMEDOUT);
            return Ok(());
        };
        let waiting = |listener: u64| {
            let is_waiting =
                |id: &&Identifier| id.listener == Some(listener) && id.phase == Phase::Requested;
            self.connections.ids.values().filter(is_waiting).count()
        };
        let listener = self.connections.listener_at(remote);
        let Some((listener, _)) = listener.filter(|&(at, backlog)| waiting(at) < backlog) else {
            let status = if self.behaviour.looks_iwarp {
                -libc::ECONNREFUSED
            } else {
                REJECT_NO_LISTENER
            };
            self.end(number, sys::RDMA_CM_EVENT_REJECTED, status);
            return Ok(());
        };
        let channel = self.id_mut(listener)?.channel;
        let request = self.connections.add_id(channel);
        let new = self.id_mut(request)?;
        new.device = Some(there);
        new.local = remote;
        new.remote = local;
        new.peer = Some(number);
        new.listener = Some(listener);
        new.phase = Phase::Requested;
        self.id_mut(number)?.peer = Some(request);
        self.connections.tell(ConnectEvent {
            id: request,
            listener: Some(listener),
            kind: sys::RDMA_CM_EVENT_CONNECT_REQUEST,
            status: 0,
            private: delivered(private, rules.connect_private_max, rules.pads_private),
        });
        Ok(())
    }

    /// An attempt is over.
    fn end(&mut self, number: u64, kind: u32, status: i32) {
        if let Ok(id) = self.id_mut(number) {
            id.phase = Phase::Over;
            self.connections.notify(number, kind, status);
        }
    }

    /// `rdma_accept`: the passive queue pair is ready at once; the active one when its reply has been processed.
    pub(super) fn cm_accept(&mut self, number: u64, private: &[u8]) -> Result<(), Errno> {
        let rules = self.rules()?;
        if private.len() > usize::from(rules.accept_private_max) {
            return Err(libc::EINVAL);
        }
        let id = self.id_mut(number)?;
        let (Phase::Requested, Some(mine), Some(peer)) = (id.phase, id.queue, id.peer) else {
            return Err(libc::EINVAL);
        };
        let theirs = self.id_mut(peer).ok().and_then(|id| id.queue);
        let Some(theirs) = theirs else {
            self.end(number, sys::RDMA_CM_EVENT_CONNECT_ERROR, -libc::ECONNRESET);
            return Ok(());
        };
        self.join(mine, theirs);
        self.ready(mine);
        self.id_mut(peer)?.phase = Phase::Replied;
        let id = self.id_mut(number)?;
        if rules.pads_private {
            // InfiniBand: the passive side is told when the active side is ready.
            id.phase = Phase::Accepted;
        } else {
            id.phase = Phase::Connected;
            self.ready(theirs);
            let kind = sys::RDMA_CM_EVENT_ESTABLISHED;
            self.connections.notify(number, kind, 0);
        }
        self.connections.tell(ConnectEvent {
            id: peer,
            listener: None,
            kind: sys::RDMA_CM_EVENT_ESTABLISHED,
            status: 0,
            private: delivered(private, rules.accept_private_max, rules.pads_private),
        });
        Ok(())
    }

    fn join(&mut self, one: QueuePairId, other: QueuePairId) {
        for (mine, theirs) in [(one, other), (other, one)] {
            if let Some(queue) = self.queue_mut(mine) {
                queue.remote = Some(theirs);
            }
        }
    }

    fn ready(&mut self, id: QueuePairId) {
        if let Some(queue) = self.queue_mut(id) {
            queue.hardware = Hardware::Ready;
            queue.state = sys::IBV_QPS_RTS;
        }
    }

    /// The user takes an event; ESTABLISHED on the active side is what completes the connection.
    pub(super) fn cm_taken(&mut self, event: &ConnectEvent) {
        let counted = event.listener.unwrap_or(event.id);
        if let Ok(id) = self.id_mut(counted) {
            id.unacked += 1;
        }
        let Some(id) = self.connections.ids.get_mut(&event.id) else {
            return;
        };
        if event.kind != sys::RDMA_CM_EVENT_ESTABLISHED || id.phase != Phase::Replied {
            return;
        }
        id.phase = Phase::Connected;
        let (queue, peer) = (id.queue, id.peer);
        if let Some(queue) = queue {
            self.ready(queue);
        }
        let accepted = peer.and_then(|peer| self.connections.ids.get_mut(&peer));
        if let (Some(passive), Some(peer)) = (accepted, peer)
            && passive.phase == Phase::Accepted
        {
            passive.phase = Phase::Connected;
            let kind = sys::RDMA_CM_EVENT_ESTABLISHED;
            self.connections.notify(peer, kind, 0);
        }
        self.pump_all();
    }

    /// `rdma_reject`.
    pub(super) fn cm_reject(&mut self, number: u64, private: &[u8]) -> Result<(), Errno> {
        let rules = self.rules()?;
        if private.len() > usize::from(rules.reject_private_max) {
            return Err(libc::EINVAL);
        }
        let status = if self.behaviour.looks_iwarp {
            -libc::ECONNREFUSED
        } else {
            REJECT_CONSUMER
        };
        let id = self.id_mut(number)?;
        if id.phase != Phase::Requested {
            return Err(libc::EINVAL);
        }
        id.phase = Phase::Over;
        let Some(peer) = id.peer else { return Ok(()) };
        if let Ok(active) = self.id_mut(peer) {
            active.phase = Phase::Over;
            self.connections.tell(ConnectEvent {
                id: peer,
                listener: None,
                kind: sys::RDMA_CM_EVENT_REJECTED,
                status,
                private: delivered(private, rules.reject_private_max, rules.pads_private),
            });
        }
        Ok(())
    }
}
