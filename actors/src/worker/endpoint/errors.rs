//! What goes wrong at the far side, in our words.

use std::time::Duration;

use ingle_protocol::wire::v2::{FailureKind, RefusalKind, Refused};
use reqwest::StatusCode;
use reqwest::header::{HeaderMap, RETRY_AFTER};
use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc2822;

/// The longest message that is passed on, in characters.
const LONGEST_MESSAGE: usize = 2_000;
/// A far side that says "not now" and no more.
const USUAL_WAIT: Duration = Duration::from_secs(1);
/// Waits beyond this are cut: nobody should believe that they are known so long before.
const LONGEST_WAIT: Duration = Duration::from_secs(3_600);

/// How an exchange ended that did not end well.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trouble {
    /// The far side does not take the request.
    Refused(Refused),
    /// The exchange broke.
    Failed(FailureKind, String),
}

/// An error as the far side wrote it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct FarError {
    /// In words.
    pub message: String,
    /// The field at fault.
    pub param: Option<String>,
    /// `code` and `type`, to look for names that we know.
    names: String,
    /// `code`, where it is an HTTP status.
    pub status: Option<u16>,
}

impl FarError {
    /// Reads an error's body: OpenAI's shape, Ollama's, FastAPI's, or any text.
    pub fn read(body: &[u8]) -> Self {
        let Ok(value) = serde_json::from_slice::<Value>(body) else {
            return Self { message: cut(&String::from_utf8_lossy(body)), ..Self::default() };
        };
        let error = match value.get("error") {
            Some(error) => error,
            None => &value,
        };
        let text = |name: &str| error.get(name).and_then(Value::as_str).map(str::to_owned);
        let message = match error {
            Value::String(message) => message.clone(),
            _ => text("message").or_else(|| text("detail")).unwrap_or_else(|| error.to_string()),
        };
        let names = ["code", "type"].map(|name| text(name).unwrap_or_default()).join(" ");
        let status = error.get("code").and_then(Value::as_u64).and_then(|code| u16::try_from(code).ok());
        let param = text("param").map(|param| param.chars().take(200).collect());
        Self { message: cut(&message), param, names, status: status.filter(|code| (400..600).contains(code)) }
    }

    fn is_context_exceeded(&self) -> bool {
        self.names.contains("context_length_exceeded")
            || self.names.contains("exceed_context_size")
            || self.message.contains("maximum context length")
    }
}

fn cut(message: &str) -> String {
    message.trim().chars().take(LONGEST_MESSAGE).collect()
}

/// An answer other than 200.
pub fn of_status(status: StatusCode, headers: &HeaderMap, error: FarError, endpoint: &str) -> Trouble {
    let said = if error.message.is_empty() { format!("it answers {status}") } else { error.message.clone() };
    let refused = |kind, retry_after: Option<Duration>| {
        let retry_after_ms = retry_after.map(|wait| u64::try_from(wait.as_millis()).unwrap_or(u64::MAX));
        Trouble::Refused(Refused { kind, message: said.clone(), param: error.param.clone(), retry_after_ms })
    };
    let failed = |why: String| Trouble::Failed(FailureKind::EngineError, format!("the endpoint {endpoint} {why}"));
    match status {
        // llama.cpp while it starts: that is no lack of room.
        StatusCode::SERVICE_UNAVAILABLE if error.message.starts_with("Loading model") => {
            refused(RefusalKind::Loading, Some(retry_after(headers).unwrap_or(USUAL_WAIT)))
        }
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE | StatusCode::REQUEST_TIMEOUT => {
            refused(RefusalKind::Busy, Some(retry_after(headers).unwrap_or(USUAL_WAIT)))
        }
        // Our key is at fault, not the client's request.
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::PROXY_AUTHENTICATION_REQUIRED => {
            failed(format!("does not let us in ({status}: {said}); check the key that api_key_env names"))
        }
        _ if status.is_client_error() && error.is_context_exceeded() => refused(RefusalKind::ContextExceeded, None),
        StatusCode::PAYLOAD_TOO_LARGE => refused(RefusalKind::ContextExceeded, None),
        StatusCode::NOT_FOUND => refused(RefusalKind::UnknownModel, None),
        _ if status.is_client_error() => refused(RefusalKind::InvalidField, None),
        _ if status.is_redirection() => {
            failed(format!("sends us elsewhere ({status}), which is not followed: write its final address"))
        }
        _ => failed(format!("answers {status}: {said}")),
    }
}

