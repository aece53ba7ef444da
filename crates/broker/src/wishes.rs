//! What callers ask of a running broker.

use std::sync::mpsc::Sender;
use std::time::Duration;

use kernel::{Pid, Range};
use serde::{Deserialize, Serialize};

use crate::account::Summary;
use crate::quiet::QuietPlan;

/// A request.
#[derive(Debug)]
pub enum Wish {
    /// Merge these ranges of a member now.
    Merge {
        /// The member.
        pid: Pid,
        /// What to merge; empty for everything that it has handed over.
        ranges: Vec<Range>,
    },
    /// Give these ranges of a member their own pages back.
    Unmerge {
        /// The member.
        pid: Pid,
        /// What to give back.
        ranges: Vec<Range>,
    },
    /// Watch what members have handed over and merge what has settled, until a [`Wish::Untrack`] for each of these.
    Track {
        /// The member that asks.
        pid: Pid,
        /// How long a page must have stayed unwritten.
        stable: Duration,
    },
    /// The end of one [`Wish::Track`].
    Untrack {
        /// The member.
        pid: Pid,
    },
    /// The process leaves the partition: its helper goes.
    Leave {
        /// The process.
        pid: Pid,
    },
    /// Look at ranges of a process for it to merge them itself.
    Quiescent {
        /// The process.
        pid: Pid,
        /// Its user.
        uid: u32,
        /// All that is to be merged.
        ranges: Vec<Range>,
        /// Where to go on; `None` at the beginning.
        from: Option<u64>,
    },
    /// The state now.
    Summary,
    /// End.
    Stop,
}

/// An answer.
#[derive(Debug)]
pub enum Wished {
    /// Merged or given back.
    Report(MergeReport),
    /// The state.
    Summary(Box<Summary>),
    /// What a process is to compare and map.
    #[doc(hidden)]
    #[allow(private_interfaces, reason = "made and taken apart in this crate only")]
    Quiescent(Box<QuietPlan>),
    /// The process is no member.
    NoMember,
    /// Its helper was not taken in.
    Refused {
        /// Which reason.
        kind: RefusedKind,
        /// In words, with the way out.
        reason: String,
    },
}

/// Why a helper was not taken in, as far as a caller can do something about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusedKind {
    /// The process may not have a userfaultfd.
    NoUserfault,
    /// The kernel's userfaultfd cannot move pages.
    NoMove,
    /// The broker may not read the process's memory.
    Unreadable,
    /// The helper was of another build or another user, or did not do what helpers do.
    Other,
}

/// A wish and where to answer.
pub(crate) struct Asked {
    pub(crate) wish: Wish,
    pub(crate) answer: Sender<Wished>,
}

/// What a merge did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MergeReport {
    /// Pages looked at.
    pub pages_scanned: u64,
    /// Pages of the caller that are the store's now.
    pub pages_merged: u64,
    /// Zero pages of the caller that were dropped.
    pub zero_pages: u64,
    /// Pages of other members that were merged with the caller's.
    pub pages_merged_elsewhere: u64,
    /// Pages that got their own copies back.
    pub pages_unmerged: u64,
    /// Pages with an equal partner that were left as they were, by reason.
    pub refused: std::collections::BTreeMap<String, u64>,
    /// How long the request took.
    pub elapsed: Duration,
    /// CPU time of broker and helpers for it.
    pub cpu: Duration,
}

impl MergeReport {
    /// Bytes of the caller that are no longer its own.
    #[must_use]
    pub fn bytes_merged(&self) -> u64 {
        (self.pages_merged + self.zero_pages) * kernel::page_size()
    }

    /// Pages that were left as they were, for any reason.
    #[must_use]
    pub fn pages_refused(&self) -> u64 {
        self.refused.values().sum()
    }

    /// Adds what another request did.
    pub fn add(&mut self, other: &Self) {
        self.pages_scanned += other.pages_scanned;
        self.pages_merged += other.pages_merged;
        self.zero_pages += other.zero_pages;
        self.pages_merged_elsewhere += other.pages_merged_elsewhere;
        self.pages_unmerged += other.pages_unmerged;
        for (reason, pages) in &other.refused {
            *self.refused.entry(reason.clone()).or_default() += pages;
        }
        self.elapsed += other.elapsed;
        self.cpu += other.cpu;
    }
}
