//! Removals that are forgotten: nothing comes back that way. And states that were put back from a copy.

use proptest::prelude::*;

use super::*;

const DAY: u64 = 86_400_000;
/// Some day in 2026.
const START: u64 = 1_790_000_000_000;
const NODES: u8 = 4;
const NAMES: [&str; 2] = ["a", "b"];

fn node(number: u8) -> NodeId {
    NodeId([number; 16])
}

fn new(name: &str, url: u64, threads: Option<u64>) -> NewModel {
    NewModel {
        name: name.into(),
        kind: ModelType::Llm,
        origin: Origin::Endpoint(Endpoint { url: format!("http://{url}"), model: None, api_key_env: None }),
        sha256: None,
        keep_alive: None,
        parameters: threads.map(|threads| ("threads".to_owned(), Value::Number(threads))).into_iter().collect(),
        pins: vec![],
    }
}

fn hear_at(registry: &mut Registry, other: &Registry, now: u64) {
    for entry in other.entries() {
        registry.merge_at(&entry, now).unwrap();
    }
}

fn hear(registry: &mut Registry, other: &Registry) {
    for entry in other.entries() {
        registry.merge(&entry).unwrap();
    }
}

#[test]
fn a_removal_is_forgotten_after_its_time_and_nothing_of_it_comes_back() {
    let mut one = Registry::default();
    let at = one.stamp(node(1), START);
    one.add(new("a", 1, Some(7)), at).unwrap();
    let at = one.stamp(node(1), START + 1);
    one.add(new("stays", 1, None), at).unwrap();
    let at = one.stamp(node(1), START + 2);
    one.remove("a", at).unwrap();
    let mut two = one.clone();
    assert!(one.forget(START + REMEMBERED_MS + SLACK_MS).is_empty());
    let over = START + REMEMBERED_MS + SLACK_MS + 2;
    assert_eq!(one.forget(over), ["a"]);
    assert!(one.record("a").is_none() && one.model("stays").is_some());

    // The other one still has it, by a clock that is hours behind. It is not told of again.
    let behind = over - SLACK_MS / 2;
    assert!(two.clone().forget(behind).is_empty());
    hear_at(&mut one, &two, over);
    assert!(one.record("a").is_none());
    // The name is used again: what it once had is no part of it, wherever the two come together.
    let at = one.stamp(node(1), over);
    one.add(new("a", 2, None), at).unwrap();
    let (mut there, mut here) = (two.clone(), one.clone());
    hear_at(&mut there, &one, behind);
    hear_at(&mut here, &two, over);
    hear_at(&mut here, &there, over);
    for registry in [&there, &here] {
        let model = registry.model("a").unwrap();
        assert!(model.parameters().is_empty() && model.overruled().is_empty(), "{model:?}");
        assert_eq!(model.endpoint().unwrap().url, "http://2");
    }
    // Whoever has not forgotten it yet may use it again, too.
    let at = two.stamp(node(2), behind);
    two.add(new("a", 3, None), at).unwrap();
    hear_at(&mut here, &two, over);
    assert!(here.model("a").unwrap().parameters().is_empty());
}

#[test]
fn a_clock_that_was_never_set_makes_nothing_old() {
    let mut registry = Registry::default();
    for (now, name) in [(0, "a"), (5_000, "b")] {
        let at = registry.stamp(node(1), now);
        registry.add(new(name, 1, None), at).unwrap();
        let at = registry.stamp(node(1), now);
        registry.remove(name, at).unwrap();
    }
    assert!(registry.forget(START).is_empty());
}

#[test]
fn a_state_that_was_put_back_from_a_copy_loses_no_value() {
    let mut one = Registry::default();
    let at = one.stamp(node(1), START);
    one.add(new("a", 1, Some(1)), at).unwrap();
    let copy = one.clone();
    let digest = ModelDigest([5; 32]);
    let at = one.stamp(node(1), START + 10);
    one.set_sha256("a", Some(digest), at).unwrap();
    let at = one.stamp(node(1), START + 11);
    one.set_parameters("a", &[("kv_type".into(), Some(Value::Word("int8".into())))].into(), at).unwrap();
    let at = one.stamp(node(1), START + 12);
    one.set_default(Some("a".into()), at).unwrap();
    let peer = one;

    // The same node again, which writes before it has heard of what it once wrote.
    let mut back = copy;
    let at = back.stamp(node(1), START + 20);
    back.set_keep_alive("a", Some(60), at).unwrap();
    let (mut there, mut here) = (peer.clone(), back.clone());
    hear_at(&mut there, &back, START + 30);
    hear_at(&mut here, &peer, START + 30);
    assert_eq!(there, here);
    there.check().unwrap();
    let model = there.model("a").unwrap();
    assert_eq!((model.sha256(), model.keep_alive()), (Some(digest), Some(60)));
    assert_eq!(model.parameters()["kv_type"], &Value::Word("int8".into()));
    assert_eq!(there.default_model().name(), Some("a"));
}

