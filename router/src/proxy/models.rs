//! What the fleet's rules say about the model that a client asks for: what workers are asked for instead, and how
//! important the request is.
#![forbid(unsafe_code)]

use std::borrow::Cow;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::header::{CONTENT_ENCODING, CONTENT_LENGTH, HeaderName, HeaderValue};
use hyper::{HeaderMap, Response};
use serde_json::json;

use super::json_edit::{self, Disposition, Kind};
use super::shape::{self, PairEndpoint, Shape, ShapeError, Trust};
use super::stream::ReplyBody;
use crate::discover::{Fleet, ModelTarget};

/// Names an objective of the fleet, whose priority counts instead of the model's (Gateway API Inference Extension).
pub const OBJECTIVE_HEADER: HeaderName = HeaderName::from_static("x-gateway-inference-objective");

/// Largest list of models that is added to; a larger one passes as it is.
const LIST_BYTES_MAX: usize = 1 << 20;

/// What the rules say about a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict<'a> {
    /// The model to ask workers for, if not the one that the client named.
    pub model: Option<&'a str>,
    /// More is more important, before the client's own priority is looked at.
    pub class: i32,
}

/// Looks up what `fleet` says about a request for `model`. `draw` is any number, evenly spread over all of them.
pub fn judge<'a>(
    fleet: &'a Fleet,
    model: Option<&str>,
    objective: Option<&str>,
    draw: u64,
) -> Verdict<'a> {
    let rule = model.and_then(|model| fleet.model(model));
    let targets = match rule {
        Some(rule) => &rule.targets,
        None => &fleet.other_models,
    };
    let target = choose(targets, draw).filter(|target| Some(*target) != model);
    let class = objective.and_then(|name| fleet.objective(name));
    Verdict {
        // A request that names no model is for whatever the workers serve.
        model: target.filter(|_| model.is_some()),
        class: class.unwrap_or_else(|| rule.map_or(0, |rule| rule.priority)),
    }
}

/// The target that `draw` falls on; shares are equal if no weight is above zero.
fn choose(targets: &[ModelTarget], draw: u64) -> Option<&str> {
    let total: u64 = targets.iter().map(|target| u64::from(target.weight)).sum();
    let count = u64::try_from(targets.len()).unwrap_or(u64::MAX);
    let share = |target: &ModelTarget| {
        if total == 0 {
            1
        } else {
            u64::from(target.weight)
        }
    };
    // The upper bits of the product are an even choice below the total (Lemire), without a division's favour for small ones.
    let of = u128::from(if total == 0 { count } else { total });
    let mut left = u64::try_from((u128::from(draw) * of) >> 64).unwrap_or(0);
    targets.iter().find_map(|target| {
        let share = share(target);
        if left < share {
            return Some(target.model.as_str());
        }
        left -= share;
        None
    })
}

/// The operator's class of a request decides; among requests of one class, the client's own priority does.
pub const fn priority(class: i32, client: i64) -> i64 {
    let least = i32::MIN as i64;
    let most = i32::MAX as i64;
    let client = if client < least {
        least
    } else if client > most {
        most
    } else {
        client
    };
    (class as i64) * (1 << 32) + client
}

/// Whether the router must know the model of a request.
pub fn matter(fleet: &Fleet) -> bool {
    !fleet.models.is_empty() || !fleet.other_models.is_empty()
}

