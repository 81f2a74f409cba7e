//! Error responses of the admin.

use axum::{
    Json,
    extract::rejection::BytesRejection,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde_json::json;
use tower_key_rotation::OperateError;

use super::action::Action;

pub(super) struct Refusal {
    status: StatusCode,
    error: String,
}

impl Refusal {
    pub(super) fn new(status: StatusCode, error: impl Into<String>) -> Self {
        Self { status, error: error.into() }
    }

    pub(super) fn bad_request(error: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, error)
    }

    /// The response to a failed action.
    pub(super) fn of(action: Action, error: &OperateError) -> Self {
        let status = match error {
            _ if error.is_unknown_key() => StatusCode::NOT_FOUND,
            _ if error.is_taken() => StatusCode::CONFLICT,
            _ if error.is_store_failure() => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::BAD_REQUEST,
        };
        Self::new(status, action.failed(error))
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.status, Json(json!({ "error": self.error }))).into_response()
    }
}

impl From<BytesRejection> for Refusal {
    fn from(rejection: BytesRejection) -> Self {
        match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => {
                Self::new(rejection.status(), "the body is too large: send the keys in parts")
            }
            status => Self::new(status, "the body did not arrive completely"),
        }
    }
}
