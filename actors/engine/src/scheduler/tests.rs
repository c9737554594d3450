use std::sync::atomic::{AtomicU64, Ordering};

use ingle_protocol::wire::Answer;
use ingle_protocol::wire::v2::*;
use ingle_protocol::{ModelDigest, RequestId};
use tokio::sync::mpsc;

use super::*;
use crate::gguf::tiny;
use crate::{Engine, EngineSpec, ModelOptions, ModelSource};

mod adjusting;
mod sampling;
mod tools;

const WAIT: Duration = Duration::from_secs(20);

fn echo() -> EngineSpec {
    EngineSpec { queue: 8, ..EngineSpec::new(ModelSource::Echo, ModelDigest::default()) }
}

fn slots(slots: u32) -> ModelOptions {
    ModelOptions { slots, ..ModelOptions::default() }
}

fn started(spec: EngineSpec) -> Engine {
    let engine = Engine::start(spec);
    until(|| !matches!(engine.snapshot().state, ModelState::Loading | ModelState::Warming));
    engine
}

/// Something that happens by itself soon.
fn until(mut happened: impl FnMut() -> bool) {
    let start = Instant::now();
    while !happened() {
        assert!(start.elapsed() < WAIT, "it did not happen within {WAIT:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn request(content: &str) -> Request {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let mut id = [0; 16];
    id[..8].copy_from_slice(&NEXT.fetch_add(1, Ordering::Relaxed).to_le_bytes());
    Request {
        request_id: RequestId(id),
        attempt: 0,
        trace: TraceContext::default(),
        principal: "local".into(),
        priority: Priority::Normal,
        remaining_ms: 60_000,
        model: "echo".into(),
        digest: ModelDigest::default(),
        messages: vec![Message { role: Role::User, content: content.into(), extra: vec![] }],
        sampling: Sampling { seed: 1, ..Sampling::default() },
        embed: None,
        resume: vec![],
        resume_text: vec![],
        extra: vec![],
    }
}

fn submit(engine: &Engine, request: Request, room: usize) -> mpsc::Receiver<Answer> {
    let (sender, receiver) = mpsc::channel(room);
    engine.submit(request, sender);
    receiver
}

/// All frames of an answer, checked for their order.
#[derive(Debug, Default)]
struct Whole {
    accepted: Option<Accepted>,
    progress: Vec<Progress>,
    tokens: Vec<Token>,
    last: Option<Answer>,
}

impl Whole {
    /// How it ended and what it cost, but for what others had computed before.
    fn end(&self) -> Option<Answer> {
        match self.last.clone() {
            Some(Answer::Finished(mut finished)) => {
                finished.usage.cached_tokens = 0;
                finished.load = Load::default();
                Some(Answer::Finished(finished))
            }
            last => last,
        }
    }

    fn collect(mut receiver: mpsc::Receiver<Answer>) -> Self {
        let mut whole = Self::default();
        while let Some(answer) = receiver.blocking_recv() {
            assert!(whole.last.is_none(), "{answer:?} after the last frame");
            match answer {
                Answer::Accepted(accepted) => {
                    assert!(whole.accepted.is_none() && whole.tokens.is_empty());
                    whole.accepted = Some(accepted);
                }
                Answer::Progress(progress) => {
                    assert!(whole.accepted.is_some() && whole.tokens.is_empty(), "progress out of place");
                    whole.progress.push(progress);
                }
                Answer::Token(token) => {
                    assert!(whole.accepted.is_some());
                    assert!(std::str::from_utf8(&token.text).is_ok(), "half a character");
                    if let Some(before) = whole.tokens.last() {
                        assert_eq!(token.position, before.position + 1);
                    }
                    whole.tokens.push(token);
                }
                last => whole.last = Some(last),
            }
        }
        assert!(whole.last.is_some(), "an answer without an end: {whole:?}");
        whole
    }

    fn text(&self) -> String {
        let bytes = self.tokens.iter().flat_map(|token| token.text.clone()).collect();
        String::from_utf8(bytes).unwrap()
    }

    fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|token| token.id).collect()
    }

    fn finished(&self) -> Finished {
        match self.last.clone() {
            Some(Answer::Finished(finished)) => finished,
            _ => panic!("not finished: {:?}", self.last),
        }
    }

    fn refused(&self) -> &Refused {
        match &self.last {
            Some(Answer::Refused(refused)) if self.accepted.is_none() => refused,
            _ => panic!("not refused: {:?}", self.last),
        }
    }

    fn failed(&self) -> &Failed {
        match &self.last {
            Some(Answer::Failed(failed)) => failed,
            _ => panic!("not failed: {:?}", self.last),
        }
    }
}

