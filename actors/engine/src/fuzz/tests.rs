use std::path::PathBuf;

use super::*;

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus")
}

/// Whatever the fuzzer once found stays fixed: its findings are seeds.
#[test]
fn all_readers_bear_all_seeds() {
    for target in TARGETS {
        let mut count = 0;
        for entry in std::fs::read_dir(corpus().join(target)).unwrap() {
            let path = entry.unwrap().path();
            run(target, &std::fs::read(&path).unwrap());
            count += 1;
        }
        assert!(count > 0, "{target} has no seeds");
    }
}

/// Cut short anywhere, too.
#[test]
fn all_readers_bear_half_of_a_seed() {
    for (target, seeds) in seeds::all() {
        for (_, seed) in seeds {
            for length in (0..seed.len()).step_by(seed.len().div_ceil(64).max(1)) {
                run(target, &seed[..length]);
            }
        }
    }
}

/// Writes the seeds anew: `cargo test --release --package ingle-engine --lib writes_the_seeds -- --ignored`.
#[test]
#[ignore = "writes into the source folder"]
fn writes_the_seeds() {
    for (target, seeds) in seeds::all() {
        let folder = corpus().join(target);
        std::fs::create_dir_all(&folder).unwrap();
        for (name, bytes) in seeds {
            std::fs::write(folder.join(name), bytes).unwrap();
        }
    }
}
