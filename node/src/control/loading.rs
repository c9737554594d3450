//! Models loaded, unloaded, shown and tested by command.

use std::time::{Duration, Instant};

use ingle_actors::Node;
use ingle_actors::gateway::{ChatRequest, EmbedRequest, OfferedModel};
use ingle_actors::monitor::ModelStatus;
use ingle_actors::protocol::registry::ModelType;
use ingle_actors::protocol::wire::Answer;
use ingle_actors::protocol::wire::v2::{Embed, EmbedInput};
use ingle_actors::worker::manager::{LoadRequest, SeenModel};
use tokio::io::AsyncWrite;

use super::messages::{LineError, LoadedOn, Reply, write};

/// So often something is said while nothing changes, so that silence means trouble.
const SAY_AGAIN: Duration = Duration::from_secs(5);

/// Loads a model and passes on how far it is. It ends by itself: a file that does not come is given up, an engine that
/// does not get ready is killed.
pub async fn load(node: &Node, request: &LoadRequest, writer: &mut (impl AsyncWrite + Unpin)) -> Result<(), LineError> {
    let mut loading = match node.load_model(request).await {
        Ok(loading) => loading,
        Err(error) => return write(writer, &Reply::Error(error.to_string())).await,
    };
    let mut states = loading.states();
    let name = loading.name.clone();
    let mut last = String::new();
    let mut said = Instant::now();
    loop {
        let state = states.borrow_and_update().words();
        if state != last || said.elapsed() >= SAY_AGAIN {
            write(writer, &Reply::Progress(format!("{name} is {state}."))).await?;
            (last, said) = (state, Instant::now());
        }
        tokio::select! {
            biased;
            done = loading.done() => {
                let reply = match done {
                    Ok(()) => Reply::ModelReady { name, node: node.name().to_owned() },
                    Err(error) => Reply::Error(error.to_string()),
                };
                return write(writer, &reply).await;
            }
            Ok(()) = states.changed() => {}
            () = tokio::time::sleep(SAY_AGAIN) => {}
        }
    }
}

/// Unloads a model.
pub async fn unload(node: &Node, model: &str, limit: Duration) -> Reply {
    let had = |seen: &SeenModel| seen.name == model || (model == "default" && seen.is_default);
    let freed = node.loaded().into_iter().find(had).and_then(|seen| seen.resident).unwrap_or(0);
    match node.unload_model(model, limit).await {
        Ok(()) => Reply::Unloaded { freed },
        Err(error) => Reply::Error(error.to_string()),
    }
}

/// What is loaded on which node, this one first.
pub fn loaded(node: &Node) -> Vec<LoadedOn> {
    let mut own = node.loaded();
    let Ok(status) = node.status() else { return vec![LoadedOn { node: node.name().to_owned(), models: own }] };
    let mut nodes = Vec::new();
    for (index, other) in status.nodes.into_iter().enumerate() {
        let mut models = if index == 0 { std::mem::take(&mut own) } else { Vec::new() };
        for model in &other.models {
            // This node's endpoints have no process here.
            if !models.iter().any(|seen| seen.name == model.name) {
                models.push(seen(model));
            }
        }
        nodes.push(LoadedOn { node: other.name, models });
    }
    nodes
}

/// What another node tells everybody of a model.
fn seen(model: &ModelStatus) -> SeenModel {
    SeenModel {
        name: model.name.clone(),
        kind: model.kind,
        state: model.state.clone(),
        source: String::new(),
        digest: model.digest.clone(),
        is_default: model.is_default,
        pinned: false,
        backend: model.backend.clone(),
        context_length: model.context_length,
        slots: model.slots,
        running: model.running,
        waiting: model.waiting,
        promised: None,
        resident: None,
        pid: None,
        ready_for_ms: None,
        idle_ms: None,
        keep_alive_s: None,
        ready_in_ms: None,
    }
}

/// Asks a model for one token, or for one embedding.
pub async fn test(node: &Node, mut request: ChatRequest) -> Reply {
    let (began, deadline) = (Instant::now(), request.deadline);
    let embeds = |model: &OfferedModel| model.name == request.model && model.kind == Some(ModelType::Embedding);
    if node.models().iter().any(embeds) {
        return test_embedding(node, request).await;
    }
    request.sampling.max_tokens = Some(1);
    let asking = async {
        let mut reply = match Box::pin(node.chat(request)).await {
            Ok(reply) => reply,
            Err(error) => return Reply::Error(error.to_string()),
        };
        loop {
            let why = match reply.answers.recv().await {
                Some(Answer::Token(_) | Answer::Accepted(_) | Answer::Progress(_) | Answer::Embedding(_)) => continue,
                Some(Answer::Finished(finished)) => {
                    return Reply::Tested {
                        node: reply.node,
                        model: reply.model,
                        prompt_tokens: finished.usage.prompt_tokens,
                        dimensions: None,
                        ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
                    };
                }
                Some(Answer::Failed(failed)) => failed.message,
                Some(Answer::Refused(refused)) => refused.message,
                None => "the answer broke off".into(),
            };
            return Reply::Error(why);
        }
    };
    tokio::time::timeout(deadline, asking).await.unwrap_or_else(|_| Reply::Error("the answer took too long".into()))
}

async fn test_embedding(node: &Node, request: ChatRequest) -> Reply {
    let (began, deadline) = (Instant::now(), request.deadline);
    let texts = request.messages.into_iter().map(|message| EmbedInput::Text(message.content));
    let asked = EmbedRequest {
        request_id: request.request_id,
        trace: request.trace,
        principal: request.principal,
        priority: request.priority,
        deadline,
        model: request.model,
        embed: Embed { inputs: texts.collect(), dimensions: None },
        extra: request.extra,
    };
    match tokio::time::timeout(deadline, Box::pin(node.embed(asked))).await {
        Ok(Ok(done)) => Reply::Tested {
            node: done.node,
            model: done.model,
            prompt_tokens: done.usage.prompt_tokens,
            dimensions: done.embeddings.first().map(Vec::len),
            ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
        },
        Ok(Err(error)) => Reply::Error(error.to_string()),
        Err(_) => Reply::Error("the embedding took too long".into()),
    }
}
