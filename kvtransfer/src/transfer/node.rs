//! The node itself: its tables and what the application asks of it. What peers ask is in `inputs`.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use super::{
    ReceiveRequest, SendRequest, Summary,
    ebb::Ebbs,
    peer::{Peer, Sends},
    picture::EndedRoom,
    receive::{Owed, ReceiveLeg, ReceiveRoom, SeqSet},
    send::{Orphan, SendRoom, check_slots},
    timers::{Due, Timers},
};
use crate::{
    error::{SubmitError, TransferError},
    ids::{CountedMap, Epoch, InstanceId, LaneId, PeerId, TransferId},
    layout::IndexRule,
    plan::pairing::Pairing,
    time::Time,
    wire::control::{Control, GRANT_ITEMS_MAX, Grant},
};

/// Bounds and periods of a [`Node`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct NodeConfig {
    /// Most windows (4096 items each) queued to one peer. Default 4096: 16 Mi pages, about 800 KiB of queue.
    pub queue_windows_max: usize,
    /// Most payload bytes queued to one peer. Default 256 GiB: a node's worth of KV.
    pub queue_bytes_max: u64,
    /// Most live transfers, both roles together. Default 65 536.
    pub transfers_max: usize,
    /// Most rooms remembered for a sender that is not open (grants, cancellations). Default 16 384.
    pub orphans_max: usize,
    /// How long they are remembered; then a grant is answered with "no sender". Default 30 s.
    pub orphan_ttl: Duration,
    /// How often a peer is pinged. Default 1 s.
    pub heartbeat: Duration,
    /// A peer that has been silent for so long is dropped. Default 10 s. Transfers have their own, shorter deadlines.
    pub peer_silence_max: Duration,
    /// How long a network card may go on with the pages of a room that has failed, before the queue pairs to that peer are
    /// destroyed and made anew. Default 10 ms: some hundred round trips, and little against the 50 ms within which a frozen
    /// peer is reported. Paths without RDMA never wait.
    pub ebb_max: Duration,
    /// First epoch handed out; tests start it near the wrap.
    pub first_epoch: u32,
}

impl Default for NodeConfig {
    fn default() -> Self {
        Self {
            queue_windows_max: 4096,
            queue_bytes_max: 256 << 30,
            transfers_max: 65_536,
            orphans_max: 16_384,
            orphan_ttl: Duration::from_secs(30),
            heartbeat: Duration::from_secs(1),
            peer_silence_max: Duration::from_secs(10),
            ebb_max: Duration::from_millis(10),
            first_epoch: 1,
        }
    }
}

/// What the node must know of a connected peer.
#[derive(Clone, Debug)]
pub struct PeerSetup {
    /// Its identity.
    pub instance: InstanceId,
    /// Its address, for telemetry.
    pub address: String,
    /// Us → them, or the sentence that says why nothing can be sent to them.
    pub outgoing: Result<Arc<Pairing>, String>,
    /// Them → us, or the sentence that says why nothing can be received from them.
    pub incoming: Result<Arc<Pairing>, String>,
}

/// What the node wants done.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// Send a message on the peer's control stream, in this order.
    Control(PeerId, Control),
    /// The peer's lanes have work.
    Work(PeerId),
    /// Every receiver of a sending transfer has granted its pages.
    Ready {
        /// Which.
        transfer: TransferId,
        /// Tokens that the receivers already hold.
        prefix_tokens: u32,
    },
    /// A transfer has failed but a network card may still touch its pages: its gate must be closed now, `Ended` follows.
    Stopping {
        /// Which.
        transfer: TransferId,
    },
    /// Destroy this end of a lane's queue pair, then report [`Node::lane_fenced`].
    Fence {
        /// Which peer.
        peer: PeerId,
        /// Which of its lanes.
        lane: LaneId,
        /// Why, for the log and the peer.
        reason: String,
    },
    /// A transfer ended. Its gate must be closed before anybody is told.
    Ended {
        /// Which.
        transfer: TransferId,
        /// How.
        result: Result<Summary, TransferError>,
    },
    /// Close the connections of a peer, then report it down.
    Disconnect {
        /// Which.
        peer: PeerId,
        /// Why, for the log.
        reason: String,
    },
}

