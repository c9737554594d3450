//! The engine process: `ingle engine`, a child of the node in a process of its own.
//!
//! - standard input is the control pipe: it carries [`SetParameters`] frames, and when it ends, so does the process;
//! - standard output carries [`EngineReport`] frames, at every change and every 100 ms, and [`ParametersSet`] frames;
//! - a local socket takes one connection for each request, with the same frames as between nodes; closing it cancels;
//! - standard error has the log.

use std::io::{ErrorKind, Read};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use ingle_engine::{Engine, EngineSpec, ModelSource, PackedCache};
use ingle_protocol::liveness::PULSE_INTERVAL;
use ingle_protocol::wire::v2::{EnginePulse, EngineReport, ModelState, ParametersSet, Request, SetParameters};
use ingle_protocol::wire::{Answer, Frame, HEAD_LEN, Head, Version};
use ingle_protocol::{EngineId, NodeId};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tracing::Instrument;

use super::ANSWER_BUFFER;
use crate::frames::{read_body, write_body, write_frame};
use crate::node::{DeviceKind, ModelParameters};
use crate::platform::{LocalListener, LocalStream};

/// Changes of parameters that may wait: the parent sends one at a time.
const CHANGES: usize = 4;
const REQUEST_DEADLINE: Duration = Duration::from_secs(5);

/// What the node tells its child on the command line.
#[derive(Debug, Clone)]
pub struct EngineProcessOptions {
    /// Where to listen for requests.
    pub socket: PathBuf,
    /// The model file; `None` for the echo engine.
    pub model: Option<PathBuf>,
    /// SHA-256 of the file, as the node knows it.
    pub digest: String,
    /// Where packed weights are kept for all engines of the host.
    pub packed: Option<PathBuf>,
    /// How many bytes all of them may have; `None` for the usual.
    pub packed_limit: Option<u64>,
    /// What is set for the model, as JSON.
    pub parameters: String,
    /// What it computes on.
    pub device: DeviceKind,
}

/// Runs until the control pipe ends.
pub fn run(options: EngineProcessOptions) -> ExitCode {
    // Before anything else: a parent that dies while we load must not leave us behind.
    let (changes, changed) = mpsc::channel(CHANGES);
    std::thread::spawn(move || listen(&changes));
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "the engine process has no async runtime");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(serve(options, changed)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error, "the engine process ends");
            ExitCode::FAILURE
        }
    }
}

/// Reads the control pipe on a thread of its own, so that its end is seen whatever else hangs. Ends the process with
/// the pipe.
fn listen(changes: &mpsc::Sender<SetParameters>) {
    let mut control = std::io::stdin().lock();
    loop {
        match read_change(&mut control) {
            // Our parent waits for one answer before it asks again. It gets none where we do not keep up.
            Ok(change) => drop(changes.try_send(change)),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => std::process::exit(0),
            Err(error) => {
                tracing::error!(%error, "the control pipe cannot be understood");
                std::process::exit(1);
            }
        }
    }
}

fn read_change(control: &mut impl Read) -> std::io::Result<SetParameters> {
    let mut head = [0; HEAD_LEN];
    control.read_exact(&mut head)?;
    let head = Head::parse(head, Version::NEWEST).map_err(std::io::Error::other)?;
    let mut body = vec![0; head.length as usize];
    control.read_exact(&mut body)?;
    Frame { kind: head.kind, body: body.into() }.decode().map_err(std::io::Error::other)
}

