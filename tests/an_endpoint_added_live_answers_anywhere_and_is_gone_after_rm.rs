//! A far server becomes a model of a running cluster, and stops being one, without a restart and without a lost answer.

use crate::harness::*;

#[tokio::test]
async fn an_endpoint_added_live_answers_anywhere_and_is_gone_after_rm() {
    let server = FarServer::start().await;
    let (mut tower, mini) = tower_and_mini().await;
    assert_eq!(mini.ask(&far("plain")).await.status, 404);
    tower.add_endpoint(FAR_MODEL, &server, &[]).await;
    // Where it was said at once, elsewhere as soon as it is known.
    assert_eq!(tower.ask(&far("plain")).await.text(), "Héllo \n🔥");
    assert_eq!(mini.ask_until_known(&far("plain")).await.text(), "Héllo \n🔥");
    mini.stream(&far("plain")).await.rest().await.is_whole("Héllo \n🔥");
    assert_eq!(tower.ask(&echo("hello")).await.text(), "hello", "beside what was there");

    // It is there again after a restart of its node.
    tower.stop().await;
    tower.up().await;
    assert_eq!(mini.ask_until_answered(&far("plain")).await.text(), "Héllo \n🔥");

    // Answers that run when it is removed come to their end.
    let asked = server.requests().len();
    let stream = mini.stream(&far("slow")).await.begun().await;
    let question = far("late");
    let late = tokio::join!(tower.ask(&question), mini.ask(&question), async {
        server.until_asked(asked + 3).await;
        mini.models(&["rm", FAR_MODEL]).await;
        tower.until_registered(&[]).await;
        let draining = tower.status().await;
        let models = draining.node("tower")["models"].as_array().unwrap().clone();
        let states: Vec<&Value> = models.iter().map(|model| &model["state"]).collect();
        assert!(states.contains(&&json!("draining")), "{states:?}");
    });
    assert_eq!((late.0.text(), late.1.text()), ("late", "late"));
    let stream = stream.until_text(100).await;
    drop(stream);
    server.until_hung_up(1).await;
    for machine in [&tower, &mini] {
        let gone = async || (machine.ask(&far("plain")).await.status == 404).then_some(());
        until("nobody has it any more", gone).await;
        assert_eq!(machine.status().await.node("tower")["models"].as_array().unwrap().len(), 1);
    }
    // And it can be added anew, elsewhere and as something else.
    mini.add_endpoint(FAR_MODEL, &server, &[]).await;
    assert_eq!(mini.ask(&far("plain")).await.node(), "mini");
    assert_eq!(tower.ask_until_known(&far("plain")).await.node(), "mini");
}
