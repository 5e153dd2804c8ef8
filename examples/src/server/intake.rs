//! From JSON to jobs: what all generating endpoints have in common.

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::refusal::Refusal;
use super::ticket::Ticket;
use super::{App, Facts, Mode};
use crate::pd::{Bootstrap, Room};
use crate::scheduler::job::{Job, Sampling};
use crate::text::VOCAB;

/// Sequences in one request; SGLang has no bound, we do.
pub const BATCH_MAX: usize = 64;
/// Stop texts of one request.
pub const STOPS_MAX: usize = 16;
/// Bytes of one stop text.
pub const STOP_BYTES_MAX: usize = 256;
/// Bytes of a request id.
pub const RID_BYTES_MAX: usize = 128;
/// Tokens to generate when a request does not say, as in SGLang's `SamplingParams`.
pub const NEW_TOKENS_DEFAULT: usize = 128;

/// A field that SGLang takes once for all members of a batch, or once per member.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T: Clone> OneOrMany<T> {
    /// The value of member `index` of `count`.
    fn member(&self, index: usize, count: usize, name: &str) -> Result<T, Refusal> {
        match self {
            Self::One(value) => Ok(value.clone()),
            Self::Many(values) if values.len() == count => Ok(values[index].clone()),
            Self::Many(values) => Err(Refusal::bad_request(format!(
                "{name} has {} entries, but the batch has {count}",
                values.len()
            ))),
        }
    }

    pub(super) fn into_vec(self) -> Vec<T> {
        match self {
            Self::One(value) => vec![value],
            Self::Many(values) => values,
        }
    }
}

/// The fields that a PD router adds (SGLang's `PDRoutingFields`), and the request's id.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct Routing {
    rid: Option<OneOrMany<String>>,
    bootstrap_host: Option<OneOrMany<Option<String>>>,
    bootstrap_port: Option<OneOrMany<Option<u16>>>,
    bootstrap_room: Option<OneOrMany<Option<u64>>>,
}

/// Sampling fields under the names of either API; which are read is the endpoint's choice.
#[derive(Clone, Debug, Default)]
pub(super) struct Wish {
    pub(super) max_new_tokens: Option<usize>,
    pub(super) temperature: Option<f32>,
    pub(super) seed: Option<u64>,
    pub(super) stop: Option<OneOrMany<String>>,
    pub(super) ignore_eos: bool,
}

/// A request, ready to become jobs.
pub(super) struct Intake {
    pub(super) prompts: Vec<Vec<u32>>,
    /// One per prompt.
    pub(super) wishes: Vec<Wish>,
    pub(super) routing: Routing,
    /// Whether the client sent a list, even of one.
    pub(super) is_batch: bool,
}

/// Parses a body, or says what is wrong with it.
pub(super) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(body)
        .map_err(|error| Refusal::bad_request(format!("The request body is invalid: {error}")))
}

impl Intake {
    /// Checks everything and submits the jobs: one ticket per prompt, in order.
    pub(super) fn submit(self, app: &App) -> Result<Vec<Ticket>, Refusal> {
        let count = self.prompts.len();
        if count == 0 || count > BATCH_MAX {
            let message = format!("a request holds 1 to {BATCH_MAX} prompts, not {count}");
            return Err(Refusal::bad_request(message));
        }
        let rids = self.rids(count)?;
        let (mut jobs, mut tickets) = (vec![], vec![]);
        let members = self.prompts.into_iter().zip(self.wishes).zip(rids);
        for (index, ((prompt, wish), rid)) in members.enumerate() {
            let sampling = check(&prompt, wish, &app.facts)?;
            let bootstrap = match app.facts.mode {
                Mode::Null => None,
                Mode::Prefill | Mode::Decode => {
                    Some(
                        self.routing
                            .bootstrap(index, count, self.is_batch, &app.facts)?,
                    )
                }
            };
            let (events, receiver) = tokio::sync::mpsc::channel(sampling.events_max());
            tickets.push(Ticket::new(rid.clone(), receiver, app.mailbox().clone()));
            jobs.push(Job {
                rid,
                prompt,
                sampling,
                bootstrap,
                events,
            });
        }
        app.mailbox().submit(jobs)?;
        Ok(tickets)
    }

