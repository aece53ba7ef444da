//! inject PID [COUNT] [TID]: runs prctl(PR_SET_MEMORY_MERGE) on and off in a process, and says for how long it was stopped.
#![allow(clippy::unwrap_used, reason = "an example")]
use kernel::Pid;
use kernel::inject::{Call, Options, inject};
use pagefold_kernel as kernel;
fn main() {
    let args: Vec<i32> = std::env::args().skip(1).map(|a| a.parse().unwrap()).collect();
    let count = args.get(1).copied().unwrap_or(1);
    let options = Options { tid: args.get(2).map(|t| Pid(*t)), ..Options::default() };
    let mut times = Vec::new();
    for i in 0..count {
        match inject(Pid(args[0]), &[Call::memory_merge(i % 2 == 0)], &options) {
            Ok(done) => {
                if count < 5 {
                    println!("{done:?}");
                }
                times.push(done.stopped_for);
            }
            Err(e) => {
                println!("{e} {e:?}");
                std::process::exit(1);
            }
        }
    }
    times.sort();
    println!("stopped median {:?} max {:?}", times[times.len() / 2], times[times.len() - 1]);
}
