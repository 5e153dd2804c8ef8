//! A chat answer becomes an Anthropic one, whole or event by event.
#![forbid(unsafe_code)]

use bytes::BytesMut;
use serde_json::{Value as Json, json};

use crate::proxy::sse::{self, InbandAbort};

/// The Anthropic name of a chat `finish_reason`, and the stop sequence that was met, if the worker tells.
fn stop_reason(choice: &Json) -> (Json, Json) {
    let met = choice.get("matched_stop").filter(|stop| stop.is_string());
    let reason = match choice.get("finish_reason").and_then(Json::as_str) {
        Some("length") => "max_tokens",
        Some("tool_calls" | "function_call") => "tool_use",
        Some("content_filter") => "refusal",
        _ if met.is_some() => "stop_sequence",
        _ => "end_turn",
    };
    (reason.into(), met.cloned().unwrap_or(Json::Null))
}

fn usage(chat: &Json) -> Json {
    let count = |path: &str| chat.pointer(path).and_then(Json::as_u64).unwrap_or(0);
    let cached = count("/prompt_tokens_details/cached_tokens");
    // Anthropic counts what came from a cache apart from the rest of the input.
    let mut usage = json!({
        "input_tokens": count("/prompt_tokens").saturating_sub(cached),
        "output_tokens": count("/completion_tokens"),
    });
    if cached > 0 {
        usage["cache_read_input_tokens"] = cached.into();
    }
    usage
}

fn message_id(chat: &Json) -> String {
    let id = chat.get("id").and_then(Json::as_str).unwrap_or_default();
    format!("msg_{id}")
}

fn text_of<'a>(of: &'a Json, name: &str) -> Option<&'a str> {
    of.get(name)
        .and_then(Json::as_str)
        .filter(|text| !text.is_empty())
}

/// The message for a whole chat answer; `None` if it is none.
pub fn whole(answer: &[u8], model: &str) -> Option<Vec<u8>> {
    let chat: Json = serde_json::from_slice(answer).ok()?;
    let choice = chat.pointer("/choices/0")?;
    let message = choice.get("message")?;
    let mut content = Vec::new();
    if let Some(thinking) = text_of(message, "reasoning_content") {
        content.push(json!({"type": "thinking", "thinking": thinking, "signature": ""}));
    }
    if let Some(text) = text_of(message, "content") {
        content.push(json!({"type": "text", "text": text}));
    }
    let calls = message.get("tool_calls").and_then(Json::as_array);
    for call in calls.into_iter().flatten() {
        let arguments = call.pointer("/function/arguments").and_then(Json::as_str);
        let input = arguments.and_then(|text| serde_json::from_str::<Json>(text).ok());
        content.push(json!({
            "type": "tool_use",
            "id": call.get("id"),
            "name": call.pointer("/function/name"),
            "input": input.unwrap_or_else(|| json!({})),
        }));
    }
    let (reason, sequence) = stop_reason(choice);
    let message = json!({
        "id": message_id(&chat),
        "type": "message",
        "role": "assistant",
        "model": chat.get("model").and_then(Json::as_str).unwrap_or(model),
        "content": content,
        "stop_reason": reason,
        "stop_sequence": sequence,
        "usage": usage(chat.get("usage").unwrap_or(&Json::Null)),
    });
    serde_json::to_vec(&message).ok()
}

/// What kind of content block is open in a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Open {
    Thinking,
    Text,
    /// The tool call with this number.
    Tool(u64),
}

/// Translates the events of a chat stream one by one.
#[derive(Debug)]
pub struct StreamTranslator {
    model: String,
    is_begun: bool,
    is_over: bool,
    /// Blocks opened so far.
    blocks: u64,
    open: Option<Open>,
    stop: Option<(Json, Json)>,
    usage: Json,
}

fn put(out: &mut BytesMut, event: &Json) {
    let name = event.get("type").and_then(Json::as_str).unwrap_or("ping");
    out.extend_from_slice(format!("event: {name}\ndata: {event}\n\n").as_bytes());
}

impl StreamTranslator {
    /// For an answer of `model`, as the client named it.
    pub fn new(model: String) -> Self {
        Self {
            model,
            is_begun: false,
            is_over: false,
            blocks: 0,
            open: None,
            stop: None,
            usage: usage(&Json::Null),
        }
    }

    /// Whether the message has ended, well or not.
    pub fn is_over(&self) -> bool {
        self.is_over
    }

