//! A household is not updated all at once: nodes that speak the last version of the protocol and nodes that speak the
//! newest answer with each other's engines, and answers move between them. (The old ones are of this build and offer
//! the last version alone; `old_and_new_builds_work_together.sh` does the same with two real builds.)

use crate::harness::*;

/// Workers and gateways of both versions: `tower` and `desk` are new, `attic` and `shed` old.
struct Household {
    tower: Machine,
    attic: Machine,
    desk: Machine,
    shed: Machine,
}

impl Household {
    async fn up() -> Self {
        let old = |name: &str| Machine::new(name).environment("INGLE_PROTOCOL_LIMIT", "1");
        let (mut tower, mut attic) = (Machine::new("tower").model("echo"), old("attic").model("echo"));
        let (mut desk, mut shed) = (Machine::new("desk"), old("shed"));
        tower.up().await;
        for machine in [&mut attic, &mut desk, &mut shed] {
            machine.join(&tower).await;
            machine.up().await;
        }
        for machine in [&desk, &shed] {
            for worker in ["tower", "attic"] {
                machine.until("both models are ready", |status| status.model(worker)["state"] == "ready").await;
            }
        }
        for machine in [&tower, &attic, &desk] {
            machine.until_alive(&[&shed]).await;
        }
        Self { tower, attic, desk, shed }
    }

    /// Makes `worker` the only one that takes work.
    async fn only(&self, worker: &str) {
        for (machine, other) in [(&self.tower, "attic"), (&self.attic, "tower")] {
            let takes_work = machine.name == worker;
            let undo: &[&str] = if takes_work { &["--undo"] } else { &[] };
            // Each at itself, as an old node is not drained by others.
            machine.ingle(&[&["drain", &machine.name], undo].concat()).await.ok();
            let state = if takes_work { "ready" } else { "draining" };
            for gateway in [&self.desk, &self.shed] {
                let is_so = |status: &Status| status.model(&machine.name)["state"] == state;
                gateway.until(&format!("{} is {state}, {other} the other", machine.name), is_so).await;
            }
        }
    }

    async fn both(&self) {
        for machine in [&self.tower, &self.attic] {
            machine.ingle(&["drain", &machine.name, "--undo"]).await.ok();
            for gateway in [&self.desk, &self.shed] {
                gateway.until("it takes work", |status| status.model(&machine.name)["state"] == "ready").await;
            }
        }
    }
}

#[tokio::test]
async fn nodes_of_the_last_protocol_version_work_together_with_new_ones() {
    let home = Household::up().await;
    let Household { tower, attic, desk, shed } = &home;
    for (machine, other, version) in [
        (desk, tower, 2),
        (tower, desk, 2),
        (desk, attic, 1),
        (attic, desk, 1),
        (tower, attic, 1),
        (shed, tower, 1),
        (tower, shed, 1),
        (shed, attic, 1),
    ] {
        let status = machine.status().await;
        assert_eq!(status.node(&other.name)["protocol"], version, "{} to {}", machine.name, other.name);
    }
    // The control plane answers across versions as well.
    for (machine, other) in [(desk, "attic"), (shed, "tower"), (attic, "desk"), (tower, "shed")] {
        machine.until("it is measured", |status| status.node(other)["control_round_trip_ms"].is_number()).await;
    }

    for worker in [attic, tower] {
        home.only(&worker.name).await;
        for gateway in [desk, shed] {
            let stream = gateway.stream(&echo("repeat 20 every 50ms: hello ")).await.begun().await;
            assert_eq!(stream.node, worker.name);
            let counted = |status: &Status| status.running(&worker.name) == 1;
            gateway.until("the pulse says that it runs", counted).await;
            let seen = stream.rest().await;
            seen.is_whole(&"hello ".repeat(20));
            assert_eq!(gateway.ask(&echo("🔥 again")).await.text(), "🔥 again");

            // A client that leaves frees its slot there.
            drop(gateway.stream(&echo(LONG)).await.begun().await);
            worker.until_running(0).await;
        }
    }

    let refused = desk.ingle(&["drain", "attic"]).await.fails_with(1);
    assert!(refused.contains("attic does not drain") && refused.contains("too old"), "{refused}");
    desk.ingle(&["drain", "tower", "--undo"]).await.ok();
}

/// `kill -9` of an old worker whose answers go on at a new one, and the other way round, for gateways of both versions.
#[tokio::test]
async fn answers_move_between_the_versions() {
    let mut home = Household::up().await;
    for from_old in [true, false] {
        let names = if from_old { ("attic", "tower") } else { ("tower", "attic") };
        home.only(names.0).await;
        let mut streams = Vec::new();
        for gateway in [&home.desk, &home.shed] {
            streams.push(gateway.stream(&echo("repeat 100 every 50ms: hello ")).await.begun().await);
        }
        assert!(streams.iter().all(|stream| stream.node == names.0));
        home.both().await;
        let victim = if from_old { &mut home.attic } else { &mut home.tower };
        victim.kill_9().await;
        for stream in streams {
            stream.rest().await.is_whole(&"hello ".repeat(100));
        }
        for gateway in [&home.desk, &home.shed] {
            let explained = gateway.explain("last").await;
            let attempts = explained["attempts"].as_array().unwrap();
            assert_eq!(attempts.len(), 2, "{explained}");
            assert!(attempts[1]["cause"].as_str().unwrap().starts_with("migration ("), "{explained}");
            assert_eq!((&attempts[0]["node"], &attempts[1]["node"]), (&json!(names.0), &json!(names.1)));
        }
        let victim = if from_old { &mut home.attic } else { &mut home.tower };
        victim.up().await;
    }
}
