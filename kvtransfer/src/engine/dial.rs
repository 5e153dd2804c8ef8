//! Connecting to a peer, in the caller's thread.

use std::{
    io,
    net::{SocketAddr, TcpStream},
    os::{
        fd::{AsFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::UnixStream,
    },
    sync::Arc,
    time::Duration,
};

use thiserror::Error;

use super::{
    PeerInfo, accept,
    greeting::{LaneStart, LocalPath, Talk, agree, introduce, start_lane, token_of},
    hub::{Hub, peer_info},
    link::Link,
    queue_pairs, redial,
};
use crate::{
    clock,
    config::{RdmaUse, SameHost},
    ids::LaneId,
    time::Time,
    wire::{control::Control, hello::HostIdentity},
};

/// Why a peer could not be connected to.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// Nobody answers there.
    #[error("cannot reach {address}: {source}")]
    Unreachable {
        /// Which address.
        address: SocketAddr,
        /// The system's answer.
        source: io::Error,
    },
    /// The peer said no, or its layout does not fit ours.
    #[error("{address} refused: {reason}")]
    Refused {
        /// Which address.
        address: SocketAddr,
        /// The sentence.
        reason: String,
    },
    /// The peer did not answer in time, or not in this protocol.
    #[error("{address} did not complete the handshake ({stage}): {source}")]
    Handshake {
        /// Which address.
        address: SocketAddr,
        /// How far it got.
        stage: &'static str,
        /// What happened.
        source: io::Error,
    },
    /// This engine has shut down, or has too many peers.
    #[error("{0}")]
    Local(String),
}

impl ConnectError {
    /// Whether trying again later may help.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Handshake { .. })
    }
}

pub(super) fn dial(
    hub: &Arc<Hub>,
    address: SocketAddr,
    timeout: Duration,
) -> Result<PeerInfo, ConnectError> {
    let started = clock::now();
    if hub.is_stopped() {
        return Err(ConnectError::Local("the engine has shut down".into()));
    }
    if hub.link_count() >= hub.config.peers_max {
        let limit = hub.config.peers_max;
        return Err(ConnectError::Local(format!(
            "already {limit} peers (peers_max)"
        )));
    }
    let broken = |stage| {
        move |source| ConnectError::Handshake {
            address,
            stage,
            source,
        }
    };
    // One deadline for all of it: a peer that is slow at every step must not be waited for at every step.
    let deadline = started + timeout;
    let control = connect(address, left(deadline))?;
    let mut talk = Talk::new(&control, left(deadline));
    let number = u64::from_le_bytes(super::hub::random().map_err(broken("random number"))?);
    let hello = introduce(hub, number, hub.config.lanes);
    talk.say(&Control::Hello(Box::new(hello)), None)
        .map_err(broken("sending hello"))?;
    let welcome = match talk.hear().map_err(broken("waiting for its hello"))? {
        Control::Welcome(welcome) => welcome,
        Control::Reject { reason } => return Err(ConnectError::Refused { address, reason }),
        other => {
            let got = io::Error::new(io::ErrorKind::InvalidData, format!("it said {other:?}"));
            return Err(broken("waiting for its hello")(got));
        }
    };
    let (decoder, _) = talk.finish();
    let (host, lanes) = (welcome.host.clone(), welcome.lanes.min(hub.config.lanes));
    let mut agreement = agree(hub, *welcome, address.to_string())
        .map_err(|reason| ConnectError::Refused { address, reason })?;
    agreement.link = number;
    let peer = hub.new_peer_id();
    let control: OwnedFd = control.into();
    let writer = control
        .try_clone()
        .map_err(broken("duplicating a descriptor"))?;
    let took = clock::now().since(started);
    let link = Link::new(peer, agreement, writer, took, Some(address));
    let link = Arc::new(link);
    hub.add_link(&link);
    let opened = open_lanes(hub, &link, &host, address, lanes, deadline);
    if let Err(source) = opened {
        hub.drop_peer(peer, "its data connections could not be opened");
        return Err(ConnectError::Handshake {
            address,
            stage: "opening data connections",
            source,
        });
    }
    accept::adopt(hub, control, decoder, peer).map_err(|source| {
        hub.drop_peer(peer, "its control stream could not be handed over");
        broken("handing over")(source)
    })?;
    Ok(PeerInfo {
        handshake: clock::now().since(started),
        ..peer_info(&link)
    })
}

/// Time to the deadline; never zero, which some system calls take for "for ever".
fn left(deadline: Time) -> Duration {
    deadline.since(clock::now()).max(Duration::from_millis(1))
}

fn connect(address: SocketAddr, timeout: Duration) -> Result<TcpStream, ConnectError> {
    let unreachable = |source| ConnectError::Unreachable { address, source };
    let stream = TcpStream::connect_timeout(&address, timeout);
    let stream = stream.map_err(unreachable)?;
    stream.set_nodelay(true).map_err(unreachable)?;
    Ok(stream)
}

