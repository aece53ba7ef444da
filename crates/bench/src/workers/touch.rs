//! Two threads that use memory while it is merged, and how long each access took.

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use kernel::Pid;
use kernel::sched::{Whose, thread_time, usage};
use serde::{Deserialize, Serialize};

use super::layout::Random;
use super::process::Held;

/// An access that took no longer than this was no fault: it is not kept.
const SLOW: Duration = Duration::from_nanos(700);
/// Most accesses of a kind that are kept one by one.
const KEPT: usize = 4 << 20;

/// Accesses of one kind.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Access {
    /// Accesses altogether.
    pub accesses: u64,
    /// Nanoseconds of each slow access during which the thread slept: it waited for something, a frozen page or the
    /// lock of the address space. Ascending.
    pub waits: Vec<u64>,
    /// Nanoseconds of each of these waits up to the moment in which the thread could go on: without the time for which it
    /// then waited for a CPU, as it does after every sleep. Ascending.
    pub asleep: Vec<u64>,
    /// Nanoseconds of each other slow access: faults, copies, and the CPU being taken away. Ascending.
    pub slow: Vec<u64>,
}

/// What two threads met.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Touched {
    /// The reader.
    pub reads: Access,
    /// The writer.
    pub writes: Access,
    /// Seconds that it took.
    pub seconds: f64,
}

/// Reads and writes random pages for a time.
pub(crate) fn touch(held: &Held, time: Duration, writes: u64) -> Touched {
    let begun = Instant::now();
    let (reads, writes) = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut random = Random::new(2);
            access(begun + time, u64::MAX, || {
                std::hint::black_box(held.first_word(random.below(held.pages())).load(Relaxed));
            })
        });
        let mut random = Random::new(3);
        let wrote = access(begun + time, writes, || {
            let word = held.first_word(random.below(held.pages()));
            // What is there already: the page gets its own copy and stays equal. (Adding 0 would be made a mere read by
            // the compiler; nobody else writes.)
            word.store(word.load(Relaxed), Relaxed);
        });
        (reader.join().unwrap_or_default(), wrote)
    });
    Touched { reads, writes, seconds: begun.elapsed().as_secs_f64() }
}

fn access(until: Instant, each_second: u64, mut once: impl FnMut()) -> Access {
    let mut access = Access::default();
    let mut switches = usage(Whose::Thread).voluntary_switches;
    let this = Pid(rustix::thread::gettid().as_raw_nonzero().get());
    let without_a_cpu = || thread_time(Pid::this(), this).map_or(Duration::ZERO, |time| time.waiting);
    let mut queued = without_a_cpu();
    let start = Instant::now();
    let mut before = start;
    while before < until {
        once();
        let after = Instant::now();
        access.accesses += 1;
        let took = after - before;
        before = after;
        if took > SLOW {
            // Whoever waits gives the CPU up; who is only preempted does not do so himself.
            let now = usage(Whose::Thread).voluntary_switches;
            let kind = if now > switches { &mut access.waits } else { &mut access.slow };
            let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
            let queued_before = std::mem::replace(&mut queued, without_a_cpu());
            if kind.len() < KEPT {
                kind.push(nanoseconds(took));
                if now > switches {
                    access.asleep.push(nanoseconds(took.saturating_sub(queued.saturating_sub(queued_before))));
                }
            }
            switches = now;
            before = Instant::now();
        }
        if each_second != u64::MAX && access.accesses.is_multiple_of(64) {
            let due = start + Duration::from_secs_f64(access.accesses as f64 / each_second as f64);
            let now = Instant::now();
            if due > now + Duration::from_micros(200) {
                std::thread::sleep(due - now);
                switches = usage(Whose::Thread).voluntary_switches;
                queued = without_a_cpu();
            }
            before = Instant::now();
        }
    }
    access.waits.sort_unstable();
    access.asleep.sort_unstable();
    access.slow.sort_unstable();
    access
}
