//! What a request has come to.
use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

/// Why a process is left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Left {
    /// It has ended, or executes something else now.
    Gone,
    /// The caller has no ptrace rights on it.
    NotPermitted,
    /// pagefold's own page store merges it.
    Store,
    /// It is on the list of programs that hold secrets; why.
    NeverMerge(String),
    /// No system call can be injected into it, and why.
    Injection(String),
    /// Something else.
    Failed(String),
}

impl Left {
    /// A short word for it.
    #[must_use]
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Gone => "gone",
            Self::NotPermitted => "not_permitted",
            Self::Store => "store",
            Self::NeverMerge(_) => "never_merge",
            Self::Injection(_) => "injection",
            Self::Failed(_) => "failed",
        }
    }
}

impl std::fmt::Display for Left {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Gone => f.write_str("it has ended, or executes something else now"),
            Self::NotPermitted => f.write_str("its memory may not be read: run as root, or with CAP_SYS_PTRACE"),
            Self::Store => f.write_str("it is a member of a partition of pagefold's store, which merges it"),
            Self::NeverMerge(why) => write!(f, "it is never merged unless --never-merge-anyway is said: {why}"),
            Self::Injection(why) | Self::Failed(why) => f.write_str(why),
        }
    }
}

/// Why a marked page is not merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// Its process has ended, or executes something else now.
    Gone,
    /// It is not there any more: unmapped, given up or swapped out.
    Absent,
    /// It holds something else than at the second look.
    Changed,
    /// No page is left that holds the same.
    NoPartner,
    /// Its mapping has no mark: it was changed meanwhile, or somebody has taken the mark back.
    NotMarked,
    /// It is still part of a huge page, which the kernel did not split.
    Huge,
    /// All that could be seen is as it should be: something else holds the page, as a device's or a driver's pin, memory
    /// locked for direct I/O, another core's batch of pages.
    Held,
    /// ksmd has not been there often enough when the time was over.
    NotVisited,
}

impl Refusal {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Gone,
        Self::Absent,
        Self::Changed,
        Self::NoPartner,
        Self::NotMarked,
        Self::Huge,
        Self::Held,
        Self::NotVisited,
    ];

    /// The word that reports use.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Gone => "gone",
            Self::Absent => "absent",
            Self::Changed => "changed",
            Self::NoPartner => "no_partner",
            Self::NotMarked => "not_marked",
            Self::Huge => "huge",
            Self::Held => "held",
            Self::NotVisited => "not_visited",
        }
    }
}

/// How a request ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// Pages are marked; ksmd was not waited for.
    #[default]
    Marked,
    /// Every marked page is merged, or was visited often enough.
    Done,
    /// The time was over.
    Timeout,
    /// It was interrupted.
    Interrupted,
    /// ksmd does not scan: somebody else has stopped it, or what it scans is frozen.
    NotScanning,
}

/// What was found in one process and done to it. Counts are pages unless said otherwise.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ProcessReport {
    /// Its number.
    pub pid: i32,
    /// Pages whose content was read.
    pub pages_read: u64,
    /// Pages with a partner, of which each should be marked.
    pub pages_with_partner: u64,
    /// Pages with a partner that are mergeable now.
    pub pages_marked: u64,
    /// Pages that were marked along with them.
    pub pages_marked_besides: u64,
    /// Pages with a partner that stay unmarked, since their marks would have been too many mappings.
    pub pages_over_budget: u64,
    /// Ranges that were marked.
    pub runs_marked: u64,
    /// Mappings that this added.
    pub vmas_added: u64,
    /// Pages merged.
    pub pages_merged: u64,
    /// Marked pages that are not merged, by reason; those not waited for apart.
    pub refused: BTreeMap<&'static str, u64>,
    /// Times that one of its threads was stopped.
    pub stops: u64,
    /// Seconds that it was stopped, all together.
    pub stopped_seconds: f64,
    /// The longest of them.
    pub longest_stop_seconds: f64,
    /// It has ended, or executes something else now.
    pub gone: bool,
    /// Why nothing, or not all, was marked.
    pub left: Option<String>,
}

impl ProcessReport {
    pub(crate) fn leave(&mut self, left: &Left) {
        self.gone = *left == Left::Gone;
        self.left = Some(left.to_string());
    }

    pub(crate) fn stopped(&mut self, stop: Duration) {
        self.stops += 1;
        self.stopped_seconds += stop.as_secs_f64();
        self.longest_stop_seconds = self.longest_stop_seconds.max(stop.as_secs_f64());
    }
}

/// What a request has come to. Counts are pages unless said otherwise.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// How it ended.
    pub end: End,
    /// Each process.
    pub processes: Vec<ProcessReport>,
    /// Pages whose content was read.
    pub pages_read: u64,
    /// Further mappings of pages that KSM had merged before.
    pub pages_merged_before: u64,
    /// Pages of other processes that KSM shares and that were read as possible partners.
    pub pages_read_elsewhere: u64,
    /// Anonymous pages in mappings that are not looked at, by reason; of ranges that were named also pages of files and of
    /// shared memory, and addresses where nothing is mapped.
    pub pages_not_eligible: BTreeMap<&'static str, u64>,
    /// Pages that changed between the two looks.
    pub pages_volatile: u64,
    /// Pages with a partner, those in huge pages that stay whole apart.
    pub pages_with_partner: u64,
    /// Huge pages that have too few pages with a partner to be split.
    pub huge_pages_left: u64,
    /// Pages with a partner in them.
    pub pages_left_huge: u64,
    /// Huge pages with enough of them.
    pub huge_pages_to_split: u64,
    /// Pages with a partner that are mergeable now.
    pub pages_marked: u64,
    /// Pages merged, of the marked ones.
    pub pages_merged: u64,
    /// Of these, pages of zeros, merged with the zero page.
    pub zero_pages_merged: u64,
    /// Marked pages that are not merged, by reason.
    pub refused: BTreeMap<&'static str, u64>,
    /// Frames that became free, in bytes. Where frames cannot be seen, the host's difference.
    pub bytes_saved: u64,
    /// Seconds in all.
    pub elapsed_seconds: f64,
    /// Of them, looking for partners.
    pub look_seconds: f64,
    /// Of them, marking.
    pub mark_seconds: f64,
    /// Of them, ksmd at work.
    pub scan_seconds: f64,
    /// Processor seconds of ksmd meanwhile; `None` where it cannot be seen.
    pub ksmd_cpu_seconds: Option<f64>,
    /// Passes of ksmd meanwhile.
    pub full_scans: u64,
    /// Pages that it looked at meanwhile, everybody's.
    pub pages_scanned: u64,
    /// Of them, pages of other processes, judged by whose pages it knows.
    pub pages_scanned_of_others: u64,
    /// Settings of KSM that are not what they were before, since somebody else has changed them or the kernel refuses.
    pub settings_left: Vec<String>,
}
