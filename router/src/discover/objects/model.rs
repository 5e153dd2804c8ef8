//! What clients may ask a pool for: InferenceModel, and InferenceObjective and InferenceModelRewrite that followed it.
#![forbid(unsafe_code)]

use serde_json::Value as Json;

use super::{Fields, Flaw, FlawKind, Meta};
use crate::discover::ModelTarget;

/// Most targets of one rule; its API allows ten.
pub const TARGETS_MAX: usize = 64;

/// Most rules of one rewrite, and most models that one of them matches.
pub const RULES_MAX: usize = 256;

/// Longest name of a model in bytes; its API allows 256.
pub const MODEL_BYTES_MAX: usize = 256;

/// The priority of `Critical` models. Those of `Standard` ones have 0.
pub const CRITICAL: i32 = 1;

/// The priority of `Sheddable` models: they are the first to be turned away.
pub const SHEDDABLE: i32 = -1;

/// An InferenceModel: one model name, how important it is, and what it stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Model {
    /// Name, labels and so on.
    pub meta: Meta,
    /// The pool it is about.
    pub pool: Option<String>,
    /// What clients ask for.
    pub model: Option<String>,
    /// From its criticality.
    pub priority: i32,
    /// What workers are asked for.
    pub targets: Vec<ModelTarget>,
    /// What is wrong with it.
    pub flaws: Vec<Flaw>,
    /// Its status as it stands in the cluster.
    pub status: Json,
}

impl Model {
    /// Reads an InferenceModel.
    pub fn read(object: &Json) -> Self {
        let mut root = Fields::new("", object);
        let mut model = Self {
            meta: Meta::read(object),
            pool: None,
            model: None,
            priority: 0,
            targets: Vec::new(),
            flaws: Vec::new(),
            status: object["status"].clone(),
        };
        if let Some(mut spec) = root.required_object("spec") {
            model.pool = pool_ref(&mut spec);
            let name = spec.required_text("modelName").map(str::to_owned);
            model.model = name.filter(|name| name.len() <= MODEL_BYTES_MAX);
            model.priority = match spec.text("criticality") {
                Some("Critical") => CRITICAL,
                Some("Sheddable") => SHEDDABLE,
                None | Some("Standard") => 0,
                Some(other) => {
                    let kind = FlawKind::Invalid {
                        found: format!("`{other}`"),
                        wanted: "Critical, Standard or Sheddable",
                    };
                    spec.flaw("criticality", kind);
                    0
                }
            };
            model.targets = targets(&mut spec, "spec", "targetModels", "name");
            root.close(spec);
        }
        model.flaws = root.into_flaws();
        model
    }
}

/// An InferenceObjective: a name for a priority.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Objective {
    /// Name, labels and so on.
    pub meta: Meta,
    /// The pool it is about.
    pub pool: Option<String>,
    /// More is more important.
    pub priority: i32,
    /// What is wrong with it.
    pub flaws: Vec<Flaw>,
    /// Its status as it stands in the cluster.
    pub status: Json,
}

impl Objective {
    /// Reads an InferenceObjective.
    pub fn read(object: &Json) -> Self {
        let mut root = Fields::new("", object);
        let mut objective = Self {
            meta: Meta::read(object),
            pool: None,
            priority: 0,
            flaws: Vec::new(),
            status: object["status"].clone(),
        };
        if let Some(mut spec) = root.required_object("spec") {
            objective.pool = pool_ref(&mut spec);
            objective.priority = spec.integer("priority").unwrap_or(0);
            root.close(spec);
        }
        objective.flaws = root.into_flaws();
        objective
    }
}

/// An InferenceModelRewrite: what models stand for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rewrite {
    /// Name, labels and so on.
    pub meta: Meta,
    /// The pool it is about.
    pub pool: Option<String>,
    /// The first one that matches counts.
    pub rules: Vec<RewriteRule>,
    /// What is wrong with it.
    pub flaws: Vec<Flaw>,
    /// Its status as it stands in the cluster.
    pub status: Json,
}

/// One rule of a rewrite.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RewriteRule {
    /// The models it is for; `None` is all of them.
    pub models: Option<Vec<String>>,
    /// What workers are asked for instead.
    pub targets: Vec<ModelTarget>,
}

impl Rewrite {
    /// Reads an InferenceModelRewrite.
    pub fn read(object: &Json) -> Self {
        let mut root = Fields::new("", object);
        let mut rewrite = Self {
            meta: Meta::read(object),
            pool: None,
            rules: Vec::new(),
            flaws: Vec::new(),
            status: object["status"].clone(),
        };
        if let Some(mut spec) = root.required_object("spec") {
            rewrite.pool = pool_ref(&mut spec);
            for (index, rule) in spec.list("rules").iter().take(RULES_MAX).enumerate() {
                let path = format!("spec.rules[{index}]");
                let mut rule = Fields::new(&path, rule);
                let models = matched(&mut rule, &path);
                let targets = targets(&mut rule, &path, "targets", "modelRewrite");
                if targets.is_empty() {
                    rule.flaw("targets", FlawKind::Missing);
                } else {
                    rewrite.rules.push(RewriteRule { models, targets });
                }
                spec.close(rule);
            }
            root.close(spec);
        }
        rewrite.flaws = root.into_flaws();
        rewrite
    }
}

/// The models that a rule matches; `None` is all. A match that cannot be read matches nothing.
fn matched(rule: &mut Fields<'_>, path: &str) -> Option<Vec<String>> {
    let matches = rule.list("matches");
    let mut models = Vec::new();
    for (index, one) in matches.iter().take(RULES_MAX).enumerate() {
        let mut one = Fields::new(format!("{path}.matches[{index}]"), one);
        if let Some(mut model) = one.required_object("model") {
            let kind = model.text("type").unwrap_or("Exact");
            if kind == "Exact" {
                let name = model.required_text("value").map(str::to_owned);
                models.extend(name.filter(|name| name.len() <= MODEL_BYTES_MAX));
            } else {
                let kind = FlawKind::Invalid {
                    found: format!("`{kind}`"),
                    wanted: "Exact",
                };
                model.flaw("type", kind);
            }
            one.close(model);
        }
        rule.close(one);
    }
    (!matches.is_empty()).then_some(models)
}

/// Weighted models. A list in which only some have weights is refused, as its API does.
fn targets(
    fields: &mut Fields<'_>,
    path: &str,
    name: &'static str,
    model: &'static str,
) -> Vec<ModelTarget> {
    let list = fields.list(name);
    let mut found = Vec::new();
    let mut weighted = 0;
    for (index, target) in list.iter().take(TARGETS_MAX).enumerate() {
        let mut target = Fields::new(format!("{path}.{name}[{index}]"), target);
        let weight = target.weight("weight");
        weighted += usize::from(weight.is_some());
        if let Some(model) = target.required_text(model)
            && model.len() <= MODEL_BYTES_MAX
        {
            found.push(ModelTarget {
                model: model.to_owned(),
                weight: weight.unwrap_or(0),
            });
        }
        fields.close(target);
    }
    if weighted != 0 && weighted != found.len() {
        let kind = FlawKind::Invalid {
            found: "a list in which some have a weight".to_owned(),
            wanted: "one in which all have a weight, or none",
        };
        fields.flaw(name, kind);
        return Vec::new();
    }
    found
}

fn pool_ref(spec: &mut Fields<'_>) -> Option<String> {
    let mut pool = spec.required_object("poolRef")?;
    let name = pool.required_text("name").map(str::to_owned);
    spec.close(pool);
    name
}
