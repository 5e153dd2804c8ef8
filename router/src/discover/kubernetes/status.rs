//! What has to be written for a status to say what is known: nothing if it says so already.
#![forbid(unsafe_code)]

use serde_json::{Value as Json, json};

use crate::discover::cluster::Report;
use crate::discover::objects::{Condition, Kind};

/// Under this name the router's entries stand in the status of pools.
pub(super) const CONTROLLER: &str = "kvtransfer.io/kvrouter";

/// Owner of the fields that the router writes.
pub(super) const FIELD_MANAGER: &str = "kvrouter";

/// A condition whose judgement changed, and whether it held before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Turn {
    pub(super) condition: Condition,
    pub(super) held: Option<bool>,
}

/// A status that has to be written.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Rewritten {
    /// The conditions as they shall be, the router's own only.
    pub(super) conditions: Vec<Json>,
    /// Which of them are news.
    pub(super) turns: Vec<Turn>,
}

/// Compares `wanted` with the conditions that are there. Times stay where a judgement does.
fn rewritten(wanted: &Report, current: &Json, now: &str) -> Option<Rewritten> {
    let current = current.as_array().map_or(&[][..], Vec::as_slice);
    let mut changed = false;
    let mut turns = Vec::new();
    let conditions = wanted.conditions.iter().map(|condition| {
        let before = current.iter().find(|old| old["type"] == condition.kind);
        let held = before.and_then(|old| match old["status"].as_str() {
            Some("True") => Some(true),
            Some("False") => Some(false),
            _ => None,
        });
        let since = before
            .filter(|_| held == Some(condition.holds))
            .and_then(|old| old["lastTransitionTime"].as_str())
            .unwrap_or(now);
        let after = json!({
            "type": condition.kind,
            "status": if condition.holds { "True" } else { "False" },
            "reason": condition.reason,
            "message": condition.message,
            "observedGeneration": wanted.generation,
            "lastTransitionTime": since,
        });
        changed |= before != Some(&after);
        let same_reason = before.is_some_and(|old| old["reason"] == condition.reason);
        if held != Some(condition.holds) || !same_reason {
            let condition = condition.clone();
            turns.push(Turn { condition, held });
        }
        after
    });
    let conditions = conditions.collect();
    changed.then_some(Rewritten { conditions, turns })
}

/// What to write for an object with a list of conditions of its own.
pub(super) fn own_conditions(wanted: &Report, status: &Json, now: &str) -> Option<Rewritten> {
    rewritten(wanted, &status["conditions"], now)
}

/// What to write for a pool: the conditions, and the whole list of parents with the router's entry renewed. The list is
/// atomic in its API, so that everybody's entries have to be sent back.
pub(super) fn pool_parents(
    wanted: &Report,
    status: &Json,
    service: &str,
    now: &str,
) -> Option<(Rewritten, Json)> {
    let key = parents_key(wanted.kind);
    let mut parents = status[key].as_array().cloned().unwrap_or_default();
    let own = parents.iter().position(|entry| {
        entry["parentRef"]["kind"] == "Service" && entry["parentRef"]["name"] == service
    });
    let before = own.map_or(&Json::Null, |at| &parents[at]["conditions"]);
    let rewritten = rewritten(wanted, before, now)?;
    let mut entry = json!({
        "parentRef": {"group": "", "kind": "Service", "name": service},
        "conditions": rewritten.conditions,
    });
    if wanted.kind == Kind::PoolV1 {
        entry["controllerName"] = CONTROLLER.into();
    }
    match own {
        Some(at) => parents[at] = entry,
        None => parents.push(entry),
    }
    let parents = json!({ key: parents });
    Some((rewritten, parents))
}

fn parents_key(kind: Kind) -> &'static str {
    match kind {
        Kind::PoolV1 => "parents",
        _ => "parent",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(kind: Kind, holds: bool) -> Report {
        let reason = if holds { "Accepted" } else { "Invalid" };
        Report {
            kind,
            name: "a".to_owned(),
            generation: 3,
            conditions: vec![Condition::new("Accepted", holds, reason, "why")],
        }
    }

    #[test]
    fn a_status_is_written_once_and_times_tell_turns() {
        let first = own_conditions(&report(Kind::Model, true), &Json::Null, "T1").unwrap();
        assert_eq!(first.conditions[0]["lastTransitionTime"], "T1");
        assert_eq!(first.turns.len(), 1);
        let mut status = json!({"conditions": first.conditions});
        assert_eq!(
            own_conditions(&report(Kind::Model, true), &status, "T2"),
            None
        );
        // Another generation is news for programs that wait for it, but no turn.
        status["conditions"][0]["observedGeneration"] = 2.into();
        let again = own_conditions(&report(Kind::Model, true), &status, "T2").unwrap();
        assert_eq!(again.conditions[0]["lastTransitionTime"], "T1");
        assert!(again.turns.is_empty());
        let turned = own_conditions(&report(Kind::Model, false), &status, "T3").unwrap();
        assert_eq!(turned.conditions[0]["lastTransitionTime"], "T3");
        assert_eq!(turned.turns[0].held, Some(true));
    }

    #[test]
    fn other_parents_of_a_pool_keep_their_entries() {
        for (kind, key) in [(Kind::PoolV1, "parents"), (Kind::PoolV1Alpha2, "parent")] {
            let gateway = json!({"parentRef": {"kind": "Gateway", "name": "g"}, "conditions": [{"type": "Accepted"}]});
            let status = json!({ key: [gateway] });
            let (_, parents) = pool_parents(&report(kind, true), &status, "kvrouter", "T").unwrap();
            assert_eq!(parents[key][0], gateway);
            assert_eq!(parents[key][1]["parentRef"]["name"], "kvrouter");
            assert_eq!(
                parents[key][1]["controllerName"].is_string(),
                kind == Kind::PoolV1
            );
            assert_eq!(
                pool_parents(&report(kind, true), &parents, "kvrouter", "T2"),
                None
            );
            let (_, parents) =
                pool_parents(&report(kind, false), &parents, "kvrouter", "T3").unwrap();
            assert_eq!(parents[key].as_array().unwrap().len(), 2);
            assert_eq!(parents[key][1]["conditions"][0]["status"], "False");
        }
    }
}
