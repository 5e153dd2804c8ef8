//! Incoming connections: who are you, and what do you want? A short-lived thread each, bounded in number and time.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, atomic::Ordering},
};

use super::{
    control::{Adopted, Strangers},
    greeting::{LaneStart, LocalPath, Talk, agree, check_token, face, introduce, start_lane},
    hub::Hub,
    link::Link,
    queue_pairs,
};
use crate::{
    clock,
    config::RdmaUse,
    ids::{InstanceId, LaneId, PeerId},
    wire::{
        control::{Control, ControlDecoder},
        hello::Hello,
    },
};

/// A connection that has not said who it is.
pub(super) struct Stranger {
    pub(super) socket: OwnedFd,
    pub(super) address: String,
    /// Came over the same-host socket.
    pub(super) is_local: bool,
}

/// Greets a stranger in a thread of its own.
pub(super) fn greet(hub: &Arc<Hub>, strangers: &Arc<Strangers>, stranger: Stranger) {
    let Some(ticket) = strangers.admit(&stranger.socket) else {
        return;
    };
    let (hub, strangers) = (Arc::clone(hub), Arc::clone(strangers));
    let spawned = std::thread::Builder::new()
        .name("kvt-greet".into())
        .stack_size(512 << 10)
        .spawn(move || {
            let address = stranger.address.clone();
            if let Err(error) = converse(&hub, stranger) {
                hub.malformed.fetch_add(1, Ordering::Relaxed);
                tracing::info!(address, %error, "a connection was turned away");
            }
            strangers.done(ticket);
        });
    if let Err(error) = spawned {
        tracing::warn!(%error, "no thread to greet a connection with");
        // The ticket was moved into the closure and dropped with it: the stranger's slot is reclaimed as the oldest.
    }
}

fn converse(hub: &Arc<Hub>, stranger: Stranger) -> io::Result<()> {
    // `Talk` works with timeouts, in blocking mode.
    rustix::io::ioctl_fionbio(&stranger.socket, false)?;
    let socket = stranger.socket.try_clone()?;
    let mut talk = Talk::new(&socket, hub.config.handshake_timeout);
    match talk.hear()? {
        Control::Hello(hello) if !stranger.is_local => welcome(hub, stranger, talk, *hello),
        Control::LaneOpen {
            instance,
            link,
            lane,
            token,
            can_pull,
        } => {
            let opened = check_token(hub, &token).and_then(|()| find(hub, instance, link, lane));
            let opened = opened.and_then(|link| may_be_stream(hub, link, lane, stranger.is_local));
            match opened {
                Ok(link) => lane_ready(hub, stranger, talk, &link, LaneId(lane), can_pull),
                Err(reason) => reject(&mut talk, reason),
            }
        }
        Control::QpOpen(open) if !stranger.is_local => {
            let found = check_token(hub, &open.token)
                .and_then(|()| find(hub, open.instance, open.link, open.lane));
            match found {
                Ok(link) => {
                    let (socket, timeout) =
                        (stranger.socket.try_clone()?, hub.config.handshake_timeout);
                    let accepted = queue_pairs::accept(hub, &link, stranger, talk, &open);
                    accepted.or_else(|reason| reject(&mut Talk::new(&socket, timeout), reason))
                }
                Err(reason) => reject(&mut talk, reason),
            }
        }
        Control::Look(token) if !stranger.is_local => match check_token(hub, &token) {
            Ok(()) => talk.say(&Control::Seen(Box::new(face(hub))), None),
            Err(reason) => reject(&mut talk, reason),
        },
        other => reject(
            &mut talk,
            format!("a connection cannot start with {other:?}"),
        ),
    }
}

fn reject(talk: &mut Talk<'_>, reason: String) -> io::Result<()> {
    talk.say(
        &Control::Reject {
            reason: reason.clone(),
        },
        None,
    )?;
    Err(io::Error::other(reason))
}