/// Applies the rules of `fleet` to a request whose `shape` was read from `body`. Only the value of `model` is exchanged.
///
/// # Errors
/// [`ShapeError`], which the body would have caused before.
pub fn apply(
    fleet: &Fleet,
    headers: &HeaderMap,
    endpoint: PairEndpoint,
    trust: Trust,
    body: Bytes,
    mut shape: Shape,
) -> Result<(Bytes, Shape), ShapeError> {
    let objective = headers.get(OBJECTIVE_HEADER);
    let objective = objective.and_then(|name| name.to_str().ok()).map(str::trim);
    let verdict = judge(fleet, shape.model.as_deref(), objective, rand::random());
    let (mut body, client) = (body, shape.priority);
    if let (Some(model), Some(at)) = (verdict.model, shape.model_range()) {
        let text = serde_json::Value::from(model).to_string();
        body = json_edit::splice(&body, vec![(at, Cow::Owned(text.into_bytes()))]).into();
        // Everything behind it has moved.
        shape = shape::read(endpoint, &body, trust)?;
    }
    shape.priority = priority(verdict.class, client);
    Ok((body, shape))
}

/// Adds the models that only rules know to a worker's list of models, so that clients can find what they may ask for.
pub async fn list(fleet: &Fleet, response: Response<ReplyBody>) -> Response<ReplyBody> {
    let is_plain = !response.headers().contains_key(CONTENT_ENCODING);
    if fleet.models.is_empty() || !response.status().is_success() || !is_plain {
        return response;
    }
    let (mut parts, body) = response.into_parts();
    let ReplyBody::Worker(body) = body else {
        return Response::from_parts(parts, body);
    };
    let length = parts.headers.get(CONTENT_LENGTH);
    let length = length.and_then(|text| text.to_str().ok()?.parse::<usize>().ok());
    if length.is_none_or(|length| length > LIST_BYTES_MAX) {
        return Response::from_parts(parts, ReplyBody::Worker(body));
    }
    let read = Limited::new(body, LIST_BYTES_MAX).collect().await;
    // What broke off is passed on shorter than announced, so that the client sees it.
    let Ok(read) = read else {
        return Response::from_parts(parts, ReplyBody::Whole(Full::default()));
    };
    let read = read.to_bytes();
    let longer = with_rules(fleet, &read).map_or(read, Bytes::from);
    parts
        .headers
        .insert(CONTENT_LENGTH, HeaderValue::from(longer.len()));
    Response::from_parts(parts, ReplyBody::Whole(Full::new(longer)))
}

