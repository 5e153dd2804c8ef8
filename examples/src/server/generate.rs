//! `/generate` in SGLang's shape (`srt/entrypoints/http_server.py`, `GenerateReqInput`).

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
use super::refusal::{Refusal, abort_status};
use super::sse;
use super::ticket::{Progress, Ticket};
use crate::scheduler::job::{Finish, Outcome};
use crate::text;

#[derive(Deserialize)]
struct Body {
    text: Option<OneOrMany<String>>,
    input_ids: Option<OneOrMany<Vec<u32>>>,
    sampling_params: Option<OneOrMany<Params>>,
    #[serde(default)]
    stream: bool,
    #[serde(flatten)]
    routing: Routing,
}

/// The members of SGLang's `SamplingParams` that this worker honours; others are ignored.
#[derive(Clone, Default, Deserialize)]
struct Params {
    max_new_tokens: Option<usize>,
    temperature: Option<f32>,
    sampling_seed: Option<u64>,
    stop: Option<OneOrMany<String>>,
    #[serde(default)]
    ignore_eos: bool,
}

#[derive(Serialize)]
struct Answer {
    text: String,
    output_ids: Vec<u32>,
    meta_info: MetaInfo,
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<usize>,
}

#[derive(Serialize)]
struct MetaInfo {
    id: String,
    finish_reason: Option<Value>,
    prompt_tokens: usize,
    completion_tokens: usize,
    cached_tokens: usize,
    /// Not in SGLang: how much of the prompt this decode did not have to receive.
    decode_prefix_tokens: usize,
}

/// The handler of `/generate`.
pub(super) async fn generate(
    State(app): State<Arc<App>>,
    body: Bytes,
) -> Result<Response, Refusal> {
    let body: Body = parse(&body)?;
    let streamed = body.stream;
    let intake = intake(body)?;
    let is_batch = intake.is_batch;
    let prompt_lens: Vec<usize> = intake.prompts.iter().map(Vec::len).collect();
    let tickets = intake.submit(&app)?;
    if streamed {
        let streams = tickets
            .into_iter()
            .zip(prompt_lens)
            .enumerate()
            .map(|(index, (t, len))| Box::pin(events(t, len, is_batch.then_some(index))));
        return Ok(sse::response(stream::select_all(streams)));
    }
    let mut answers = vec![];
    // Sequential waiting is no loss: all jobs run, and an early failure drops (aborts) the rest.
    let mut tickets = std::collections::VecDeque::from(tickets);
    while let Some(mut ticket) = tickets.pop_front() {
        let (progress, outcome) = ticket.wait().await?;
        answers.push(answer(&ticket.rid, &progress, Ok(&outcome), None));
    }
    Ok(match answers.pop() {
        Some(single) if !is_batch => Json(single).into_response(),
        last => {
            answers.extend(last);
            Json(answers).into_response()
        }
    })
}

fn intake(body: Body) -> Result<Intake, Refusal> {
    let (prompts, is_batch) = match (body.text, body.input_ids) {
        (Some(OneOrMany::One(text)), None) => (vec![text::encode(&text)], false),
        (Some(OneOrMany::Many(texts)), None) => {
            (texts.iter().map(|t| text::encode(t)).collect(), true)
        }
        (None, Some(OneOrMany::One(ids))) => (vec![ids], false),
        (None, Some(OneOrMany::Many(lists))) => (lists, true),
        _ => {
            return Err(Refusal::bad_request(
                "Either text or input_ids should be provided.",
            ));
        }
    };
    let count = prompts.len();
    let params = body
        .sampling_params
        .unwrap_or(OneOrMany::One(Params::default()));
    let wishes = match params {
        OneOrMany::One(params) => vec![params; count],
        OneOrMany::Many(list) if list.len() == count => list,
        OneOrMany::Many(list) => {
            let message = format!(
                "sampling_params has {} entries, but the batch has {count}",
                list.len()
            );
            return Err(Refusal::bad_request(message));
        }
    };
    let wishes = wishes.into_iter().map(Params::wish).collect();
    Ok(Intake {
        prompts,
        wishes,
        routing: body.routing,
        is_batch,
    })
}

impl Params {
    fn wish(self) -> Wish {
        Wish {
            max_new_tokens: self.max_new_tokens,
            temperature: self.temperature,
            seed: self.sampling_seed,
            stop: self.stop,
            ignore_eos: self.ignore_eos,
        }
    }
}

/// SGLang's stream: every event repeats the whole text so far; a failure comes in band.
fn events(
    ticket: Ticket,
    prompt_tokens: usize,
    index: Option<usize>,
) -> impl Stream<Item = String> + Send {
    let start = (ticket, Progress::default());
    stream::unfold(Some(start), move |state| async move {
        let (mut ticket, mut progress) = state?;
        if let Err(refusal) = ticket.advance(&mut progress).await {
            return Some((sse::event(&json!({ "error": refusal.body() })), None));
        }
        let outcome = progress.outcome.take();
        let answer = answer(
            &ticket.rid,
            &progress,
            outcome.as_ref().ok_or(prompt_tokens),
            index,
        );
        let next = outcome.is_none().then_some((ticket, progress));
        Some((sse::event(&answer), next))
    })
    .fuse()
}

/// The answer after the outcome, or so far (then `Err` has the prompt's length).
fn answer(
    rid: &str,
    progress: &Progress,
    outcome: Result<&Outcome, usize>,
    index: Option<usize>,
) -> Answer {
    let meta_info = MetaInfo {
        id: rid.to_owned(),
        finish_reason: outcome.ok().map(finish_reason),
        prompt_tokens: outcome.map_or_else(|len| len, |o| o.prompt_tokens),
        completion_tokens: progress.output_ids.len(),
        cached_tokens: outcome.map_or(0, |o| o.cached_tokens),
        decode_prefix_tokens: outcome.map_or(0, |o| o.decode_prefix_tokens),
    };
    let (text, output_ids) = (progress.text.clone(), progress.output_ids.clone());
    Answer {
        text,
        output_ids,
        meta_info,
        index,
    }
}

/// SGLang's `finish_reason` objects.
fn finish_reason(outcome: &Outcome) -> Value {
    match &outcome.finish {
        Finish::Length => json!({ "type": "length", "length": outcome.completion_tokens }),
        Finish::EndOfSequence(token) => json!({ "type": "stop", "matched": token }),
        Finish::StopText(text) => json!({ "type": "stop", "matched": text }),
        Finish::Aborted(abort) => json!({
            "type": "abort",
            "message": abort.to_string(),
            "status_code": abort_status(abort).map(|s| s.as_u16()),
            "err_type": abort_status(abort).map(|_| "InternalServerError"),
        }),
    }
}
