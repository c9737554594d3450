//! The face of the crate: an engine that loads a model on its own thread and answers requests.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Sender, SyncSender, TrySendError, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::Instant;

use ingle_protocol::wire::Answer;
use ingle_protocol::wire::v2::{LiveParameters, ModelState, RefusalKind, Refused, Request};
use tokio::sync::{mpsc, watch};

use crate::sampler::TokenMask;
use crate::scheduler::{self, LastWord, Place, Submission, Wake, embedding};
use crate::snapshot::{Limits, Shared};
use crate::spec::default_threads;
use crate::{AdjustError, EngineSnapshot, EngineSpec, ModelSource};

/// A model that is being loaded, or answers, or has failed. Dropping it ends what it does within one step.
#[derive(Debug)]
pub struct Engine {
    shared: Arc<Shared>,
    queue: u32,
    room: u32,
    submissions: Option<SyncSender<Submission>>,
    wake: Sender<Wake>,
    thread: Option<JoinHandle<()>>,
}

/// The file of a model that turns texts into numbers. What cannot be read is not one, and is reported by who loads it.
fn embedding_model(spec: &EngineSpec) -> Option<PathBuf> {
    match &spec.source {
        ModelSource::Gguf(path) if crate::is_embedding_model(path) => Some(path.clone()),
        ModelSource::Gguf(_) | ModelSource::Echo => None,
    }
}

impl Engine {
    /// Starts the thread that loads the model, warms it up (which also measures its speed) and then serves.
    /// Returns at once; [`Engine::snapshot`] says how far it is.
    pub fn start(spec: EngineSpec) -> Self {
        let limits = Limits {
            slots: spec.options.slots.max(1),
            max_tokens: spec.max_tokens,
            chunk: spec.options.chunk,
            threads: spec.options.threads(),
        };
        let (shared, room) = (Arc::new(Shared::new(limits)), spec.options.room());
        let queue = spec.queue.max(1);
        let (submissions, submitted) = sync_channel(queue as usize);
        let (wake, woken) = channel();
        let (for_thread, wake_of_thread) = (Arc::clone(&shared), wake.clone());
        let thread = std::thread::Builder::new()
            .name("engine".into())
            .spawn(move || match embedding_model(&spec) {
                Some(path) => embedding::run(spec, &path, &for_thread, submitted, wake_of_thread, woken),
                None => scheduler::run(spec, &for_thread, submitted, wake_of_thread, woken),
            })
            .map_err(|why| {
                let why = format!("the engine's thread does not start: {why}");
                shared.update(|facts| facts.state = ModelState::Failed { why });
            })
            .ok();
        Self { shared, queue, room, submissions: Some(submissions), wake, thread }
    }

    /// Other limits from the next step on; `max_tokens` for answers that are taken from now on. Where fewer sequences
    /// are allowed than run, those go on to their end. An error leaves everything as it is.
    pub fn adjust(&self, parameters: &LiveParameters) -> Result<(), AdjustError> {
        let LiveParameters { batch_size: slots, max_tokens, prefill_budget, threads } = *parameters;
        if !(1..=self.room).contains(&slots) {
            return Err(AdjustError::BatchSize { asked: slots, room: self.room });
        }
        for (name, value) in
            [("max_tokens", max_tokens), ("prefill_budget", Some(prefill_budget)), ("threads", threads)]
        {
            if value == Some(0) {
                return Err(AdjustError::Zero(name));
            }
        }
        let threads = threads.map_or_else(default_threads, |threads| threads as usize);
        self.shared.set_limits(Limits { slots, max_tokens, chunk: Some(prefill_budget), threads });
        let _ = self.wake.send(Wake::Look);
        Ok(())
    }

    /// State and counters as of now. Cheap.
    pub fn snapshot(&self) -> EngineSnapshot {
        self.shared.snapshot()
    }

    /// Changes whenever the state or a slow fact changes (not with each step).
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.shared.changed()
    }

    /// Hands in a request; never blocks. All frames arrive on `answers`, which should have room for at least 8:
    /// one place is set aside for the last frame, so that it arrives even where nobody reads. A full channel
    /// pauses the sequence, a closed one cancels it.
    pub fn submit(&self, request: Request, answers: mpsc::Sender<Answer>) {
        self.submit_constrained(request, None, answers);
    }

    /// As [`Engine::submit`]; `mask` decides which tokens may come. It gets the tokens to resume behind as well.
    pub fn submit_constrained(
        &self,
        request: Request,
        mask: Option<Box<dyn TokenMask>>,
        answers: mpsc::Sender<Answer>,
    ) {
        let Some(last) = LastWord::reserve(&answers) else {
            return; // closed, or without room for a single frame: nobody to tell
        };
        let refuse = |last: LastWord, kind, message: String, retry_after_ms| {
            last.say(Answer::Refused(Refused { kind, message, param: None, retry_after_ms }));
        };
        match self.shared.state() {
            ModelState::Ready => {}
            ModelState::Failed { why } => {
                return refuse(last, RefusalKind::Draining, format!("the engine has failed: {why}"), None);
            }
            ModelState::Draining | ModelState::Unloaded => {
                return refuse(last, RefusalKind::Draining, "the engine is shutting down".into(), None);
            }
            state => {
                let message = format!("the model is not ready yet: {}", state.words());
                return refuse(last, RefusalKind::Loading, message, Some(1_000));
            }
        }
        let Some(place) = Place::take(&self.shared, self.queue) else {
            let message = format!("all places are taken: {} requests wait already", self.queue);
            return refuse(last, RefusalKind::Busy, message, Some(self.retry_after_ms()));
        };
        let submission = Submission { request: Box::new(request), mask, answers, last, place, at: Instant::now() };
        match self.submissions.as_ref().map(|queue| queue.try_send(submission)) {
            Some(Ok(())) => {}
            // As many fit as there are places, so a full queue cannot be; a closed one is an engine that ended.
            Some(Err(TrySendError::Full(lost) | TrySendError::Disconnected(lost))) => {
                refuse(lost.last, RefusalKind::Draining, "the engine has ended".into(), None);
            }
            None => {}
        }
    }

    /// Takes nothing new; what was taken goes on to its end.
    pub fn drain(&self) {
        self.shared.update(|facts| {
            if !matches!(facts.state, ModelState::Failed { .. }) {
                facts.state = ModelState::Draining;
            }
        });
    }

    /// Ends the engine and waits until its thread is gone and its memory free. What still runs fails as
    /// `ShuttingDown`. Blocks for up to one step, or for the rest of the loading.
    pub fn stop(mut self) {
        self.signal();
        if let Some(thread) = self.thread.take() {
            // A panic in there has been reported as the engine's state.
            let _ = thread.join();
        }
    }

    fn signal(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.submissions = None;
        let _ = self.wake.send(Wake::Look);
    }

    /// A guess at when a place is free: the time of one answer of 64 tokens.
    fn retry_after_ms(&self) -> u64 {
        let rate = self.shared.step_rate();
        if rate > 0.0 { ((64_000.0 / rate) as u64).clamp(500, 30_000) } else { 1_000 }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.signal();
    }
}
