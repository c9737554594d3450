//! `ingle models verify` reads the files anew: one with a flipped bit is set aside, named, and taken from the cluster
//! again, while the model that runs from it goes on.

use std::os::unix::fs::FileExt;

use crate::harness::*;

#[tokio::test]
async fn a_damaged_model_file_is_set_aside_and_fetched_again() {
    let cache = tempfile::tempdir().unwrap();
    let mut tower = Machine::new("tower").model("default");
    tower.up().await;
    let mut mini = without_sources(Machine::new("mini").model("default"), cache.path());
    mini.join(&tower).await;
    mini.up().await;

    let verify = async || -> Value {
        let ran = mini.ingle(&["models", "verify", "--json"]).await;
        serde_json::from_str(&ran.ok()).unwrap()
    };
    let good = verify().await;
    assert_eq!((&good["files"][0]["verdict"], &good["files"][0]["digest"]), (&json!("good"), &json!(DEFAULT_FILE)));
    assert_eq!(good["probes"], json!([{"model": "smollm2-135m-instruct", "failed": null}]));

    let file = std::fs::File::options().read(true).write(true).open(file_in(cache.path())).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 90_000_000).unwrap();
    file.write_all_at(&[byte[0] ^ 1], 90_000_000).unwrap();
    let mended = verify().await;
    assert_eq!(mended["files"][0]["verdict"], "fetched_again", "{mended}");
    let moved_to = mended["files"][0]["moved_to"].as_str().unwrap();
    assert!(moved_to.ends_with(".corrupt") && std::path::Path::new(moved_to).exists(), "{moved_to}");
    assert_eq!(verify().await["files"][0]["verdict"], "good");

    // Whatever is loaded answers with a token, under whatever name.
    mini.ingle(&["models", "load", "echo", "--name", "second"]).await.ok();
    let probes = verify().await["probes"].clone();
    assert_eq!(probes.as_array().unwrap().len(), 2, "{probes}");
    let ran = mini.ingle(&["models", "verify", "second", "--json"]).await;
    let second: Value = serde_json::from_str(&ran.ok()).unwrap();
    assert_eq!(second, json!({"files": [], "probes": [{"model": "second", "failed": null}]}));

    // A damaged file that nobody gives again is a failure that is said.
    let ran = mini.ingle(&["models", "verify", "no-such-model"]).await;
    assert!(ran.fails_with(1).contains("no-such-model"));
}
