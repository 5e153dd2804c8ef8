//! Connections made and broken, ranks frozen, killed and started again.

use std::{sync::Arc, time::Duration};

use super::{
    network::{Conn, LaneAt, LinkSpec, Side, Stream},
    world::{Event, Notice, World},
};
use crate::{
    error::TransferError,
    ids::{LaneId, PeerId},
    layout::Layout,
    plan::pairing::{Pairing, pair},
    transfer::{LaneSetup, PeerSetup},
    wire::{control::Control, lane::PayloadMode},
};

/// Both directions between two layouts: there and back.
type Agreed = (Result<Arc<Pairing>, String>, Result<Arc<Pairing>, String>);

/// Pairs two layouts both ways, as two engines do when they meet.
///
/// # Errors
/// They fit in neither direction.
fn agree(mine: &Layout, theirs: &Layout) -> Result<Agreed, String> {
    let one_way = |from, to| {
        pair(from, to)
            .map(Arc::new)
            .map_err(|mismatch| mismatch.to_string())
    };
    match (one_way(mine, theirs), one_way(theirs, mine)) {
        (Err(why), Err(_)) => Err(why),
        agreed => Ok(agreed),
    }
}

impl World {
    /// Connects two ranks; an earlier connection of the two is dropped first. Returns the connection's number.
    ///
    /// # Errors
    /// The layouts do not fit, in a sentence.
    pub fn connect(&mut self, from: usize, to: usize, spec: &LinkSpec) -> Result<usize, String> {
        // The accepting side is the first to compare, and its sentence is the one that is told.
        let (back, there) = agree(&self.ranks[to].spec.layout, &self.ranks[from].spec.layout)?;
        let earlier = (0..self.conns.len()).filter(|conn| {
            let ranks = self.conns[*conn].sides.each_ref().map(|side| side.rank);
            ranks == [from, to] || ranks == [to, from]
        });
        for conn in earlier.collect::<Vec<_>>() {
            for side in 0..2 {
                self.link_lost(conn, side, "the peer connected again");
            }
        }
        let conn = self.conns.len();
        let sides = [from, to].map(|rank| {
            let known = &mut self.ranks[rank];
            let peer = known.new_peer();
            Side::new(rank, known.life, peer, spec)
        });
        let loses = self.dice.chance(50);
        let reads_again = self.dice.chance(50);
        self.conns.push(Conn {
            sides,
            loses,
            reads_again,
        });
        for (side, (out, back)) in [(&there, &back), (&back, &there)].into_iter().enumerate() {
            let other = self.conns[conn].sides[1 - side].rank;
            let setup = PeerSetup {
                instance: self.ranks[other].instance,
                address: format!("sim:{other}"),
                outgoing: out.clone(),
                incoming: back.clone(),
            };
            self.introduce(conn, side, setup, spec);
        }
        Ok(conn)
    }

    fn introduce(&mut self, conn: usize, side: usize, setup: PeerSetup, spec: &LinkSpec) {
        let now = self.now;
        let (index, peer) = {
            let end = &self.conns[conn].sides[side];
            (end.rank, end.peer)
        };
        let rank = &mut self.ranks[index];
        rank.peers.insert(peer, (conn, side));
        rank.node.peer_up(now, peer, setup);
        for (lane, spec) in spec.lanes.iter().enumerate() {
            rank.node
                .lane_up(peer, lane_id(lane), LaneSetup::from(spec), 0);
        }
        self.settle(index);
    }

    /// How `rank` calls the connected rank `other` now.
    pub fn peer(&self, rank: usize, other: usize) -> Option<PeerId> {
        let known = self.ranks[rank].peers.iter().find(|(_, (conn, side))| {
            let conn = &self.conns[*conn];
            conn.sides[*side].is_up && conn.sides[1 - side].rank == other
        });
        known.map(|(peer, _)| *peer)
    }

    /// The connection between two ranks that the first still believes in.
    pub fn connection(&self, rank: usize, other: usize) -> Option<usize> {
        let peer = self.peer(rank, other)?;
        self.ranks[rank].peers.get(&peer).map(|(conn, _)| *conn)
    }

    /// One lane's connection is reset: `rank` notices now, the other side a little later. A queue pair is made anew.
    pub fn reset_lane(&mut self, conn: usize, rank: usize, lane: usize) {
        let side = usize::from(self.conns[conn].sides[1].rank == rank);
        if lane < self.conns[conn].sides[side].lanes.len() && self.is_here(conn, side) {
            let at = LaneAt { conn, side, lane };
            match self.lane(at).spec.mode {
                PayloadMode::Write => self.destroy(at, "its queue pair failed"),
                _ => self.lane_lost(at, "connection reset"),
            }
        }
    }

    /// Whether a side's process is the one that made the connection, and not frozen.
    fn is_here(&self, conn: usize, side: usize) -> bool {
        let end = &self.conns[conn].sides[side];
        self.is_running(end.rank) && self.ranks[end.rank].life == end.life
    }

    /// A side learns that a lane is gone; the other side will.
    pub(super) fn lane_lost(&mut self, at: LaneAt, reason: &str) {
        let end = &mut self.conns[at.conn].sides[at.side];
        if !end.is_up || !end.lanes[at.lane].is_up {
            return;
        }
        end.lanes[at.lane].is_up = false;
        let (rank, peer) = (end.rank, end.peer);
        let delay = Duration::from_micros(self.dice.within(0, 3_000));
        self.at(self.now + delay, Event::LaneLost(at.other()));
        self.ranks[rank]
            .node
            .lane_down(peer, lane_id(at.lane), reason);
        self.settle(rank);
    }