/// The state machine of one engine.
pub struct Node {
    pub(super) config: NodeConfig,
    pub(super) peers: CountedMap<PeerId, Peer>,
    pub(super) sends: Sends,
    pub(super) send_rooms: HashMap<u64, TransferId>,
    pub(super) receives: CountedMap<TransferId, ReceiveRoom>,
    pub(super) receive_rooms: HashMap<u64, TransferId>,
    /// Rooms of explicit blocks: each peer draws its own numbers.
    pub(super) written: HashMap<(PeerId, u64), TransferId>,
    pub(super) orphans: HashMap<u64, Orphan>,
    /// Failed rooms whose pages may still be in use.
    pub(super) ebbs: Ebbs,
    /// Rooms received to the end, oldest first: a batch repeated after a lost lane is acknowledged again.
    pub(super) received: VecDeque<(u64, Epoch)>,
    /// The last rooms that ended, oldest first, for telemetry.
    pub(super) ended: VecDeque<EndedRoom>,
    pub(super) timers: Timers,
    /// Room for the counts of [`Node::push`].
    pub(super) spare_counts: (Vec<usize>, Vec<usize>),
    pub(super) outputs: VecDeque<Output>,
    pub(super) next_transfer: u64,
    pub(super) next_epoch: u32,
    pub(super) failures: std::collections::BTreeMap<&'static str, u64>,
    /// Messages about rooms that are over or were never opened: ignored, counted.
    pub(super) late_messages: u64,
}

/// Rooms remembered after they ended, for repeated batches and for telemetry.
pub(super) const ENDED_MAX: usize = 1024;

impl Node {
    /// A node without peers.
    pub fn new(config: NodeConfig) -> Self {
        let next_epoch = config.first_epoch;
        Self {
            config,
            peers: CountedMap::default(),
            sends: Sends::default(),
            send_rooms: HashMap::new(),
            receives: CountedMap::default(),
            receive_rooms: HashMap::new(),
            written: HashMap::new(),
            orphans: HashMap::new(),
            ebbs: Ebbs::new(),
            received: VecDeque::new(),
            ended: VecDeque::new(),
            timers: Timers::default(),
            spare_counts: (Vec::new(), Vec::new()),
            outputs: VecDeque::new(),
            next_transfer: 1,
            next_epoch,
            failures: std::collections::BTreeMap::new(),
            late_messages: 0,
        }
    }

    /// The next thing to do, oldest first. Call until `None` after every input.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When [`Node::on_timeout`] wants to be called.
    pub fn next_timeout(&self) -> Time {
        self.timers.next()
    }

    /// Live transfers of both roles.
    pub fn live_transfers(&self) -> usize {
        self.sends.len() + self.receives.len() + self.ebbs.len()
    }

    /// Whether failed rooms wait for a network card.
    pub fn is_ebbing(&self) -> bool {
        !self.ebbs.is_empty()
    }

    /// Messages and batches about rooms that are over, since the start.
    pub fn late_messages(&self) -> u64 {
        self.late_messages
    }

    /// Opens the sending side of a room.
    ///
    /// # Errors
    /// The room is live for sending, or the table of transfers is full.
    pub fn open_send(
        &mut self,
        now: Time,
        request: &SendRequest,
    ) -> Result<TransferId, SubmitError> {
        let number = request.room.number();
        if self.send_rooms.contains_key(&number) {
            return Err(SubmitError::DuplicateRoom(request.room));
        }
        let id = self.new_transfer()?;
        let deadline = self.timers.set(now, request.timeout, Due::Transfer(id));
        self.send_rooms.insert(number, id);
        self.sends.insert(
            id,
            SendRoom {
                id,
                room: request.room,
                opened: now,
                first_byte: None,
                deadline,
                doom: None,
                expected: None,
                legs: Vec::new(),
                pushed: Vec::new(),
                closed: false,
                closed_at: None,
                bytes: 0,
                explicit: None,
            },
        );
        if let Some(orphan) = self.orphans.remove(&number) {
            self.timers.clear(orphan.timer());
            match orphan {
                Orphan::Granted { legs, .. } => {
                    for (leg, expected, prefix) in legs {
                        self.add_leg(now, id, leg, expected, prefix);
                    }
                }
                Orphan::Cancelled { error, .. } => self.end_send(now, id, Err(error)),
                Orphan::SenderEnded { .. } => {}
            }
        }
        Ok(id)
    }

