//! Which program answers at the far side, learnt by asking, and what it allows beyond OpenAI's HTTP.

use std::time::Duration;

use reqwest::StatusCode;
use serde::Deserialize;

use super::address::{EndpointUrl, Secret};
use super::health::{Meta, get};

/// How long one question may take. Programs that do not have it say so at once.
const QUESTION_DEADLINE: Duration = Duration::from_secs(2);
/// The most of a version that is shown, in characters.
const LONGEST_VERSION: usize = 40;

/// A program that we know.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Program {
    /// llama.cpp's `llama-server`.
    LlamaCpp,
    /// vLLM.
    Vllm,
    /// Ollama.
    Ollama,
    /// LM Studio.
    LmStudio,
    /// A node like this one.
    Ingle,
    /// Something else that speaks OpenAI's HTTP.
    #[default]
    Unknown,
}

/// How a program is asked to go on with an answer that was begun: its last message is the assistant's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Continue {
    /// `continue_final_message`, and no new turn.
    Flagged,
    /// It does so without being told.
    Implied,
}

impl Program {
    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::LlamaCpp => "llama.cpp",
            Self::Vllm => "vLLM",
            Self::Ollama => "Ollama",
            Self::LmStudio => "LM Studio",
            Self::Ingle => "Ingle",
            Self::Unknown => "a server of unknown make",
        }
    }

    /// `None` where nobody knows how it would be done: it would begin a second answer behind the first.
    pub fn continues(self) -> Option<Continue> {
        match self {
            // Older ones ignore the members and go on with an assistant's message at the end all the same.
            Self::LlamaCpp | Self::Vllm => Some(Continue::Flagged),
            Self::Ollama => Some(Continue::Implied),
            Self::LmStudio | Self::Ingle | Self::Unknown => None,
        }
    }
}

/// What a far side says of itself beside its models.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FarSide {
    /// What it is.
    pub program: Program,
    /// Its version, where it says one.
    pub version: Option<String>,
    /// Answers that it writes at once.
    pub slots: Option<u32>,
    /// Context length in tokens; 0 where it does not say.
    pub context_length: u32,
}

impl FarSide {
    /// In words, for tables; `None` where nothing is known.
    pub fn in_words(&self) -> Option<String> {
        match (self.program, &self.version) {
            (Program::Unknown, _) => None,
            (program, None) => Some(program.as_str().to_owned()),
            (program, Some(version)) => Some(format!("{} {version}", program.as_str())),
        }
    }
}

#[derive(Deserialize)]
struct Properties {
    total_slots: u32,
    #[serde(default)]
    default_generation_settings: Option<Meta>,
    #[serde(default)]
    build_info: Option<String>,
}

#[derive(Deserialize)]
struct Version {
    version: String,
}

#[derive(Deserialize)]
struct NativeList {
    data: Vec<NativeModel>,
}

#[derive(Deserialize)]
struct NativeModel {
    #[serde(rename = "type")]
    _kind: String,
    #[serde(rename = "state")]
    _state: String,
}

/// A version as it may stand in a table: it comes from a stranger.
fn shown(version: &str) -> Option<String> {
    let plain = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '+');
    let text: String = version.chars().filter(plain).take(LONGEST_VERSION).collect();
    (!text.is_empty()).then_some(text)
}

/// Reads what a program said to the question that it alone has.
fn understand(program: Program, body: &[u8]) -> Option<FarSide> {
    let found = |version: Option<&str>| FarSide { program, version: version.and_then(shown), ..FarSide::default() };
    match program {
        Program::LlamaCpp => {
            let said: Properties = serde_json::from_slice(body).ok()?;
            let context_length = said.default_generation_settings.and_then(|settings| settings.n_ctx).unwrap_or(0);
            let slots = Some(said.total_slots).filter(|slots| *slots > 0);
            Some(FarSide { slots, context_length, ..found(said.build_info.as_deref()) })
        }
        Program::Vllm | Program::Ollama => {
            let said: Version = serde_json::from_slice(body).ok()?;
            Some(found(Some(&said.version)))
        }
        Program::LmStudio => {
            let said: NativeList = serde_json::from_slice(body).ok()?;
            (!said.data.is_empty()).then(|| found(None))
        }
        Program::Ingle | Program::Unknown => None,
    }
}