    /// A side drops a connection; the other side notices a little later.
    pub(super) fn break_link(&mut self, conn: usize, side: usize, reason: &str) {
        let delay = Duration::from_micros(self.dice.within(0, 3_000));
        let gone = Event::LinkLost {
            conn,
            side: 1 - side,
            reason: "it closed its control stream".to_owned(),
        };
        self.at(self.now + delay, gone);
        self.link_lost(conn, side, reason);
    }

    /// The application of `rank` drops a connection.
    pub fn disconnect(&mut self, conn: usize, rank: usize) {
        let side = usize::from(self.conns[conn].sides[1].rank == rank);
        if self.is_here(conn, side) {
            self.break_link(conn, side, "dropped by the application");
        }
    }

    pub(super) fn link_lost(&mut self, conn: usize, side: usize, reason: &str) {
        let now = self.now;
        let is_this_life = {
            let end = &self.conns[conn].sides[side];
            let rank = &self.ranks[end.rank];
            rank.is_alive && rank.life == end.life
        };
        let end = &mut self.conns[conn].sides[side];
        if !end.is_up {
            return;
        }
        end.is_up = false;
        end.lanes.iter_mut().for_each(|lane| lane.is_up = false);
        let (rank, peer) = (end.rank, end.peer);
        if is_this_life {
            self.ranks[rank].peers.remove(&peer);
            self.ranks[rank].node.peer_down(now, peer, reason);
            self.settle(rank);
            for lane in 0..self.conns[conn].sides[side].lanes.len() {
                self.destroy_later(LaneAt { conn, side, lane }, reason.to_owned());
            }
            let other = self.conns[conn].sides[1 - side].rank;
            self.notify(Notice::PeerLost { rank, other });
        }
    }

    /// Stops a rank for a while, as SIGSTOP does: its memory stays readable, its sockets fill up.
    pub fn freeze(&mut self, rank: usize, time: Duration) {
        if self.is_running(rank) {
            self.ranks[rank].is_frozen = true;
            let life = self.ranks[rank].life;
            self.at(self.now + time, Event::Thaw { rank, life });
        }
    }

    /// Ends a rank's process. Its peers notice within `delay_max`.
    pub fn kill(&mut self, rank: usize, delay_max: Duration) {
        if !self.ranks[rank].is_alive {
            return;
        }
        self.ranks[rank].is_alive = false;
        let life = self.ranks[rank].life;
        for conn in 0..self.conns.len() {
            for side in 0..2 {
                let end = &mut self.conns[conn].sides[side];
                if (end.rank, end.life) != (rank, life) {
                    continue;
                }
                end.lanes
                    .iter_mut()
                    .for_each(|lane| lane.qp.is_alive = false);
                if !end.is_up {
                    continue;
                }
                end.is_up = false;
                end.lanes.iter_mut().for_each(|lane| lane.is_up = false);
                let most = u64::try_from(delay_max.as_nanos()).unwrap_or(u64::MAX);
                let delay = Duration::from_nanos(self.dice.within(0, most));
                let gone = Event::LinkLost {
                    conn,
                    side: 1 - side,
                    reason: "it closed its control stream".to_owned(),
                };
                self.at(self.now + delay, gone);
            }
        }
    }

    /// Starts a rank's process again, without connections.
    pub fn restart(&mut self, rank: usize) {
        self.kill(rank, Duration::from_millis(1));
        self.ranks[rank].restart(rank);
    }

    /// Encodes a message and sends it in pieces.
    pub(super) fn say(&mut self, conn: usize, side: usize, message: &Control) {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let most = self.conns[conn].sides[side].control_out.net.piece_bytes;
            let most = rest.len().min(most) as u64;
            let len = usize::try_from(self.dice.within(1, most)).unwrap_or(1);
            let (piece, left) = rest.split_at(len);
            let out = &mut self.conns[conn].sides[side].control_out;
            let when = out.send(self.now, len, &mut self.dice);
            self.at(
                when,
                Event::Arrive {
                    conn,
                    side: 1 - side,
                    stream: Stream::Control,
                    bytes: piece.to_vec(),
                },
            );
            rest = left;
        }
    }

    /// Bytes arrive on a control stream.
    pub(super) fn control_arrive(&mut self, conn: usize, side: usize, bytes: &[u8]) {
        let (other_up, loses) = (
            self.conns[conn].sides[1 - side].is_up,
            self.conns[conn].loses,
        );
        self.conns[conn].sides[1 - side].control_out.in_flight -= bytes.len();
        if !self.conns[conn].sides[side].is_up || (!other_up && loses) {
            return;
        }
        self.conns[conn].sides[side].control_in.push(bytes);
        loop {
            let end = &mut self.conns[conn].sides[side];
            let (rank, peer) = (end.rank, end.peer);
            match end.control_in.next() {
                Ok(Some(message)) => {
                    let now = self.now;
                    self.ranks[rank].node.on_control(now, peer, message);
                    self.settle(rank);
                }
                Ok(None) => return,
                Err(error) => return self.protocol(rank, error.to_string()),
            }
        }
    }

    /// Ends every transfer and connection of a rank in good order.
    pub fn shut_down(&mut self, rank: usize, transfers: &[super::Handle]) {
        for handle in transfers.iter().filter(|handle| handle.rank == rank) {
            self.end(*handle, TransferError::Shutdown);
        }
        for conn in 0..self.conns.len() {
            for side in 0..2 {
                if self.conns[conn].sides[side].rank == rank && self.is_here(conn, side) {
                    self.break_link(conn, side, "the engine shut down");
                }
            }
        }
    }
}

pub(super) fn lane_id(lane: usize) -> LaneId {
    LaneId(u8::try_from(lane).expect("invariant: at most 16 lanes"))
}
