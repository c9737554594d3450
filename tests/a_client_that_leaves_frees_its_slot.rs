//! Whoever does not wait for the end of an answer ends it, however far away it is computed.

use std::process::Stdio;

use tokio::io::AsyncReadExt;

use crate::harness::*;

#[tokio::test]
async fn a_client_that_leaves_frees_its_slot() {
    let (tower, mini) = tower_and_mini().await;

    for machine in [&tower, &mini] {
        // In the middle of a stream.
        let stream = machine.stream(&echo(LONG)).await.begun().await;
        tower.until_running(1).await;
        drop(stream);
        tower.until_running(0).await;

        // While the whole answer is awaited, and while the prompt is still being read.
        for text in [LONG, &format!("prefill 1500ms {LONG}")] {
            let request = echo(text);
            tokio::select! {
                answer = machine.ask(&request) => panic!("it answers too early: {answer:?}"),
                () = tower.until_running(1) => {}
            }
            tower.until_running(0).await;
        }

        // `ingle chat` is ended in the middle (not by SIGINT, which a test run in the background may ignore).
        let mut command = ingle();
        command.args(["chat", LONG, "--model", "echo", "--state-dir"]).arg(machine.state_dir());
        let mut chat = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut first = [0; 1];
        let reading = chat.stdout.as_mut().unwrap().read_exact(&mut first);
        tokio::time::timeout(DEADLINE, reading).await.expect("it prints").unwrap();
        kill(chat.id().unwrap(), Signal::TERM);
        let ended = tokio::time::timeout(DEADLINE, chat.wait()).await.expect("it ends");
        assert!(!ended.unwrap().success());
        tower.until_running(0).await;
    }
    mini.until("the gateway sees it, too", |status| status.running("tower") == 0).await;
    let status = tower.status().await;
    assert_eq!(status.latency("tower")["finished"], 0, "none of them came to its end");
}