fn open_lanes(
    hub: &Arc<Hub>,
    link: &Arc<Link>,
    host: &HostIdentity,
    address: SocketAddr,
    lanes: u8,
    deadline: Time,
) -> io::Result<()> {
    let mut reason = same_host_refusal(hub, host);
    if let Some(refused) = &reason {
        match open_queue_pairs(hub, link, address, deadline, refused) {
            Ok(()) => return Ok(()),
            Err(why) if hub.config.rdma.usage == RdmaUse::Required => {
                return Err(io::Error::other(format!("RDMA is required: {why}")));
            }
            Err(why) => reason = Some(format!("{refused}; {why}")),
        }
    }
    for lane in (0..lanes).map(LaneId) {
        let mut start = None;
        if reason.is_none() {
            match open_local(hub, link, host, lane, left(deadline)) {
                Ok(opened) => start = Some(opened),
                Err(why) => reason = Some(why),
            }
        }
        let start = match start {
            Some(start) => start,
            None => {
                let stream = TcpStream::connect_timeout(&address, left(deadline))?;
                stream.set_nodelay(true)?;
                let why = reason.clone().unwrap_or_default();
                let wait = left(deadline);
                open_lane(hub, link, stream.into(), None, lane, wait, why)?
            }
        };
        start_lane(hub, link, start)?;
    }
    Ok(())
}

/// Opens queue pairs over every rail. One that works is enough; the others are tried again later.
///
/// # Errors
/// Why there is none, in words.
fn open_queue_pairs(
    hub: &Arc<Hub>,
    link: &Arc<Link>,
    address: SocketAddr,
    deadline: Time,
    refused: &str,
) -> Result<(), String> {
    let mut failed = Vec::new();
    let tracks = queue_pairs::tracks(hub, link)?;
    let count = tracks.len();
    for track in tracks {
        // One that does not answer must leave time for another path.
        let share =
            Duration::from_nanos(u64::try_from(left(deadline).as_nanos()).unwrap_or(u64::MAX) / 2);
        let until = clock::now() + share;
        if let Err(reason) = queue_pairs::open(hub, link, address, track, until, refused) {
            failed.push((track.lane, reason));
            if failed.len() == count.min(FAILURES_MAX) {
                break;
            }
        }
    }
    let Some((_, reason)) = failed.first() else {
        return Ok(());
    };
    if !link.lanes.has_up() {
        return Err(reason.clone());
    }
    for (lane, reason) in &failed {
        tracing::warn!(peer = %link.peer, lane = lane.0, reason, "a queue pair is missing; it is tried again");
        redial::lane_lost(hub, link, *lane);
    }
    Ok(())
}

/// Queue pairs that may fail before the path is given up.
const FAILURES_MAX: usize = 2;

/// Why no same-host path is tried, if none is.
fn same_host_refusal(hub: &Hub, host: &HostIdentity) -> Option<String> {
    let own = super::boot_id().unwrap_or_default();
    let user = rustix::process::geteuid().as_raw();
    if hub.config.same_host == SameHost::Off {
        Some("same-host paths are switched off here".into())
    } else if host.boot_id != own || own == [0; 16] {
        Some("the peer is on another host (its boot id differs)".into())
    } else if host.user_id != user {
        Some(format!(
            "the peer runs as user {}, this engine as {user}",
            host.user_id
        ))
    } else if host.socket_name.is_empty() {
        Some("same-host paths are switched off at the peer".into())
    } else {
        None
    }
}

fn open_local(
    hub: &Hub,
    link: &Link,
    host: &HostIdentity,
    lane: LaneId,
    timeout: Duration,
) -> Result<LaneStart, String> {
    let failed = |error: io::Error| format!("the peer's same-host socket: {error}");
    let name = std::os::unix::net::SocketAddr::from_abstract_name(&host.socket_name);
    let stream = UnixStream::connect_addr(&name.map_err(failed)?).map_err(failed)?;
    let local = LocalPath::probe(hub, stream.as_fd(), link).map_err(failed)?;
    if hub.config.same_host == SameHost::PullOnly && !local.can_pull {
        return Err("the peer's memory cannot be read (ptrace scope or container)".into());
    }
    open_lane(
        hub,
        link,
        stream.into(),
        Some(local),
        lane,
        timeout,
        String::new(),
    )
    .map_err(failed)
}

fn open_lane(
    hub: &Hub,
    link: &Link,
    socket: OwnedFd,
    local: Option<LocalPath>,
    lane: LaneId,
    timeout: Duration,
    reason: String,
) -> io::Result<LaneStart> {
    let mut talk = Talk::new(&socket, timeout);
    let can_pull = local.as_ref().is_some_and(|local| local.can_pull);
    let open = Control::LaneOpen {
        instance: hub.instance,
        link: link.agreement.link,
        lane: lane.0,
        token: token_of(hub),
        can_pull,
    };
    let ring = local.as_ref().and_then(|local| local.ring_out.memfd_fd());
    talk.say(&open, ring.map(AsFd::as_fd))?;
    let peer_can_pull = match talk.hear()? {
        Control::LaneReady { can_pull } => can_pull,
        Control::Reject { reason } => return Err(io::Error::other(reason)),
        other => {
            let what = format!("it answered a data connection with {other:?}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
    };
    let (decoder, ring_in) = talk.finish();
    let rest = decoder.into_rest();
    Ok(LaneStart {
        socket,
        lane,
        rest,
        local,
        peer_can_pull,
        ring_in,
        reason,
    })
}
