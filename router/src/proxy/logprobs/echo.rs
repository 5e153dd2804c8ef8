//! The same for `/v1/completions` with `echo` and `logprobs`: there each choice has parallel lists over the prompt's tokens and
//! its own (`to_openai_style_logprobs` of SGLang's `entrypoints/openai/utils.py`). Prefill knows the prompt's and the answer's
//! first one, decode all of the answer. The prompt's are put in front of decode's, once: in a stream only a choice's first
//! event has them.
#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::ops::Range;

use bytes::Bytes;

use super::super::json_edit::{self, Disposition, Edit, Kind};
use super::super::shape::BATCH_MAX;

const LISTS: [&str; 4] = ["tokens", "token_logprobs", "text_offset", "top_logprobs"];

/// Longest list that is looked at: no context is longer.
const TOKENS_MAX: usize = 1 << 22;

const CHOICES: usize = 0;
const INDEX: usize = 1;
const LOGPROBS: usize = 2;

/// One list of prefill's.
#[derive(Clone, Debug, Default)]
struct List {
    /// Its items without brackets.
    items: Bytes,
    /// The same without the last one.
    without_last: Bytes,
    last: Bytes,
    count: usize,
}

impl List {
    /// The list in `raw`, which has its brackets.
    fn of(raw: &[u8]) -> Self {
        let found = json_edit::elements(raw, TOKENS_MAX).unwrap_or_default();
        let (Some(first), Some(last)) = (found.first(), found.last()) else {
            return Self::default();
        };
        let items = Bytes::copy_from_slice(&raw[first.start..last.end]);
        let end = found.len().checked_sub(2).map(|at| found[at].end);
        Self {
            without_last: items.slice(..end.map_or(0, |end| end - first.start)),
            last: items.slice(last.start - first.start..),
            count: found.len(),
            items,
        }
    }
}

/// What prefill told of the choices of one request.
#[derive(Clone, Debug, Default)]
pub(super) struct EchoLogprobs {
    of_choice: Vec<Option<[List; LISTS.len()]>>,
}

/// The choices whose prompts the client was told of.
#[derive(Debug, Default)]
pub struct Echoed {
    choices: HashSet<usize>,
}

impl EchoLogprobs {
    /// Takes note of the lists in an answer or an event; of a choice's events the first one counts.
    pub(super) fn learn(&mut self, object: &[u8]) {
        for choice in choices(object) {
            if self.of_choice.len() <= choice.index {
                self.of_choice.resize_with(choice.index + 1, || None);
            }
            let told = &mut self.of_choice[choice.index];
            if told.is_none() {
                let list =
                    |range: Option<Range<usize>>| range.map(|range| List::of(&object[range]));
                *told = Some(choice.lists.map(|range| list(range).unwrap_or_default()));
            }
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.of_choice.iter().all(Option::is_none)
    }

    /// The edits of `text`, in which an answer or an event stands at `object`.
    pub(super) fn edits<'a>(
        &'a self,
        text: &[u8],
        object: Range<usize>,
        echoed: &mut Echoed,
        edits: &mut Vec<Edit<'a>>,
    ) {
        let raw = &text[object.clone()];
        for choice in choices(raw) {
            let Some(Some(ours)) = self.of_choice.get(choice.index) else {
                continue;
            };
            if !echoed.choices.insert(choice.index) {
                continue;
            }
            let first = |range: &Range<usize>| {
                let items = json_edit::elements(&raw[range.clone()], 1).ok()?;
                let item = items.first()?;
                Some(&raw[range.start + item.start..range.start + item.end])
            };
            // The answer's first token, which both tell: the same text of the same probability.
            let is_shared = ours[..2].iter().zip(&choice.lists).all(|(ours, theirs)| {
                let theirs = theirs.as_ref().and_then(first);
                theirs.is_some_and(|theirs| theirs == ours.last)
            });
            for (list, theirs) in ours.iter().zip(&choice.lists) {
                let Some(theirs) = theirs else {
                    continue;
                };
                let is_parallel = list.count == ours[0].count;
                let items = if is_shared && is_parallel {
                    &list.without_last
                } else {
                    &list.items
                };
                if items.is_empty() {
                    continue;
                }
                let mut items = items.to_vec();
                if first(theirs).is_some() {
                    items.push(b',');
                }
                let at = object.start + theirs.start + 1;
                edits.push((at..at, items.into()));
            }
        }
    }
}

/// A choice that has the lists, and where they stand.
struct Choice {
    index: usize,
    lists: [Option<Range<usize>>; LISTS.len()],
}

fn choices(object: &[u8]) -> Vec<Choice> {
    let scan = json_edit::scan(object, |key, _| match key {
        b"choices" => Disposition::Note(CHOICES),
        _ => Disposition::Keep,
    });
    let Ok(scan) = scan else {
        return Vec::new();
    };
    let Some(list) = scan.noted(CHOICES) else {
        return Vec::new();
    };
    let found = json_edit::elements(&object[list.range.clone()], BATCH_MAX).unwrap_or_default();
    let choice = |at: Range<usize>| {
        choice(
            object,
            list.range.start + at.start..list.range.start + at.end,
        )
    };
    found.into_iter().filter_map(choice).collect()
}

