//! The page of a sweep, as a browser reads it.
#![allow(clippy::unwrap_used, reason = "tests")]

mod browser;

use browser::{Browser, count};
use ksm::sweep::{Aim, Report, Run, Sample, Setting, Spread, Tried};
use pagefold_eval::sweep_page;

fn spread(median: f64) -> Spread {
    let (min, max) = (median * 0.9, median * 1.15);
    Spread { median, min, max, low: min, high: max }
}

fn run(number: usize, saved: f64, cpu: f64, seconds: f64) -> Run {
    let samples = (0..60_u32)
        .map(|at| {
            let part = f64::from(at) / 60.0;
            let bytes_saved = (saved * 1.2 * (1.0 - (-8.0 * part).exp())) as u64;
            Sample { at_seconds: part * seconds, bytes_saved, ksmd_cpu_seconds: cpu * part, ..Sample::default() }
        })
        .collect();
    Run {
        number,
        run_seconds: seconds,
        cpu_seconds: seconds / 2.0,
        status: Some(0),
        signal: None,
        ended: false,
        left_behind: 0,
        ksmd_cpu_seconds: cpu,
        bytes_saved_mean: saved,
        bytes_saved_peak: (saved * 1.2) as u64,
        bytes_saved_end: saved as u64,
        passes: 12,
        scan_time_seconds: Some(1.5),
        memory_pressure: 0.0,
        cpu_pressure: 0.125,
        disturbed: number == 3,
        taken: None,
        fresh: true,
        samples,
    }
}

/// `saved` in MiB.
fn tried(place: usize, text: &str, saved: f64, cpu: f64, seconds: f64) -> Tried {
    let saved = saved * f64::from(1 << 20);
    Tried {
        setting: Setting::parse(text).unwrap(),
        off: text.contains("off"),
        good: 2,
        run_seconds: spread(seconds),
        cpu_seconds: spread(seconds / 2.0),
        ksmd_cpu_seconds: spread(cpu),
        bytes_saved_mean: spread(saved),
        bytes_saved_peak: spread(saved * 1.2),
        mib_per_cpu_second: (cpu > 0.0).then(|| spread(saved / f64::from(1 << 20) / cpu)),
        scan_time_seconds: (cpu > 0.0).then(|| spread(1.5)),
        memory_pressure: spread(0.0),
        cpu_pressure: spread(0.125),
        runs: vec![run(place, saved, cpu, seconds), run(place + 10, saved * 0.95, cpu, seconds)],
    }
}

fn report() -> Report {
    let evil = "<b>EVIL</b><img src=x onerror=alert(1)>\u{202e}: pages_to_scan=4000 sleep_millisecs=20 smart_scan=0";
    let settings = vec![
        tried(0, "off", 0.0, 0.0, 20.0),
        tried(1, "the kernel's default: pages_to_scan=100", 12.0, 0.31, 20.1),
        tried(2, "pages_to_scan=1000 sleep_millisecs=20 smart_scan=1", 71.0, 1.2, 20.2),
        tried(3, evil, 88.0, 5.3, 21.0),
        tried(4, "the kernel's advisor: advisor_mode=scan-time", 60.0, 2.1, 20.6),
        tried(5, "pagefold's advisor: advise_scan_time=5 advise_max_cpu=70", 86.0, 0.9, 20.1),
    ];
    Report {
        command: vec!["python3".to_owned(), "</title><script>alert(1)</script>".to_owned()],
        complete: true,
        repeat: 2,
        goal: Aim::Balanced,
        best: Some("pagefold's advisor".to_owned()),
        ties: vec![settings[3].setting.name.clone()],
        why: "of 2 of 6 settings it used the least <of a processor>".to_owned(),
        kernel: "6.18.44".to_owned(),
        cpus: 2,
        ksmd_seen: true,
        notes: vec!["1 runs were disturbed".to_owned()],
        settings,
    }
}

#[test]
fn a_browser_shows_every_setting_and_run_and_names_stay_words() {
    let page = sweep_page(&report(), "host: pagefold ksm sweep <all>");
    for word in ["<b>", "<img", "<script", "\u{202e}", "<all>"] {
        assert!(!page.contains(word), "{word}");
    }
    let Some(browser) = Browser::find() else { return };
    let shown = browser.show("sweep", &page);
    assert_eq!(shown.console, "", "the browser complains");
    let dom = &shown.dom;
    assert_eq!((count(dom, "<h1"), count(dom, "<main")), (1, 1));
    assert_eq!(count(dom, "<polyline"), 5, "all but off");
    assert_eq!(count(dom, "<circle"), 6, "a point for each setting");
    assert_eq!(count(dom, "class=\"point best\""), 1);
    assert!(dom.contains("EVIL") && dom.contains("(best)") && dom.contains("(perhaps)") && dom.contains("disturbed"));
    assert_eq!(count(dom, "role=\"img\"") + count(dom, "aria-hidden=\"true\""), count(dom, "<svg"));
    for id in ["best", "settings", "time", "runs"] {
        assert!(dom.contains(&format!("<section id=\"{id}\"")) && dom.contains(&format!("href=\"#{id}\"")), "{id}");
    }
}

#[test]
fn a_sweep_without_runs_has_a_page_too() {
    let mut report = report();
    report.settings.iter_mut().for_each(|tried| (tried.runs, tried.good) = (Vec::new(), 0));
    (report.best, report.ties) = (None, Vec::new());
    let page = sweep_page(&report, "");
    assert!(page.contains("None.") && !page.contains("<polyline") && !page.contains("<circle"));
    report.settings.clear();
    assert!(sweep_page(&report, "").ends_with("</html>"));
}
