//! What this machine has.

use std::path::Path;

use ingle_protocol::wire::v2::Hardware;

/// The machine's cores, memory and kind.
pub fn hardware() -> Hardware {
    Hardware {
        platform: format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
        cores: std::thread::available_parallelism().map_or(1, |n| n.get() as u32),
        memory: main_memory().unwrap_or(0),
        accelerators: super::graphics_cards(),
    }
}

/// Bytes of main memory.
fn main_memory() -> Option<u64> {
    #[cfg(target_os = "linux")]
    {
        let total = rustix::system::sysinfo();
        Some(total.totalram as u64 * u64::from(total.mem_unit))
    }
    #[cfg(not(target_os = "linux"))]
    {
        let text = std::process::Command::new("sysctl").args(["-n", "hw.memsize"]).output().ok()?;
        String::from_utf8(text.stdout).ok()?.trim().parse().ok()
    }
}

/// Bytes that are read for a measurement: more than caches hold, and no more than any machine can spare for a moment.
const SWEPT: usize = 64 << 20;
/// Of so many sweeps the fastest counts: the others were disturbed.
const SWEEPS: u32 = 3;

/// Bytes a second that all cores together read from memory. Takes a tenth of a second. Blocks.
pub fn memory_bandwidth() -> u64 {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get()).min(16);
    // Written, or all of it would be the system's one page of zeros.
    let memory: Vec<u64> = (0..SWEPT as u64 / 8).collect();
    let share = memory.len().div_ceil(cores);
    let sweep = || {
        let began = std::time::Instant::now();
        std::thread::scope(|scope| {
            for part in memory.chunks(share) {
                scope.spawn(move || std::hint::black_box(part.iter().fold(0u64, |sum, word| sum.wrapping_add(*word))));
            }
        });
        began.elapsed()
    };
    let best = (0..SWEEPS).map(|_| sweep()).min().unwrap_or_default();
    (SWEPT as f64 / best.as_secs_f64().max(1e-6)) as u64
}

/// Lets this process open as many files as the system permits at all. Returns how many that are.
pub fn raise_open_files_limit() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    let now = if setrlimit(Resource::Nofile, raised).is_ok() { limit.maximum } else { limit.current };
    now.unwrap_or(u64::MAX)
}

/// Bytes that this user can still write to the file system of `path`.
pub fn available_disk_space(path: &Path) -> std::io::Result<u64> {
    let stats = rustix::fs::statvfs(path)?;
    Ok(stats.f_bavail * stats.f_frsize)
}

/// Bytes of the whole file system of `path`.
pub fn disk_size(path: &Path) -> std::io::Result<u64> {
    let stats = rustix::fs::statvfs(path)?;
    Ok(stats.f_blocks.saturating_mul(stats.f_frsize))
}

/// Bytes of memory that the system gets back when a process ends: what it holds beside mapped files. `None` where the
/// system does not say.
pub fn memory_of(pid: u32) -> Option<u64> {
    let status = Status::of(pid)?;
    Some(status.field("RssAnon:")? + status.field("RssShmem:")?)
}

/// Bytes of memory that a process has, mapped files included, which others may share.
pub fn resident_memory_of(pid: u32) -> Option<u64> {
    Status::of(pid)?.field("VmRSS:")
}

/// What Linux says of a process.
struct Status(String);

impl Status {
    fn of(pid: u32) -> Option<Self> {
        std::fs::read_to_string(format!("/proc/{pid}/status")).ok().map(Self)
    }

    fn field(&self, name: &str) -> Option<u64> {
        let line = self.0.lines().find_map(|line| line.strip_prefix(name))?;
        Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
    }
}
