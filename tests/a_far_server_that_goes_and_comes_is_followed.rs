//! A node says how its endpoint is, waits for one that is not there, and two with one model stand in for each other.

use crate::harness::*;

#[tokio::test]
async fn a_far_server_that_goes_and_comes_is_followed() {
    let server = FarServer::start().await;
    let address = server.address;
    drop(server);
    // Nobody is there yet: the node waits.
    let mut tower = Machine::new("tower").with("--endpoint").with(&format!("http://{address}"));
    tower.start().await;
    let status = tower.until("the endpoint is said to be away", |s| {
        s.model("tower")["state"].as_str().is_some_and(|state| state.starts_with("failed (cannot connect"))
    });
    let problems = status.await.0["problems"].to_string();
    assert!(problems.contains(&address.to_string()), "{problems}");

    let server = FarServer::start_at(address).await;
    server.set_models(503, "{}");
    tower.until("it loads", |status| status.model("tower")["state"] == "loading").await;
    server.set_models(200, r#"{"data":[{"id":"a"},{"id":"b"}]}"#);
    let several = |s: &Status| s.model("tower")["state"].as_str().is_some_and(|state| state.contains("(a, b)"));
    tower.until("there are several models to choose from", several).await;
    server.set_models(200, &json!({"data": [{"id": FAR_MODEL, "max_model_len": 4096}]}).to_string());
    tower.wait_for_ready().await;
    assert_eq!(tower.ask(&far("plain")).await.text(), "Héllo \n🔥");
    let status = tower.status().await;
    assert_eq!(
        (&status.model("tower")["name"], &status.model("tower")["context_length"]),
        (&json!(FAR_MODEL), &json!(4096))
    );
    assert_eq!(status.0["problems"], json!([]));

    // It goes while it is idle, and while it answers.
    let stream = tower.stream(&far("slow")).await.begun().await;
    drop(server);
    stream.rest().await.broke_with("connection_lost");
    let gone = |s: &Status| s.model("tower")["state"].as_str().is_some_and(|state| state.starts_with("failed"));
    tower.until("it is gone", gone).await;
    tower.ask(&far("plain")).await.is_not_now();
    let _server = FarServer::start_at(address).await;
    assert_eq!(tower.ask_until_answered(&far("plain")).await.text(), "Héllo \n🔥");
    tower.stop().await;
}

#[tokio::test]
async fn two_endpoints_with_one_model_stand_in_for_each_other() {
    let (one, two) = (FarServer::start().await, FarServer::start().await);
    let mut tower = Machine::new("tower").with("--endpoint").with(&one.url());
    let mut attic = Machine::new("attic").with("--endpoint").with(&two.url());
    tower.up().await;
    attic.join(&tower).await;
    attic.up().await;
    let both = |status: &Status| ["tower", "attic"].iter().all(|node| status.model(node)["state"] == "ready");
    let status = tower.until("both are ready", both).await;
    assert_eq!(status.model("tower")["digest"], status.model("attic")["digest"]);
    // What is wrong with the request is wrong everywhere: nobody else is asked.
    let asked = || (one.requests().len(), two.requests().len());
    let (before_one, before_two) = asked();
    assert_eq!(tower.ask(&far(r#"400 {"error":{"message":"no"}}"#)).await.status, 400);
    assert_eq!(asked().0 + asked().1, before_one + before_two + 1);
    // What one refuses for lack of room, the other is asked for; it is as full, and both were asked.
    let (before_one, before_two) = asked();
    tower.ask(&far(r#"429 retry-after: 7 {"error":{"message":"slow down"}}"#)).await.is_not_now();
    assert_eq!(asked(), (before_one + 1, before_two + 1));
}
