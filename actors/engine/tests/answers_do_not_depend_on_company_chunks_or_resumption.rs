//! A request's answer is the same alone and among fifteen others, however its prompt was cut, with and without
//! memory that others left, where it had to give up its memory in between, and resumed from its own tokens in a fresh
//! engine: greedy and seeded, with every option of sampling.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use ingle_engine::{DeviceChoice, Engine, EngineSpec, KvType, ModelOptions, ModelSource};
use ingle_protocol::wire::Answer;
use ingle_protocol::wire::v2::*;
use ingle_protocol::{ModelDigest, RequestId};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use tokio::sync::mpsc;

fn start(options: ModelOptions) -> Engine {
    let model: PathBuf = [env!("CARGO_MANIFEST_DIR"), "tests", "fixtures", "tiny", "llama3.gguf"].iter().collect();
    let spec = EngineSpec::new(ModelSource::Gguf(model), ModelDigest::default());
    let options = ModelOptions { context_length: Some(512), threads: Some(2), ..options };
    let engine = Engine::start(EngineSpec { device: DeviceChoice::Cpu, options, ..spec });
    let deadline = Instant::now() + Duration::from_secs(60);
    while engine.snapshot().state != ModelState::Ready {
        assert!(Instant::now() < deadline, "{:?}", engine.snapshot());
        std::thread::sleep(Duration::from_millis(2));
    }
    engine
}

fn request(content: &str, sampling: Sampling) -> Request {
    Request {
        request_id: RequestId([1; 16]),
        attempt: 0,
        trace: TraceContext::default(),
        principal: "local".into(),
        priority: Priority::Normal,
        remaining_ms: 300_000,
        model: "tiny".into(),
        digest: ModelDigest::default(),
        messages: vec![Message { role: Role::User, content: content.into(), extra: vec![] }],
        sampling,
        embed: None,
        resume: vec![],
        resume_text: vec![],
        extra: vec![],
    }
}

fn sampling(temperature: f32, seed: u64, max_tokens: u32) -> Sampling {
    Sampling { temperature, seed, max_tokens: Some(max_tokens), ignore_eos: true, ..Sampling::default() }
}

fn submit(engine: &Engine, request: &Request) -> mpsc::Receiver<Answer> {
    let (sender, receiver) = mpsc::channel(1024);
    engine.submit(request.clone(), sender);
    receiver
}

/// The tokens and the tokens of the prompt that needed no computing.
fn collect(mut receiver: mpsc::Receiver<Answer>) -> (Vec<u32>, u32) {
    let mut ids = Vec::new();
    loop {
        match receiver.blocking_recv().expect("an answer has an end") {
            Answer::Token(token) => ids.push(token.id),
            Answer::Finished(finished) => return (ids, finished.usage.cached_tokens),
            Answer::Failed(failed) => panic!("{failed:?}"),
            Answer::Refused(refused) => panic!("{refused:?}"),
            _ => {}
        }
    }
}

fn ask(engine: &Engine, request: &Request) -> Vec<u32> {
    collect(submit(engine, request)).0
}

/// Text whose tokens are many.
fn text(seed: u32, words: usize) -> String {
    let names = ["hearth", "node", "mini", "tower", "token", "queue", "fire", "house"];
    (0..words as u32)
        .map(|n| names[(seed.wrapping_mul(31).wrapping_add(n * n) % 8) as usize])
        .collect::<Vec<_>>()
        .join(" ")
}

