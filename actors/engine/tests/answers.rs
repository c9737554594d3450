//! The default model behind the engine's own face: what a client would see.

#![allow(clippy::unwrap_used)]

use std::sync::OnceLock;
use std::time::Duration;

use ingle_engine::{DeviceChoice, Engine, EngineSpec, ModelOptions, ModelSource, inspect};
use ingle_protocol::wire::Answer;
use ingle_protocol::wire::v2::*;
use ingle_protocol::{ModelDigest, RequestId};
use tokio::sync::mpsc;

mod support;

fn digest() -> ModelDigest {
    support::SHA256.parse().unwrap()
}

/// One for all tests of this process: half a gigabyte each is too much.
fn engine() -> &'static Engine {
    static ENGINE: OnceLock<Engine> = OnceLock::new();
    ENGINE.get_or_init(|| {
        let spec = EngineSpec::new(ModelSource::Gguf(support::model()), digest());
        let engine = Engine::start(EngineSpec {
            device: DeviceChoice::Cpu,
            options: ModelOptions { slots: 6, ..ModelOptions::default() },
            ..spec
        });
        while matches!(engine.snapshot().state, ModelState::Loading | ModelState::Warming) {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(engine.snapshot().state, ModelState::Ready);
        engine
    })
}

fn request(content: &str, change: impl FnOnce(&mut Request)) -> Request {
    let sampling = Sampling { seed: 7, max_tokens: Some(24), ..Sampling::default() };
    let mut request = Request {
        request_id: RequestId([1; 16]),
        attempt: 0,
        trace: TraceContext::default(),
        principal: "local".into(),
        priority: Priority::Normal,
        remaining_ms: 300_000,
        model: "default".into(),
        digest: digest(),
        messages: vec![Message { role: Role::User, content: content.into(), extra: vec![] }],
        sampling,
        embed: None,
        resume: vec![],
        resume_text: vec![],
        extra: vec![],
    };
    change(&mut request);
    request
}

#[derive(Debug, PartialEq)]
struct Whole {
    tokens: Vec<Token>,
    last: Answer,
}

impl Whole {
    fn text(&self) -> String {
        self.tokens.iter().map(|token| std::str::from_utf8(&token.text).expect("half a character")).collect()
    }

    fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|token| token.id).collect()
    }

    fn finished(&self) -> Finished {
        let Answer::Finished(finished) = self.last.clone() else { panic!("{:?}", self.last) };
        finished
    }
}

fn submit(request: Request) -> mpsc::Receiver<Answer> {
    let (sender, receiver) = mpsc::channel(64);
    engine().submit(request, sender);
    receiver
}

fn collect(mut receiver: mpsc::Receiver<Answer>) -> Whole {
    let mut tokens = Vec::new();
    while let Some(answer) = receiver.blocking_recv() {
        match answer {
            Answer::Token(token) => tokens.push(token),
            Answer::Finished(mut finished) => {
                // What others have computed before, and what they do now, changes nothing else.
                (finished.usage.cached_tokens, finished.load) = (0, Load::default());
                return Whole { tokens, last: Answer::Finished(finished) };
            }
            last if last.is_last() => return Whole { tokens, last },
            _ => {}
        }
    }
    panic!("an answer without an end, after {tokens:?}");
}

fn ask(request: Request) -> Whole {
    collect(submit(request))
}

#[test]
fn the_file_is_what_it_says() {
    let summary = inspect(&support::model()).unwrap();
    assert_eq!((summary.architecture.as_str(), summary.quantization.as_str()), ("llama", "Q4_1"));
    assert_eq!((summary.context_length, summary.parameters), (8192, 134_515_008));
    assert!(summary.file_bytes > summary.tensor_bytes && summary.tensor_bytes > 90_000_000);
    let snapshot = engine().snapshot();
    assert!(snapshot.backend.starts_with("cpu ("), "{}", snapshot.backend);
    assert_eq!(snapshot.numerics, "cpu-1-f16");
    assert!(snapshot.prefill_rate > 0.0 && snapshot.decode_rate > 0.0);
}