    /// Opens the receiving side of a room and sends its grants.
    ///
    /// The caller has checked every item against the local layout.
    ///
    /// # Errors
    /// The room is live for receiving, a source is not connected or does not fit, or a table is full.
    pub fn open_receive(
        &mut self,
        now: Time,
        request: &ReceiveRequest,
    ) -> Result<TransferId, SubmitError> {
        let number = request.room.number();
        if self.receive_rooms.contains_key(&number) {
            return Err(SubmitError::DuplicateRoom(request.room));
        }
        let total: usize = request.items.iter().map(|items| items.len()).sum();
        if total > GRANT_ITEMS_MAX {
            return Err(SubmitError::Items(format!(
                "{total} items in one grant, at most {GRANT_ITEMS_MAX} fit; split the request"
            )));
        }
        let legs = self.receive_legs(request)?;
        let id = self.new_transfer()?;
        let epoch = Epoch(self.next_epoch);
        self.next_epoch = self.next_epoch.wrapping_add(1);
        let lists: Vec<Vec<i32>> = request.items.iter().map(|items| items.to_vec()).collect();
        for source in &request.sources {
            let grant = Grant {
                room: number,
                epoch,
                receivers_expected: request.receivers_expected,
                dummy: source.dummy,
                prefix_tokens: request.prefix_tokens,
                items: if source.dummy {
                    Vec::new()
                } else {
                    lists.clone()
                },
            };
            self.outputs
                .push_back(Output::Control(source.peer, Control::Grant(grant)));
        }
        let deadline = self.timers.set(now, request.timeout, Due::Transfer(id));
        self.receive_rooms.insert(number, id);
        self.receives.insert(
            id,
            ReceiveRoom {
                id,
                room: request.room,
                epoch,
                opened: now,
                first_byte: None,
                deadline,
                doom: None,
                items: request.items.clone(),
                legs,
                told: request.sources.iter().map(|source| source.peer).collect(),
                explicit: None,
                bytes: 0,
                batches: 0,
            },
        );
        Ok(id)
    }

    /// What each real source of a request must fill.
    fn receive_legs(&self, request: &ReceiveRequest) -> Result<Vec<ReceiveLeg>, SubmitError> {
        let mut legs = Vec::new();
        for (index, source) in request.sources.iter().enumerate() {
            if request.sources[..index]
                .iter()
                .any(|s| s.peer == source.peer)
            {
                let twice = format!("{} is named twice as a source", source.peer);
                return Err(SubmitError::Items(twice));
            }
            let peer = self
                .peers
                .get(&source.peer)
                .ok_or(SubmitError::UnknownPeer)?;
            let pairing = peer
                .incoming
                .as_ref()
                .map_err(|why| SubmitError::Items(why.clone()))?;
            let owed = pairing.components.iter().enumerate().zip(&request.items);
            for ((_, paired), items) in owed.clone() {
                check_slots(paired, items.len()).map_err(SubmitError::Items)?;
            }
            // Of some states a sender may have fewer than were granted (SGLang cuts them to the shorter list); of pages
            // and aux rows it may not: what is missing would be taken for the request's.
            let owed = owed.filter(|((_, paired), _)| paired.index_rule() != IndexRule::Shorter);
            let owed = owed.map(|((component, paired), items)| Owed {
                component: u8::try_from(component).unwrap_or(u8::MAX),
                kind: paired.kind().clone(),
                may_skip: paired.index_rule() != IndexRule::Whole,
                got: 0,
                expected: paired.item_bytes() * items.len() as u64,
            });
            if !source.dummy {
                legs.push(ReceiveLeg {
                    peer: source.peer,
                    seen: SeqSet::default(),
                    owed: owed.collect(),
                    done: false,
                });
            }
        }
        if legs.is_empty() {
            return Err(SubmitError::Items(
                "a receiving room needs at least one real source".into(),
            ));
        }
        Ok(legs)
    }

    /// Ends a transfer because the application wants so. Does nothing if it is over.
    pub fn cancel(&mut self, now: Time, transfer: TransferId, error: TransferError) {
        if self.sends.contains_key(&transfer) {
            self.end_send(now, transfer, Err(error));
        } else {
            self.end_receive(now, transfer, Err(error));
        }
    }

    pub(super) fn new_transfer(&mut self) -> Result<TransferId, SubmitError> {
        let (used, limit) = (self.live_transfers(), self.config.transfers_max);
        if used >= limit {
            return Err(SubmitError::Full {
                what: "the table of transfers",
                used: used as u64,
                asked: 1,
                limit: limit as u64,
                setting: "transfers_max",
            });
        }
        let id = TransferId(self.next_transfer);
        self.next_transfer += 1;
        Ok(id)
    }
}
