//! The tokenizer: walks over JSON values of any size in constant memory.
#![forbid(unsafe_code)]

use std::ops::Range;

use super::{DEPTH_MAX, JsonError, Kind, Value};

pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    pub(super) at: usize,
}

/// One bit per open bracket: set for an object, clear for an array.
struct Nesting {
    bits: [u64; DEPTH_MAX.div_ceil(64)],
    depth: usize,
}

impl Nesting {
    fn push(&mut self, object: bool, at: usize) -> Result<(), JsonError> {
        // The top-level object is one level itself.
        if self.depth + 1 >= DEPTH_MAX {
            return Err(JsonError::TooDeep { at });
        }
        let (word, bit) = (self.depth / 64, 1 << (self.depth % 64));
        if object {
            self.bits[word] |= bit;
        } else {
            self.bits[word] &= !bit;
        }
        self.depth += 1;
        Ok(())
    }

    fn in_object(&self) -> bool {
        let top = self.depth - 1;
        self.bits[top / 64] >> (top % 64) & 1 == 1
    }
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    pub(super) fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    pub(super) fn next(&mut self) -> Result<u8, JsonError> {
        let byte = self.peek().ok_or(JsonError::Truncated { at: self.at })?;
        self.at += 1;
        Ok(byte)
    }

    fn expect(&mut self, wanted: u8) -> Result<(), JsonError> {
        match self.next()? {
            byte if byte == wanted => Ok(()),
            found => Err(JsonError::Unexpected {
                at: self.at - 1,
                found,
            }),
        }
    }

    pub(super) fn skip_space(&mut self) {
        while let Some(b' ' | b'\t' | b'\n' | b'\r') = self.peek() {
            self.at += 1;
        }
    }

    pub(super) fn colon(&mut self) -> Result<(), JsonError> {
        self.skip_space();
        self.expect(b':')
    }

    fn key(&mut self) -> Result<(), JsonError> {
        self.skip_space();
        self.string()?;
        self.colon()
    }

    /// Reads one value of any depth without recursion.
    pub(super) fn value(&mut self) -> Result<Value, JsonError> {
        self.skip_space();
        let start = self.at;
        let mut nesting = Nesting {
            bits: [0; DEPTH_MAX.div_ceil(64)],
            depth: 0,
        };
        let mut seen = Value {
            range: start..start,
            kind: Kind::Null,
            items: 0,
            first: None,
            first_inner: None,
        };
        loop {
            self.skip_space();
            let kind = self.begin(&mut nesting)?;
            seen.meet(kind, &nesting);
            let opened = matches!(kind, Kind::Array | Kind::Object);
            if opened && !self.is_empty_container(&mut nesting)? {
                if nesting.in_object() {
                    self.key()?;
                }
                continue;
            }
            if self.after_value(&mut nesting)? {
                seen.range.end = self.at;
                return Ok(seen);
            }
        }
    }

    /// Reads a scalar whole, or the opening bracket of a container.
    fn begin(&mut self, nesting: &mut Nesting) -> Result<Kind, JsonError> {
        let at = self.at;
        match self.peek().ok_or(JsonError::Truncated { at })? {
            b'{' => {
                self.at += 1;
                nesting.push(true, at).map(|()| Kind::Object)
            }
            b'[' => {
                self.at += 1;
                nesting.push(false, at).map(|()| Kind::Array)
            }
            b'"' => self.string().map(|_| Kind::String),
            b'-' | b'0'..=b'9' => self.number().map(|()| Kind::Number),
            b't' => self.literal(b"true").map(|()| Kind::Bool),
            b'f' => self.literal(b"false").map(|()| Kind::Bool),
            b'n' => self.literal(b"null").map(|()| Kind::Null),
            found => Err(JsonError::Unexpected { at, found }),
        }
    }

    /// After an opening bracket: closes it again if nothing is inside.
    fn is_empty_container(&mut self, nesting: &mut Nesting) -> Result<bool, JsonError> {
        self.skip_space();
        let closing = if nesting.in_object() { b'}' } else { b']' };
        if self.peek().ok_or(JsonError::Truncated { at: self.at })? != closing {
            return Ok(false);
        }
        self.at += 1;
        nesting.depth -= 1;
        Ok(true)
    }

