//! A queue pair: what it holds, how its send queue counts, and what a test asked to go wrong on it.
#![forbid(unsafe_code)]

use std::collections::VecDeque;

use super::{
    behaviour::SendQueueRule,
    counters::QueueCounters,
    memory::{Payload, Segment},
};

/// Blocks that one work request may take at most on eRDMA.
const BLOCKS_PER_REQUEST_MAX: u32 = 4;
/// Bytes of a block.
const BLOCK_BYTES: u32 = 32;
/// Bytes of eRDMA's descriptor of a WRITE (or READ) before its list or inline data.
const WRITE_HEADER_BYTES: u32 = 32;
/// The same for a SEND.
const SEND_HEADER_BYTES: u32 = 16;
/// Bytes of one scatter/gather entry in a descriptor.
const SEGMENT_BYTES: u32 = 16;

/// What a work request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Write {
        addr: u64,
        key: u32,
        imm: Option<u32>,
    },
    Send {
        imm: Option<u32>,
    },
    Read {
        addr: u64,
        key: u32,
    },
}

/// A posted send work request.
#[derive(Clone, Debug)]
pub(super) struct SendRequest {
    pub(super) wr_id: u64,
    pub(super) operation: Operation,
    pub(super) payload: Payload,
    pub(super) signalled: bool,
    pub(super) solicited: bool,
    /// Place in the order of everything posted on the fabric.
    pub(super) order: u64,
    /// Place in its send queue.
    pub(super) index: u64,
}

/// A posted receive.
#[derive(Clone, Debug)]
pub(super) struct RecvRequest {
    pub(super) wr_id: u64,
    pub(super) list: Vec<Segment>,
}

/// What the hardware makes of a queue pair, whatever the user thinks its state is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hardware {
    Idle,
    /// Receives (RTR).
    Receives,
    /// Sends and receives.
    Ready,
    Dead,
}

/// A queue pair elsewhere: a device's index and a number there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueuePairId {
    /// Index of the device on its fabric.
    pub device: usize,
    /// Queue pair number.
    pub number: u32,
}

/// Makes another message of one that was posted; `None` leaves it as it is.
pub type Forgery = fn(&[u8]) -> Option<Vec<u8>>;

/// What a test asked to go wrong on one queue pair.
#[derive(Clone, Debug, Default)]
pub(super) struct Injected {
    /// Posting fails with this errno once this many more work requests have been accepted.
    pub(super) post_failure: Option<(u32, i32)>,
    /// After this many more executed work requests the next one ends with this status; true: its bytes land anyway.
    pub(super) failure: Option<(u32, u32, bool)>,
    /// After this many more completions, one is dropped.
    pub(super) dropped_completion: Option<u32>,
    /// What its SENDs carry instead of what was posted.
    pub(super) forgery: Option<Forgery>,
}

/// Send queue space, in the device's own unit.
#[derive(Debug)]
pub(super) struct SendQueue {
    rule: SendQueueRule,
    depth: u32,
    used: u32,
    /// Units of each work request whose space has not come back, oldest first.
    held: VecDeque<(u64, u32)>,
    next_index: u64,
}

/// What became of a request for send queue space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Space {
    Taken { index: u64, overran: bool },
    Full,
}

impl SendQueue {
    pub(super) fn new(rule: SendQueueRule, max_send_wr: u32) -> Self {
        let depth = match rule {
            SendQueueRule::Blocks => blocks_for(max_send_wr),
            SendQueueRule::Requests | SendQueueRule::Lenient => max_send_wr,
        };
        Self {
            rule,
            depth,
            used: 0,
            held: VecDeque::with_capacity(usize::try_from(max_send_wr.min(1 << 14)).unwrap_or(0)),
            next_index: 0,
        }
    }

    /// Work requests whose space has not come back.
    pub(super) fn outstanding(&self) -> usize {
        self.held.len()
    }

    /// Takes space for one work request. Only [`SendQueueRule::Blocks`] can overrun: it tests before it knows the size.
    pub(super) fn take(&mut self, blocks: u32) -> Space {
        if self.used >= self.depth {
            return Space::Full;
        }
        let units = match self.rule {
            SendQueueRule::Blocks => blocks,
            SendQueueRule::Requests | SendQueueRule::Lenient => 1,
        };
        let index = self.next_index;
        self.next_index += 1;
        self.used += units;
        self.held.push_back((index, units));
        Space::Taken {
            index,
            overran: self.used > self.depth,
        }
    }

    /// A work request was executed.
    pub(super) fn executed(&mut self, index: u64) {
        if self.rule == SendQueueRule::Lenient {
            self.give_back(index);
        }
    }

