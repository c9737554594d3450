//! The node's side of the control socket.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use ingle_actors::Node;
use ingle_actors::gateway::{ChatRequest, DEFAULT_TEMPERATURE, DEFAULT_TOP_P};
use ingle_actors::node::control_socket_path;
use ingle_actors::platform::{LocalListener, LocalStream};
use ingle_actors::protocol::wire::Answer;
use ingle_actors::protocol::wire::v2::{FinishReason, Message, Priority, Role, Sampling};
use ingle_actors::worker::ChangeRequest;
use tokio::io::{AsyncReadExt, BufReader};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::messages::{LineError, Reply, Request, read, write};
use super::{events, loading};
use crate::commands::progress_line;
use crate::ingress::{self, LOCAL_PRINCIPAL};

/// The most commands at a time.
const CONNECTIONS: usize = 64;
/// A command that has not said what it wants after so long is cut off.
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);
/// How long a token or a join may take.
const CHANGE_DEADLINE: Duration = Duration::from_secs(60);
/// Words of progress that may wait for a command to read them; more are left out.
const PROGRESS_BUFFER: usize = 16;
/// How often a command hears how far long work is.
const SAY_EVERY: Duration = Duration::from_secs(2);
/// Rest after an accept that failed for lack of something (file descriptors): trying at once would spin.
const ACCEPT_REST: Duration = Duration::from_millis(100);

/// Answers commands until it is dropped or closed.
#[derive(Debug)]
pub struct ControlServer {
    ended: CancellationToken,
    tasks: TaskTracker,
}

impl ControlServer {
    /// Listens in `state_dir`, whose lock the node holds. `chat_deadline` is how long an answer may take.
    pub fn start(state_dir: &Path, node: Arc<Node>, chat_deadline: Duration) -> anyhow::Result<Self> {
        let path = control_socket_path(state_dir);
        let listener = LocalListener::bind(&path)
            .with_context(|| format!("The control socket {} cannot be opened", path.display()))?;
        let server = Self { ended: CancellationToken::new(), tasks: TaskTracker::new() };
        let (ended, tasks) = (server.ended.clone(), server.tasks.clone());
        server.tasks.spawn(async move {
            tokio::select! {
                () = accept(listener, node, chat_deadline, tasks) => {}
                () = ended.cancelled() => {}
            }
        });
        Ok(server)
    }

    /// Takes no new commands; those that run get `limit`, then they are cut off.
    pub async fn close(&self, limit: Duration) {
        self.ended.cancel();
        self.tasks.close();
        let _ = tokio::time::timeout(limit, self.tasks.wait()).await;
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.ended.cancel();
    }
}