/// The list with an entry for every rule that it does not have yet; `None` if it is no such list.
fn with_rules(fleet: &Fleet, list: &[u8]) -> Option<Vec<u8>> {
    let scan = json_edit::scan(list, |key, _| match key {
        b"data" => Disposition::Note(0),
        _ => Disposition::Keep,
    });
    let scan = scan.ok()?;
    let data = scan.noted(0).filter(|data| data.kind == Kind::Array)?;
    let known: serde_json::Value = serde_json::from_slice(&list[data.range.clone()]).ok()?;
    let known = known.as_array()?;
    let mut added = String::new();
    for rule in &fleet.models {
        if known.iter().any(|model| model["id"] == *rule.name) {
            continue;
        }
        let root = rule
            .targets
            .first()
            .map_or(&rule.name, |target| &target.model);
        let entry = json!({"id": rule.name, "object": "model", "created": 0, "owned_by": "kvrouter", "root": root});
        if !known.is_empty() || !added.is_empty() {
            added.push(',');
        }
        added.push_str(&entry.to_string());
    }
    let end = data.range.end - 1;
    Some(json_edit::splice(
        list,
        vec![(end..end, Cow::Owned(added.into_bytes()))],
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discover::{ModelRule, Objective};

    fn target(model: &str, weight: u32) -> ModelTarget {
        ModelTarget {
            model: model.to_owned(),
            weight,
        }
    }

    fn fleet() -> Fleet {
        let rule = |name: &str, priority, targets| ModelRule {
            name: name.to_owned(),
            priority,
            targets,
        };
        Fleet {
            models: vec![
                rule("cheap", -1, Vec::new()),
                rule(
                    "split",
                    1,
                    vec![target("a", 9), target("b", 1), target("never", 0)],
                ),
            ],
            objectives: vec![Objective {
                name: "urgent".to_owned(),
                priority: 7,
            }],
            ..Fleet::default()
        }
    }

    #[test]
    fn targets_get_their_shares() {
        let fleet = fleet();
        let mut found = [0_u32; 2];
        for turn in 0..1000_u64 {
            let verdict = judge(
                &fleet,
                Some("split"),
                None,
                turn.wrapping_mul(u64::MAX / 1000),
            );
            match verdict.model {
                Some("a") => found[0] += 1,
                Some("b") => found[1] += 1,
                other => panic!("{other:?}"),
            }
        }
        assert!(
            found[0].abs_diff(900) <= 1 && found[1].abs_diff(100) <= 1,
            "{found:?}"
        );
        let equal = [target("x", 0), target("y", 0)];
        assert_eq!(choose(&equal, 0), Some("x"));
        assert_eq!(choose(&equal, u64::MAX), Some("y"));
        assert_eq!(choose(&[], 3), None);
    }

    #[test]
    fn names_without_a_rule_pass_and_objectives_outweigh_models() {
        let mut fleet = fleet();
        let plain = Verdict {
            model: None,
            class: 0,
        };
        assert_eq!(judge(&fleet, Some("else"), None, 5), plain);
        assert_eq!(judge(&fleet, None, Some("unknown"), 5), plain);
        assert_eq!(judge(&fleet, Some("cheap"), None, 5).class, -1);
        assert_eq!(judge(&fleet, Some("cheap"), Some("urgent"), 5).class, 7);
        fleet.other_models = vec![target("rest", 0)];
        assert_eq!(judge(&fleet, Some("else"), None, 5).model, Some("rest"));
        assert_eq!(judge(&fleet, Some("rest"), None, 5).model, None);
        assert_eq!(judge(&fleet, None, None, 5).model, None);
        assert!(priority(-1, i64::MAX) < priority(0, i64::MIN));
        assert!(priority(0, 3) > priority(0, 2) && priority(0, 2) == 2);
    }

    #[test]
    fn only_the_model_of_a_body_changes() {
        let mut fleet = fleet();
        fleet.models[1].targets.truncate(1);
        let body = br#"{"seed": 12345678901234567890, "model" : "split","x":1e400, "messages":[]}"#;
        let shape = shape::read(PairEndpoint::Chat, body, Trust::default()).unwrap();
        let (endpoint, trust) = (PairEndpoint::Chat, Trust::default());
        let whole = Bytes::from_static(body);
        let (after, shape) =
            apply(&fleet, &HeaderMap::new(), endpoint, trust, whole, shape).unwrap();
        let expected = r#"{"seed": 12345678901234567890, "model" : "a","x":1e400, "messages":[]}"#;
        assert_eq!(after, expected);
        assert_eq!(
            (shape.model.as_deref(), shape.priority),
            (Some("a"), 1 << 32)
        );
    }

    #[test]
    fn lists_of_models_grow_by_what_only_rules_know() {
        let mut fleet = fleet();
        let list = br#"{"object": "list", "data": [{"id": "cheap", "max": 1e3}] }"#;
        let longer = with_rules(&fleet, list).unwrap();
        let text = std::str::from_utf8(&longer).unwrap();
        assert!(
            text.starts_with(r#"{"object": "list", "data": [{"id": "cheap", "max": 1e3},"#),
            "{text}"
        );
        let json: serde_json::Value = serde_json::from_slice(&longer).unwrap();
        assert_eq!(
            (&json["data"][1]["id"], &json["data"][1]["root"]),
            (&json!("split"), &json!("a"))
        );
        fleet.models.truncate(1);
        let empty = with_rules(&fleet, br#"{"data":[]}"#).unwrap();
        assert_eq!(
            serde_json::from_slice::<serde_json::Value>(&empty).unwrap()["data"][0]["id"],
            "cheap"
        );
        assert_eq!(with_rules(&fleet, b"[]"), None);
    }
}