#[test]
fn two_entries_that_are_too_much_together_stay_apart() {
    let with = |prefix: &str, number: u8| {
        let mut registry = Registry::default();
        let mut new = new("a", 1, None);
        new.parameters = (0..40).map(|n| (format!("{prefix}{n}"), Value::Number(n))).collect();
        let at = registry.stamp(node(number), START);
        registry.add(new, at).unwrap();
        registry
    };
    let (mut one, two) = (with("x", 1), with("y", 2));
    let before = one.clone();
    assert!(one.merge(&two.entries().next().unwrap()).unwrap_err().to_string().contains("more than 64 parameters"));
    assert_eq!(one, before);
}

/// Something that happens, after so many hours.
#[derive(Debug, Clone)]
enum Event {
    Add(u8, usize, u64),
    Remove(u8, usize),
    Set(u8, usize, u64),
    Hear(u8, u8),
    Forget(u8),
}

fn events() -> impl Strategy<Value = Vec<(u64, Event)>> {
    let (who, what) = (0..NODES, 0..NAMES.len());
    let event = prop_oneof![
        3 => (who.clone(), what.clone(), 0..9u64).prop_map(|(who, what, url)| Event::Add(who, what, url)),
        3 => (who.clone(), what.clone()).prop_map(|(who, what)| Event::Remove(who, what)),
        2 => (who.clone(), what, 0..9u64).prop_map(|(who, what, value)| Event::Set(who, what, value)),
        3 => (who.clone(), who.clone()).prop_map(|(to, from)| Event::Hear(to, from)),
        4 => who.prop_map(Event::Forget),
    ];
    proptest::collection::vec((1..24 * 40u64, event), 0..60)
}

/// The models that are there, and what answers for them.
fn visible(registry: &Registry) -> Vec<(String, String)> {
    let url = |record: &Record| record.endpoint().map(|endpoint| endpoint.url.clone()).unwrap_or_default();
    registry.models().map(|record| (record.name().to_owned(), url(record))).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// A household that forgets beside one that does not, whose machines are never out of touch for longer than a
    /// removal is remembered: the same models are there.
    #[test]
    fn who_forgets_sees_no_other_models_than_who_does_not(
        events in events(),
        skews in proptest::collection::vec(0..SLACK_MS / 2, usize::from(NODES)),
    ) {
        let mut forgetful = vec![Registry::default(); NODES.into()];
        let mut faithful = forgetful.clone();
        let (mut now, mut together) = (START, START);
        let clock = |now: u64, who: u8| now + skews[usize::from(who)];
        let everybody_hears = |all: &mut Vec<Registry>, now: u64, forgets: bool| {
            for to in 0..NODES {
                for from in (0..NODES).filter(|from| *from != to) {
                    let other = all[usize::from(from)].clone();
                    let registry = &mut all[usize::from(to)];
                    match forgets {
                        true => hear_at(registry, &other, clock(now, to)),
                        false => hear(registry, &other),
                    }
                }
            }
        };
        for (hours, event) in events {
            // Somewhere in between they were all in touch.
            let next = now + hours * DAY / 24;
            while next - together > REMEMBERED_MS / 2 {
                together += REMEMBERED_MS / 2;
                for _ in 0..2 {
                    everybody_hears(&mut forgetful, together, true);
                    everybody_hears(&mut faithful, together, false);
                }
            }
            now = next;
            for (all, forgets) in [(&mut forgetful, true), (&mut faithful, false)] {
                type Write = Box<dyn FnOnce(&mut Registry, Stamp) -> Result<(), RegistryError>>;
                let (who, write): (u8, Write) = match event.clone() {
                    Event::Add(who, what, url) => (who, Box::new(move |r, at| r.add(new(NAMES[what], url, Some(url)), at))),
                    Event::Remove(who, what) => (who, Box::new(move |r, at| r.remove(NAMES[what], at))),
                    Event::Set(who, what, value) => {
                        let set = [("threads".to_owned(), Some(Value::Number(value)))].into();
                        (who, Box::new(move |r, at| r.set_parameters(NAMES[what], &set, at)))
                    }
                    Event::Hear(to, from) => {
                        let other = all[usize::from(from)].clone();
                        let registry = &mut all[usize::from(to)];
                        match forgets {
                            true => hear_at(registry, &other, clock(now, to)),
                            false => hear(registry, &other),
                        }
                        continue;
                    }
                    Event::Forget(who) => {
                        if forgets {
                            all[usize::from(who)].forget(clock(now, who));
                        }
                        continue;
                    }
                };
                let registry = &mut all[usize::from(who)];
                let at = registry.stamp(node(who), clock(now, who));
                // What is not possible there is refused, and that is all right here.
                let _ = write(registry, at);
            }
        }
        for _ in 0..2 {
            everybody_hears(&mut forgetful, now, true);
            everybody_hears(&mut faithful, now, false);
        }
        for (one, other) in forgetful.iter().zip(&faithful) {
            one.check().unwrap();
            prop_assert_eq!(visible(one), visible(other));
        }
    }
}
