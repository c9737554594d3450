//! Engines of one model on one host map one packed file: the second adds no second copy (by `Pss`, which divides
//! shared pages among those who share them).
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use ingle_engine::model::Model;
use ingle_engine::{DeviceChoice, ModelOptions, PackedCache, StepEngine, StepEntry};

mod support;

const ROLE: &str = "INGLE_TEST_ENGINE_OF";

/// Not a test by itself: an engine in a process of its own. It uses all weights and then waits for its end.
#[test]
fn an_engine_in_its_own_process() {
    let Some(folder) = std::env::var_os(ROLE) else { return };
    let mut model = open(Path::new(&folder));
    model.assign_share(0).unwrap();
    model.step(&[StepEntry { token: 1, slot: 0, position: 0 }], &[0]).unwrap();
    println!("loaded");
    std::io::stdout().flush().unwrap();
    let _ = std::io::stdin().read(&mut [0]);
}

fn open(folder: &Path) -> Model {
    let packed_cache = Some(PackedCache { folder: folder.into(), digest: support::SHA256.into(), limit: 1 << 30 });
    let options = ModelOptions { slots: 1, context_length: Some(64), packed_cache, ..ModelOptions::default() };
    Model::open(&support::model(), DeviceChoice::Cpu, &options).unwrap()
}

fn start(folder: &Path) -> Child {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["an_engine_in_its_own_process", "--exact", "--nocapture", "--test-threads=1"])
        .env(ROLE, folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    let mut byte = [0];
    while !said.contains("loaded") {
        assert_eq!(child.stdout.as_mut().unwrap().read(&mut byte).unwrap(), 1, "it ended: {said}");
        said.push(byte[0].into());
    }
    child
}

/// Bytes that this process has to itself, and its share of what others have too.
fn pss(child: &Child) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", child.id())).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).unwrap();
    line.trim().strip_suffix("kB").unwrap().trim().parse::<u64>().unwrap() << 10
}

#[test]
fn the_second_engine_shares_the_first_ones_weights() {
    let folder = tempfile::tempdir().unwrap();
    let mut first = start(folder.path());
    let alone = pss(&first);
    let packed: u64 = std::fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().extension().is_some_and(|extension| extension == "packed"))
        .map(|entry| entry.metadata().unwrap().len())
        .sum();
    assert!(packed > 90 << 20, "{packed} bytes of packed weights");
    let mut second = start(folder.path());
    let both = pss(&first) + pss(&second);
    println!("packed weights {packed}, one engine {alone}, two engines {both}");
    for child in [&mut first, &mut second] {
        drop(child.stdin.take());
        child.wait().unwrap();
    }
    // What the second needs of its own is far less than the weights.
    assert!(both < alone + packed / 3, "one engine {alone}, two engines {both}, weights {packed}");
    assert!(alone < packed + (100 << 20), "one engine {alone}, weights {packed}");
}
