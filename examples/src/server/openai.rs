//! `/v1/chat/completions` and `/v1/completions` in OpenAI's shapes, with SGLang's additions (`matched_stop`).

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream::{self, Stream, StreamExt as _};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::App;
use super::intake::{Intake, OneOrMany, Routing, Wish, parse};
use super::refusal::Refusal;
use super::sse;
use super::ticket::{Progress, Ticket, failure};
use crate::clock::unix_seconds;
use crate::scheduler::job::{Finish, Outcome};
use crate::text;

/// The fields that both endpoints share.
#[derive(Deserialize)]
struct Options {
    model: Option<String>,
    max_tokens: Option<usize>,
    max_completion_tokens: Option<usize>,
    temperature: Option<f32>,
    seed: Option<u64>,
    stop: Option<OneOrMany<String>>,
    #[serde(default)]
    ignore_eos: bool,
    n: Option<usize>,
    #[serde(default)]
    stream: bool,
    stream_options: Option<StreamOptions>,
    #[serde(flatten)]
    routing: Routing,
}

#[derive(Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

#[derive(Deserialize)]
struct ChatBody {
    messages: Vec<Message>,
    #[serde(flatten)]
    options: Options,
}

#[derive(Deserialize)]
struct Message {
    role: String,
    content: Option<Content>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

/// A part of a message; only text can be read by this model.
#[derive(Deserialize)]
struct Part {
    r#type: String,
    text: Option<String>,
}

#[derive(Deserialize)]
struct CompletionBody {
    prompt: Prompt,
    #[serde(flatten)]
    options: Options,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    TokenLists(Vec<Vec<u32>>),
}

/// Which of the two shapes an answer has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    Chat,
    Completion,
}

/// What every answer of one request repeats.
#[derive(Clone)]
struct Head {
    shape: Shape,
    id: String,
    created: u64,
    model: String,
    include_usage: bool,
}

#[derive(Serialize)]
struct Answer<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<Choice>,
    usage: Option<Usage>,
}

#[derive(Serialize)]
struct Choice {
    index: usize,
    #[serde(flatten)]
    content: ChoiceContent,
    logprobs: Option<Value>,
    finish_reason: Option<&'static str>,
    matched_stop: Option<Value>,
}

#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum ChoiceContent {
    Message(ChatMessage),
    Delta(Delta),
    Text(String),
}

#[derive(Serialize)]
struct ChatMessage {
    role: &'static str,
    content: String,
    reasoning_content: Option<String>,
    tool_calls: Option<Vec<Value>>,
}

#[derive(Default, Serialize)]
struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
}

#[derive(Clone, Copy, Default, Serialize)]
struct Usage {
    prompt_tokens: usize,
    total_tokens: usize,
    completion_tokens: usize,
    prompt_tokens_details: Option<PromptDetails>,
}

#[derive(Clone, Copy, Serialize)]
struct PromptDetails {
    cached_tokens: usize,
}

/// The handler of `/v1/chat/completions`.
pub(super) async fn chat(State(app): State<Arc<App>>, body: Bytes) -> Result<Response, Refusal> {
    let body: ChatBody = parse(&body)?;
    if body.messages.is_empty() {
        return Err(Refusal::bad_request("Messages cannot be empty."));
    }
    let contents = body
        .messages
        .iter()
        .map(Message::text)
        .collect::<Result<Vec<_>, _>>()?;
    let roles = body.messages.iter().map(|m| m.role.as_str());
    let prompt = text::encode_chat(roles.zip(contents.iter().map(String::as_str)));
    answer(&app, Shape::Chat, vec![prompt], false, body.options).await
}

/// The handler of `/v1/completions`.
pub(super) async fn complete(
    State(app): State<Arc<App>>,
    body: Bytes,
) -> Result<Response, Refusal> {
    let body: CompletionBody = parse(&body)?;
    let (prompts, is_batch) = match body.prompt {
        Prompt::Text(text) => (vec![text::encode(&text)], false),
        Prompt::Tokens(tokens) => (vec![tokens], false),
        Prompt::Texts(texts) => (texts.iter().map(|t| text::encode(t)).collect(), true),
        Prompt::TokenLists(lists) => (lists, true),
    };
    answer(&app, Shape::Completion, prompts, is_batch, body.options).await
}

impl Message {
    fn text(&self) -> Result<String, Refusal> {
        match &self.content {
            None => Ok(String::new()),
            Some(Content::Text(text)) => Ok(text.clone()),
            Some(Content::Parts(parts)) => parts
                .iter()
                .map(|part| match (part.r#type.as_str(), &part.text) {
                    ("text", Some(text)) => Ok(text.as_str()),
                    (kind, _) => Err(Refusal::bad_request(format!(
                        "message parts of type {kind:?} are not supported, only text"
                    ))),
                })
                .collect(),
        }
    }
}

