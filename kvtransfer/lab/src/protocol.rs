//! The lines that the guest writes to its second serial port and the runner reads: one event a line, `LAB` first.

use std::fmt::Write as _;

/// Longest text that one output line carries; longer ones are cut, so that a line stays one write.
pub(crate) const TEXT_BYTES_MAX: usize = 2048;
/// Bytes of a file in one line: a multiple of three, so that base64 needs no padding before the last part.
pub(crate) const PART_BYTES: usize = 3 * 512;

/// How a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// It exited with this code.
    Exited(i32),
    /// A signal killed it.
    Killed(i32),
    /// It was still running at its limit, and was killed.
    TimedOut,
}

/// What the guest reports.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Report {
    /// A stage of the guest's own start took that long, in seconds.
    Stage { name: String, seconds: f64 },
    /// A job was started.
    Started { job: String },
    /// A line that a job printed.
    Output { job: String, text: String },
    /// What a job has printed of a line so far: libtest names a test before it runs and ends the line after it.
    Part { job: String, text: String },
    /// A job ended.
    Job {
        job: String,
        ended: Ended,
        seconds: f64,
    },
    /// A piece of a file that a job left in its output folder; pieces come in order.
    File {
        job: String,
        name: String,
        bytes: Vec<u8>,
    },
    /// The guest could not start its devices; no job ran.
    Broken { why: String },
    /// All jobs were run.
    Done,
}

/// A job's or file's name that fits in one word of a line.
pub(crate) fn is_word(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    !name.is_empty() && name.len() <= 100 && name.bytes().all(plain) && !name.starts_with('.')
}

impl Report {
    /// The line, without its line feed.
    pub(crate) fn line(&self) -> String {
        match self {
            Self::Stage { name, seconds } => format!("LAB stage {seconds:.2} {name}"),
            Self::Started { job } => format!("LAB start {job}"),
            Self::Output { job, text } => format!("LAB out {job} {}", printable(text)),
            Self::Part { job, text } => format!("LAB part {job} {}", printable(text)),
            Self::Job {
                job,
                ended,
                seconds,
            } => {
                let how = match ended {
                    Ended::Exited(code) => format!("rc {code}"),
                    Ended::Killed(signal) => format!("signal {signal}"),
                    Ended::TimedOut => "limit 0".to_owned(),
                };
                format!("LAB job {job} {how} secs {seconds:.2}")
            }
            Self::File { job, name, bytes } => {
                format!("LAB file {job} {name} {}", encode(bytes))
            }
            Self::Broken { why } => format!("LAB broken {}", printable(why)),
            Self::Done => "LAB done".to_owned(),
        }
    }

    /// Reads a line; `None` if it is not one of ours.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let line = line.trim_end_matches(['\r', '\n']).strip_prefix("LAB ")?;
        let (kind, rest) = line.split_once(' ').unwrap_or((line, ""));
        let (first, tail) = rest.split_once(' ').unwrap_or((rest, ""));
        match kind {
            "stage" => Some(Self::Stage {
                name: tail.to_owned(),
                seconds: first.parse().ok()?,
            }),
            "start" => Some(Self::Started {
                job: first.to_owned(),
            }),
            "out" => Some(Self::Output {
                job: first.to_owned(),
                text: tail.to_owned(),
            }),
            "part" => Some(Self::Part {
                job: first.to_owned(),
                text: tail.to_owned(),
            }),
            "job" => {
                let words: Vec<&str> = tail.split(' ').collect();
                let [how, number, "secs", seconds] = words[..] else {
                    return None;
                };
                let number = number.parse().ok()?;
                let ended = match how {
                    "rc" => Ended::Exited(number),
                    "signal" => Ended::Killed(number),
                    "limit" => Ended::TimedOut,
                    _ => return None,
                };
                Some(Self::Job {
                    job: first.to_owned(),
                    ended,
                    seconds: seconds.parse().ok()?,
                })
            }
            "file" => {
                let (name, data) = tail.split_once(' ')?;
                is_word(name).then_some(())?;
                Some(Self::File {
                    job: first.to_owned(),
                    name: name.to_owned(),
                    bytes: decode(data)?,
                })
            }
            "broken" => Some(Self::Broken {
                why: rest.to_owned(),
            }),
            "done" => Some(Self::Done),
            _ => None,
        }
    }
}