fn ask(engine: &Engine, request: Request) -> Whole {
    Whole::collect(submit(engine, request, 64))
}

fn changed(content: &str, change: impl FnOnce(&mut Request)) -> Request {
    let mut request = request(content);
    change(&mut request);
    request
}

#[test]
fn an_answer_is_whole() {
    let engine = started(echo());
    let whole = ask(&engine, request("héllo 😀"));
    assert_eq!(whole.text(), "héllo 😀");
    assert_eq!(whole.tokens[0].position, 0);
    let finished = whole.finished();
    assert_eq!(finished.reason, FinishReason::Stop);
    let (prompt, answer) = ("héllo 😀".len() as u32 + 3, "héllo 😀".len() as u32 + 1);
    assert_eq!(finished.usage, Usage { prompt_tokens: prompt, cached_tokens: 0, completion_tokens: answer });
    let load = Load { running: 0, waiting: 1, backlog_tokens: 0 };
    assert_eq!(whole.accepted, Some(Accepted { prompt_tokens: prompt, cached_tokens: 0, context_length: 8192, load }));
    let snapshot = engine.snapshot();
    assert_eq!((snapshot.state, snapshot.load.running, snapshot.load.waiting), (ModelState::Ready, 0, 0));
    assert!(snapshot.step >= u64::from(answer) && snapshot.tokens_per_second >= answer as f32, "{}", snapshot.step);
    assert!(snapshot.prefill_rate > 0.0 && snapshot.decode_rate > 0.0);
}

#[test]
fn max_tokens_and_stop_texts_end_it() {
    let engine = started(echo());
    let whole = ask(&engine, changed("hello", |r| r.sampling.max_tokens = Some(3)));
    assert_eq!((whole.text().as_str(), whole.finished().reason), ("hel", FinishReason::Length));
    assert_eq!(whole.finished().usage.completion_tokens, 3);
    let whole = ask(&engine, changed("one two three", |r| r.sampling.stop = vec!["two".into(), "three".into()]));
    assert_eq!((whole.text().as_str(), whole.finished().reason), ("one ", FinishReason::Stop));
    // Half a stop text that stays one is part of the answer.
    let whole = ask(&engine, changed("one tw", |r| r.sampling.stop = vec!["two".into()]));
    assert_eq!(whole.text(), "one tw");
    let whole = ask(
        &engine,
        changed("one two", |r| {
            r.sampling.stop = vec!["two".into()];
            r.sampling.max_tokens = Some(6);
        }),
    );
    assert_eq!((whole.text().as_str(), whole.finished().reason), ("one tw", FinishReason::Length));
}

#[test]
fn the_context_is_filled_to_its_last_token() {
    let engine = started(EngineSpec { options: ModelOptions { context_length: Some(20), ..slots(4) }, ..echo() });
    let whole = ask(&engine, request("repeat 9: hey "));
    // The prompt has 14 bytes and 3 marks.
    assert_eq!((whole.text().as_str(), whole.finished().reason), ("hey", FinishReason::Length));
    let whole = ask(&engine, request("0123456789abcdef"));
    assert_eq!((whole.text().as_str(), whole.finished().usage.completion_tokens), ("0", 1));
    let whole = ask(&engine, request("0123456789abcdefg"));
    let refused = whole.refused();
    assert_eq!(refused.kind, RefusalKind::ContextExceeded);
    assert!(refused.message.starts_with("This model's maximum context length is 20 tokens."), "{}", refused.message);
    assert_eq!(refused.param.as_deref(), Some("messages"));
    assert_eq!(ask(&engine, request(&"x".repeat(1_000_000))).refused().kind, RefusalKind::ContextExceeded);
}

