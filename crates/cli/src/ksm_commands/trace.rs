//! `pagefold ksm trace`: passes and merges as they happen.

use std::fmt::{self, Write as _};
use std::os::fd::AsFd as _;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use eval::{printable, size};
use kernel::signals::SignalFd;
use kernel::{Signal, pidfd};
use ksm::KsmSysfs;
use ksm::trace::{ProcessTrace, TraceReport, Tracer};

use crate::args::ksm_trace::TraceArgs;
use crate::{NOT_HERE, say};

/// How often records are taken in: the buffers hold several times what ksmd can write meanwhile.
const TICK: Duration = Duration::from_millis(100);
/// Bars of the histogram are at most so wide.
const WIDTH: u64 = 40;
/// Processes that a table shows.
const SHOWN: usize = 20;

/// Traces until the time is over or a signal says that it is enough.
pub(crate) fn trace(args: &TraceArgs) -> anyhow::Result<ExitCode> {
    // Before anything is made that a signal would leave behind.
    let signals =
        SignalFd::block(&[Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT]).context("cannot block signals")?;
    let mut tracer = match Tracer::start() {
        Ok(tracer) => tracer,
        Err(error) if error.is_not_here() => {
            say::note(format_args!(
                "{:#}; it needs root (CAP_SYS_ADMIN, and a kernel that is not locked down)",
                anyhow::Error::new(error)
            ));
            return Ok(ExitCode::from(NOT_HERE));
        }
        Err(error) if error.is_missing() => {
            say::note(format_args!("{:#}: the events of KSM came with Linux 6.4", anyhow::Error::new(error)));
            return Ok(ExitCode::from(NOT_HERE));
        }
        Err(error) => return Err(error.into()),
    };
    if !args.quiet {
        for name in tracer.removed() {
            say::note(format_args!("removed {name}, which a killed trace had left"));
        }
        if KsmSysfs::host().number("run").ok().flatten() != Some(1) {
            say::note("ksmd stands still (run is not 1): nothing will be seen until it runs");
        }
    }
    let end = args.duration.map(|seconds| Instant::now() + Duration::from_secs_f64(seconds));
    let mut said = None;
    loop {
        let rest = end.map_or(TICK, |end| TICK.min(end.saturating_duration_since(Instant::now())));
        let asked = pidfd::poll_in(signals.as_fd(), Some(rest)).context("cannot wait for signals")?;
        tracer.tick()?;
        if let Some(second) = tracer.last_second().filter(|second| !args.quiet && Some(second.second) != said) {
            said = Some(second.second);
            say::lines(&format!(
                "{:5} s  {} passes  {} merged  {} zero pages  {} failed\n",
                second.second, second.passes, second.merged, second.zero_pages, second.failed
            ));
        }
        if asked || end.is_some_and(|end| Instant::now() >= end) {
            break;
        }
    }
    let mut report = tracer.finish()?;
    if !args.pid.is_empty() {
        report.processes.retain(|process| args.pid.contains(&process.pid));
    }
    let text = match args.json {
        true => format!("{}\n", serde_json::to_string_pretty(&report)?),
        false => table(&report)?,
    };
    say::answer(&text)?;
    Ok(ExitCode::SUCCESS)
}

fn table(report: &TraceReport) -> Result<String, fmt::Error> {
    let mut text = String::new();
    if report.lost_events > 0 {
        writeln!(text, "{} events were lost: all counts are too small\n", report.lost_events)?;
    }
    passes(&mut text, report)?;
    let merges = &report.merges;
    let each = |count: u64| format!("{count:>10}  {:>10.1}/s", count as f64 / report.seconds.max(1e-3));
    writeln!(text, "merged")?;
    writeln!(text, "  joined an equal page   {}", each(merges.joined))?;
    writeln!(text, "  became the first one   {}", each(merges.promoted))?;
    writeln!(text, "  became the zero page   {}", each(merges.zero_pages))?;
    writeln!(text, "  could not be merged    {}", each(report.failures.sum()))?;
    for (error, count) in &report.failures.0 {
        writeln!(text, "    {error:20} {}", each(*count))?;
    }
    writeln!(
        text,
        "  {} address spaces came, {} ended, {} merged pages lost their last user\n",
        report.entered, report.exited, report.ksm_pages_removed
    )?;
    if let Some(last) = report.advisor.last() {
        writeln!(
            text,
            "advisor: {} runs; the last took the pass for {} s, ksmd for {} %, and set pages_to_scan={}\n",
            report.advisor.len(),
            last.scan_time,
            last.cpu_percent,
            last.pages_to_scan
        )?;
    }
    processes(&mut text, report)?;
    writeln!(
        text,
        "\n{} events in {:.1} s; the trace took {} of buffers and {:.2} s of CPU here",
        report.events,
        report.seconds,
        size(report.buffer_bytes),
        report.cpu_seconds
    )?;
    Ok(text)
}

fn passes(text: &mut String, report: &TraceReport) -> fmt::Result {
    let passes = &report.passes;
    let (Some(shortest), Some(median), Some(longest)) =
        (passes.shortest_seconds, passes.median_seconds, passes.longest_seconds)
    else {
        let under_way = passes
            .under_way_seconds
            .map_or_else(String::new, |seconds| format!("; one has been going for {seconds:.1} s"));
        return writeln!(text, "no pass was seen from begin to end{under_way}\n");
    };
    writeln!(
        text,
        "{} passes: {} at the shortest, {} for half of them, {} at the longest",
        passes.completed,
        time(shortest),
        time(median),
        time(longest)
    )?;
    let most = passes.histogram.iter().map(|bar| bar.passes).max().unwrap_or(1).max(1);
    for bar in &passes.histogram {
        let width = (bar.passes * WIDTH).div_ceil(most) as usize;
        writeln!(text, "  below {:>8}  {:>8}  {}", time(bar.below_seconds), bar.passes, "#".repeat(width))?;
    }
    writeln!(text)
}

fn time(seconds: f64) -> String {
    if seconds < 1.0 { format!("{:.1} ms", seconds * 1e3) } else { format!("{seconds:.2} s") }
}

fn processes(text: &mut String, report: &TraceReport) -> fmt::Result {
    if !report.can_attribute {
        writeln!(text, "this kernel has no event (mmap_lock) by which processes could be told apart")?;
    }
    if report.processes.is_empty() && report.unattributed.address_spaces == 0 {
        return writeln!(text, "no process had a page merged");
    }
    writeln!(text, "  {:>8} {:15} {:>10} {:>10} {:>10} {:>10}", "pid", "command", "joined", "first", "zero", "failed")?;
    let mut line = |pid: &str, comm: &str, process: &ProcessTrace| {
        let merges = &process.merges;
        let ended = if process.ended { "  ended" } else { "" };
        writeln!(
            text,
            "  {pid:>8} {comm:15} {:>10} {:>10} {:>10} {:>10}{ended}",
            merges.joined, merges.promoted, merges.zero_pages, process.failed
        )
    };
    for process in report.processes.iter().take(SHOWN) {
        line(&process.pid.to_string(), &printable(&process.comm), process)?;
    }
    let others = &report.unattributed;
    if others.address_spaces > 0 {
        line("-", &format!("{} not known", others.address_spaces), others)?;
    }
    if report.processes.len() > SHOWN {
        writeln!(text, "  and {} more (--json has all)", report.processes.len() - SHOWN)?;
    }
    Ok(())
}
