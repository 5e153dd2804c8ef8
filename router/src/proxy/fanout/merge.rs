//! Puts the answers of single choices together, in the workers' own bytes.
#![forbid(unsafe_code)]

use std::borrow::Cow;
use std::ops::Range;

use bytes::{Bytes, BytesMut};
use serde_json::{Map, Value as Json};

use crate::proxy::json_edit::{self, Disposition, Kind, Scan};
use crate::proxy::shape::BATCH_MAX;
use crate::proxy::sse;

const ID: usize = 0;
const CHOICES: usize = 1;
const USAGE: usize = 2;
const INDEX: usize = 0;

fn scan_answer(answer: &[u8]) -> Option<Scan> {
    json_edit::scan(answer, |key, _| match key {
        b"id" => Disposition::Note(ID),
        b"choices" => Disposition::Note(CHOICES),
        b"usage" => Disposition::Note(USAGE),
        _ => Disposition::Keep,
    })
    .ok()
}

/// `object` with its `index` replaced, or put in.
fn with_index(object: &[u8], index: impl FnOnce(usize) -> usize) -> Option<Vec<u8>> {
    let scan = json_edit::scan(object, |key, _| match key {
        b"index" => Disposition::Note(INDEX),
        _ => Disposition::Keep,
    })
    .ok()?;
    let edit = match scan.noted(INDEX) {
        Some(value) => {
            let text = std::str::from_utf8(&object[value.range.clone()]).ok()?;
            let number = index(text.parse().ok()?);
            (value.range.clone(), number.to_string())
        }
        None => {
            let comma = if scan.is_empty() { "" } else { "," };
            let at = scan.open()..scan.open();
            (at, format!("\"index\":{}{comma}", index(0)))
        }
    };
    let (range, text) = edit;
    Some(json_edit::splice(
        object,
        vec![(range, Cow::Owned(text.into_bytes()))],
    ))
}

/// OpenAI answers: the first one's head with everybody's choices and the sum of the usage.
pub(super) fn choices(answers: &[Bytes]) -> Option<Vec<u8>> {
    let count = answers.len();
    let (mut of_answer, mut usages) = (Vec::with_capacity(count), Vec::with_capacity(count));
    let mut places: Option<(Range<usize>, Option<Range<usize>>)> = None;
    for answer in answers {
        let scan = scan_answer(answer)?;
        let list = scan
            .noted(CHOICES)
            .filter(|list| list.kind == Kind::Array)?;
        let usage = scan.noted(USAGE).map(|usage| usage.range.clone());
        usages.extend(usage.clone().map(|range| &answer[range]));
        let raw = &answer[list.range.clone()];
        let items = json_edit::elements(raw, BATCH_MAX).ok()?;
        of_answer.push(items.into_iter().map(|item| &raw[item]).collect::<Vec<_>>());
        places.get_or_insert((list.range.clone(), usage));
    }
    let (list, usage) = places?;
    let prompts = of_answer.iter().map(Vec::len).max()?;
    let mut merged = Vec::from(*b"[");
    for prompt in 0..prompts {
        for (choice, items) in of_answer.iter().enumerate() {
            let item = with_index(items.get(prompt)?, |_| prompt * count + choice)?;
            if merged.len() > 1 {
                merged.push(b',');
            }
            merged.extend_from_slice(&item);
        }
    }
    merged.push(b']');
    let mut edits = vec![(list, Cow::Owned(merged))];
    if let (Some(range), Some(sum)) = (usage, sum_of_usage(&usages)) {
        edits.push((range, Cow::Owned(sum.into_bytes())));
    }
    Some(json_edit::splice(&answers[0], edits))
}

/// Answers of `/generate`: one list of them all.
pub(super) fn lists(answers: &[Bytes]) -> Option<Vec<u8>> {
    let of_answer: Vec<Vec<&[u8]>> = answers
        .iter()
        .map(|answer| {
            let answer = answer.trim_ascii();
            if answer.starts_with(b"[") {
                let items = json_edit::elements(answer, BATCH_MAX).ok()?;
                Some(items.into_iter().map(|item| &answer[item]).collect())
            } else {
                json_edit::scan(answer, |_, _| Disposition::Keep).ok()?;
                Some(vec![answer])
            }
        })
        .collect::<Option<_>>()?;
    let prompts = of_answer.iter().map(Vec::len).max()?;
    let mut merged = Vec::from(*b"[");
    for prompt in 0..prompts {
        for items in &of_answer {
            if merged.len() > 1 {
                merged.push(b',');
            }
            merged.extend_from_slice(items.get(prompt)?);
        }
    }
    merged.push(b']');
    Some(merged)
}

