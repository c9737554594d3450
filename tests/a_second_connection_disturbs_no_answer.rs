//! Two nodes may dial each other at the same time, or one after the other when an early packet comes through late:
//! answers that run on the connection that stands are not disturbed.

use crate::harness::*;

#[tokio::test]
async fn a_second_connection_disturbs_no_answer() {
    let (mut tower, mut mini) = tower_and_mini().await;

    // Whoever stays dials at once, into the void; a second later QUIC says the same again, and reaches a node that
    // has come back and has connected by itself. The smaller id decides, so in one of the two cases the late
    // connection is the one that stays.
    for restarts in ["tower", "mini"] {
        let machine = if restarts == "tower" { &mut tower } else { &mut mini };
        machine.stop().await;
        machine.up().await;
        mini.ask_until_known(&echo("hello")).await;
        let answer = mini.stream(&echo("repeat 25 every 20ms: hello ")).await;
        answer.rest().await.is_whole(&"hello ".repeat(25));
        tower.until_alive(&[&mini]).await;
        mini.until_alive(&[&tower]).await;
    }
}
