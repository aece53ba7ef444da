//! What `merge` and `unmerge` tell people.

use std::fmt::{self, Write as _};

use eval::size as bytes;
use ksm::request::{End, Report, UnmergeReport};

/// Processes that a table shows.
const SHOWN: usize = 20;

/// What a merge has come to.
pub(super) fn merged(report: &Report) -> Result<String, fmt::Error> {
    let mut text = String::new();
    let page = kernel::page_size();
    if report.end == End::Marked {
        writeln!(text, "{} marked for ksmd in {:.2} s\n", bytes(report.pages_marked * page), report.elapsed_seconds)?;
    } else {
        writeln!(
            text,
            "{} saved: {} of {} marked pages merged in {:.2} s\n",
            bytes(report.bytes_saved),
            report.pages_merged,
            report.pages_marked,
            report.elapsed_seconds
        )?;
    }
    let mut line = |name: &str, pages: u64| writeln!(text, "  {name:44} {pages:>11} {:>11}", bytes(pages * page));
    line("pages read", report.pages_read)?;
    line("  merged before (further mappings)", report.pages_merged_before)?;
    line("  changed while they were looked at", report.pages_volatile)?;
    line("  with an equal page", report.pages_with_partner)?;
    if report.huge_pages_left > 0 {
        line("  with an equal page, in huge pages left whole", report.pages_left_huge)?;
    }
    line("marked", report.pages_marked)?;
    let besides: u64 = report.processes.iter().map(|process| process.pages_marked_besides).sum();
    let over: u64 = report.processes.iter().map(|process| process.pages_over_budget).sum();
    if besides > 0 {
        line("  others between them", besides)?;
    }
    if over > 0 {
        line("not marked: too many mappings", over)?;
    }
    line("merged", report.pages_merged)?;
    if report.zero_pages_merged > 0 {
        line("  with the zero page", report.zero_pages_merged)?;
    }
    for (reason, pages) in &report.refused {
        line(&format!("not merged: {}", reason.replace('_', " ")), *pages)?;
    }
    for (reason, pages) in &report.pages_not_eligible {
        line(&format!("not looked at: {}", reason.replace('_', " ")), *pages)?;
    }
    writeln!(text)?;
    if report.huge_pages_left + report.huge_pages_to_split > 0 {
        writeln!(
            text,
            "  {} huge pages were worth splitting, {} were left whole",
            report.huge_pages_to_split, report.huge_pages_left
        )?;
    }
    if report.end != End::Marked && report.scan_seconds > 0.0 {
        let cpu = report.ksmd_cpu_seconds.map_or_else(String::new, |cpu| format!(", {cpu:.2} s of CPU"));
        writeln!(
            text,
            "  ksmd: {:.2} s{cpu}, {} passes, {} pages, {} of them of other processes",
            report.scan_seconds, report.full_scans, report.pages_scanned, report.pages_scanned_of_others
        )?;
    }
    writeln!(
        text,
        "\n  {:>9} {:>11} {:>11} {:>9} {:>9} {:>12}",
        "process", "marked", "merged", "runs", "mappings", "stopped"
    )?;
    for process in report.processes.iter().take(SHOWN) {
        writeln!(
            text,
            "  {:>9} {:>11} {:>11} {:>9} {:>9} {:>9.3} ms",
            process.pid,
            process.pages_marked,
            process.pages_merged,
            process.runs_marked,
            process.vmas_added,
            process.stopped_seconds * 1e3
        )?;
    }
    if report.processes.len() > SHOWN {
        writeln!(text, "  and {} more", report.processes.len() - SHOWN)?;
    }
    Ok(text)
}

/// What un-merging has come to.
pub(super) fn unmerged(report: &UnmergeReport) -> Result<String, fmt::Error> {
    let mut text = String::new();
    let page = kernel::page_size();
    let seconds = report.elapsed_seconds;
    match report.processes.iter().map(|process| process.pages_unmerged).sum::<Option<u64>>() {
        Some(pages) => writeln!(text, "{pages} pages un-merged ({}) in {seconds:.2} s\n", bytes(pages * page))?,
        None => {
            writeln!(text, "un-merged in {seconds:.2} s; how many pages that were is unknown without CAP_SYS_ADMIN\n")?;
        }
    }
    writeln!(text, "  {:>9} {:>11} {:>14} {:>12}", "process", "un-merged", "address space", "stopped")?;
    for process in report.processes.iter().take(SHOWN) {
        writeln!(
            text,
            "  {:>9} {:>11} {:>14} {:>9.3} ms",
            process.pid,
            process.pages_unmerged.map_or_else(|| "unknown".to_owned(), |pages| pages.to_string()),
            bytes(process.bytes_unmarked),
            process.stopped_seconds * 1e3
        )?;
    }
    if report.processes.len() > SHOWN {
        writeln!(text, "  and {} more", report.processes.len() - SHOWN)?;
    }
    Ok(text)
}
