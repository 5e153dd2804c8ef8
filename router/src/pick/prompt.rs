//! What a prompt is to the scheduler: how many tokens it has, and how it begins.
#![forbid(unsafe_code)]

use memchr::{memchr, memchr_iter, memmem};

use crate::proxy::shape::Shape;
use crate::schedule::Request;
use crate::schedule::prefix::{CHUNKS_MAX, chunks_of_bytes, chunks_of_tokens};

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
    /// Hashes of its whole blocks of tokens, where it comes as token ids and workers tell of such blocks. Of a batch those of
    /// the first prompt.
    pub blocks: Vec<u64>,
    /// Tokens per block.
    pub block_tokens: u32,
}

impl Prompt {
    /// The prompt in `body`, of which `shape` knows where it stands; workers tell of blocks of `block_tokens`, or of none if
    /// that is 0.
    pub fn of(body: &[u8], shape: &Shape, block_tokens: u32) -> Self {
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
            blocks: match block_tokens as usize {
                0 => Vec::new(),
                size => {
                    chunks_of_tokens(&first_tokens(text, size.saturating_mul(CHUNKS_MAX)), size)
                }
            },
            block_tokens,
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
            ..Self::default()
        }
    }
}

/// The tokens of a JSON list, or of the first list in it, at most so many. What is no token ends them.
fn first_tokens(text: &[u8], most: usize) -> Vec<u32> {
    let begin = text.iter().position(u8::is_ascii_digit);
    let list = &text[begin.unwrap_or(text.len())..];
    let end = memchr(b']', list).unwrap_or(list.len());
    list[..end]
        .split(|byte| *byte == b',')
        .take(most)
        .map_while(|token| std::str::from_utf8(token.trim_ascii()).ok()?.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::shape::{PairEndpoint, Trust, read};

    fn prompt(endpoint: PairEndpoint, body: &str) -> Prompt {
        let shape = read(endpoint, body.as_bytes(), Trust::default()).unwrap();
        Prompt::of(body.as_bytes(), &shape, 2)
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
    fn token_ids_are_cut_into_blocks() {
        for (body, tokens) in [
            (r#"{"input_ids":[1,2,3, 4 ,5]}"#, &[1, 2, 3, 4][..]),
            (
                r#"{"input_ids": [ [1,2,3,70000],[9,9]]}"#,
                &[1, 2, 3, 70_000],
            ),
            (r#"{"input_ids":[1,2,-3,4]}"#, &[1, 2]),
            (r#"{"input_ids":[1,2,4294967296,4]}"#, &[1, 2]),
            (r#"{"input_ids":[1]}"#, &[]),
            (r#"{"text":"1,2,3"}"#, &[]),
        ] {
            let found = prompt(PairEndpoint::Generate, body);
            assert_eq!(found.blocks, chunks_of_tokens(tokens, 2), "{body}");
        }
        assert_eq!(first_tokens(b"[1,2,3]", 2), [1, 2]);
        let shape = read(
            PairEndpoint::Generate,
            br#"{"input_ids":[1,2]}"#,
            Trust::default(),
        );
        let untold = Prompt::of(br#"{"input_ids":[1,2]}"#, &shape.unwrap(), 0);
        assert!(untold.blocks.is_empty());
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
