//! How long the verdict on a process takes that is known from before.
//!
//! `cargo run --release -p pagefold-proof --example cached -- PID`

use std::time::{Duration, Instant};

use kernel::Pid;
use pagefold_proof::{Cache, Lists, Prover};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let pid = Pid(std::env::args().nth(1).ok_or("a PID is needed")?.parse()?);
    let (lists, cache) = (Lists::default(), Cache::of_user()?);
    let mut times = Vec::new();
    let mut objects = 0;
    for _ in 0..201 {
        let mut silent = |_: pagefold_proof::Progress<'_>| {};
        let begun = Instant::now();
        objects = Prover::new(&lists, Some(&cache), &mut silent).judge_process(pid)?.objects.len();
        times.push(begun.elapsed());
    }
    let usage = processor_time()? / 201;
    let first = times.remove(0);
    times.sort_unstable();
    let at = |part: usize| times.get(times.len() * part / 100).copied().unwrap_or(Duration::ZERO);
    println!(
        "{objects} objects; first {first:.2?}, then p50 {:.2?}, p99 {:.2?} of {}; CPU {usage:.2?}",
        at(50),
        at(99),
        times.len()
    );
    Ok(())
}

/// Processor time of this process so far: on a busy machine the clock tells little.
fn processor_time() -> Result<Duration, Box<dyn std::error::Error>> {
    let text = std::fs::read_to_string("/proc/self/schedstat")?;
    Ok(Duration::from_nanos(text.split(' ').next().unwrap_or_default().parse()?))
}
