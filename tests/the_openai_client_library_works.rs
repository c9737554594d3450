//! Python `openai` from PyPI talks to a node as it does to OpenAI, with the real model.

use std::path::{Path, PathBuf};

use crate::harness::*;

const VERSION: &str = "3.54.0";

#[tokio::test]
async fn the_openai_client_library_works() {
    let python = environment().await;
    let mut tower = Machine::new("tower").model("default");
    tower.up().await;
    tower.ingle(&["models", "load", &tiny_bert()]).await.ok();
    let mut script = tokio::process::Command::new(python);
    script
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/openai_client.py"))
        .args([&tower.url("/v1"), TINY_BERT]);
    let ran = finish(script).await;
    println!("{}", ran.out);
    assert_eq!(ran.code, Some(0), "{}\n{}", ran.out, ran.err);
    tower.until_running(0).await;
    let latency = tower.status().await;
    assert!(latency.latency("tower")["finished"].as_u64() > Some(3), "{latency:?}");
}

/// A virtual environment with the library, kept between runs.
async fn environment() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("openai-{VERSION}"));
    let python = folder.join("bin/python");
    let complete = folder.join("complete");
    if !complete.exists() {
        let _ = std::fs::remove_dir_all(&folder);
        let mut venv = tokio::process::Command::new("python3");
        venv.args(["-m", "venv"]).arg(&folder);
        finish(venv).await.ok();
        let mut pip = tokio::process::Command::new(&python);
        pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", &format!("openai=={VERSION}")]);
        finish(pip).await.ok();
        std::fs::write(complete, "").unwrap();
    }
    python
}
