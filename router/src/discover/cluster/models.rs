//! What the model objects of a pool come to.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use super::{Objects, Report, Scope, View, flaws_text};
use crate::discover::objects::model::{Model, Objective, Rewrite};
use crate::discover::objects::{Condition, Flaw, Kind, Object};
use crate::discover::{ModelRule, ModelTarget};

/// Most models with rules of their own, and most objectives; more are left out, and the object says so.
const RULES_MAX: usize = 4096;

/// Adds models, objectives and the reports on their objects to `view`.
pub(super) fn read(scope: &Scope, objects: &Objects, has_pool: bool, view: &mut View) {
    let mut rules: BTreeMap<String, ModelRule> = BTreeMap::new();
    for model in oldest_first(objects, &[Kind::Model], as_model) {
        let (kind, model) = model;
        if model.pool.as_ref() != Some(&scope.pool) {
            continue;
        }
        let accepted = match &model.model {
            Some(name) if model.flaws.is_empty() => {
                if rules.contains_key(name) {
                    let message =
                        format!("an older InferenceModel of this pool has the modelName `{name}`");
                    Condition::new("Accepted", false, "ModelNameInUse", message)
                } else if rules.len() == RULES_MAX {
                    too_many()
                } else {
                    let rule = ModelRule {
                        name: name.clone(),
                        priority: model.priority,
                        targets: model.targets.clone(),
                    };
                    rules.insert(name.clone(), rule);
                    Condition::new("Accepted", true, "Accepted", "")
                }
            }
            _ => refused(&model.flaws),
        };
        let conditions = vec![accepted, resolved(scope, has_pool)];
        view.reports
            .push(Report::new(kind, &model.meta, conditions));
    }
    rewrite(scope, objects, has_pool, &mut rules, view);
    view.fleet.models = rules.into_values().collect();
    objectives(scope, objects, has_pool, view);
}

/// Rewrites go before the targets of InferenceModels: they are what follows these. Exact matches go before rules for all
/// models, older objects before younger ones, earlier rules before later ones.
fn rewrite(
    scope: &Scope,
    objects: &Objects,
    has_pool: bool,
    rules: &mut BTreeMap<String, ModelRule>,
    view: &mut View,
) {
    let mut exact: BTreeMap<&str, &[ModelTarget]> = BTreeMap::new();
    let mut others: Option<&[ModelTarget]> = None;
    for (kind, rewrite) in oldest_first(objects, &[Kind::Rewrite, Kind::LlmdRewrite], as_rewrite) {
        if rewrite.pool.as_ref() != Some(&scope.pool) {
            continue;
        }
        let mut accepted = Condition::new("Accepted", true, "Accepted", "");
        if !rewrite.flaws.is_empty() {
            accepted = refused(&rewrite.flaws);
        }
        for rule in &rewrite.rules {
            match &rule.models {
                None => {
                    others.get_or_insert(&rule.targets);
                }
                Some(models) => {
                    for model in models {
                        if exact.len() < RULES_MAX {
                            exact.entry(model).or_insert(&rule.targets);
                        } else if !exact.contains_key(model.as_str()) {
                            accepted = too_many();
                        }
                    }
                }
            }
        }
        let conditions = vec![accepted, resolved(scope, has_pool)];
        view.reports
            .push(Report::new(kind, &rewrite.meta, conditions));
    }
    for (name, targets) in exact {
        let rule = rules.entry(name.to_owned()).or_insert_with(|| ModelRule {
            name: name.to_owned(),
            priority: 0,
            targets: Vec::new(),
        });
        rule.targets = targets.to_vec();
    }
    view.fleet.other_models = others.map(<[_]>::to_vec).unwrap_or_default();
}

fn objectives(scope: &Scope, objects: &Objects, has_pool: bool, view: &mut View) {
    let mut found: BTreeMap<&str, i32> = BTreeMap::new();
    let kinds = [Kind::Objective, Kind::LlmdObjective];
    for (kind, objective) in oldest_first(objects, &kinds, as_objective) {
        if objective.pool.as_ref() != Some(&scope.pool) {
            continue;
        }
        let name = objective.meta.name.as_str();
        let accepted = if !objective.flaws.is_empty() {
            refused(&objective.flaws)
        } else if found.len() == RULES_MAX {
            too_many()
        } else {
            found.entry(name).or_insert(objective.priority);
            Condition::new("Accepted", true, "Accepted", "")
        };
        let conditions = vec![accepted, resolved(scope, has_pool)];
        view.reports
            .push(Report::new(kind, &objective.meta, conditions));
    }
    let named = found.into_iter();
    view.fleet.objectives = named
        .map(|(name, priority)| crate::discover::Objective {
            name: name.to_owned(),
            priority,
        })
        .collect();
}

fn oldest_first<'a, T>(
    objects: &'a Objects,
    kinds: &[Kind],
    read: fn(&'a Object) -> Option<&'a T>,
) -> Vec<(Kind, &'a T)> {
    let mut all: Vec<(Kind, &'a Object)> = Vec::new();
    for kind in kinds {
        all.extend(objects.of_kind(*kind).map(|object| (*kind, object)));
    }
    all.sort_by_key(|(kind, object)| (object.meta().age(), *kind));
    let read = |(kind, object)| Some((kind, read(object)?));
    all.into_iter().filter_map(read).collect()
}

const fn as_model(object: &Object) -> Option<&Model> {
    match object {
        Object::Model(model) => Some(model),
        _ => None,
    }
}

const fn as_rewrite(object: &Object) -> Option<&Rewrite> {
    match object {
        Object::Rewrite(rewrite) => Some(rewrite),
        _ => None,
    }
}

const fn as_objective(object: &Object) -> Option<&Objective> {
    match object {
        Object::Objective(objective) => Some(objective),
        _ => None,
    }
}

fn refused(flaws: &[Flaw]) -> Condition {
    Condition::new("Accepted", false, "Invalid", flaws_text(flaws))
}

fn too_many() -> Condition {
    let message = format!("the pool has more than {RULES_MAX} of its kind");
    Condition::new("Accepted", false, "TooMany", message)
}

fn resolved(scope: &Scope, has_pool: bool) -> Condition {
    if has_pool {
        return Condition::new("ResolvedRefs", true, "ResolvedRefs", "");
    }
    let message = format!(
        "there is no InferencePool `{}` in this namespace",
        scope.pool
    );
    Condition::new("ResolvedRefs", false, "PoolNotFound", message)
}
