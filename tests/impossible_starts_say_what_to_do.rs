//! What cannot work ends with an exit code and a sentence that helps, not with half a node.

use std::net::{TcpListener, UdpSocket};
use std::path::Path;

use crate::harness::*;

/// `ingle up` that should not come up.
async fn up(state_dir: &Path, more: &[&str]) -> Ran {
    let state_dir = state_dir.to_str().unwrap();
    let mut arguments = vec!["up", "--state-dir", state_dir, "--no-mdns"];
    for (flag, value) in [("--http", "127.0.0.1:0"), ("--quic", "127.0.0.1:0"), ("--model", "none")] {
        if !more.contains(&flag) {
            arguments.extend([flag, value]);
        }
    }
    arguments.extend(more);
    run(&arguments).await
}

#[track_caller]
fn says(complaint: &str, expected: &[&str]) {
    for part in expected {
        assert!(complaint.contains(part), "{part:?} in {complaint:?}");
    }
    assert!(complaint.starts_with("error: "), "{complaint:?}");
    assert!(!complaint.contains("panicked"), "{complaint:?}");
}

#[tokio::test]
async fn a_model_file_that_is_none_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let file = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    // Version 3, two tensors, one entry of metadata, and then the file ends.
    let head = [b"GGUF".as_slice(), &3u32.to_le_bytes(), &2u64.to_le_bytes(), &1u64.to_le_bytes()].concat();
    // The entry's key claims to be longer than any file.
    let wild = [&head[..], &u64::MAX.to_le_bytes(), b"general.architecture"].concat();
    for path in [
        file("empty.gguf", b""),
        file("random.gguf", &(0..5_000u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect::<Vec<_>>()),
        file("cut.gguf", &head),
        file("wild.gguf", &wild),
    ] {
        says(&up(&state, &["--model", &path]).await.fails_with(1), &[&path]);
    }
    let missing = folder.path().join("missing.gguf");
    let missing = missing.to_str().unwrap();
    says(&up(&state, &["--model", missing]).await.fails_with(2), &[missing, "There is no model file"]);
    says(&up(&state, &["--model", ""]).await.fails_with(2), &["`default`, `none` or a path"]);
}

#[tokio::test]
async fn addresses_that_cannot_be_used_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let http = listener.local_addr().unwrap().to_string();
    says(&up(&state, &["--http", &http]).await.fails_with(1), &[&http, "in use", "--http"]);
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let quic = socket.local_addr().unwrap().to_string();
    says(&up(&state, &["--quic", &quic]).await.fails_with(1), &[&quic, "uses it", "--quic"]);
    for open in ["0.0.0.0:0", "[::]:0"] {
        says(&up(&state, &["--http", open]).await.fails_with(2), &["authentication", "loopback"]);
    }
    says(&up(&state, &["--http", "127.0.0.1:99999"]).await.fails_with(2), &["HTTP"]);
}

#[tokio::test]
async fn state_directories_that_cannot_be_used_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    for path in [&file, &file.join("below")] {
        says(&up(path, &[]).await.fails_with(1), &[path.to_str().unwrap(), "--state-dir"]);
    }
    let damaged = folder.path().join("damaged");
    std::fs::create_dir(&damaged).unwrap();
    std::fs::write(damaged.join("identity.json"), "{}").unwrap();
    says(&up(&damaged, &[]).await.fails_with(1), &["identity.json", "damaged", "backup"]);

    let mut tower = Machine::new("tower");
    tower.up().await;
    let second = up(&tower.state_dir(), &[]).await.fails_with(1);
    says(&second, &["Another node", &tower.pid().to_string(), "--state-dir"]);
    assert_eq!(tower.get("/health").await.status, 200, "the first one is not disturbed");

    let idle = Machine::new("idle");
    for command in [&["status"][..], &["chat", "hello"]] {
        says(&idle.ingle(command).await.fails_with(1), &["No node runs", "ingle up --state-dir"]);
    }
}

#[tokio::test]
async fn wrong_settings_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let config = folder.path().join("ingle.toml");
    let path = config.to_str().unwrap();
    says(&up(&state, &["--config", path]).await.fails_with(2), &[path, "cannot be read"]);
    std::fs::write(&config, "[http]\nlisten = \"127.0.0.1:0\"\nlisen = \"127.0.0.1:0\"\n").unwrap();
    says(&up(&state, &["--config", path]).await.fails_with(2), &[path, "line 3", "lisen", "listen"]);
    says(&up(&state, &["--name", "Not A Name"]).await.fails_with(2), &["not-a-name", "a-z"]);
    says(&up(&state, &["--drain-limit", "soon"]).await.fails_with(2), &["Drain limit"]);
    assert!(!state.exists(), "nothing was begun");
    assert!(run(&["upp"]).await.fails_with(2).contains("up"));
}
