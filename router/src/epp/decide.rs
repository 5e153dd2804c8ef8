//! Where a complete request goes, and as what.
#![forbid(unsafe_code)]

use std::sync::Arc;

use bytes::Bytes;
use hyper::header::{
    AUTHORIZATION, CONNECTION, CONTENT_LENGTH, EXPECT, HOST, HeaderName, HeaderValue, TE, TRAILER,
    TRANSFER_ENCODING, UPGRADE,
};
use hyper::http::request::Parts;
use hyper::http::uri::PathAndQuery;
use hyper::{HeaderMap, Method, Request, Response};
use tokio::sync::OwnedSemaphorePermit;

use super::choice::{Choice, endpoint_of};
use super::counters::Outcome;
use super::exchange::{ClientRequest, Plan, Rewrite};
use super::message::{DESTINATION, HeadEdit};
use crate::config::epp::EppConfig;
use crate::metrics::Route;
use crate::pool::{Role, Worker};
use crate::proxy::Front;
use crate::proxy::admission::Permit;
use crate::proxy::deadline::Deadline;
use crate::proxy::headers::{strip_connection_headers, strip_for_worker};
use crate::proxy::live::LivePair;
use crate::proxy::models;
use crate::proxy::pair::PairRequest;
use crate::proxy::passthrough::{ANSWER_TIMEOUT, Asked};
use crate::proxy::placement::{self, Placement, Prompt, Wish};
use crate::proxy::request::{self, Dialect};
use crate::proxy::server::admit;
use crate::proxy::stream::ReplyBody;
use crate::proxy::target::Target;
use crate::respond::{self, RouteError};

/// What the operator can do for requests that one upstream request cannot serve.
const USE_FRONT: &str =
    "start the picker with --front-endpoint, or send it to the router's own port";

/// What the operator can do for answers that have to be changed.
const USE_DUPLEX: &str = "set Envoy's response_body_mode to FULL_DUPLEX_STREAMED, or start the picker with --front-endpoint";

/// Headers that Envoy writes for each connection by itself; it lets nobody change some of them.
const ENVOYS: [HeaderName; 8] = [
    CONNECTION,
    CONTENT_LENGTH,
    EXPECT,
    HOST,
    TE,
    TRAILER,
    TRANSFER_ENCODING,
    UPGRADE,
];

/// A decision.
#[derive(Debug)]
pub struct Decision {
    /// What is told to Envoy.
    pub plan: Plan,
    /// What it was, for the counters.
    pub outcome: Outcome,
    /// The pair, if there is one.
    pub underway: Option<Underway>,
}

/// A pair at work for Envoy.
#[derive(Debug)]
pub struct Underway {
    /// Prefill's leg, and what is to be told about decode's.
    pub live: LivePair,
    /// The time limits.
    pub deadline: Deadline,
    /// Places of the request; free when it ends.
    pub permit: Permit,
    /// The answer's head tells the decision.
    pub explains: bool,
}

/// What becomes of a request.
#[derive(Debug)]
pub enum Verdict {
    /// It goes on.
    Routed(Box<Decision>),
    /// The picker answers.
    Own(Response<ReplyBody>),
}

/// Where `method` on `path` leads, and how it is counted.
pub fn target_of(method: &str, path: &str) -> (Option<Target>, Route) {
    let method = Method::from_bytes(method.as_bytes()).unwrap_or_default();
    let path = path.split('?').next().unwrap_or_default();
    // What the operator sees is not for the gateway's clients.
    let target = Target::of(&method, path)
        .filter(|target| !matches!(target, Target::Metrics | Target::Decisions));
    (target, target.as_ref().map_or(Route::Other, Target::route))
}

/// Decides, waiting for a place and a pair if it must. For a pair prefill's request is sent before this returns.
///
/// # Errors
/// [`RouteError`] when the request cannot be served.
pub async fn decide(
    front: Arc<Front>,
    config: Arc<EppConfig>,
    request: ClientRequest,
    memory: OwnedSemaphorePermit,
) -> Result<Verdict, RouteError> {
    let head = &request.head;
    let (target, _) = target_of(&head.method, &head.path);
    let parts = parts_of(&request)?;
    let path = parts.uri.path();
    let Some(target) = target else {
        let path = path.to_owned();
        return Err(RouteError::NoEndpoint { path });
    };
    if let Some(allowed) = target.other_method(&parts.method, path) {
        return Err(RouteError::Method { allowed });
    }
    let choice = Choice::of(&config, &request);
    let decision = match target {
        Target::Pair(dialect, _) => {
            let asked = Wanted {
                dialect,
                parts,
                memory,
                choice,
            };
            to_pair(&front, &config, &request, asked).await?
        }
        Target::Pass(asked) => {
            if path == "/v1/models"
                && parts.method == Method::GET
                && let Some(list) = model_list(&front, asked, &parts).await
            {
                return Ok(Verdict::Own(list));
            }
            to_one(&front, &config, asked, parts, request.body, &choice).await?
        }
        Target::Health | Target::Metrics | Target::Decisions => {
            return Ok(Verdict::Own(respond::alive()));
        }
        Target::Page(_) | Target::State => {
            // For those who reach the router's own port.
            let path = path.to_owned();
            return Err(RouteError::NoEndpoint { path });
        }
        Target::Ready => {
            let now = front.pool.now();
            return Ok(Verdict::Own(respond::readiness(
                now.ready(Role::Prefill),
                now.ready(Role::Decode),
                front.drain.is_thrown(),
            )));
        }
    };
    Ok(Verdict::Routed(Box::new(decision)))
}

