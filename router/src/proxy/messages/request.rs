//! An Anthropic request becomes a chat request.
//!
//! What both have in common (`model`, `max_tokens`, `temperature`, `stream`, …) and what the router does not know keeps its
//! bytes; so do schemas, texts and numbers inside what is translated.
#![forbid(unsafe_code)]

use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value as Json, json};

use crate::proxy::json_edit::{self, Disposition, Kind};
use crate::proxy::shape::ShapeError;

const SYSTEM: usize = 0;
const MESSAGES: usize = 1;
const TOOLS: usize = 2;
const TOOL_CHOICE: usize = 3;
const STOP: usize = 4;
const THINKING: usize = 5;
const STREAM: usize = 6;

/// A content block of any kind, with the fields of all kinds that are translated.
#[derive(Deserialize)]
struct Block<'a> {
    #[serde(rename = "type")]
    kind: String,
    #[serde(borrow)]
    text: Option<&'a RawValue>,
    #[serde(borrow)]
    thinking: Option<&'a RawValue>,
    #[serde(borrow)]
    id: Option<&'a RawValue>,
    #[serde(borrow)]
    name: Option<&'a RawValue>,
    #[serde(borrow)]
    input: Option<&'a RawValue>,
    #[serde(borrow)]
    tool_use_id: Option<&'a RawValue>,
    #[serde(borrow)]
    content: Option<&'a RawValue>,
    source: Option<Source>,
}

#[derive(Deserialize)]
struct Source {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    media_type: String,
    #[serde(default)]
    data: String,
    #[serde(default)]
    url: String,
}

#[derive(Deserialize)]
struct Message<'a> {
    role: String,
    #[serde(borrow)]
    content: &'a RawValue,
}

#[derive(Deserialize)]
struct Tool<'a> {
    #[serde(borrow)]
    name: &'a RawValue,
    #[serde(borrow)]
    description: Option<&'a RawValue>,
    #[serde(borrow)]
    input_schema: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct ToolChoice {
    #[serde(rename = "type")]
    kind: String,
    name: Option<String>,
    disable_parallel_tool_use: Option<bool>,
}

#[derive(Deserialize)]
struct Thinking {
    #[serde(rename = "type")]
    kind: String,
}

fn bad(what: &str, error: &serde_json::Error) -> ShapeError {
    ShapeError::Messages(format!("`{what}` is not what /v1/messages takes: {error}"))
}

/// The chat request for an Anthropic request.
///
/// # Errors
/// [`ShapeError`] when it is no Anthropic request, or holds blocks that chat has no place for.
pub fn to_chat(body: &[u8]) -> Result<Vec<u8>, ShapeError> {
    let scan = json_edit::scan(body, |key, _| match key {
        b"system" => Disposition::Take(SYSTEM),
        b"messages" => Disposition::Take(MESSAGES),
        b"tools" => Disposition::Take(TOOLS),
        b"tool_choice" => Disposition::Take(TOOL_CHOICE),
        b"stop_sequences" => Disposition::Take(STOP),
        b"thinking" => Disposition::Take(THINKING),
        b"stream" => Disposition::Note(STREAM),
        // One answer has one message; a usage event at the end is needed for `message_delta`.
        b"stream_options" | b"n" => Disposition::Drop,
        _ => Disposition::Keep,
    })?;
    let raw = |slot| {
        let value = scan.noted(slot)?;
        Some((&body[value.range.clone()], value.kind))
    };
    let mut messages = Vec::new();
    if let Some((system, kind)) = raw(SYSTEM) {
        messages.push(object(&[
            ("role", "\"system\""),
            ("content", &system_text(system, kind)?),
        ]));
    }
    let (given, _) =
        raw(MESSAGES).ok_or_else(|| ShapeError::Messages("`messages` is missing".to_owned()))?;
    let given: Vec<Message<'_>> =
        serde_json::from_slice(given).map_err(|error| bad("messages", &error))?;
    for message in &given {
        translate_message(message, &mut messages)?;
    }
    let mut members = vec![("messages", array(&messages))];
    if let Some((tools, _)) = raw(TOOLS) {
        members.push(("tools", translate_tools(tools)?));
    }
    if let Some((choice, _)) = raw(TOOL_CHOICE) {
        translate_tool_choice(choice, &mut members)?;
    }
    if let Some((stop, _)) = raw(STOP) {
        members.push(("stop", String::from_utf8_lossy(stop).into_owned()));
    }
    if let Some((thinking, _)) = raw(THINKING) {
        let thinking: Thinking =
            serde_json::from_slice(thinking).map_err(|error| bad("thinking", &error))?;
        // Templates know one or the other name, and ignore what they do not know.
        let on = thinking.kind != "disabled";
        let kwargs = json!({"thinking": on, "enable_thinking": on});
        members.push(("chat_template_kwargs", kwargs.to_string()));
    }
    if raw(STREAM).is_some_and(|(stream, _)| stream == b"true") {
        let options = "{\"include_usage\":true}".to_owned();
        members.push(("stream_options", options));
    }
    let members: Vec<String> = members
        .iter()
        .map(|(name, value)| format!("\"{name}\":{value}"))
        .collect();
    Ok(scan.inject(body, members.join(",").as_bytes()))
}

