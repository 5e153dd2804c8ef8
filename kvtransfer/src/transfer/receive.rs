//! The receiving side of a room: what was granted, which batches have been seen, when it is complete.

use std::{ops::Range, sync::Arc};

use crate::{
    error::TransferError,
    ids::{Epoch, PeerId, Room, TransferId},
    layout::ComponentKind,
    plan::pairing::Pairing,
    time::Time,
    transfer::timers::TimerKey,
    wire::lane::{BATCHES_MAX, BatchHeader},
};

/// Where a batch that arrived goes.
#[derive(Clone, Debug)]
pub struct BatchIn {
    /// The transfer, for its gate.
    pub transfer: TransferId,
    /// Which bytes go where.
    pub pairing: Arc<Pairing>,
    /// Index of the component.
    pub component: usize,
    /// Local items; the window is `part` of them.
    pub items: Arc<[i32]>,
    /// See `items`.
    pub part: Range<usize>,
    /// Bytes of the window's stream.
    pub range: Range<u64>,
}

/// Whether a batch may be placed.
#[derive(Clone, Debug)]
pub enum Admission {
    /// Place it.
    Place(BatchIn),
    /// Throw its bytes away.
    Discard,
}

/// What a lane did with a batch it was told to place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Placement {
    /// All bytes lie in the target pages.
    Placed,
    /// The gate was closed before the end: the room is over here.
    GateClosed,
    /// The sender sealed it void: it failed the room while writing.
    Void,
    /// Memory could not be accessed.
    Failed(TransferError),
}

/// A set of batch numbers that grows with the largest seen.
#[derive(Debug, Default)]
pub(super) struct SeqSet {
    words: Vec<u64>,
    count: u32,
}

impl SeqSet {
    /// Whether `seq` is new. Numbers at or over the bound are never new.
    pub(super) fn insert(&mut self, seq: u32) -> bool {
        if seq >= BATCHES_MAX {
            return false;
        }
        let (word, bit) = ((seq / 64) as usize, 1_u64 << (seq % 64));
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        let is_new = self.words[word] & bit == 0;
        self.words[word] |= bit;
        self.count += u32::from(is_new);
        is_new
    }

    pub(super) fn count(&self) -> u32 {
        self.count
    }
}

/// Bytes of one component that the granted items hold from one sender.
#[derive(Debug)]
pub(super) struct Owed {
    pub(super) component: u8,
    pub(super) kind: ComponentKind,
    /// Whether the sender may leave it out as a whole.
    pub(super) may_skip: bool,
    pub(super) got: u64,
    pub(super) expected: u64,
}

impl Owed {
    fn is_unpaid(&self) -> bool {
        self.got != self.expected && !(self.may_skip && self.got == 0)
    }
}

/// The part of a receiving room that one sender fills.
#[derive(Debug)]
pub(super) struct ReceiveLeg {
    pub(super) peer: PeerId,
    pub(super) seen: SeqSet,
    /// What it must have sent when its last batch is in.
    pub(super) owed: Vec<Owed>,
    pub(super) done: bool,
}

/// One receiving room.
#[derive(Debug)]
pub(super) struct ReceiveRoom {
    pub(super) id: TransferId,
    pub(super) room: Room,
    pub(super) epoch: Epoch,
    pub(super) opened: Time,
    pub(super) first_byte: Option<Time>,
    pub(super) deadline: TimerKey,
    /// A sender withdrew a batch; its reason is on the way, or else this is the error.
    pub(super) doom: Option<TransferError>,
    pub(super) items: Vec<Arc<[i32]>>,
    pub(super) legs: Vec<ReceiveLeg>,
    /// Peers to be told if it fails, dummies included.
    pub(super) told: Vec<PeerId>,
    /// For a room of explicit blocks: which they are.
    pub(super) explicit: Option<Arc<Pairing>>,
    pub(super) bytes: u64,
    pub(super) batches: u64,
}

impl ReceiveRoom {
    pub(super) fn stage(&self) -> &'static str {
        if self.first_byte.is_none() {
            "waiting for the sender's first page"
        } else {
            "waiting for the sender's remaining pages"
        }
    }

    /// SGLang's poll state name.
    pub(super) fn state(&self) -> &'static str {
        if self.first_byte.is_none() {
            "waiting_for_input"
        } else {
            "transferring"
        }
    }

    pub(super) fn leg_mut(&mut self, peer: PeerId) -> Option<&mut ReceiveLeg> {
        self.legs.iter_mut().find(|leg| leg.peer == peer)
    }

    /// Checks a header against the grant and finds its places.
    ///
    /// # Errors
    /// What the peer did wrong, in words.
    pub(super) fn locate(
        &self,
        pairing: &Arc<Pairing>,
        header: &BatchHeader,
    ) -> Result<BatchIn, String> {
        let component = usize::from(header.component);
        let paired = pairing.components.get(component);
        let Some(paired) = paired else {
            return Err(format!(
                "a batch for component {component}, which does not exist"
            ));
        };
        // A grant may leave lists out; the empty batch that ends a room without bytes names component 0 all the same.
        let items = self.items.get(component).cloned();
        let items = items.unwrap_or_else(|| Arc::from([]));
        let start = header.window_start as usize;
        let end = start + header.window_len as usize;
        if end > items.len() {
            let granted = items.len();
            return Err(format!(
                "a batch for items {start}..{end} of {granted} granted"
            ));
        }
        let stream = paired.item_bytes() * u64::from(header.window_len);
        let range_end = header
            .offset
            .checked_add(header.len)
            .filter(|end| *end <= stream);
        let Some(range_end) = range_end else {
            let (offset, len) = (header.offset, header.len);
            return Err(format!(
                "a batch of {len} bytes at {offset} of a stream of {stream}"
            ));
        };
        Ok(BatchIn {
            transfer: self.id,
            pairing: Arc::clone(pairing),
            component,
            items,
            part: start..end,
            range: header.offset..range_end,
        })
    }

    /// Counts a placed batch of `peer`. Returns whether the whole room is complete.
    ///
    /// # Errors
    /// What the peer did wrong, in words.
    pub(super) fn count(&mut self, peer: PeerId, header: &BatchHeader) -> Result<bool, String> {
        let leg = self
            .leg_mut(peer)
            .ok_or("a batch from a peer that has no part in the room")?;
        if !leg.seen.insert(header.seq) {
            return Ok(false);
        }
        let mut owed = leg.owed.iter_mut();
        if let Some(owed) = owed.find(|owed| owed.component == header.component) {
            owed.got += header.len;
        }
        if header.is_last() {
            let (seen, expected) = (leg.seen.count(), header.seq + 1);
            if seen != expected {
                return Err(format!(
                    "its last batch came after {seen} of {expected} batches"
                ));
            }
            if let Some(owed) = leg.owed.iter().find(|owed| owed.is_unpaid()) {
                let (got, kind, wanted) = (owed.got, &owed.kind, owed.expected);
                return Err(format!(
                    "it sent {got} bytes of {kind}, the granted items hold {wanted}"
                ));
            }
            leg.done = true;
        }
        self.bytes += header.len;
        self.batches += 1;
        Ok(self.legs.iter().all(|leg| leg.done))
    }
}
