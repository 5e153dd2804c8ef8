//! As much of HTTP/1.1 as a benchmark needs, and no more: what it costs is taken from what is measured.
#![forbid(unsafe_code)]

use memchr::memmem;

/// Heads of the programs measured have some hundred bytes.
const HEAD_BYTES_MAX: usize = 64 << 10;

/// Where the head of a message ends, behind its blank line.
pub(crate) fn end_of_head(bytes: &[u8]) -> Option<usize> {
    memmem::find(bytes, b"\r\n\r\n").map(|at| at + 4)
}

/// The value of a header, trimmed.
pub(crate) fn header<'a>(head: &'a [u8], name: &str) -> Option<&'a str> {
    head.split(|byte| *byte == b'\n').skip(1).find_map(|line| {
        let colon = memchr::memchr(b':', line)?;
        let (found, value) = line.split_at(colon);
        let value = value.get(1..)?.trim_ascii();
        found
            .eq_ignore_ascii_case(name.as_bytes())
            .then(|| std::str::from_utf8(value).ok())
            .flatten()
    })
}

/// The number behind the first `name` in `text`, spaces between them skipped.
pub(crate) fn number_after(text: &[u8], name: &[u8]) -> Option<u64> {
    let at = memmem::find(text, name)? + name.len();
    let rest = text[at..].trim_ascii_start();
    let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
    std::str::from_utf8(&rest[..digits]).ok()?.parse().ok()
}

/// What is wrong with an answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BadAnswer {
    #[error("the head of the answer is no HTTP")]
    Head,
    #[error("a chunk of the answer is no chunk")]
    Chunk,
    #[error("status {status}: {body}")]
    Status { status: u16, body: String },
    #[error("{found} events came, {wanted} were due")]
    Events { found: u64, wanted: u64 },
    #[error("the answer broke off")]
    Cut,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Head,
    /// So many bytes are left of a body of known length.
    Plain(usize),
    /// The hexadecimal length of a chunk, as far as it is known.
    Size(usize),
    SizeEnd(usize),
    Chunk(usize),
    ChunkEnd(u8),
    /// Behind the last chunk: bytes of the blank line that are left.
    Last(u8),
    Done,
}

/// Reads one answer from pieces of any size.
#[derive(Debug)]
pub(crate) struct Answer {
    stage: Stage,
    head: Vec<u8>,
    status: u16,
    /// The body has begun.
    pub(crate) has_begun: bool,
    /// Blank lines of an event stream.
    pub(crate) events: u64,
    last: u8,
    /// The beginning of a refusal.
    refusal: Vec<u8>,
}

impl Answer {
    pub(crate) fn new() -> Self {
        Self {
            stage: Stage::Head,
            head: Vec::new(),
            status: 0,
            has_begun: false,
            events: 0,
            last: 0,
            refusal: Vec::new(),
        }
    }

    /// Takes the next piece; true when the answer is complete. Whether it is a good one, [`Answer::check`] tells.
    pub(crate) fn take(&mut self, mut piece: &[u8]) -> Result<bool, BadAnswer> {
        if self.stage == Stage::Head {
            let before = self.head.len();
            self.head.extend_from_slice(piece);
            let Some(end) = end_of_head(&self.head) else {
                let is_short = self.head.len() <= HEAD_BYTES_MAX;
                return is_short.then_some(false).ok_or(BadAnswer::Head);
            };
            piece = &piece[end - before..];
            self.head.truncate(end);
            self.begin()?;
        }
        while self.stage != Stage::Done && !piece.is_empty() {
            piece = self.step(piece)?;
        }
        Ok(self.stage == Stage::Done)
    }

    fn begin(&mut self) -> Result<(), BadAnswer> {
        let status = self
            .head
            .get(9..12)
            .and_then(|text| std::str::from_utf8(text).ok());
        self.status = status
            .and_then(|text| text.parse().ok())
            .ok_or(BadAnswer::Head)?;
        let coding = header(&self.head, "transfer-encoding");
        self.stage = if coding.is_some_and(|coding| coding.eq_ignore_ascii_case("chunked")) {
            Stage::Size(0)
        } else {
            let length = header(&self.head, "content-length").and_then(|text| text.parse().ok());
            match length.ok_or(BadAnswer::Head)? {
                0 => Stage::Done,
                length => Stage::Plain(length),
            }
        };
        Ok(())
    }

