//! Control messages out of a byte stream.
#![forbid(unsafe_code)]

use super::{
    BODY_BYTES_MAX, CONTROL_MAGIC, Control, HEAD_LEN, STRANGER_BODY_BYTES_MAX, VERSION, WireError,
};

/// Cuts a byte stream into messages. Holds at most one incomplete message.
#[derive(Debug)]
pub struct ControlDecoder {
    buffer: Vec<u8>,
    /// Bytes of `buffer` that were taken. They go when more come, not one message at a time: a peer may send thousands
    /// of small messages in one read.
    taken: usize,
    body_max: usize,
}

impl ControlDecoder {
    /// For a peer that has not introduced itself: small bodies only.
    pub fn for_stranger() -> Self {
        Self {
            buffer: Vec::new(),
            taken: 0,
            body_max: STRANGER_BODY_BYTES_MAX,
        }
    }

    /// The peer has introduced itself: grants may come.
    pub fn trust(&mut self) {
        self.body_max = BODY_BYTES_MAX;
    }

    /// Takes bytes off the stream. Call [`ControlDecoder::next`] until it returns `None` before pushing more.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.taken);
        self.taken = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole message, if there is one.
    ///
    /// # Errors
    /// Anything that is not this protocol; the stream cannot be used any further.
    #[expect(
        clippy::should_implement_trait,
        reason = "fallible and re-armed by push: not an iterator"
    )]
    pub fn next(&mut self) -> Result<Option<Control>, WireError> {
        let left = &self.buffer[self.taken..];
        // The first word tells: who speaks another protocol may never send a whole head.
        let magic = left.first_chunk().map(|word| u32::from_le_bytes(*word));
        if let Some(got) = magic.filter(|got| *got != CONTROL_MAGIC) {
            let expected = CONTROL_MAGIC;
            return Err(WireError::Magic { expected, got });
        }
        let Some(head) = left.first_chunk::<HEAD_LEN>() else {
            return Ok(None);
        };
        if head[4] != VERSION {
            return Err(WireError::Version {
                expected: VERSION,
                got: head[4],
            });
        }
        let got = u32::from_le_bytes([head[8], head[9], head[10], head[11]]);
        let len = usize::try_from(got).unwrap_or(usize::MAX);
        if len > self.body_max {
            let limit = self.body_max as u64;
            return Err(WireError::TooLong {
                what: "control message",
                got: got.into(),
                limit,
            });
        }
        let end = HEAD_LEN + len;
        let Some(body) = left.get(HEAD_LEN..end) else {
            return Ok(None);
        };
        let message = Control::decode(head[5], body)?;
        self.taken += end;
        Ok(Some(message))
    }

    /// Bytes held for an incomplete message.
    pub fn pending(&self) -> usize {
        self.buffer.len() - self.taken
    }

    /// Takes the bytes after the last message, for handing a stream over to another protocol.
    pub fn into_rest(mut self) -> Vec<u8> {
        self.buffer.split_off(self.taken)
    }
}
