//! What every request gets where it enters, whichever door it takes: an id, a place in a trace, a seed.

use ingle_actors::protocol::RequestId;
use ingle_actors::protocol::wire::v2::TraceContext;

/// The principal of whoever reaches the loopback address or the control socket.
pub const LOCAL_PRINCIPAL: &str = "local";

/// A fresh request id.
pub fn new_request_id() -> RequestId {
    RequestId(rand::random())
}

/// A seed for requests that bring none: 63 bits, which every server that it may be passed on to takes.
pub fn random_seed() -> u64 {
    rand::random::<u64>() >> 1
}

/// A span of our own in the trace that a `traceparent` header names, or in a new trace where it names none that
/// is valid (as W3C trace context says).
pub fn trace_context(traceparent: Option<&str>) -> TraceContext {
    let (trace_id, flags) = traceparent.and_then(read_traceparent).unwrap_or_else(|| (rand::random(), 1));
    TraceContext { trace_id, parent_span: rand::random(), flags }
}

/// Trace id and flags of `00-<32 hex>-<16 hex>-<2 hex>`.
fn read_traceparent(text: &str) -> Option<([u8; 16], u8)> {
    let mut parts = text.trim().split('-');
    let version: [u8; 1] = hex(parts.next()?)?;
    let trace_id: [u8; 16] = hex(parts.next()?)?;
    let parent: [u8; 8] = hex(parts.next()?)?;
    let flags: [u8; 1] = hex(parts.next()?)?;
    // Later versions may have more parts; version 0 has not, and ff is forbidden.
    let shape = version[0] != 0xff && (version[0] != 0 || parts.next().is_none());
    (shape && trace_id != [0; 16] && parent != [0; 8]).then_some((trace_id, flags[0]))
}

fn hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != N * 2 || !digits.iter().all(|d| d.is_ascii_digit() || (b'a'..=b'f').contains(d)) {
        return None;
    }
    let mut bytes = [0; N];
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(index * 2..index * 2 + 2)?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ingle_actors::protocol::to_hex;

    #[test]
    fn a_valid_traceparent_is_continued_and_all_others_start_anew() {
        let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";
        let ours = trace_context(Some(good));
        assert_eq!(to_hex(&ours.trace_id), "0af7651916cd43dd8448eb211c80319c");
        assert_eq!(ours.flags, 0);
        assert_ne!(to_hex(&ours.parent_span), "b7ad6b7169203331", "the span is ours");
        for bad in [
            "",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0AF7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
            "00-é-b7ad6b7169203331-01",
        ] {
            assert_eq!(read_traceparent(bad), None, "{bad}");
        }
    }
}