#[test]
fn greedy_answers_are_those_of_the_model() {
    let capital = ask(request("Name the capital of Italy.", |_| {}));
    assert_eq!(
        (capital.text().as_str(), capital.finished().reason),
        ("The capital of Italy is Rome.", FinishReason::Stop)
    );
    // The prompt, and seven words, a full stop and the end of the turn.
    let usage = capital.finished().usage;
    assert_eq!((usage.prompt_tokens, usage.completion_tokens), (36, 8));
    assert_eq!(ask(request("Hi", |_| {})).text(), "Hello! How can I assist you today?");
}

#[test]
fn seeds_repeat_and_differ() {
    let make = |seed| {
        request("Tell me a story.", |r| {
            (r.sampling.temperature, r.sampling.top_p, r.sampling.seed) = (1.0, 0.9, seed);
        })
    };
    let first = ask(make(1));
    assert_eq!(ask(make(1)), first);
    assert_ne!(ask(make(2)).ids(), first.ids());
}

#[test]
fn company_and_interruptions_change_nothing() {
    let requests: Vec<Request> = ["Hi", "Name three colours.", "请用简单的中文解释一下什么是光合作用。", "😀😀😀?"]
        .into_iter()
        .zip([0.0, 1.0, 0.8, 1.2])
        .map(|(content, temperature)| request(content, |r| r.sampling.temperature = temperature))
        .collect();
    let alone: Vec<Whole> = requests.iter().map(|request| ask(request.clone())).collect();
    let together: Vec<_> = requests.iter().map(|request| submit(request.clone())).collect();
    for (alone, together) in alone.iter().zip(together) {
        assert_eq!(&collect(together), alone);
    }
    for (request, alone) in requests.iter().zip(&alone) {
        let cut = alone.tokens.len() / 2;
        let rest = ask(Request { resume: alone.ids()[..cut].to_vec(), ..request.clone() });
        assert_eq!((&rest.tokens[..], &rest.last), (&alone.tokens[cut..], &alone.last));
    }
}

#[test]
fn stop_texts_and_limits_hold() {
    let question = "Name the capital of Italy.";
    let stopped = ask(request(question, |r| r.sampling.stop = vec!["Italy is".into()]));
    assert_eq!((stopped.text().as_str(), stopped.finished().reason), ("The capital of ", FinishReason::Stop));
    let short = ask(request(question, |r| r.sampling.max_tokens = Some(3)));
    assert_eq!((short.text().as_str(), short.finished().reason), ("The capital of", FinishReason::Length));
    let long = "word ".repeat(9_000);
    let refused = ask(request(&long, |_| {}));
    let Answer::Refused(refused) = refused.last else { panic!("{refused:?}") };
    assert!(refused.message.starts_with("This model's maximum context length is 8192 tokens."), "{}", refused.message);
}

#[test]
fn characters_of_many_bytes_come_whole() {
    // `Whole::text` fails on half a character; these prompts answer in kana and emoji.
    let text = ask(request(
        "東京から大阪まで新幹線で何時間かかりますか？できるだけ詳しく教えてください。",
        |r| r.sampling.max_tokens = Some(40),
    ))
    .text();
    assert!(text.chars().filter(|c| !c.is_ascii()).count() > 10, "{text}");
}

#[test]
fn a_client_that_leaves_frees_its_slot() {
    let mut receiver = submit(request("Write a very long story.", |r| r.sampling.max_tokens = None));
    while !matches!(receiver.blocking_recv(), Some(Answer::Token(_))) {}
    drop(receiver);
    // Others may be running, all of them with a limit of 40 or fewer tokens; ours would go on for many more steps.
    let left = engine().snapshot().step;
    while engine().snapshot().load.running > 0 {
        assert!(engine().snapshot().step < left + 300, "the sequence of a client that left goes on");
        std::thread::sleep(Duration::from_millis(10));
    }
}
