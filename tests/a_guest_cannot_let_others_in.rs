//! `ingle join --guest` makes a member that never gets the cluster's signing key.

use crate::harness::*;

#[tokio::test]
async fn a_guest_cannot_let_others_in() {
    let (mut tower, mut guest) = (Machine::new("tower").model("echo"), Machine::new("guest"));
    tower.up().await;
    let (token, address) = tower.token().await;
    guest.try_join(&address, &token, &["--guest"]).await.ok();

    let refusal = guest.ingle(&["token"]).await.fails_with(1);
    assert!(refusal.contains("guest") && refusal.contains("full member"), "{refusal}");
    guest.up().await;
    let refusal = guest.ingle(&["token"]).await.fails_with(1);
    assert!(refusal.contains("guest") && refusal.contains("full member"), "{refusal}");
    let identity = std::fs::read_to_string(guest.state_dir().join("identity.json")).unwrap();
    let identity: Value = serde_json::from_str(&identity).unwrap();
    assert_eq!(identity["authority_key"], Value::Null, "it does not have the key");

    // In all else it is a member.
    assert_eq!(guest.ask_until_known(&echo("hello")).await.node(), "tower");
    tower.until_alive(&[&guest]).await;
}
