//! Reads MessagePack piece by piece, without building values: what a peer sends takes no more memory than it has bytes.
#![forbid(unsafe_code)]

/// The bytes are no MessagePack, or end too early.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this is no MessagePack of a known form")]
pub(super) struct Malformed;

/// One value; of a collection only its head, the elements follow.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Head<'a> {
    /// Nothing.
    Nil,
    /// A whole number; of a negative one the two's complement.
    Int(u64),
    /// Text or bytes.
    Bytes(&'a [u8]),
    /// An array of so many elements.
    Array(usize),
    /// A map of so many pairs.
    Map(usize),
    /// A value of another kind: nothing here reads it.
    Other,
}

/// What is left to be read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Reads `bytes` from their beginning.
    pub(super) const fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(Malformed)?;
        self.rest = rest;
        Ok(taken)
    }

    /// A big-endian number of `width` bytes, at most 8.
    fn number(&mut self, width: usize) -> Result<u64, Malformed> {
        let bytes = self.take(width)?;
        Ok(bytes
            .iter()
            .fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    /// A negative or positive number of `width` bytes, as 64 bits.
    fn signed(&mut self, width: usize) -> Result<Head<'a>, Malformed> {
        let shift = 64 - 8 * width;
        let number = (self.number(width)? << shift).cast_signed() >> shift;
        Ok(Head::Int(number.cast_unsigned()))
    }

    fn length(&mut self, width: usize) -> Result<usize, Malformed> {
        usize::try_from(self.number(width)?).map_err(|_| Malformed)
    }

    fn bytes(&mut self, width: usize) -> Result<Head<'a>, Malformed> {
        let length = self.length(width)?;
        Ok(Head::Bytes(self.take(length)?))
    }

    /// Elements that may still come: each has a byte at least.
    fn possible(&self, count: usize) -> Result<usize, Malformed> {
        (count <= self.rest.len()).then_some(count).ok_or(Malformed)
    }

    fn array(&mut self, count: usize) -> Result<Head<'a>, Malformed> {
        Ok(Head::Array(self.possible(count)?))
    }

    fn map(&mut self, count: usize) -> Result<Head<'a>, Malformed> {
        self.possible(count.checked_mul(2).ok_or(Malformed)?)?;
        Ok(Head::Map(count))
    }

    fn other(&mut self, bytes: usize) -> Result<Head<'a>, Malformed> {
        self.take(bytes)?;
        Ok(Head::Other)
    }

    /// The next value or head.
    ///
    /// # Errors
    /// [`Malformed`]
    pub(super) fn head(&mut self) -> Result<Head<'a>, Malformed> {
        let [first, ..] = *self.take(1)? else {
            return Err(Malformed);
        };
        let low = |mask: u8| usize::from(first & mask);
        match first {
            0x00..=0x7f => Ok(Head::Int(u64::from(first))),
            0x80..=0x8f => self.map(low(0x0f)),
            0x90..=0x9f => self.array(low(0x0f)),
            0xa0..=0xbf => Ok(Head::Bytes(self.take(low(0x1f))?)),
            0xc0 => Ok(Head::Nil),
            0xc1 => Err(Malformed),
            0xc2 | 0xc3 => Ok(Head::Other),
            0xc4 | 0xd9 => self.bytes(1),
            0xc5 | 0xda => self.bytes(2),
            0xc6 | 0xdb => self.bytes(4),
            // Extensions have a byte for their type.
            0xc7..=0xc9 => {
                let length = self.length(1 << (first - 0xc7))?;
                self.other(length.checked_add(1).ok_or(Malformed)?)
            }
            0xca => self.other(4),
            0xcb => self.other(8),
            0xcc..=0xcf => Ok(Head::Int(self.number(1 << (first - 0xcc))?)),
            0xd0..=0xd3 => self.signed(1 << (first - 0xd0)),
            0xd4..=0xd8 => self.other((1 << (first - 0xd4)) + 1),
            0xdc | 0xdd => {
                let count = self.length(2 << (first - 0xdc))?;
                self.array(count)
            }
            0xde | 0xdf => {
                let count = self.length(2 << (first - 0xde))?;
                self.map(count)
            }
            0xe0..=0xff => Ok(Head::Int(i64::from(first.cast_signed()).cast_unsigned())),
        }
    }

    /// Leaves out one value with all that is in it.
    ///
    /// # Errors
    /// [`Malformed`]
    pub(super) fn skip(&mut self) -> Result<(), Malformed> {
        let mut pending: usize = 1;
        while pending > 0 {
            pending -= 1;
            let inside = match self.head()? {
                Head::Array(count) => count,
                Head::Map(count) => 2 * count,
                _ => 0,
            };
            pending = pending.checked_add(inside).ok_or(Malformed)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heads(bytes: &[u8]) -> Result<Vec<Head<'_>>, Malformed> {
        let mut reader = Reader::new(bytes);
        let mut heads = Vec::new();
        while !reader.rest.is_empty() {
            heads.push(reader.head()?);
        }
        Ok(heads)
    }

    #[test]
    fn every_form_of_the_specification_is_read() {
        let int = |number: i64| Head::Int(number.cast_unsigned());
        for (bytes, head) in [
            (&[0x07][..], int(7)),
            (&[0xff], int(-1)),
            (&[0xe0], int(-32)),
            (&[0xcc, 0xff], int(255)),
            (&[0xcd, 1, 0], int(256)),
            (&[0xce, 0, 1, 0, 0], int(65_536)),
            (&[0xcf, 0x80, 0, 0, 0, 0, 0, 0, 0], int(i64::MIN)),
            (&[0xd0, 0x80], int(-128)),
            (&[0xd1, 0xff, 0xfe], int(-2)),
            (&[0xd2, 0xff, 0xff, 0xff, 0xfe], int(-2)),
            (
                &[0xd3, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe],
                int(-2),
            ),
            (&[0xa2, b'h', b'i'], Head::Bytes(b"hi")),
            (&[0xd9, 1, b'h'], Head::Bytes(b"h")),
            (&[0xda, 0, 1, b'h'], Head::Bytes(b"h")),
            (&[0xdb, 0, 0, 0, 1, b'h'], Head::Bytes(b"h")),
            (&[0xc4, 1, 9], Head::Bytes(&[9])),
            (&[0xc0], Head::Nil),
            (&[0xc3], Head::Other),
            (&[0xca, 0, 0, 0, 0], Head::Other),
            (&[0xcb, 0, 0, 0, 0, 0, 0, 0, 0], Head::Other),
            (&[0xd4, 1, 2], Head::Other),
            (
                &[0xd8, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
                Head::Other,
            ),
            (&[0xc7, 2, 1, 0, 0], Head::Other),
            (&[0x80], Head::Map(0)),
            (&[0xde, 0, 0], Head::Map(0)),
            (&[0xdd, 0, 0, 0, 0], Head::Array(0)),
        ] {
            assert_eq!(heads(bytes).unwrap(), [head], "{bytes:?}");
        }
        assert_eq!(heads(&[0x92, 1, 2]).unwrap()[0], Head::Array(2));
        assert_eq!(heads(&[0xdc, 0, 1, 2]).unwrap()[0], Head::Array(1));
    }

    #[test]
    fn what_promises_more_than_there_is_is_refused() {
        for bytes in [
            &[0xc1][..],
            &[0x92, 1],
            &[0x81, 1],
            &[0xdf, 0xff, 0xff, 0xff, 0xff],
            &[0xdd, 0xff, 0xff, 0xff, 0xff],
            &[0xc6, 0xff, 0xff, 0xff, 0xff],
            &[0xc9, 0xff, 0xff, 0xff, 0xff],
            &[0xcd, 1],
            &[0xa2, b'h'],
        ] {
            assert_eq!(heads(bytes), Err(Malformed), "{bytes:?}");
            assert_eq!(Reader::new(bytes).skip(), Err(Malformed), "{bytes:?}");
        }
    }

    #[test]
    fn a_value_is_left_out_whole_however_deep() {
        let mut deep = vec![0x91; 100_000];
        deep.extend([0xc0, 0x05]);
        let mut reader = Reader::new(&deep);
        reader.skip().unwrap();
        assert_eq!(reader.head(), Ok(Head::Int(5)));
        let mut reader = Reader::new(&[0x82, 0xa1, b'a', 0x92, 1, 2, 0xa1, b'b', 0x80, 7]);
        reader.skip().unwrap();
        assert_eq!(reader.head(), Ok(Head::Int(7)));
        assert!(reader.rest.is_empty());
    }
}