    /// The ids of all members: given, derived from one given id, or drawn.
    fn rids(&self, count: usize) -> Result<Vec<String>, Refusal> {
        let rids: Vec<String> = match &self.routing.rid {
            Some(OneOrMany::One(rid)) if self.is_batch => {
                (0..count).map(|i| format!("{rid}_{i}")).collect()
            }
            Some(rid) => (0..count)
                .map(|i| rid.member(i, count, "rid"))
                .collect::<Result<_, _>>()?,
            None => (0..count)
                .map(|_| {
                    format!(
                        "{:016x}{:016x}",
                        rand::random::<u64>(),
                        rand::random::<u64>()
                    )
                })
                .collect(),
        };
        if rids
            .iter()
            .any(|rid| rid.is_empty() || rid.len() > RID_BYTES_MAX)
        {
            let message = format!("a rid has 1 to {RID_BYTES_MAX} bytes");
            return Err(Refusal::bad_request(message));
        }
        Ok(rids)
    }
}

impl Routing {
    /// Where the other leg of member `index` is.
    fn bootstrap(
        &self,
        index: usize,
        count: usize,
        is_batch: bool,
        facts: &Facts,
    ) -> Result<Bootstrap, Refusal> {
        let missing = |name: &str| {
            Refusal::bad_request(format!(
                "Disaggregated request received without {name}: this worker runs with \
                 --disaggregation-mode {}, so a router must add bootstrap_host, bootstrap_port and \
                 bootstrap_room",
                facts.mode.name()
            ))
        };
        let host = match &self.bootstrap_host {
            Some(host) => host.member(index, count, "bootstrap_host")?,
            None => None,
        };
        let port = match &self.bootstrap_port {
            Some(port) => port.member(index, count, "bootstrap_port")?,
            None => None,
        };
        let room = match &self.bootstrap_room {
            // One room for a batch means consecutive rooms (SGLang, `srt/managers/io_struct.py:926`).
            Some(OneOrMany::One(Some(first))) if is_batch => {
                Some(first.saturating_add(index as u64))
            }
            Some(room) => room.member(index, count, "bootstrap_room")?,
            None => None,
        };
        let number = room.ok_or_else(|| missing("bootstrap room id"))?;
        let room = Room::new(number).ok_or_else(|| {
            Refusal::bad_request(format!(
                "bootstrap_room must be 1 to 2^63 - 1, not {number}"
            ))
        })?;
        let host = host
            .filter(|h| !h.is_empty())
            .ok_or_else(|| missing("bootstrap host"))?;
        // SGLang substitutes its own port too (`srt/managers/scheduler.py:2970`).
        Ok(Bootstrap {
            host,
            port: port.unwrap_or(facts.bootstrap_port),
            room,
        })
    }
}

/// Checks a prompt and its sampling wishes against the worker's limits.
fn check(prompt: &[u32], wish: Wish, facts: &Facts) -> Result<Sampling, Refusal> {
    let longest = facts.sequence_max;
    if prompt.is_empty() {
        return Err(Refusal::bad_request("The prompt has no tokens."));
    }
    if let Some(token) = prompt.iter().find(|t| **t as usize >= VOCAB) {
        let message = format!("token id {token} is outside the vocabulary of {VOCAB}");
        return Err(Refusal::bad_request(message));
    }
    if prompt.len() >= longest {
        let message = format!(
            "The input ({} tokens) is longer than this worker's limit of {longest} tokens, output included.",
            prompt.len()
        );
        return Err(Refusal::bad_request(message));
    }
    let room_left = longest - prompt.len();
    let max_new_tokens = wish
        .max_new_tokens
        .unwrap_or_else(|| NEW_TOKENS_DEFAULT.min(room_left));
    if max_new_tokens == 0 || max_new_tokens > room_left {
        let message = format!(
            "max_new_tokens must be 1 to {room_left} after a prompt of {} tokens, not {max_new_tokens}",
            prompt.len()
        );
        return Err(Refusal::bad_request(message));
    }
    let temperature = wish.temperature.unwrap_or(0.0);
    if !temperature.is_finite() || temperature < 0.0 {
        return Err(Refusal::bad_request(
            "temperature must be a number of at least 0",
        ));
    }
    let stop = wish.stop.map(OneOrMany::into_vec).unwrap_or_default();
    if stop.len() > STOPS_MAX
        || stop
            .iter()
            .any(|s| s.is_empty() || s.len() > STOP_BYTES_MAX)
    {
        let message =
            format!("stop takes up to {STOPS_MAX} texts of 1 to {STOP_BYTES_MAX} bytes each");
        return Err(Refusal::bad_request(message));
    }
    let seed = wish.seed.unwrap_or(0);
    Ok(Sampling {
        max_new_tokens,
        temperature,
        seed,
        stop,
        ignore_eos: wish.ignore_eos,
    })
}