    /// Takes the data of the next chat event.
    pub fn event(&mut self, data: &[u8], out: &mut BytesMut) {
        if self.is_over || data.is_empty() || sse::is_done(data) {
            return;
        }
        if let Some(abort) = InbandAbort::of_data(data) {
            self.fail(&abort.message, out);
            return;
        }
        let Ok(chat) = serde_json::from_slice::<Json>(data) else {
            self.fail("the worker sent an event that is no JSON", out);
            return;
        };
        if let Some(counted) = chat.get("usage").filter(|counted| !counted.is_null()) {
            self.usage = usage(counted);
        }
        self.begin(&chat, out);
        let Some(choice) = chat.pointer("/choices/0") else {
            return;
        };
        if let Some(delta) = choice.get("delta") {
            self.delta(delta, out);
        }
        if choice
            .get("finish_reason")
            .is_some_and(|reason| !reason.is_null())
        {
            self.stop = Some(stop_reason(choice));
        }
    }

    fn begin(&mut self, chat: &Json, out: &mut BytesMut) {
        if self.is_begun {
            return;
        }
        self.is_begun = true;
        let message = json!({
            "id": message_id(chat),
            "type": "message",
            "role": "assistant",
            "model": chat.get("model").and_then(Json::as_str).unwrap_or(&self.model),
            "content": [],
            "stop_reason": null,
            "stop_sequence": null,
            "usage": self.usage,
        });
        put(out, &json!({"type": "message_start", "message": message}));
    }

    fn delta(&mut self, delta: &Json, out: &mut BytesMut) {
        if let Some(text) = text_of(delta, "reasoning_content") {
            let block = json!({"type": "thinking", "thinking": "", "signature": ""});
            self.switch(Open::Thinking, &block, out);
            self.put_delta(&json!({"type": "thinking_delta", "thinking": text}), out);
        }
        if let Some(text) = text_of(delta, "content") {
            self.switch(Open::Text, &json!({"type": "text", "text": ""}), out);
            self.put_delta(&json!({"type": "text_delta", "text": text}), out);
        }
        let calls = delta.get("tool_calls").and_then(Json::as_array);
        for call in calls.into_iter().flatten() {
            let number = call.get("index").and_then(Json::as_u64).unwrap_or(0);
            let block = json!({
                "type": "tool_use",
                "id": call.get("id"),
                "name": call.pointer("/function/name"),
                "input": {},
            });
            self.switch(Open::Tool(number), &block, out);
            let arguments = call.pointer("/function/arguments").and_then(Json::as_str);
            if let Some(part) = arguments.filter(|part| !part.is_empty()) {
                self.put_delta(
                    &json!({"type": "input_json_delta", "partial_json": part}),
                    out,
                );
            }
        }
    }

    /// Closes the open block and opens `block`, unless it is the one that is open.
    fn switch(&mut self, wanted: Open, block: &Json, out: &mut BytesMut) {
        if self.open == Some(wanted) {
            return;
        }
        self.close(out);
        self.open = Some(wanted);
        let start =
            json!({"type": "content_block_start", "index": self.blocks, "content_block": block});
        put(out, &start);
    }

    fn close(&mut self, out: &mut BytesMut) {
        if self.open.take().is_some() {
            put(
                out,
                &json!({"type": "content_block_stop", "index": self.blocks}),
            );
            self.blocks += 1;
        }
    }

    fn put_delta(&self, delta: &Json, out: &mut BytesMut) {
        put(
            out,
            &json!({"type": "content_block_delta", "index": self.blocks, "delta": delta}),
        );
    }

    /// Ends the message, when the chat stream has ended.
    pub fn finish(&mut self, out: &mut BytesMut) {
        if self.is_over {
            return;
        }
        let Some((reason, sequence)) = self.stop.take() else {
            self.fail("the worker's answer has no end", out);
            return;
        };
        self.close(out);
        put(
            out,
            &json!({
                "type": "message_delta",
                "delta": {"stop_reason": reason, "stop_sequence": sequence},
                "usage": self.usage,
            }),
        );
        put(out, &json!({"type": "message_stop"}));
        self.is_over = true;
    }

