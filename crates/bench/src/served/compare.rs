//! Lines for people, and ratios of pagefold to the other ways in the same run.

use serde_json::{Value, json};

use super::load::Load;
use super::measure::Outcome;
use super::way::Way;
use crate::report::{Better, Ratio};

/// A line of the table; `plain` is of the same program and load.
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
            share(outcome, plain) * 100.0,
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
        fields.insert("saved_share".to_owned(), json!(share(outcome, plain)));
        fields.insert("saved_mib_per_cpu_second".to_owned(), json!(outcome.saved_mib_per_cpu_second(plain)));
        fields.insert("added_cpu_share".to_owned(), json!(outcome.added_cpu(plain)));
        fields.insert("slowdown_share".to_owned(), json!(outcome.slowdown(plain)));
    }
    Ok(sample)
}

/// What is saved of the private memory that the workers have in `plain`.
fn share(outcome: &Outcome, plain: &Outcome) -> f64 {
    if plain.private_bytes > 0.0 { 1.0 - outcome.private_bytes / plain.private_bytes } else { 0.0 }
}

/// Ratios of each way of ours to each other way, of one program under one load.
pub(super) fn ratios(outcomes: &[Outcome]) -> Vec<Ratio> {
    let of = |way: Way| outcomes.iter().find(|outcome| outcome.way == way);
    let mut ratios = Vec::new();
    for ours in outcomes.iter().filter(|outcome| outcome.way.is_ours()) {
        let mut add = |what: &str, unit, better, ours_is: f64, theirs: (&'static str, f64), goal| {
            let metric = format!("{} {} {}: {what}", ours.program.name(), ours.load.name(), ours.way.name());
            ratios.push(Ratio::new((metric, unit, better), ours_is, theirs, goal));
        };
        let plain = of(Way::Plain);
        for way in [Way::Plain, Way::Ksm, Way::KsmFlatOut, Way::KsmFlatOutShared, Way::KsmAdvisor] {
            let Some(theirs) = of(way) else { continue };
            // A layout is nobody's merit who merges.
            if way != Way::Plain && way.is_shared_layout() != ours.way.is_shared_layout() {
                continue;
            }
            let name = way.name();
            let merging = way != Way::Plain;
            // What nobody has promised has no goal: 0. A request that comes rarely is too small to be slowed down by a
            // share of itself; what it adds to the load of the machine is in the samples.
            let same_work = if merging || ours.load == Load::Rare { 0.0 } else { 0.98 };
            // Whoever was not done yet has no goal against him either.
            let goal = if merging && theirs.is_settled() { 1.0 } else { 0.0 };
            add("private memory", "bytes", Better::Less, ours.private_bytes, (name, theirs.private_bytes), goal);
            if let Some(plain) = plain.filter(|_| merging) {
                let saved = |outcome: &Outcome| outcome.saved_mib(plain).max(0.0);
                let rate = |outcome: &Outcome| outcome.saved_mib_per_cpu_second(plain).max(0.0);
                // Nobody is compared with nothing.
                if saved(theirs) > 0.0 {
                    add("saved", "MiB", Better::More, saved(ours), (name, saved(theirs)), goal);
                    add("saved for CPU", "MiB/s", Better::More, rate(ours), (name, rate(theirs)), 5.0 * goal);
                }
            }
            let work = |outcome: &Outcome| outcome.requests_per_cpu_second;
            add("requests for CPU", "1/s", Better::More, work(ours), (name, work(theirs)), same_work);
            let work = |outcome: &Outcome| outcome.settled_requests_per_cpu_second;
            add("requests for CPU once settled", "1/s", Better::More, work(ours), (name, work(theirs)), same_work);
            let rate = |outcome: &Outcome| outcome.requests_per_second;
            add("requests", "1/s", Better::More, rate(ours), (name, rate(theirs)), if merging { 0.0 } else { 0.98 });
            let again = |outcome: &Outcome| outcome.read_all_again_seconds;
            let goal = if merging { 0.0 } else { 0.98 };
            add("all data read again", "s", Better::Less, again(ours), (name, again(theirs)), goal);
            let first = |outcome: &Outcome| outcome.read_all_first_seconds;
            add("all data read for the first time", "s", Better::Less, first(ours), (name, first(theirs)), 0.0);
            let [mine, other] = [ours.latency, theirs.latency];
            add("latency p50", "s", Better::Less, mine.p50, (name, other.p50), 0.0);
            add("latency p99", "s", Better::Less, mine.p99, (name, other.p99), 0.0);
            add("latency max", "s", Better::Less, mine.max, (name, other.max), 0.0);
        }
    }
    ratios
}
