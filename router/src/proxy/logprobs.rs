//! The prompt's log-probabilities: prefill computes them, decode's answer is what the client gets.
//!
//! Prefill's lists are put in front of decode's, in decode's own bytes (`meta_info.input_token_logprobs` and its two
//! sisters of SGLang's `/generate`), in whole answers, lists of answers and event streams; `echo` does so in completions.
#![forbid(unsafe_code)]

mod echo;
pub mod merge;

use std::borrow::Cow;
use std::ops::Range;

use bytes::Bytes;

use super::json_edit::{self, Disposition, Edit, Kind, Value};
use super::shape::BATCH_MAX;
use super::sse;
use echo::EchoLogprobs;

pub use echo::Echoed;

/// Longest prefill answer that is read for its lists, and longest decode answer they are put into: a thousand bytes for each
/// token of a long prompt. Longer ones are passed on as they are.
pub const ANSWER_BYTES_MAX: usize = 64 << 20;

const LISTS: [&str; 3] = [
    "input_token_logprobs",
    "input_top_logprobs",
    "input_token_ids_logprobs",
];
const META: usize = 0;
const INDEX: usize = 1;

/// The items of the three lists, without brackets.
type Lists = [Option<Bytes>; LISTS.len()];

/// What a prefill worker told about the prompts of one request.
#[derive(Clone, Debug, Default)]
pub struct PromptLogprobs {
    of_prompt: Vec<Lists>,
    echo: EchoLogprobs,
}

impl PromptLogprobs {
    /// Reads a whole answer: one object, or a list of them.
    pub fn of_answer(answer: &[u8]) -> Self {
        let mut found = Self::default();
        match answers(answer) {
            Some(items) => {
                for (prompt, item) in items.into_iter().enumerate() {
                    found.learn(&answer[item], Some(prompt));
                }
            }
            None => found.learn(answer, None),
        }
        found
    }

    /// Reads the data of one event; of several for one prompt the last one counts, as they repeat each other.
    pub fn learn_event(&mut self, event: &[u8]) {
        self.learn(&sse::data(event), None);
    }

    fn learn(&mut self, object: &[u8], prompt: Option<usize>) {
        let Some(places) = Places::of(object) else {
            self.echo.learn(object);
            return;
        };
        let prompt = prompt.unwrap_or(places.index);
        if prompt >= BATCH_MAX || places.lists.iter().all(Option::is_none) {
            return;
        }
        if self.of_prompt.len() <= prompt {
            self.of_prompt.resize_with(prompt + 1, Lists::default);
        }
        self.of_prompt[prompt] = places.lists.map(|list| {
            let (range, kind) = list?;
            let items = object[range].strip_prefix(b"[")?.strip_suffix(b"]")?;
            let items = items.trim_ascii();
            (kind == Kind::Array && !items.is_empty()).then(|| Bytes::copy_from_slice(items))
        });
    }

    /// Whether there is anything to add.
    pub fn is_empty(&self) -> bool {
        self.of_prompt.iter().flatten().all(Option::is_none) && self.echo.is_empty()
    }

    /// A whole answer of decode's with prefill's lists in front of its own.
    pub fn merge_answer(&self, answer: &[u8]) -> Vec<u8> {
        let mut edits = Vec::new();
        match answers(answer) {
            Some(items) => {
                for (prompt, item) in items.into_iter().enumerate() {
                    self.edits(answer, item, Some(prompt), &mut edits);
                }
            }
            None => {
                let whole = 0..answer.len();
                self.edits(answer, whole.clone(), None, &mut edits);
                self.echo
                    .edits(answer, whole, &mut Echoed::default(), &mut edits);
            }
        }
        json_edit::splice(answer, edits)
    }

    /// The same for one event of a stream, given and returned with its framing. An event whose data has several lines is no
    /// event of SGLang's and stays as it is. `echoed` is the stream's own, empty at its beginning.
    pub fn merge_event<'a>(&self, event: &'a [u8], echoed: &mut Echoed) -> Cow<'a, [u8]> {
        let Some(data) = sse::data_range(event) else {
            return Cow::Borrowed(event);
        };
        let mut edits = Vec::new();
        self.edits(event, data.clone(), None, &mut edits);
        if !self.echo.is_empty() {
            self.echo.edits(event, data, echoed, &mut edits);
        }
        if edits.is_empty() {
            Cow::Borrowed(event)
        } else {
            Cow::Owned(json_edit::splice(event, edits))
        }
    }

    fn edits<'a>(
        &'a self,
        text: &[u8],
        object: Range<usize>,
        prompt: Option<usize>,
        edits: &mut Vec<Edit<'a>>,
    ) {
        let raw = &text[object.clone()];
        let Some(places) = Places::of(raw) else {
            return;
        };
        let Some(lists) = self.of_prompt.get(prompt.unwrap_or(places.index)) else {
            return;
        };
        let mut missing = Vec::new();
        for ((name, ours), theirs) in LISTS.iter().zip(lists).zip(&places.lists) {
            let Some(ours) = ours else {
                continue;
            };
            match theirs {
                Some((range, Kind::Array)) => {
                    let at = object.start + range.start + 1;
                    let is_empty = raw[range.start + 1..range.end - 1].trim_ascii().is_empty();
                    let mut items = ours.to_vec();
                    if !is_empty {
                        items.push(b',');
                    }
                    edits.push((at..at, items.into()));
                }
                Some((range, _)) => {
                    let at = object.start + range.start..object.start + range.end;
                    edits.push((at, [b"[", &ours[..], b"]"].concat().into()));
                }
                None => {
                    missing.extend_from_slice(format!("\"{name}\":[").as_bytes());
                    missing.extend_from_slice(ours);
                    missing.extend_from_slice(b"],");
                }
            }
        }
        if !missing.is_empty() {
            if places.is_meta_empty {
                missing.pop();
            }
            let at = object.start + places.meta_open;
            edits.push((at..at, missing.into()));
        }
    }
}

