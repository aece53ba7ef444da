//! What a sweep says to people.

use ksm::sweep::{Report, Run, Spread};

/// How a run ended, on one line.
pub(super) fn ended(run: &Run) -> String {
    let mut text = format!(
        "  {:.2} s, {:.1} MiB saved on average, ksmd {:.2} s",
        run.run_seconds,
        mib(run.bytes_saved_mean),
        run.ksmd_cpu_seconds
    );
    match (run.status, run.signal) {
        _ if run.ended => {}
        (Some(0), _) => {}
        (Some(status), _) => text.push_str(&format!("; it ended with status {status}, which does not count")),
        (None, signal) => {
            text.push_str(&format!("; it was killed by signal {}, which does not count", signal.unwrap_or(0)));
        }
    }
    if let Some(knob) = run.taken {
        text.push_str(&format!("; void: somebody else wrote {knob} meanwhile"));
    }
    if run.disturbed {
        text.push_str("; somebody else drove ksmd meanwhile");
    }
    text
}

/// The end: a row for each setting, the best one and why.
pub(super) fn table(report: &Report) -> String {
    let width = report.settings.iter().map(|tried| tried.setting.name.chars().count()).max().unwrap_or(0).max(7);
    let mut text = format!(
        "\n  {:width$}  {:>5}  {:>17}  {:>8}  {:>15}  {:>15}  {:>9}\n",
        "setting", "runs", "saved, MiB", "MiB/CPUs", "ksmd, s", "run, s", "pass, s"
    );
    for tried in &report.settings {
        let mark = match &tried.setting.name {
            name if report.best.as_ref() == Some(name) => '*',
            name if report.ties.contains(name) => '?',
            _ => ' ',
        };
        text.push_str(&format!(
            "{mark} {:width$}  {:>5}  {:>17}  {:>8}  {:>15}  {:>15}  {:>9}\n",
            tried.setting.name,
            format!("{}/{}", tried.good, tried.runs.len()),
            range(tried.bytes_saved_mean, f64::from(1 << 20), 1),
            tried.mib_per_cpu_second.map_or_else(|| "-".to_owned(), |spread| format!("{:.0}", spread.median)),
            range(tried.ksmd_cpu_seconds, 1.0, 2),
            range(tried.run_seconds, 1.0, 2),
            tried.scan_time_seconds.map_or_else(|| "-".to_owned(), |spread| format!("{:.2}", spread.median)),
        ));
    }
    match &report.best {
        Some(best) => text.push_str(&format!("\nbest: {best}\n  {}\n", report.why)),
        None => text.push_str(&format!("\nno best setting: {}\n", report.why)),
    }
    for note in &report.notes {
        text.push_str(&format!("note: {note}\n"));
    }
    text
}

/// The middle one, and half of the range.
fn range(spread: Spread, unit: f64, digits: usize) -> String {
    format!("{:.digits$} \u{b1}{:.digits$}", spread.median / unit, (spread.max - spread.min) / 2.0 / unit)
}

fn mib(bytes: f64) -> f64 {
    bytes / f64::from(1 << 20)
}
