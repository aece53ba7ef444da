//! The answer of `pagefold ksm status` for people.

use std::fmt::{self, Write as _};
use std::time::Duration;

use eval::{printable, size};
use ksm::Knob;
use ksm::status::{LeaseStatus, Now, PassTime, ProcessStatus, Setting, Status};

use super::words::counters;

/// Everything.
pub(super) fn table(status: &Status) -> Result<String, fmt::Error> {
    let mut text = String::new();
    settings(&mut text, status)?;
    lease(&mut text, &status.lease)?;
    counted(&mut text, status)?;
    saved(&mut text, status)?;
    speed(&mut text, status)?;
    processes(&mut text, status)?;
    groups(&mut text, status)?;
    Ok(text)
}

/// One line for the host and one for each process, to be read one below the other.
pub(super) fn lines(status: &Status, elapsed: Duration) -> Result<String, fmt::Error> {
    let (host, mut text) = (&status.host, String::new());
    let known = |count: Option<u64>| count.map_or_else(|| "-".to_owned(), |count| count.to_string());
    writeln!(
        text,
        "{:8.1} s  run {}  shared {}  sharing {}  unshared {}  volatile {}  zero {}  saved {}{}",
        elapsed.as_secs_f64(),
        known(host.number("run")),
        known(host.counters.pages_shared),
        known(host.counters.pages_sharing),
        known(host.counters.pages_unshared),
        known(host.counters.pages_volatile),
        known(host.counters.ksm_zero_pages),
        signed(host.bytes_saved),
        status.now.as_ref().map_or_else(String::new, |now| format!("  {}", fast(now))),
    )?;
    for process in &status.processes {
        writeln!(
            text,
            "    {} {}  merging {}  zero {}  items {}  saved {}",
            process.pid,
            printable(&process.comm),
            known(process.ksm.ksm_merging_pages),
            known(process.ksm.ksm_zero_pages),
            known(process.ksm.ksm_rmap_items),
            signed(process.bytes_saved)
        )?;
    }
    skipped(&mut text, status)?;
    Ok(text)
}

fn settings(text: &mut String, status: &Status) -> fmt::Result {
    writeln!(text, "settings")?;
    for knob in Knob::ALL {
        let Some(value) = status.host.settings.get(knob.file_name()) else { continue };
        let about = knob.about();
        let mut meaning = about.meaning.to_owned();
        if knob == Knob::PagesToScan && status.host.is_advised() {
            meaning.push_str(" (now the advisor's to set)");
        }
        line(text, knob.file_name(), &word(value), about.unit, &meaning)?;
    }
    writeln!(text)
}

fn word(value: &Setting) -> String {
    match value {
        Setting::Number(number) => number.to_string(),
        Setting::Word(word) => word.clone(),
    }
}

fn line(text: &mut String, name: &str, value: &str, unit: &str, meaning: &str) -> fmt::Result {
    writeln!(text, "  {name:34} {value:>14} {unit:10} {meaning}")
}

fn lease(text: &mut String, lease: &LeaseStatus) -> fmt::Result {
    if let Some(reason) = &lease.unknown {
        writeln!(text, "  {reason}\n")?;
    }
    if lease.holders.is_empty() {
        return Ok(());
    }
    writeln!(text, "held, for as long as these run:")?;
    for holder in &lease.holders {
        writeln!(text, "  {} {}  wants {}", holder.pid, printable(&holder.command), wanted(&holder.wanted))?;
    }
    let own = lease.administrator.iter().map(|(knob, value)| match knob {
        Knob::AdvisorMode => format!("{knob}={}", if value == 1 { "scan-time" } else { "none" }),
        _ => format!("{knob}={value}"),
    });
    writeln!(text, "  then again: {}", own.collect::<Vec<_>>().join(" "))?;
    if !lease.left.is_empty() {
        let names: Vec<_> = lease.left.iter().map(|knob| knob.file_name()).collect();
        writeln!(text, "  written by somebody else meanwhile, and left to him: {}", names.join(" "))?;
    }
    writeln!(text)
}

