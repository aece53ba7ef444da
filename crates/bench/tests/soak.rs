//! A short soak, or one of SOAK_SECONDS. The long one is `bench soak`.
#![allow(clippy::unwrap_used, reason = "tests")]

use bench::soak::{SoakArgs, run};
use clap::{Args as _, FromArgMatches as _};

#[test]
fn a_short_soak_finds_every_byte_in_place() {
    if let Err(missing) = kernel::probe::Features::probe().live_merge() {
        println!("skipped: {missing}");
        return;
    }
    let seconds = std::env::var("SOAK_SECONDS").unwrap_or_else(|_| "20".to_owned());
    let command = SoakArgs::augment_args(clap::Command::new("soak"));
    let matches = command.get_matches_from(["soak", "--seconds", &seconds, "--seed", "11"]);
    let report = run(&SoakArgs::from_arg_matches(&matches).unwrap()).unwrap();
    println!("{report:#?}");
    assert!(report.operations > 0 && report.pages_checked > 0 && report.forks > 0);
}
