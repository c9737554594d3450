//! Threads that share the units of one computation. A step of a small model has hundreds of computations of some
//! ten microseconds, so waiting threads spin for a moment; they soon offer the processor to others and then sleep.
//!
//! Each thread begins with a range of units of its own, so that it reads memory in one stream, and then helps the
//! others. A thread that comes late (because the machine is busy) is not waited for: only units that somebody has
//! begun are.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
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

/// On a line of the cache of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Apart<T>(T);

#[derive(Debug, Default)]
struct Shared {
    /// For each thread's range, upper half: the computation's number; lower half: units that somebody has begun.
    tickets: Vec<Apart<AtomicU64>>,
    /// The computation's number.
    number: Apart<AtomicU32>,
    done: Apart<AtomicUsize>,
    units: AtomicUsize,
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
        let threads = threads.max(1);
        let tickets = (0..threads).map(|_| Apart::default()).collect();
        let shared = Arc::new(Shared { tickets, ..Shared::default() });
        let spawn = |n: usize| {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new().name(format!("kernel {n}")).spawn(move || shared.serve(n)).ok()
        };
        let threads = (1..threads).map_while(spawn).collect();
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
        let last = shared.number.0.load(Ordering::Relaxed);
        // No late thread may take the new units for further ones of the last computation.
        for ticket in &shared.tickets {
            ticket.0.store(u64::from(last) << 32 | u64::from(u32::MAX), Ordering::Relaxed);
        }
        fence(Ordering::Release);
        shared.units.store(units, Ordering::Relaxed);
        shared.done.0.store(0, Ordering::Relaxed);
        shared.work.store((&raw const work).cast_mut().cast(), Ordering::Relaxed);
        shared.call.store(call as *mut (), Ordering::Relaxed);
        let number = last.wrapping_add(1);
        for ticket in &shared.tickets {
            ticket.0.store(u64::from(number) << 32, Ordering::Release);
        }
        shared.number.0.store(number, Ordering::SeqCst);
        if shared.asleep.load(Ordering::SeqCst) > 0 {
            self.threads.iter().for_each(|thread| thread.thread().unpark());
        }
        shared.work_on(number, 0);
        let mut looks = 0u32;
        while shared.done.0.load(Ordering::Acquire) < units {
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
    /// The units that thread `n` begins with.
    fn range(&self, n: usize, units: usize) -> Range<usize> {
        let threads = self.tickets.len();
        units * n / threads..units * (n + 1) / threads
    }

    /// Takes units of this computation until there are none left, first those of thread `me`.
    fn work_on(&self, number: u32, me: usize) {
        let threads = self.tickets.len();
        for n in (0..threads).map(|n| (me + n) % threads) {
            if !self.work_on_range(number, n) {
                return;
            }
        }
    }

    /// False where another computation has begun.
    fn work_on_range(&self, number: u32, n: usize) -> bool {
        let ticket_of_range = &self.tickets[n].0;
        let mut ticket = ticket_of_range.load(Ordering::Acquire);
        loop {
            // Read before the ticket is taken: who takes one knows that the computation was still this one.
            let (units, work, call) = (
                self.units.load(Ordering::Relaxed),
                self.work.load(Ordering::Relaxed),
                self.call.load(Ordering::Relaxed),
            );
            if (ticket >> 32) as u32 != number {
                return false;
            }
            let range = self.range(n, units);
            let unit = range.start + (ticket & u64::from(u32::MAX)) as usize;
            if unit >= range.end {
                return true;
            }
            fence(Ordering::Acquire);
            match ticket_of_range.compare_exchange_weak(ticket, ticket + 1, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => {
                    // SAFETY: a `Call` was stored there together with this ticket.
                    let call = unsafe { std::mem::transmute::<*mut (), Call>(call) };
                    let unwound = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| call(work, unit)));
                    if unwound.is_err() {
                        self.panicked.store(true, Ordering::Relaxed);
                    }
                    self.done.0.fetch_add(1, Ordering::Release);
                    ticket = ticket_of_range.load(Ordering::Acquire);
                }
                Err(now) => ticket = now,
            }
        }
    }

    /// The body of thread `me`.
    fn serve(&self, me: usize) {
        let mut seen = 0;
        let mut looks = 0u32;
        while !self.stop.load(Ordering::Relaxed) {
            let number = self.number.0.load(Ordering::Acquire);
            if number != seen {
                seen = number;
                self.work_on(number, me);
                looks = 0;
            } else if looks < SPINS + YIELDS {
                wait(&mut looks);
            } else {
                self.asleep.fetch_add(1, Ordering::SeqCst);
                if self.number.0.load(Ordering::SeqCst) == seen && !self.stop.load(Ordering::SeqCst) {
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
