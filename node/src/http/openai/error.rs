//! Errors in OpenAI's shape.

use std::time::Duration;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use ingle_actors::gateway::GatewayError;
use ingle_actors::protocol::wire::v2::{Failed, FailureKind, RefusalKind, Refused};
use serde::Serialize;

const INVALID: &str = "invalid_request_error";
const SERVER: &str = "server_error";

/// What clients are told to wait where nobody knows better.
const USUAL_WAIT: Duration = Duration::from_secs(1);

/// An error as clients see it.
#[derive(Debug, Clone, PartialEq)]
pub struct ApiError {
    /// The HTTP status.
    pub status: StatusCode,
    /// What happened, and what to do.
    pub message: String,
    /// `type` of the error object.
    pub kind: &'static str,
    /// The field at fault.
    pub param: Option<String>,
    /// A name that programs can match.
    pub code: Option<&'static str>,
    /// When it is worth trying again.
    pub retry_after: Option<Duration>,
}

#[derive(Serialize)]
struct Body<'a> {
    error: Object<'a>,
}

#[derive(Serialize)]
struct Object<'a> {
    message: &'a str,
    r#type: &'a str,
    param: Option<&'a str>,
    code: Option<&'a str>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), kind, param: None, code, retry_after: None }
    }

    /// 400: the request is wrong at `param`.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        let param = Some(param.into());
        Self { param, ..Self::new(StatusCode::BAD_REQUEST, INVALID, None, message) }
    }

    /// 400: nobody here honours the field.
    pub fn unsupported(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { code: Some("unsupported_parameter"), ..Self::invalid(param, message) }
    }

    /// 400: the body as a whole cannot be read.
    pub fn unreadable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, INVALID, Some("invalid_json"), message)
    }

    /// 403: the request may come from a foreign page.
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "permission_error", Some("forbidden_origin"), message)
    }

    /// 404: no such route.
    pub fn no_route(method: &str, path: &str) -> Self {
        let message = format!("Unknown request URL: {method} {path}. The API is at /v1.");
        Self::new(StatusCode::NOT_FOUND, INVALID, Some("unknown_url"), message)
    }

    /// 404: no such model.
    pub fn no_model(message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::NOT_FOUND, INVALID, Some("model_not_found"), message);
        Self { param: Some("model".into()), ..error }
    }

    /// 400: the model is for something else.
    pub fn wrong_model(message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::BAD_REQUEST, INVALID, Some("wrong_model_type"), message);
        Self { param: Some("model".into()), ..error }
    }

    /// 405: the route has other methods.
    pub fn wrong_method(method: &str, path: &str) -> Self {
        let message = format!("{path} does not take {method}.");
        Self::new(StatusCode::METHOD_NOT_ALLOWED, INVALID, Some("method_not_allowed"), message)
    }

    /// 408: the body did not come in time.
    pub fn body_too_slow(limit: Duration) -> Self {
        let message = format!("The request body did not arrive within {} seconds.", limit.as_secs());
        Self::new(StatusCode::REQUEST_TIMEOUT, INVALID, Some("request_timeout"), message)
    }

    /// 413: the body is longer than `limit` bytes.
    pub fn body_too_large(limit: usize) -> Self {
        let message = format!("The request body is longer than {} MiB.", limit >> 20);
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, INVALID, Some("request_too_large"), message)
    }

    /// 429: whoever asks has more under way than its share.
    pub fn over_quota(message: impl Into<String>, retry_after: Duration) -> Self {
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Some("rate_limit_exceeded"), message);
        Self { retry_after: Some(retry_after), ..error }
    }

    /// 500: a fault of ours.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, SERVER, Some("internal_error"), message)
    }

    /// 503: not now.
    pub fn unavailable(code: &'static str, message: impl Into<String>, retry_after: Option<Duration>) -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, SERVER, Some(code), message);
        Self { retry_after: Some(retry_after.unwrap_or(USUAL_WAIT)), ..error }
    }

    /// The error object, as bodies and streams carry it.
    pub fn to_json(&self) -> String {
        let error = Object { message: &self.message, r#type: self.kind, param: self.param.as_deref(), code: self.code };
        // Strings alone: nothing of this can fail to serialize.
        serde_json::to_string(&Body { error }).unwrap_or_default()
    }
}

impl From<GatewayError> for ApiError {
    fn from(error: GatewayError) -> Self {
        let message = error.to_string();
        match error {
            GatewayError::UnknownModel { .. } => Self::no_model(message),
            GatewayError::WrongModel { .. } => Self::wrong_model(message),
            GatewayError::NoWorker { retry_after, .. } => Self::unavailable("no_worker", message, Some(retry_after)),
            GatewayError::Loading { retry_after, .. } => Self::unavailable("model_loading", message, Some(retry_after)),
            GatewayError::Quota { retry_after, .. } => Self::over_quota(message, retry_after),
            GatewayError::Refused(refused) => refused.into(),
            GatewayError::Failed(failed) => failed.into(),
        }
    }
}