#[test]
fn what_cannot_be_honoured_is_refused_by_name() {
    let engine = started(echo());
    let refusal = |change: &dyn Fn(&mut Request)| {
        let whole = ask(&engine, changed("hello", change));
        let refused = whole.refused().clone();
        (refused.kind, refused.param.unwrap_or_default(), refused.message)
    };
    let (kind, param, message) = refusal(&|r| r.extra = br#"{"user": null, "grammar": []}"#.to_vec());
    assert_eq!((kind, param.as_str()), (RefusalKind::UnsupportedField, "grammar"));
    assert!(message.contains("'grammar'"), "{message}");
    let (kind, param, _) = refusal(&|r| r.messages[0].extra = br#"{"name": "x"}"#.to_vec());
    assert_eq!((kind, param.as_str()), (RefusalKind::UnsupportedField, "messages[0].name"));
    type Change = dyn Fn(&mut Request);
    fn bias(token: u32, bias: f32) -> Vec<LogitBias> {
        vec![LogitBias { token, bias }]
    }
    let invalid: [(&str, &Change); 26] = [
        ("extra", &|r| r.extra = b"[1]".to_vec()),
        ("messages", &|r| r.messages.clear()),
        ("temperature", &|r| r.sampling.temperature = 2.5),
        ("temperature", &|r| r.sampling.temperature = f32::NAN),
        ("top_p", &|r| r.sampling.top_p = -0.1),
        ("min_p", &|r| r.sampling.min_p = 1.5),
        ("repetition_penalty", &|r| r.sampling.repetition_penalty = 0.0),
        ("repetition_penalty", &|r| r.sampling.repetition_penalty = f32::INFINITY),
        ("presence_penalty", &|r| r.sampling.presence_penalty = 2.5),
        ("frequency_penalty", &|r| r.sampling.frequency_penalty = f32::NAN),
        ("logit_bias", &|r| r.sampling.logit_bias = bias(97, -100.5)),
        ("logit_bias", &|r| r.sampling.logit_bias = bias(97, f32::NAN)),
        ("logit_bias", &|r| r.sampling.logit_bias = bias(261, 1.0)),
        ("logit_bias", &|r| r.sampling.logit_bias = bias(97, 1.0).repeat(1025)),
        ("stop_token_ids", &|r| r.sampling.stop_token_ids = vec![261]),
        ("stop_token_ids", &|r| r.sampling.stop_token_ids = vec![97; 65]),
        ("top_logprobs", &|r| r.sampling.logprobs = Some(21)),
        ("min_tokens", &|r| {
            r.sampling.max_tokens = Some(3);
            r.sampling.min_tokens = 4;
        }),
        ("extra", &|r| r.extra = b"x".to_vec()),
        ("resume", &|r| r.resume = vec![261]),
        ("max_tokens", &|r| r.sampling.max_tokens = Some(0)),
        ("stop", &|r| r.sampling.stop = vec![String::new()]),
        ("stop", &|r| r.sampling.stop = vec!["x".into(); 17]),
        ("stop", &|r| r.sampling.stop = vec!["x".repeat(2000)]),
        ("resume", &|r| r.resume = vec![u32::MAX]),
        ("resume", &|r| r.resume = vec![97; 8192]),
    ];
    for (field, change) in invalid {
        let (kind, param, message) = refusal(change);
        assert_eq!((kind, param.as_str()), (RefusalKind::InvalidField, field), "{message}");
    }
    let usual = br#"{"n": 1, "response_format": {"type": "text"}}"#;
    ask(&engine, changed("hello", |r| r.extra = usual.to_vec())).finished();
    assert_eq!(refusal(&|r| r.extra = br#"{"n": 2}"#.to_vec()).1, "n");
    assert_eq!(refusal(&|r| r.digest = ModelDigest([1; 32])).0, RefusalKind::UnknownModel);
    assert_eq!(refusal(&|r| r.remaining_ms = 0).0, RefusalKind::DeadlineExceeded);
}

#[test]
fn a_resumed_answer_goes_on_at_the_exact_byte() {
    let engine = started(echo());
    let make = |resume: &[u32]| {
        changed("repeat 3: é😀 END", |r| {
            r.sampling.stop = vec!["END é😀 E".into()];
            r.sampling.max_tokens = Some(25);
            r.resume = resume.to_vec();
        })
    };
    let whole = ask(&engine, make(&[]));
    let ids = whole.ids();
    for cut in 0..=ids.len() {
        let rest = ask(&engine, make(&ids[..cut]));
        assert_eq!(rest.tokens, whole.tokens[cut..], "cut at {cut}");
        assert_eq!(rest.finished(), whole.finished(), "cut at {cut}");
    }
    // The same where the end comes by a token of its own.
    let whole = ask(&engine, request("ab"));
    let rest = ask(&engine, changed("ab", |r| r.resume = whole.ids()));
    assert_eq!((rest.tokens.len(), rest.finished()), (0, whole.finished()));
}

#[test]
fn an_answer_of_which_only_the_text_is_known_goes_on_behind_it() {
    let engine = started(echo());
    let make = |said: &str, tokens: usize| {
        changed("repeat 3: é😀 END", |r| {
            // What was delivered ends like the stop text begins: it must not come again.
            r.sampling.stop = vec!["END é😀 E".into()];
            r.sampling.max_tokens = Some(22);
            r.resume = vec![NO_TOKEN_ID; tokens];
            r.resume_text = said.into();
        })
    };
    let whole = "é😀 ENDé😀 ENDé";
    for (cut, _) in whole.char_indices().skip(1) {
        let rest = ask(&engine, make(&whole[..cut], 2));
        assert_eq!(rest.text(), whole[cut..], "cut at {cut}");
        let finished = rest.finished();
        assert_eq!((finished.reason, finished.usage.completion_tokens), (FinishReason::Length, 22), "cut at {cut}");
    }
    let full = ask(&engine, make(whole, 2));
    assert_eq!((full.tokens.len(), full.finished().reason), (0, FinishReason::Length));
}

#[test]
fn a_client_that_leaves_frees_its_slot_within_a_step() {
    let engine = started(EngineSpec { options: slots(1), ..echo() });
    let mut receiver = submit(&engine, request("repeat 1000 every 10ms: x"), 64);
    while !matches!(receiver.blocking_recv(), Some(Answer::Token(_))) {}
    let step = engine.snapshot().step;
    drop(receiver);
    until(|| engine.snapshot().load.running == 0);
    assert!(engine.snapshot().step <= step + 3, "{} steps later", engine.snapshot().step - step);
    // One that waits leaves the queue as well.
    let first = submit(&engine, request("repeat 1000 every 10ms: x"), 64);
    until(|| engine.snapshot().load.running == 1);
    let second = submit(&engine, request("y"), 64);
    until(|| engine.snapshot().load.waiting == 1);
    drop(second);
    until(|| engine.snapshot().load.waiting == 0);
    drop(first);
    assert_eq!(ask(&engine, request("z")).text(), "z");
}

#[test]
fn a_slow_reader_holds_up_nobody_and_loses_its_answer_in_the_end() {
    let reader_deadline = Duration::from_millis(400);
    let engine = started(EngineSpec { options: slots(2), reader_deadline, ..echo() });
    let slow = submit(&engine, request("repeat 100: x"), 4);
    until(|| engine.snapshot().load.running == 1);
    let start = Instant::now();
    assert_eq!(ask(&engine, request("repeat 50: y")).text().len(), 50);
    assert!(start.elapsed() < reader_deadline, "the quick reader waited for the slow one");
    until(|| engine.snapshot().load.running == 0);
    assert!(start.elapsed() > reader_deadline / 2);
    let whole = Whole::collect(slow);
    assert_eq!(whole.failed().kind, FailureKind::ReaderTooSlow);
    assert!(!whole.failed().migratable && whole.tokens.len() < 8);
}

#[test]
fn a_reader_that_catches_up_misses_nothing() {
    let engine = started(EngineSpec { options: slots(1), ..echo() });
    let slow = submit(&engine, request("repeat 20: xyz"), 3);
    std::thread::sleep(Duration::from_millis(100));
    let step = engine.snapshot().step;
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(engine.snapshot().step, step, "a paused sequence is not computed");
    assert_eq!(Whole::collect(slow).text(), "xyz".repeat(20));
    // The last token does not fit and its reader comes late: the slot is free all the same.
    let mut late = submit(&engine, changed("abcdef", |r| r.sampling.max_tokens = Some(4)), 3);
    while !matches!(late.blocking_recv(), Some(Answer::Token(_))) {}
    until(|| engine.snapshot().load.running == 0);
    let rest: Vec<Answer> = std::iter::from_fn(|| late.blocking_recv()).collect();
    assert!(
        matches!(&rest[..], [Answer::Token(_), Answer::Token(_), Answer::Token(last), Answer::Finished(_)] if last.text == b"d"),
        "{rest:?}"
    );
}

#[test]
fn the_queue_is_bounded_and_served_by_priority() {
    let engine = started(EngineSpec { options: slots(1), queue: 3, ..echo() });
    let first = submit(&engine, request("repeat 30 every 10ms: x"), 64);
    until(|| engine.snapshot().load.running == 1);
    let order = std::sync::Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for (name, priority) in
            [("background", Priority::Background), ("normal", Priority::Normal), ("interactive", Priority::Interactive)]
        {
            let waiting = engine.snapshot().load.waiting;
            // Long enough for the order of their ends to be seen by threads that are woken late.
            let receiver = submit(&engine, changed("repeat 10 every 20ms: y", |r| r.priority = priority), 64);
            until(|| engine.snapshot().load.waiting > waiting);
            let order = &order;
            scope.spawn(move || {
                let whole = Whole::collect(receiver);
                order.lock().unwrap().push(name);
                assert!(whole.progress.iter().any(|p| matches!(p, Progress::Queued { .. })), "{name}: {whole:?}");
            });
        }
        let refused = ask(&engine, request("z"));
        assert_eq!(refused.refused().kind, RefusalKind::Busy);
        assert!(refused.refused().retry_after_ms.is_some());
        assert_eq!(Whole::collect(first).text().len(), 30);
    });
    assert_eq!(order.into_inner().unwrap(), ["interactive", "normal", "background"]);
}

#[test]
fn silence_is_never_longer_than_250_ms() {
    let engine = started(EngineSpec { options: slots(1), ..echo() });
    let first = submit(&engine, request("prefill 900ms: x"), 64);
    let second = submit(&engine, request("y"), 64);
    let watch = |mut receiver: mpsc::Receiver<Answer>| {
        let (mut last, mut worst, mut prefilled) = (Instant::now(), Duration::ZERO, false);
        while let Some(answer) = receiver.blocking_recv() {
            worst = worst.max(last.elapsed());
            last = Instant::now();
            prefilled |= matches!(answer, Answer::Progress(Progress::Prefilled { .. }));
            if matches!(answer, Answer::Token(_)) {
                break;
            }
        }
        assert!(prefilled);
        worst
    };
    let (first, second) = std::thread::scope(|scope| {
        let second = scope.spawn(|| watch(second));
        (watch(first), second.join().unwrap())
    });
    // 200 ms when the machine is idle; tests run on busy ones.
    assert!(first < Duration::from_millis(600) && second < Duration::from_millis(600), "{first:?} {second:?}");
}

#[test]
fn deadlines_end_what_runs_and_what_waits() {
    let engine = started(EngineSpec { options: slots(1), ..echo() });
    let running = submit(&engine, changed("repeat 1000 every 10ms: x", |r| r.remaining_ms = 300), 64);
    until(|| engine.snapshot().load.running == 1);
    let waiting = submit(&engine, changed("y", |r| r.remaining_ms = 100), 64);
    let waiting = Whole::collect(waiting);
    assert_eq!(waiting.failed().kind, FailureKind::DeadlineExceeded);
    let running = Whole::collect(running);
    assert_eq!(running.failed().kind, FailureKind::DeadlineExceeded);
    assert!(!running.tokens.is_empty() && !running.failed().retryable);
    assert_eq!(ask(&engine, request("z")).text(), "z");
}

#[test]
fn a_panic_in_a_step_ends_every_answer_and_is_reported() {
    let engine = started(EngineSpec { options: slots(2), ..echo() });
    let other = submit(&engine, request("repeat 1000 every 5ms: y"), 1024);
    until(|| engine.snapshot().load.running == 1);
    let whole = ask(&engine, request("panic after 3: hello"));
    assert_eq!(whole.text(), "hel");
    assert_eq!(whole.failed().kind, FailureKind::EngineError);
    assert!(whole.failed().migratable && !whole.failed().retryable);
    assert_eq!(Whole::collect(other).failed().kind, FailureKind::EngineError);
    until(|| matches!(engine.snapshot().state, ModelState::Failed { .. }));
    let ModelState::Failed { why } = engine.snapshot().state else { unreachable!() };
    assert!(why.contains("the message asked for it"), "{why}");
    assert_eq!(ask(&engine, request("x")).refused().kind, RefusalKind::Draining);
}

#[test]
fn draining_refuses_the_new_and_finishes_the_old() {
    let engine = started(EngineSpec { options: slots(1), ..echo() });
    let mut changes = engine.changed();
    let before = *changes.borrow_and_update();
    let running = submit(&engine, request("repeat 20 every 5ms: x"), 64);
    until(|| engine.snapshot().load.running == 1);
    let waiting = submit(&engine, request("y"), 64);
    until(|| engine.snapshot().load.waiting == 1);
    engine.drain();
    assert!(*changes.borrow_and_update() > before);
    assert_eq!(ask(&engine, request("z")).refused().kind, RefusalKind::Draining);
    assert_eq!(Whole::collect(running).text().len(), 20);
    assert_eq!(Whole::collect(waiting).text(), "y");
    assert_eq!(engine.snapshot().state, ModelState::Draining);
}

#[test]
fn stopping_leaves_nobody_without_an_end() {
    let engine = started(EngineSpec { options: slots(1), ..echo() });
    let running = submit(&engine, request("repeat 1000 every 5ms: x"), 1024);
    until(|| engine.snapshot().load.running == 1);
    let mut waiting = submit(&engine, request("y"), 64);
    while !matches!(waiting.blocking_recv(), Some(Answer::Accepted(_))) {}
    engine.stop();
    let running = Whole::collect(running);
    assert_eq!(running.failed().kind, FailureKind::ShuttingDown);
    assert!(running.failed().migratable && running.failed().retryable == running.tokens.is_empty());
    let last = std::iter::from_fn(|| waiting.blocking_recv()).last();
    let Some(Answer::Failed(failed)) = last else { panic!("{last:?}") };
    assert!(failed.kind == FailureKind::ShuttingDown && failed.migratable && failed.retryable);
    // Whatever is on its way in when the engine goes has an end as well.
    for _ in 0..50 {
        let engine = started(echo());
        let receivers: Vec<_> = (0..4).map(|_| submit(&engine, request("repeat 100: x"), 512)).collect();
        drop(engine);
        receivers.into_iter().for_each(|receiver| drop(Whole::collect(receiver)));
    }
}

#[test]
fn a_model_that_does_not_load_says_why() {
    let missing = ModelSource::Gguf("/nowhere/model.gguf".into());
    let engine = started(EngineSpec::new(missing, ModelDigest::default()));
    let ModelState::Failed { why } = engine.snapshot().state else { panic!("{:?}", engine.snapshot()) };
    assert!(why.contains("/nowhere/model.gguf"), "{why}");
    let folder = tempfile::tempdir().unwrap();
    let path = tiny::llama(tiny::Sizes::default()).write(folder.path());
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() - 100]).unwrap();
    let cut = started(EngineSpec::new(ModelSource::Gguf(path), ModelDigest::default()));
    let ModelState::Failed { why } = cut.snapshot().state else { panic!("{:?}", cut.snapshot()) };
    assert!(why.contains("tiny.gguf: the file is truncated: tensor blk.1.ffn_down.weight needs bytes"), "{why}");
    assert_eq!(ask(&engine, request("x")).refused().kind, RefusalKind::Draining);
}

