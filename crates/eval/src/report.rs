//! The answer. Sizes are in bytes, counts in pages, times in seconds, addresses are hex strings; names are KSM's own
//! words where it has one.

use serde::Serialize;

pub use crate::files::{FileDuplicates, FileSeen, FilesOfName};
pub use crate::near::{NearDuplicates, NearPair, NearReason, NearWord};
use crate::targets::{GroupBy, Process, Skipped};
use crate::vma::VmaKind;

/// What merging would save, where and why.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Size of a page in bytes.
    pub page_size: u64,
    /// All pages together.
    #[serde(flatten)]
    pub totals: Totals,
    /// What merging would save.
    #[serde(flatten)]
    pub savings: Savings,
    /// Duplicates by how far apart the copies are. The three parts add up to `duplicate_pages`.
    pub duplicates: Vec<Scopes>,
    /// By what a page holds.
    pub classes: Vec<ClassReport>,
    /// By what a mapping is for, most saved first.
    pub kinds: Vec<KindReport>,
    /// By process, most saved first.
    pub processes: Vec<ProcessReport>,
    /// Mappings with private anonymous pages; the list has those that would save most.
    pub vmas_total: u64,
    /// Mappings, most saved first.
    pub vmas: Vec<VmaReport>,
    /// How groups share with each other.
    pub groups: GroupMatrix,
    /// How the processes that save most share with each other.
    pub sharing: Matrix,
    /// Contents with the most copies.
    pub top_contents: Vec<ContentReport>,
    /// Processes that were not looked at.
    pub skipped: Vec<Skipped>,
    /// How it was read.
    #[serde(flatten)]
    pub reading: Reading,
    /// What is an estimate, if anything.
    pub sample: Option<Sample>,
    /// Equal pages of different files, which neither way merges; none for captures and for single ranges.
    pub files: Option<FileDuplicates>,
    /// Nearly equal pages, where they were asked for.
    pub near: Option<NearDuplicates>,
}

/// What pages were found to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counters {
    /// Pages that were read: private, anonymous, present, each physical page once.
    pub pages_scanned: u64,
    /// Of zeros.
    pub zero_pages: u64,
    /// Zero pages that are part of huge pages: to have them back a huge page must be split.
    pub zero_pages_in_huge: u64,
    /// Different contents, zeros apart.
    pub distinct_pages: u64,
    /// Contents that one page holds, a part of `distinct_pages`.
    pub unique_pages: u64,
    /// Copies beyond the first, zeros apart. `pages_scanned` = zero + distinct + duplicate.
    pub duplicate_pages: u64,
}

impl Counters {
    pub(crate) fn add(&mut self, other: &Self) {
        self.pages_scanned += other.pages_scanned;
        self.zero_pages += other.zero_pages;
        self.zero_pages_in_huge += other.zero_pages_in_huge;
        self.distinct_pages += other.distinct_pages;
        self.unique_pages += other.unique_pages;
        self.duplicate_pages += other.duplicate_pages;
    }

    /// What is left without `other`, which is a part of this.
    pub(crate) fn without(&self, other: &Self) -> Difference {
        let difference = |one: u64, other: u64| one.cast_signed() - other.cast_signed();
        Difference {
            pages_scanned: self.pages_scanned - other.pages_scanned,
            zero_pages: self.zero_pages - other.zero_pages,
            distinct_pages: difference(self.distinct_pages, other.distinct_pages),
            unique_pages: difference(self.unique_pages, other.unique_pages),
            duplicate_pages: self.duplicate_pages - other.duplicate_pages,
        }
    }
}

/// What of a figure did not last until the second look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// Pages whose content changed, or that went.
    pub pages_scanned: u64,
    /// Zero pages among them.
    pub zero_pages: u64,
    /// Contents that no page kept.
    pub distinct_pages: i64,
    /// Contents of one page, fewer; below zero where copies went and left one page alone with its content.
    pub unique_pages: i64,
    /// Duplicates that did not last.
    pub duplicate_pages: u64,
}

