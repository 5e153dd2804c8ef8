//! What a lane's receiving half waits for, for the thread that does the waiting.
#![forbid(unsafe_code)]

use super::{Expect, Inbound};

impl Inbound {
    /// Whether the next bytes are a frame's first.
    pub(in crate::transport) fn is_between_frames(&self) -> bool {
        matches!(self.expect, Expect::Frame) && self.start == self.end
    }

    /// Bytes that are sure to come before anybody waits for an answer of ours: the rest of a payload.
    pub(in crate::transport) fn payload_left(&self) -> u64 {
        match &self.expect {
            Expect::Payload(filling) => filling.left,
            Expect::Staged(staged) => staged.left(),
            Expect::Skip(_, left) => *left,
            _ => 0,
        }
    }
}
