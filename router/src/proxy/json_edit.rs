//! Edits the top level of a JSON object without re-writing it.
//!
//! A router that parses and re-serialises a request loses what it does not know: unknown fields, 20-digit integers,
//! `1e400`, the client's own spacing. So this module scans the bytes once, checks the grammar, remembers where a few
//! members lie, and builds the new body from the client's own bytes plus the members the router adds.
#![forbid(unsafe_code)]

use std::ops::Range;

use cursor::Cursor;

mod cursor;

/// How deep arrays and objects may nest. SGLang's own JSON reader gives up at a few hundred levels too; a bound
/// keeps the scan's memory constant.
pub const DEPTH_MAX: usize = 256;

/// How many members one edit may drop. The names that are dropped number below ten, so more than this is a hostile body.
pub const DROPPED_MAX: usize = 64;

/// How many slots [`scan`] can note.
pub const SLOTS: usize = 18;

/// Keys longer than this (in raw bytes) that contain escapes are not decoded: no name we look for is that long even
/// when each of its letters is written as `\u0000`.
const ESCAPED_KEY_BYTES_MAX: usize = 256;

/// Why a body is not the JSON object we need. Offsets count bytes from the start of the body.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum JsonError {
    /// The body is not UTF-8.
    #[error("the body is not UTF-8: bad byte at offset {at}")]
    NotUtf8 {
        /// Offset of the first bad byte.
        at: usize,
    },
    /// The body is JSON of another kind, or empty.
    #[error("the body must be a JSON object")]
    NotAnObject,
    /// The body ends inside a value.
    #[error("the JSON body ends too early, at offset {at}")]
    Truncated {
        /// Length of the body.
        at: usize,
    },
    /// A byte stands where the grammar has no place for it.
    #[error("unexpected byte 0x{found:02x} in the JSON body at offset {at}")]
    Unexpected {
        /// Offset of the byte.
        at: usize,
        /// The byte.
        found: u8,
    },
    /// Arrays and objects nest deeper than [`DEPTH_MAX`].
    #[error("the JSON body nests deeper than {DEPTH_MAX} levels at offset {at}")]
    TooDeep {
        /// Offset of the bracket that went too far.
        at: usize,
    },
    /// More than [`DROPPED_MAX`] members carry names that only the router may set.
    #[error("the JSON body has more than {DROPPED_MAX} fields that only the router may set")]
    TooManyDropped,
}

/// What kind of JSON value a member has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `null`
    Null,
    /// `true` or `false`
    Bool,
    /// A number, not interpreted.
    Number,
    /// A string.
    String,
    /// An array.
    Array,
    /// An object.
    Object,
}

/// Where a value lies and, for an array, what it looks like one and two levels down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Value {
    /// The bytes of the value in the scanned body.
    pub range: Range<usize>,
    /// What it is.
    pub kind: Kind,
    /// Elements, if it is an array; else 0.
    pub items: usize,
    /// Kind of the first element.
    pub first: Option<Kind>,
    /// Kind of the first element of the first element.
    pub first_inner: Option<Kind>,
}

/// What to do with a top-level member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disposition {
    /// Keep its bytes.
    Keep,
    /// Keep its bytes and remember the value in this slot (`< SLOTS`); of duplicates the last one counts, as in
    /// Python's and serde's readers.
    Note(usize),
    /// Leave it out of the new body, but remember the value in this slot.
    Take(usize),
    /// Leave it out of the new body.
    Drop,
}

/// The result of one pass over a body.
#[derive(Clone, Debug)]
pub struct Scan {
    open: usize,
    close: usize,
    kept: Vec<Range<usize>>,
    noted: [Option<Value>; SLOTS],
}

impl Scan {
    /// The value noted in `slot`, unless it is absent or `null` (SGLang treats both alike).
    pub fn noted(&self, slot: usize) -> Option<&Value> {
        self.noted[slot]
            .as_ref()
            .filter(|value| value.kind != Kind::Null)
    }

    /// Where the first member begins, behind the opening brace: the place for members that are missing.
    pub fn open(&self) -> usize {
        self.open
    }

    /// Whether the object has no member that is kept.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// The scanned body with `members` (for example `"a":1,"b":2`) put in front and the dropped members left out.
    /// `body` must be the bytes that were scanned. Every other byte between the braces is the client's.
    pub fn inject(&self, body: &[u8], members: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(body.len() + members.len() + 1);
        out.extend_from_slice(&body[..self.open]);
        out.extend_from_slice(members);
        for run in &self.kept {
            out.push(b',');
            out.extend_from_slice(&body[run.clone()]);
        }
        out.extend_from_slice(&body[self.close..]);
        out
    }
}