/// All pages together.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Totals {
    /// As they were at the first look.
    #[serde(flatten)]
    pub counters: Counters,
    /// Pages whose content changed, or that went, until the second look; 0 without one.
    pub volatile_pages: u64,
    /// The same figures for pages that lasted, where there was a second look.
    pub stable: Option<Counters>,
    /// What did not last, figure by figure, where there was a second look.
    pub volatile: Option<Difference>,
    /// Pages that are part of huge pages.
    pub huge_pages: u64,
    /// Pages with an equal elsewhere that are part of huge pages: merging them splits those.
    pub duplicate_pages_in_huge: u64,
    /// Mappings of pages that others map too, beyond each page's first: the sum of the three below.
    pub already_shared_pages: u64,
    /// Because of a fork.
    pub already_shared_by_fork: u64,
    /// By KSM.
    pub already_shared_by_ksm: u64,
    /// Mappings of a page store's pages.
    pub already_shared_by_partition: u64,
    /// Swapped out, and left there.
    pub swapped_pages: u64,
    /// Shared memory, memory files mapped shared, huge TLB pages: neither way merges those.
    pub shared_memory_pages: u64,
    /// Pages read that KSM would accept.
    pub ksm_pages: u64,
    /// Pages read in mappings where KSM may work already (`VmFlags: mg`).
    pub mergeable_pages: u64,
    /// Pages read that the page store would accept.
    pub store_pages: u64,
}

/// What merging would save, after bookkeeping. `expected` counts what lasted until the second look, where there was
/// one; the upper bound is what all copies would give at once.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Savings {
    /// By kernel KSM, as mm/ksm.c computes its profit: 4 KiB for each page less 64 B for each page looked at.
    pub bytes_saved_ksm: i64,
    /// The same, as an upper bound.
    pub bytes_saved_ksm_upper: i64,
    /// What `pages_sharing` should reach with `use_zero_pages` 0 and `max_page_sharing` high enough. Zero pages inside huge
    /// pages are not in it: the kernel maps its zero page there when it splits one.
    pub pages_sharing_predicted: u64,
    /// By the page store, less its mappings, records and segments. Pages inside huge pages are left alone.
    pub bytes_saved_store: i64,
    /// The same, as an upper bound: huge pages too.
    pub bytes_saved_store_upper: i64,
    /// Mappings that the store would add.
    pub store_vmas: u64,
    /// Pages that the store would not merge since their process would have too many mappings.
    pub store_over_budget_pages: u64,
}

/// Duplicates by how far apart the copies are.
#[derive(Clone, Debug, Serialize)]
pub struct Scopes {
    /// By what processes are taken together.
    pub by: GroupBy,
    /// Number of groups.
    pub groups: u64,
    /// Within one process.
    pub within_process: u64,
    /// Between processes of one group.
    pub within_group: u64,
    /// Between groups.
    pub between_groups: u64,
    /// The same for pages that lasted, where there was a second look.
    pub stable: Option<ScopePages>,
}

/// Pages of the three scopes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ScopePages {
    /// Within one process.
    pub within_process: u64,
    /// Between processes of one group.
    pub within_group: u64,
    /// Between groups.
    pub between_groups: u64,
}

/// One class of contents.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct ClassReport {
    /// Which.
    pub class: &'static str,
    /// Pages.
    pub pages: u64,
    /// Copies beyond the first; of zeros, all but one.
    pub duplicate_pages: u64,
    /// Of these, those that did not last.
    pub volatile_duplicate_pages: u64,
}

/// What an owner holds. Figures are of the owner alone, but `unique_pages` (nowhere else either) and the share.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Owned {
    /// As in the whole. `duplicate_pages` are copies within this owner, `unique_pages` nobody else holds either.
    #[serde(flatten)]
    pub counters: Counters,
    /// Pages that have an equal anywhere, zeros apart.
    pub shared_content_pages: u64,
    /// Pages that did not last.
    pub volatile_pages: u64,
    /// Its part of what merging would save before bookkeeping: of n equal pages each gives (n - 1)/n, zero pages all.
    pub bytes_saved_share: u64,
    /// The same of what lasted, where there was a second look.
    pub bytes_saved_share_stable: Option<u64>,
}

