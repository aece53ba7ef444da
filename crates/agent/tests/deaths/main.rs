//! Death at every step: helpers stop themselves before the n-th step of a batch (see `agent::faults`), and then helper,
//! broker, guardian or the program itself is killed, or two of them. Afterwards every byte must be right, nobody may
//! hang, the gate must be open and no process may be left.
//!
//! This binary is everything: the test, the host of the broker, the guardian and the victim. `DEATHS=all` tries every
//! step with every death; otherwise the steps are dealt out among the deaths.

#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr, reason = "a test")]

mod host;
mod hostile;
#[path = "../common/raw_fork.rs"]
mod raw_fork;
mod stage;
mod victim;
mod whole;

use stage::{Death, Image, Kind, Stage};

/// Victims of one round.
const AT_ONCE: u64 = 8;
/// Steps of a plan of two batches, at most, and those that are tried unless all are: the second batch is like the first.
const STEPS: u64 = 150;
const STEPS_DEALT_OUT: u64 = 96;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some("--victim") => victim::main(),
        Some("--enemy") => hostile::enemy(&arguments[1..]),
        Some("--broker") => host::broker(arguments.len() > 1),
        Some("--whole") => whole::main(),
        Some("--guardian") => host::guardian(&arguments[1..]),
        _ => tests(&arguments),
    }
}

fn tests(arguments: &[String]) {
    if arguments.iter().any(|argument| argument == "--list") {
        return;
    }
    let filter = arguments.iter().find(|argument| !argument.starts_with('-')).cloned().unwrap_or_default();
    if let Err(missing) = kernel::probe::Features::probe().live_merge() {
        println!("skipped: {missing}");
        return;
    }
    kernel::task::set_child_subreaper(true).unwrap();
    let image = Image::build();
    for kind in [Kind::Plain, Kind::Zero, Kind::Diverged, Kind::Unmerge, Kind::Hidden] {
        for (index, death) in Death::ALL.into_iter().enumerate() {
            let name = format!("{kind:?}-{death:?}");
            if name.contains(&filter) {
                rounds(&image, kind, death, index as u64);
                println!("{name}: ok");
            }
        }
    }
    let others: [(&str, hostile::Test); 2] =
        [("another-helper", stage::another_helper), ("whole-forks", whole::forks_go_on)];
    for (name, test) in others.into_iter().chain(hostile::TESTS) {
        if name.contains(filter.as_str()) {
            test(&image);
            println!("{name}: ok");
        }
    }
}

/// All steps that fall to this death, some victims at a time.
fn rounds(image: &Image, kind: Kind, death: Death, turn: u64) {
    let deaths = Death::ALL.len() as u64;
    let all = std::env::var("DEATHS").is_ok_and(|how| how == "all");
    let (stride, last) = if all { (1, STEPS) } else { (deaths, STEPS_DEALT_OUT) };
    let mut steps = (1..=last).filter(|step| step % stride == turn % stride);
    loop {
        let these: Vec<u64> = steps.by_ref().take(AT_ONCE as usize).collect();
        if these.is_empty() {
            return;
        }
        let begun = std::time::Instant::now();
        let reached = Stage::new(image).round(kind, death, &these);
        println!("  {kind:?}-{death:?} {these:?}: {reached} stopped there, {:.1} s", begun.elapsed().as_secs_f64());
        // Behind the last step of the plans.
        if reached == 0 {
            return;
        }
    }
}