async fn accept(listener: LocalListener, node: Arc<Node>, chat_deadline: Duration, tasks: TaskTracker) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let permit = room.clone().acquire_owned().await;
        match listener.accept().await {
            Ok(stream) => {
                let node = node.clone();
                tasks.spawn(async move {
                    let _permit = permit;
                    if let Err(error) = Box::pin(serve(stream, &node, chat_deadline)).await {
                        tracing::debug!(%error, "a command ended badly");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a command could not connect");
                tokio::time::sleep(ACCEPT_REST).await;
            }
        }
    }
}

async fn serve(stream: LocalStream, node: &Arc<Node>, chat_deadline: Duration) -> Result<(), LineError> {
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    let request = match tokio::time::timeout(REQUEST_DEADLINE, read(&mut reader)).await {
        Err(_) => return write(&mut writer, &Reply::Error("no request came in time".into())).await,
        Ok(Ok(None)) => return Ok(()),
        Ok(Ok(Some(request))) => request,
        Ok(Err(error)) => {
            write(&mut writer, &Reply::Error(format!("the node got {error}"))).await?;
            return Err(error);
        }
    };
    // The command says nothing more: whatever comes, or the end of it, means that it has left.
    let left = async { while !matches!(reader.read(&mut [0; 64]).await, Ok(0) | Err(_)) {} };
    match request {
        Request::Chat { text, model, system } => {
            let talking = chat(node, chat_request(text, model, system, chat_deadline), &mut writer);
            tokio::select! {
                result = tokio::time::timeout(chat_deadline, talking) => match result {
                    Ok(result) => result,
                    Err(_) => write(&mut writer, &Reply::Error("the answer took too long".into())).await,
                },
                () = left => Ok(()),
            }
        }
        Request::SetParameters { model, changes, restart } => {
            let setting = set_parameters(node, model, ChangeRequest { changes, restart }, &mut writer);
            tokio::select! {
                result = setting => result,
                // The change goes on: half of one must not stay because somebody pressed Ctrl-C.
                () = left => Ok(()),
            }
        }
        Request::VerifyModels { name } => {
            let verifying = verify_models(node, name, &mut writer);
            tokio::select! {
                result = verifying => result,
                () = left => Ok(()),
            }
        }
        Request::Events { since, follow } => tokio::select! {
            result = events::pass_on(node, since, follow, &mut writer) => result,
            () = left => Ok(()),
        },
        Request::Load(request) => tokio::select! {
            result = loading::load(node, &request, &mut writer) => result,
            // It goes on loading.
            () = left => Ok(()),
        },
        Request::TestModel { model } => {
            let request = chat_request("hello".into(), model, None, chat_deadline);
            tokio::select! {
                reply = loading::test(node, request) => write(&mut writer, &reply).await,
                () = left => Ok(()),
            }
        }
        other => {
            let reply = answer(node.clone(), other).await;
            write(&mut writer, &reply).await
        }
    }
}

async fn answer(node: Arc<Node>, request: Request) -> Reply {
    let deadline = match &request {
        Request::Drain { limit_ms, .. } | Request::Unload { limit_ms, .. } => {
            CHANGE_DEADLINE.saturating_add(Duration::from_millis(*limit_ms))
        }
        _ => CHANGE_DEADLINE,
    };
    // In a task of its own: a join must not be torn in two because somebody pressed Ctrl-C.
    let work = tokio::spawn(async move {
        match request {
            Request::Status => match node.status() {
                Ok(status) => Reply::Status(Box::new(status)),
                Err(why) => Reply::Error(why),
            },
            Request::MintToken { lifetime_s } => match node.mint_token(Duration::from_secs(lifetime_s)).await {
                Ok(token) => Reply::Token(token),
                Err(error) => Reply::Error(error.to_string()),
            },
            Request::Join(options) => match Box::pin(node.join(options)).await {
                Ok(joined) => Reply::Joined(joined),
                Err(error) => Reply::Error(error.to_string()),
            },
            Request::Explain { request } => match (node.explain(request), request) {
                (Some(record), _) => Reply::Explained(Box::new(record)),
                (None, None) => Reply::Error("No request has entered at this node yet.".into()),
                (None, Some(id)) => Reply::Error(format!(
                    "This node does not remember the request {id}: it keeps the last 512 that entered here. Ask the \
                     node where it entered."
                )),
            },
            Request::Drain { node: name, limit_ms, undo } => {
                match node.drain(&name, Duration::from_millis(limit_ms), undo).await {
                    Ok(drained) => Reply::Drained { running: drained.running, moved: drained.moved },
                    Err(why) => Reply::Error(why),
                }
            }
            Request::Loaded => Reply::Loaded(loading::loaded(&node)),
            Request::Unload { model, limit_ms } => {
                loading::unload(&node, &model, Duration::from_millis(limit_ms)).await
            }
            Request::Models(request) => match Box::pin(super::models::answer(&node, request)).await {
                Ok(reply) => Reply::Models(Box::new(reply)),
                Err(why) => Reply::Error(why),
            },
            Request::Chat { .. }
            | Request::Events { .. }
            | Request::SetParameters { .. }
            | Request::Load(_)
            | Request::TestModel { .. }
            | Request::VerifyModels { .. } => Reply::Error("that is answered elsewhere".into()),
        }
    });
    match tokio::time::timeout(deadline, work).await {
        Ok(Ok(reply)) => reply,
        Ok(Err(_)) => Reply::Error("something went wrong inside the node; its log says more".into()),
        Err(_) => Reply::Error("the node is still working on it; see `ingle status`".into()),
    }
}

/// Passes on how far a change is. It ends by itself: every wait within it has a deadline.
async fn set_parameters(
    node: &Node,
    model: String,
    request: ChangeRequest,
    writer: &mut (impl tokio::io::AsyncWrite + Unpin),
) -> Result<(), LineError> {
    let (said, mut hears) = mpsc::channel(PROGRESS_BUFFER);
    let setting = node.set_parameters(&model, request, said);
    tokio::pin!(setting);
    loop {
        tokio::select! {
            biased;
            Some(text) = hears.recv() => write(writer, &Reply::Progress(text)).await?,
            result = &mut setting => {
                let reply = result.map_or_else(Reply::Error, Reply::ParametersSet);
                return write(writer, &reply).await;
            }
        }
    }
}

/// Passes on how far the reading is. It ends by itself, or when its command leaves.
async fn verify_models(
    node: &Node,
    name: Option<String>,
    writer: &mut (impl tokio::io::AsyncWrite + Unpin),
) -> Result<(), LineError> {
    let progress = watch::Sender::new(String::new());
    let say = |name: &str, done: u64, all: u64| {
        progress.send_replace(progress_line(name, done, all));
    };
    let verifying = node.verify_models(name.as_deref(), &say);
    tokio::pin!(verifying);
    let mut ticks = tokio::time::interval(SAY_EVERY);
    loop {
        tokio::select! {
            result = &mut verifying => {
                let reply = result.map_or_else(Reply::Error, Reply::Verified);
                return write(writer, &reply).await;
            }
            _ = ticks.tick() => {
                let line = progress.borrow().clone();
                if !line.is_empty() {
                    write(writer, &Reply::Progress(line)).await?;
                }
            }
        }
    }
}

fn chat_request(text: String, model: String, system: Option<String>, deadline: Duration) -> ChatRequest {
    let message = |role, content| Message { role, content, extra: vec![] };
    let mut messages: Vec<Message> = system.map(|content| message(Role::System, content)).into_iter().collect();
    messages.push(message(Role::User, text));
    ChatRequest {
        request_id: ingress::new_request_id(),
        trace: ingress::trace_context(None),
        principal: LOCAL_PRINCIPAL.into(),
        priority: Priority::Interactive,
        deadline,
        model,
        messages,
        sampling: Sampling {
            temperature: DEFAULT_TEMPERATURE,
            top_p: DEFAULT_TOP_P,
            seed: ingress::random_seed(),
            ..Sampling::default()
        },
        extra: vec![],
    }
}

async fn chat(
    node: &Node,
    request: ChatRequest,
    writer: &mut (impl tokio::io::AsyncWrite + Unpin),
) -> Result<(), LineError> {
    let mut reply = match Box::pin(node.chat(request)).await {
        Ok(reply) => reply,
        Err(error) => return write(writer, &Reply::Error(error.to_string())).await,
    };
    loop {
        let last = match reply.answers.recv().await {
            Some(Answer::Token(token)) if token.text.is_empty() => continue,
            Some(Answer::Token(token)) => {
                write(writer, &Reply::Text(String::from_utf8_lossy(&token.text).into_owned())).await?;
                continue;
            }
            Some(Answer::Accepted(_) | Answer::Progress(_) | Answer::Embedding(_)) => continue,
            Some(Answer::Finished(finished)) => Reply::Finished {
                node: reply.node.clone(),
                model: reply.model.clone(),
                reason: match finished.reason {
                    FinishReason::Stop => "stop".into(),
                    FinishReason::Length => "length".into(),
                },
            },
            Some(Answer::Failed(failed)) => Reply::Error(failed.message),
            Some(Answer::Refused(refused)) => Reply::Error(refused.message),
            None => Reply::Error("the answer broke off".into()),
        };
        return write(writer, &last).await;
    }
}
