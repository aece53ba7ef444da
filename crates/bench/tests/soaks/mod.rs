//! A soak with the words of its command.

use bench::soak::{Report, SoakArgs, run};
use clap::{Args as _, FromArgMatches as _};

pub(crate) fn soak(words: &[&str]) -> Report {
    let command = SoakArgs::augment_args(clap::Command::new("soak"));
    let matches = command.get_matches_from(std::iter::once("soak").chain(words.iter().copied()));
    let report = run(&SoakArgs::from_arg_matches(&matches).unwrap()).unwrap();
    println!("{report:#?}");
    assert!(report.operations > 0 && report.pages_checked > 0 && report.forks > 0);
    report
}
