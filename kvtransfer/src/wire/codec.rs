//! Little-endian reading and writing with every length checked.

use thiserror::Error;

/// Why bytes of a peer were refused. The connection that carried them is closed; nothing else is affected.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum WireError {
    /// The stream does not start with the protocol's magic number.
    #[error("not a kvtransfer stream: expected magic {expected:#010x}, got {got:#010x}")]
    Magic {
        /// What this stream must start with.
        expected: u32,
        /// What it starts with.
        got: u32,
    },
    /// The peer speaks another protocol version.
    #[error(
        "protocol version {got} is not supported, this side speaks {expected}: upgrade the older of the two"
    )]
    Version {
        /// Spoken here.
        expected: u8,
        /// Spoken there.
        got: u8,
    },
    /// A length is over its bound.
    #[error("{what} of {got} exceeds the limit of {limit}")]
    TooLong {
        /// Which length.
        what: &'static str,
        /// The length said.
        got: u64,
        /// The bound.
        limit: u64,
    },
    /// The message ends before its last field, or has bytes after it.
    #[error("{what} is truncated or has trailing bytes")]
    Length {
        /// Which message.
        what: &'static str,
    },
    /// A field has a value outside its range.
    #[error("{what} has the impossible value {got}")]
    Value {
        /// Which field.
        what: &'static str,
        /// What it held.
        got: u64,
    },
    /// A text is not UTF-8.
    #[error("{what} is not UTF-8")]
    Text {
        /// Which text.
        what: &'static str,
    },
    /// A header's own checksum does not match: the stream lost its framing.
    #[error("a frame header is damaged (its checksum is {got:#010x}, expected {expected:#010x})")]
    Damaged {
        /// Computed over the header.
        expected: u32,
        /// Carried by the header.
        got: u32,
    },
}

/// Appends fields to a message.
pub(crate) struct Writer<'a>(pub(crate) &'a mut Vec<u8>);

impl Writer<'_> {
    pub(crate) fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    pub(crate) fn u16(&mut self, value: u16) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn raw(&mut self, value: &[u8]) {
        self.0.extend_from_slice(value);
    }

    /// A count that local code has already bounded far below `u32::MAX`.
    pub(crate) fn count(&mut self, count: usize) {
        self.u32(u32::try_from(count).expect("invariant: local lists are bounded below 2^32"));
    }

    pub(crate) fn text(&mut self, value: &str) {
        self.count(value.len());
        self.raw(value.as_bytes());
    }

    pub(crate) fn items(&mut self, items: &[i32]) {
        self.count(items.len());
        self.0.reserve(items.len() * 4);
        for item in items {
            self.raw(&item.to_le_bytes());
        }
    }
}

/// Takes fields off a message.
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8], what: &'static str) -> Self {
        Self { rest: bytes, what }
    }

    pub(crate) fn raw(&mut self, len: usize) -> Result<&'a [u8], WireError> {
        let (head, rest) = self
            .rest
            .split_at_checked(len)
            .ok_or(WireError::Length { what: self.what })?;
        self.rest = rest;
        Ok(head)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let mut out = [0; N];
        out.copy_from_slice(self.raw(N)?);
        Ok(out)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, WireError> {
        Ok(self.array::<1>()?[0])
    }

    pub(crate) fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_le_bytes)
    }

    pub(crate) fn id(&mut self) -> Result<[u8; 16], WireError> {
        self.array()
    }

    /// A count of things of at least `each` bytes, bounded by `limit` and by the bytes that are left.
    pub(crate) fn count(
        &mut self,
        what: &'static str,
        limit: usize,
        each: usize,
    ) -> Result<usize, WireError> {
        let got = self.u32()?;
        let count = usize::try_from(got).unwrap_or(usize::MAX);
        if count > limit {
            return Err(WireError::TooLong {
                what,
                got: got.into(),
                limit: limit as u64,
            });
        }
        if count.saturating_mul(each) > self.rest.len() {
            return Err(WireError::Length { what: self.what });
        }
        Ok(count)
    }

    pub(crate) fn bytes(&mut self, what: &'static str, limit: usize) -> Result<Vec<u8>, WireError> {
        let len = self.count(what, limit, 1)?;
        Ok(self.raw(len)?.to_vec())
    }

    pub(crate) fn text(&mut self, what: &'static str, limit: usize) -> Result<String, WireError> {
        String::from_utf8(self.bytes(what, limit)?).map_err(|_| WireError::Text { what })
    }

    pub(crate) fn items(
        &mut self,
        what: &'static str,
        limit: usize,
    ) -> Result<Vec<i32>, WireError> {
        let count = self.count(what, limit, 4)?;
        let raw = self.raw(count * 4)?;
        Ok(raw
            .chunks_exact(4)
            .map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect())
    }

    pub(crate) fn finish(self) -> Result<(), WireError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(WireError::Length { what: self.what })
        }
    }
}
