//! Pages that are nearly equal, why, and what a remedy would be worth; and zero pages that somebody is about to use.
//!
//! Pages with a content of their own are read once more: only they can gain.

use std::collections::HashMap;

use kernel::{MemoryFile, Pid, ReadOutcome, Vaddr, maps, page_size};
use page::near::{Cause, NearExample, NearIndex, Pointers};
use serde::Serialize;

use crate::count::Bits;
use crate::numbers::Numbers;
use crate::read::{Wanted, read_each};
use crate::snapshot::Snapshot;

/// Pages that the index may hold: 20 MiB. Of more, whole groups are kept, and the rest is reckoned up.
const PAGES_MAX: usize = 1 << 18;

/// Nearly equal pages.
#[derive(Clone, Debug, Serialize)]
pub struct NearDuplicates {
    /// Pages with a content of their own that were compared.
    pub pages_compared: u64,
    /// The share of them that the figures come from; they are reckoned up to all.
    pub share: f64,
    /// Why they differ, most worth first.
    pub causes: Vec<NearReason>,
    /// Zero pages behind the last page in use of a mapping, or in huge pages: populated ahead. A merge would take them
    /// from a program that is about to need them.
    pub populated_ahead_pages: u64,
}

/// One reason.
#[derive(Clone, Debug, Serialize)]
pub struct NearReason {
    /// A word for it.
    pub cause: &'static str,
    /// What would make the pages equal.
    pub remedy: &'static str,
    /// Pages in groups of this kind.
    pub pages: u64,
    /// Pages that the remedy would save, beyond what equal pages save already.
    pub pages_worth: u64,
    /// The same in bytes.
    pub bytes_worth: u64,
    /// Offsets in the page at which they differ, where it is always the same few.
    pub offsets: Vec<u64>,
    /// Two pages that show it.
    pub example: Option<NearPair>,
}

/// Two nearly equal pages.
#[derive(Clone, Debug, Serialize)]
pub struct NearPair {
    /// Whose the one is.
    pub pid: i32,
    /// Where.
    pub address: String,
    /// Whose the other is.
    pub other_pid: i32,
    /// Where.
    pub other_address: String,
    /// Words that differ, from the front.
    pub differs_at: Vec<NearWord>,
}

/// A word that differs.
#[derive(Clone, Debug, Serialize)]
pub struct NearWord {
    /// Its offset in the page.
    pub offset: u64,
    /// What the one page holds there.
    pub one: String,
    /// What the other does.
    pub other: String,
}

/// Compares pages that have no equal.
pub(crate) fn near(snapshot: &Snapshot, numbers: &Numbers<'_>, has_equal: &Bits, limit: Option<u64>) -> NearDuplicates {
    let mut index = NearIndex::new(PAGES_MAX);
    for (owner, process) in (0_u32..).zip(&snapshot.processes) {
        let ranges = maps::read(Pid(process.pid)).unwrap_or_default();
        let ranges = ranges.iter().map(|vma| (vma.range.start().get(), vma.range.end().get()));
        index.owner(owner, Pointers::within(ranges));
    }
    let mut compared = 0;
    let wanted = Wanted::Without(has_equal);
    read_each(&snapshot.walk, &snapshot.processes, wanted, limit, |process, page, bytes| {
        if !page::is_zero(bytes) {
            compared += 1;
            index.feed(page as u64, process, bytes);
        }
    });
    let mut files: HashMap<i32, Option<MemoryFile>> = HashMap::new();
    let mut fetch = |page: u64, buffer: &mut [u8]| {
        let Ok(page) = u32::try_from(page) else { return false };
        let (pid, address) = place(snapshot, numbers, page);
        // Few programs at a time: their pages come one after the other, and descriptors are not endless.
        if files.len() > 64 && !files.contains_key(&pid) {
            files.clear();
        }
        let file = files.entry(pid).or_insert_with(|| MemoryFile::open(Pid(pid)).ok());
        let read = file.as_ref().and_then(|file| file.read(Vaddr(address), buffer).ok());
        matches!(read, Some(ReadOutcome::Complete { .. }))
    };
    let report = index.finish(usize::try_from(page_size()).expect("a page fits into memory"), &mut fetch);
    let whole = |pages: u64| (pages as f64 / report.share.clamp(1e-9, 1.0)).round() as u64;
    let reason = |cause: &page::near::NearCause| NearReason {
        cause: cause.cause.code(),
        remedy: cause.cause.remedy(),
        pages: whole(cause.pages),
        pages_worth: whole(cause.worth),
        bytes_worth: whole(cause.worth) * page_size(),
        offsets: match &cause.cause {
            Cause::FixedOffsets { offsets } => offsets.iter().map(|offset| u64::from(*offset)).collect(),
            _ => Vec::new(),
        },
        example: pair(snapshot, numbers, &cause.example),
    };
    NearDuplicates {
        pages_compared: compared,
        share: report.share,
        causes: report.causes.iter().filter(|cause| cause.worth > 0).map(reason).collect(),
        populated_ahead_pages: populated_ahead(snapshot, numbers),
    }
}

fn place(snapshot: &Snapshot, numbers: &Numbers<'_>, page: u32) -> (i32, u64) {
    let span = numbers.span(page);
    let process = numbers.process_of(span.mapping) as usize;
    (snapshot.processes[process].pid, numbers.address(page, span).address(page_size()))
}

fn pair(snapshot: &Snapshot, numbers: &Numbers<'_>, example: &NearExample) -> Option<NearPair> {
    let (one, other) = example.ids;
    let (pid, address) = place(snapshot, numbers, u32::try_from(one).ok()?);
    let (other_pid, other_address) = place(snapshot, numbers, u32::try_from(other).ok()?);
    let word = |word: &page::near::DifferingWord| NearWord {
        offset: u64::from(word.offset),
        one: format!("{:#x}", word.words.0),
        other: format!("{:#x}", word.words.1),
    };
    Some(NearPair {
        pid,
        address: format!("{address:#x}"),
        other_pid,
        other_address: format!("{other_address:#x}"),
        differs_at: example.first.iter().map(word).collect(),
    })
}

/// Zero pages at the end of what a mapping has, and those in huge pages.
fn populated_ahead(snapshot: &Snapshot, numbers: &Numbers<'_>) -> u64 {
    let zeros = snapshot.groups.zeros();
    let mut ahead = 0;
    // The place of the last zero page that was looked at, from behind.
    let mut at = zeros.len();
    let mut spans = snapshot.walk.spans.iter().rev().peekable();
    while let Some(last) = spans.next() {
        let mapping = last.mapping;
        let mut at_the_end = true;
        let mut span = Some(last);
        while let Some(now) = span {
            for page in (now.first..now.first + now.pages).rev() {
                while at > 0 && zeros[at - 1] > page {
                    at -= 1;
                }
                let zero = at > 0 && zeros[at - 1] == page;
                at_the_end &= zero;
                ahead += u64::from(zero && (at_the_end || now.huge));
            }
            span = spans.next_if(|next| next.mapping == mapping);
        }
    }
    debug_assert!(ahead <= numbers.pages());
    ahead
}
