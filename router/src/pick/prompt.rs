//! What a prompt is to the scheduler: how many tokens it has, and how it begins.
#![forbid(unsafe_code)]

use memchr::{memchr, memchr_iter, memmem};

use crate::proxy::shape::Shape;
use crate::schedule::Request;
use crate::schedule::prefix::chunks_of_bytes;

/// Tokens of an image or a sound, whose bytes say little: in the range of what today's models make of one.
const MEDIA_TOKENS: u64 = 1024;

/// How media stand in JSON.
const BASE64: &[u8] = b";base64,";

/// A prompt, for [`Wish`](super::Wish).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prompt {
    /// Its tokens, counted where it comes as token ids, else guessed from its bytes.
    pub tokens: u64,
    /// Hashes of its beginning.
    pub chunks: Vec<u64>,
}

impl Prompt {
    /// The prompt in `body`, of which `shape` knows where it stands.
    pub fn of(body: &[u8], shape: &Shape) -> Self {
        let Some((range, of_numbers)) = &shape.prompt else {
            return Self::of_text(body);
        };
        let text = body.get(range.clone()).unwrap_or(body);
        if !of_numbers {
            return Self::of_text(text);
        }
        Self {
            tokens: memchr_iter(b',', text).count() as u64 + 1,
            chunks: chunks_of_bytes(text),
        }
    }

    /// A prompt in plain text or JSON.
    pub fn of_text(text: &[u8]) -> Self {
        let (mut bytes, mut media) = (text.len(), 0);
        let mut skipped_to = 0;
        for at in memmem::find_iter(text, BASE64) {
            if at < skipped_to {
                continue;
            }
            let end = memchr(b'"', &text[at..]).map_or(text.len(), |length| at + length);
            bytes -= end - at;
            media += MEDIA_TOKENS;
            skipped_to = end;
        }
        Self {
            tokens: Request::tokens_of_bytes(bytes as u64).max(1) + media,
            chunks: chunks_of_bytes(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::shape::{PairEndpoint, Trust, read};

    fn prompt(endpoint: PairEndpoint, body: &str) -> Prompt {
        let shape = read(endpoint, body.as_bytes(), Trust::default()).unwrap();
        Prompt::of(body.as_bytes(), &shape)
    }

    #[test]
    fn tokens_are_counted_or_guessed() {
        let ids = prompt(
            PairEndpoint::Generate,
            r#"{"input_ids":[1,2,3,4,5],"x":[1,2]}"#,
        );
        assert_eq!(ids.tokens, 5);
        let ids = prompt(PairEndpoint::Completions, r#"{"prompt":[[1,2],[3,4]]}"#);
        assert_eq!(ids.tokens, 4);
        let text = "a".repeat(400);
        let body = format!(r#"{{"padding":"{text}{text}","text":"{text}"}}"#);
        let plain = prompt(PairEndpoint::Generate, &body);
        assert!((100..=101).contains(&plain.tokens), "{plain:?}");
        let body = format!(
            r#"{{"messages":[{{"content":[{{"url":"data:image/png;base64,{}"}}]}}]}}"#,
            "A".repeat(1 << 20)
        );
        let image = prompt(PairEndpoint::Chat, &body);
        assert!((1024..1060).contains(&image.tokens), "{}", image.tokens);
    }

    #[test]
    fn conversations_that_go_on_begin_alike() {
        let turn = |count: usize| {
            let turns: Vec<_> = (0..count)
                .map(|turn| {
                    format!(
                        r#"{{"role":"user","content":"{turn} {}"}}"#,
                        "x".repeat(300)
                    )
                })
                .collect();
            let temperature = count as f64 / 10.0;
            format!(
                r#"{{"temperature":{temperature},"messages":[{}]}}"#,
                turns.join(",")
            )
        };
        let (short, long) = (
            prompt(PairEndpoint::Chat, &turn(3)),
            prompt(PairEndpoint::Chat, &turn(4)),
        );
        assert!(short.chunks.len() >= 3 && long.chunks.starts_with(&short.chunks[..3]));
    }
}
