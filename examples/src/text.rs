//! Bytes as tokens, and back to text that a stream can send safely.
//!
//! Token `0..256` is that byte; four more mark structure. A generated token may be half of a character, so the
//! [`Detokeniser`] holds back an incomplete sequence until it is completed or proven invalid; invalid bytes become
//! U+FFFD by the same rule as `String::from_utf8_lossy`, so the text never depends on where the stream was cut.
#![forbid(unsafe_code)]

/// Begin of sequence, put in front of every prompt given as text.
pub const BOS: u32 = 256;
/// End of sequence: generation stops here unless `ignore_eos` is set.
pub const EOS: u32 = 257;
/// Opens a chat turn.
pub const TURN_START: u32 = 258;
/// Closes a chat turn.
pub const TURN_END: u32 = 259;
/// Number of token ids.
pub const VOCAB: usize = 260;

/// Turns text into tokens, with [`BOS`] in front.
#[must_use]
pub fn encode(text: &str) -> Vec<u32> {
    std::iter::once(BOS)
        .chain(text.bytes().map(u32::from))
        .collect()
}

/// The chat template: each turn is `START role LF content END LF`, then the assistant's turn is opened.
#[must_use]
pub fn encode_chat<'a>(turns: impl Iterator<Item = (&'a str, &'a str)>) -> Vec<u32> {
    let bytes = |text: &'a str| text.bytes().map(u32::from);
    let mut tokens = vec![BOS];
    for (role, content) in turns {
        tokens.push(TURN_START);
        tokens.extend(bytes(role));
        tokens.push(u32::from(b'\n'));
        tokens.extend(bytes(content));
        tokens.extend([TURN_END, u32::from(b'\n')]);
    }
    tokens.push(TURN_START);
    tokens.extend(bytes("assistant\n"));
    tokens
}

/// Streams the text of one generated sequence.
#[derive(Clone, Debug, Default)]
pub struct Detokeniser {
    /// At most three bytes: the start of a character that may still be completed.
    held: Vec<u8>,
}

impl Detokeniser {
    /// Takes one token and returns the text that has become certain, often one character, sometimes none.
    pub fn push(&mut self, token: u32) -> String {
        let Ok(byte) = u8::try_from(token) else {
            // A structural token has no text, and no character may reach across it.
            return self.finish();
        };
        self.held.push(byte);
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.held) {
                Ok(valid) => {
                    text.push_str(valid);
                    self.held.clear();
                    return text;
                }
                Err(error) => {
                    let valid = error.valid_up_to();
                    text.push_str(&String::from_utf8_lossy(&self.held[..valid]));
                    let Some(invalid) = error.error_len() else {
                        self.held.drain(..valid);
                        return text;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    self.held.drain(..valid + invalid);
                }
            }
        }
    }

    /// Ends the sequence: a character that was never completed becomes one U+FFFD.
    pub fn finish(&mut self) -> String {
        if self.held.is_empty() {
            return String::new();
        }
        self.held.clear();
        char::REPLACEMENT_CHARACTER.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng as _, SeedableRng as _};

    fn stream(bytes: &[u8]) -> String {
        let mut detokeniser = Detokeniser::default();
        let mut text: String = bytes
            .iter()
            .map(|b| detokeniser.push(u32::from(*b)))
            .collect();
        text.push_str(&detokeniser.finish());
        text
    }

    #[test]
    fn valid_text_survives_byte_by_byte() {
        for text in ["", "plain", "ünï", "日本語", "🦀 and 🐍", "mixed é🦀x"] {
            assert_eq!(stream(text.as_bytes()), text);
        }
    }

    #[test]
    fn a_character_is_held_back_until_its_last_byte() {
        let mut detokeniser = Detokeniser::default();
        let pieces: Vec<String> = "🦀"
            .bytes()
            .map(|b| detokeniser.push(u32::from(b)))
            .collect();
        assert_eq!(pieces, ["", "", "", "🦀"]);
        assert_eq!(detokeniser.push(0xf0), "");
        assert_eq!(detokeniser.finish(), "\u{fffd}");
    }

    #[test]
    fn structure_ends_a_character() {
        let mut detokeniser = Detokeniser::default();
        assert_eq!(detokeniser.push(0xe2), "");
        assert_eq!(detokeniser.push(TURN_END), "\u{fffd}");
        assert_eq!(detokeniser.push(u32::from(b'a')), "a");
    }

    #[test]
    fn any_bytes_stream_as_the_lossy_conversion_reads_them() {
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(7);
        for _ in 0..2000 {
            let len = random.next_u32() % 12;
            // Half of the bytes are lead or continuation bytes, so that broken sequences are common.
            let bytes: Vec<u8> = (0..len)
                .map(|_| {
                    let [a, b, ..] = random.next_u32().to_le_bytes();
                    if a & 1 == 0 { b | 0x80 } else { b }
                })
                .collect();
            assert_eq!(
                stream(&bytes),
                String::from_utf8_lossy(&bytes),
                "{bytes:x?}"
            );
        }
    }

    #[test]
    fn chat_turns_are_framed() {
        let tokens = encode_chat([("user", "hi")].into_iter());
        assert_eq!(tokens[..2], [BOS, TURN_START]);
        assert_eq!(tokens.iter().filter(|t| **t == TURN_END).count(), 1);
        assert_eq!(tokens.iter().filter(|t| **t == TURN_START).count(), 2);
    }
}
