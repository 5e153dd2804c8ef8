//! Server-sent events: cuts a byte stream into events and reads their data.
#![forbid(unsafe_code)]

use std::borrow::Cow;
use std::sync::LazyLock;

use bytes::{Bytes, BytesMut};
use memchr::memmem::{self, Finder};

/// Longest event that is put together. SGLang's cumulative `/generate` events with log-probabilities reach some MiB.
pub const EVENT_BYTES_MAX: usize = 64 << 20;

/// An event exceeds [`EVENT_BYTES_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an event of the worker's stream is longer than {EVENT_BYTES_MAX} bytes")]
pub struct EventTooLong;

/// Puts events together from pieces of any size.
#[derive(Debug, Default)]
pub struct Events {
    pending: BytesMut,
    /// How much of `pending` holds no end of an event.
    scanned: usize,
}

impl Events {
    /// Takes the next piece.
    ///
    /// # Errors
    /// [`EventTooLong`]
    pub fn push(&mut self, piece: &[u8]) -> Result<(), EventTooLong> {
        if self.pending.len() + piece.len() > EVENT_BYTES_MAX {
            return Err(EventTooLong);
        }
        self.pending.extend_from_slice(piece);
        Ok(())
    }

    /// The next complete event, with the blank line that ends it.
    pub fn pop(&mut self) -> Option<Bytes> {
        // An end may be cut in two by the pieces: three bytes of it can be there already.
        let from = self.scanned.saturating_sub(3);
        match end_of_event(&self.pending[from..]) {
            Some(end) => {
                self.scanned = 0;
                Some(self.pending.split_to(from + end).freeze())
            }
            None => {
                self.scanned = self.pending.len();
                None
            }
        }
    }

    /// What is left of an incomplete event.
    pub fn rest(&mut self) -> Bytes {
        self.scanned = 0;
        self.pending.split().freeze()
    }
}

/// Where the first event of `text` ends, behind its blank line.
pub fn end_of_event(text: &[u8]) -> Option<usize> {
    let mut at = 0;
    // A line that ends with a line feed, and directly behind it an empty one.
    while let Some(found) = memchr::memchr(b'\n', &text[at..]) {
        at += found + 1;
        match text[at..] {
            [b'\n', ..] => return Some(at + 1),
            [b'\r', b'\n', ..] => return Some(at + 2),
            _ => {}
        }
    }
    None
}

/// The data of one event; empty for comments.
pub fn data(event: &[u8]) -> Cow<'_, [u8]> {
    let mut lines = event
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.strip_prefix(b"data:"))
        .map(|line| line.strip_suffix(b"\r").unwrap_or(line))
        .map(|line| line.strip_prefix(b" ").unwrap_or(line));
    let Some(first) = lines.next() else {
        return Cow::Borrowed(b"");
    };
    let mut data = Cow::Borrowed(first);
    for line in lines {
        let whole = data.to_mut();
        whole.push(b'\n');
        whole.extend_from_slice(line);
    }
    data
}

/// Where the data of an event stands, if it is one line.
pub fn data_range(event: &[u8]) -> Option<std::ops::Range<usize>> {
    let mut at = 0;
    let mut found = None;
    for line in event.split(|byte| *byte == b'\n') {
        let start = at;
        at += line.len() + 1;
        let Some(value) = line.strip_prefix(b"data:") else {
            continue;
        };
        let text = value.strip_suffix(b"\r").unwrap_or(value);
        let skipped = usize::from(text.starts_with(b" "));
        let from = start + b"data:".len() + skipped;
        if found.replace(from..from + text.len() - skipped).is_some() {
            return None;
        }
    }
    found
}

/// Whether this data ends an OpenAI stream.
pub fn is_done(data: &[u8]) -> bool {
    data.trim_ascii() == b"[DONE]"
}

/// An event with this data, which may hold no line feed.
pub fn event(data: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(data.len() + 8);
    out.extend_from_slice(b"data: ");
    out.extend_from_slice(data);
    out.extend_from_slice(b"\n\n");
    out.freeze()
}

