//! How much memory there is, so that what cannot fit is refused before the machine swaps.

use crate::EngineError;
use crate::gguf::Gguf;

/// What an engine needs beside weights, keys and values.
pub(crate) const OVERHEAD: u64 = 100 << 20;

/// Refuses a model whose weights with `kv` bytes of keys and values are more than what is free. Where the system
/// does not say what is free, nothing is refused.
pub(crate) fn refuse_too_large(gguf: &Gguf, kv: u64) -> Result<(), EngineError> {
    let Some(free) = available() else { return Ok(()) };
    let weights = gguf.file_bytes();
    let needed = weights.saturating_add(kv).saturating_add(OVERHEAD);
    if needed <= free {
        return Ok(());
    }
    Err(EngineError::Memory { path: gguf.path().into(), needed, weights, kv, free })
}

/// Bytes that can be had without swapping: the system's word, and the limit of our control group if there is one.
#[cfg(target_os = "linux")]
pub fn available() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    let number = |name: &str| -> Option<u64> {
        std::fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok()?.trim().parse().ok()
    };
    let of_group = number("memory.max").map(|most| most.saturating_sub(number("memory.current").unwrap_or(0)));
    Some((kib << 10).min(of_group.unwrap_or(u64::MAX)))
}

#[cfg(not(target_os = "linux"))]
pub fn available() -> Option<u64> {
    None
}

/// Resident bytes of this process, and what of them no other process shares.
pub(crate) fn of_this_process() -> Option<(u64, u64)> {
    let text = std::fs::read_to_string("/proc/self/smaps_rollup").ok()?;
    let field = |name: &str| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
    };
    Some((field("Rss:")?, field("Private_Clean:")? + field("Private_Dirty:")?))
}
