//! Injections where CPUs are short: a program of its own, as other tests would come too late beside it.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

#[allow(dead_code, reason = "most of it is for the other program")]
#[path = "../inject/harness.rs"]
mod harness;

use harness::{Target, scheduler_tells};

/// Where CPUs are short, a thread that falls asleep is moved to another one at times, and is said to have last run when the
/// machine started. Seen to fail: with that believed.
#[test]
fn no_time_out_ends_early_where_cpus_are_short() {
    if !scheduler_tells() {
        return;
    }
    let over = &AtomicBool::new(false);
    std::thread::scope(|scope| {
        let spin = move |length: Duration| {
            let end = Instant::now() + length;
            while Instant::now() < end && !over.load(Relaxed) {}
        };
        let cpus = std::thread::available_parallelism().unwrap().get();
        for number in 0..8 * cpus {
            let nap = if number < cpus { Duration::ZERO } else { Duration::from_millis(20) };
            scope.spawn(move || {
                while !over.load(Relaxed) {
                    spin(Duration::from_millis(2));
                    std::thread::sleep(nap);
                }
            });
        }
        let end = Over(over);
        let mut targets: Vec<Target> = (0..2 * cpus).map(|_| Target::start(&["epoll_worn"])).collect();
        for round in 0..400 {
            for target in &targets {
                target.switch(round % 2 == 0, Some("epoll_worn"));
            }
        }
        for target in &mut targets {
            target.check();
        }
        drop(end);
    });
}

/// Lets the others end, whatever happens.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}
