//! The outermost layer: an id and a span for each request, and an answer whatever happens below.

use std::panic::AssertUnwindSafe;

use axum::extract::Request;
use axum::http::{HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures_util::FutureExt;
use ingle_actors::protocol::wire::v2::TraceContext;
use ingle_actors::protocol::{RequestId, to_hex};
use tracing::field::Empty;
use tracing::{Instrument, Span};

use super::openai::ApiError;
use crate::ingress;

/// Carries the id of a request on every answer.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// What a request was given at the door; stands in its extensions.
#[derive(Debug, Clone)]
pub struct RequestContext {
    /// Its id.
    pub request_id: RequestId,
    /// Its place in a trace.
    pub trace: TraceContext,
    /// Its span.
    pub span: Span,
}

/// The middleware.
pub async fn request_id(mut request: Request, next: Next) -> Response {
    let request_id = ingress::new_request_id();
    let traceparent = request.headers().get("traceparent").and_then(|value| value.to_str().ok());
    let trace = ingress::trace_context(traceparent);
    let span = tracing::info_span!(
        "request",
        request_id = %request_id,
        trace_id = to_hex(&trace.trace_id),
        method = %request.method(),
        path = request.uri().path(),
        principal = Empty,
        model = Empty,
        user = Empty,
    );
    request.extensions_mut().insert(RequestContext { request_id, trace, span: span.clone() });
    // A handler that panics must not take the connection, and the answers to other requests, with it in silence.
    let answer = AssertUnwindSafe(next.run(request)).catch_unwind().instrument(span.clone()).await;
    let mut response = answer.unwrap_or_else(|_| {
        span.in_scope(|| tracing::error!("a handler panicked"));
        ApiError::internal("Something went wrong inside this node; its log says more.").into_response()
    });
    if let Ok(value) = HeaderValue::try_from(format!("req_{request_id}")) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    span.in_scope(|| tracing::debug!(status = response.status().as_u16(), "answered"));
    response
}