/// The objects of a list of answers, or `None` if it is a single one.
fn answers(answer: &[u8]) -> Option<Vec<Range<usize>>> {
    let start = answer.iter().position(|byte| !byte.is_ascii_whitespace())?;
    if answer[start] != b'[' {
        return None;
    }
    let items = json_edit::elements(&answer[start..], BATCH_MAX).ok()?;
    let shift = |item: Range<usize>| item.start + start..item.end + start;
    Some(items.into_iter().map(shift).collect())
}

/// Where the lists stand in one answer.
struct Places {
    index: usize,
    meta_open: usize,
    is_meta_empty: bool,
    lists: [Option<(Range<usize>, Kind)>; LISTS.len()],
}

impl Places {
    fn of(object: &[u8]) -> Option<Self> {
        let scan = json_edit::scan(object, |key, _| match key {
            b"meta_info" => Disposition::Note(META),
            b"index" => Disposition::Note(INDEX),
            _ => Disposition::Keep,
        })
        .ok()?;
        let index = scan.noted(INDEX).and_then(|index| {
            let text = std::str::from_utf8(&object[index.range.clone()]).ok()?;
            text.parse().ok()
        });
        let meta = scan.noted(META)?;
        let start = meta.range.start;
        let mut lists = [const { None }; LISTS.len()];
        let mut note = |key: &[u8], value: &Value| {
            if let Some(slot) = LISTS.iter().position(|name| name.as_bytes() == key) {
                let range = value.range.start + start..value.range.end + start;
                lists[slot] = Some((range, value.kind));
            }
            Disposition::Keep
        };
        let inner = json_edit::scan(&object[meta.range.clone()], &mut note).ok()?;
        Some(Self {
            index: index.unwrap_or(0),
            meta_open: start + inner.open(),
            is_meta_empty: inner.is_empty(),
            lists,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merged(prefill: &str, decode: &str) -> String {
        let known = PromptLogprobs::of_answer(prefill.as_bytes());
        String::from_utf8(known.merge_answer(decode.as_bytes())).unwrap()
    }

    #[test]
    fn lists_are_put_in_front_and_nothing_else_changes() {
        let prefill = r#"{"text":"x","meta_info":{"id":"p","input_token_logprobs":[[null,1,null], [-1.50,2,null]],
            "input_top_logprobs":[],"input_token_ids_logprobs":[7]}}"#;
        for (decode, whole) in [
            (
                r#"{"text":"abc", "meta_info" : {"input_token_logprobs":[[-2e-1,3,null]],"n":1e400}}"#,
                r#"{"text":"abc", "meta_info" : {"input_token_ids_logprobs":[7],"input_token_logprobs":[[null,1,null], [-1.50,2,null],[-2e-1,3,null]],"n":1e400}}"#,
            ),
            (
                r#"{"meta_info":{"input_token_logprobs":[ ],"input_token_ids_logprobs":null}}"#,
                r#"{"meta_info":{"input_token_logprobs":[[null,1,null], [-1.50,2,null] ],"input_token_ids_logprobs":[7]}}"#,
            ),
            (
                r#"{"meta_info":{}}"#,
                r#"{"meta_info":{"input_token_logprobs":[[null,1,null], [-1.50,2,null]],"input_token_ids_logprobs":[7]}}"#,
            ),
            (r#"{"error":"x"}"#, r#"{"error":"x"}"#),
            ("not json", "not json"),
        ] {
            assert_eq!(merged(prefill, decode), whole);
        }
    }

    #[test]
    fn each_prompt_of_a_batch_keeps_its_own() {
        let prefill = r#" [{"meta_info":{"input_token_logprobs":[1]}},{"meta_info":{"input_token_logprobs":[2]}}]"#;
        let decode = r#"[{"meta_info":{"input_token_logprobs":[8]}}, {"meta_info":{"input_token_logprobs":[9]}}]"#;
        assert_eq!(
            merged(prefill, decode),
            r#"[{"meta_info":{"input_token_logprobs":[1,8]}}, {"meta_info":{"input_token_logprobs":[2,9]}}]"#
        );
    }

    #[test]
    fn events_are_merged_by_their_index() {
        let mut known = PromptLogprobs::default();
        assert!(known.is_empty());
        known
            .learn_event(b"data: {\"index\":1,\"meta_info\":{\"input_token_logprobs\":[1,2]}}\n\n");
        known.learn_event(b"data: [DONE]\n\n");
        known.learn_event(
            b"data: {\"index\":99999999,\"meta_info\":{\"input_token_logprobs\":[1,2]}}\n\n",
        );
        assert!(!known.is_empty());
        for (event, merged) in [
            (
                "data: {\"meta_info\":{\"input_token_logprobs\":[3]},\"index\":1}\r\n\r\n",
                "data: {\"meta_info\":{\"input_token_logprobs\":[1,2,3]},\"index\":1}\r\n\r\n",
            ),
            (
                "data: {\"meta_info\":{\"input_token_logprobs\":[3]}}\n\n",
                "data: {\"meta_info\":{\"input_token_logprobs\":[3]}}\n\n",
            ),
            ("data: [DONE]\n\n", "data: [DONE]\n\n"),
            (": keep alive\n\n", ": keep alive\n\n"),
        ] {
            let told = known.merge_event(event.as_bytes(), &mut Echoed::default());
            assert_eq!(told, merged.as_bytes());
        }
    }
}
