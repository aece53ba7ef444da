//! A short soak, or one of SOAK_SECONDS. The long one is `bench soak`.
#![allow(clippy::unwrap_used, reason = "tests")]

mod soaks;

use soaks::soak;

#[test]
fn a_short_soak_finds_every_byte_in_place() {
    if let Err(missing) = kernel::probe::Features::probe().live_merge() {
        println!("skipped: {missing}");
        return;
    }
    let seconds = std::env::var("SOAK_SECONDS").unwrap_or_else(|_| "20".to_owned());
    soak(&["--seconds", &seconds, "--seed", "11"]);
}