    /// A completion of this work request was polled: its space and that of all before it comes back.
    pub(super) fn polled(&mut self, index: u64) {
        self.give_back(index);
    }

    fn give_back(&mut self, index: u64) {
        while let Some(&(oldest, units)) = self.held.front() {
            if oldest > index {
                break;
            }
            self.held.pop_front();
            self.used -= units;
        }
    }
}

/// Blocks of an eRDMA send queue that was asked to hold this many work requests.
fn blocks_for(max_send_wr: u32) -> u32 {
    max_send_wr
        .saturating_mul(BLOCKS_PER_REQUEST_MAX)
        .checked_next_power_of_two()
        .unwrap_or(u32::MAX)
}

/// Blocks that a work request takes: its header, then 16 bytes a segment or its inline bytes, in blocks of 32.
pub(super) fn blocks_of(is_send: bool, segments: u32, inline_bytes: Option<u32>) -> u32 {
    let header = if is_send {
        SEND_HEADER_BYTES
    } else {
        WRITE_HEADER_BYTES
    };
    let body = inline_bytes.unwrap_or(segments * SEGMENT_BYTES);
    (header + body).div_ceil(BLOCK_BYTES)
}

/// What `create_qp` was asked for, after it was accepted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub(super) send_depth: u32,
    pub(super) recv_depth: u32,
    pub(super) send_sge: u32,
    pub(super) recv_sge: u32,
    pub(super) inline: u32,
}

/// One queue pair of a device.
#[derive(Debug)]
pub(super) struct QueuePair {
    /// Never re-used, unlike the number.
    pub(super) serial: u64,
    pub(super) pd: u32,
    pub(super) send_cq: u32,
    pub(super) recv_cq: u32,
    pub(super) signals_all: bool,
    pub(super) sizes: Sizes,
    /// The state as the specification names it.
    pub(super) state: u32,
    pub(super) hardware: Hardware,
    /// Address of the C structure.
    pub(super) handle: usize,
    pub(super) remote: Option<QueuePairId>,
    /// The serial of the queue pair that answered first: a successor with the same number is another connection.
    pub(super) pinned: Option<u64>,
    /// The `rdma_cm` identifier that connected it.
    pub(super) cm: Option<u64>,
    pub(super) rnr_forever: bool,
    pub(super) send: SendQueue,
    /// The send queue as a careful user counts it: in work requests, freed by polled completions.
    pub(super) ledger: SendQueue,
    pub(super) waiting: VecDeque<SendRequest>,
    pub(super) received: VecDeque<RecvRequest>,
    /// The step at which the oldest waiting request first got no answer.
    pub(super) stalled_at: Option<u64>,
    pub(super) unacked_events: u32,
    pub(super) injected: Injected,
    pub(super) counters: QueueCounters,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_of_work_requests_are_erdmas() {
        assert_eq!(blocks_of(true, 0, Some(16)), 1, "the notice fits one block");
        assert_eq!(blocks_of(false, 1, None), 2);
        assert_eq!(blocks_of(false, 6, None), 4);
        assert_eq!(blocks_of(false, 0, Some(96)), 4);
        assert_eq!(blocks_of(true, 6, None), 4);
    }

    #[test]
    fn a_queue_of_blocks_overruns_when_only_full_is_tested() {
        let mut queue = SendQueue::new(SendQueueRule::Blocks, 4);
        assert_eq!(queue.depth, 16);
        let mut overran = false;
        for _ in 0..5 {
            if let Space::Taken { overran: now, .. } = queue.take(3) {
                overran |= now;
            }
        }
        assert!(!overran, "15 of 16 blocks");
        assert!(matches!(queue.take(3), Space::Taken { overran: true, .. }));
        assert_eq!(queue.take(1), Space::Full);
    }

    proptest! {
        #[test]
        fn nobody_who_counts_work_requests_ever_overruns(
            depth in 1u32..64,
            sizes in prop::collection::vec(1u32..=BLOCKS_PER_REQUEST_MAX, 1..500),
        ) {
            let mut queue = SendQueue::new(SendQueueRule::Blocks, depth);
            let mut mine = VecDeque::new();
            for (round, blocks) in sizes.into_iter().enumerate() {
                if mine.len() >= usize::try_from(depth).expect("small") {
                    let upto = mine.drain(..=round % mine.len()).next_back().expect("not empty");
                    queue.polled(upto);
                }
                let Space::Taken { index, overran } = queue.take(blocks) else {
                    panic!("full below max_send_wr");
                };
                prop_assert!(!overran);
                mine.push_back(index);
                prop_assert_eq!(queue.outstanding(), mine.len());
            }
        }
    }
}
