//! Machines that copy the default model from others: each with a model folder of its own, and no source in reach.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{FETCH_DEADLINE, Machine};

/// The file of the default model.
pub const DEFAULT_FILE: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

/// Cuts a machine off from all sources, and gives it the model folder `cache`.
pub fn without_sources(machine: Machine, cache: &Path) -> Machine {
    let cache = cache.to_str().unwrap();
    let machine = machine.environment("INGLE_MODEL_CACHE", cache).environment("PATH", "/nowhere");
    machine.environment("INGLE_HUB_URL", "http://127.0.0.1:1")
}

/// Where the default model's file is in a model folder.
pub fn file_in(cache: &Path) -> PathBuf {
    cache.join(format!("{DEFAULT_FILE}.gguf"))
}

/// Returns once so many bytes of it have arrived. A copy is a matter of a second, so this looks often.
pub async fn until_arrived(cache: &Path, bytes: u64) {
    let part = cache.join(format!("{DEFAULT_FILE}.part"));
    let begin = Instant::now();
    while std::fs::metadata(&part).map_or(0, |file| file.len()) < bytes {
        assert!(!file_in(cache).exists(), "the copy was faster than we look");
        assert!(begin.elapsed() < FETCH_DEADLINE, "no {bytes} bytes arrive");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