#[test]
fn answers_are_the_same_in_any_company() {
    let engine = start(ModelOptions { slots: 16, ..ModelOptions::default() });
    // Another chunk, other threads, no company ever: the reference.
    let alone = start(ModelOptions { slots: 1, chunk: Some(5), ..ModelOptions::default() });
    let fresh = start(ModelOptions { slots: 2, chunk: Some(64), ..ModelOptions::default() });
    let options = (
        1usize..40,
        0u32..1000,
        prop_oneof![Just(0.0f32), 0.3f32..1.6],
        any::<u64>(),
        0.5f32..1.0,
        0u32..40,
        0.0f32..0.2,
        (0.8f32..1.4, -0.5f32..0.5, -0.5f32..0.5),
        0usize..24,
    );
    let mut runner = TestRunner::new(Config { cases: 24, failure_persistence: None, ..Config::default() });
    runner
        .run(&options, |(words, which, temperature, seed, top_p, top_k, min_p, penalties, cut)| {
            let (repetition_penalty, presence_penalty, frequency_penalty) = penalties;
            let sampling = Sampling {
                top_p,
                top_k,
                min_p,
                repetition_penalty,
                presence_penalty,
                frequency_penalty,
                ..sampling(temperature, seed, 24)
            };
            let mine = request(&text(which, words), sampling);
            let due = ask(&alone, &mine);
            prop_assert_eq!(due.len(), 24);
            let others: Vec<_> = (0..15u32)
                .map(|n| {
                    submit(&engine, &request(&text(which + n, 1 + n as usize * 3), self::sampling(1.0, n.into(), 20)))
                })
                .collect();
            prop_assert_eq!(&ask(&engine, &mine), &due, "among fifteen");
            others.into_iter().for_each(|other| drop(collect(other)));
            // Again: now the whole prompt is known.
            prop_assert_eq!(&ask(&engine, &mine), &due, "again");
            let resumed = Request { resume: due[..cut].to_vec(), ..mine };
            prop_assert_eq!(&ask(&fresh, &resumed)[..], &due[cut..], "resumed behind {}", cut);
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_conversation_that_goes_on_finds_what_was_computed() {
    for kv_type in [KvType::F16, KvType::Int8] {
        let engine = start(ModelOptions { slots: 2, kv_type, ..ModelOptions::default() });
        let first = request(&text(1, 60), sampling(0.0, 1, 8));
        let (due, cached) = collect(submit(&engine, &first));
        assert_eq!(cached, 0);
        let (again, cached) = collect(submit(&engine, &first));
        assert_eq!(again, due);
        assert!(cached >= 64 && cached % 64 == 0, "{cached}");
    }
}

#[test]
fn where_memory_runs_out_answers_wait_and_lose_nothing() {
    let roomy = start(ModelOptions { slots: 4, ..ModelOptions::default() });
    // One full context of 512 tokens, for four answers of some 200 each.
    let narrow = start(ModelOptions { slots: 4, kv_memory: Some(1), ..ModelOptions::default() });
    let requests: Vec<Request> = (0..6).map(|n| request(&text(n, 10), sampling(0.9, n.into(), 180))).collect();
    let due: Vec<_> = requests.iter().map(|request| ask(&roomy, request)).collect();
    let answers: Vec<_> = requests.iter().map(|request| submit(&narrow, request)).collect();
    for (answer, due) in answers.into_iter().zip(due) {
        assert_eq!(collect(answer).0, due);
    }
}

#[test]
fn a_thousand_clients_that_leave_leak_nothing() {
    let engine = start(ModelOptions { slots: 4, kv_memory: Some(1), ..ModelOptions::default() });
    let long = request(&text(3, 30), sampling(1.0, 5, 150));
    let due = ask(&engine, &long);
    for n in 0..1_000u32 {
        let mut receiver = submit(&engine, &request(&text(n, n as usize % 50), sampling(1.0, n.into(), 400)));
        // Some leave in the queue, some while their prompt is read, some in the middle of the answer.
        for _ in 0..n % 7 {
            let _ = receiver.blocking_recv();
        }
        drop(receiver);
        let deadline = Instant::now() + Duration::from_secs(20);
        while engine.snapshot().load.running + engine.snapshot().load.waiting > 4 {
            assert!(Instant::now() < deadline, "clients that left stay: {:?}", engine.snapshot());
            std::thread::sleep(Duration::from_micros(200));
        }
    }
    // A full context's worth of memory is needed for this: a leaked block would keep it waiting for ever.
    let whole = request(&text(3, 30), sampling(1.0, 5, 10_000));
    assert_eq!(ask(&engine, &whole)[..due.len()], due[..]);
}
