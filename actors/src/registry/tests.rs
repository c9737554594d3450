use ingle_protocol::registry::{Endpoint, ModelType, NewModel, Origin};

use super::*;

fn node(number: u8) -> NodeId {
    NodeId([number; 16])
}

fn new(name: &str) -> NewModel {
    let endpoint = Endpoint { url: "http://127.0.0.1:9".into(), model: Some("far".into()), api_key_env: None };
    NewModel {
        name: name.into(),
        kind: ModelType::Llm,
        origin: Origin::Endpoint(endpoint),
        sha256: None,
        keep_alive: None,
        parameters: BTreeMap::new(),
        pins: vec!["tower".into()],
    }
}

async fn add(registry: &ModelRegistry, number: u8, name: &str) -> Result<(), WriteError> {
    registry.write(node(number), |registry, at| registry.add(new(name), at)).await
}

/// All entries of the second reach the first, as over a connection.
fn hear(registry: &ModelRegistry, other: &ModelRegistry) {
    let (_, entries) = other.since(0);
    entries.iter().for_each(|entry| registry.receive(node(9), entry));
}

#[tokio::test]
async fn what_is_acknowledged_is_on_disk_and_what_peers_say_soon_is() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (one, two) = (ModelRegistry::open(here.path()).unwrap(), ModelRegistry::open(there.path()).unwrap());
    let mut changes = one.changes();
    changes.mark_unchanged();
    add(&one, 1, "a").await.unwrap();
    assert!(changes.has_changed().unwrap());
    assert_eq!(ModelRegistry::open(here.path()).unwrap().names(), ["a"]);
    let refused = add(&one, 1, "a").await.unwrap_err();
    assert!(refused.to_string().contains("registered already"), "{refused}");

    add(&two, 2, "b").await.unwrap();
    let cancel = CancellationToken::new();
    let keeping = tokio::spawn(one.clone().keep(cancel.clone()));
    hear(&one, &two);
    assert_eq!(one.names(), ["a", "b"]);
    let (version, entries) = one.since(0);
    assert_eq!(entries.len(), 2);
    hear(&one, &two);
    assert_eq!(one.since(version), (version, vec![]), "the same once more is no news");
    cancel.cancel();
    keeping.await.unwrap().unwrap();
    assert_eq!(ModelRegistry::open(here.path()).unwrap().snapshot(), one.snapshot());
}

#[tokio::test]
async fn a_damaged_file_is_set_aside_and_a_disk_that_takes_nothing_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    add(&ModelRegistry::open(folder.path()).unwrap(), 1, "a").await.unwrap();
    let path = folder.path().join("registry.json");
    let whole = std::fs::read(&path).unwrap();
    for damage in [
        &whole[..whole.len() / 2],
        b"[]",
        &String::from_utf8(whole.clone()).unwrap().replace("\"a\"", "\"../a\"").into_bytes(),
    ] {
        std::fs::write(&path, damage).unwrap();
        let registry = ModelRegistry::open(folder.path()).unwrap();
        let problem = registry.problem().unwrap();
        assert!(registry.names().is_empty() && problem.contains("registry.damaged-"), "{problem}");
        let kept = std::path::PathBuf::from(problem.split(" moved to ").nth(1).unwrap().split(", and").next().unwrap());
        assert_eq!(std::fs::read(kept).unwrap(), damage);
    }
    let registry = ModelRegistry::open(folder.path()).unwrap();
    assert_eq!(registry.problem(), None);
    // A folder stands where the file should.
    std::fs::create_dir_all(path.join("in the way")).unwrap();
    let error = add(&registry, 1, "a").await.unwrap_err();
    assert!(matches!(error, WriteError::Disk(_)) && registry.names().is_empty(), "{error}");
}

#[tokio::test]
async fn a_machine_that_joins_brings_its_models_and_one_that_leaves_others_does_not() {
    let folder = tempfile::tempdir().unwrap();
    let registry = ModelRegistry::open(folder.path()).unwrap();
    add(&registry, 1, "a").await.unwrap();
    registry.write(node(1), |registry, at| registry.set_default(Some("a".into()), at)).await.unwrap();
    registry.moves(node(1), false).await.unwrap();
    assert_eq!(registry.names(), ["a"]);
    let household = ModelRegistry::open(tempfile::tempdir().unwrap().path()).unwrap();
    household.receive(node(1), &registry.since(0).1[1]);
    assert_eq!(household.default_route().name.as_deref(), Some("a"));
    registry.moves(node(1), true).await.unwrap();
    assert!(registry.names().is_empty() && registry.default_route().name.is_none());
    assert!(ModelRegistry::open(folder.path()).unwrap().names().is_empty());
    let aside = std::fs::read_dir(folder.path()).unwrap().filter_map(Result::ok);
    assert!(aside.map(|entry| entry.file_name()).any(|name| name.to_string_lossy().starts_with("registry.left-")));
}