fn object(members: &[(&str, &str)]) -> String {
    let members: Vec<String> = members
        .iter()
        .map(|(name, value)| format!("\"{name}\":{value}"))
        .collect();
    format!("{{{}}}", members.join(","))
}

fn array(items: &[String]) -> String {
    format!("[{}]", items.join(","))
}

fn quoted(text: &str) -> String {
    Json::from(text).to_string()
}

/// The text of a raw JSON string.
fn unquoted(raw: Option<&RawValue>) -> String {
    raw.and_then(|raw| serde_json::from_str(raw.get()).ok())
        .unwrap_or_default()
}

fn blocks<'a>(raw: &'a str, what: &str) -> Result<Vec<Block<'a>>, ShapeError> {
    serde_json::from_str(raw).map_err(|error| bad(what, &error))
}

fn system_text(raw: &[u8], kind: Kind) -> Result<String, ShapeError> {
    let raw = String::from_utf8_lossy(raw);
    if kind == Kind::String {
        return Ok(raw.into_owned());
    }
    let texts: Vec<String> = blocks(&raw, "system")?
        .iter()
        .filter(|block| block.kind == "text")
        .map(|block| unquoted(block.text))
        .collect();
    Ok(quoted(&texts.join("\n")))
}

fn translate_message(message: &Message<'_>, out: &mut Vec<String>) -> Result<(), ShapeError> {
    let role = quoted(&message.role);
    let raw = message.content.get();
    if raw.starts_with('"') {
        out.push(object(&[("role", &role), ("content", raw)]));
        return Ok(());
    }
    let (mut parts, mut calls, mut thoughts) = (Vec::new(), Vec::new(), Vec::new());
    for block in blocks(raw, "content")? {
        match block.kind.as_str() {
            "thinking" => thoughts.push(unquoted(block.thinking)),
            // Encrypted for its author; no other model can read it.
            "redacted_thinking" => {}
            "tool_use" => calls.push(tool_call(&block)),
            "tool_result" => {
                let id = block.tool_use_id.map_or("\"\"", RawValue::get);
                let content = tool_result(&block)?;
                out.push(object(&[
                    ("role", "\"tool\""),
                    ("tool_call_id", id),
                    ("content", &content),
                ]));
            }
            _ => parts.push(part(&block)?),
        }
    }
    if parts.is_empty() && calls.is_empty() && thoughts.is_empty() {
        return Ok(());
    }
    let content = content_of(&parts);
    let (calls_text, thoughts) = (array(&calls), quoted(&thoughts.join("\n")));
    let mut members = vec![("role", role.as_str()), ("content", content.as_str())];
    if thoughts.len() > 2 {
        members.push(("reasoning_content", &thoughts));
    }
    if !calls.is_empty() {
        members.push(("tool_calls", &calls_text));
    }
    out.push(object(&members));
    Ok(())
}