/// `Retry-After`, in seconds or as a date.
pub fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let wait = match text.parse::<f64>() {
        Ok(seconds) => Duration::try_from_secs_f64(seconds).ok()?,
        Err(_) => {
            let then = OffsetDateTime::parse(text, &Rfc2822).ok()?;
            Duration::try_from(then - OffsetDateTime::now_utc()).unwrap_or_default()
        }
    };
    Some(wait.min(LONGEST_WAIT))
}

/// A request or an answer that did not come through, in one line, with all its causes.
pub fn of_transport(error: &reqwest::Error, endpoint: &str) -> Trouble {
    let message = format!("the endpoint {endpoint}: {}", crate::models::in_words(error));
    Trouble::Failed(FailureKind::ConnectionLost, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(status: u16, body: &str) -> Result<RefusalKind, FailureKind> {
        let status = StatusCode::from_u16(status).unwrap();
        match of_status(status, &HeaderMap::new(), FarError::read(body.as_bytes()), "box:80") {
            Trouble::Refused(refused) => Ok(refused.kind),
            Trouble::Failed(kind, _) => Err(kind),
        }
    }

    #[test]
    fn every_status_has_its_kind() {
        let context = r#"{"error":{"code":400,"message":"too long","type":"exceed_context_size_error","n_ctx":512}}"#;
        for (status, body, expected) in [
            (400, "{}", Ok(RefusalKind::InvalidField)),
            (422, "{}", Ok(RefusalKind::InvalidField)),
            (400, context, Ok(RefusalKind::ContextExceeded)),
            (404, "{}", Ok(RefusalKind::UnknownModel)),
            (413, "", Ok(RefusalKind::ContextExceeded)),
            (429, "{}", Ok(RefusalKind::Busy)),
            (503, "Loading model", Ok(RefusalKind::Loading)),
            (503, r#"{"error":"server busy, please try again."}"#, Ok(RefusalKind::Busy)),
            (401, "{}", Err(FailureKind::EngineError)),
            (307, "", Err(FailureKind::EngineError)),
            (500, "{}", Err(FailureKind::EngineError)),
            (502, "<html>", Err(FailureKind::EngineError)),
        ] {
            assert_eq!(kind(status, body), expected, "{status} {body}");
        }
    }

    #[test]
    fn errors_of_all_shapes_are_read() {
        for (body, message) in [
            (r#"{"error":{"message":"no","type":"t","param":"temperature","code":null}}"#, "no"),
            (r#"{"error":"model 'x' not found"}"#, "model 'x' not found"),
            (r#"{"object":"error","message":"no","code":400}"#, "no"),
            (r#"{"detail":"Not Found"}"#, "Not Found"),
            ("<h1>Bad gateway</h1>\n", "<h1>Bad gateway</h1>"),
            (r#"{"error":{"x":1}}"#, r#"{"x":1}"#),
            ("", ""),
        ] {
            assert_eq!(FarError::read(body.as_bytes()).message, message, "{body}");
        }
        let error = FarError::read(br#"{"error":{"message":"no","param":"top_p","code":422}}"#);
        assert_eq!((error.param.as_deref(), error.status), (Some("top_p"), Some(422)));
        assert_eq!(FarError::read("é".repeat(5_000).as_bytes()).message.chars().count(), LONGEST_MESSAGE);
    }

    #[test]
    fn retry_after_is_read_in_both_forms() {
        let wait = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, text.parse().unwrap());
            retry_after(&headers)
        };
        assert_eq!(wait("7"), Some(Duration::from_secs(7)));
        assert_eq!(wait("0.5"), Some(Duration::from_millis(500)));
        assert_eq!(wait("Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::ZERO), "over already");
        assert_eq!(wait("Sun, 06 Nov 2994 08:49:37 GMT"), Some(LONGEST_WAIT));
        assert_eq!((wait("soon"), wait("-1"), wait("NaN")), (None, None, None));
    }
}