    fn step<'a>(&mut self, piece: &'a [u8]) -> Result<&'a [u8], BadAnswer> {
        let (first, rest) = (piece[0], &piece[1..]);
        match self.stage {
            Stage::Plain(left) => {
                let (data, rest) = piece.split_at(left.min(piece.len()));
                self.look(data);
                self.stage = match left - data.len() {
                    0 => Stage::Done,
                    left => Stage::Plain(left),
                };
                return Ok(rest);
            }
            Stage::Chunk(left) => {
                let (data, rest) = piece.split_at(left.min(piece.len()));
                self.look(data);
                self.stage = match left - data.len() {
                    0 => Stage::ChunkEnd(2),
                    left => Stage::Chunk(left),
                };
                return Ok(rest);
            }
            Stage::Size(size) => {
                self.stage = match (first as char).to_digit(16) {
                    Some(digit) => Stage::Size((size << 4) + digit as usize),
                    None if first == b'\r' => Stage::SizeEnd(size),
                    None => return Err(BadAnswer::Chunk),
                };
            }
            Stage::SizeEnd(0) => self.stage = Stage::Last(2),
            Stage::SizeEnd(size) => self.stage = Stage::Chunk(size),
            Stage::ChunkEnd(1) => self.stage = Stage::Size(0),
            Stage::ChunkEnd(left) => self.stage = Stage::ChunkEnd(left - 1),
            Stage::Last(1) => self.stage = Stage::Done,
            Stage::Last(left) => self.stage = Stage::Last(left - 1),
            Stage::Head | Stage::Done => return Err(BadAnswer::Head),
        }
        Ok(rest)
    }

    fn look(&mut self, data: &[u8]) {
        self.has_begun = true;
        for at in memchr::memchr_iter(b'\n', data) {
            let before = if at == 0 { self.last } else { data[at - 1] };
            self.events += u64::from(before == b'\n');
        }
        self.last = data.last().copied().unwrap_or(self.last);
        if self.status != 200 && self.refusal.len() < 200 {
            self.refusal.extend_from_slice(data);
        }
    }

    /// Whether a complete answer is a success with so many events, if it is to have some.
    pub(crate) fn check(&self, events: Option<u64>) -> Result<(), BadAnswer> {
        if self.status != 200 {
            let body = String::from_utf8_lossy(&self.refusal).into_owned();
            let status = self.status;
            return Err(BadAnswer::Status { status, body });
        }
        match events.filter(|wanted| *wanted != self.events) {
            Some(wanted) => Err(BadAnswer::Events {
                found: self.events,
                wanted,
            }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &[u8] = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\
        9\r\ndata: 1\n\n\r\n1A\r\ndata: 2\n\ndata: [DONE]   \n\n\r\n0\r\n\r\n";

    #[test]
    fn answers_do_not_depend_on_the_pieces() {
        for size in 1..=STREAM.len() {
            let mut answer = Answer::new();
            let mut done = false;
            for piece in STREAM.chunks(size) {
                assert!(!done, "there is more to come, in pieces of {size}");
                done = answer.take(piece).unwrap();
            }
            assert!(done, "in pieces of {size}");
            answer.check(Some(3)).unwrap();
            assert!(matches!(
                answer.check(Some(4)),
                Err(BadAnswer::Events {
                    found: 3,
                    wanted: 4
                })
            ));
        }
    }

    #[test]
    fn refusals_tell_why() {
        let mut answer = Answer::new();
        let text = b"HTTP/1.1 503 Busy\r\ncontent-length: 4\r\n\r\nfull";
        assert!(answer.take(text).unwrap());
        assert_eq!(
            answer.check(None).unwrap_err().to_string(),
            "status 503: full"
        );
        assert!(Answer::new().take(b"nonsense\r\n\r\n").is_err());
        let mut bad = Answer::new();
        assert!(
            bad.take(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz")
                .is_err()
        );
    }

    #[test]
    fn numbers_are_found() {
        assert_eq!(number_after(b"{\"a\": 12,", b"\"a\":"), Some(12));
        assert_eq!(number_after(b"{\"a\":\"x\"", b"\"a\":"), None);
        assert_eq!(
            header(
                b"POST / HTTP/1.1\r\nContent-Length: 7\r\n\r\n",
                "content-length"
            ),
            Some("7")
        );
    }
}
