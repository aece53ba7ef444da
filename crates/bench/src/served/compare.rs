//! Lines for people, and ratios of pagefold to the other ways in the same run.

use serde_json::{Value, json};

use super::load::Load;
use super::measure::Outcome;
use super::rounds::Rounds;
use super::way::Way;
use crate::report::{Better, Ratio};

/// A line of the table; `plain` is of the same program, load and round.
pub(super) fn row(outcome: &Outcome, plain: Option<&Outcome>) -> String {
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    let mut text = format!(
        "{:<10} {:<4} {:<30} {:>6.1} MiB (store {:.1}, beside it {:.1})",
        outcome.program.name(),
        outcome.load.name(),
        outcome.way.name(),
        mib(outcome.private_bytes),
        mib(outcome.store_bytes),
        mib(outcome.managers_bytes),
    );
    if let Some(plain) = plain.filter(|_| outcome.way != Way::Plain) {
        text.push_str(&format!(
            ", saved {:.1} MiB = {:.1} %, {:.0} MiB for a CPU second, {:+.1} % CPU for a request = {:+.2} % of a CPU",
            outcome.saved_mib(plain),
            outcome.saved_share(plain) * 100.0,
            outcome.saved_mib_per_cpu_second(plain),
            outcome.slowdown(plain) * 100.0,
            outcome.added_cpu(plain) * 100.0,
        ));
    }
    let latency = outcome.latency;
    text.push_str(&format!(
        "; CPU {:.2} s; {:.1} requests/s, {:.0} for a CPU second; ms p50 {:.2} p99 {:.2} max {:.2}, all \
         data {:.2} then {:.2}; wrong {}",
        outcome.cpu_seconds,
        outcome.requests_per_second,
        outcome.requests_per_cpu_second,
        latency.p50 * 1e3,
        latency.p99 * 1e3,
        latency.max * 1e3,
        outcome.read_all_first_seconds * 1e3,
        outcome.read_all_again_seconds * 1e3,
        outcome.wrong_answers + outcome.wrong_workers,
    ));
    if let Some(passes) = outcome.ksmd_passes {
        let settled = if outcome.is_settled() { "" } else { ", which is too few" };
        text.push_str(&format!("; {passes} passes{settled}"));
    }
    if let Some(summary) = &outcome.summary {
        let list = |name: &str| summary[name].as_array().map_or(0, Vec::len);
        text.push_str(&format!(
            "; {} merged, {} written again",
            summary["merges"].as_u64().unwrap_or(0),
            summary["unshared_by_write"].as_u64().unwrap_or(0)
        ));
        for name in ["helper_refused", "stopped", "no_agent"] {
            if list(name) > 0 {
                text.push_str(&format!("; {name} {}", summary[name]));
            }
        }
    }
    text
}

/// The outcome for the report, with what it comes to beside `plain`.
pub(super) fn sample(outcome: &Outcome, plain: Option<&Outcome>) -> serde_json::Result<Value> {
    let mut sample = serde_json::to_value(outcome)?;
    if let (Some(plain), Some(fields)) = (plain, sample.as_object_mut()) {
        fields.insert("saved_mib".to_owned(), json!(outcome.saved_mib(plain)));
        fields.insert("saved_share".to_owned(), json!(outcome.saved_share(plain)));
        fields.insert("saved_mib_per_cpu_second".to_owned(), json!(outcome.saved_mib_per_cpu_second(plain)));
        fields.insert("added_cpu_share".to_owned(), json!(outcome.added_cpu(plain)));
        fields.insert("slowdown_share".to_owned(), json!(outcome.slowdown(plain)));
    }
    Ok(sample)
}

