//! What an endpoint says about itself when it is asked.

use std::time::Duration;

use reqwest::StatusCode;
use serde::Deserialize;

use super::address::{EndpointUrl, Secret};
use super::errors::FarError;

/// How long one question may take.
const PROBE_DEADLINE: Duration = Duration::from_secs(5);
/// The longest answer that is read.
const PROBE_LIMIT: usize = 4 << 20;
/// The most models that are listed in a message.
const MOST_NAMED: usize = 8;

/// The model that answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundModel {
    /// Its name at the far side.
    pub name: String,
    /// Context length in tokens; 0 where it is not said.
    pub context_length: u32,
    /// Who owns it, as the far side says: a hint at what answers there.
    pub owner: String,
}

/// Why it does not answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotReady {
    /// The server is there and reads its model.
    Loading,
    /// Anything else, in words.
    Failed(String),
}

/// The answer to `GET /v1/models`.
#[derive(Deserialize)]
pub(super) struct List {
    pub data: Vec<Listed>,
}

/// One of its models.
#[derive(Deserialize)]
pub(super) struct Listed {
    pub id: String,
    #[serde(default)]
    pub owned_by: Option<String>,
    /// vLLM.
    #[serde(default)]
    max_model_len: Option<u32>,
    /// llama.cpp.
    #[serde(default)]
    meta: Option<Meta>,
}

/// What llama.cpp says of a model or of its slots.
#[derive(Deserialize)]
pub(super) struct Meta {
    #[serde(default)]
    pub n_ctx: Option<u32>,
}

/// Finds `wanted` in the answer to `GET /v1/models`; without a name, the only model that there is.
fn choose(body: &[u8], wanted: Option<&str>) -> Result<FoundModel, String> {
    let list: List =
        serde_json::from_slice(body).map_err(|error| format!("its list of models cannot be read ({error})"))?;
    let named = || {
        let names: Vec<&str> = list.data.iter().take(MOST_NAMED).map(|model| model.id.as_str()).collect();
        let more = if list.data.len() > MOST_NAMED { ", …" } else { "" };
        format!("{}{more}", names.join(", "))
    };
    let found = match (wanted, list.data.as_slice()) {
        (_, []) => return Err("it has no model".into()),
        (None, [only]) => only,
        (None, _) => {
            return Err(format!(
                "it has several models ({}): choose one with --endpoint-model (--model of `ingle models add`)",
                named()
            ));
        }
        (Some(wanted), all) => {
            // Ollama lists `name:latest` and answers to `name`.
            let latest = format!("{wanted}:latest");
            let found = all.iter().find(|model| model.id == wanted).or_else(|| all.iter().find(|m| m.id == latest));
            found.ok_or_else(|| format!("it does not have the model `{wanted}`, but {}", named()))?
        }
    };
    let context_length = found.max_model_len.or(found.meta.as_ref().and_then(|meta| meta.n_ctx)).unwrap_or(0);
    Ok(FoundModel { name: found.id.clone(), context_length, owner: found.owned_by.clone().unwrap_or_default() })
}

/// Asks for the models.
pub async fn probe(
    client: &reqwest::Client,
    url: &EndpointUrl,
    key: Option<&Secret>,
    wanted: Option<&str>,
) -> Result<FoundModel, NotReady> {
    let failed = |why: String| NotReady::Failed(key.map_or(why.clone(), |key| key.struck_from(&why)));
    match tokio::time::timeout(PROBE_DEADLINE, get(client, url.route("v1/models"), key)).await {
        Err(_) => Err(failed(format!("it does not answer within {} s", PROBE_DEADLINE.as_secs()))),
        Ok(Err(why)) => Err(failed(why)),
        Ok(Ok((StatusCode::OK, body))) => choose(&body, wanted).map_err(failed),
        Ok(Ok((StatusCode::SERVICE_UNAVAILABLE, _))) => Err(NotReady::Loading),
        Ok(Ok((status, body))) => {
            let said: String = FarError::read(&body).message.chars().take(300).collect();
            Err(failed(format!("it answers {status} when asked for its models: {said}")))
        }
    }
}

/// The answer to a question, whole and bounded.
pub(super) async fn get(
    client: &reqwest::Client,
    url: reqwest::Url,
    key: Option<&Secret>,
) -> Result<(StatusCode, Vec<u8>), String> {
    let mut request = client.get(url);
    if let Some(key) = key {
        request = request.bearer_auth(key.expose());
    }
    let words = |error: reqwest::Error| crate::models::in_words(&error);
    let mut response = request.send().await.map_err(words)?;
    let mut body = Vec::new();
    while let Some(piece) = response.chunk().await.map_err(words)? {
        if body.len() + piece.len() > PROBE_LIMIT {
            return Err(format!("its answer is longer than {} MiB", PROBE_LIMIT >> 20));
        }
        body.extend_from_slice(&piece);
    }
    Ok((response.status(), body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_is_found_in_lists_of_all_servers() {
        let found = |body: &str, wanted| choose(body.as_bytes(), wanted);
        let model =
            |name: &str, context_length| Ok(FoundModel { name: name.into(), context_length, owner: String::new() });
        let llama =
            r#"{"object":"list","data":[{"id":"m.gguf","object":"model","meta":{"n_ctx_train":2048}}],"models":[]}"#;
        let vllm = r#"{"data":[{"id":"a","max_model_len":4096},{"id":"b"}]}"#;
        let ollama = r#"{"data":[{"id":"llama3:latest"},{"id":"qwen:0.5b"}]}"#;
        assert_eq!(found(llama, None), model("m.gguf", 0));
        assert_eq!(found(vllm, Some("a")), model("a", 4096));
        assert_eq!(found(ollama, Some("llama3")), model("llama3:latest", 0));
        for (body, wanted, expected) in [
            (vllm, None, "several models (a, b)"),
            (vllm, Some("c"), "`c`"),
            (r#"{"data":[]}"#, None, "no model"),
            ("<html>", None, "cannot be read"),
        ] {
            let error = found(body, wanted).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
