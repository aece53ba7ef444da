//! The page of a sweep: one workload under several settings of KSM.
//!
//! In the manner of the other page: no script, nothing loaded, names escaped; everything that a drawing shows stands in a
//! table too.

mod scatter;

use askama::Template;
use ksm::sweep::{Report, Run, Spread, Tried};

use super::{Series, chart, words};

/// Lines that a drawing has at most.
const LINES: usize = 6;

#[derive(Template)]
#[template(path = "sweep.html")]
struct Page {
    about: String,
    version: &'static str,
    command: String,
    intro: String,
    best: Option<String>,
    why: String,
    notes: Vec<String>,
    settings: Vec<Setting>,
    chart: Option<chart::Chart>,
    scatter: Option<scatter::Scatter>,
    runs: Vec<RunRow>,
}

/// A setting's row in both tables.
struct Setting {
    name: String,
    best: bool,
    tie: bool,
    runs: String,
    saved: Bar,
    cpu: Bar,
    time: Bar,
    efficiency: String,
    scan_time: String,
    pressure: String,
}

/// A middle value with its range, as words and as a bar of 100 units.
struct Bar {
    text: String,
    title: String,
    end: words::Px,
    low: words::Px,
    range: words::Px,
}

/// One run.
struct RunRow {
    number: usize,
    setting: String,
    saved: String,
    peak: String,
    cpu: String,
    time: String,
    passes: String,
    pressure: String,
    outcome: String,
}

/// The page of a sweep: a whole HTML document. `about` says which machine and which command made it.
#[must_use]
pub fn sweep_page(report: &Report, about: &str) -> String {
    let tried = &report.settings;
    let most = |what: fn(&Tried) -> Spread| tried.iter().map(|tried| what(tried).max).fold(0.0, f64::max);
    let (saved, cpu, time) =
        (most(|tried| tried.bytes_saved_mean), most(|tried| tried.ksmd_cpu_seconds), most(|tried| tried.run_seconds));
    let named = |name: &str| words::name(name);
    let setting = |tried: &Tried| Setting {
        name: named(&tried.setting.name),
        best: report.best.as_ref() == Some(&tried.setting.name),
        tie: report.ties.contains(&tried.setting.name),
        runs: if tried.good == tried.runs.len() {
            tried.good.to_string()
        } else {
            format!("{} of {}", tried.good, tried.runs.len())
        },
        saved: bar(tried.bytes_saved_mean, saved, |bytes| words::bytes(bytes.max(0.0) as u64)),
        cpu: bar(tried.ksmd_cpu_seconds, cpu, seconds),
        time: bar(tried.run_seconds, time, seconds),
        efficiency: tried.mib_per_cpu_second.map_or_else(dash, |spread| format!("{:.0} MiB", spread.median)),
        scan_time: tried.scan_time_seconds.map_or_else(dash, |spread| seconds(spread.median)),
        pressure: pressure(tried.memory_pressure.median, tried.cpu_pressure.median),
    };
    let page = Page {
        about: words::name(about),
        version: env!("CARGO_PKG_VERSION"),
        command: words::name(&report.command.join(" ")),
        intro: format!(
            "{} settings, {} runs of each, in turns; Linux {}, {} CPUs. What is wanted: {}.",
            tried.len(),
            report.repeat,
            words::name(&report.kernel),
            report.cpus,
            aim(report)
        ),
        best: report.best.as_deref().map(named),
        why: words::name(&report.why),
        notes: report.notes.iter().map(|note| named(note)).collect(),
        settings: tried.iter().map(setting).collect(),
        chart: chart::chart(&series(report)),
        scatter: scatter::scatter(report),
        runs: runs(report),
    };
    page.render().expect("strings and numbers can be written to a string")
}

