//! What the router must know of a request body: how many prompts it carries, which ids it wants, and nothing else.
//!
//! The rules are those of SGLang's `GenerateReqInput` (a list of token ids is one prompt, a list of lists a batch) and
//! of its OpenAI request classes.
#![forbid(unsafe_code)]

use std::borrow::Cow;
use std::ops::Range;

use memchr::memmem;

use super::json_edit::{self, Disposition, JsonError, Kind, Scan, Value};

/// How many prompts one request may carry: each costs a room, some sixty bytes of JSON and, on failure, an abort call.
pub const BATCH_MAX: usize = 16_384;

/// How long one id of the client's may be, in raw JSON bytes: it is repeated in abort calls, once per item of a batch.
pub const RID_BYTES_MAX: usize = 512;

/// How many choices one request may ask for, OpenAI's own limit: each becomes a pair of requests.
pub const CHOICES_MAX: usize = 128;

/// Longest model name or sticky key that is looked at, in raw JSON bytes.
const NAME_BYTES_MAX: usize = 1024;

/// What SGLang's `SamplingParams` sets for `/generate` where the client sets no bound.
const GENERATE_TOKENS: u64 = 128;

/// What SGLang's `CompletionRequest` sets; chats and responses may fill the model's context.
const COMPLETION_TOKENS: u64 = 16;

/// Which request class a path has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PairEndpoint {
    /// SGLang's native `/generate`.
    Generate,
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completions,
    /// `/v1/responses`
    Responses,
}

impl PairEndpoint {
    /// The path on the router and on the workers.
    pub const fn path(self) -> &'static str {
        match self {
            Self::Generate => "/generate",
            Self::Chat => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
            Self::Responses => "/v1/responses",
        }
    }

    /// Whether SGLang reads override headers there (`entrypoints/request_headers.py`).
    pub const fn takes_overrides(self) -> bool {
        matches!(self, Self::Generate | Self::Chat)
    }
}

/// Why a well-formed body cannot be served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ShapeError {
    /// The body is no JSON object.
    #[error(transparent)]
    Json(#[from] JsonError),
    /// More choices per prompt than [`CHOICES_MAX`], or with the batch more than [`BATCH_MAX`] in all.
    #[error(
        "n = {choices} is too much: at most {CHOICES_MAX} choices, and {BATCH_MAX} answers in one request"
    )]
    TooManyChoices {
        /// Choices asked for.
        choices: usize,
    },
    /// The sampling parameters of a batch disagree about `n`.
    #[error("all sampling_params of a batch must have the same `n`")]
    UnevenChoices,
    /// An Anthropic request that has no equivalent.
    #[error("{0}")]
    Messages(String),
    /// A batch without items.
    #[error("the list of prompts is empty")]
    EmptyBatch,
    /// A client's id above [`RID_BYTES_MAX`].
    #[error("a `rid` may have {RID_BYTES_MAX} bytes at most")]
    RidTooLong,
    /// A batch above [`BATCH_MAX`].
    #[error("the list has {items} prompts; at most {BATCH_MAX} are served in one request")]
    BatchTooLarge {
        /// Items found.
        items: usize,
    },
}

/// What is known of a request body.
#[derive(Clone, Debug, Default)]
pub struct Shape {
    /// Where the members lie; `None` when the body was not looked into and travels as it is.
    pub scan: Option<Scan>,
    /// Prompts in the list, or `None` for a single prompt (whose bootstrap fields are scalars).
    pub batch: Option<usize>,
    /// The ids the client chose, as raw JSON values; empty when the router must choose.
    pub client_rids: Vec<String>,
    /// Choices per prompt, `n`. Pairs serve one each.
    pub choices: usize,
    /// Where `n` stands, for [`single_choice`].
    choice_ranges: Vec<Range<usize>>,
    /// The answer shall come as an event stream.
    pub streams: bool,
    /// The answer shall hold the prompt's log-probabilities, which only prefill knows.
    pub wants_logprobs: bool,
    /// The model asked for.
    pub model: Option<String>,
    /// The client's `priority`; more is more important.
    pub priority: i64,
    /// Requests with the same key prefer the same workers.
    pub sticky: Option<String>,
    /// The data-parallel rank a trusted client chose.
    pub rank: Option<u32>,
    /// Most tokens that each answer may have: the client's bound, else SGLang's default for the endpoint, if it has one.
    pub output_tokens: Option<u64>,
    /// Where the prompt stands, and whether it is a list of token ids.
    pub prompt: Option<(Range<usize>, bool)>,
}