/// The text without what would break a line or a terminal, cut at the limit.
fn printable(text: &str) -> String {
    let mut line = String::with_capacity(text.len().min(TEXT_BYTES_MAX));
    for letter in text.chars() {
        if line.len() >= TEXT_BYTES_MAX {
            line.push_str(" ...");
            break;
        }
        match letter {
            '\t' | ' '..='~' => line.push(letter),
            // Colour codes stay readable as text instead of reaching the terminal.
            letter if letter.is_control() => {
                let _ = write!(line, "\\x{:02x}", u32::from(letter));
            }
            letter => line.push(letter),
        }
    }
    line
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// Base64 of RFC 4648, with padding.
fn encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let byte = |at: usize| u32::from(chunk.get(at).copied().unwrap_or(0));
        let word = byte(0) << 16 | byte(1) << 8 | byte(2);
        for place in 0..4 {
            if place <= chunk.len() {
                let index = word >> (18 - 6 * place) & 63;
                text.push(char::from(ALPHABET[index as usize]));
            } else {
                text.push('=');
            }
        }
    }
    text
}

fn decode(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    for group in text.as_bytes().chunks(4) {
        let filled = group.iter().take_while(|&&letter| letter != b'=').count();
        if group.len() != 4 || filled < 2 || group[filled..].iter().any(|&pad| pad != b'=') {
            return None;
        }
        let mut word = 0_u32;
        for place in 0..4 {
            let value = match group.get(place).filter(|_| place < filled) {
                Some(letter) => ALPHABET.iter().position(|known| known == letter)?,
                None => 0,
            };
            word = word << 6 | u32::try_from(value).ok()?;
        }
        bytes.extend_from_slice(&word.to_be_bytes()[1..filled]);
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_report_survives_its_line() {
        let job = || "rdma_conformance".to_owned();
        let reports = [
            Report::Stage {
                name: "devices up".to_owned(),
                seconds: 1.25,
            },
            Report::Started { job: job() },
            Report::Output {
                job: job(),
                text: "two  words\tand a tab".to_owned(),
            },
            Report::Part {
                job: job(),
                text: "test rails::one ... ".to_owned(),
            },
            Report::Job {
                job: job(),
                ended: Ended::Exited(101),
                seconds: 2.5,
            },
            Report::Job {
                job: job(),
                ended: Ended::Killed(11),
                seconds: 2.5,
            },
            Report::Job {
                job: job(),
                ended: Ended::TimedOut,
                seconds: 60.0,
            },
            Report::File {
                job: job(),
                name: "kvbench.json".to_owned(),
                bytes: (0..=255).collect(),
            },
            Report::Broken {
                why: "no siw0".to_owned(),
            },
            Report::Done,
        ];
        for report in reports {
            let line = report.line() + "\r\n";
            assert_eq!(Report::parse(&line), Some(report), "{line}");
        }
    }

    #[test]
    fn base64_matches_the_rfc_and_rejects_what_is_not_base64() {
        for (plain, coded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(encode(plain.as_bytes()), coded);
            assert_eq!(decode(coded).as_deref(), Some(plain.as_bytes()));
        }
        for broken in ["Zg=", "Z===", "Zg=v", "Zm9*", "===="] {
            assert_eq!(decode(broken), None, "{broken}");
        }
    }

    #[test]
    fn output_cannot_break_a_line_and_is_cut_at_the_limit() {
        let text = format!("a\nLAB done\r\u{1b}[31m{}", "x".repeat(2 * TEXT_BYTES_MAX));
        let line = Report::Output {
            job: "job".to_owned(),
            text,
        }
        .line();
        assert!(!line.contains('\n') && !line.contains('\r') && !line.contains('\u{1b}'));
        assert!(line.len() < TEXT_BYTES_MAX + 40, "{}", line.len());
        assert!(line.ends_with(" ..."));
    }

    #[test]
    fn other_lines_are_not_reports() {
        for line in [
            "",
            "LAB",
            "LAB what",
            "LABdone",
            "[ 1.0] panic",
            "LAB job x rc 0",
            "LAB file j ../x Zg==",
            "LAB stage soon kernel",
        ] {
            assert_eq!(Report::parse(line), None, "{line}");
        }
    }
}
