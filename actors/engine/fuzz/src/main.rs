//! Runs one of the engine's fuzz targets (named by `INGLE_FUZZ_TARGET`) under libFuzzer, and ends the process, so that
//! libFuzzer keeps the input, where a run takes too much memory or time.
#![no_main]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use rustix::time::{ClockId, clock_gettime};

/// Bytes that Rust code holds.
static HELD: AtomicUsize = AtomicUsize::new(0);
/// As many it may hold.
static LIMIT: AtomicUsize = AtomicUsize::new(usize::MAX);

struct Counting;

impl Counting {
    fn more(bytes: usize) {
        let held = HELD.fetch_add(bytes, Relaxed).wrapping_add(bytes);
        if held > LIMIT.load(Relaxed) {
            // Nothing here may allocate again.
            LIMIT.store(usize::MAX, Relaxed);
            eprintln!("fuzz: the last {bytes} bytes of {held} are too many");
            std::process::abort();
        }
    }
}

// SAFETY: all calls go to the system's allocator as they are.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::more(layout.size());
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::more(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Relaxed);
        unsafe { System.dealloc(place, layout) }
    }
    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        Self::more(size);
        HELD.fetch_sub(layout.size(), Relaxed);
        unsafe { System.realloc(place, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Its name, the bytes that a run may hold beside some for each byte of input, and how long it may take.
struct Target {
    name: String,
    memory: usize,
    time: Duration,
}

static TARGET: LazyLock<Target> = LazyLock::new(|| {
    // This very thread, so that its time is the run's and nothing is left over when it ends.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread();
    pool.build_global().expect("the first pool");
    let name = std::env::var("INGLE_FUZZ_TARGET").unwrap_or_default();
    assert!(ingle_engine::fuzz::TARGETS.contains(&name.as_str()), "no target {name:?}");
    let (memory, time) = match name.as_str() {
        // A template is a program: it may use up its fuel, and what texts and values that pays for.
        "template" => (512 << 20, 6_000),
        "gguf" | "safetensors" => (1 << 20, 100),
        // serde makes room for 1 MiB of a list whose length it was told, in each list of lists.
        _ => (8 << 20, 100),
    };
    // What is made once in a process (the tables of patterns) is none of a run's.
    ingle_engine::fuzz::run(&name, b"");
    Target { name, memory, time: Duration::from_millis(time) }
});

fn used() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fuzz_target!(|data: &[u8]| {
    let target = &*TARGET;
    let start = used();
    LIMIT.store(HELD.load(Relaxed) + target.memory + 16 * data.len(), Relaxed);
    ingle_engine::fuzz::run(&target.name, data);
    LIMIT.store(usize::MAX, Relaxed);
    let took = used() - start;
    assert!(took < target.time, "{took:?} for {} bytes", data.len());
});
