//! Where each path leads.
#![forbid(unsafe_code)]

use hyper::Method;

use super::passthrough::{self, Asked};
use super::request::Dialect;
use super::shape::PairEndpoint;
use crate::metrics::Route;
use crate::ui;

/// Where a path leads.
#[derive(Clone, Copy, Debug)]
pub enum Target {
    /// To a pair.
    Pair(Dialect, Route),
    /// To one worker.
    Pass(Asked),
    /// The router answers that it lives.
    Health,
    /// The router answers whether a pair can be formed.
    Ready,
    /// The router answers with its counters.
    Metrics,
    /// A file of the page.
    Page(ui::Asset),
    /// The router answers with its state.
    State,
    /// The router answers with what it decided.
    Decisions,
}

impl Target {
    /// Where `path` leads, if anywhere.
    pub fn of(method: &Method, path: &str) -> Option<Self> {
        let native = |endpoint, route| Self::Pair(Dialect::Native(endpoint), route);
        Some(match path {
            "/generate" => native(PairEndpoint::Generate, Route::Generate),
            "/v1/chat/completions" => native(PairEndpoint::Chat, Route::Chat),
            "/v1/completions" => native(PairEndpoint::Completions, Route::Completions),
            "/v1/responses" => native(PairEndpoint::Responses, Route::Responses),
            "/v1/messages" => Self::Pair(Dialect::Messages, Route::Messages),
            "/health" => Self::Health,
            "/ready" => Self::Ready,
            "/metrics" => Self::Metrics,
            "/debug/state" => Self::State,
            "/ui" | "/ui/" => Self::Page(ui::Asset::Page),
            "/ui/app.js" => Self::Page(ui::Asset::Script),
            "/ui/style.css" => Self::Page(ui::Asset::Style),
            "/debug/decisions" => Self::Decisions,
            // Known for the other method, the path is told apart from an unknown one.
            _ => Self::Pass(Asked::of(method, path).or_else(|| {
                [Method::GET, Method::POST]
                    .iter()
                    .find_map(|other| Asked::of(other, path))
            })?),
        })
    }

    /// Its label in metrics.
    pub fn route(&self) -> Route {
        match self {
            Self::Pair(_, route) => *route,
            Self::Pass(_) => Route::Pass,
            Self::Health
            | Self::Ready
            | Self::Metrics
            | Self::Decisions
            | Self::Page(_)
            | Self::State => Route::Own,
        }
    }

    /// The method it takes, if that is not `method`.
    pub fn other_method(&self, method: &Method, path: &str) -> Option<&'static str> {
        let (fits, wanted) = match self {
            Self::Pair(..) => (method == Method::POST, "POST"),
            Self::Pass(_) if passthrough::is_question(path) => {
                (Asked::of(method, path).is_some(), "GET")
            }
            Self::Pass(_) => (Asked::of(method, path).is_some(), "POST"),
            _ => (method == Method::GET || method == Method::HEAD, "GET"),
        };
        (!fits).then_some(wanted)
    }
}