fn wanted(wanted: &ksm::Wanted) -> String {
    let mut words = Vec::new();
    let mut say = |name: &str, value: Option<String>| words.extend(value.map(|value| format!("{name}={value}")));
    let switch = |value: Option<bool>| value.map(|value| u8::from(value).to_string());
    say("run", switch(wanted.run));
    say("pages_to_scan", wanted.rate.map(|rate| rate.pages_to_scan.to_string()));
    say("sleep_millisecs", wanted.rate.map(|rate| rate.sleep_millisecs.to_string()));
    say("smart_scan", switch(wanted.smart_scan));
    say("use_zero_pages", switch(wanted.use_zero_pages));
    say("advisor_target_scan_time", wanted.advisor.map(|advisor| advisor.target_scan_time.to_string()));
    say("max_page_sharing", wanted.max_page_sharing.map(|most| most.to_string()));
    say("merge_across_nodes", switch(wanted.merge_across_nodes));
    if words.is_empty() { "nothing at the moment".to_owned() } else { words.join(" ") }
}

fn counted(text: &mut String, status: &Status) -> fmt::Result {
    writeln!(text, "counters")?;
    for counter in counters(&status.host.counters) {
        let value = counter.value.map_or_else(|| "not here".to_owned(), |value| value.to_string());
        line(text, counter.name, &value, counter.unit, counter.meaning)?;
    }
    let known = |count: Option<u64>| count.map_or_else(|| "not here".to_owned(), |count| count.to_string());
    line(text, "cow_ksm", &known(status.host.cow_ksm), "pages", "copied again since boot: written to, or unmerged")?;
    line(text, "ksm_swpin_copy", &known(status.host.ksm_swpin_copy), "pages", "copied as they came back from swap")?;
    writeln!(text)
}

fn saved(text: &mut String, status: &Status) -> fmt::Result {
    let host = &status.host;
    writeln!(text, "saved")?;
    let mut line = |name: &str, bytes: &str, meaning: &str| writeln!(text, "  {name:34} {bytes:>14} {meaning}");
    line("by merging", &size(host.bytes_sharing), &format!("in {} that stay", size(host.bytes_shared)))?;
    match host.bytes_zero_pages {
        Some(bytes) => line("by zero pages", &size(bytes), "")?,
        None => line("by zero pages", "unknown", "the kernel's counter has drifted; not in the sum")?,
    }
    if let Some(ended) = host.bytes_of_ended.filter(|bytes| *bytes > 0) {
        line("of processes that have ended", &format!("-{}", size(ended)), "counted until ksmd runs again")?;
    }
    let spaces = host.address_spaces.map_or_else(
        || ", address spaces apart: not all processes may be read".to_owned(),
        |spaces| format!(" and of {spaces} address spaces"),
    );
    let records = format!("records of {} page addresses, of merged pages{spaces}", host.rmap_items);
    line("bookkeeping", &format!("-{}", size(host.bytes_bookkeeping)), &records)?;
    line("together", &signed(host.bytes_saved), "")?;
    writeln!(text)
}

fn speed(text: &mut String, status: &Status) -> fmt::Result {
    let ksmd = status.host.ksmd.map_or_else(
        || "ksmd cannot be seen here".to_owned(),
        |ksmd| format!("ksmd (pid {}) has used {:.1} s of CPU since boot", ksmd.pid, ksmd.cpu_seconds),
    );
    match (&status.now, status.host.number("run")) {
        (Some(now), Some(1)) => writeln!(text, "now: {}; {ksmd}\n", fast(now)),
        _ => writeln!(text, "now: nothing is scanned (run is not 1); {ksmd}\n"),
    }
}

fn fast(now: &Now) -> String {
    let mut words = Vec::new();
    match now.pass {
        Some(PassTime::Measured { seconds }) => words.push(format!("a pass takes {seconds:.2} s")),
        Some(PassTime::Estimated { seconds }) => words.push(format!("a pass would take {seconds:.1} s at this rate")),
        None => words.push("no pass".to_owned()),
    }
    if let Some(rate) = now.pages_scanned_per_second {
        words.push(format!("{rate:.0} pages/s compared"));
    }
    if let Some(rate) = now.pages_skipped_per_second.filter(|rate| *rate > 0.0) {
        words.push(format!("{rate:.0} pages/s passed over"));
    }
    if let Some(percent) = now.ksmd_cpu_percent {
        words.push(format!("ksmd {percent:.1} % of a CPU"));
    }
    words.join(", ")
}

