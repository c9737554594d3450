use std::time::Duration;

use ingle_protocol::liveness::Health;
use ingle_protocol::registry::{Endpoint, ModelType, NewModel, Origin, Registry, Value};
use ingle_protocol::wire::v2::{ModelFacts, ModelState};
use ingle_protocol::{ModelDigest, NodeId};

use super::look::{SeenModels, SeenNodes, SeenRegistry};
use super::*;

fn model(name: &str, content: Option<u8>, state: ModelState) -> ModelFacts {
    ModelFacts {
        name: name.into(),
        digest: content.map(|byte| ModelDigest([byte; 32])),
        state,
        engine: None,
        backend: String::new(),
        numerics: String::new(),
        context_length: 0,
        slots: 0,
        features: vec![],
        is_default: false,
    }
}

/// `model: from -> to (why)` of each event.
fn lines(events: &[Event]) -> Vec<String> {
    let or_dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".into());
    let line = |event: &Event| {
        let why = event.why.as_ref().map(|why| format!(" ({why})")).unwrap_or_default();
        let about = event.model.as_ref().or(event.node.as_ref());
        format!("{}: {} -> {}{why}", or_dash(&about.cloned()), or_dash(&event.from), or_dash(&event.to))
    };
    events.iter().map(line).collect()
}

fn looked(seen: &mut SeenModels, now: &[ModelFacts]) -> Vec<String> {
    let mut events = Vec::new();
    seen.look("tower", now, &mut events);
    assert!(events.iter().all(|event| event.node.as_deref() == Some("tower") && event.kind == EventKind::Model));
    lines(&events)
}

#[test]
fn every_state_of_a_model_is_told_once_and_a_fetch_every_five_percent() {
    let mut seen = SeenModels::default();
    let mut told = Vec::new();
    let fetching = |done, total| model("m", Some(1), ModelState::Fetching { done, total });
    told.extend(looked(&mut seen, &[model("m", Some(1), ModelState::Absent)]));
    for done in 0..=1_000 {
        told.extend(looked(&mut seen, &[fetching(done, 1_000)]));
    }
    assert_eq!(told.len(), 1 + 21, "{told:?}");
    assert_eq!(told[..3], ["m: - -> absent", "m: absent -> fetching 0 %", "m: fetching 0 % -> fetching 5 %"]);
    for state in [ModelState::Verifying, ModelState::Loading, ModelState::Warming, ModelState::Ready] {
        assert_eq!(looked(&mut seen, &[model("m", Some(1), state.clone())]).len(), 1);
        assert!(looked(&mut seen, &[model("m", Some(1), state)]).is_empty());
    }
    let failed = ModelState::Failed { why: "no memory".into() };
    assert_eq!(looked(&mut seen, &[model("m", Some(1), failed)]), ["m: ready -> failed (no memory)"]);
    assert_eq!(looked(&mut seen, &[]), ["m: failed -> -"]);
    // Nobody knows how large it is.
    let told: Vec<String> = (0..250).flat_map(|n| looked(&mut seen, &[fetching(n * 1_000_000, 0)])).collect();
    assert_eq!(
        told,
        ["m: - -> fetching 0 MB", "m: fetching 0 MB -> fetching 100 MB", "m: fetching 100 MB -> fetching 200 MB"]
    );
}

#[test]
fn two_versions_of_a_model_are_told_apart() {
    let mut seen = SeenModels::default();
    looked(&mut seen, &[model("m", Some(1), ModelState::Ready)]);
    let old = |state| model("m", Some(1), state);
    let new = |content, state| model("m", content, state);
    let loading = [old(ModelState::Ready), new(None, ModelState::Loading)];
    assert_eq!(looked(&mut seen, &loading), ["m: - -> loading"]);
    let known = [old(ModelState::Ready), new(Some(2), ModelState::Warming)];
    assert_eq!(looked(&mut seen, &known), ["m: loading -> warming"]);
    let moved = [old(ModelState::Draining), new(Some(2), ModelState::Ready)];
    assert_eq!(looked(&mut seen, &moved), ["m: ready -> draining", "m: warming -> ready"]);
    assert_eq!(looked(&mut seen, &[new(Some(2), ModelState::Ready)]), ["m: draining -> -"]);
}