impl Shape {
    /// Where the value of `model` stands, if it is a string that was read.
    pub fn model_range(&self) -> Option<Range<usize>> {
        self.model.as_ref()?;
        Some(self.scan.as_ref()?.noted(MODEL)?.range.clone())
    }

    /// The shape of a body that [`is_plain`] and travels as it is.
    pub fn opaque() -> Self {
        Self {
            choices: 1,
            ..Self::default()
        }
    }
}

/// What a client may set.
#[derive(Clone, Copy, Debug, Default)]
pub struct Trust {
    /// Data-parallel ranks.
    pub rank: bool,
    /// The ids of its requests. Not where one request becomes several, which cannot share one.
    pub rid: bool,
}

/// Scans `body` for `endpoint`. What the client may not set is left out of what goes on.
///
/// # Errors
/// [`ShapeError`]; every one of them is the client's mistake or wish.
pub fn read(endpoint: PairEndpoint, body: &[u8], trust: Trust) -> Result<Shape, ShapeError> {
    let scan = json_edit::scan(body, |key, value| judge(key, value, trust))?;
    let raw = |slot| {
        scan.noted(slot)
            .map(|value| (&body[value.range.clone()], value))
    };
    let Sampling {
        choices,
        choice_ranges,
        output_tokens,
    } = match (endpoint, raw(CHOICES), scan.noted(SAMPLING)) {
        (PairEndpoint::Generate, _, Some(params)) => sampling_of_params(body, params)?,
        (PairEndpoint::Chat | PairEndpoint::Completions, Some((text, value)), _) => Sampling {
            choices: choices(text),
            choice_ranges: vec![value.range.clone()],
            output_tokens: None,
        },
        _ => Sampling::default(),
    };
    let output_tokens = match endpoint {
        PairEndpoint::Generate => output_tokens.or(Some(GENERATE_TOKENS)),
        PairEndpoint::Completions => bound(raw(MAX_TOKENS)).or(Some(COMPLETION_TOKENS)),
        PairEndpoint::Chat | PairEndpoint::Responses => bound(raw(MAX_TOKENS)),
    };
    let batch = match batch_items(endpoint, &scan) {
        Some(0) => return Err(ShapeError::EmptyBatch),
        Some(items) if items > BATCH_MAX => return Err(ShapeError::BatchTooLarge { items }),
        batch => batch,
    };
    if choices > CHOICES_MAX || batch.unwrap_or(1).saturating_mul(choices) > BATCH_MAX {
        return Err(ShapeError::TooManyChoices { choices });
    }
    let client_rids = match raw(RID) {
        Some((text, rid)) => client_rids(text, rid.kind, batch)?,
        None => Vec::new(),
    };
    let string = |slot| {
        raw(slot)
            .filter(|(text, _)| text.len() <= NAME_BYTES_MAX)
            .and_then(|(text, _)| serde_json::from_slice::<String>(text).ok())
    };
    let is_true = |slot| raw(slot).is_some_and(|(text, _)| text == b"true");
    Ok(Shape {
        batch,
        client_rids,
        choices,
        choice_ranges,
        streams: is_true(STREAM),
        wants_logprobs: match endpoint {
            PairEndpoint::Generate => {
                is_true(LOGPROBS)
                    || raw(LOGPROBS).is_some_and(|(_, value)| value.kind == Kind::Array)
            }
            // Only an echoed prompt has log-probabilities there.
            PairEndpoint::Completions => {
                is_true(ECHO) && raw(TOP_LOGPROBS).is_some_and(|(text, _)| text != b"0")
            }
            PairEndpoint::Chat | PairEndpoint::Responses => false,
        },
        model: string(MODEL),
        priority: raw(PRIORITY)
            .and_then(|(text, _)| number(text))
            .unwrap_or(0),
        sticky: string(STICKY),
        rank: raw(RANK).and_then(|(text, _)| number(text)),
        output_tokens,
        prompt: prompt(&scan),
        scan: Some(scan),
    })
}

fn number<T: std::str::FromStr>(text: &[u8]) -> Option<T> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// `body` with every `n` set to 1. `shape` must be its shape.
pub fn single_choice(body: &[u8], shape: &Shape) -> Vec<u8> {
    let edits = shape.choice_ranges.iter();
    let one = |range: &Range<usize>| (range.clone(), Cow::Borrowed(&b"1"[..]));
    json_edit::splice(body, edits.map(one).collect())
}

