//! The text of one sequence as it grows: characters are completed and stop texts found before anything is sent.

use crate::text::Detokeniser;

/// Turns tokens into text that may be sent at once, and watches for stop texts.
#[derive(Debug)]
pub(super) struct Output {
    detokeniser: Detokeniser,
    stop: Vec<String>,
    /// Text not sent yet because it may be the start of a stop text.
    held: String,
}

impl Output {
    pub(super) fn new(stop: Vec<String>) -> Self {
        Self {
            detokeniser: Detokeniser::default(),
            stop,
            held: String::new(),
        }
    }

    /// Takes a token; returns the text to send and the stop text that was completed, if any.
    pub(super) fn push(&mut self, token: u32) -> (String, Option<String>) {
        let text = self.detokeniser.push(token);
        self.scan(&text)
    }

    /// The end of the sequence: all text that is left, unless it completes a stop text.
    pub(super) fn finish(&mut self) -> (String, Option<String>) {
        let rest = self.detokeniser.finish();
        let (mut text, stopped) = self.scan(&rest);
        text.push_str(&std::mem::take(&mut self.held));
        (text, stopped)
    }

    fn scan(&mut self, text: &str) -> (String, Option<String>) {
        self.held.push_str(text);
        let first = self
            .stop
            .iter()
            .filter_map(|s| Some((self.held.find(s.as_str())?, s)))
            .min();
        if let Some((at, stop)) = first {
            let stop = stop.clone();
            let text = self.held[..at].to_owned();
            self.held.clear();
            return (text, Some(stop));
        }
        let keep = self
            .stop
            .iter()
            .map(|s| overlap(&self.held, s))
            .max()
            .unwrap_or(0);
        let kept = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, kept), None)
    }
}

/// Bytes at the end of `text` that are a beginning of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    stop.char_indices()
        .map(|(at, _)| at)
        .rev()
        .find(|at| text.ends_with(&stop[..*at]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stop: &[&str], text: &str) -> (String, Option<String>) {
        let mut output = Output::new(stop.iter().map(|s| (*s).to_owned()).collect());
        let mut sent = String::new();
        for byte in text.bytes() {
            let (piece, stopped) = output.push(u32::from(byte));
            sent.push_str(&piece);
            if stopped.is_some() {
                return (sent, stopped);
            }
        }
        let (piece, stopped) = output.finish();
        (sent + &piece, stopped)
    }

    #[test]
    fn a_stop_text_is_never_sent_not_even_in_part() {
        assert_eq!(
            run(&["END"], "abENcdEND!"),
            ("abENcd".to_owned(), Some("END".to_owned()))
        );
        assert_eq!(
            run(&["aab"], "aaab"),
            ("a".to_owned(), Some("aab".to_owned()))
        );
        assert_eq!(
            run(&["é"], "caf\u{e9}s"),
            ("caf".to_owned(), Some("é".to_owned()))
        );
        assert_eq!(
            run(&["xy", "z"], "axz"),
            ("ax".to_owned(), Some("z".to_owned()))
        );
    }

    #[test]
    fn text_that_only_looked_like_a_stop_is_sent_in_the_end() {
        assert_eq!(run(&["END"], "the EN"), ("the EN".to_owned(), None));
        assert_eq!(run(&[], "plain"), ("plain".to_owned(), None));
    }

    #[test]
    fn a_broken_character_at_the_end_can_complete_a_stop() {
        let mut output = Output::new(vec!["\u{fffd}".to_owned()]);
        assert_eq!(output.push(0xe2), (String::new(), None));
        assert_eq!(
            output.finish(),
            (String::new(), Some("\u{fffd}".to_owned()))
        );
    }
}
