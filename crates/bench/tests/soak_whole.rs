//! A short soak of allocators, of programs managed whole; the long one is `bench soak --allocator`.
//!
//! A file of its own: a soak takes all processes below this one for its own.
#![allow(clippy::unwrap_used, reason = "tests")]

mod soaks;

use soaks::soak;

/// Three minutes, or three times SOAK_SECONDS: the same for each allocator. One seed of ten kills nobody.
#[test]
fn no_allocator_loses_a_byte_when_programs_are_managed_whole() {
    if let Err(missing) = kernel::probe::Features::probe().live_merge() {
        println!("skipped: {missing}");
        return;
    }
    let seconds = std::env::var("SOAK_SECONDS").unwrap_or_else(|_| "60".to_owned());
    let mut merges = 0;
    for (allocator, seed) in [("libc", "12"), ("jemalloc", "21"), ("mimalloc", "31")] {
        merges += soak(&["--allocator", allocator, "--seconds", &seconds, "--seed", seed]).merges;
    }
    // What brokers counted that were killed is lost.
    assert!(merges > 100, "{merges} pages were merged");
}