async fn serve(options: EngineProcessOptions, changes: mpsc::Receiver<SetParameters>) -> Result<(), String> {
    let digest = options.digest.parse().map_err(|error| format!("the digest: {error}"))?;
    let source = options.model.map_or(ModelSource::Echo, ModelSource::Gguf);
    let mut spec = EngineSpec::new(source, digest);
    let parameters: ModelParameters =
        serde_json::from_str(&options.parameters).map_err(|error| format!("the parameters: {error}"))?;
    let packed = options.packed.map(|folder| PackedCache {
        folder,
        digest: options.digest.clone(),
        limit: options.packed_limit.unwrap_or(ingle_engine::DEFAULT_PACKED_LIMIT),
    });
    spec.options = parameters.to_options(packed);
    spec.max_tokens = parameters.max_tokens;
    spec.device = options.device.into();
    let listener = LocalListener::bind(&options.socket)
        .map_err(|error| format!("the socket {}: {error}", options.socket.display()))?;
    let engine = Arc::new(Engine::start(spec));
    let accepting = async {
        loop {
            match listener.accept().await {
                Ok(stream) => drop(tokio::spawn(answer(engine.clone(), stream))),
                Err(error) => {
                    // Too many open files, say: that passes.
                    tracing::warn!(%error, "a connection is not accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    };
    tokio::select! {
        ended = accepting => ended,
        ended = report(&engine, changes) => ended,
    }
}

/// Reports until the pipe breaks, or the engine failed and its parent was told so.
async fn report(engine: &Engine, mut changes: mpsc::Receiver<SetParameters>) -> Result<(), String> {
    let mut stdout = tokio::io::stdout();
    let mut changed = engine.changed();
    let mut ticks = interval(PULSE_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        let change = tokio::select! {
            _ = changed.changed() => None,
            _ = ticks.tick() => None,
            Some(change) = changes.recv() => Some(change),
        };
        if let Some(SetParameters { number, parameters }) = change {
            let refused = engine.adjust(&parameters).err().map(|error| error.to_string());
            tracing::info!(?parameters, refused, "other limits");
            write_body(&mut stdout, &ParametersSet { number, refused }).await.map_err(|error| error.to_string())?;
        }
        let snapshot = engine.snapshot();
        let failed = matches!(snapshot.state, ModelState::Failed { .. });
        let report = EngineReport {
            state: snapshot.state,
            backend: snapshot.backend,
            numerics: snapshot.numerics,
            context_length: snapshot.context_length,
            slots: snapshot.slots,
            features: snapshot.features,
            pulse: EnginePulse {
                // The node puts its own id there: a child does not know who its parent is today.
                engine: EngineId { node: NodeId::default(), index: 0, generation: 0 },
                step: snapshot.step,
                busy: snapshot.busy,
                usual_step_ms: snapshot.usual_step_ms,
                silent_ms: 0,
                load: snapshot.load,
                tokens_per_second: snapshot.tokens_per_second,
                prefill_rate: snapshot.prefill_rate,
                decode_rate: snapshot.decode_rate,
                full_decode_rate: snapshot.full_decode_rate,
            },
            missing_memory: snapshot.missing_memory,
        };
        write_body(&mut stdout, &report).await.map_err(|error| error.to_string())?;
        stdout.flush().await.map_err(|error| error.to_string())?;
        if failed {
            // Answers that end with this failure are on their way to their sockets.
            tokio::time::sleep(Duration::from_millis(200)).await;
            return Err("the engine failed".into());
        }
    }
}

/// One request: one connection.
async fn answer(engine: Arc<Engine>, stream: LocalStream) {
    let (mut read, mut write) = stream.into_split();
    let request = match timeout(REQUEST_DEADLINE, read_body::<Request, _>(&mut read)).await {
        Ok(Ok(request)) => request,
        Ok(Err(error)) => return tracing::warn!(%error, "a request that does not decode"),
        Err(_) => return,
    };
    let span = crate::monitor::request_span("engine", &request);
    let (answers, mut frames) = mpsc::channel::<Answer>(ANSWER_BUFFER);
    async move {
        engine.submit(request, answers);
        let mut byte = [0; 1];
        loop {
            let answer = tokio::select! {
                biased;
                // The other side never writes a second time: whatever comes is its end.
                _ = read.read(&mut byte) => return,
                answer = frames.recv() => answer,
            };
            let Some(answer) = answer else { return };
            let Ok(frame) = answer.to_frame() else { return };
            let written = tokio::select! {
                biased;
                _ = read.read(&mut byte) => return,
                written = write_frame(&mut write, &frame) => written,
            };
            if written.is_err() || answer.is_last() {
                return;
            }
        }
    }
    .instrument(span)
    .await;
}
