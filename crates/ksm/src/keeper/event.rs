//! What the keeper has done or noticed.

use rules::{Action, Why};
use serde::Serialize;

use super::plan::Planned;
use crate::proc_stat::ProcessId;

/// What was done to a process, or noticed about it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Event {
    /// Which.
    #[serde(flatten)]
    pub process: ProcessId,
    /// Command name.
    pub comm: String,
    /// What the rules say.
    pub action: Action,
    /// By which rule.
    pub why: Why,
    /// What.
    #[serde(flatten)]
    pub what: What,
}

/// What was done, or noticed.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum What {
    /// It was enabled.
    Enabled,
    /// It was disabled.
    Disabled,
    /// It could not be brought to where it is to be. It is tried again, and told again if the reason is another one.
    Refused {
        /// Why not, one word.
        reason: String,
        /// Why not, for people.
        detail: String,
    },
    /// It was disabled, since merging it does not pay.
    Dropped {
        /// Its `ksm_process_profit` in bytes.
        ksm_process_profit: i64,
        /// For so many passes of ksmd it had been too low.
        passes: u64,
        /// It is tried again after so many seconds.
        retry_seconds: u64,
    },
    /// It was enabled here, and somebody has disabled it since: it is left so.
    Released,
}

impl Event {
    pub(super) fn new(planned: &Planned, what: What) -> Self {
        Self {
            process: planned.process,
            comm: planned.facts.comm.clone(),
            action: planned.decision.action,
            why: planned.decision.why.clone(),
            what,
        }
    }

    /// It was refused.
    #[must_use]
    pub const fn is_refusal(&self) -> bool {
        matches!(self.what, What::Refused { .. })
    }
}
