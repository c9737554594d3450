//! Limits that change while answers run.

use ingle_protocol::wire::v2::LiveParameters;

use super::*;
use crate::AdjustError;

const LIVE: LiveParameters = LiveParameters { batch_size: 2, max_tokens: None, prefill_budget: 64, threads: None };

#[test]
fn fewer_places_let_what_runs_finish_and_more_let_the_next_begin() {
    let engine = started(EngineSpec { options: ModelOptions { most_slots: 4, ..slots(2) }, ..echo() });
    let long = || submit(&engine, request("repeat 60 every 5ms: x"), 128);
    let (first, second) = (long(), long());
    until(|| engine.snapshot().load.running == 2);
    engine.adjust(&LiveParameters { batch_size: 1, ..LIVE }).unwrap();
    assert_eq!(engine.snapshot().slots, 1);
    let third = submit(&engine, request("repeat 60 every 5ms: y"), 128);
    let fourth = submit(&engine, request("z"), 128);
    until(|| engine.snapshot().load.waiting == 2);
    assert_eq!(Whole::collect(first).text().len() + Whole::collect(second).text().len(), 120);
    until(|| engine.snapshot().load.running == 1);
    assert_eq!(engine.snapshot().load.waiting, 1, "one place is free, not two");
    engine.adjust(&LiveParameters { batch_size: 4, ..LIVE }).unwrap();
    // Beside the third, whose answer is not at its end.
    assert_eq!(Whole::collect(fourth).text(), "z");
    assert_eq!(Whole::collect(third).text().len(), 60);
}

#[test]
fn what_is_refused_changes_nothing_and_what_is_taken_holds_for_the_next() {
    let engine = started(EngineSpec { options: slots(2), ..echo() });
    engine.adjust(&LiveParameters { max_tokens: Some(3), ..LIVE }).unwrap();
    assert_eq!(ask(&engine, request("hello")).text(), "hel");
    let refused = engine.adjust(&LiveParameters { batch_size: 3, ..LIVE });
    assert_eq!(refused, Err(AdjustError::BatchSize { asked: 3, room: 2 }));
    assert_eq!(engine.adjust(&LiveParameters { threads: Some(0), ..LIVE }), Err(AdjustError::Zero("threads")));
    assert_eq!(ask(&engine, request("hello")).text(), "hel");
    assert_eq!(engine.snapshot().slots, 2);
    engine.adjust(&LIVE).unwrap();
    assert_eq!(ask(&engine, request("hello")).text(), "hello");
}

#[test]
fn other_threads_and_chunks_give_the_same_answer() {
    let folder = tempfile::tempdir().unwrap();
    let source = ModelSource::Gguf(tiny::llama(tiny::Sizes::default()).write(folder.path()));
    let options = ModelOptions { threads: Some(1), ..slots(2) };
    let engine = started(EngineSpec { options, ..EngineSpec::new(source, ModelDigest::default()) });
    let asked = || changed("a long question of many tokens", |r| r.sampling.max_tokens = Some(12));
    let before = ask(&engine, asked());
    assert!(engine.snapshot().backend.ends_with("1 threads)"), "{}", engine.snapshot().backend);
    engine.adjust(&LiveParameters { prefill_budget: 3, threads: Some(3), ..LIVE }).unwrap();
    let after = ask(&engine, asked());
    assert!(engine.snapshot().backend.ends_with("3 threads)"), "{}", engine.snapshot().backend);
    assert!(!before.ids().is_empty());
    assert_eq!(after.ids(), before.ids());
}