/// Whether a body surely is one prompt, one choice, and holds nothing that only the router may set: then it can travel
/// untouched, with the bootstrap fields in headers. Doubt (a name of ours anywhere, an escape that could hide one) says no.
pub fn is_plain(endpoint: PairEndpoint, body: &[u8]) -> bool {
    const DOUBTFUL: [&[u8]; 9] = [
        b"\"n\"",
        b"\"rid\"",
        b"dp_rank",
        b"data_parallel_rank",
        b"\"bootstrap_",
        b"\"input_ids\"",
        b"\"input_embeds\"",
        b"\"return_logprob\"",
        b"\\u00",
    ];
    endpoint.takes_overrides()
        && body.trim_ascii_start().starts_with(b"{")
        && !DOUBTFUL
            .iter()
            .any(|words| memmem::find(body, words).is_some())
        && !memmem::find_iter(body, b"\"text\"").any(|at| {
            let after = body[at + 6..].trim_ascii_start();
            let value = after.strip_prefix(b":").map(<[u8]>::trim_ascii_start);
            value.is_some_and(|value| value.starts_with(b"["))
        })
}

const RID: usize = 0;
const CHOICES: usize = 1;
const SAMPLING: usize = 2;
const TEXT: usize = 3;
const INPUT_IDS: usize = 4;
const INPUT_EMBEDS: usize = 5;
const PROMPT: usize = 6;
const STREAM: usize = 7;
const LOGPROBS: usize = 8;
const MODEL: usize = 9;
const PRIORITY: usize = 10;
const STICKY: usize = 11;
const RANK: usize = 12;
const MESSAGES: usize = 13;
const INPUT: usize = 14;
const MAX_TOKENS: usize = 15;
const ECHO: usize = 16;
const TOP_LOGPROBS: usize = 17;

/// Where the prompt stands, and whether it is a list of token ids (or of such lists).
fn prompt(scan: &Scan) -> Option<(Range<usize>, bool)> {
    let slots = [MESSAGES, PROMPT, TEXT, INPUT_IDS, INPUT];
    let value = slots.iter().find_map(|slot| scan.noted(*slot))?;
    let numbers = Some(Kind::Number);
    Some((
        value.range.clone(),
        value.first == numbers || value.first_inner == numbers,
    ))
}

fn judge(key: &[u8], value: &Value, trust: Trust) -> Disposition {
    match key {
        // A room the client chose could be a live one, which corrupts schedulers; a rank it chose would contradict
        // `room % dp` on the prefill side. Only the router knows both.
        b"routed_dp_rank" | b"data_parallel_rank" if trust.rank => Disposition::Note(RANK),
        b"disagg_prefill_dp_rank" if trust.rank => Disposition::Keep,
        b"routed_dp_rank" | b"data_parallel_rank" | b"disagg_prefill_dp_rank" => Disposition::Drop,
        _ if key.starts_with(b"bootstrap_") => Disposition::Drop,
        // A null id asks for one to be made, which the router does: two members of that name would contradict.
        b"rid" if value.kind == Kind::Null || !trust.rid => Disposition::Drop,
        b"rid" => Disposition::Note(RID),
        b"n" => Disposition::Note(CHOICES),
        b"sampling_params" => Disposition::Note(SAMPLING),
        b"text" => Disposition::Note(TEXT),
        b"input_ids" => Disposition::Note(INPUT_IDS),
        b"input_embeds" => Disposition::Note(INPUT_EMBEDS),
        b"prompt" => Disposition::Note(PROMPT),
        b"messages" => Disposition::Note(MESSAGES),
        b"input" => Disposition::Note(INPUT),
        b"max_completion_tokens" | b"max_tokens" | b"max_output_tokens"
            if value.kind == Kind::Number =>
        {
            Disposition::Note(MAX_TOKENS)
        }
        b"stream" => Disposition::Note(STREAM),
        b"return_logprob" => Disposition::Note(LOGPROBS),
        b"echo" => Disposition::Note(ECHO),
        b"logprobs" if value.kind == Kind::Number => Disposition::Note(TOP_LOGPROBS),
        b"model" => Disposition::Note(MODEL),
        b"priority" => Disposition::Note(PRIORITY),
        b"routing_key" | b"conversation_id" => Disposition::Note(STICKY),
        _ => Disposition::Keep,
    }
}

