//! A copy from several machines loses nothing when one of them is killed half way, nor when the machine that copies
//! is. A guest may copy too.

use crate::harness::*;

/// A few chunks of many.
const SOME: u64 = 24 << 20;

/// Two machines that have the file; only the first one runs it.
async fn givers() -> (Machine, Machine) {
    let mut tower = Machine::new("tower").model("default");
    tower.up().await;
    let mut desk = Machine::new("desk");
    desk.join(&tower).await;
    desk.up().await;
    tower.until_alive(&[&desk]).await;
    (tower, desk)
}

/// A copy that the first giver has given all of before the second one was found proves nothing: then another machine
/// copies.
const MOST_TAKERS: u32 = 6;

#[tokio::test]
async fn one_of_two_givers_is_killed_half_way() {
    let (tower, mut desk) = givers().await;
    let mut seen = Vec::new();
    for taker in 1..=MOST_TAKERS {
        let cache = tempfile::tempdir().unwrap();
        let mut mini = without_sources(Machine::new(&format!("mini{taker}")).model("default"), cache.path());
        let (token, address) = tower.token().await;
        mini.try_join(&address, &token, &["--guest"]).await.ok();
        mini.start().await;
        until_arrived(cache.path(), SOME).await;
        desk.kill_9().await;
        mini.wait_for_ready().await;
        let log = mini.log();
        let copied = log.lines().find(|line| line.contains("copied from the cluster"));
        let copied = copied.unwrap_or_else(|| panic!("{log}")).to_owned();
        if copied.contains("tower ") && copied.contains("desk ") {
            return;
        }
        seen.push(copied);
        desk.up().await;
        tower.until_alive(&[&desk]).await;
    }
    panic!("both gave: {seen:#?}");
}

#[tokio::test]
async fn the_taker_is_killed_half_way_and_goes_on() {
    let cache = tempfile::tempdir().unwrap();
    let (tower, _desk) = givers().await;
    let mut mini = without_sources(Machine::new("mini").model("default"), cache.path());
    mini.join(&tower).await;
    mini.start().await;
    until_arrived(cache.path(), SOME).await;
    mini.kill_9().await;
    assert!(!file_in(cache.path()).exists(), "nothing that is half there has its name");
    mini.up().await;
    let log = mini.log();
    let goes_on = log.lines().find(|line| line.contains("goes on with a copy")).unwrap_or_else(|| panic!("{log}"));
    assert!(!goes_on.contains("done=0 "), "{goes_on}");
}