/// The question that a program alone answers.
fn question(program: Program) -> &'static str {
    match program {
        Program::LlamaCpp => "props",
        Program::Ollama => "api/version",
        Program::Vllm => "version",
        Program::LmStudio | Program::Ingle | Program::Unknown => "api/v0/models",
    }
}

/// Whom to ask for first: who owns its models, as it says itself, is a hint.
fn order(owner: &str) -> Vec<Program> {
    let mut all = vec![Program::LlamaCpp, Program::Ollama, Program::Vllm, Program::LmStudio];
    let hint = match owner {
        "llamacpp" => Program::LlamaCpp,
        "library" => Program::Ollama,
        "vllm" => Program::Vllm,
        "organization_owner" => Program::LmStudio,
        _ => return all,
    };
    all.sort_by_key(|program| *program != hint);
    all
}

/// Finds out what answers there. `owner` is what it says of its models' owner. One question after the other: some
/// servers answer one connection at a time.
pub async fn identify(client: &reqwest::Client, url: &EndpointUrl, key: Option<&Secret>, owner: &str) -> FarSide {
    if owner == "ingle" {
        return FarSide { program: Program::Ingle, ..FarSide::default() };
    }
    for program in order(owner) {
        // Other servers have a `/version` too: whether they can be asked to go on is not known.
        if program == Program::Vllm && owner != "vllm" {
            continue;
        }
        let asked = tokio::time::timeout(QUESTION_DEADLINE, get(client, url.route(question(program)), key)).await;
        if let Ok(Ok((StatusCode::OK, body))) = asked
            && let Some(found) = understand(program, &body)
        {
            return found;
        }
    }
    FarSide::default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_known_by_what_they_alone_say() {
        let of = |program, body: &str| understand(program, body.as_bytes());
        let props =
            r#"{"default_generation_settings":{"n_ctx":4096,"params":{}},"total_slots":4,"build_info":"b6000-1a2b"}"#;
        let llama = of(Program::LlamaCpp, props).unwrap();
        assert_eq!((llama.slots, llama.context_length), (Some(4), 4096));
        assert_eq!(llama.in_words().as_deref(), Some("llama.cpp b6000-1a2b"));
        assert_eq!(of(Program::LlamaCpp, r#"{"total_slots":0}"#).unwrap().slots, None);
        let ollama = of(Program::Ollama, r#"{"version":"0.5.1"}"#).unwrap();
        assert_eq!(ollama.in_words().as_deref(), Some("Ollama 0.5.1"));
        let studio = r#"{"object":"list","data":[{"id":"m","object":"model","type":"llm","state":"loaded"}]}"#;
        assert_eq!(of(Program::LmStudio, studio).unwrap().in_words().as_deref(), Some("LM Studio"));
        for (program, body) in [
            (Program::LlamaCpp, "{}"),
            (Program::LlamaCpp, "<html>"),
            (Program::Ollama, r#"{"version":5}"#),
            (Program::LmStudio, r#"{"data":[]}"#),
            (Program::LmStudio, r#"{"data":[{"id":"m"}]}"#),
        ] {
            assert_eq!(of(program, body), None, "{body}");
        }
        assert_eq!(FarSide::default().in_words(), None);
    }

    #[test]
    fn a_version_cannot_steer_a_terminal_or_fill_it() {
        assert_eq!(shown("1.2\u{1b}[2J\n"), Some("1.22J".into()));
        assert_eq!(shown(&"9".repeat(500)).unwrap().len(), LONGEST_VERSION);
        assert_eq!(shown("\u{7}"), None);
    }

    #[test]
    fn who_is_hinted_at_is_asked_for_first_and_everybody_once() {
        for (owner, first) in [("vllm", Program::Vllm), ("library", Program::Ollama), ("me", Program::LlamaCpp)] {
            let order = order(owner);
            assert_eq!((order[0], order.len()), (first, 4));
        }
    }
}
