//! The node's side of an engine process.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use ingle_protocol::ModelDigest;
use ingle_protocol::wire::v2::{
    EngineReport, Failed, FailureKind, LiveParameters, ParametersSet, RefusalKind, Request, SetParameters,
};
use ingle_protocol::wire::{Answer, Body};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::route::Held;
use super::{ANSWER_BUFFER, SILENCE_LIMIT, WorkerOptions, refused};
use crate::frames::{FrameError, read_frame, write_body};
use crate::node::ModelParameters;
use crate::platform::{LocalStream, connect, remove_socket};

/// How long a process that has closed its reports may take to end.
const END_DEADLINE: Duration = Duration::from_secs(2);
/// How long a running engine may take to take other limits: it only has to write them down.
const ADJUST_DEADLINE: Duration = Duration::from_secs(5);

/// A running engine process. Dropping it ends the process.
#[derive(Debug)]
pub struct ChildEngine {
    child: Child,
    socket: PathBuf,
    /// Its end tells the child that we are gone.
    control: Option<ChildStdin>,
    answers: mpsc::Receiver<ParametersSet>,
    changes: u64,
}

/// What a child does not take.
#[derive(Debug, thiserror::Error)]
pub enum AdjustFailure {
    /// It said no; nothing has changed.
    #[error("{0}")]
    Refused(String),
    /// It does not say anything: it hangs, or is gone.
    #[error("the engine process does not answer")]
    Silent,
}

impl ChildEngine {
    /// Starts the process and returns it with its reports, which end when it does. `packed_limit` is how many bytes all
    /// packed weights may have, 0 for the usual.
    pub fn spawn(
        socket: &Path,
        model: Option<&Path>,
        digest: ModelDigest,
        parameters: &ModelParameters,
        packed_limit: u64,
        options: &WorkerOptions,
    ) -> std::io::Result<(Self, mpsc::Receiver<EngineReport>)> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("engine").arg("--socket").arg(socket);
        if let Some(model) = model {
            command.arg("--model").arg(model);
        }
        command.args(["--digest", &digest.to_string()]);
        command.arg("--packed").arg(options.cache.join("packed"));
        if packed_limit > 0 {
            command.args(["--packed-limit", &packed_limit.to_string()]);
        }
        command.args(["--parameters", &serde_json::to_string(parameters)?]);
        command.args(["--device", options.device.as_str()]);
        command.envs(options.environment.iter().map(|(name, value)| (name, value)));
        // Ctrl-C in a terminal goes to the whole group: the node decides when its engines end.
        command.process_group(0);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit()).kill_on_drop(true).spawn()?;
        let control = child.stdin.take();
        let mut stdout = child.stdout.take().ok_or_else(|| std::io::Error::other("the engine has no output"))?;
        let (reports, reader) = mpsc::channel(16);
        // One change is under way at a time.
        let (said, answers) = mpsc::channel(1);
        tokio::spawn(async move {
            while let Ok(Some(frame)) = read_frame(&mut stdout).await {
                let passed_on = if frame.kind == ParametersSet::KIND {
                    match frame.decode() {
                        // Nobody waits for the answer to a change that took too long.
                        Ok(answer) => said.try_send(answer).is_ok() || !said.is_closed(),
                        Err(_) => return,
                    }
                } else {
                    match frame.decode() {
                        Ok(report) => reports.send(report).await.is_ok(),
                        Err(_) => return,
                    }
                };
                if !passed_on {
                    return;
                }
            }
        });
        Ok((Self { child, socket: socket.to_owned(), control, answers, changes: 0 }, reader))
    }

    /// Gives the running engine other limits. Its reports must be read meanwhile: answers come between them.
    pub async fn adjust(&mut self, parameters: LiveParameters) -> Result<(), AdjustFailure> {
        self.changes += 1;
        let number = self.changes;
        let control = self.control.as_mut().ok_or(AdjustFailure::Silent)?;
        let answers = &mut self.answers;
        let asking = async {
            write_body(control, &SetParameters { number, parameters }).await.ok()?;
            loop {
                let answer = answers.recv().await?;
                if answer.number == number {
                    return Some(answer.refused);
                }
            }
        };
        match timeout(ADJUST_DEADLINE, asking).await {
            Ok(Some(None)) => Ok(()),
            Ok(Some(Some(why))) => Err(AdjustFailure::Refused(why)),
            Ok(None) | Err(_) => Err(AdjustFailure::Silent),
        }
    }

    /// Tells the process that it is no longer needed, and waits until it has ended.
    pub async fn end(mut self) {
        drop(self.control.take());
        self.ended().await;
    }

    /// How the process ended, in words. One that has closed its reports and does not end is killed.
    pub async fn ended(&mut self) -> String {
        let status = match timeout(END_DEADLINE, self.child.wait()).await {
            Ok(status) => status,
            Err(_) => {
                let _ = self.child.start_kill();
                self.child.wait().await
            }
        };
        status.map_or_else(|error| error.to_string(), |status| status.to_string())
    }

    /// Ends a process that no longer answers.
    pub async fn kill(&mut self) {
        let _ = self.child.kill().await;
    }

    /// Process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }
}

impl Drop for ChildEngine {
    fn drop(&mut self) {
        // A process leaves its socket behind, however it ends.
        remove_socket(&self.socket);
    }
}

/// Hands the request to the engine that `held` belongs to.
pub async fn submit(held: Held, request: &Request) -> mpsc::Receiver<Answer> {
    let connecting = async {
        let mut stream = connect(held.socket()).await?;
        write_body(&mut stream, request).await?;
        Ok::<_, FrameError>(stream)
    };
    match timeout(SILENCE_LIMIT, connecting).await {
        Ok(Ok(stream)) => {
            let (answers, reader) = mpsc::channel(ANSWER_BUFFER);
            tokio::spawn(relay(stream, answers, held));
            reader
        }
        Ok(Err(error)) => refused(RefusalKind::Loading, format!("the engine does not take requests now ({error})")),
        Err(_) => refused(RefusalKind::Busy, "the engine did not take the request in time".into()),
    }
}

/// The engine is held until the answer has ended: it is not ended while it gives one.
async fn relay(mut stream: LocalStream, answers: mpsc::Sender<Answer>, held: Held) {
    let mut any_token = false;
    loop {
        let read = tokio::select! {
            biased;
            // Dropping the stream is what cancels the request in the engine.
            () = answers.closed() => return,
            () = held.cut_off() => {
                let message = "the model was unloaded before the answer was complete".to_owned();
                let kind = FailureKind::ShuttingDown;
                let failed = Failed { kind, message, retryable: !any_token, migratable: true };
                let _ = timeout(END_DEADLINE, answers.send(Answer::Failed(failed))).await;
                return;
            }
            read = timeout(SILENCE_LIMIT, read_frame(&mut stream)) => read,
        };
        let retryable = !any_token;
        let failed = |kind, message: String| Answer::Failed(Failed { kind, message, retryable, migratable: true });
        let answer = match read {
            Ok(Ok(Some(frame))) => match Answer::from_frame(&frame) {
                Ok(answer) => answer,
                Err(error) => failed(FailureKind::Protocol, error.to_string()),
            },
            Ok(Ok(None) | Err(_)) => {
                failed(FailureKind::EngineDied, "the engine process died in the middle of the answer".into())
            }
            Err(_) => failed(FailureKind::WorkerSilent, "the engine went silent in the middle of the answer".into()),
        };
        any_token |= matches!(answer, Answer::Token(_));
        let last = answer.is_last();
        if answers.send(answer).await.is_err() || last {
            return;
        }
    }
}