/// The usage of several choices of the same prompts, as SGLang itself counts it: the prompt once, what was generated in sum.
fn sum_of_usage(usages: &[&[u8]]) -> Option<String> {
    let mut usages = usages
        .iter()
        .map(|usage| serde_json::from_slice::<Map<String, Json>>(usage).ok());
    let mut sum = usages.next()??;
    for usage in usages {
        add_usage(&mut sum, &usage?);
    }
    let part = |name| sum.get(name).and_then(Json::as_u64);
    if let (Some(prompt), Some(completion)) = (part("prompt_tokens"), part("completion_tokens")) {
        let total = Json::from(prompt.saturating_add(completion));
        sum.insert("total_tokens".to_owned(), total);
    }
    serde_json::to_string(&sum).ok()
}

fn add_usage(sum: &mut Map<String, Json>, usage: &Map<String, Json>) {
    for (name, value) in usage {
        if name.starts_with("prompt") || name == "total_tokens" {
            continue;
        }
        match (sum.get_mut(name), value) {
            (Some(Json::Object(inner)), Json::Object(value)) => add_usage(inner, value),
            (Some(have), value) => {
                if let (Some(a), Some(b)) = (have.as_u64(), value.as_u64()) {
                    *have = a.saturating_add(b).into();
                }
            }
            (None, value) => {
                sum.insert(name.clone(), value.clone());
            }
        }
    }
}

/// Rewrites the events of several choices so that they form one stream.
#[derive(Debug)]
pub(super) struct StreamMerge {
    is_generate: bool,
    choices: usize,
    /// The id of the first answer, as raw JSON: all events of one answer carry the same.
    id: Option<Vec<u8>>,
    /// The events that hold nothing but usage; one of them ends the stream.
    usages: Vec<Bytes>,
    is_done: bool,
}

impl StreamMerge {
    /// For so many choices, of `/generate` or of an OpenAI endpoint.
    pub(super) fn new(is_generate: bool, choices: usize) -> Self {
        Self {
            is_generate,
            choices,
            id: None,
            usages: Vec::new(),
            is_done: false,
        }
    }

    /// What the client gets for an event of `choice` with this data; what cannot be understood passes as it is.
    pub(super) fn event(&mut self, choice: usize, data: &Bytes) -> Bytes {
        if sse::is_done(data) {
            self.is_done = true;
            return Bytes::new();
        }
        let number = |prompt: usize| prompt.saturating_mul(self.choices).saturating_add(choice);
        if self.is_generate {
            let numbered = with_index(data, number);
            return sse::event(numbered.as_deref().unwrap_or(data));
        }
        let Some(scan) = scan_answer(data) else {
            return sse::event(data);
        };
        let mut edits = Vec::new();
        if let Some(list) = scan.noted(CHOICES).filter(|list| list.kind == Kind::Array) {
            if list.items == 0 && scan.noted(USAGE).is_some() && self.usages.len() < self.choices {
                self.usages.push(data.clone());
                return Bytes::new();
            }
            let raw = &data[list.range.clone()];
            for item in json_edit::elements(raw, BATCH_MAX).unwrap_or_default() {
                if let Some(numbered) = with_index(&raw[item.clone()], number) {
                    let at = list.range.start + item.start..list.range.start + item.end;
                    edits.push((at, Cow::Owned(numbered)));
                }
            }
        }
        if let Some(id) = scan.noted(ID) {
            let ours = self
                .id
                .get_or_insert_with(|| data[id.range.clone()].to_vec());
            edits.push((id.range.clone(), Cow::Borrowed(&ours[..])));
        }
        sse::event(&json_edit::splice(data, edits))
    }

    /// The last events, when all choices have ended.
    pub(super) fn finish(&mut self) -> Bytes {
        let mut out = BytesMut::new();
        if let Some(usage) = self.usage_event() {
            out.extend_from_slice(&sse::event(&usage));
        }
        if self.is_done {
            out.extend_from_slice(&sse::event(b"[DONE]"));
        }
        out.freeze()
    }

