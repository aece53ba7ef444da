//! Tables of the whole, and the bars in them.

use super::NearCause;
use super::words::{Px, bytes, count, name, percent, share, signed};
use crate::GroupBy;
use crate::report::{Report, ScopePages, Scopes};

/// A headline figure.
pub(super) struct Figure {
    pub(super) name: &'static str,
    pub(super) value: String,
    pub(super) note: String,
}

/// A row of pages.
pub(super) struct Pages {
    pub(super) name: String,
    pub(super) part: bool,
    pub(super) pages: String,
    pub(super) bytes: String,
    pub(super) stable: String,
    pub(super) volatile: String,
}

/// A row with a bar.
pub(super) struct Bar {
    pub(super) name: String,
    pub(super) pages: String,
    pub(super) saved: String,
    pub(super) stable: String,
    pub(super) volatile: String,
    pub(super) title: String,
    /// Where the parts of the bar end, in percent of the longest.
    pub(super) stable_end: Px,
    pub(super) end: Px,
}

/// Duplicates by how far apart they are, for one way to take processes together.
pub(super) struct Scope {
    pub(super) name: String,
    pub(super) title: String,
    pub(super) parts: [Part; 3],
}

/// One of the three scopes.
pub(super) struct Part {
    pub(super) pages: String,
    pub(super) stable: Option<String>,
    pub(super) start: Px,
    pub(super) width: Px,
}

/// A cause of pages that almost equal others.
pub(super) struct Near {
    pub(super) cause: String,
    pub(super) pages: String,
    pub(super) saved: String,
    pub(super) remedy: String,
}

/// What is said of the whole first.
pub(super) fn headline(report: &Report) -> Vec<Figure> {
    let (savings, counters) = (&report.savings, &report.totals.counters);
    let read = counters.pages_scanned * report.page_size;
    let saving = |name, expected: i64, upper: i64| {
        let part = percent(expected.max(0).unsigned_abs(), read);
        let most = if expected == upper { String::new() } else { format!(", at most {}", signed(upper)) };
        Figure { name, value: signed(expected), note: format!("{part} of what was read, after bookkeeping{most}") }
    };
    let pages = |name, pages: u64, stable: Option<u64>| {
        let lasting = stable.map_or_else(String::new, |stable| format!(", {} of them stable", percent(stable, pages)));
        let note =
            format!("{} pages, {} of what was read{lasting}", count(pages), percent(pages * report.page_size, read));
        Figure { name, value: bytes(pages * report.page_size), note }
    };
    let stable = report.totals.stable;
    vec![
        saving("Kernel KSM would save", savings.bytes_saved_ksm, savings.bytes_saved_ksm_upper),
        saving("The page store would save", savings.bytes_saved_store, savings.bytes_saved_store_upper),
        pages("Duplicates", counters.duplicate_pages, stable.map(|stable| stable.duplicate_pages)),
        pages("Zero pages", counters.zero_pages, stable.map(|stable| stable.zero_pages)),
    ]
}

/// What pages were found to be.
pub(super) fn pages(report: &Report) -> Vec<Pages> {
    let totals = &report.totals;
    let counters = &totals.counters;
    let stable = totals.stable;
    let row = |name: &str, part, pages: u64, stable: Option<u64>| Pages {
        name: name.to_owned(),
        part,
        pages: count(pages),
        bytes: bytes(pages * report.page_size),
        stable: stable.map_or_else(String::new, count),
        volatile: stable.map_or_else(String::new, |stable| count(pages.saturating_sub(stable))),
    };
    let mut rows = vec![
        row("Read", false, counters.pages_scanned, stable.map(|stable| stable.pages_scanned)),
        row("Zero pages", false, counters.zero_pages, stable.map(|stable| stable.zero_pages)),
        row("inside huge pages", true, counters.zero_pages_in_huge, stable.map(|stable| stable.zero_pages_in_huge)),
        row(
            "Duplicates, beyond the first",
            false,
            counters.duplicate_pages,
            stable.map(|stable| stable.duplicate_pages),
        ),
    ];
    for scopes in report.duplicates.iter().filter(|scopes| scopes.by == report.groups.by) {
        let by = group_word(scopes.by);
        let lasting = |of: fn(&ScopePages) -> u64| scopes.stable.as_ref().map(of);
        let between = format!("between processes of one {by}");
        rows.push(row("within one process", true, scopes.within_process, lasting(|scope| scope.within_process)));
        rows.push(row(&between, true, scopes.within_group, lasting(|scope| scope.within_group)));
        rows.push(row(&format!("between {by}s"), true, scopes.between_groups, lasting(|scope| scope.between_groups)));
    }
    rows.push(row("inside huge pages", true, totals.duplicate_pages_in_huge, None));
    rows.push(row("Different contents", false, counters.distinct_pages, None));
    rows.push(row("on one page only", true, counters.unique_pages, None));
    rows
}

/// What no merging changes; empty where there is nothing of it.
pub(super) fn apart(report: &Report) -> Vec<Pages> {
    let totals = &report.totals;
    let rows = [
        ("Shared already after a fork", totals.already_shared_by_fork),
        ("Shared already by KSM", totals.already_shared_by_ksm),
        ("Shared already by a partition", totals.already_shared_by_partition),
        ("Swapped out, not read", totals.swapped_pages),
        ("Shared memory and memory files", totals.shared_memory_pages),
        ("Gone before they could be read", report.reading.lost_pages),
    ];
    let row = |(name, pages): (&str, u64)| Pages {
        name: name.to_owned(),
        part: false,
        pages: count(pages),
        bytes: bytes(pages * report.page_size),
        stable: String::new(),
        volatile: String::new(),
    };
    rows.into_iter().filter(|(_, pages)| *pages > 0).map(row).collect()
}

