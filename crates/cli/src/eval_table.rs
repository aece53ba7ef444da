//! The answer of `pagefold eval` as a table for people.

use std::fmt::{self, Write as _};

use eval::report::{Owned, Scopes};
use eval::{Report, size as bytes};

/// Owners that a table shows.
const SHOWN: usize = 10;

/// Causes of nearly equal pages that it shows.
const CAUSES: usize = 6;

/// Everything, in the order in which one decides.
pub(crate) fn table(report: &Report) -> Result<String, fmt::Error> {
    let mut text = String::new();
    head(&mut text, report)?;
    pages(&mut text, report)?;
    apart(&mut text, report)?;
    owners(&mut text, report)?;
    sharing(&mut text, report)?;
    files(&mut text, report)?;
    near(&mut text, report)?;
    skipped(&mut text, report)?;
    Ok(text)
}

fn head(text: &mut String, report: &Report) -> fmt::Result {
    let savings = &report.savings;
    let counters = &report.totals.counters;
    let size = report.page_size;
    let reading = &report.reading;
    writeln!(
        text,
        "{} processes, {} read in {:.1} s ({}/s){}\n",
        report.processes.len(),
        bytes(counters.pages_scanned * size),
        reading.elapsed_seconds,
        bytes(reading.bytes_per_second as u64),
        reading.watched_seconds.map_or_else(String::new, |time| format!(", again after {time:.0} s")),
    )?;
    let all = (counters.pages_scanned * size).max(1) as f64;
    for (name, expected, upper) in [
        ("kernel KSM", savings.bytes_saved_ksm, savings.bytes_saved_ksm_upper),
        ("page store", savings.bytes_saved_store, savings.bytes_saved_store_upper),
    ] {
        let percent = expected.max(0) as f64 / all * 100.0;
        write!(text, "  {name:12} would save {:>11} ({percent:.0} %)", signed(expected))?;
        if expected == upper {
            writeln!(text, " after bookkeeping")?;
        } else {
            writeln!(text, " after bookkeeping, at most {}", signed(upper))?;
        }
    }
    if let Some(sample) = &report.sample {
        let percent = (sample.fraction * 1e8).round() / 1e6;
        let what = if sample.method == "pages" { "of all pages were read" } else { "of all contents were kept" };
        writeln!(
            text,
            "\n  An estimate: {percent} % {what}. Duplicates: {} to {} pages, most likely {}.",
            sample.duplicate_pages_low, sample.duplicate_pages_high, sample.duplicate_pages
        )?;
    }
    writeln!(text)
}

fn pages(text: &mut String, report: &Report) -> fmt::Result {
    let totals = &report.totals;
    let counters = &totals.counters;
    let size = report.page_size;
    let watched = totals.stable.is_some();
    let title = if watched { "volatile" } else { "" };
    writeln!(text, "  {:34} {:>11} {:>11} {title:>11}", "", "pages", "bytes")?;
    let mut line = |name: &str, pages: u64, volatile: Option<u64>| {
        let volatile = volatile.filter(|_| watched).map_or_else(String::new, |pages| pages.to_string());
        writeln!(text, "  {name:34} {pages:>11} {:>11} {volatile:>11}", bytes(pages * size))
    };
    let gone = totals.volatile.unwrap_or_default();
    line("read", counters.pages_scanned, Some(totals.volatile_pages))?;
    line("zero pages", counters.zero_pages, Some(gone.zero_pages))?;
    line("  of these inside huge pages", counters.zero_pages_in_huge, None)?;
    line("duplicates, beyond the first", counters.duplicate_pages, Some(gone.duplicate_pages))?;
    for scopes in report.duplicates.iter().filter(|scopes| scopes.by == report.groups.by) {
        let lost = |stable: fn(&eval::report::ScopePages) -> u64, all: u64| {
            // Estimates of the three are rounded one by one.
            scopes.stable.as_ref().map(|scope| all.saturating_sub(stable(scope)))
        };
        line("  within one process", scopes.within_process, lost(|s| s.within_process, scopes.within_process))?;
        line(&within(scopes), scopes.within_group, lost(|s| s.within_group, scopes.within_group))?;
        line(&between(scopes), scopes.between_groups, lost(|s| s.between_groups, scopes.between_groups))?;
    }
    line("  of these inside huge pages", totals.duplicate_pages_in_huge, None)?;
    line("different contents", counters.distinct_pages, None)?;
    line("  of these on one page only", counters.unique_pages, None)?;
    writeln!(text)
}