/// Ratios of each way of ours to each other way, of one program under one load: of the means of all rounds.
pub(super) fn ratios(outcomes: &[Outcome]) -> Vec<Ratio> {
    let mut ratios = Vec::new();
    for ours in Rounds::of_all(outcomes).into_iter().filter(|rounds| rounds.way.is_ours()) {
        let (program, load) = (ours.first.program, ours.first.load);
        for way in [Way::Plain, Way::Ksm, Way::KsmFlatOut, Way::KsmFlatOutShared, Way::KsmAdvisor] {
            let Some(theirs) = Rounds::of(outcomes, way) else { continue };
            // A layout is nobody's merit who merges.
            if way != Way::Plain && way.is_shared_layout() != ours.way.is_shared_layout() {
                continue;
            }
            let mut add = |what: &str, unit, better, ours_is: f64, theirs_is: f64, goal| {
                let metric = format!("{} {} {}: {what}", program.name(), load.name(), ours.way.name());
                ratios.push(Ratio::new((metric, unit, better), ours_is, (way.name(), theirs_is), goal));
            };
            let merging = way != Way::Plain;
            // What nobody has promised has no goal: 0. A request that comes rarely is too small to be slowed down by a
            // share of itself; what it adds to the load of the machine is in the samples.
            let same_work = if merging || load == Load::Rare { 0.0 } else { 0.98 };
            // Whoever was not done yet has no goal against him either.
            let settled = if merging && theirs.are_settled() { 1.0 } else { 0.0 };
            let same_pace = if merging { 0.0 } else { 0.98 };
            if merging {
                let beside = |number: fn(&Outcome, &Outcome) -> f64| {
                    let positive = |outcome: &Outcome, plain: &Outcome| number(outcome, plain).max(0.0);
                    Some((ours.beside_plain(positive)?.mean, theirs.beside_plain(positive)?.mean))
                };
                // Nobody is compared with nothing.
                let saved = beside(Outcome::saved_mib).filter(|(_, theirs)| *theirs > 0.0);
                if let (Some(saved), Some(rate)) = (saved, beside(Outcome::saved_mib_per_cpu_second)) {
                    add("saved", "MiB", Better::More, saved.0, saved.1, settled);
                    add("saved for CPU", "MiB/s", Better::More, rate.0, rate.1, 5.0 * settled);
                }
            }
            let mut of = |what, unit, better, number: fn(&Outcome) -> f64, goal| {
                add(what, unit, better, ours.range(number).mean, theirs.range(number).mean, goal);
            };
            of("private memory", "bytes", Better::Less, |one| one.private_bytes, settled);
            of("requests for CPU", "1/s", Better::More, |one| one.requests_per_cpu_second, same_work);
            let late: fn(&Outcome) -> f64 = |one| one.settled_requests_per_cpu_second;
            of("requests for CPU once settled", "1/s", Better::More, late, same_work);
            of("requests", "1/s", Better::More, |one| one.requests_per_second, same_pace);
            of("all data read again", "s", Better::Less, |one| one.read_all_again_seconds, same_pace);
            of("all data read for the first time", "s", Better::Less, |one| one.read_all_first_seconds, 0.0);
            of("latency p50", "s", Better::Less, |one| one.latency.p50, 0.0);
            of("latency p99", "s", Better::Less, |one| one.latency.p99, 0.0);
            of("latency max", "s", Better::Less, |one| one.latency.max, 0.0);
        }
    }
    ratios
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::served::rounds::tests::outcome;

    /// Seen to fail: with the first round alone.
    #[test]
    fn ratios_are_those_of_the_means() {
        let ksm = |round, mib| Outcome { ksmd_passes: Some(9), ..outcome(Way::Ksm, round, mib) };
        let outcomes = [
            outcome(Way::Plain, 1, 100.0),
            outcome(Way::Pagefold, 1, 20.0),
            ksm(1, 80.0),
            outcome(Way::Plain, 2, 100.0),
            outcome(Way::Pagefold, 2, 40.0),
            ksm(2, 60.0),
        ];
        let ratios = ratios(&outcomes);
        let of = |metric: &str, against: Way| {
            let whole = format!("python busy pagefold: {metric}");
            let one = ratios.iter().find(|ratio| ratio.metric == whole && ratio.against == against.name());
            one.map(|ratio| (ratio.ours, ratio.theirs, ratio.goal))
        };
        assert_eq!(of("saved", Way::Ksm), Some((70.0, 30.0, 1.0)));
        assert_eq!(of("saved for CPU", Way::Ksm), Some((35.0, 15.0, 5.0)));
        assert_eq!(of("private memory", Way::Ksm), Some((30.0 * 1048576.0, 70.0 * 1048576.0, 1.0)));
        assert_eq!(of("requests for CPU", Way::Plain), Some((10.0, 10.0, 0.98)));
        assert_eq!(of("saved", Way::Plain), None);
    }
}
