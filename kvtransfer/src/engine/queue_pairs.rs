//! Queue pairs to a peer: the words that go over the connection beside each of them, on both sides.
//!
//! ```text
//! dialling side                        accepting side
//! QpOpen (compat: its end) ──────────► makes its end; compat: connects it
//!                          ◄────────── QpReady (compat: its end; standard: where rdma_cm listens)
//! compat: connects its end             standard: waits for the announced connection
//! standard: rdma_cm ─────────────────► accepts
//! QpUp ──────────────────────────────►
//! both hand the queue pair to their rails; the dialling side says hello through it first
//! ```

use std::{
    net::{SocketAddr, TcpStream},
    os::fd::OwnedFd,
    sync::Arc,
};

use super::{
    accept::Stranger,
    greeting::{Talk, token_of},
    hub::Hub,
    lanes::Stage,
    link::Link,
};
use crate::{
    clock,
    ids::LaneId,
    time::Time,
    transport::{
        DataLane,
        rail::{Listening, Prepared, QpParts, Rail},
    },
    wire::{
        control::Control,
        hello::LANES_MAX,
        rdma::{Connector, QpEnd, QpOpen, RailOffer},
    },
};

/// One queue pair to be: which lane, over which rails.
#[derive(Clone, Copy, Debug)]
pub(super) struct Track {
    pub(super) lane: LaneId,
    rail: u8,
    peer_rail: u8,
}

/// Which queue pairs the dialling side opens to a peer: the configured number for every pair of rails, as many as there are
/// lanes.
///
/// # Errors
/// A sentence that says why none is possible.
pub(super) fn tracks(hub: &Hub, link: &Link) -> Result<Vec<Track>, String> {
    let pairs = hub.rails().pairs(&link.agreement.rails)?;
    let each = pairs.iter().cycle();
    let wanted = usize::from(hub.config.rdma.queue_pairs) * pairs.len();
    let count = wanted.min(LANES_MAX.into());
    let tracks = (0..LANES_MAX).zip(each).take(count);
    let tracks = tracks.map(|(lane, (rail, peer_rail))| Track {
        lane: LaneId(lane),
        rail: *rail,
        peer_rail: *peer_rail,
    });
    Ok(tracks.collect())
}

/// Opens one queue pair and waits until it has proven itself.
///
/// # Errors
/// What failed, in words.
pub(super) fn open(
    hub: &Arc<Hub>,
    link: &Arc<Link>,
    address: SocketAddr,
    track: Track,
    deadline: Time,
    path_reason: &str,
) -> Result<(), String> {
    let rails = hub.rails();
    let rail = rails.get(track.rail)?;
    let offer = link.agreement.rails.get(usize::from(track.peer_rail));
    let offer = offer.ok_or("a rail that the peer did not offer")?;
    let mut prepared = prepare(hub, link, &rail, offer)?;
    let left = deadline.since(clock::now());
    let stream = TcpStream::connect_timeout(&address, left.max(MINIMUM));
    let stream = stream.map_err(|error| format!("the connection beside it: {error}"))?;
    stream
        .set_nodelay(true)
        .map_err(|error| error.to_string())?;
    let socket: OwnedFd = stream.into();
    let mut talk = Talk::new(&socket, deadline.since(clock::now()));
    let open = QpOpen {
        instance: hub.instance,
        link: link.agreement.link,
        lane: track.lane.0,
        token: token_of(hub),
        rail: track.rail,
        peer_rail: track.peer_rail,
        terms: prepared.terms(),
    };
    let say = |talk: &mut Talk<'_>, message: &Control| {
        talk.say(message, None)
            .map_err(|error| format!("the connection beside it: {error}"))
    };
    say(&mut talk, &Control::QpOpen(Box::new(open)))?;
    let terms = match talk.hear() {
        Ok(Control::QpReady(terms)) => terms,
        Ok(Control::Reject { reason }) => return Err(reason),
        Ok(other) => return Err(format!("the peer answered a queue pair with {other:?}")),
        Err(error) => return Err(format!("the peer did not answer a queue pair: {error}")),
    };
    prepared.check_reach(link, offer, &terms)?;
    match terms.end {
        QpEnd::Compat(end) => prepared.connect(&end)?,
        QpEnd::Standard {
            address,
            port,
            token,
        } => prepared.dial(address, port, token, deadline)?,
    }
    say(&mut talk, &Control::QpUp)?;
    let (decoder, _) = talk.finish();
    let (opened, outcome) = crossbeam_channel::bounded(1);
    let parts = QpParts {
        hub: Arc::clone(hub),
        link: Arc::clone(link),
        lane: track.lane,
        socket,
        decoder,
        terms,
        offer: offer.clone(),
        is_active: true,
        path_reason: path_reason.to_owned(),
        until: deadline,
        opened: Some(opened),
    };
    adopt(link, prepared, parts)?;
    // The rail's thread answers at the deadline at the latest.
    outcome
        .recv()
        .unwrap_or_else(|_| Err("the queue pair was dropped".into()))
}