fn within(scopes: &Scopes) -> String {
    format!("  between processes of one {}", group_word(scopes))
}

fn between(scopes: &Scopes) -> String {
    format!("  between {}s", group_word(scopes))
}

const fn group_word(scopes: &Scopes) -> &'static str {
    match scopes.by {
        eval::GroupBy::Command => "command",
        eval::GroupBy::Cgroup => "cgroup",
        eval::GroupBy::User => "user",
    }
}

/// What no merging changes.
fn apart(text: &mut String, report: &Report) -> fmt::Result {
    let totals = &report.totals;
    let lines = [
        ("shared already after a fork", totals.already_shared_by_fork),
        ("shared already by KSM", totals.already_shared_by_ksm),
        ("shared already by a partition", totals.already_shared_by_partition),
        ("swapped out, not read", totals.swapped_pages),
        ("shared memory and memory files", totals.shared_memory_pages),
        ("gone before they could be read", report.reading.lost_pages),
    ];
    for (name, pages) in lines.into_iter().filter(|(_, pages)| *pages > 0) {
        writeln!(text, "  {name:34} {pages:>11} {:>11}", bytes(pages * report.page_size))?;
    }
    if lines.iter().any(|(_, pages)| *pages > 0) {
        writeln!(text)?;
    }
    if !report.reading.frames_seen {
        writeln!(
            text,
            "  Page frames cannot be seen (CAP_SYS_ADMIN): pages left shared by a fork are told by place and content.\n"
        )?;
    }
    Ok(())
}

fn owners(text: &mut String, report: &Report) -> fmt::Result {
    writeln!(text, "  {:42} {:>11} {:>11} {:>7}", "process", "read", "saves", "of it")?;
    for process in report.processes.iter().take(SHOWN) {
        let command = process.process.command.split_once(' ').map_or("", |(_, words)| words);
        let name = format!("{:>7} {} {command}", process.process.pid, process.process.comm);
        owner(text, &name, &process.owned, report)?;
    }
    writeln!(text, "\n  {:42} {:>11} {:>11} {:>7}", "kind of memory", "read", "saves", "of it")?;
    for kind in report.kinds.iter().filter(|kind| kind.owned.counters.pages_scanned > 0) {
        owner(text, kind.kind.text(), &kind.owned, report)?;
    }
    writeln!(text, "\n  {:42} {:>11} {:>11} {:>7}", "mapping", "read", "saves", "of it")?;
    for vma in report.vmas.iter().filter(|vma| vma.owned.bytes_saved_share > 0).take(SHOWN) {
        let what = if vma.name.is_empty() { vma.kind.text() } else { &vma.name };
        owner(text, &format!("{:>7} {} {what}", vma.pid, vma.start), &vma.owned, report)?;
    }
    writeln!(text, "\n  {:42} {:>11} {:>11}", "content", "pages", "duplicates")?;
    for class in report.classes.iter().filter(|class| class.pages > 0) {
        writeln!(text, "  {:42} {:>11} {:>11}", class.class, class.pages, class.duplicate_pages)?;
    }
    writeln!(text)
}

