//! The node's side of an engine process.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use ingle_protocol::ModelDigest;
use ingle_protocol::wire::Answer;
use ingle_protocol::wire::v1::{EngineReport, Failed, FailureKind, RefusalKind, Request};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::{ANSWER_BUFFER, SILENCE_LIMIT, WorkerOptions, refused};
use crate::frames::{FrameError, read_body, read_frame, write_body};
use crate::platform::{LocalStream, connect};

/// How long a process that has closed its reports may take to end.
const END_DEADLINE: Duration = Duration::from_secs(2);

/// A running engine process. Dropping it ends the process.
#[derive(Debug)]
pub struct ChildEngine {
    child: Child,
    /// Held, never written: its end tells the child that we are gone.
    _control: Option<ChildStdin>,
    /// Where it takes requests.
    pub socket: PathBuf,
}

impl ChildEngine {
    /// Starts the process and returns it with its reports, which end when it does.
    pub fn spawn(
        socket: PathBuf,
        model: Option<&Path>,
        digest: ModelDigest,
        options: &WorkerOptions,
    ) -> std::io::Result<(Self, mpsc::Receiver<EngineReport>)> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("engine").arg("--socket").arg(&socket);
        if let Some(model) = model {
            command.arg("--model").arg(model);
        }
        command.args(["--digest", &digest.to_string()]);
        command.arg("--packed").arg(options.cache.join("packed"));
        command.args(["--parameters", &serde_json::to_string(&options.parameters)?]);
        command.args(["--device", options.device.as_str()]);
        command.envs(options.environment.iter().map(|(name, value)| (name, value)));
        // Ctrl-C in a terminal goes to the whole group: the node decides when its engines end.
        command.process_group(0);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit()).kill_on_drop(true).spawn()?;
        let control = child.stdin.take();
        let mut stdout = child.stdout.take().ok_or_else(|| std::io::Error::other("the engine has no output"))?;
        let (reports, reader) = mpsc::channel(16);
        tokio::spawn(async move {
            while let Ok(report) = read_body::<EngineReport, _>(&mut stdout).await {
                if reports.send(report).await.is_err() {
                    return;
                }
            }
        });
        Ok((Self { child, _control: control, socket }, reader))
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

/// Hands the request to the engine that listens at `socket`.
pub async fn submit(socket: &Path, request: &Request) -> mpsc::Receiver<Answer> {
    let connecting = async {
        let mut stream = connect(socket).await?;
        write_body(&mut stream, request).await?;
        Ok::<_, FrameError>(stream)
    };
    match timeout(SILENCE_LIMIT, connecting).await {
        Ok(Ok(stream)) => {
            let (answers, reader) = mpsc::channel(ANSWER_BUFFER);
            tokio::spawn(relay(stream, answers));
            reader
        }
        Ok(Err(error)) => refused(RefusalKind::Loading, format!("the engine does not take requests now ({error})")),
        Err(_) => refused(RefusalKind::Busy, "the engine did not take the request in time".into()),
    }
}

async fn relay(mut stream: LocalStream, answers: mpsc::Sender<Answer>) {
    let mut any_token = false;
    loop {
        let read = tokio::select! {
            biased;
            // Dropping the stream is what cancels the request in the engine.
            () = answers.closed() => return,
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
