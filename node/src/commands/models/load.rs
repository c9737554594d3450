//! `ingle models load`, `unload` and `test`: models of the running node.

use std::path::Path;
use std::time::Duration;

use ingle_actors::worker::manager::LoadRequest;
use serde_json::json;

use crate::cli::{LoadModel, TestModel, UnloadModel};
use crate::commands::{explain_error, unexpected};
use crate::config::Settings;
use crate::control::{Client, Reply, Request};
use crate::exit::UsageError;
use crate::output::{complain, print};

/// A node that says nothing for so long hangs: it says how far it is every few seconds.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);
const LONGEST: Duration = Duration::from_secs(3_600);
/// What comes on top of an unload's own limit.
const MARGIN: Duration = Duration::from_secs(60);

/// What was typed, with a path made whole: the node runs in another folder.
fn what(typed: &str) -> Result<String, UsageError> {
    let path = Path::new(typed);
    let is_path = typed.contains('/') && !typed.starts_with("hf:") && !typed.starts_with("pypi:");
    let is_file = path.extension().is_some_and(|extension| extension == "gguf") && path.exists();
    if !(is_file || (is_path && path.exists())) {
        return Ok(typed.to_owned());
    }
    let absolute = std::path::absolute(path).map_err(|error| UsageError(format!("`{typed}` is no file: {error}.")))?;
    let text = absolute.to_str().ok_or_else(|| UsageError(format!("`{typed}` has a path that is not UTF-8.")))?;
    Ok(text.to_owned())
}

/// Loads a model and waits until it is ready.
pub async fn load(settings: &Settings, options: LoadModel) -> anyhow::Result<()> {
    let pinned = if options.pin { Some(true) } else { options.unpin.then_some(false) };
    let keep_alive_s = options.keep_alive.map(|time| time.as_secs());
    let request = LoadRequest { what: what(&options.model)?, name: options.name, pinned, keep_alive_s };
    let mut client = Client::ask(&settings.state_dir, &Request::Load(request))
        .await
        .map_err(|error| explain_error(settings, error))?;
    let (name, node) = loop {
        match client.next(SILENCE_LIMIT).await? {
            Reply::Progress(text) => complain(&text),
            Reply::ModelReady { name, node } => break (name, node),
            _ => return Err(unexpected()),
        }
    };
    if options.json {
        return print(&format!("{}\n", json!({ "model": name, "node": node, "state": "ready" })));
    }
    print(&format!("{name} is ready on {node}.\n"))
}

/// Unloads a model and waits until its process has ended.
pub async fn unload(settings: &Settings, options: UnloadModel) -> anyhow::Result<()> {
    let UnloadModel { model, limit, json } = options;
    if limit > LONGEST {
        return Err(UsageError("Answers can be given an hour to finish at most.".into()).into());
    }
    let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
    let request = Request::Unload { model: model.clone(), limit_ms };
    let mut client =
        Client::ask(&settings.state_dir, &request).await.map_err(|error| explain_error(settings, error))?;
    let Reply::Unloaded { freed } = client.next(limit + MARGIN).await? else { return Err(unexpected()) };
    if json {
        return print(&format!("{}\n", json!({ "model": model, "state": "unloaded", "freed": freed })));
    }
    let freed = match freed {
        0 => String::new(),
        bytes => format!("; {} MiB are free again", bytes >> 20),
    };
    print(&format!("{model} is unloaded{freed}. A request for it loads it again.\n"))
}

/// Asks a model for one token.
pub async fn test(settings: &Settings, options: TestModel) -> anyhow::Result<()> {
    let request = Request::TestModel { model: options.model.clone() };
    let mut client =
        Client::ask(&settings.state_dir, &request).await.map_err(|error| explain_error(settings, error))?;
    let reply = client.next(settings.request_timeout + MARGIN).await?;
    let Reply::Tested { node, model, prompt_tokens, dimensions, ms } = reply else { return Err(unexpected()) };
    if options.json {
        let mut report = json!({ "model": model, "node": node, "prompt_tokens": prompt_tokens, "ms": ms });
        if let Some(dimensions) = dimensions {
            report["dimensions"] = dimensions.into();
        }
        return print(&format!("{report}\n"));
    }
    let wrote = match dimensions {
        Some(dimensions) => format!("made an embedding of {dimensions} numbers"),
        None => "wrote one".into(),
    };
    print(&format!("{model} answers: {node} read {prompt_tokens} tokens and {wrote} in {ms} ms.\n"))
}
