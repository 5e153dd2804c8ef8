//! What the router must know of a request body: how many prompts it carries, which ids it wants, and nothing else.
//!
//! The rules are those of SGLang's `GenerateReqInput` (a list of token ids is one prompt, a list of lists a batch) and
//! of its OpenAI request classes.
#![forbid(unsafe_code)]

use super::json_edit::{self, Disposition, JsonError, Kind, Scan, Value};

/// How many prompts one request may carry: each costs a room, some sixty bytes of JSON and, on failure, an abort call.
pub const BATCH_MAX: usize = 16_384;

/// How long one id of the client's may be, in raw JSON bytes: it is repeated in abort calls, once per item of a batch.
pub const RID_BYTES_MAX: usize = 512;

/// Which request class a path has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PairEndpoint {
    /// SGLang's native `/generate`.
    Generate,
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completions,
}

impl PairEndpoint {
    /// The path on the router and on the workers.
    pub const fn path(self) -> &'static str {
        match self {
            Self::Generate => "/generate",
            Self::Chat => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
        }
    }
}

/// Why a well-formed body cannot be served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ShapeError {
    /// The body is no JSON object.
    #[error(transparent)]
    Json(#[from] JsonError),
    /// More than one choice per prompt.
    #[error(
        "this router does not fan out n > 1 yet (a prefill/decode pair serves one choice per room): send one request \
         per choice; a later release will split n into pairs by itself"
    )]
    SeveralChoices,
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

/// A scanned request body.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Where the members lie.
    pub scan: Scan,
    /// Prompts in the list, or `None` for a single prompt (whose bootstrap fields are scalars).
    pub batch: Option<usize>,
    /// The ids the client chose, as raw JSON values; empty when the router must choose.
    pub client_rids: Vec<String>,
}

/// Scans `body` for `endpoint`.
///
/// # Errors
/// [`ShapeError`]; every one of them is the client's mistake or wish.
pub fn read(endpoint: PairEndpoint, body: &[u8]) -> Result<Shape, ShapeError> {
    let scan = json_edit::scan(body, judge)?;
    let choices = match endpoint {
        PairEndpoint::Generate => match scan.noted(SAMPLING) {
            Some(params) => has_choices_in_params(body, params)?,
            None => false,
        },
        PairEndpoint::Chat | PairEndpoint::Completions => scan
            .noted(CHOICES)
            .is_some_and(|n| exceeds_one(&body[n.range.clone()])),
    };
    if choices {
        return Err(ShapeError::SeveralChoices);
    }
    let batch = match batch_items(endpoint, &scan) {
        Some(0) => return Err(ShapeError::EmptyBatch),
        Some(items) if items > BATCH_MAX => return Err(ShapeError::BatchTooLarge { items }),
        batch => batch,
    };
    let client_rids = match scan.noted(RID) {
        Some(rid) => client_rids(&body[rid.range.clone()], rid.kind, batch)?,
        None => Vec::new(),
    };
    Ok(Shape {
        scan,
        batch,
        client_rids,
    })
}

const RID: usize = 0;
const CHOICES: usize = 1;
const SAMPLING: usize = 2;
const TEXT: usize = 3;
const INPUT_IDS: usize = 4;
const INPUT_EMBEDS: usize = 5;
const PROMPT: usize = 6;

fn judge(key: &[u8], value: &Value) -> Disposition {
    match key {
        // A room the client chose could be a live one, which corrupts schedulers; a rank it chose would contradict
        // `room % dp` on the prefill side. Only the router knows both.
        b"routed_dp_rank" | b"data_parallel_rank" | b"disagg_prefill_dp_rank" => Disposition::Drop,
        _ if key.starts_with(b"bootstrap_") => Disposition::Drop,
        // A null id asks for one to be made, which the router does: two members of that name would contradict.
        b"rid" if value.kind == Kind::Null => Disposition::Drop,
        b"rid" => Disposition::Note(RID),
        b"n" => Disposition::Note(CHOICES),
        b"sampling_params" => Disposition::Note(SAMPLING),
        b"text" => Disposition::Note(TEXT),
        b"input_ids" => Disposition::Note(INPUT_IDS),
        b"input_embeds" => Disposition::Note(INPUT_EMBEDS),
        b"prompt" => Disposition::Note(PROMPT),
        _ => Disposition::Keep,
    }
}

fn batch_items(endpoint: PairEndpoint, scan: &Scan) -> Option<usize> {
    let list = |slot| scan.noted(slot).filter(|value| value.kind == Kind::Array);
    let items = |value: &Value| value.items;
    let of_lists = |value: &&Value| matches!(value.first, Some(Kind::Array) | None);
    match endpoint {
        PairEndpoint::Chat => None,
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

fn has_choices_in_params(body: &[u8], params: &Value) -> Result<bool, JsonError> {
    let object_has = |object: &[u8]| -> Result<bool, JsonError> {
        let scan = json_edit::scan(object, |key, _| match key {
            b"n" => Disposition::Note(CHOICES),
            _ => Disposition::Keep,
        })?;
        Ok(scan
            .noted(CHOICES)
            .is_some_and(|n| exceeds_one(&object[n.range.clone()])))
    };
    let raw = &body[params.range.clone()];
    match (params.kind, params.first) {
        (Kind::Object, _) => object_has(raw),
        (Kind::Array, Some(Kind::Object)) => {
            for item in json_edit::elements(raw, BATCH_MAX)? {
                let item = &raw[item];
                if item.starts_with(b"{") && object_has(item)? {
                    return Ok(true);
                }
            }
            Ok(false)
        }
        // Not a form SGLang accepts; let it say so.
        _ => Ok(false),
    }
}

/// True for `2`, `2.0`, `2e0` and `"2"`, which SGLang's request classes all read as two choices.
fn exceeds_one(raw: &[u8]) -> bool {
    let text = std::str::from_utf8(raw).unwrap_or_default();
    text.trim_matches('"')
        .trim()
        .parse::<f64>()
        .is_ok_and(|n| n > 1.0)
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