/// A queue pair on a rail, with what it offers for packed batches.
fn prepare(
    hub: &Hub,
    link: &Link,
    rail: &Arc<Rail>,
    offer: &RailOffer,
) -> Result<Prepared, String> {
    if rail.connector != offer.connector {
        let (ours, theirs) = (rail.connector.name(), offer.connector.name());
        return Err(format!(
            "{} connects in {ours} mode, the peer's {} in {theirs}",
            rail.name, offer.name
        ));
    }
    let mut prepared = match rail.connector {
        Connector::Compat => Prepared::compat(rail),
        Connector::Standard => Prepared::standard(rail),
    }?;
    prepared.offer_landing(hub, link, offer)?;
    Ok(prepared)
}

fn adopt(link: &Arc<Link>, prepared: Prepared, parts: QpParts) -> Result<(), String> {
    let lane = prepared.adopt(parts, |lane| {
        link.lanes
            .add(DataLane::QueuePair(Arc::clone(lane)), Stage::Opening);
    })?;
    // The link may have closed its lanes before it knew of this one.
    if link.is_closed() {
        lane.close();
    }
    Ok(())
}

/// Answers a peer that opens a queue pair.
///
/// # Errors
/// Why there is none, for the peer's log.
pub(super) fn accept(
    hub: &Arc<Hub>,
    link: &Arc<Link>,
    stranger: Stranger,
    mut talk: Talk<'_>,
    open: &QpOpen,
) -> Result<(), String> {
    let deadline = clock::now() + hub.config.handshake_timeout;
    let rails = hub.rails();
    let rail = rails.get(open.peer_rail)?;
    let offer = link.agreement.rails.get(usize::from(open.rail));
    let offer = offer.ok_or("a rail that is not in the hello")?;
    let mut say = |message: &Control| talk.say(message, None).map_err(|error| error.to_string());
    let prepared = match &open.terms.end {
        QpEnd::Compat(end) => {
            let mut prepared = prepare(hub, link, &rail, offer)?;
            prepared.check_reach(link, offer, &open.terms)?;
            prepared.connect(end)?;
            say(&Control::QpReady(prepared.terms()))?;
            prepared
        }
        QpEnd::Standard { .. } => {
            let mut listening = Listening::start(&rail)?;
            let prepared = listening.prepared_mut();
            prepared.offer_landing(hub, link, offer)?;
            prepared.check_reach(link, offer, &open.terms)?;
            say(&Control::QpReady(listening.terms()))?;
            listening.accept(deadline)?
        }
    };
    match talk.hear() {
        Ok(Control::QpUp) => {}
        Ok(other) => return Err(format!("a queue pair goes on with {other:?}")),
        Err(error) => return Err(error.to_string()),
    }
    let (decoder, _) = talk.finish();
    let parts = QpParts {
        hub: Arc::clone(hub),
        link: Arc::clone(link),
        lane: LaneId(open.lane),
        socket: stranger.socket,
        decoder,
        terms: open.terms,
        offer: offer.clone(),
        is_active: false,
        path_reason: String::new(),
        until: deadline,
        opened: None,
    };
    adopt(link, prepared, parts)
}

/// A timeout of zero would mean none.
const MINIMUM: std::time::Duration = std::time::Duration::from_millis(1);