/// A generation that a worker ended with an error inside an answer that had begun as a success.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InbandAbort {
    /// The HTTP status it would have been; 500 where the worker gives none.
    pub status: u16,
    /// The worker's words.
    pub message: String,
}

/// Words that a worker's report of a failed KV transfer contains (`disaggregation/{prefill,decode}.py`).
const TRANSFER_WORDS: [&str; 4] = [
    "transfer failed for request",
    "bootstrap failed for request",
    "handshake failed for request",
    "KVTransferError",
];

/// Whether a worker's error says that the KV cache did not get from one side to the other.
pub fn tells_of_transfer(text: &[u8]) -> bool {
    TRANSFER_WORDS
        .iter()
        .any(|words| memmem::find(text, words.as_bytes()).is_some())
}

/// Most of a worker's message that is kept.
const MESSAGE_CHARS_MAX: usize = 1000;

/// Every abort has one of these words in it. They are looked for in every piece of every stream.
static ABORT_WORDS: LazyLock<[Finder<'static>; 3]> =
    LazyLock::new(|| ["\"abort\"", "\"error\"", "\"response.failed\""].map(Finder::new));

fn may_tell_of_abort(text: &[u8]) -> bool {
    ABORT_WORDS.iter().any(|word| word.find(text).is_some())
}

impl InbandAbort {
    /// The abort that an event's data reports, if any: SGLang's `finish_reason.type = "abort"` of `/generate`, the error
    /// objects of its OpenAI streams, and `response.failed`.
    pub fn of_data(data: &[u8]) -> Option<Self> {
        if !may_tell_of_abort(data) {
            return None;
        }
        let json: serde_json::Value = serde_json::from_slice(data).ok()?;
        let choices = json.get("choices").and_then(|choices| choices.as_array());
        let mut reasons = choices
            .into_iter()
            .flatten()
            .chain(json.get("meta_info"))
            .filter_map(|of| of.get("finish_reason"));
        let aborted = |reason: &&serde_json::Value| {
            reason.as_str() == Some("abort")
                || reason.get("type").and_then(|kind| kind.as_str()) == Some("abort")
        };
        if let Some(reason) = reasons.find(aborted) {
            return Some(Self::of_parts(
                reason.get("status_code"),
                reason.get("message"),
            ));
        }
        let failed_response = (json.get("type").and_then(|kind| kind.as_str())
            == Some("response.failed"))
        .then(|| json.pointer("/response/error"))
        .flatten();
        let error = failed_response.or_else(|| json.get("error"));
        let error = error.filter(|error| !error.is_null())?;
        let message = error.get("message").or(Some(error));
        Some(Self::of_parts(error.get("code"), message))
    }

    fn of_parts(status: Option<&serde_json::Value>, message: Option<&serde_json::Value>) -> Self {
        let status = status
            .and_then(serde_json::Value::as_u64)
            .and_then(|status| u16::try_from(status).ok())
            .filter(|status| (400..600).contains(status))
            .unwrap_or(500);
        let message = message
            .and_then(|text| text.as_str())
            .unwrap_or("no reason given");
        Self {
            status,
            message: message.chars().take(MESSAGE_CHARS_MAX).collect(),
        }
    }

    /// Whether the KV transfer is what failed.
    pub fn is_transfer(&self) -> bool {
        tells_of_transfer(self.message.as_bytes())
    }
}

/// Watches an event stream for aborts without holding it up.
#[derive(Debug, Default)]
pub struct AbortWatch {
    events: Events,
    in_event: bool,
    lost: bool,
}

impl AbortWatch {
    /// Looks at the next piece; reports the first abort that becomes complete in it.
    pub fn look(&mut self, piece: &[u8]) -> Option<InbandAbort> {
        if self.lost {
            return None;
        }
        // Nearly always a piece is a number of whole events, which need no copy.
        if !self.in_event && piece.ends_with(b"\n\n") {
            if !may_tell_of_abort(piece) {
                return None;
            }
            let mut rest = piece;
            while let Some(end) = end_of_event(rest) {
                let (event, after) = rest.split_at(end);
                if let Some(abort) = InbandAbort::of_data(&data(event)) {
                    return Some(abort);
                }
                rest = after;
            }
            return None;
        }
        // An event too long to put together is no abort: those are short. What follows it is not understood any more.
        self.lost = self.events.push(piece).is_err();
        let mut found = None;
        while let Some(event) = self.events.pop() {
            found = found.or_else(|| InbandAbort::of_data(&data(&event)));
        }
        self.in_event = !self.events.pending.is_empty();
        found
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STREAM: &[u8] =
        b": hello\n\ndata: {\"a\":1}\r\n\r\nevent: x\ndata: one\ndata: two\n\ndata: [DONE]\n\n";

    #[test]
    fn aborts_are_recognised_in_every_dialect() {
        for (data, status, transfer) in [
            (
                r#"{"meta_info":{"finish_reason":{"type":"abort","message":"m","status_code":503}}}"#,
                503,
                false,
            ),
            (
                r#"{"meta_info":{"finish_reason":{"type":"abort"}}}"#,
                500,
                false,
            ),
            (
                r#"{"error":{"message":"Decode transfer failed for request rank=0","code":500}}"#,
                500,
                true,
            ),
            (
                r#"{"choices":[{"index":0,"finish_reason":null},{"finish_reason":"abort"}]}"#,
                500,
                false,
            ),
            (
                r#"{"type":"response.failed","response":{"error":{"message":"x","code":"server_error"}}}"#,
                500,
                false,
            ),
            (r#"{"error":"plain"}"#, 500, false),
        ] {
            let abort = InbandAbort::of_data(data.as_bytes()).expect(data);
            assert_eq!(
                (abort.status, abort.is_transfer()),
                (status, transfer),
                "{data}"
            );
        }
        for data in [
            r#"{"text":"\"abort\" is a word","meta_info":{"finish_reason":{"type":"stop"}}}"#,
            r#"{"type":"response.created","response":{"error":null},"error":null}"#,
            r#"{"choices":[{"finish_reason":"stop","delta":{"content":"\"error\""}}]}"#,
            r#"{"note":"error","error":null}"#,
            "[DONE]",
        ] {
            assert_eq!(InbandAbort::of_data(data.as_bytes()), None, "{data}");
        }
    }

    proptest! {
        #[test]
        fn events_do_not_depend_on_the_pieces(cuts in prop::collection::vec(0..STREAM.len(), 0..8)) {
            let mut cuts = cuts;
            cuts.extend([0, STREAM.len()]);
            cuts.sort_unstable();
            let (mut events, mut found) = (Events::default(), Vec::new());
            for pair in cuts.windows(2) {
                events.push(&STREAM[pair[0]..pair[1]]).unwrap();
                while let Some(event) = events.pop() {
                    found.push(event);
                }
            }
            for event in &found {
                if let Some(range) = data_range(event) {
                    prop_assert_eq!(&event[range], &data(event)[..]);
                }
            }
            let read: Vec<_> = found.iter().map(|event| data(event).into_owned()).collect();
            prop_assert_eq!(read, [&b""[..], b"{\"a\":1}", b"one\ntwo", b"[DONE]"]);
            prop_assert_eq!(found.concat(), STREAM);
            prop_assert!(events.rest().is_empty());
        }

        #[test]
        fn an_abort_is_seen_however_it_is_cut(cut in 0..100usize, lead in any::<bool>()) {
            let abort = "data: {\"meta_info\":{\"finish_reason\":{\"type\":\"abort\",\"message\":\"m\",\"status_code\":500}}}\n\n";
            let text = if lead { format!("data: 1\n\n{abort}") } else { abort.to_owned() };
            let cut = cut.min(text.len());
            let mut watch = AbortWatch::default();
            let seen = [&text[..cut], &text[cut..]].map(|piece| watch.look(piece.as_bytes()).is_some());
            prop_assert_eq!(seen.iter().filter(|seen| **seen).count(), 1);
        }

        #[test]
        fn random_bytes_never_panic(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..8)) {
            let mut watch = AbortWatch::default();
            for piece in pieces {
                let _ = watch.look(&piece);
                if let Some(range) = data_range(&piece) {
                    prop_assert_eq!(&piece[range], &data(&piece)[..]);
                }
            }
        }
    }
}
