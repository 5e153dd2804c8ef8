//! Errors as SGLang's clients expect them: the only place that picks a status.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::scheduler::job::Abort;
use crate::scheduler::mailbox::SubmitError;

/// Why a request gets no answer of its kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The HTTP status.
    pub status: StatusCode,
    /// A sentence for the client.
    pub message: String,
}

/// SGLang's `ErrorResponse` (`srt/entrypoints/openai/protocol.py`).
#[derive(Debug, Serialize)]
pub(super) struct ErrorBody<'a> {
    object: &'static str,
    message: &'a str,
    r#type: &'static str,
    param: Option<&'static str>,
    code: u16,
}

impl Refusal {
    /// The request is at fault: repeating it changes nothing.
    #[must_use]
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self {
            status: StatusCode::BAD_REQUEST,
            message: message.into(),
        }
    }

    /// The error's JSON, also used inside event streams.
    pub(super) fn body(&self) -> ErrorBody<'_> {
        let kind = match self.status.as_u16() {
            400..=499 => "BadRequestError",
            503 => "ServiceUnavailableError",
            _ => "InternalServerError",
        };
        let (message, code) = (self.message.as_str(), self.status.as_u16());
        ErrorBody {
            object: "error",
            message,
            r#type: kind,
            param: None,
            code,
        }
    }
}

impl From<SubmitError> for Refusal {
    fn from(error: SubmitError) -> Self {
        let status = match &error {
            SubmitError::Full { .. } | SubmitError::Stopped => StatusCode::SERVICE_UNAVAILABLE,
            SubmitError::DuplicateId(_) | SubmitError::DuplicateRoom(_) => StatusCode::BAD_REQUEST,
        };
        Self {
            status,
            message: error.to_string(),
        }
    }
}

/// The status that an abort carries; `None` for one that was asked for, which SGLang answers like any other end.
pub(super) const fn abort_status(abort: &Abort) -> Option<StatusCode> {
    match abort {
        Abort::Requested | Abort::ClientGone => None,
        Abort::ShuttingDown => Some(StatusCode::SERVICE_UNAVAILABLE),
        Abort::Transfer(_)
        | Abort::Corrupted { .. }
        | Abort::BadPrefix { .. }
        | Abort::Model(_) => Some(StatusCode::INTERNAL_SERVER_ERROR),
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.status, Json(self.body())).into_response()
    }
}
