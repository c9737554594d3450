//! Entries of the registry of models, as other nodes send them.

use ingle_protocol::ModelDigest;
use ingle_protocol::NodeId;
use ingle_protocol::registry::{Endpoint, Entry, ModelType, NewModel, Origin, Registry, Stamp, Value};
use ingle_protocol::wire::v2::RegistryEntry;
use ingle_protocol::wire::{Body, Frame};

/// Entries, or registries: few, so that a run is short.
const MOST: usize = 3;
/// Changes of a run.
const MOST_CHANGES: usize = 64;

/// What nodes did where the first byte is odd, four bytes each; else entries as they come, each behind its length in
/// two bytes. Whatever they are, the order in which they come together does not matter.
pub fn registry(data: &[u8]) {
    match data.split_first() {
        Some((first, changes)) if first % 2 == 1 => registries(changes),
        Some((_, bytes)) => entries(bytes),
        None => {}
    }
}

fn entries(mut bytes: &[u8]) {
    let mut entries: Vec<Entry> = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk::<2>()
        && entries.len() < MOST
    {
        let length = usize::from(u16::from_le_bytes(*length)).min(rest.len());
        let (body, rest) = rest.split_at(length);
        bytes = rest;
        let frame = Frame { kind: RegistryEntry::KIND, body: body.to_vec().into() };
        if let Ok(entry) = frame.decode::<RegistryEntry>() {
            look(&entry);
            entries.push(entry);
        }
    }
    for one in &entries {
        for other in &entries {
            let (mut here, mut there) = (Registry::default(), Registry::default());
            let results = [here.merge(one), here.merge(other), there.merge(other), there.merge(one)];
            if results.iter().all(Result::is_ok) {
                assert_eq!(here, there);
                assert_eq!(here.merge(one), Ok(false), "what is known is no news");
                assert_eq!(there.merge(other), Ok(false));
            } else {
                // Unsound alone, or too much together: then whichever comes second is refused.
                assert_eq!(one.check().is_ok() && other.check().is_ok(), results[0].is_ok() && results[2].is_ok());
                assert_eq!(results[0].is_ok() && results[1].is_ok(), results[2].is_ok() && results[3].is_ok());
            }
            is_sound(&here);
            is_sound(&there);
        }
    }
}

/// Everything that is shown of an entry can be, whatever it is.
fn look(entry: &Entry) {
    match entry {
        Entry::Model(record) => {
            let _ = (record.kind(), record.source(), record.endpoint(), record.sha256(), record.keep_alive());
            let _ = (record.pins(), record.parameters(), record.overruled(), record.changed(), record.is_removed());
        }
        Entry::Default(default) => {
            let _ = (default.name(), default.overruled(), default.changed());
        }
    }
}

/// What came of it is what an honest node could have, and is the same when it has been on a disk.
fn is_sound(registry: &Registry) {
    assert_eq!(registry.check(), Ok(()));
    let stored = serde_json::to_vec(registry).unwrap_or_default();
    assert_eq!(serde_json::from_slice::<Registry>(&stored).ok().as_ref(), Some(registry));
    let mut later = registry.clone();
    for name in later.forget(u64::MAX) {
        assert!(registry.model(&name).is_none());
    }
    assert_eq!(later.models().count(), registry.models().count());
}

fn registries(changes: &[u8]) {
    let mut all = vec![Registry::default(); MOST];
    for change in changes.chunks_exact(4).take(MOST_CHANGES) {
        let [who, what, value, clock] = [change[0], change[1], change[2], change[3]];
        let (who, other) = (usize::from(who) % MOST, usize::from(who) / MOST % MOST);
        let at = all[who].stamp(NodeId([who as u8; 16]), u64::from(clock));
        // What is not possible there is refused.
        let _ = apply(&mut all, who, other, what, value, at);
    }
    let [a, b, c] = &all[..] else { return };
    let (ab, ba) = (merged(a, b), merged(b, a));
    assert_eq!(ab, ba);
    assert_eq!(merged(&ab, c), merged(a, &merged(b, c)));
    assert_eq!(merged(&ab, a), ab);
    is_sound(&ab);
}

fn merged(a: &Registry, b: &Registry) -> Registry {
    let mut whole = a.clone();
    for entry in b.entries() {
        assert!(whole.merge(&entry).is_ok(), "what nodes wrote that keep to the rules goes together");
    }
    whole
}

fn apply(
    all: &mut [Registry],
    who: usize,
    other: usize,
    what: u8,
    value: u8,
    at: Stamp,
) -> Result<(), ingle_protocol::registry::RegistryError> {
    const NAMES: [&str; 2] = ["a", "b/c"];
    let name = NAMES[usize::from(value & 1)];
    let (number, pins) = (u64::from(value >> 1), [format!("node{}", value >> 6)]);
    let registry = &mut all[who];
    match what % 8 {
        0 => {
            let url = format!("http://{number}");
            let origin = match value >> 5 {
                0 => Origin::Source(format!("hf:a/b/{number}.gguf")),
                _ => Origin::Endpoint(Endpoint { url, model: None, api_key_env: Some("KEY".into()) }),
            };
            let parameters = [(format!("p{}", value >> 6), Value::Number(number))].into();
            let new = NewModel {
                name: name.into(),
                kind: ModelType::ALL[usize::from(value) % ModelType::ALL.len()],
                origin,
                sha256: None,
                keep_alive: None,
                parameters,
                pins: pins.into(),
            };
            registry.add(new, at)
        }
        1 => registry.remove(name, at),
        2 => {
            let set = (value >> 7 == 0).then_some(Value::Number(number));
            registry.set_parameters(name, &[(format!("p{}", value >> 6), set)].into(), at)
        }
        3 => registry.set_pins(name, &pins[..usize::from(value >> 1 & 1)], at),
        4 => registry.set_keep_alive(name, (number > 0).then_some(value.into()), at),
        5 => registry.set_sha256(name, (number > 0).then_some(ModelDigest([value; 32])), at),
        6 => registry.set_default((number > 0).then(|| name.to_owned()), at),
        _ => {
            let heard = all[other].clone();
            all[who] = merged(&all[who], &heard);
            Ok(())
        }
    }
}
