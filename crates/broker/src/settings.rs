//! How a broker is to work.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::scope::Judge;

/// How references are checked before a page is replaced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CheckChoice {
    /// Exact counts where they can be had, else the collapse oracle, else nothing is merged.
    #[default]
    Auto,
    /// Exact counts by BPF only.
    Bpf,
    /// The collapse oracle only.
    Collapse,
    /// No check: the owner of the memory vouches that nobody else holds references.
    Vouch,
}

/// What of a member's memory is managed.
#[derive(Clone, Debug, Default)]
pub enum Scope {
    /// What it hands over.
    #[default]
    Marked,
    /// Every eligible range of programs whose gate is complete, and what they hand over.
    All(Arc<dyn Judge>),
}

/// The settings of one broker.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Name in reports.
    pub label: Option<String>,
    /// One sealed memfd for each run: members do not trust each other.
    pub strict: bool,
    /// What is managed.
    pub scope: Scope,
    /// Reference check.
    pub check: CheckChoice,
    /// How long a page must have stayed unwritten before it is merged by itself; `None`: only on request.
    pub stable: Option<Duration>,
    /// Most bytes of the store.
    pub store_limit: Option<u64>,
    /// Most mappings that merging may add to one process; the kernel's limit less a reserve where that is lower.
    pub vmas: u64,
    /// Nothing new is merged while more threads than this want each CPU of the whole machine, but on request.
    pub runnable_per_cpu: u64,
    /// The user whose processes may be members.
    pub uid: u32,
    /// How to start a guardian: program and arguments before the descriptor number. `None`: no guardian.
    pub guardian: Option<(PathBuf, Vec<String>)>,
    /// Raise helpers to SCHED_FIFO while they hold pages, where that is permitted.
    pub priority: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            label: None,
            strict: false,
            scope: Scope::Marked,
            check: CheckChoice::Auto,
            stable: None,
            store_limit: None,
            vmas: 30_000,
            runnable_per_cpu: 8,
            uid: rustix::process::geteuid().as_raw(),
            guardian: None,
            priority: true,
        }
    }
}
