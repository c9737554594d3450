//! How many answers a far server writes at once is learnt from its refusals, and a server that asks to be left alone is.

use std::time::{Duration, Instant};

use crate::harness::*;

async fn tower(server: &FarServer) -> Machine {
    let mut tower = Machine::new("tower").with("--endpoint").with(&server.url());
    tower.up().await;
    tower
}

#[tokio::test]
async fn a_far_server_without_room_is_asked_less() {
    let server = FarServer::start().await;
    let tower = tower(&server).await;
    assert_eq!(tower.status().await.model("tower")["slots"], 8, "nothing is known yet");
    server.set_room(3);
    // Those for whom there is no room wait for those for whom there is.
    let question = far("late");
    let answers = futures_util::future::join_all((0..10).map(|_| tower.ask(&question))).await;
    for answer in &answers {
        assert_eq!(answer.text(), "late");
    }
    assert!(server.refused() > 0);
    let learnt = tower.status().await.model("tower").clone();
    let slots = learnt["slots"].as_u64().unwrap();
    assert!((1..=5).contains(&slots), "{learnt}");
    assert!(learnt["backend"].as_str().unwrap().contains("at once"), "{learnt}");
    // Room that there is again is found.
    server.set_room(0);
    // It grows with answers that end while all places are taken, which on a busy machine is not all the time.
    let mut grown = 0;
    for _ in 0..20 {
        let answers = futures_util::future::join_all((0..10).map(|_| tower.ask(&question))).await;
        answers.iter().for_each(|answer| assert_eq!(answer.text(), "late"));
        grown = tower.status().await.model("tower")["slots"].as_u64().unwrap();
        if grown > slots {
            return;
        }
    }
    panic!("{grown} after {slots}");
}

#[tokio::test]
async fn a_far_server_that_asks_to_be_left_alone_is() {
    let server = FarServer::start().await;
    let tower = tower(&server).await;
    let busy = tower.ask(&far(r#"429 retry-after: 4 {"error":{"message":"slow down"}}"#)).await;
    assert_eq!((busy.status, busy.code()), (503, "busy"), "{}", busy.body);
    assert_eq!(busy.headers["retry-after"], "4");
    let status = tower.status().await;
    let model = status.model("tower");
    assert_eq!(model["slots"], 0, "{model}");
    assert!(model["backend"].as_str().unwrap().contains("asks for a pause"), "{model}");
    // Whoever comes meanwhile waits, and is answered when the time is over.
    let asked = server.requests().len();
    let began = Instant::now();
    let question = far("plain");
    let waits = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(server.requests().len(), asked, "it is asked nothing");
    };
    let (answer, ()) = tokio::join!(tower.ask(&question), waits);
    assert_eq!(answer.text(), "Héllo \n🔥");
    assert!(began.elapsed() > Duration::from_millis(2_500), "{:?}", began.elapsed());
    tower.until("it has room again", |status| status.model("tower")["slots"] != 0).await;

    // Where another one has the model, nobody waits.
    tower.ask(&far(r#"429 retry-after: 30 {"error":{"message":"slow down"}}"#)).await.is_not_now();
    let second = FarServer::start().await;
    let mut attic = Machine::new("attic").with("--endpoint").with(&second.url());
    attic.join(&tower).await;
    attic.up().await;
    tower.until("the other is ready", |status| status.model("attic")["state"] == "ready").await;
    let before = server.requests().len();
    for _ in 0..5 {
        assert_eq!(tower.ask(&question).await.node(), "attic");
    }
    assert_eq!(server.requests().len(), before);
    let explained = tower.explain("last").await;
    assert!(explained["attempts"][0]["considered"].to_string().contains("asks to be left alone"), "{explained}");
}