fn parts_of(request: &ClientRequest) -> Result<Parts, RouteError> {
    let built = Request::builder()
        .method(request.head.method.as_str())
        .uri(&request.head.path)
        .body(());
    let (mut parts, ()) = built
        .map_err(|_| RouteError::NoEndpoint {
            path: request.head.path.clone(),
        })?
        .into_parts();
    parts.headers = request.head.headers.clone();
    Ok(parts)
}

/// Turns headers of a client into those for a worker.
fn edit_between(before: &HeaderMap, after: &HeaderMap) -> HeadEdit {
    let mut edit = HeadEdit::default();
    let is_ours = |name: &HeaderName| !ENVOYS.contains(name);
    for name in after.keys().filter(|name| is_ours(name)) {
        if !before.get_all(name).iter().eq(after.get_all(name).iter()) {
            for value in after.get_all(name) {
                edit.set(name.as_str(), value.clone());
            }
        }
    }
    let gone = before
        .keys()
        .filter(|name| is_ours(name) && !after.contains_key(*name));
    edit.remove.extend(gone.map(ToString::to_string));
    edit
}

/// Completes a plan for `destination`.
fn plan(mut edit: HeadEdit, destination: String, body: Bytes, rewrite: Rewrite) -> Plan {
    if let Ok(value) = HeaderValue::try_from(&destination) {
        edit.set(DESTINATION, value);
    }
    edit.set(CONTENT_LENGTH.as_str(), HeaderValue::from(body.len()));
    Plan {
        destination,
        edit,
        body,
        rewrite,
    }
}

/// A request for a pair.
struct Wanted {
    dialect: Dialect,
    parts: Parts,
    memory: OwnedSemaphorePermit,
    choice: Choice,
}

async fn to_pair(
    front: &Arc<Front>,
    config: &EppConfig,
    request: &ClientRequest,
    wanted: Wanted,
) -> Result<Decision, RouteError> {
    request::refuse_encoding(&wanted.parts.headers)?;
    let original = wanted.parts.headers.clone();
    let body = request.body.clone();
    let understood = request::understand(front, wanted.dialect, wanted.parts, body, wanted.memory)?;
    let shape = &understood.shape;
    let is_message = wanted.dialect == Dialect::Messages;
    let obstacle = if shape.choices > 1 {
        Some(("n > 1", USE_FRONT))
    } else if is_message && !request.may_rewrite {
        Some(("/v1/messages", USE_DUPLEX))
    } else if shape.wants_logprobs && !request.may_rewrite {
        Some(("return_logprob", USE_DUPLEX))
    } else {
        None
    };
    if let Some((what, fix)) = obstacle {
        let address = config
            .front_endpoint
            .ok_or(RouteError::NotThroughEnvoy { what, fix })?;
        let body = request.body.clone();
        let destination = address.to_string();
        return Ok(Decision {
            plan: plan(HeadEdit::default(), destination, body, Rewrite::Nothing),
            outcome: Outcome::Front,
            underway: None,
        });
    }
    let permit = admit(front, shape).await?;
    let mut deadline = Deadline::new(&front.config, understood.read_at);
    let (placement, destination) = tokio::select! {
        placed = place(front, config, &understood, &wanted.choice) => placed?,
        stage = deadline.expired() => return Err(RouteError::Timeout(stage)),
    };
    let rewrite = if is_message {
        let model = shape.model.clone().unwrap_or_default();
        Rewrite::Message { model }
    } else {
        Rewrite::Nothing
    };
    let (live, mut headers, body) = LivePair::start_prefill(front, &understood, placement);
    if let Some(key) = front.client.authorization()
        && !headers.contains_key(AUTHORIZATION)
    {
        headers.insert(AUTHORIZATION, key.clone());
    }
    let mut edit = edit_between(&original, &headers);
    if understood.path.as_str() != request.head.path
        && let Ok(path) = HeaderValue::try_from(understood.path.as_str())
    {
        edit.set(":path", path);
    }
    Ok(Decision {
        plan: plan(edit, destination, body, rewrite),
        outcome: Outcome::Pair,
        underway: Some(Underway {
            live,
            deadline,
            permit,
            explains: understood.explains,
        }),
    })
}