    /// After a value: closes brackets; true when the outermost value is complete, false when another one follows.
    fn after_value(&mut self, nesting: &mut Nesting) -> Result<bool, JsonError> {
        while nesting.depth > 0 {
            self.skip_space();
            match (self.next()?, nesting.in_object()) {
                (b',', true) => return self.key().map(|()| false),
                (b',', false) => return Ok(false),
                (b'}', true) | (b']', false) => nesting.depth -= 1,
                (found, _) => {
                    return Err(JsonError::Unexpected {
                        at: self.at - 1,
                        found,
                    });
                }
            }
        }
        Ok(true)
    }

    fn literal(&mut self, word: &[u8]) -> Result<(), JsonError> {
        word.iter().try_for_each(|byte| self.expect(*byte))
    }

    fn digits(&mut self) -> Result<(), JsonError> {
        let start = self.at;
        while let Some(b'0'..=b'9') = self.peek() {
            self.at += 1;
        }
        if self.at > start {
            return Ok(());
        }
        let found = self.next()?;
        Err(JsonError::Unexpected { at: start, found })
    }

    fn number(&mut self) -> Result<(), JsonError> {
        if self.peek() == Some(b'-') {
            self.at += 1;
        }
        if self.peek() == Some(b'0') {
            self.at += 1;
        } else {
            self.digits()?;
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.digits()?;
        }
        if let Some(b'e' | b'E') = self.peek() {
            self.at += 1;
            if let Some(b'+' | b'-') = self.peek() {
                self.at += 1;
            }
            self.digits()?;
        }
        Ok(())
    }

    /// Reads a string and returns its range, quotes included.
    pub(super) fn string(&mut self) -> Result<Range<usize>, JsonError> {
        let start = self.at;
        self.expect(b'"')?;
        loop {
            self.at += plain_prefix(&self.bytes[self.at..]);
            match self.next()? {
                b'"' => return Ok(start..self.at),
                b'\\' => self.escape()?,
                found => {
                    return Err(JsonError::Unexpected {
                        at: self.at - 1,
                        found,
                    });
                }
            }
        }
    }

    fn escape(&mut self) -> Result<(), JsonError> {
        match self.next()? {
            b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => Ok(()),
            b'u' => (0..4).try_for_each(|_| match self.next()? {
                byte if byte.is_ascii_hexdigit() => Ok(()),
                found => Err(JsonError::Unexpected {
                    at: self.at - 1,
                    found,
                }),
            }),
            found => Err(JsonError::Unexpected {
                at: self.at - 1,
                found,
            }),
        }
    }
}

impl Value {
    /// Takes note of a value met at the nesting it leaves behind.
    fn meet(&mut self, kind: Kind, nesting: &Nesting) {
        let opened = usize::from(matches!(kind, Kind::Array | Kind::Object));
        match nesting.depth - opened {
            0 => self.kind = kind,
            1 if self.kind == Kind::Array => {
                self.items += 1;
                self.first.get_or_insert(kind);
            }
            2 if self.items == 1 && self.first == Some(Kind::Array) => {
                self.first_inner.get_or_insert(kind);
            }
            _ => {}
        }
    }
}

/// How many leading bytes are neither quote, backslash nor control character. Prompts are long strings, so eight
/// bytes are looked at per step.
pub(super) fn plain_prefix(bytes: &[u8]) -> usize {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const HIGH: u64 = 0x8080_8080_8080_8080;
    let zero_byte = |word: u64| word.wrapping_sub(ONES) & !word & HIGH;
    let mut at = 0;
    for chunk in bytes.chunks_exact(8) {
        let mut eight = [0; 8];
        eight.copy_from_slice(chunk);
        let word = u64::from_le_bytes(eight);
        let special = zero_byte(word ^ (ONES * u64::from(b'"')))
            | zero_byte(word ^ (ONES * u64::from(b'\\')))
            | (word.wrapping_sub(ONES * 0x20) & !word & HIGH);
        if special != 0 {
            // The lowest flagged byte is exact; borrows only ever spoil flags above it.
            return at + special.trailing_zeros() as usize / 8;
        }
        at += 8;
    }
    let rest = bytes[at..]
        .iter()
        .take_while(|byte| !matches!(byte, b'"' | b'\\' | 0..0x20))
        .count();
    at + rest
}
