//! Tables of owners: processes, mappings, single contents, and who was left out.

use super::words::{bytes, count, name, percent};
use crate::report::{ContentReport, Owned, ProcessReport, Report, VmaReport};
use crate::{GroupBy, Skipped};

/// Rows of a table.
pub(super) const SHOWN: usize = 100;

/// A process.
pub(super) struct Owner {
    pub(super) pid: i32,
    pub(super) comm: String,
    pub(super) command: String,
    pub(super) group: String,
    pub(super) saves: Saves,
    pub(super) shared: String,
    pub(super) earning: Vec<Earning>,
}

/// A mapping that earns.
pub(super) struct Earning {
    pub(super) range: String,
    pub(super) name: String,
    pub(super) saved: String,
}

/// What an owner holds and would save.
pub(super) struct Saves {
    pub(super) read: String,
    pub(super) saved: String,
    pub(super) stable: String,
    pub(super) volatile: String,
    pub(super) percent: String,
}

/// A mapping.
pub(super) struct Mapping {
    pub(super) pid: i32,
    pub(super) range: String,
    pub(super) permissions: String,
    pub(super) name: String,
    pub(super) kind: &'static str,
    pub(super) saves: Saves,
    pub(super) ksm: String,
    pub(super) store: String,
}

/// A content with many copies.
pub(super) struct Content {
    pub(super) class: String,
    pub(super) copies: String,
    pub(super) processes: String,
    pub(super) example: String,
}

/// A process that was not looked at.
pub(super) struct Left {
    pub(super) pid: i32,
    pub(super) comm: String,
    pub(super) reason: String,
}

/// Processes, most saved first.
pub(super) fn owners(report: &Report) -> Vec<Owner> {
    let row = |found: &ProcessReport| {
        let process = &found.process;
        let earning = found.earning_vmas.iter().map(|vma| Earning {
            range: format!("{}-{}", vma.start, vma.end),
            name: name(&vma.name),
            saved: bytes(vma.bytes_saved_share),
        });
        Owner {
            pid: process.pid,
            comm: name(&process.comm),
            command: name(&process.command),
            group: match report.groups.by {
                // The name stands there already.
                GroupBy::Command => format!("user {}", process.uid),
                by => name(&by.group_of(process)),
            },
            saves: saves(&found.owned, report),
            shared: bytes(found.already_shared_pages * report.page_size),
            earning: earning.collect(),
        }
    };
    report.processes.iter().take(SHOWN).map(row).collect()
}

/// Mappings that save something, most saved first.
pub(super) fn mappings(report: &Report) -> Vec<Mapping> {
    let row = |vma: &VmaReport| Mapping {
        pid: vma.pid,
        range: format!("{}-{}", vma.start, vma.end),
        permissions: name(&vma.permissions),
        name: name(&vma.name),
        kind: vma.kind.text(),
        saves: saves(&vma.owned, report),
        ksm: match vma.ksm_refuses {
            Some(reason) => format!("no: {}", reason.replace('_', " ")),
            None if vma.mergeable => "at work".to_owned(),
            None => "yes".to_owned(),
        },
        store: vma.store_refuses.map_or_else(|| "yes".to_owned(), |reason| format!("no: {}", reason.replace('_', " "))),
    };
    let earning = report.vmas.iter().filter(|vma| vma.owned.bytes_saved_share > 0);
    earning.take(SHOWN).map(row).collect()
}

fn saves(owned: &Owned, report: &Report) -> Saves {
    let read = owned.counters.pages_scanned * report.page_size;
    let (saved, stable) = (owned.bytes_saved_share, owned.bytes_saved_share_stable);
    Saves {
        read: bytes(read),
        saved: bytes(saved),
        stable: stable.map_or_else(String::new, bytes),
        volatile: stable.map_or_else(String::new, |stable| bytes(saved.saturating_sub(stable))),
        percent: percent(stable.unwrap_or(saved), read),
    }
}

/// Contents with the most copies.
pub(super) fn contents(report: &Report) -> Vec<Content> {
    let row = |content: &ContentReport| Content {
        class: content.class.replace('_', " "),
        copies: count(content.copies),
        processes: count(content.processes),
        example: format!("{} of process {}", content.address, content.pid),
    };
    report.top_contents.iter().map(row).collect()
}

/// Processes that were not looked at.
pub(super) fn skipped(report: &Report) -> Vec<Left> {
    let row = |one: &Skipped| Left { pid: one.pid, comm: name(&one.comm), reason: name(&one.reason) };
    report.skipped.iter().take(SHOWN).map(row).collect()
}
