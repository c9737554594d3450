//! `GET /admin/events`: what happens in the cluster, as server-sent events or as lines of JSON.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use ingle_actors::monitor::events::{Event, Follower, MOST_FOLLOWERS, Unfollowed};
use serde::Serialize;
use serde_json::json;
use tokio::time::timeout;

use super::App;
use super::openai::ApiError;

/// So much silence, and something is sent that shows that the connection lives.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// When a program that has followed too slowly should come back, or one that found no place.
const COME_BACK: Duration = Duration::from_secs(5);

/// How events are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    /// `text/event-stream`.
    Events,
    /// A JSON object a line.
    Lines,
}

/// What is asked for.
#[derive(Debug, PartialEq, Eq)]
struct Asked {
    since: Option<u64>,
    follow: bool,
    format: Format,
}

impl Asked {
    fn read(query: &str, headers: &HeaderMap) -> Result<Self, ApiError> {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let accepts = text("accept");
        let lines = ["application/x-ndjson", "application/jsonl"].iter().any(|lines| accepts.contains(lines));
        let format = if lines { Format::Lines } else { Format::Events };
        let mut asked = Self { since: None, follow: true, format };
        for (name, value) in
            query.split('&').filter(|pair| !pair.is_empty()).map(|p| p.split_once('=').unwrap_or((p, "")))
        {
            let wrong = |expected: &str| ApiError::invalid(name, format!("`{name}` must be {expected}."));
            match name {
                "since" => asked.since = Some(value.parse().map_err(|_| wrong("the number of an event"))?),
                "follow" => asked.follow = value.parse().map_err(|_| wrong("true or false"))?,
                "format" => {
                    asked.format = match value {
                        "sse" => Format::Events,
                        "jsonl" => Format::Lines,
                        _ => return Err(wrong("sse or jsonl")),
                    }
                }
                _ => return Err(ApiError::invalid(name, "There are `since`, `follow` and `format` here.")),
            }
        }
        // Whoever comes back by itself has more than when it first asked.
        if let Ok(last) = text("last-event-id").parse() {
            asked.since = Some(last);
        }
        Ok(asked)
    }
}

/// `GET /admin/events`.
pub async fn follow(
    State(app): State<Arc<App>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let asked = Asked::read(&query.unwrap_or_default(), &headers)?;
    let follower = app.node.events().follow(asked.since).ok_or_else(|| {
        let message = format!("{MOST_FOLLOWERS} programs follow what happens here, and no more may.");
        ApiError::unavailable("busy", message, Some(COME_BACK))
    })?;
    let kind = match asked.format {
        Format::Events => "text/event-stream",
        Format::Lines => "application/x-ndjson",
    };
    let headers = [(header::CONTENT_TYPE, kind), (header::CACHE_CONTROL, "no-store")];
    let running = Running { follower, asked, ended: false };
    let stream = futures_util::stream::unfold(running, |mut running| async move {
        running.next().await.map(|bytes| (Ok::<_, Infallible>(bytes), running))
    });
    Ok((headers, Body::from_stream(stream)).into_response())
}

/// One who follows. It is asked for more when its client has taken what there was, so that nothing piles up.
struct Running {
    follower: Follower,
    asked: Asked,
    ended: bool,
}

impl Running {
    /// The next bytes to send; `None` at the end.
    async fn next(&mut self) -> Option<Bytes> {
        if self.ended {
            return None;
        }
        let format = self.asked.format;
        if !self.asked.follow {
            let ready = self.follower.ready();
            self.ended = !ready.as_ref().is_ok_and(|events| !events.is_empty());
            return Some(written(ready, format));
        }
        Some(match timeout(KEEP_ALIVE, self.follower.next()).await {
            Err(_) if format == Format::Events => Bytes::from_static(b": keep-alive\n\n"),
            Err(_) => Bytes::from_static(b"\n"),
            Ok(events) => {
                self.ended = events.is_err();
                written(events, format)
            }
        })
    }
}

fn written(events: Result<Vec<Event>, Unfollowed>, format: Format) -> Bytes {
    let mut out = Vec::new();
    match events {
        Ok(events) => {
            for event in &events {
                let head = format!("id: {}\n", event.number);
                write(&mut out, format, &head, event);
            }
        }
        // The last word: a client that reads on finds the end.
        Err(why) => write(&mut out, format, "event: end\n", &json!({ "kind": "end", "why": why.to_string() })),
    }
    out.into()
}

fn write(out: &mut Vec<u8>, format: Format, head: &str, value: &impl Serialize) {
    let (before, behind) = match format {
        Format::Events => (format!("{head}data: "), "\n\n"),
        Format::Lines => (String::new(), "\n"),
    };
    out.extend_from_slice(before.as_bytes());
    // Numbers and strings: nothing of this can fail to be written into memory.
    let _ = serde_json::to_writer(&mut *out, value);
    out.extend_from_slice(behind.as_bytes());
}

#[cfg(test)]
mod tests {
    use axum::http::{HeaderName, HeaderValue};

    use super::*;

    fn asked(query: &str, headers: &[(&'static str, &'static str)]) -> Result<Asked, ApiError> {
        let header = |(name, value): &(&'static str, &'static str)| {
            (HeaderName::from_static(name), HeaderValue::from_static(value))
        };
        let headers: HeaderMap = headers.iter().map(header).collect();
        Asked::read(query, &headers)
    }

    #[test]
    fn what_is_asked_for_is_read_and_nonsense_refused() {
        let usual = Asked { since: None, follow: true, format: Format::Events };
        assert_eq!(asked("", &[]).unwrap(), usual);
        let lines = Asked { since: Some(7), follow: false, format: Format::Lines };
        assert_eq!(asked("since=7&follow=false&format=jsonl", &[]).unwrap(), lines);
        assert_eq!(asked("since=7&follow=false", &[("accept", "application/x-ndjson")]).unwrap(), lines);
        let again = Asked { since: Some(9), ..usual };
        assert_eq!(asked("since=7", &[("last-event-id", "9")]).unwrap(), again, "it has more by now");
        for wrong in ["since=x", "since=", "follow=1", "format=xml", "sinze=1"] {
            let error = asked(wrong, &[]).unwrap_err();
            assert_eq!(error.status, 400, "{wrong}");
        }
    }

    #[test]
    fn each_event_is_one_message_or_one_line() {
        let end = || Err(Unfollowed::TooSlow(3));
        let text = String::from_utf8(written(end(), Format::Events).to_vec()).unwrap();
        assert!(text.starts_with("event: end\ndata: {") && text.ends_with("}\n\n"), "{text}");
        let text = String::from_utf8(written(end(), Format::Lines).to_vec()).unwrap();
        assert!(text.starts_with('{') && text.ends_with("}\n") && text.contains("3 events are gone"), "{text}");
    }
}
