//! Connections of a trial through rdma_cm, for iWARP and eRDMA's standard mode.
#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};

use super::TrialError;
use super::endpoint::{Endpoint, PATIENCE};
use super::wire::QUEUE_PAIRS;
use crate::clock;
use crate::doctor::rails::Rail;
use crate::engine::hub::random;
use crate::time::Time;
use crate::transport::verbs::cm::{CmEvent, CmId, EventChannel, PrivateData};
use crate::transport::verbs::context::Context;
use crate::transport::verbs::sys;

/// First word of the private data of a connection request: another one than an engine's.
const MAGIC: [u8; 4] = *b"KVTD";

/// Where the serving side waits for the connections of one trial.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Door {
    address: SocketAddr,
    /// What a request must show.
    token: u64,
}

/// Waits for the connections of one trial.
pub(super) struct Listener {
    endpoint: Endpoint,
    channel: Arc<EventChannel>,
    id: CmId,
    door: Door,
}

impl Listener {
    /// Listens at a port of its own.
    pub(super) fn start(rail: &Rail) -> Result<Self, TrialError> {
        let (endpoint, channel) = open(rail)?;
        let mut id = CmId::create(&channel)?;
        let address = own_address(rail)?;
        id.bind(address)?;
        // All that ever come, and one that is refused.
        let backlog = u16::try_from(QUEUE_PAIRS + 1).expect("invariant: a few");
        id.listen(backlog)?;
        let door = Door {
            address: SocketAddr::new(address.ip(), id.local_port()),
            token: u64::from_le_bytes(random().map_err(|e| TrialError::Refused(e.to_string()))?),
        };
        Ok(Self {
            endpoint,
            channel,
            id,
            door,
        })
    }

    /// Where the peer must connect to.
    pub(super) fn door(&self) -> Door {
        self.door
    }

    /// Takes the connections of the peer, and nobody else's.
    pub(super) fn admit(mut self) -> Result<Endpoint, TrialError> {
        let until = clock::now() + PATIENCE;
        let mut established = 0;
        while established < QUEUE_PAIRS {
            let event = next_event(&self.channel, until)?;
            match event.kind {
                sys::RDMA_CM_EVENT_CONNECT_REQUEST if event.id == self.id.key() => {
                    let expected = request(self.door.token, self.endpoint.connections())?;
                    let shown = event.private_data.as_ref().map(PrivateData::as_slice);
                    let is_expected = shown == Some(expected.as_slice());
                    let Some(mut id) = event.request else {
                        continue;
                    };
                    if !is_expected || self.endpoint.connections() == QUEUE_PAIRS {
                        id.reject(&PrivateData::new(b"")?)?;
                        continue;
                    }
                    self.endpoint.make(&mut id)?;
                    id.accept(&expected)?;
                    self.endpoint.keep(id);
                }
                sys::RDMA_CM_EVENT_ESTABLISHED => established += 1,
                _ => return Err(unexpected(&event)),
            }
        }
        self.endpoint.listen_to(self.channel);
        Ok(self.endpoint)
    }
}

/// Opens our end and connects every queue pair of it once `ask` has told where.
pub(super) fn dial(
    rail: &Rail,
    ask: impl FnOnce() -> Result<Door, TrialError>,
) -> Result<Endpoint, TrialError> {
    let (mut endpoint, channel) = open(rail)?;
    let from = own_address(rail)?;
    let door = ask()?;
    let until = clock::now() + PATIENCE;
    for index in 0..QUEUE_PAIRS {
        let mut id = CmId::create(&channel)?;
        id.resolve_addr(Some(from), door.address, PATIENCE)?;
        expect(&channel, &id, sys::RDMA_CM_EVENT_ADDR_RESOLVED, until)?;
        id.resolve_route(PATIENCE)?;
        expect(&channel, &id, sys::RDMA_CM_EVENT_ROUTE_RESOLVED, until)?;
        endpoint.make(&mut id)?;
        id.connect(&request(door.token, index)?)?;
        expect(&channel, &id, sys::RDMA_CM_EVENT_ESTABLISHED, until)?;
        endpoint.keep(id);
    }
    endpoint.listen_to(channel);
    Ok(endpoint)
}

fn open(rail: &Rail) -> Result<(Endpoint, Arc<EventChannel>), TrialError> {
    let endpoint = Endpoint::unconnected(rail, Context::open_for_cm)?;
    let channel = EventChannel::open(endpoint.library())?;
    Ok((endpoint, channel))
}

fn own_address(rail: &Rail) -> Result<SocketAddr, TrialError> {
    let none = || TrialError::Refused(format!("{} has no address", rail.device));
    Ok(SocketAddr::new(rail.address.ok_or_else(none)?, 0))
}

/// The private data of the request for the queue pair of this index.
fn request(token: u64, index: usize) -> Result<PrivateData, TrialError> {
    let mut bytes = [0; 13];
    bytes[..4].copy_from_slice(&MAGIC);
    bytes[4..12].copy_from_slice(&token.to_le_bytes());
    bytes[12] = u8::try_from(index).expect("invariant: a few queue pairs");
    Ok(PrivateData::new(&bytes)?)
}

fn next_event(channel: &Arc<EventChannel>, until: Time) -> Result<CmEvent, TrialError> {
    loop {
        if let Some(event) = channel.next_event()? {
            return Ok(event);
        }
        let left = until.since(clock::now());
        if left.is_zero() {
            return Err(TrialError::Nothing("answer of rdma_cm", PATIENCE.as_secs()));
        }
        let wait = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        let fd = channel.fd();
        let mut fds = [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)];
        // An interrupted wait is only a shorter one: the event is asked for again.
        let _ = poll(&mut fds, Some(&wait));
    }
}

fn expect(
    channel: &Arc<EventChannel>,
    id: &CmId,
    kind: u32,
    until: Time,
) -> Result<(), TrialError> {
    let event = next_event(channel, until)?;
    if event.kind == kind && event.id == id.key() {
        Ok(())
    } else {
        Err(unexpected(&event))
    }
}

fn unexpected(event: &CmEvent) -> TrialError {
    TrialError::Connection(event.words(), event.status)
}