impl From<Refused> for ApiError {
    fn from(refused: Refused) -> Self {
        let Refused { kind, message, param, retry_after_ms } = refused;
        let again = retry_after_ms.map(Duration::from_millis);
        let bad = |code, default: &str| Self {
            param: param.clone().or_else(|| (!default.is_empty()).then(|| default.to_owned())),
            ..Self::new(StatusCode::BAD_REQUEST, INVALID, code, message.clone())
        };
        match kind {
            RefusalKind::Busy => Self::unavailable("busy", message, again),
            RefusalKind::Loading => Self::unavailable("model_loading", message, again),
            RefusalKind::Draining => Self::unavailable("draining", message, again),
            RefusalKind::UnknownModel => Self::no_model(message),
            RefusalKind::ContextExceeded => bad(Some("context_length_exceeded"), "messages"),
            RefusalKind::UnsupportedField => bad(Some("unsupported_parameter"), ""),
            RefusalKind::InvalidField => bad(None, ""),
            RefusalKind::DeadlineExceeded => {
                Self::new(StatusCode::GATEWAY_TIMEOUT, SERVER, Some("deadline_exceeded"), message)
            }
        }
    }
}

impl From<Failed> for ApiError {
    fn from(failed: Failed) -> Self {
        let status = match failed.kind {
            FailureKind::DeadlineExceeded | FailureKind::WorkerSilent => StatusCode::GATEWAY_TIMEOUT,
            FailureKind::EngineDied
            | FailureKind::EngineError
            | FailureKind::ConnectionLost
            | FailureKind::ReaderTooSlow
            | FailureKind::ShuttingDown
            | FailureKind::Protocol => StatusCode::BAD_GATEWAY,
        };
        Self::new(status, SERVER, Some(failed.kind.as_str()), failed.message)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let json = [(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))];
        let mut response = (self.status, json, self.to_json()).into_response();
        if let Some(wait) = self.retry_after {
            // Whole seconds, never 0: a client that comes back at once only adds to the trouble.
            let seconds = wait.as_millis().div_ceil(1_000).max(1);
            if let Ok(value) = HeaderValue::try_from(seconds.to_string()) {
                response.headers_mut().insert(header::RETRY_AFTER, value);
            }
        }
        response
    }
}

/// 200 with a JSON body.
pub fn ok(body: impl Serialize) -> Response {
    Json(body).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(kind: RefusalKind) -> ApiError {
        let refused = Refused { kind, message: "why".into(), param: Some("top_k".into()), retry_after_ms: Some(1_500) };
        GatewayError::Refused(refused).into()
    }

    #[test]
    fn every_refusal_has_its_status_and_code() {
        for (kind, status, code) in [
            (RefusalKind::Busy, 503, Some("busy")),
            (RefusalKind::Loading, 503, Some("model_loading")),
            (RefusalKind::Draining, 503, Some("draining")),
            (RefusalKind::UnknownModel, 404, Some("model_not_found")),
            (RefusalKind::ContextExceeded, 400, Some("context_length_exceeded")),
            (RefusalKind::UnsupportedField, 400, Some("unsupported_parameter")),
            (RefusalKind::InvalidField, 400, None),
            (RefusalKind::DeadlineExceeded, 504, Some("deadline_exceeded")),
        ] {
            let error = refused(kind);
            assert_eq!((error.status.as_u16(), error.code), (status, code), "{kind:?}");
            assert_eq!(error.retry_after.is_some(), status == 503, "{kind:?}");
        }
        assert_eq!(refused(RefusalKind::UnsupportedField).param.as_deref(), Some("top_k"));
    }

    #[test]
    fn failures_and_missing_models_too() {
        let failed =
            |kind| ApiError::from(Failed { kind, message: "broke".into(), retryable: false, migratable: false });
        assert_eq!(failed(FailureKind::EngineDied).status, 502);
        assert_eq!(failed(FailureKind::EngineDied).code, Some("engine_died"));
        assert_eq!(failed(FailureKind::DeadlineExceeded).status, 504);
        let unknown: ApiError =
            GatewayError::UnknownModel { model: "x".into(), near: vec!["xy".into()], known: vec![] }.into();
        assert_eq!(unknown.status, 404);
        assert!(unknown.message.contains("xy"));
        assert_eq!(
            unknown.to_json(),
            r#"{"error":{"message":"The model `x` does not exist here. Did you mean xy?","type":"invalid_request_error","param":"model","code":"model_not_found"}}"#
        );
    }

    #[test]
    fn retry_after_is_whole_seconds_and_never_zero() {
        for (wait, expected) in [(0, "1"), (1, "1"), (1_500, "2"), (30_000, "30")] {
            let error: ApiError =
                GatewayError::NoWorker { why: "nobody".into(), retry_after: Duration::from_millis(wait) }.into();
            let response = error.into_response();
            assert_eq!(response.status(), 503);
            assert_eq!(response.headers()[header::RETRY_AFTER], expected);
        }
    }
}