fn welcome(hub: &Arc<Hub>, stranger: Stranger, mut talk: Talk<'_>, hello: Hello) -> io::Result<()> {
    let started = clock::now();
    let (lanes, number) = (hello.lanes, hello.link);
    // An engine that comes again takes its own place.
    let is_known = !hub.links_of(hello.instance).is_empty();
    let room_for = is_known || hub.link_count() < hub.config.peers_max;
    let agreed = agree(hub, hello, stranger.address.clone()).and_then(|agreement| {
        if !room_for {
            let limit = hub.config.peers_max;
            return Err(format!(
                "already {limit} peers (peers_max at the accepting side)"
            ));
        }
        check_generation(hub, agreement.instance, agreement.generation).map(|()| agreement)
    });
    let agreement = match agreed {
        Ok(agreement) => agreement,
        Err(reason) => return reject(&mut talk, reason),
    };
    // The same engine again: its earlier connection is dead or about to be, and its rooms with it.
    for old in hub.links_of(agreement.instance) {
        hub.drop_peer(old.peer, "the peer connected again");
    }
    let peer = hub.new_peer_id();
    let writer = stranger.socket.try_clone()?;
    rustix::io::ioctl_fionbio(&stranger.socket, true)?;
    let link = Arc::new(Link::new(
        peer,
        agreement,
        writer,
        clock::now().since(started),
        None,
    ));
    // Queued before anybody else can queue: the first message on the stream.
    let _ = link.queue(&Control::Welcome(Box::new(introduce(hub, number, lanes))));
    hub.add_link(&link);
    let (decoder, _) = talk.finish();
    let handed = link
        .flush()
        .and_then(|()| adopt(hub, stranger.socket, decoder, peer));
    if let Err(error) = &handed {
        // Nobody would ever read its control stream, so nobody would notice that it is gone.
        hub.drop_peer(peer, &error.to_string());
    }
    handed
}

/// A delayed hello of an earlier life at the same identity is not welcome.
fn check_generation(hub: &Hub, instance: InstanceId, generation: u64) -> Result<(), String> {
    let known = hub.links_of(instance);
    match known.iter().map(|link| link.agreement.generation).max() {
        Some(newest) if newest > generation => Err(format!(
            "generation {generation} is older than {newest}, which is connected"
        )),
        _ => Ok(()),
    }
}

fn find(hub: &Hub, instance: InstanceId, link: u64, lane: u8) -> Result<Arc<Link>, String> {
    let link = hub
        .find_link(instance, link)
        .ok_or("a data connection without a control stream")?;
    if link.lanes.has(LaneId(lane)) {
        return Err(format!("data connection {lane} is open already"));
    }
    Ok(link)
}

/// Whether a lane may be a stream: within the number agreed, and not where RDMA is required.
fn may_be_stream(
    hub: &Hub,
    link: Arc<Link>,
    lane: u8,
    is_local: bool,
) -> Result<Arc<Link>, String> {
    let agreed = link.agreement.lanes;
    if lane >= agreed {
        return Err(format!("data connection {lane} of {agreed} agreed"));
    }
    if hub.config.rdma.usage == RdmaUse::Required && !is_local {
        return Err("this engine moves data by RDMA only".into());
    }
    Ok(link)
}

fn lane_ready(
    hub: &Arc<Hub>,
    stranger: Stranger,
    mut talk: Talk<'_>,
    link: &Link,
    lane: LaneId,
    peer_can_pull: bool,
) -> io::Result<()> {
    let local = if stranger.is_local {
        Some(LocalPath::probe(hub, stranger.socket.as_fd(), link)?)
    } else {
        None
    };
    let can_pull = local.as_ref().is_some_and(|local| local.can_pull);
    let ring = local.as_ref().and_then(|local| local.ring_out.memfd_fd());
    talk.say(&Control::LaneReady { can_pull }, ring.map(AsFd::as_fd))?;
    let (decoder, ring_in) = talk.finish();
    let reason = if stranger.is_local {
        ""
    } else {
        "the peer chose tcp"
    };
    let start = LaneStart {
        socket: stranger.socket,
        lane,
        rest: decoder.into_rest(),
        local,
        peer_can_pull,
        ring_in,
        reason: reason.to_owned(),
    };
    start_lane(hub, link, start)
}

/// Gives a control stream to the control thread.
pub(super) fn adopt(
    hub: &Hub,
    socket: OwnedFd,
    mut decoder: ControlDecoder,
    peer: PeerId,
) -> io::Result<()> {
    rustix::io::ioctl_fionbio(&socket, true)?;
    decoder.trust();
    hub.adopt(Adopted {
        socket,
        decoder,
        peer,
    })
}