    /// Ends the stream with an error event.
    pub fn fail(&mut self, message: &str, out: &mut BytesMut) {
        if !self.is_over {
            self.close(out);
            put(
                out,
                &json!({"type": "error", "error": {"type": "api_error", "message": message}}),
            );
            self.is_over = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn translated(events: &[Json], ends: bool) -> Vec<Json> {
        let mut translator = StreamTranslator::new("m".to_owned());
        let mut out = BytesMut::new();
        for event in events {
            translator.event(event.to_string().as_bytes(), &mut out);
        }
        translator.event(b"[DONE]", &mut out);
        if ends {
            translator.finish(&mut out);
        }
        let text = String::from_utf8(out.to_vec()).unwrap();
        text.split_terminator("\n\n")
            .map(|event| {
                let (name, data) = event.split_once('\n').unwrap();
                let data: Json =
                    serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
                assert_eq!(
                    name.strip_prefix("event: ").unwrap(),
                    data["type"].as_str().unwrap()
                );
                data
            })
            .collect()
    }

    fn delta(delta: &Json) -> Json {
        json!({"id": "c1", "choices": [{"index": 0, "delta": delta, "finish_reason": null}]})
    }

    #[test]
    fn whole_answers_become_messages() {
        let chat = json!({"id": "c1", "model": "real", "choices": [{"message": {
            "content": "hi", "reasoning_content": "hm", "tool_calls": [
                {"id": "t", "function": {"name": "f", "arguments": "{\"x\":1}"}}]},
            "finish_reason": "tool_calls"}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 3}}});
        let message: Json =
            serde_json::from_slice(&whole(chat.to_string().as_bytes(), "m").unwrap()).unwrap();
        assert_eq!(
            message,
            json!({"id": "msg_c1", "type": "message", "role": "assistant", "model": "real",
                "content": [{"type": "thinking", "thinking": "hm", "signature": ""}, {"type": "text", "text": "hi"},
                    {"type": "tool_use", "id": "t", "name": "f", "input": {"x": 1}}],
                "stop_reason": "tool_use", "stop_sequence": null,
                "usage": {"input_tokens": 7, "output_tokens": 4, "cache_read_input_tokens": 3}})
        );
        for (reason, stop, expected) in [
            ("stop", Json::Null, ("end_turn", Json::Null)),
            ("stop", json!("END"), ("stop_sequence", json!("END"))),
            ("stop", json!(151645), ("end_turn", Json::Null)),
            ("length", Json::Null, ("max_tokens", Json::Null)),
        ] {
            let chat = json!({"choices": [{"message": {"content": ""}, "finish_reason": reason, "matched_stop": stop}]});
            let message = whole(chat.to_string().as_bytes(), "m").unwrap();
            let message: Json = serde_json::from_slice(&message).unwrap();
            assert_eq!(
                (
                    message["stop_reason"].as_str().unwrap(),
                    message["stop_sequence"].clone()
                ),
                expected
            );
            assert_eq!(message["model"], "m");
        }
        assert_eq!(whole(b"{\"choices\":[]}", "m"), None);
    }

    #[test]
    fn streams_open_and_close_every_block() {
        let events = translated(
            &[
                delta(&json!({"role": "assistant", "content": ""})),
                delta(&json!({"reasoning_content": "hm"})),
                delta(&json!({"content": "Hel"})),
                delta(&json!({"content": "lo"})),
                delta(
                    &json!({"tool_calls": [{"index": 0, "id": "t0", "function": {"name": "f", "arguments": ""}}]}),
                ),
                delta(&json!({"tool_calls": [{"index": 0, "function": {"arguments": "{\"x\":"}}]})),
                delta(&json!({"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]})),
                delta(
                    &json!({"tool_calls": [{"index": 1, "id": "t1", "function": {"name": "g", "arguments": "{}"}}]}),
                ),
                json!({"id": "c1", "choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]}),
                json!({"id": "c1", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 9}}),
            ],
            true,
        );
        let kinds: Vec<_> = events
            .iter()
            .map(|event| {
                let index = event.get("index").map_or(String::new(), Json::to_string);
                format!("{}{index}", event["type"].as_str().unwrap())
            })
            .collect();
        let block = |index: usize, deltas: usize| {
            let mut names = vec![format!("content_block_start{index}")];
            names.extend(vec![format!("content_block_delta{index}"); deltas]);
            names.push(format!("content_block_stop{index}"));
            names
        };
        let expected = [
            vec!["message_start".to_owned()],
            block(0, 1),
            block(1, 2),
            block(2, 2),
            block(3, 1),
            vec!["message_delta".to_owned(), "message_stop".to_owned()],
        ];
        assert_eq!(kinds, expected.concat());
        let end = &events[events.len() - 2];
        assert_eq!(end["delta"]["stop_reason"], "tool_use");
        assert_eq!(end["usage"], json!({"input_tokens": 3, "output_tokens": 9}));
    }

    #[test]
    fn failures_end_the_stream_with_an_error() {
        let begun = delta(&json!({"content": "x"}));
        for (events, part) in [
            (
                vec![
                    begun.clone(),
                    json!({"error": {"message": "lost", "code": 502}}),
                ],
                "lost",
            ),
            (vec![begun], "no end"),
        ] {
            let events = translated(&events, true);
            let (last, before) = (&events[events.len() - 1], &events[events.len() - 2]);
            assert_eq!(before["type"], "content_block_stop");
            assert!(
                last["error"]["message"].as_str().unwrap().contains(part),
                "{last}"
            );
        }
    }
}
