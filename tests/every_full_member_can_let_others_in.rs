//! Members know each other although each joined only one, and no machine's loss ends the cluster.

use crate::harness::*;

#[tokio::test]
async fn every_full_member_can_let_others_in() {
    let (mut founder, mut second) = (Machine::new("founder"), Machine::new("second").model("echo"));
    let (mut third, mut fourth) = (Machine::new("third"), Machine::new("fourth"));
    founder.up().await;
    second.join(&founder).await;
    second.up().await;
    second.until_alive(&[&founder]).await;
    third.join(&second).await;
    third.up().await;
    founder.until_alive(&[&second, &third]).await;
    second.until_alive(&[&founder, &third]).await;
    third.until_alive(&[&founder, &second]).await;

    founder.kill_9().await;
    drop(founder);
    third.until("the founder has failed", |status| status.health("founder") == "failed").await;
    fourth.join(&third).await;
    fourth.up().await;
    second.until_alive(&[&third, &fourth]).await;
    third.until_alive(&[&second, &fourth]).await;
    fourth.until_alive(&[&second, &third]).await;
    let answer = fourth.ask_until_known(&echo("hello")).await;
    assert_eq!((answer.text(), answer.node()), ("hello", "second"));

    // Also a member that came last prints tokens, without a node running there, for its node to redeem.
    fourth.stop().await;
    let mut fifth = Machine::new("fifth");
    let (token, address) = fourth.token().await;
    fourth.up().await;
    fifth.try_join(&address, &token, &[]).await.ok();
    fifth.up().await;
    fifth.until_alive(&[&second, &third, &fourth]).await;
}