/// What merging saves by what a page holds.
pub(super) fn classes(report: &Report) -> Vec<Bar> {
    let watched = report.totals.stable.is_some();
    let size = report.page_size;
    let rows = report.classes.iter().filter(|class| class.pages > 0);
    bars(rows.map(|class| {
        let saved = class.duplicate_pages * size;
        let stable = class.duplicate_pages.saturating_sub(class.volatile_duplicate_pages) * size;
        (class.class, class.pages, saved, watched.then_some(stable))
    }))
}

/// What merging saves by what a mapping is for.
pub(super) fn kinds(report: &Report) -> Vec<Bar> {
    let rows = report.kinds.iter().filter(|kind| kind.owned.counters.pages_scanned > 0);
    bars(rows.map(|kind| {
        let owned = &kind.owned;
        let (saved, stable) = (owned.bytes_saved_share, owned.bytes_saved_share_stable);
        (kind.kind.text(), owned.counters.pages_scanned, saved, stable)
    }))
}

/// Name, pages, bytes saved, those of them that last.
fn bars(rows: impl Iterator<Item = (&'static str, u64, u64, Option<u64>)>) -> Vec<Bar> {
    let mut rows: Vec<_> = rows.collect();
    rows.sort_by_key(|(_, _, saved, _)| std::cmp::Reverse(*saved));
    let longest = rows.iter().map(|(_, _, saved, _)| *saved).max().unwrap_or(0);
    let row = |(name, pages, saved, stable): (&str, u64, u64, Option<u64>)| {
        let lasting = stable.map_or_else(String::new, |stable| format!(", {} of it stable", bytes(stable)));
        let end = share(saved, longest) * 100.0;
        let word = name.replace('_', " ");
        Bar {
            name: word.clone(),
            pages: count(pages),
            saved: bytes(saved),
            stable: stable.map_or_else(String::new, bytes),
            volatile: stable.map_or_else(String::new, |stable| bytes(saved.saturating_sub(stable))),
            title: format!("{word}: merging saves {}{lasting}", bytes(saved)),
            stable_end: Px(stable.map_or(end, |stable| share(stable.min(saved), longest) * 100.0)),
            end: Px(end),
        }
    };
    rows.into_iter().map(row).collect()
}

/// Duplicates by how far apart they are.
pub(super) fn scopes(report: &Report) -> Vec<Scope> {
    report.duplicates.iter().map(scope).collect()
}

fn scope(scopes: &Scopes) -> Scope {
    let pages = [scopes.within_process, scopes.within_group, scopes.between_groups];
    let stable = scopes.stable.map(|scope| [scope.within_process, scope.within_group, scope.between_groups]);
    let all: u64 = pages.iter().sum();
    let mut start = 0.0;
    let parts = std::array::from_fn(|at| {
        let width = share(pages[at], all) * 100.0;
        let part = Part {
            pages: count(pages[at]),
            stable: stable.map(|stable| count(stable[at])),
            start: Px(start),
            width: Px(width),
        };
        start += width;
        part
    });
    let [process, within, between] = pages.map(|pages| percent(pages, all));
    let by = group_word(scopes.by);
    let title = format!("By {by}: {process} within one process, {within} within one {by}, {between} between {by}s");
    Scope { name: plural(scopes.groups, by), title, parts }
}

fn plural(number: u64, word: &str) -> String {
    format!("{} {word}{}", count(number), if number == 1 { "" } else { "s" })
}

/// The word for a group.
pub(super) const fn group_word(by: GroupBy) -> &'static str {
    match by {
        GroupBy::Command => "command",
        GroupBy::Cgroup => "cgroup",
        GroupBy::User => "user",
    }
}

/// Pages that almost equal others.
pub(super) fn near(causes: &[NearCause]) -> Vec<Near> {
    let row = |cause: &NearCause| Near {
        cause: name(&cause.cause),
        pages: count(cause.pages),
        saved: bytes(cause.bytes),
        remedy: name(&cause.remedy),
    };
    causes.iter().map(row).collect()
}

/// How it was read.
pub(super) fn reading(report: &Report) -> Vec<(&'static str, String)> {
    let (reading, totals) = (&report.reading, &report.totals);
    let pages = |pages: u64| format!("{} pages, {}", count(pages), bytes(pages * report.page_size));
    let mut rows = vec![
        ("Time", format!("{:.1} s", reading.elapsed_seconds)),
        ("Rate of reading", format!("{}/s", bytes(reading.bytes_per_second as u64))),
        ("CPU time of the readers", format!("{:.1} s", reading.cpu_seconds)),
        ("Size of a page", format!("{} bytes", count(report.page_size))),
        ("Index", bytes(reading.index_bytes)),
        ("KSM would accept", pages(totals.ksm_pages)),
        ("KSM may work on already", pages(totals.mergeable_pages)),
        ("The page store would accept", pages(totals.store_pages)),
        ("Inside huge pages", pages(totals.huge_pages)),
        ("pages_sharing, predicted", count(report.savings.pages_sharing_predicted)),
        ("Mappings that the store would add", count(report.savings.store_vmas)),
        ("Pages beyond the store's budget of mappings", count(report.savings.store_over_budget_pages)),
    ];
    if let Some(time) = reading.watched_seconds {
        rows.insert(1, ("Between the two looks", format!("{time:.1} s")));
    }
    rows
}
