//! A parameter that cannot be so is named, and everything stays as it was: values, engine, answers.

use crate::harness::*;

#[tokio::test]
async fn a_refused_parameter_changes_nothing() {
    let mut tower = Machine::new("tower").model("default");
    tower.up().await;
    let model = tower.status().await.model("tower")["name"].as_str().unwrap().to_owned();
    assert_eq!(tower.set(&model, &["max_tokens=4"]).await, "live");
    let (before, engine) = (tower.parameters(&model).await, tower.engines());

    for (value, code, part) in [
        ("colour=red", 2, "there is no parameter `colour`"),
        ("batch_size=0", 2, "batch_size is 0"),
        ("kv_type=int4", 2, "`f16` or `int8`"),
        ("max_tokens", 2, "write it as in"),
    ] {
        let said = tower.ingle(&["models", "set", &model, "threads=1", value]).await.fails_with(code);
        assert!(said.contains(part), "{value}: {said}");
    }
    let said = tower.ingle(&["models", "set", "another", "max_tokens=3"]).await.fails_with(1);
    assert!(said.contains(&format!("runs `{model}`, not `another`")), "{said}");
    // Nor does one that only an engine can refuse: keys and values for so many would take some hundred GiB.
    let huge = ["models", "set", &model, "max_tokens=9", "batch_size=1024", "kv_memory_mib=1000000000"];
    let said = tower.ingle(&huge).await.fails_with(1);
    assert!(said.contains("of memory"), "{said}");

    assert_eq!(tower.parameters(&model).await, before);
    assert_eq!(tower.engines(), engine);
    let asked = json!({"messages": [{"role": "user", "content": "Count to ten."}], "temperature": 0});
    assert_eq!(tower.ask(&asked).await.body["usage"]["completion_tokens"], 4);

    let mut mini = Machine::new("mini");
    mini.up().await;
    let said = mini.ingle(&["models", "show", "default"]).await.fails_with(1);
    assert!(said.contains("this node runs no model"), "{said}");
}
