//! What an advisor says to people.

use std::time::Duration;

use ksm::Phase;
use ksm::advise::{Decision, Summary};

/// A decision and why.
pub(super) fn line(at: Duration, decision: &Decision) -> String {
    let phase = match decision.phase {
        Phase::Boost => "boost",
        Phase::Steady => "steady",
        Phase::Idle => "rest",
    };
    let rate = decision.rate.map_or_else(String::new, |rate| {
        let (pages, sleep) = (rate.pages_to_scan, rate.sleep_millisecs);
        format!("{:.0} pages/s ({pages} every {sleep} ms); ", decision.pages_per_second)
    });
    let turn = decision.turn.map_or_else(String::new, |turn| format!("{turn}; "));
    format!("{:8.1} s  {phase:6}  {rate}{turn}{}", at.as_secs_f64(), decision.pace)
}

/// The end.
pub(super) fn table(summary: &Summary) -> String {
    let seconds = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2} s"));
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let mut rows = [
        ("ran", format!("{:.1} s", summary.elapsed_seconds)),
        (
            "phases",
            format!(
                "{:.0} s boost, {:.0} s steady, {:.0} s rest; goal not held for {:.0} s",
                summary.boost_seconds, summary.steady_seconds, summary.rest_seconds, summary.not_held_seconds
            ),
        ),
        (
            "pass time",
            format!(
                "{} (goal {} s), {} to {}; {} of {} within 20 %",
                seconds(summary.scan_time_seconds),
                summary.target_scan_time_seconds,
                seconds(summary.scan_time_min_seconds),
                seconds(summary.scan_time_max_seconds),
                summary.passes_within_20_percent,
                summary.passes_held
            ),
        ),
        (
            "ksmd",
            match summary.ksmd_cpu_seconds.zip(summary.ksmd_cpu_percent) {
                Some((cpu, percent)) => {
                    format!("{cpu:.2} s of CPU, {percent:.2} % (ceiling {:.4} %)", summary.max_cpu_percent)
                }
                None => "not to be seen here: its CPU is estimated, the ceiling cannot be checked".to_owned(),
            },
        ),
        ("pages compared", summary.pages_scanned.map_or_else(|| "not counted".to_owned(), |pages| pages.to_string())),
        ("pages merged", summary.merges.to_string()),
        (
            "saved",
            format!("{:.1} MiB, {:.1} MiB at the start", mib(summary.bytes_saved), mib(summary.bytes_saved_at_start)),
        ),
        ("advisor itself", format!("{:.2} s of CPU", summary.own_cpu_seconds)),
    ];
    if summary.passes_held == 0 {
        rows[2].1 = format!("no pass under the goal ended (goal {} s)", summary.target_scan_time_seconds);
    }
    rows.iter().map(|(what, value)| format!("  {what:15} {value}")).collect::<Vec<_>>().join("\n")
}