/// A single text as a string, which every chat template takes; several parts as a list; none as null.
fn content_of(parts: &[Part]) -> String {
    match parts {
        [] => "null".to_owned(),
        [Part::Text(text)] => text.clone(),
        parts => array(&parts.iter().map(Part::json).collect::<Vec<_>>()),
    }
}

enum Part {
    /// A raw JSON string.
    Text(String),
    /// The URL of an image, as a raw JSON string.
    Image(String),
}

impl Part {
    fn json(&self) -> String {
        match self {
            Self::Text(text) => object(&[("type", "\"text\""), ("text", text)]),
            Self::Image(url) => {
                let url = object(&[("url", url)]);
                object(&[("type", "\"image_url\""), ("image_url", &url)])
            }
        }
    }
}

fn part(block: &Block<'_>) -> Result<Part, ShapeError> {
    match (block.kind.as_str(), &block.source) {
        ("text", _) => Ok(Part::Text(
            block.text.map_or("\"\"", RawValue::get).to_owned(),
        )),
        ("image", Some(source)) if source.kind == "base64" => Ok(Part::Image(quoted(&format!(
            "data:{};base64,{}",
            source.media_type, source.data
        )))),
        ("image", Some(source)) if source.kind == "url" => Ok(Part::Image(quoted(&source.url))),
        (kind, _) => Err(ShapeError::Messages(format!(
            "this router cannot translate a content block of type `{}` for chat",
            kind.chars().take(64).collect::<String>()
        ))),
    }
}

fn tool_call(block: &Block<'_>) -> String {
    let id = block.id.map_or("\"\"", RawValue::get);
    let name = block.name.map_or("\"\"", RawValue::get);
    let arguments = quoted(block.input.map_or("{}", RawValue::get));
    let function = object(&[("name", name), ("arguments", &arguments)]);
    object(&[
        ("id", id),
        ("type", "\"function\""),
        ("function", &function),
    ])
}

fn tool_result(block: &Block<'_>) -> Result<String, ShapeError> {
    let Some(content) = block.content else {
        return Ok("\"\"".to_owned());
    };
    if !content.get().starts_with('[') {
        return Ok(content.get().to_owned());
    }
    let parts = blocks(content.get(), "tool_result")?;
    let parts: Vec<Part> = parts.iter().map(part).collect::<Result<_, _>>()?;
    Ok(match content_of(&parts) {
        none if parts.is_empty() => none.replace("null", "\"\""),
        content => content,
    })
}

fn translate_tools(raw: &[u8]) -> Result<String, ShapeError> {
    let tools: Vec<Tool<'_>> = serde_json::from_slice(raw).map_err(|error| bad("tools", &error))?;
    let tools: Vec<String> = tools
        .iter()
        .map(|tool| {
            let mut function = vec![("name", tool.name.get())];
            function.extend(tool.description.map(|text| ("description", text.get())));
            function.extend(tool.input_schema.map(|schema| ("parameters", schema.get())));
            object(&[("type", "\"function\""), ("function", &object(&function))])
        })
        .collect();
    Ok(array(&tools))
}