    fn usage_event(&self) -> Option<Vec<u8>> {
        let scans: Vec<Scan> = self
            .usages
            .iter()
            .map(|event| scan_answer(event))
            .collect::<Option<_>>()?;
        let usages = scans.iter().zip(&self.usages);
        let usages: Vec<&[u8]> = usages
            .map(|(scan, event)| Some(&event[scan.noted(USAGE)?.range.clone()]))
            .collect::<Option<_>>()?;
        let (first, event) = (scans.first()?, self.usages.first()?);
        let sum = sum_of_usage(&usages)?.into_bytes();
        let mut edits = vec![(first.noted(USAGE)?.range.clone(), Cow::Owned(sum))];
        if let (Some(id), Some(ours)) = (first.noted(ID), &self.id) {
            edits.push((id.range.clone(), Cow::Borrowed(&ours[..])));
        }
        Some(json_edit::splice(event, edits))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(texts: &[&'static str]) -> Vec<Bytes> {
        texts
            .iter()
            .map(|text| Bytes::from_static(text.as_bytes()))
            .collect()
    }

    #[test]
    fn answers_become_one() {
        let answers = bytes(&[
            r#"{"id":"a","big":1e400,"choices":[{"index":0,"text":"p0"},{"index":1,"text":"q0"}],"usage":{"prompt_tokens":5,"completion_tokens":2,"total_tokens":7,"completion_tokens_details":{"reasoning_tokens":1}}}"#,
            r#"{"id":"b","choices":[{"text":"p1","index" : 0},{"text":"q1"}],"usage":{"prompt_tokens":5,"completion_tokens":3,"total_tokens":8,"completion_tokens_details":{"reasoning_tokens":2}}}"#,
        ]);
        let merged = String::from_utf8(choices(&answers).unwrap()).unwrap();
        assert!(
            merged.starts_with(concat!(
                r#"{"id":"a","big":1e400,"choices":[{"index":0,"text":"p0"},{"text":"p1","index" : 1},"#,
                r#"{"index":2,"text":"q0"},{"index":3,"text":"q1"}],"usage":{"#
            )),
            "{merged}"
        );
        let usage: Json = serde_json::from_str(
            merged
                .split("\"usage\":")
                .nth(1)
                .unwrap()
                .strip_suffix('}')
                .unwrap(),
        )
        .unwrap();
        assert_eq!(
            usage,
            serde_json::json!({"prompt_tokens":5,"completion_tokens":5,"total_tokens":10,"completion_tokens_details":{"reasoning_tokens":3}})
        );
        for broken in ["{}", "[1]", "nothing", r#"{"choices":{}}"#] {
            assert_eq!(choices(&bytes(&[broken, broken])), None);
        }
    }

    #[test]
    fn generate_answers_become_a_list() {
        let single = lists(&bytes(&[r#"{"a":1e400}"#, r#" {"b":2} "#])).unwrap();
        assert_eq!(single, br#"[{"a":1e400},{"b":2}]"#);
        let batch = lists(&bytes(&[r#"[{"a":0},{"a":1}]"#, r#"[{"b":0}, {"b":1}]"#])).unwrap();
        assert_eq!(batch, br#"[{"a":0},{"b":0},{"a":1},{"b":1}]"#);
        assert_eq!(lists(&bytes(&["oops", "{}"])), None);
    }

    #[test]
    fn streams_share_an_id_and_end_once() {
        let mut merge = StreamMerge::new(false, 2);
        let mut feed = |choice, text: &'static str| {
            String::from_utf8(
                merge
                    .event(choice, &Bytes::from_static(text.as_bytes()))
                    .to_vec(),
            )
            .unwrap()
        };
        assert_eq!(
            feed(
                1,
                r#"{"id":"b","choices":[{"index":0,"delta":{}}],"usage":null}"#
            ),
            "data: {\"id\":\"b\",\"choices\":[{\"index\":1,\"delta\":{}}],\"usage\":null}\n\n"
        );
        assert_eq!(
            feed(0, r#"{"id":"a","choices":[{"delta":{},"index":1}]}"#),
            "data: {\"id\":\"b\",\"choices\":[{\"delta\":{},\"index\":2}]}\n\n"
        );
        let usage = r#"{"id":"a","choices":[],"usage":{"prompt_tokens":4,"completion_tokens":1}}"#;
        for choice in [0, 1] {
            assert_eq!(feed(choice, usage), "");
            assert_eq!(feed(choice, "[DONE]"), "");
        }
        assert_eq!(feed(0, "what?"), "data: what?\n\n");
        let end = String::from_utf8(merge.finish().to_vec()).unwrap();
        assert!(
            end.starts_with("data: {\"id\":\"b\",\"choices\":[],\"usage\":{"),
            "{end}"
        );
        assert!(end.contains("\"completion_tokens\":2") && end.contains("\"total_tokens\":6"));
        assert!(end.ends_with("}}\n\ndata: [DONE]\n\n"), "{end}");
    }

    #[test]
    fn generate_events_get_an_index() {
        let mut merge = StreamMerge::new(true, 3);
        for (choice, data, out) in [
            (2, r#"{"text":"x"}"#, r#"{"index":2,"text":"x"}"#),
            (1, r#"{"text":"x","index":4}"#, r#"{"text":"x","index":13}"#),
            (1, "{}", r#"{"index":1}"#),
        ] {
            let event = merge.event(choice, &Bytes::from_static(data.as_bytes()));
            assert_eq!(event, format!("data: {out}\n\n"));
        }
        assert_eq!(merge.finish(), "");
    }
}