#[test]
fn nodes_come_and_go_and_come_back() {
    let mut nodes = SeenNodes::default();
    let id = NodeId([1; 16]);
    let mut look = |health: &Health, version: u64, state: ModelState| {
        let mut events = Vec::new();
        let models = [model("m", None, state)];
        nodes.look(id, "attic", health, Some(((1, version), &models[..])), &mut events);
        lines(&events)
    };
    let failed = Health::Failed { why: "timed out".into() };
    assert_eq!(look(&Health::Alive, 1, ModelState::Ready), ["attic: - -> alive", "m: - -> ready"]);
    assert!(look(&Health::Alive, 1, ModelState::Draining).is_empty(), "the same version says the same");
    assert_eq!(look(&failed, 1, ModelState::Ready), ["attic: alive -> failed (timed out)"]);
    assert!(look(&failed, 1, ModelState::Ready).is_empty());
    assert_eq!(look(&Health::Alive, 2, ModelState::Loading), ["attic: failed -> alive", "m: ready -> loading"]);
    let mut events = Vec::new();
    nodes.forget(|_| false, &mut events);
    assert_eq!(lines(&events), ["attic: alive -> -"]);
}

#[test]
fn the_registry_says_what_was_changed_and_by_whom() {
    let mut registry = Registry::default();
    let mut seen = SeenRegistry::of(&registry);
    let node = NodeId([7; 16]);
    let new = NewModel {
        name: "m".into(),
        kind: ModelType::Llm,
        origin: Origin::Endpoint(Endpoint { url: "http://a:1".into(), model: None, api_key_env: None }),
        sha256: None,
        keep_alive: None,
        parameters: [].into(),
        pins: vec!["tower".into()],
    };
    let mut look = |registry: &Registry| {
        let mut events = Vec::new();
        seen.look(registry, |_| "attic".into(), &mut events);
        assert!(events.iter().all(|event| event.node.as_deref() == Some("attic")));
        lines(&events)
    };
    let at = registry.stamp(node, 1);
    registry.add(new, at).unwrap();
    let at = registry.stamp(node, 1);
    registry.set_default(Some("m".into()), at).unwrap();
    assert_eq!(look(&registry), ["m: - -> registered", "attic: - -> m"]);
    let at = registry.stamp(node, 1);
    registry.set_parameters("m", &[("threads".into(), Some(Value::Number(2)))].into(), at).unwrap();
    registry.set_pins("m", &["tower".into(), "attic".into()], at).unwrap();
    assert_eq!(look(&registry), ["m: - -> changed (pins, threads)"]);
    assert!(look(&registry).is_empty());
    let at = registry.stamp(node, 1);
    registry.remove("m", at).unwrap();
    assert_eq!(look(&registry), ["m: - -> removed", "attic: m -> -"]);
}

fn told(log: &EventLog, count: usize) {
    for _ in 0..count {
        log.tell(vec![Event { why: Some("x".repeat(2 * LONGEST)), ..Event::new(EventKind::Node) }], 5);
    }
}

#[tokio::test]
async fn a_follower_gets_everything_once_from_where_it_was() {
    let log = EventLog::new(1_000);
    told(&log, 100);
    let mut all = log.follow(None).unwrap();
    let mut numbers = Vec::new();
    while numbers.len() < 100 {
        numbers.extend(all.next().await.unwrap().iter().map(|event| event.number));
    }
    assert_eq!(numbers, (1_000..1_100).collect::<Vec<u64>>());
    assert!(all.ready().unwrap().is_empty());
    let mut late = log.follow(Some(1_098)).unwrap();
    let [last] = late.next().await.unwrap().try_into().unwrap();
    assert_eq!((last.number, last.why.unwrap().len()), (1_099, LONGEST), "texts are cut");

    let waiting = tokio::spawn(async move { late.next().await });
    tokio::time::sleep(Duration::from_millis(20)).await;
    told(&log, 1);
    assert_eq!(waiting.await.unwrap().unwrap()[0].number, 1_100);
    log.end();
    all.next().await.unwrap();
    assert_eq!(all.next().await, Err(Unfollowed::Ending));
}

#[tokio::test]
async fn what_is_gone_is_said_at_the_beginning_and_ends_a_slow_reader() {
    let log = EventLog::new(1_000);
    told(&log, 10);
    // Of a run before this one, or of a clock that was put back.
    for since in [5, 99_999] {
        let first = log.follow(Some(since)).unwrap().next().await.unwrap();
        assert_eq!((first[0].kind, first[0].number, first[1].number), (EventKind::Gap, 999, 1_000));
    }
    let mut slow = log.follow(None).unwrap();
    assert_eq!(slow.next().await.unwrap().len(), 10);
    told(&log, KEPT + 3);
    assert_eq!(slow.next().await, Err(Unfollowed::TooSlow(3)));
    assert_eq!(log.lock().events.len(), KEPT);
    let others: Vec<Follower> = std::iter::from_fn(|| log.follow(None)).collect();
    assert_eq!(others.len(), MOST_FOLLOWERS, "whoever has fallen behind has no place any more");
    drop(others);
    assert!(log.follow(None).is_some());
}
