//! Every token but the right one at the right node is refused, says what to do, and changes nothing on disk.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::harness::*;

/// All that must not change.
fn files(machine: &Machine) -> BTreeMap<String, Vec<u8>> {
    let file = |name: &str| Some((name.to_owned(), std::fs::read(machine.state_dir().join(name)).ok()?));
    ["identity.json", "members.json", "tokens.json"].into_iter().filter_map(file).collect()
}

/// The token with one character changed: at 10 in the authority's hash, at 90 in the secret.
fn altered(token: &str, at: usize) -> String {
    let with = if token.as_bytes()[at] == b'A' { "B" } else { "A" };
    format!("{}{with}{}", &token[..at], &token[at + 1..])
}

#[tokio::test]
async fn a_wrong_token_lets_nobody_in() {
    let (mut tower, mut attic, mut barn) = (Machine::new("tower"), Machine::new("attic"), Machine::new("barn"));
    let (mini, fresh) = (Machine::new("mini"), Machine::new("fresh"));
    tower.up().await;
    barn.up().await;
    attic.join(&tower).await;
    attic.up().await;
    // mini has a cluster of its own, fresh has nothing at all.
    mini.ingle(&["token"]).await.ok();

    let (good, at_tower) = tower.token().await;
    let used = tower.token().await.0;
    let user = Machine::new("user");
    user.try_join(&at_tower, &used, &[]).await.ok();
    let expired = tower.ingle(&["token", "--expires", "1s", "--json"]).await.ok();
    let expired: Value = serde_json::from_str(&expired).unwrap();
    let expired = expired["token"].as_str().unwrap();
    // Tokens count in whole seconds.
    tokio::time::sleep(Duration::from_millis(2_100)).await;

    let before = files(&mini);
    let no_more: &[&str] = &[];
    for (address, token, more, expected) in [
        (at_tower.as_str(), "hello", no_more, "not a join token"),
        (&at_tower, &good[..good.len() - 9], no_more, "cut or altered"),
        (&at_tower, &altered(&good, 90), no_more, "Print one with `ingle token`"),
        (&at_tower, &altered(&good, 20), no_more, "does not belong to the cluster"),
        (&at_tower, &used, no_more, "used already. Print a new one"),
        (&at_tower, expired, no_more, "has expired. Print a new one"),
        (&at_tower, &barn.token().await.0, no_more, "does not belong to the cluster"),
        (barn.address(), &good, no_more, "does not belong to the cluster"),
        (attic.address(), &good, no_more, "printed by another node"),
        (&at_tower, &good, &["--name", "tower"], "a node named `tower` is in the cluster already"),
        (&at_tower, &good, &["--name", "attic"], "a node named `attic` is in the cluster already"),
        ("127.0.0.1:1", &good, no_more, "no Ingle node answers at 127.0.0.1:1"),
    ] {
        for machine in [&mini, &fresh] {
            let refusal = machine.try_join(address, token, more).await.fails_with(1);
            assert!(refusal.contains(expected), "{expected:?} in {refusal:?}");
        }
    }
    assert_eq!(files(&mini), before);
    assert_eq!(files(&fresh), BTreeMap::new());
    assert_eq!(tower.status().await.nodes().len(), 2, "only attic is there; user has never run");

    // None of this has spent the good token.
    fresh.try_join(&at_tower, &good, &[]).await.ok();
    let refusal = mini.try_join(&at_tower, &good, &[]).await.fails_with(1);
    assert!(refusal.contains("used already"), "{refusal}");
}

#[tokio::test]
async fn a_node_with_other_members_does_not_leave_them_unasked() {
    let (mut tower, mut mini, mut barn) = (Machine::new("tower"), Machine::new("mini"), Machine::new("barn"));
    tower.up().await;
    barn.up().await;
    mini.join(&tower).await;
    mini.up().await;
    mini.until_alive(&[&tower]).await;
    let before = files(&mini);
    let (token, at_barn) = barn.token().await;

    let refusal = mini.try_join(&at_barn, &token, &[]).await.fails_with(1);
    assert!(refusal.contains("other members (tower)") && refusal.contains("--leave-current"), "{refusal}");
    let (again, at_tower) = tower.token().await;
    let refusal = mini.try_join(&at_tower, &again, &[]).await.fails_with(1);
    assert!(refusal.contains("is a member of that cluster already"), "{refusal}");
    mini.stop().await;
    let refusal = mini.try_join(&at_barn, &token, &[]).await.fails_with(1);
    assert!(refusal.contains("other members (tower)") && refusal.contains("--leave-current"), "{refusal}");
    assert_eq!(files(&mini), before);

    mini.up().await;
    mini.until_alive(&[&tower]).await;
    mini.try_join(&at_barn, &token, &["--leave-current"]).await.ok();
    mini.until_alive(&[&barn]).await;
    assert!(mini.status().await.node("tower").is_null());
    let status = tower.until("mini has left", |status| status.health("mini") == "left").await;
    assert_eq!(status.why("mini"), "it joined another cluster");
}