/// Scans `body`, which must be one JSON object, and asks `judge` about each top-level member. Keys are given decoded.
///
/// # Errors
/// [`JsonError`] when the body is not a well-formed object within the bounds of this module.
pub fn scan(
    body: &[u8],
    mut judge: impl FnMut(&[u8], &Value) -> Disposition,
) -> Result<Scan, JsonError> {
    if let Err(error) = std::str::from_utf8(body) {
        return Err(JsonError::NotUtf8 {
            at: error.valid_up_to(),
        });
    }
    let mut cursor = Cursor::new(body);
    cursor.skip_space();
    if cursor.peek() != Some(b'{') {
        return Err(JsonError::NotAnObject);
    }
    cursor.at += 1;
    let open = cursor.at;
    let mut members = Members::default();
    let mut noted = [const { None }; SLOTS];
    cursor.skip_space();
    if cursor.peek() == Some(b'}') {
        cursor.at += 1;
    } else {
        loop {
            cursor.skip_space();
            let start = cursor.at;
            let key = cursor.string()?;
            cursor.colon()?;
            let value = cursor.value()?;
            let decoded = decode_key(&body[key]);
            let disposition = judge(&decoded, &value);
            let leaves = matches!(disposition, Disposition::Drop | Disposition::Take(_));
            members.add(start..cursor.at, leaves)?;
            if let Disposition::Note(slot) | Disposition::Take(slot) = disposition {
                noted[slot] = Some(value);
            }
            cursor.skip_space();
            match cursor.next()? {
                b',' => {}
                b'}' => break,
                found => {
                    return Err(JsonError::Unexpected {
                        at: cursor.at - 1,
                        found,
                    });
                }
            }
        }
    }
    let close = cursor.at - 1;
    cursor.skip_space();
    match cursor.peek() {
        None => Ok(Scan {
            open,
            close,
            kept: members.kept,
            noted,
        }),
        Some(found) => Err(JsonError::Unexpected {
            at: cursor.at,
            found,
        }),
    }
}

/// The ranges of the elements of `array` (the bytes of one JSON array), at most `items_max` of them.
///
/// # Errors
/// [`JsonError`] when `array` is not a well-formed array.
pub fn elements(array: &[u8], items_max: usize) -> Result<Vec<Range<usize>>, JsonError> {
    let mut cursor = Cursor::new(array);
    let mut found = Vec::new();
    let first = cursor.next()?;
    if first != b'[' {
        return Err(JsonError::Unexpected {
            at: 0,
            found: first,
        });
    }
    cursor.skip_space();
    if cursor.peek() == Some(b']') {
        return Ok(found);
    }
    while found.len() < items_max {
        cursor.skip_space();
        found.push(cursor.value()?.range);
        cursor.skip_space();
        match cursor.next()? {
            b',' => {}
            b']' => break,
            found => {
                return Err(JsonError::Unexpected {
                    at: cursor.at - 1,
                    found,
                });
            }
        }
    }
    Ok(found)
}

/// A new text for some bytes of a body.
pub type Edit<'a> = (Range<usize>, std::borrow::Cow<'a, [u8]>);

/// `body` with `edits` made, which must not overlap. Everything between them stays as it is.
pub fn splice(body: &[u8], mut edits: Vec<Edit<'_>>) -> Vec<u8> {
    edits.sort_by_key(|(range, _)| range.start);
    let added: usize = edits.iter().map(|(_, text)| text.len()).sum();
    let mut out = Vec::with_capacity(body.len() + added);
    let mut at = 0;
    for (range, text) in &edits {
        out.extend_from_slice(&body[at..range.start]);
        out.extend_from_slice(text);
        at = range.end;
    }
    out.extend_from_slice(&body[at..]);
    out
}

/// The members to keep, as runs of neighbours: nearly always one run, so nearly always one copy.
#[derive(Default)]
struct Members {
    kept: Vec<Range<usize>>,
    dropped: usize,
    broken: bool,
}

impl Members {
    fn add(&mut self, member: Range<usize>, drop: bool) -> Result<(), JsonError> {
        if drop {
            self.dropped += 1;
            self.broken = true;
            return if self.dropped > DROPPED_MAX {
                Err(JsonError::TooManyDropped)
            } else {
                Ok(())
            };
        }
        match self.kept.last_mut() {
            Some(run) if !self.broken => run.end = member.end,
            _ => self.kept.push(member),
        }
        self.broken = false;
        Ok(())
    }
}

/// The key without quotes, with its escapes resolved; a key that cannot be one of ours is returned raw.
fn decode_key(quoted: &[u8]) -> std::borrow::Cow<'_, [u8]> {
    let raw = &quoted[1..quoted.len() - 1];
    if raw.len() > ESCAPED_KEY_BYTES_MAX || !raw.contains(&b'\\') {
        return raw.into();
    }
    match serde_json::from_slice::<String>(quoted) {
        Ok(key) => key.into_bytes().into(),
        // A lone surrogate: legal to some readers, but then not one of our ASCII names.
        Err(_) => raw.into(),
    }
}

#[cfg(test)]
mod tests;
