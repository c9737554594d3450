use std::path::PathBuf;
use std::time::Duration;

use ingle_protocol::wire::Answer;
use ingle_protocol::wire::v2::*;
use ingle_protocol::{ModelDigest, RequestId};
use proptest::prelude::*;
use tokio::sync::mpsc;

use crate::{Encoder, Engine, EngineSpec, ModelOptions, ModelSource};

const WAIT: Duration = Duration::from_secs(20);

/// A tiny random BERT: 64 numbers, 64 tokens at most (`tests/fixtures/make_tiny_models.py`).
fn file() -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "fixtures", "tiny", "bert_mean.gguf"].iter().collect()
}

fn started(options: ModelOptions) -> Engine {
    let source = ModelSource::Gguf(file());
    let engine = Engine::start(EngineSpec { options, queue: 64, ..EngineSpec::new(source, ModelDigest([7; 32])) });
    until(|| !matches!(engine.snapshot().state, ModelState::Loading | ModelState::Warming));
    assert_eq!(engine.snapshot().state, ModelState::Ready);
    engine
}

fn until(mut happened: impl FnMut() -> bool) {
    let start = std::time::Instant::now();
    while !happened() {
        assert!(start.elapsed() < WAIT, "it did not happen within {WAIT:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn request(inputs: Vec<EmbedInput>) -> Request {
    Request {
        request_id: RequestId([1; 16]),
        attempt: 0,
        trace: TraceContext::default(),
        principal: "local".into(),
        priority: Priority::Normal,
        remaining_ms: 60_000,
        model: "bert".into(),
        digest: ModelDigest([7; 32]),
        messages: vec![],
        sampling: Sampling::default(),
        embed: Some(Embed { inputs, dimensions: None }),
        resume: vec![],
        resume_text: vec![],
        extra: vec![],
    }
}

fn tokens(ids: &[u32]) -> EmbedInput {
    EmbedInput::Tokens(ids.to_vec())
}

/// Token ids that the tiny model has, different ones for each seed.
fn ids(seed: usize, count: usize) -> Vec<u32> {
    (0..count).map(|n| ((seed * 31 + n * 7) % 90 + 5) as u32).collect()
}

fn submit(engine: &Engine, request: Request, room: usize) -> mpsc::Receiver<Answer> {
    let (sender, receiver) = mpsc::channel(room);
    engine.submit(request, sender);
    receiver
}

/// The embeddings, checked for their order, and what came at the end.
fn collect(mut receiver: mpsc::Receiver<Answer>) -> (Vec<Vec<f32>>, Answer) {
    let (mut values, mut accepted) = (Vec::new(), false);
    while let Some(answer) = receiver.blocking_recv() {
        match answer {
            Answer::Accepted(_) => accepted = true,
            Answer::Progress(_) => assert!(accepted),
            Answer::Embedding(embedding) => {
                assert!(accepted && embedding.index as usize == values.len(), "{embedding:?} out of order");
                values.push(embedding.values);
            }
            last => {
                assert!(last.is_last(), "{last:?}");
                assert!(receiver.blocking_recv().is_none());
                return (values, last);
            }
        }
    }
    panic!("an answer without an end");
}

fn embed(engine: &Engine, inputs: Vec<EmbedInput>) -> (Vec<Vec<f32>>, Usage) {
    match collect(submit(engine, request(inputs), 64)) {
        (values, Answer::Finished(finished)) => (values, finished.usage),
        (_, other) => panic!("{other:?}"),
    }
}

fn refused(engine: &Engine, request: Request) -> Refused {
    match collect(submit(engine, request, 8)) {
        (values, Answer::Refused(refused)) if values.is_empty() => refused,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn an_engine_embeds_as_the_encoder_does_and_says_what_it_is() {
    let engine = started(ModelOptions::default());
    let snapshot = engine.snapshot();
    assert_eq!((snapshot.features, snapshot.context_length), (vec![EMBEDDINGS.to_owned()], 64));
    assert!(snapshot.prefill_rate > 0.0 && snapshot.backend.starts_with("cpu"), "{}", snapshot.backend);
    let mut encoder = Encoder::open(&file(), &ModelOptions::default()).unwrap();
    let inputs = vec![EmbedInput::Text("a b".into()), tokens(&ids(3, 17)), EmbedInput::Text(String::new())];
    let (values, usage) = embed(&engine, inputs);
    let due = [encoder.tokenize("a b").unwrap(), ids(3, 17), encoder.tokenize("").unwrap()];
    assert_eq!(values, encoder.embed_tokens(&due).unwrap());
    let count = due.iter().map(Vec::len).sum::<usize>() as u32;
    assert_eq!((usage.prompt_tokens, usage.completion_tokens), (count, 0));
    let whole =
        Request { embed: Some(Embed { inputs: vec![tokens(&ids(1, 3))], dimensions: Some(64) }), ..request(vec![]) };
    assert!(matches!(collect(submit(&engine, whole, 8)).1, Answer::Finished(_)), "as many as there are");
    engine.stop();
}

#[test]
fn what_cannot_be_embedded_is_refused_by_name() {
    let engine = started(ModelOptions::default());
    let of = |inputs: Vec<EmbedInput>| {
        let Refused { kind, param, message, .. } = refused(&engine, request(inputs));
        (kind, param.unwrap_or_default(), message)
    };
    let (kind, param, message) = of(vec![tokens(&ids(1, 3)), tokens(&ids(1, 65))]);
    assert_eq!((kind, param.as_str()), (RefusalKind::ContextExceeded, "input[1]"));
    assert!(message.contains("65 tokens") && message.contains("64 at most"), "{message}");
    assert_eq!(of(vec![tokens(&ids(1, 65))]).1, "input");
    let long = EmbedInput::Text("x ".repeat(500));
    assert_eq!(of(vec![long]).0, RefusalKind::ContextExceeded);
    let (kind, param, message) = of(vec![tokens(&[5]), tokens(&[5_000_000])]);
    assert_eq!((kind, param.as_str()), (RefusalKind::InvalidField, "input[1]"));
    assert!(message.contains("5000000"), "{message}");
    assert_eq!(of(vec![tokens(&[])]).0, RefusalKind::InvalidField);
    assert_eq!(of(vec![]).1, "input");
    assert_eq!(of(vec![tokens(&[5]); MOST_INPUTS + 1]).1, "input");

    let chat = Request { embed: None, ..request(vec![]) };
    let said = refused(&engine, chat);
    assert_eq!((said.kind, said.param.as_deref()), (RefusalKind::UnsupportedField, Some("model")));
    assert!(said.message.contains("embedding model"), "{}", said.message);
    let fewer = Embed { inputs: vec![tokens(&[5])], dimensions: Some(32) };
    let said = refused(&engine, Request { embed: Some(fewer), ..request(vec![]) });
    assert_eq!((said.kind, said.param.as_deref()), (RefusalKind::UnsupportedField, Some("dimensions")));
    let more = Request { extra: br#"{"input_type":"query"}"#.to_vec(), ..request(vec![tokens(&[5])]) };
    assert_eq!(refused(&engine, more).param.as_deref(), Some("input_type"));
    let other = Request { digest: ModelDigest([8; 32]), ..request(vec![tokens(&[5])]) };
    assert_eq!(refused(&engine, other).kind, RefusalKind::UnknownModel);
    let late = Request { remaining_ms: 0, ..request(vec![tokens(&[5])]) };
    assert_eq!(refused(&engine, late).kind, RefusalKind::DeadlineExceeded);

    let echo = Engine::start(EngineSpec::new(ModelSource::Echo, ModelDigest([7; 32])));
    until(|| echo.snapshot().state == ModelState::Ready);
    let said = refused(&echo, request(vec![tokens(&[5])]));
    assert_eq!((said.kind, said.param.as_deref()), (RefusalKind::UnsupportedField, Some("model")));
}

#[test]
fn who_does_not_read_holds_up_nobody_else_and_loses_nothing() {
    let engine = started(ModelOptions { chunk: Some(64), slots: 4, ..ModelOptions::default() });
    let long: Vec<EmbedInput> = (0..300).map(|n| tokens(&ids(n, 20))).collect();
    let unread = submit(&engine, request(long.clone()), 8);
    until(|| engine.snapshot().load.running == 1);
    for n in 0..3 {
        assert_eq!(embed(&engine, vec![tokens(&ids(n, 9))]).0.len(), 1);
    }
    assert_eq!(engine.snapshot().load.running, 1, "it waits for its reader");
    let (values, last) = collect(unread);
    assert!(matches!(last, Answer::Finished(_)), "{last:?}");
    assert_eq!(values, embed(&engine, long).0);
}

#[test]
fn a_reader_that_leaves_frees_its_place_and_an_engine_that_ends_says_so() {
    let engine = started(ModelOptions { chunk: Some(64), slots: 1, ..ModelOptions::default() });
    let long: Vec<EmbedInput> = (0..MOST_INPUTS).map(|n| tokens(&ids(n, 64))).collect();
    let leaves = submit(&engine, request(long.clone()), 8);
    until(|| engine.snapshot().load.running == 1);
    let waits = submit(&engine, request(vec![tokens(&[5])]), 8);
    until(|| engine.snapshot().load.waiting == 1);
    drop(leaves);
    assert!(matches!(collect(waits).1, Answer::Finished(_)));
    until(|| engine.snapshot().load == Load::default());
    let cut = submit(&engine, request(long), 8);
    until(|| engine.snapshot().load.running == 1);
    engine.stop();
    match collect(cut).1 {
        Answer::Failed(failed) => assert!(failed.kind == FailureKind::ShuttingDown && failed.retryable, "{failed:?}"),
        other => panic!("{other:?}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// The same bits alone and in whatever company requests come.
    #[test]
    fn an_answer_does_not_depend_on_who_else_asks(
        shapes in prop::collection::vec(prop::collection::vec(1usize..64, 1..7), 1..7),
        chunk in 1u32..300, slots in 1u32..5, urgent in any::<u8>(),
    ) {
        let engine = started(ModelOptions { chunk: Some(chunk), slots, ..ModelOptions::default() });
        let inputs: Vec<Vec<Vec<u32>>> = shapes.iter().enumerate().map(|(n, lengths)| {
            lengths.iter().enumerate().map(|(m, length)| ids(n * 10 + m, *length)).collect()
        }).collect();
        let answers: Vec<_> = inputs.iter().enumerate().map(|(n, texts)| {
            let priority = if (urgent >> n) & 1 == 1 { Priority::Interactive } else { Priority::Normal };
            let request = request(texts.iter().map(|ids| tokens(ids)).collect());
            submit(&engine, Request { priority, ..request }, 64)
        }).collect();
        let mut encoder = Encoder::open(&file(), &ModelOptions::default()).unwrap();
        for (texts, answer) in inputs.iter().zip(answers) {
            let (values, last) = collect(answer);
            prop_assert!(matches!(last, Answer::Finished(_)), "{:?}", last);
            prop_assert_eq!(values.len(), texts.len());
            for (text, values) in texts.iter().zip(&values) {
                prop_assert_eq!(&encoder.embed_tokens(std::slice::from_ref(text)).unwrap()[0], values);
            }
        }
    }
}