fn translate_tool_choice(
    raw: &[u8],
    members: &mut Vec<(&'static str, String)>,
) -> Result<(), ShapeError> {
    let choice: ToolChoice =
        serde_json::from_slice(raw).map_err(|error| bad("tool_choice", &error))?;
    let chat = match (choice.kind.as_str(), &choice.name) {
        ("auto", _) => json!("auto"),
        ("any", _) => json!("required"),
        ("none", _) => json!("none"),
        ("tool", Some(name)) => json!({"type": "function", "function": {"name": name}}),
        _ => {
            return Err(ShapeError::Messages(
                "`tool_choice` must be auto, any, none, or tool with a name".to_owned(),
            ));
        }
    };
    members.push(("tool_choice", chat.to_string()));
    if let Some(disabled) = choice.disable_parallel_tool_use {
        members.push(("parallel_tool_calls", (!disabled).to_string()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(body: &str) -> Json {
        serde_json::from_slice(&to_chat(body.as_bytes()).unwrap()).unwrap()
    }

    #[test]
    fn plain_requests_keep_their_bytes() {
        let body = r#"{"model":"m", "max_tokens":  50,"temperature":0.70,"zzz":12345678901234567890123,"system":"be \u00e9","messages":[{"role":"user","content":"h\u00e9"}],"stop_sequences":["x", "y"],"stream":true}"#;
        assert_eq!(
            String::from_utf8(to_chat(body.as_bytes()).unwrap()).unwrap(),
            concat!(
                r#"{"messages":[{"role":"system","content":"be \u00e9"},{"role":"user","content":"h\u00e9"}],"#,
                r#""stop":["x", "y"],"stream_options":{"include_usage":true},"#,
                r#""model":"m", "max_tokens":  50,"temperature":0.70,"zzz":12345678901234567890123,"stream":true}"#
            )
        );
    }

    #[test]
    fn conversations_with_tools_become_chat() {
        let request = chat(
            r#"{"model":"m","max_tokens":9,"system":[{"type":"text","text":"a"},{"type":"text","text":"b","cache_control":{}}],
            "messages":[
                {"role":"user","content":[{"type":"text","text":"look"},{"type":"image","source":{"type":"base64","media_type":"image/png","data":"QQ=="}}]},
                {"role":"assistant","content":[{"type":"thinking","thinking":"hm","signature":"s"},{"type":"text","text":"I call"},
                    {"type":"tool_use","id":"t1","name":"f","input":{"x":1.50}}]},
                {"role":"user","content":[{"type":"tool_result","tool_use_id":"t1","content":[{"type":"text","text":"42"}]},
                    {"type":"tool_result","tool_use_id":"t2","content":[]},{"type":"text","text":"go on"}]}],
            "tools":[{"name":"f","description":"d","input_schema":{"type":"object","properties":{"x":{"minimum":1e400}}}}],
            "tool_choice":{"type":"tool","name":"f","disable_parallel_tool_use":true},"thinking":{"type":"enabled","budget_tokens":9}}"#
                .replace("1e400", "1")
                .as_str(),
        );
        assert_eq!(
            request["messages"],
            json!([
                {"role":"system","content":"a\nb"},
                {"role":"user","content":[{"type":"text","text":"look"},{"type":"image_url","image_url":{"url":"data:image/png;base64,QQ=="}}]},
                {"role":"assistant","content":"I call","reasoning_content":"hm",
                    "tool_calls":[{"id":"t1","type":"function","function":{"name":"f","arguments":"{\"x\":1.50}"}}]},
                {"role":"tool","tool_call_id":"t1","content":"42"},
                {"role":"tool","tool_call_id":"t2","content":""},
                {"role":"user","content":"go on"},
            ])
        );
        assert_eq!(
            request["tools"],
            json!([{"type":"function","function":{"name":"f","description":"d",
                "parameters":{"type":"object","properties":{"x":{"minimum":1}}}}}])
        );
        assert_eq!(
            request["tool_choice"],
            json!({"type":"function","function":{"name":"f"}})
        );
        assert_eq!(request["parallel_tool_calls"], false);
        assert_eq!(request["chat_template_kwargs"]["enable_thinking"], true);
    }

    #[test]
    fn what_cannot_be_translated_is_refused() {
        for (body, part) in [
            (r#"{"model":"m"}"#, "`messages` is missing"),
            (r#"{"messages":3}"#, "`messages`"),
            (
                r#"{"messages":[{"role":"user","content":[{"type":"document"}]}]}"#,
                "`document`",
            ),
            (
                r#"{"messages":[],"tool_choice":{"type":"tool"}}"#,
                "tool_choice",
            ),
            (r#"{"messages":[],"tools":[1]}"#, "`tools`"),
            ("[]", "object"),
        ] {
            let error = to_chat(body.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(part), "{body}: {error}");
        }
    }

    proptest::proptest! {
        #[test]
        fn cut_bodies_never_panic(cut in 0..200usize) {
            let body = r#"{"messages":[{"role":"user","content":[{"type":"tool_result","tool_use_id":"t","content":"é"}]}],"tools":[{"name":"f"}],"thinking":{"type":"disabled"}}"#;
            let cut = cut.min(body.len());
            let _ = to_chat(&body.as_bytes()[..cut]);
        }
    }
}
