//! Threads that share the units of one computation. A step of a small model has hundreds of computations of some
//! ten microseconds, so waiting threads spin for a moment; they soon offer the processor to others and then sleep.
//!
//! A thread that comes late (because the machine is busy) is not waited for: only units that somebody has begun
//! are.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering, fence};
use std::thread::JoinHandle;

/// Looks at the next computation without offering the processor to others.
const SPINS: u32 = 2_000;
/// Looks, each behind an offer, before a thread sleeps.
const YIELDS: u32 = 200;

/// Threads beside the caller's own.
#[derive(Debug)]
pub(crate) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Upper half: the computation's number; lower half: the next unit that nobody has begun.
    ticket: AtomicU64,
    units: AtomicUsize,
    done: AtomicUsize,
    /// The work, with its type forgotten, and the function that knows it.
    work: AtomicPtr<()>,
    call: AtomicPtr<()>,
    asleep: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
}

type Call = fn(*const (), usize);

impl Pool {
    /// `threads` in all, the caller's included. Fewer where the system gives no more.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::<Shared>::default();
        let spawn = |n: usize| {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new().name(format!("kernel {n}")).spawn(move || shared.serve()).ok()
        };
        let threads = (1..threads.max(1)).map_while(spawn).collect();
        Self { shared, threads }
    }

    /// Threads, the caller's included.
    pub fn threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Calls `work` once for each unit below `units`, on all threads, and returns when all are done.
    pub fn run<W: Fn(usize) + Sync>(&mut self, units: usize, work: W) {
        if units <= 1 || self.threads.is_empty() {
            return (0..units).for_each(work);
        }
        let call: Call = |data, unit| {
            // SAFETY: `data` is the `work` below, which lives until all its units are done.
            let work = unsafe { &*data.cast::<W>() };
            work(unit);
        };
        let shared = &*self.shared;
        let last = shared.ticket.load(Ordering::Relaxed) >> 32;
        // No late thread may take the new units for further ones of the last computation.
        shared.ticket.store(last << 32 | u64::from(u32::MAX), Ordering::Relaxed);
        fence(Ordering::Release);
        shared.units.store(units, Ordering::Relaxed);
        shared.done.store(0, Ordering::Relaxed);
        shared.work.store((&raw const work).cast_mut().cast(), Ordering::Relaxed);
        shared.call.store(call as *mut (), Ordering::Relaxed);
        let next = last.wrapping_add(1) << 32;
        shared.ticket.store(next, Ordering::SeqCst);
        if shared.asleep.load(Ordering::SeqCst) > 0 {
            self.threads.iter().for_each(|thread| thread.thread().unpark());
        }
        shared.work_on(next);
        let mut looks = 0u32;
        while shared.done.load(Ordering::Acquire) < units {
            wait(&mut looks);
        }
        assert!(!shared.panicked.load(Ordering::Relaxed), "a kernel panicked on another thread");
    }
}

/// Spins, and later offers the processor to others.
fn wait(looks: &mut u32) {
    *looks = looks.saturating_add(1);
    if *looks < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
}

impl Shared {
    /// Takes units of the computation that began with this ticket until there are none left.
    fn work_on(&self, begun: u64) {
        let mut ticket = self.ticket.load(Ordering::Acquire);
        loop {
            let unit = (ticket & u64::from(u32::MAX)) as usize;
            // Read before the ticket is taken: who takes one knows that the computation was still this one.
            let (units, work, call) = (
                self.units.load(Ordering::Relaxed),
                self.work.load(Ordering::Relaxed),
                self.call.load(Ordering::Relaxed),
            );
            if ticket >> 32 != begun >> 32 || unit >= units {
                return;
            }
            fence(Ordering::Acquire);
            match self.ticket.compare_exchange_weak(ticket, ticket + 1, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => {
                    // SAFETY: a `Call` was stored there together with this ticket.
                    let call = unsafe { std::mem::transmute::<*mut (), Call>(call) };
                    let unwound = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| call(work, unit)));
                    if unwound.is_err() {
                        self.panicked.store(true, Ordering::Relaxed);
                    }
                    self.done.fetch_add(1, Ordering::Release);
                    ticket = self.ticket.load(Ordering::Acquire);
                }
                Err(now) => ticket = now,
            }
        }
    }

    /// The body of a thread.
    fn serve(&self) {
        let mut seen = 0;
        let mut looks = 0u32;
        while !self.stop.load(Ordering::Relaxed) {
            let ticket = self.ticket.load(Ordering::Acquire);
            if ticket >> 32 != seen {
                seen = ticket >> 32;
                self.work_on(ticket);
                looks = 0;
            } else if looks < SPINS + YIELDS {
                wait(&mut looks);
            } else {
                self.asleep.fetch_add(1, Ordering::SeqCst);
                if self.ticket.load(Ordering::SeqCst) >> 32 == seen && !self.stop.load(Ordering::SeqCst) {
                    std::thread::park();
                }
                self.asleep.fetch_sub(1, Ordering::SeqCst);
                looks = 0;
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            thread.thread().unpark();
            // Its panics were reported by the computation.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_is_done_once() {
        for threads in [1, 2, 5] {
            let mut pool = Pool::new(threads);
            for units in (0..200).chain([1, 10_000]) {
                let counts: Vec<AtomicUsize> = (0..units).map(|_| AtomicUsize::new(0)).collect();
                pool.run(units, |unit| {
                    counts[unit].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn sleeping_threads_wake() {
        let mut pool = Pool::new(3);
        for _ in 0..3 {
            std::thread::sleep(std::time::Duration::from_millis(30));
            let sum = AtomicUsize::new(0);
            pool.run(100, |unit| {
                sum.fetch_add(unit, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 4950);
        }
    }

    #[test]
    #[should_panic(expected = "a kernel panicked")]
    fn a_panic_reaches_the_caller() {
        Pool::new(2).run(10, |unit| assert!(unit != 7));
    }
}