fn batch_items(endpoint: PairEndpoint, scan: &Scan) -> Option<usize> {
    let list = |slot| scan.noted(slot).filter(|value| value.kind == Kind::Array);
    let items = |value: &Value| value.items;
    let of_lists = |value: &&Value| matches!(value.first, Some(Kind::Array) | None);
    match endpoint {
        PairEndpoint::Chat | PairEndpoint::Responses => None,
        PairEndpoint::Completions => list(PROMPT)
            .filter(|value| value.first != Some(Kind::Number))
            .map(items),
        PairEndpoint::Generate if scan.noted(TEXT).is_some() => list(TEXT).map(items),
        PairEndpoint::Generate if scan.noted(INPUT_IDS).is_some() => {
            list(INPUT_IDS).filter(of_lists).map(items)
        }
        // One prompt is a list of vectors, a batch is a list of those.
        PairEndpoint::Generate => list(INPUT_EMBEDS)
            .filter(|value| value.first_inner == Some(Kind::Array))
            .map(items),
    }
}

/// What sampling parameters say.
#[derive(Debug)]
struct Sampling {
    choices: usize,
    /// Where each `n` stands.
    choice_ranges: Vec<Range<usize>>,
    /// Of a batch the largest bound.
    output_tokens: Option<u64>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            choices: 1,
            choice_ranges: Vec::new(),
            output_tokens: None,
        }
    }
}

/// The sampling parameters of `/generate`.
fn sampling_of_params(body: &[u8], params: &Value) -> Result<Sampling, ShapeError> {
    let of_object = |range: Range<usize>| -> Result<Sampling, JsonError> {
        let object = &body[range.clone()];
        let scan = json_edit::scan(object, |key, _| match key {
            b"n" => Disposition::Note(CHOICES),
            b"max_new_tokens" => Disposition::Note(MAX_TOKENS),
            _ => Disposition::Keep,
        })?;
        let text = |value: &Value| &object[value.range.clone()];
        let n = scan.noted(CHOICES);
        Ok(Sampling {
            choices: n.map_or(1, |n| choices(text(n))),
            choice_ranges: n
                .map(|n| range.start + n.range.start..range.start + n.range.end)
                .into_iter()
                .collect(),
            output_tokens: scan.noted(MAX_TOKENS).and_then(|most| number(text(most))),
        })
    };
    match (params.kind, params.first) {
        (Kind::Object, _) => Ok(of_object(params.range.clone())?),
        (Kind::Array, Some(Kind::Object)) => {
            let raw = &body[params.range.clone()];
            let mut common = None;
            let mut whole = Sampling::default();
            for item in json_edit::elements(raw, BATCH_MAX)? {
                let at = params.range.start + item.start..params.range.start + item.end;
                if body[at.start] != b'{' {
                    continue;
                }
                let one = of_object(at)?;
                if common.is_some_and(|common| common != one.choices) {
                    return Err(ShapeError::UnevenChoices);
                }
                common = Some(one.choices);
                whole.choice_ranges.extend(one.choice_ranges);
                let one = one.output_tokens.unwrap_or(GENERATE_TOKENS);
                whole.output_tokens = whole.output_tokens.max(Some(one));
            }
            whole.choices = common.unwrap_or(1);
            Ok(whole)
        }
        // Not a form SGLang accepts; let it say so.
        _ => Ok(Sampling::default()),
    }
}

fn bound(noted: Option<(&[u8], &Value)>) -> Option<u64> {
    number(noted?.0)
}

/// Two for `2`, `2.0`, `2e0` and `"2"`, which SGLang's request classes all read as two choices; one for what they refuse,
/// so that they can say so.
fn choices(raw: &[u8]) -> usize {
    let text = std::str::from_utf8(raw).unwrap_or_default();
    let number = text.trim_matches('"').trim().parse::<f64>();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a whole number above 1; what no usize holds becomes the largest one and is refused as such"
    )]
    match number {
        Ok(n) if n > 1.0 && n.fract() == 0.0 => n as usize,
        _ => 1,
    }
}

/// The ids under which a worker knows the request. SGLang gives the items of a batch with one string id the ids
/// `<id>_0`, `<id>_1`, … (`GenerateReqInput._normalize_rid`).
fn client_rids(raw: &[u8], kind: Kind, batch: Option<usize>) -> Result<Vec<String>, ShapeError> {
    let text = |bytes: &[u8]| match bytes.len() {
        0..=RID_BYTES_MAX => Ok(String::from_utf8_lossy(bytes).into_owned()),
        _ => Err(ShapeError::RidTooLong),
    };
    match (kind, batch) {
        (Kind::Array, _) => json_edit::elements(raw, BATCH_MAX)?
            .into_iter()
            .map(|item| text(&raw[item]))
            .collect(),
        (Kind::String, Some(items)) => {
            let stem = text(&raw[..raw.len() - 1])?;
            Ok((0..items).map(|item| format!("{stem}_{item}\"")).collect())
        }
        _ => Ok(vec![text(raw)?]),
    }
}

#[cfg(test)]
mod tests;