/// One kind of mappings.
#[derive(Clone, Debug, Serialize)]
pub struct KindReport {
    /// Which.
    pub kind: VmaKind,
    /// Mappings with anonymous pages.
    pub vmas: u64,
    /// Sums over its mappings.
    #[serde(flatten)]
    pub owned: Owned,
}

/// One address space.
#[derive(Clone, Debug, Serialize)]
pub struct ProcessReport {
    /// Who.
    #[serde(flatten)]
    pub process: Process,
    /// What it holds.
    #[serde(flatten)]
    pub owned: Owned,
    /// See [`Totals`].
    pub already_shared_pages: u64,
    /// The fewest mappings that give nine tenths of its share: instead of the whole process, a few madvise calls.
    pub earning_vmas: Vec<Earning>,
}

/// A mapping that earns.
#[derive(Clone, Debug, Serialize)]
pub struct Earning {
    /// First address.
    pub start: String,
    /// End.
    pub end: String,
    /// Name, as /proc/PID/maps shows it, or what it is for.
    pub name: String,
    /// Its part, as in [`Owned`].
    pub bytes_saved_share: u64,
}

/// One mapping.
#[derive(Clone, Debug, Serialize)]
pub struct VmaReport {
    /// Whose.
    pub pid: i32,
    /// First address.
    pub start: String,
    /// End.
    pub end: String,
    /// As /proc/PID/maps shows them.
    pub permissions: String,
    /// As /proc/PID/maps shows it.
    pub name: String,
    /// What it is for.
    pub kind: VmaKind,
    /// KSM may work on it already.
    pub mergeable: bool,
    /// Why KSM would not take it.
    pub ksm_refuses: Option<&'static str>,
    /// Why the page store would not.
    pub store_refuses: Option<&'static str>,
    /// What it holds.
    #[serde(flatten)]
    pub owned: Owned,
}

/// Who shares with whom: contents that both hold, in pages.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Matrix {
    /// The processes, most saved first.
    pub pids: Vec<i32>,
    /// `pages[i][j]`: contents that both the i-th and the j-th hold; on the diagonal, copies within one.
    pub pages: Vec<Vec<u64>>,
}

/// Who shares with whom, by groups.
#[derive(Clone, Debug, Serialize)]
pub struct GroupMatrix {
    /// By what processes are taken together.
    pub by: GroupBy,
    /// Names of the groups, most saved first.
    pub names: Vec<String>,
    /// As in [`Matrix`]; on the diagonal, contents that several processes of the group hold.
    pub pages: Vec<Vec<u64>>,
}

/// A content with many copies.
#[derive(Clone, Debug, Serialize)]
pub struct ContentReport {
    /// Its class.
    pub class: &'static str,
    /// Pages that hold it.
    pub copies: u64,
    /// Processes among their owners.
    pub processes: u64,
    /// One of them: whose.
    pub pid: i32,
    /// Where.
    pub address: String,
}

/// How it was read.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Reading {
    /// From the first look at a process to the answer, the time between two looks apart.
    pub elapsed_seconds: f64,
    /// Bytes read a second while reading.
    pub bytes_per_second: f64,
    /// CPU time of the readers.
    pub cpu_seconds: f64,
    /// Seconds between the looks, where there were two.
    pub watched_seconds: Option<f64>,
    /// Pages that went, or were held back, before they could be read.
    pub lost_pages: u64,
    /// Bytes of the index: contents and where they were.
    pub index_bytes: u64,
    /// Page frame numbers could be seen, so that pages shared after a fork or by KSM count once. Without them
    /// (CAP_SYS_ADMIN) they are told by place and content.
    pub frames_seen: bool,
}

/// What the answer is estimated from.
#[derive(Clone, Debug, Serialize)]
pub struct Sample {
    /// `hash_space`: every page was read, a share of all contents kept; `pages`: a share of all pages read.
    pub method: &'static str,
    /// The share.
    pub fraction: f64,
    /// Duplicates of the whole, estimated; likewise in the fields above, which are scaled.
    pub duplicate_pages: u64,
    /// Lowest plausible value.
    pub duplicate_pages_low: u64,
    /// Highest plausible value.
    pub duplicate_pages_high: u64,
}