async fn answer(
    app: &App,
    shape: Shape,
    prompts: Vec<Vec<u32>>,
    is_batch: bool,
    options: Options,
) -> Result<Response, Refusal> {
    if options.n.is_some_and(|n| n != 1) {
        return Err(Refusal::bad_request(
            "n must be 1; send one request per sample",
        ));
    }
    let wish = Wish {
        max_new_tokens: options.max_completion_tokens.or(options.max_tokens),
        temperature: options.temperature,
        seed: options.seed,
        stop: options.stop,
        ignore_eos: options.ignore_eos,
    };
    let wishes = vec![wish; prompts.len()];
    let tickets = Intake {
        prompts,
        wishes,
        routing: options.routing,
        is_batch,
    }
    .submit(app)?;
    let head = Head {
        shape,
        id: tickets[0].rid.clone(),
        created: unix_seconds(),
        model: options.model.unwrap_or_else(|| app.facts.model.clone()),
        include_usage: options.stream_options.is_some_and(|o| o.include_usage),
    };
    if options.stream {
        return Ok(sse::response(streamed(head, tickets)));
    }
    let (mut choices, mut usage) = (vec![], Usage::default());
    let mut tickets = std::collections::VecDeque::from(tickets);
    while let Some(mut ticket) = tickets.pop_front() {
        let (progress, outcome) = ticket.wait().await?;
        usage.add(&outcome);
        let content = match shape {
            Shape::Completion => ChoiceContent::Text(progress.text),
            Shape::Chat => ChoiceContent::Message(ChatMessage {
                role: "assistant",
                content: progress.text,
                reasoning_content: None,
                tool_calls: None,
            }),
        };
        choices.push(Choice::new(choices.len(), content, Some(&outcome)));
    }
    Ok(Json(head.answer(false, choices, Some(usage))).into_response())
}

/// The chunks of all members as they come, and the usage of all at the end if it was asked for.
fn streamed(head: Head, tickets: Vec<Ticket>) -> impl Stream<Item = String> + Send {
    let usage = Arc::new(std::sync::Mutex::new(Usage::default()));
    let members = tickets
        .into_iter()
        .enumerate()
        .map(|(index, ticket)| Box::pin(chunks(head.clone(), index, ticket, usage.clone())));
    let chunks = stream::select_all(members.collect::<Vec<_>>());
    let last = stream::once(async move {
        let usage = *usage
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        head.include_usage
            .then(|| sse::event(&head.answer(true, vec![], Some(usage))))
    });
    chunks.chain(last.filter_map(std::future::ready))
}

/// One member's chunks: the role, each piece of text, the reason of the end.
fn chunks(
    head: Head,
    index: usize,
    ticket: Ticket,
    usage: Arc<std::sync::Mutex<Usage>>,
) -> impl Stream<Item = String> + Send {
    let role = Delta {
        role: Some("assistant"),
        content: Some(String::new()),
    };
    let opening = (head.shape == Shape::Chat)
        .then(|| head.chunk(Choice::new(index, ChoiceContent::Delta(role), None)));
    let state = Some((ticket, Progress::default()));
    let rest = stream::unfold(state, move |state| {
        let (head, usage) = (head.clone(), usage.clone());
        async move {
            let (mut ticket, mut progress) = state?;
            loop {
                let text = match ticket.advance(&mut progress).await {
                    Ok(text) => text,
                    Err(refusal) => return Some((in_band(&refusal), None)),
                };
                if let Some(outcome) = &progress.outcome {
                    if let Err(refusal) = failure(outcome) {
                        return Some((in_band(&refusal), None));
                    }
                    usage
                        .lock()
                        .unwrap_or_else(std::sync::PoisonError::into_inner)
                        .add(outcome);
                    let content = head.piece(None);
                    return Some((head.chunk(Choice::new(index, content, Some(outcome))), None));
                }
                if !text.is_empty() {
                    let chunk = head.chunk(Choice::new(index, head.piece(Some(text)), None));
                    return Some((chunk, Some((ticket, progress))));
                }
            }
        }
    });
    stream::iter(opening).chain(rest)
}

/// A failure after the headers were sent.
fn in_band(refusal: &Refusal) -> String {
    sse::event(&json!({ "error": refusal.body() }))
}

impl Head {
    fn answer(&self, streamed: bool, choices: Vec<Choice>, usage: Option<Usage>) -> Answer<'_> {
        let object = match (self.shape, streamed) {
            (Shape::Chat, false) => "chat.completion",
            (Shape::Chat, true) => "chat.completion.chunk",
            (Shape::Completion, _) => "text_completion",
        };
        let (id, created, model) = (self.id.as_str(), self.created, self.model.as_str());
        Answer {
            id,
            object,
            created,
            model,
            choices,
            usage,
        }
    }

    fn chunk(&self, choice: Choice) -> String {
        sse::event(&self.answer(true, vec![choice], None))
    }

    fn piece(&self, text: Option<String>) -> ChoiceContent {
        match self.shape {
            Shape::Chat => ChoiceContent::Delta(Delta {
                role: None,
                content: text,
            }),
            Shape::Completion => ChoiceContent::Text(text.unwrap_or_default()),
        }
    }
}

impl Choice {
    fn new(index: usize, content: ChoiceContent, outcome: Option<&Outcome>) -> Self {
        let (finish_reason, matched_stop) = match outcome.map(|o| &o.finish) {
            None => (None, None),
            Some(Finish::Length) => (Some("length"), None),
            Some(Finish::EndOfSequence(token)) => (Some("stop"), Some(json!(token))),
            Some(Finish::StopText(text)) => (Some("stop"), Some(json!(text))),
            Some(Finish::Aborted(_)) => (Some("abort"), None),
        };
        Self {
            index,
            content,
            logprobs: None,
            finish_reason,
            matched_stop,
        }
    }
}

impl Usage {
    fn add(&mut self, outcome: &Outcome) {
        self.prompt_tokens += outcome.prompt_tokens;
        self.completion_tokens += outcome.completion_tokens;
        self.total_tokens += outcome.prompt_tokens + outcome.completion_tokens;
        if outcome.cached_tokens > 0 {
            let cached = self.prompt_tokens_details.map_or(0, |d| d.cached_tokens);
            let cached_tokens = cached + outcome.cached_tokens;
            self.prompt_tokens_details = Some(PromptDetails { cached_tokens });
        }
    }
}