/// Finds a pair whose decode worker may be chosen, and the text that names it and its fallbacks.
async fn place(
    front: &Arc<Front>,
    config: &EppConfig,
    request: &PairRequest,
    choice: &Choice,
) -> Result<(Placement, String), RouteError> {
    let now = front.pool.now();
    let shape = &request.shape;
    let prompt = Prompt::of(&request.body, shape, front.picker.blocks().tokens());
    let subset = choice.decodes(&now).await;
    if subset.as_ref().is_some_and(Vec::is_empty) {
        return Err(RouteError::NoneEligible);
    }
    let wish = Wish {
        prompt_bytes: request.body.len(),
        prompt: Some(&prompt),
        items: shape.batch.unwrap_or(1),
        output_tokens: shape.output_tokens,
        model: shape.model.as_deref(),
        priority: shape.priority,
        sticky: shape.sticky.as_deref(),
        rank: shape.rank,
        subset: subset.as_deref(),
        ..Wish::default()
    };
    let placement = placement::wait(front, &wish).await?;
    let chosen = &placement.decode;
    let mut destination = endpoint_of(chosen).await.ok_or(RouteError::NoneEligible)?;
    let others = now.of_role(Role::Decode).iter().filter(|worker| {
        worker.is_ready() && !worker.is_draining() && !Arc::ptr_eq(worker, chosen)
    });
    for worker in others.take(config.fallbacks) {
        if let Some(endpoint) = endpoint_of(worker).await
            && choice.holds(worker, &endpoint)
        {
            destination.push(',');
            destination.push_str(&endpoint);
        }
    }
    Ok((placement, destination))
}

/// A request that one worker answers by itself.
async fn to_one(
    front: &Arc<Front>,
    config: &EppConfig,
    asked: Asked,
    parts: Parts,
    body: Bytes,
    choice: &Choice,
) -> Result<Decision, RouteError> {
    if parts.method == Method::POST {
        request::refuse_encoding(&parts.headers)?;
    }
    let now = front.pool.now();
    let mut found = Vec::new();
    for role in asked.roles() {
        let eligible = choice.of_role(&now, *role).await;
        let candidates = now.candidates(*role, &[]).into_iter();
        found.extend(candidates.filter_map(|worker| {
            let mut eligible = eligible.iter();
            let (_, endpoint) = eligible.find(|(one, _)| Arc::ptr_eq(one, worker))?;
            Some((Arc::clone(worker), endpoint.clone()))
        }));
    }
    if found.is_empty() {
        let path = parts.uri.path().to_owned();
        return Err(if choice.is_limited() {
            RouteError::NoneEligible
        } else {
            RouteError::NoEndpoint { path }
        });
    }
    let mut headers = parts.headers.clone();
    strip_for_worker(&mut headers, false);
    if asked == Asked::Owner && found.len() > 1 {
        found = owner_first(front, &parts, &headers, found).await;
    }
    if let Some(key) = front.client.authorization()
        && !headers.contains_key(AUTHORIZATION)
    {
        headers.insert(AUTHORIZATION, key.clone());
    }
    let edit = edit_between(&parts.headers, &headers);
    let named: Vec<_> = found
        .into_iter()
        .map(|(_, endpoint)| endpoint)
        .take(1 + config.fallbacks)
        .collect();
    Ok(Decision {
        plan: plan(edit, named.join(","), body, Rewrite::Nothing),
        outcome: Outcome::Worker,
        underway: None,
    })
}

/// The models that clients may ask for, where rules add some to those of the workers; `None` where a worker's own list will do.
async fn model_list(front: &Front, asked: Asked, parts: &Parts) -> Option<Response<ReplyBody>> {
    let fleet = Arc::clone(&front.fleet.borrow());
    if fleet.models.is_empty() {
        return None;
    }
    let mut headers = parts.headers.clone();
    strip_for_worker(&mut headers, false);
    let now = front.pool.now();
    let roles = asked.roles().iter();
    for worker in roles.flat_map(|role| now.candidates(*role, &[])) {
        let path = PathAndQuery::from_static("/v1/models");
        let asking = front
            .client
            .send(worker, Method::GET, path, headers.clone(), Bytes::new());
        if let Ok(Ok(mut answer)) = tokio::time::timeout(ANSWER_TIMEOUT, asking).await
            && answer.status().is_success()
        {
            strip_connection_headers(answer.headers_mut());
            return Some(models::list(&fleet, answer.map(ReplyBody::Worker)).await);
        }
    }
    None
}

/// Moves the decode worker that knows a stored response to the front, by asking each of them.
async fn owner_first(
    front: &Front,
    parts: &Parts,
    headers: &HeaderMap,
    mut found: Vec<(Arc<Worker>, String)>,
) -> Vec<(Arc<Worker>, String)> {
    let path = parts.uri.path();
    let Ok(path) = path.strip_suffix("/cancel").unwrap_or(path).parse() else {
        return found;
    };
    let path: PathAndQuery = path;
    for (at, (worker, _)) in found.iter().enumerate() {
        let asking = front.client.send(
            worker,
            Method::GET,
            path.clone(),
            headers.clone(),
            Bytes::new(),
        );
        if let Ok(Ok(answer)) = tokio::time::timeout(ANSWER_TIMEOUT, asking).await
            && answer.status().is_success()
        {
            found.swap(0, at);
            break;
        }
    }
    found
}
