//! One download for a household: what one machine has, another takes from it, with no source in reach.

use crate::harness::*;

#[tokio::test]
async fn a_second_machine_takes_the_model_from_the_first() {
    let cache = tempfile::tempdir().unwrap();
    let mut tower = Machine::new("tower").model("default");
    tower.up().await;
    let mut mini = without_sources(Machine::new("mini").model("default"), cache.path());
    mini.join(&tower).await;
    mini.up().await;
    assert!(mini.log().contains(" from tower."), "it says from whom: {}", mini.log());
    assert_eq!(std::fs::metadata(file_in(cache.path())).unwrap().len(), 98_362_432);

    // It answers by itself.
    tower.stop().await;
    let question = json!({"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 4});
    assert_eq!(mini.ask(&question).await.node(), "mini");
}