/// With real (random) weights: what a request gets does not depend on company, chunks or interruptions.
#[test]
fn answers_are_the_same_alone_in_company_and_resumed() {
    let folder = tempfile::tempdir().unwrap();
    let path = tiny::llama(tiny::Sizes { feed_forward: 1100, ..Default::default() }).write(folder.path());
    let spec = EngineSpec::new(ModelSource::Gguf(path), ModelDigest::default());
    let engine = started(EngineSpec { options: slots(4), ..spec });
    assert_eq!(engine.snapshot().state, ModelState::Ready);
    let requests: Vec<Request> = [0.0, 0.7, 1.5, 1.0, 0.0, 1.0]
        .into_iter()
        .enumerate()
        .map(|(n, temperature)| {
            changed(&"lorem ipsum ".repeat(n * 3 + 1), |r| {
                r.sampling.temperature = temperature;
                r.sampling.top_p = 0.95;
                r.sampling.seed = n as u64;
                r.sampling.max_tokens = Some(60);
                // Every option that looks back, on some of them.
                if n % 2 == 1 {
                    r.sampling = Sampling {
                        top_k: 50,
                        min_p: 0.01,
                        repetition_penalty: 1.3,
                        repetition_window: 20 * n as u32,
                        presence_penalty: 0.4,
                        frequency_penalty: 0.3,
                        logit_bias: vec![LogitBias { token: 5, bias: 2.0 }],
                        min_tokens: 30,
                        logprobs: Some(4),
                        ..r.sampling.clone()
                    };
                }
            })
        })
        .collect();
    let alone: Vec<Whole> = requests.iter().map(|request| ask(&engine, request.clone())).collect();
    let together: Vec<_> = requests.iter().map(|request| submit(&engine, request.clone(), 256)).collect();
    for (alone, together) in alone.iter().zip(together) {
        let together = Whole::collect(together);
        assert_eq!(together.tokens, alone.tokens);
        assert_eq!(together.end(), alone.end());
    }
    for (request, alone) in requests.iter().zip(&alone) {
        for cut in [1, alone.tokens.len() / 2, alone.tokens.len() - 1] {
            let rest = ask(&engine, Request { resume: alone.ids()[..cut].to_vec(), ..request.clone() });
            assert_eq!(rest.tokens, alone.tokens[cut..]);
            assert_eq!(rest.end(), alone.end());
        }
    }
    let other = ask(
        &engine,
        Request { sampling: Sampling { seed: 99, ..requests[2].sampling.clone() }, ..requests[2].clone() },
    );
    assert_ne!(other.ids(), alone[2].ids(), "another seed is another answer");
}