fn processes(text: &mut String, status: &Status) -> fmt::Result {
    if status.processes.is_empty() {
        writeln!(text, "no process is scanned, as far as this user may see")?;
    } else {
        writeln!(
            text,
            "  {:>8} {:15} {:7} {:>10} {:>10} {:>10} {:>11} {:>11}",
            "pid", "command", "scanned", "merged", "zero", "records", "mapped", "saved"
        )?;
    }
    for process in &status.processes {
        one_process(text, process, status.host.page_size)?;
    }
    skipped(text, status)?;
    writeln!(text)
}

fn one_process(text: &mut String, process: &ProcessStatus, page_size: u64) -> fmt::Result {
    let known = |count: Option<u64>| count.map_or_else(|| "-".to_owned(), |count| count.to_string());
    let how = match (process.ksm.ksm_merge_any, process.registered) {
        (Some(true), _) => "all",
        (_, true) => "marked",
        _ => "no",
    };
    writeln!(
        text,
        "  {:>8} {:15} {how:7} {:>10} {:>10} {:>10} {:>11} {:>11}",
        process.pid,
        printable(&process.comm),
        known(process.ksm.ksm_merging_pages),
        known(process.ksm.ksm_zero_pages),
        known(process.ksm.ksm_rmap_items),
        process.ksm_bytes.map_or_else(|| "-".to_owned(), size),
        signed(process.bytes_saved)
    )?;
    let inherited = process.inherited_bytes(page_size);
    if inherited > 0 {
        writeln!(text, "           {} of merged pages came with a fork: counted in the parent only", size(inherited))?;
    }
    if !process.shares_memory_with.is_empty() {
        let others: Vec<_> = process.shares_memory_with.iter().map(ToString::to_string).collect();
        writeln!(text, "           the same memory as {}: counted once", others.join(", "))?;
    }
    for vma in process.vmas.iter().flatten() {
        writeln!(
            text,
            "           {:>12x}-{:<12x} {:9} {:>11} {:>11} anonymous {:>11} merged  {}",
            vma.start,
            vma.end,
            if vma.mergeable { "mergeable" } else { "" },
            size(vma.rss),
            size(vma.anonymous),
            size(vma.ksm),
            printable(&vma.name)
        )?;
    }
    Ok(())
}

fn skipped(text: &mut String, status: &Status) -> fmt::Result {
    for skipped in &status.skipped {
        writeln!(text, "  {:>8} not looked at: {}", skipped.pid, skipped.reason)?;
    }
    if status.unreadable > 0 {
        writeln!(text, "  {} processes of other users may not be read; root sees them", status.unreadable)?;
    }
    Ok(())
}

fn groups(text: &mut String, status: &Status) -> fmt::Result {
    if status.cgroups.is_empty() {
        return Ok(());
    }
    writeln!(
        text,
        "  {:>9} {:>7} {:>10} {:>10} {:>10} {:>11} {:>11}  cgroup",
        "processes", "scanned", "merged", "zero", "records", "mapped", "saved"
    )?;
    for group in &status.cgroups {
        writeln!(
            text,
            "  {:>9} {:>7} {:>10} {:>10} {:>10} {:>11} {:>11}  {}",
            group.processes,
            group.registered,
            group.ksm_merging_pages,
            group.ksm_zero_pages,
            group.ksm_rmap_items,
            group.ksm_bytes.map_or_else(|| "-".to_owned(), size),
            signed(group.bytes_saved),
            printable(&group.cgroup)
        )?;
    }
    Ok(())
}

fn signed(bytes: i64) -> String {
    let sign = if bytes < 0 { "-" } else { "" };
    format!("{sign}{}", size(bytes.unsigned_abs()))
}