fn owner(text: &mut String, name: &str, owned: &Owned, report: &Report) -> fmt::Result {
    let read = owned.counters.pages_scanned * report.page_size;
    let saved = owned.bytes_saved_share_stable.unwrap_or(owned.bytes_saved_share);
    let percent = saved as f64 / read.max(1) as f64 * 100.0;
    writeln!(text, "  {:42} {:>11} {:>11} {percent:>5.0} %", shortened(name, 42), bytes(read), bytes(saved))
}

/// Who shares with whom, most first.
fn sharing(text: &mut String, report: &Report) -> fmt::Result {
    let matrix = &report.groups;
    let mut pairs = Vec::new();
    for (one, row) in matrix.pages.iter().enumerate() {
        for (other, pages) in row.iter().enumerate().skip(one).filter(|(_, pages)| **pages > 0) {
            pairs.push((*pages, one, other));
        }
    }
    pairs.sort_unstable_by(|one, other| other.cmp(one));
    if pairs.is_empty() {
        return Ok(());
    }
    writeln!(text, "  {:54} {:>11}", "who shares with whom", "contents")?;
    for (pages, one, other) in pairs.into_iter().take(SHOWN) {
        let name = if one == other {
            format!("{}, among themselves", matrix.names[one])
        } else {
            format!("{} and {}", matrix.names[one], matrix.names[other])
        };
        writeln!(text, "  {:54} {pages:>11}", shortened(&name, 54))?;
    }
    writeln!(text)
}

/// What sharing files would be worth.
fn files(text: &mut String, report: &Report) -> fmt::Result {
    let Some(files) = report.files.as_ref().filter(|files| files.duplicate_pages > 0) else { return Ok(()) };
    writeln!(
        text,
        "  Files that lie in the page cache more than once: sharing the layer or image would save {}.",
        bytes(files.bytes_saved)
    )?;
    for name in files.names.iter().take(SHOWN) {
        let count = format!("{} ({} files)", name.name, name.files.len());
        writeln!(text, "  {:54} {:>11}", shortened(&count, 54), name.duplicate_pages)?;
    }
    writeln!(text)
}

/// Why pages are only nearly equal.
fn near(text: &mut String, report: &Report) -> fmt::Result {
    let Some(near) = &report.near else { return Ok(()) };
    writeln!(text, "  {:42} {:>11} {:>11}", "nearly equal pages, by why they differ", "pages", "worth")?;
    for reason in near.causes.iter().take(CAUSES) {
        writeln!(text, "  {:42} {:>11} {:>11}", reason.cause, reason.pages, bytes(reason.bytes_worth))?;
        writeln!(text, "    -> {}", reason.remedy)?;
        if let Some(pair) = &reason.example {
            write!(text, "    e.g. {} {} and {} {}", pair.pid, pair.address, pair.other_pid, pair.other_address)?;
            match pair.differs_at.first() {
                Some(word) => writeln!(text, ": at {:#x} {} and {}", word.offset, word.one, word.other)?,
                None => writeln!(text)?,
            }
        }
    }
    let ahead = near.populated_ahead_pages;
    writeln!(text, "  {:42} {ahead:>11} {:>11}", "zero pages populated ahead of use", bytes(ahead * report.page_size))?;
    writeln!(text, "    -> leave them out: a merge takes them from a program that is about to need them\n")
}

fn skipped(text: &mut String, report: &Report) -> fmt::Result {
    if report.skipped.is_empty() {
        return Ok(());
    }
    writeln!(text, "  {} processes were not looked at:", report.skipped.len())?;
    for skipped in report.skipped.iter().take(SHOWN) {
        writeln!(text, "  {:>7} {}: {}", skipped.pid, skipped.comm, skipped.reason)?;
    }
    Ok(())
}

fn shortened(name: &str, most: usize) -> String {
    let name = eval::printable(name);
    if name.chars().count() <= most {
        return name;
    }
    name.chars().take(most - 1).chain(['…']).collect()
}

fn signed(amount: i64) -> String {
    if amount < 0 { format!("-{}", bytes(amount.unsigned_abs())) } else { bytes(amount.unsigned_abs()) }
}