fn aim(report: &Report) -> &'static str {
    use ksm::sweep::Aim;
    match report.goal {
        Aim::Balanced => "nine tenths of the most that can be saved, at the least CPU of ksmd, the workload not slowed",
        Aim::Saved => "the most saved",
        Aim::Efficiency => "the most saved for a second of ksmd",
        Aim::RunTime => "the shortest run, with half of the most saved",
    }
}

/// The middle run of the settings that save most, the best one first.
fn series(report: &Report) -> Vec<Series> {
    let mut order: Vec<&Tried> = report.settings.iter().filter(|tried| !tried.off && tried.good > 0).collect();
    order.sort_by(|a, b| {
        let best = |tried: &Tried| report.best.as_ref() == Some(&tried.setting.name);
        best(b).cmp(&best(a)).then(b.bytes_saved_mean.median.total_cmp(&a.bytes_saved_mean.median))
    });
    order.into_iter().take(LINES).filter_map(|tried| Some(line(&tried.setting.name, middle(tried)?))).collect()
}

/// The run whose savings are the middle one's.
fn middle(tried: &Tried) -> Option<&Run> {
    let mut good: Vec<&Run> = tried.runs.iter().filter(|run| run.counts()).collect();
    good.sort_by(|a, b| a.bytes_saved_mean.total_cmp(&b.bytes_saved_mean));
    good.get(good.len() / 2).copied()
}

fn line(name: &str, run: &Run) -> Series {
    let points = run.samples.iter().map(|sample| (sample.at_seconds, sample.bytes_saved)).collect();
    Series { name: name.to_owned(), points }
}

fn bar(spread: Spread, most: f64, text: impl Fn(f64) -> String) -> Bar {
    let at = |value: f64| if most > 0.0 { (value / most * 100.0).clamp(0.0, 100.0) } else { 0.0 };
    let (low, end, high) = (at(spread.min), at(spread.median), at(spread.max));
    Bar {
        text: text(spread.median),
        title: format!("{} to {}", text(spread.min), text(spread.max)),
        end: words::Px(end),
        low: words::Px(low),
        // So that a range of nothing is seen as a mark.
        range: words::Px((high - low).max(0.4)),
    }
}

fn runs(report: &Report) -> Vec<RunRow> {
    let mut rows: Vec<RunRow> =
        report.settings.iter().flat_map(|tried| tried.runs.iter().map(|run| row(&tried.setting.name, run))).collect();
    rows.sort_by_key(|row| row.number);
    rows
}

fn row(setting: &str, run: &Run) -> RunRow {
    let mut outcome = match (run.status, run.signal) {
        _ if run.ended => "ended, its time was over".to_owned(),
        (Some(0), _) => "done".to_owned(),
        (Some(status), _) => format!("status {status}"),
        (None, signal) => format!("signal {}", signal.unwrap_or(0)),
    };
    for (so, word) in [
        (run.taken.is_some(), "void: somebody else wrote a setting"),
        (run.disturbed, "disturbed"),
        (!run.fresh, "not from a fresh state"),
        (run.left_behind > 0, "processes left behind"),
    ] {
        if so {
            outcome.push_str(", ");
            outcome.push_str(word);
        }
    }
    RunRow {
        number: run.number + 1,
        setting: words::name(setting),
        saved: words::bytes(run.bytes_saved_mean.max(0.0) as u64),
        peak: words::bytes(run.bytes_saved_peak),
        cpu: seconds(run.ksmd_cpu_seconds),
        time: seconds(run.run_seconds),
        passes: words::count(run.passes),
        pressure: pressure(run.memory_pressure, run.cpu_pressure),
        outcome,
    }
}

fn pressure(memory: f64, cpu: f64) -> String {
    format!("{:.1} %, {:.1} %", memory * 100.0, cpu * 100.0)
}

fn seconds(seconds: f64) -> String {
    if seconds < 10.0 { format!("{seconds:.2} s") } else { format!("{seconds:.1} s") }
}

fn dash() -> String {
    "\u{2013}".to_owned()
}
