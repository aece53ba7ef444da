//! What `pagefold eval --model` says, as a table.

use std::fmt::{self, Write as _};

use eval::{ModelReport, TrialReport, size as bytes};

/// Settings that a table shows beside this machine's own and the recommended ones.
const SHOWN: usize = 8;

/// The settings that were compared, and which to take.
pub(crate) fn model_table(model: &ModelReport) -> Result<String, fmt::Error> {
    let mut text = String::new();
    let minutes = model.goal_seconds / 60.0;
    writeln!(
        text,
        "  What ksmd would do if it were let loose on these pages; at least {} last from look to look.\n",
        bytes(model.bytes_reachable)
    )?;
    let percent = model.goal_share * 100.0;
    let reach = format!("{percent:.0} % after");
    writeln!(
        text,
        "  {:44} {reach:>11} {:>11} {:>9} {:>7}",
        "settings",
        format!("in {minutes:.0} min"),
        "CPU",
        "passes"
    )?;
    for (at, trial) in model.trials.iter().enumerate() {
        let chosen = model.recommended == Some(at);
        if trial.now || chosen || at < SHOWN {
            row(&mut text, trial, chosen)?;
        }
    }
    match model.recommended.and_then(|at| model.trials.get(at)) {
        Some(trial) if trial.now => {
            writeln!(
                text,
                "\n  What is set now gets there in time, with the least CPU of those compared; ksmd must run (run = 1)."
            )?;
        }
        Some(trial) => {
            writeln!(text, "\n  Recommended, since it takes the least CPU of those that get there in time:")?;
            for line in commands(trial) {
                writeln!(text, "    {line}")?;
            }
        }
        None => writeln!(
            text,
            "\n  None of these settings gets there in time: there is too little to merge, or too much to scan."
        )?,
    }
    writeln!(text)?;
    Ok(text)
}

fn row(text: &mut String, trial: &TrialReport, chosen: bool) -> fmt::Result {
    let mark = if chosen { "*" } else { " " };
    let reached = trial.reached_seconds.map_or_else(|| "never".to_owned(), |time| format!("{time:.0} s"));
    writeln!(
        text,
        "{mark} {:44} {reached:>11} {:>11} {:>7.1} s {:>7}",
        settings_name(trial),
        bytes(trial.bytes_saved),
        trial.cpu_seconds,
        trial.full_scans
    )
}

/// The settings in a few words.
pub(crate) fn settings_name(trial: &TrialReport) -> String {
    let rate = match trial.advisor_target_scan_time {
        Some(time) => format!("advisor, a pass in {time} s"),
        None => format!("{} pages every {} ms", trial.pages_to_scan, trial.sleep_millisecs),
    };
    let smart = if trial.smart_scan { ", smart_scan" } else { "" };
    let now = if trial.now { " (now)" } else { "" };
    format!("{rate}{smart}{now}")
}

/// What sets them.
fn commands(trial: &TrialReport) -> Vec<String> {
    let set = |name: &str, value: String| format!("echo {value} > /sys/kernel/mm/ksm/{name}");
    let mut lines = vec![set("smart_scan", u8::from(trial.smart_scan).to_string())];
    match trial.advisor_target_scan_time {
        Some(time) => {
            lines.push(set("advisor_mode", "scan-time".to_owned()));
            lines.push(set("advisor_target_scan_time", time.to_string()));
        }
        None => {
            lines.push(set("advisor_mode", "none".to_owned()));
            lines.push(set("pages_to_scan", trial.pages_to_scan.to_string()));
            lines.push(set("sleep_millisecs", trial.sleep_millisecs.to_string()));
        }
    }
    lines.push(set("run", "1".to_owned()));
    lines
}
