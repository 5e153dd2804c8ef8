//! The standard connector: queue pairs through `rdma_cm`, for iWARP and eRDMA's standard mode.

use std::{net::SocketAddr, os::fd::AsFd, sync::Arc, time::Duration};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Rail, lane::Connection, prepare::Prepared};
use crate::{
    clock,
    time::Time,
    transport::verbs::{
        cm::{CmEvent, CmId, EventChannel, PrivateData},
        cq::Cq,
        error::VerbsError,
        sys,
    },
    wire::rdma::{QpEnd, QpTerms},
};

/// First word of the private data of a connection request: "KVTQ".
const REQUEST_MAGIC: [u8; 4] = *b"KVTQ";

/// Requests that may wait at a listener that expects one.
const BACKLOG: u16 = 8;

/// How long the active side of an rdma_cm connection may look for its peer.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(2);

impl Prepared {
    /// Connects through rdma_cm to where the peer listens. Blocks until `deadline` at most.
    ///
    /// # Errors
    /// What rdma_cm said, in words.
    pub(crate) fn dial(
        &mut self,
        address: [u8; 4],
        port: u16,
        token: u64,
        deadline: Time,
    ) -> Result<(), String> {
        let rail = Arc::clone(&self.rail);
        let fail = |error: VerbsError| format!("{}: {error}", rail.name);
        let channel = EventChannel::open(rail.context.library()).map_err(fail)?;
        let mut id = CmId::create(&channel).map_err(fail)?;
        let from = SocketAddr::from((rail.address, 0));
        let to = SocketAddr::from((address, port));
        id.resolve_addr(Some(from), to, RESOLVE_TIMEOUT)
            .map_err(fail)?;
        await_event(&channel, sys::RDMA_CM_EVENT_ADDR_RESOLVED, deadline)?;
        id.resolve_route(RESOLVE_TIMEOUT).map_err(fail)?;
        await_event(&channel, sys::RDMA_CM_EVENT_ROUTE_RESOLVED, deadline)?;
        self.make(&mut id)?;
        id.connect(&request_data(token).map_err(fail)?)
            .map_err(fail)?;
        await_event(&channel, sys::RDMA_CM_EVENT_ESTABLISHED, deadline)?;
        self.keep(id, channel);
        Ok(())
    }

    /// Makes the queue pair of an rdma_cm id.
    fn make(&mut self, id: &mut CmId) -> Result<(), String> {
        let (rail, caps) = (Arc::clone(&self.rail), self.rail.caps());
        let words = |error: VerbsError| error.to_string();
        let cq =
            Cq::create(&rail.context, caps.completions(), true, self.key.place).map_err(words)?;
        let qp = id.create_qp(&rail.pd, &cq, &cq, caps).map_err(words)?;
        self.fill(qp, None, cq)
    }

    fn keep(&mut self, id: CmId, channel: Arc<EventChannel>) {
        if let Some(wires) = &mut self.wires {
            wires.connection = Some(Connection { id, channel });
        }
    }
}

/// Waits for one connection through rdma_cm, on a port of its own that only the peer is told.
pub(crate) struct Listening {
    prepared: Prepared,
    channel: Arc<EventChannel>,
    listener: CmId,
    token: u64,
}

impl Listening {
    /// Listens on the rail's address.
    ///
    /// # Errors
    /// What rdma_cm said, in words.
    pub(crate) fn start(rail: &Arc<Rail>) -> Result<Self, String> {
        let fail = |error: VerbsError| format!("{}: {error}", rail.name);
        let token = crate::engine::hub::random().map_err(|error| error.to_string())?;
        let channel = EventChannel::open(rail.context.library()).map_err(fail)?;
        let mut listener = CmId::create(&channel).map_err(fail)?;
        listener
            .bind(SocketAddr::from((rail.address, 0)))
            .map_err(fail)?;
        listener.listen(BACKLOG).map_err(fail)?;
        Ok(Self {
            prepared: Prepared::reserve(rail)?,
            channel,
            listener,
            token: u64::from_le_bytes(token),
        })
    }

    /// What the peer must know.
    pub(crate) fn terms(&self) -> QpTerms {
        let end = QpEnd::Standard {
            address: self.prepared.rail.address.octets(),
            port: self.listener.local_port(),
            token: self.token,
        };
        self.prepared.terms_at(end)
    }

    /// The queue pair to be.
    pub(crate) fn prepared_mut(&mut self) -> &mut Prepared {
        &mut self.prepared
    }

    /// Takes the announced connection, and no other.
    ///
    /// # Errors
    /// It did not come until `deadline`, or the device's answer.
    pub(crate) fn accept(mut self, deadline: Time) -> Result<Prepared, String> {
        let name = self.prepared.rail.name.clone();
        let fail = |error: VerbsError| format!("{name}: {error}");
        let mut id = loop {
            let event = next_event(&self.channel, deadline)?;
            let expected = request_data(self.token).map_err(fail)?;
            if event.kind == sys::RDMA_CM_EVENT_CONNECT_REQUEST
                && let Some(id) = event.request
            {
                if event.private_data.as_ref().map(PrivateData::as_slice)
                    == Some(expected.as_slice())
                {
                    break id;
                }
                tracing::info!(rail = name, "a connection request that nobody announced");
                id.reject(&PrivateData::new(b"").map_err(fail)?)
                    .map_err(fail)?;
            }
        };
        self.prepared.make(&mut id)?;
        id.accept(&request_data(self.token).map_err(fail)?)
            .map_err(fail)?;
        await_event(&self.channel, sys::RDMA_CM_EVENT_ESTABLISHED, deadline)?;
        self.prepared.keep(id, self.channel);
        Ok(self.prepared)
    }
}

/// What the private data of an announced connection holds: far below the 56 bytes that every transport carries.
fn request_data(token: u64) -> Result<PrivateData, VerbsError> {
    let mut bytes = [0; 12];
    bytes[..4].copy_from_slice(&REQUEST_MAGIC);
    bytes[4..].copy_from_slice(&token.to_le_bytes());
    PrivateData::new(&bytes)
}

fn next_event(channel: &Arc<EventChannel>, deadline: Time) -> Result<CmEvent, String> {
    loop {
        if let Some(event) = channel.next_event().map_err(|error| error.to_string())? {
            return Ok(event);
        }
        let left = deadline.since(clock::now());
        if left.is_zero() {
            return Err("rdma_cm did not answer in time".into());
        }
        let wait = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        let fd = channel.fd();
        let mut fds = [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)];
        let _ = poll(&mut fds, Some(&wait));
    }
}

fn await_event(channel: &Arc<EventChannel>, wanted: u32, deadline: Time) -> Result<(), String> {
    let event = next_event(channel, deadline)?;
    if event.kind == wanted {
        return Ok(());
    }
    let (words, status) = (event.words(), event.status);
    Err(format!("rdma_cm: {words} (status {status})"))
}