fn choice(object: &[u8], at: Range<usize>) -> Option<Choice> {
    let text = &object[at.clone()];
    let scan = json_edit::scan(text, |key, _| match key {
        b"index" => Disposition::Note(INDEX),
        b"logprobs" => Disposition::Note(LOGPROBS),
        _ => Disposition::Keep,
    });
    let scan = scan.ok()?;
    let index = scan.noted(INDEX).and_then(|index| {
        let text = std::str::from_utf8(&text[index.range.clone()]).ok()?;
        text.parse().ok()
    });
    let logprobs = scan.noted(LOGPROBS)?;
    let start = at.start + logprobs.range.start;
    let mut lists = [const { None }; LISTS.len()];
    let inner = &text[logprobs.range.clone()];
    json_edit::scan(inner, |key, value| {
        let slot = LISTS.iter().position(|name| name.as_bytes() == key);
        if let Some(slot) = slot.filter(|_| value.kind == Kind::Array) {
            lists[slot] = Some(start + value.range.start..start + value.range.end);
        }
        Disposition::Keep
    })
    .ok()?;
    let index = index.unwrap_or(0);
    (index < BATCH_MAX && lists[0].is_some()).then_some(Choice { index, lists })
}

#[cfg(test)]
mod tests {
    use crate::proxy::logprobs::{Echoed, PromptLogprobs};

    /// Prefill's answer to `a b` of two tokens, with the first token of the answer.
    const PREFILL: &str = r#"{"id":"p","choices":[{"index":0,"text":"a b c","logprobs":{"text_offset":[-1,-1,-1],
        "token_logprobs":[null,-1.50, -0.25],"tokens":["a"," b"," c"],"top_logprobs":[null,{" b":-1.50},{" c":-0.25}]}}]}"#;

    fn merged(prefill: &str, decode: &str) -> String {
        let known = PromptLogprobs::of_answer(prefill.as_bytes());
        String::from_utf8(known.merge_answer(decode.as_bytes())).unwrap()
    }

    #[test]
    fn the_prompts_tokens_are_put_in_front_of_the_answers() {
        for (decode, whole) in [
            (
                r#"{"zzz":1e400,"choices":[{"text":"a b c d","logprobs":{"tokens":[" c"," d"],"token_logprobs":[-0.25,-2],"text_offset":[-1,-1],"top_logprobs":[{" c":-0.25},{}]},"index":0}]}"#,
                r#"{"zzz":1e400,"choices":[{"text":"a b c d","logprobs":{"tokens":["a"," b"," c"," d"],"token_logprobs":[null,-1.50,-0.25,-2],"text_offset":[-1,-1,-1,-1],"top_logprobs":[null,{" b":-1.50},{" c":-0.25},{}]},"index":0}]}"#,
            ),
            // An answer that begins otherwise shares nothing.
            (
                r#"{"choices":[{"index":0,"logprobs":{"tokens":[" d"],"token_logprobs":[-2]}}]}"#,
                r#"{"choices":[{"index":0,"logprobs":{"tokens":["a"," b"," c"," d"],"token_logprobs":[null,-1.50, -0.25,-2]}}]}"#,
            ),
            (
                r#"{"choices":[{"index":0,"logprobs":{"tokens":[ ],"token_logprobs":[]}}]}"#,
                r#"{"choices":[{"index":0,"logprobs":{"tokens":["a"," b"," c" ],"token_logprobs":[null,-1.50, -0.25]}}]}"#,
            ),
            (
                r#"{"choices":[{"index":1,"logprobs":{"tokens":[]}},{"index":0,"logprobs":null}]}"#,
                r#"{"choices":[{"index":1,"logprobs":{"tokens":[]}},{"index":0,"logprobs":null}]}"#,
            ),
            (r#"{"error":1}"#, r#"{"error":1}"#),
        ] {
            assert_eq!(merged(PREFILL, decode), whole);
        }
        assert!(
            PromptLogprobs::of_answer(
                br#"{"choices":[{"index":99999999,"logprobs":{"tokens":[]}}]}"#
            )
            .is_empty()
        );
    }

    #[test]
    fn in_a_stream_the_first_event_of_a_choice_tells_the_prompt() {
        let mut known = PromptLogprobs::default();
        let event = |index: usize, token: &str| {
            format!(
                "data: {{\"choices\":[{{\"index\":{index},\"logprobs\":{{\"tokens\":[{token}],\"token_logprobs\":[1]}}}}]}}\n\n"
            )
        };
        known.learn_event(event(1, "\"p\",\"q\"").as_bytes());
        known.learn_event(event(1, "\"other\"").as_bytes());
        known.learn_event(b"data: [DONE]\n\n");
        let mut echoed = Echoed::default();
        let mut merge = |event: &str| {
            let merged = known.merge_event(event.as_bytes(), &mut echoed);
            String::from_utf8(merged.into_owned()).unwrap()
        };
        assert_eq!(merge(&event(0, "\"x\"")), event(0, "\"x\""));
        let first = merge(&event(1, "\"x\""));
        assert!(first.contains(r#""tokens":["p","q","x"]"#), "{first}");
        assert_eq!(merge(&event(1, "\"y\"")), event(1, "\"y\""));
    }
}
