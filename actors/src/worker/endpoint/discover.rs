//! Servers on this machine that could answer for models: found by asking the ports where they usually are. Nobody but
//! this machine is asked, and nothing is registered here.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use futures_util::future::join_all;
use reqwest::StatusCode;
use serde::Deserialize;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::address::EndpointUrl;
use super::dialect::{FarSide, Program, identify};
use super::health::{List, get};
use super::name_of;
use super::options::client;

/// Where Ollama, llama.cpp's server (today, and as it says of its future releases), vLLM and LM Studio usually are.
pub const USUAL_PORTS: [u16; 5] = [11434, 8080, 9931, 8000, 1234];

/// Somebody on this machine takes a connection at once, or nobody is there.
const CONNECT_DEADLINE: Duration = Duration::from_millis(500);
/// How long one question may take, and all questions to one port.
const QUESTION_DEADLINE: Duration = Duration::from_secs(2);
const PORT_DEADLINE: Duration = Duration::from_secs(8);
/// The most models of one server that are looked at.
const MOST_MODELS: usize = 128;

/// A server that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundServer {
    /// What it is, in words.
    pub program: String,
    /// Where it is, as `--endpoint` takes it.
    pub url: String,
    /// It says nothing without a key: what it has is not known then.
    pub needs_key: bool,
    /// Its models that write texts.
    pub models: Vec<FoundName>,
}

/// A model of a server that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundName {
    /// Its name there.
    pub there: String,
    /// The name that it would have here, but for what other models are called.
    pub here: String,
}

/// Asks all these ports of this machine at the same time.
pub async fn discover(ports: &[u16]) -> Vec<FoundServer> {
    let found = join_all(ports.iter().map(|port| async move { timeout(PORT_DEADLINE, look(*port)).await.ok()? })).await;
    found.into_iter().flatten().collect()
}

/// What is at a port, at either of the two addresses that mean this machine.
async fn look(port: u16) -> Option<FoundServer> {
    for ip in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
        let address = SocketAddr::new(ip, port);
        if matches!(timeout(CONNECT_DEADLINE, TcpStream::connect(address)).await, Ok(Ok(_))) {
            return ask(address).await;
        }
    }
    None
}

async fn ask(address: SocketAddr) -> Option<FoundServer> {
    let url: EndpointUrl = format!("http://{address}").parse().ok()?;
    let client = client(&url).ok()?;
    let question =
        async |route: &str| timeout(QUESTION_DEADLINE, get(&client, url.route(route), None)).await.ok()?.ok();
    let (status, body) = question("v1/models").await?;
    if matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
        let far = identify(&client, &url, None, "").await;
        let program = far.in_words().unwrap_or_else(|| Program::Unknown.as_str().to_owned());
        return Some(FoundServer { program, url: url.to_string(), needs_key: true, models: Vec::new() });
    }
    if status != StatusCode::OK {
        return None;
    }
    let list: List = serde_json::from_slice(&body).ok()?;
    let owner = list.data.iter().find_map(|model| model.owned_by.clone()).unwrap_or_default();
    let far = identify(&client, &url, None, &owner).await;
    if far.program == Program::Ingle {
        // Our own node, or one of the household: their models are known already.
        return None;
    }
    let others = match far.program {
        Program::Ollama => embedding_models_of_ollama(&question("api/tags").await?.1),
        Program::LmStudio => embedding_models_of_lm_studio(&question("api/v0/models").await?.1),
        _ => Vec::new(),
    };
    let ids = list.data.into_iter().map(|model| model.id).filter(|id| !id.is_empty() && !others.contains(id));
    Some(found(&url, &far, ids.take(MOST_MODELS)))
}

fn found(url: &EndpointUrl, far: &FarSide, ids: impl Iterator<Item = String>) -> FoundServer {
    let program = far.in_words().unwrap_or_else(|| Program::Unknown.as_str().to_owned());
    let models = ids.map(|there| FoundName { here: name_here(&there), there }).collect();
    FoundServer { program, url: url.to_string(), needs_key: false, models }
}

/// A name that a model can be registered under, as near to its name there as may be.
fn name_here(there: &str) -> String {
    let name: String = name_of(there)
        .chars()
        .map(|c| match c {
            c if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | ':' | '/' | '@' | '+') => c,
            _ => '-',
        })
        .take(100)
        .collect();
    let parts: Vec<&str> = name.split('/').filter(|part| !matches!(*part, "" | "." | "..")).collect();
    let name: String = parts.join("/").chars().skip_while(|c| !c.is_ascii_alphanumeric()).collect();
    if name.is_empty() || name == "default" { "model".to_owned() } else { name }
}

#[derive(Deserialize)]
struct Tags {
    models: Vec<Tag>,
}

#[derive(Deserialize)]
struct Tag {
    name: String,
    #[serde(default)]
    details: Option<Details>,
}

#[derive(Deserialize)]
struct Details {
    #[serde(default)]
    family: String,
}

/// Models that turn texts into numbers cannot chat.
fn embedding_models_of_ollama(body: &[u8]) -> Vec<String> {
    let Ok(tags) = serde_json::from_slice::<Tags>(body) else { return Vec::new() };
    let is_bert = |tag: &Tag| tag.details.as_ref().is_some_and(|details| details.family.contains("bert"));
    tags.models.into_iter().filter(is_bert).map(|tag| tag.name).collect()
}

#[derive(Deserialize)]
struct Native {
    data: Vec<NativeModel>,
}

#[derive(Deserialize)]
struct NativeModel {
    id: String,
    #[serde(rename = "type")]
    kind: String,
}

/// See [`embedding_models_of_ollama`].
fn embedding_models_of_lm_studio(body: &[u8]) -> Vec<String> {
    let Ok(native) = serde_json::from_slice::<Native>(body) else { return Vec::new() };
    native.data.into_iter().filter(|model| model.kind == "embeddings").map(|model| model.id).collect()
}

#[cfg(test)]
mod tests {
    use ingle_protocol::names::check_model;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_here_are_near_to_those_there() {
        for (there, here) in [
            ("llama3.2:3b", "llama3.2:3b"),
            ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B"),
            ("/home/me/models/SmolLM2-Q4_K_M.gguf", "smollm2-q4_k_m"),
            ("my model (new)", "my-model--new-"),
            ("/models/llama", "models/llama"),
            ("../../x", "x"),
            ("default", "model"),
            ("ü", "model"),
        ] {
            assert_eq!(name_here(there), here);
        }
    }

    #[test]
    fn models_that_cannot_chat_are_left_out() {
        let tags = r#"{"models":[{"name":"nomic-embed-text:latest","details":{"family":"nomic-bert"}},
            {"name":"llama3.2:3b","details":{"family":"llama"}},{"name":"old"}]}"#;
        assert_eq!(embedding_models_of_ollama(tags.as_bytes()), ["nomic-embed-text:latest"]);
        let native = r#"{"data":[{"id":"text-embedding-nomic","type":"embeddings","state":"not-loaded"},
            {"id":"qwen","type":"llm","state":"loaded"},{"id":"qwen-vl","type":"vlm","state":"loaded"}]}"#;
        assert_eq!(embedding_models_of_lm_studio(native.as_bytes()), ["text-embedding-nomic"]);
        assert!(embedding_models_of_ollama(b"<html>").is_empty() && embedding_models_of_lm_studio(b"[]").is_empty());
    }

    proptest! {
        #[test]
        fn whatever_a_server_calls_it_can_be_registered(there: String) {
            prop_assert!(check_model(&name_here(&there)).is_ok(), "{:?}", name_here(&there));
        }
    }
}
