//! What is measured and what is known, for people and for machines.

mod latency;
mod status;

use ingle_protocol::to_hex;
use ingle_protocol::wire::v2::Request;

pub use latency::{Latencies, Outcome, Timeline};
pub use status::{ClusterStatus, LatencySummary, ModelStatus, NodeStatus, cluster_status};

/// The span of a request in one process. All processes that it crosses log the same `trace_id` and `request_id`.
pub fn request_span(hop: &'static str, request: &Request) -> tracing::Span {
    tracing::info_span!(
        "request",
        hop,
        request_id = %request.request_id,
        trace_id = %to_hex(&request.trace.trace_id),
        attempt = request.attempt,
        model = request.model,
    )
}
