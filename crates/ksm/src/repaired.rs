//! What a look at the lease found and did.
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::knob::Knob;
use crate::state::Holder;

/// One setting that was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// Which.
    pub knob: Knob,
    /// What was found.
    pub from: u64,
    /// What was written.
    pub to: u64,
}

/// One setting that somebody else wrote while it was leased. It is his from then on: nothing here overwrites it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Foreign {
    /// Which.
    pub knob: Knob,
    /// What had been in force under the lease.
    pub ours: u64,
    /// What was found instead, and left.
    pub found: u64,
}

/// One setting that the kernel did not take, as `max_page_sharing` while pages are merged. It is tried again at each
/// change and, as a debt, by the next use if the lease is over.
#[derive(Debug)]
pub struct Refused {
    /// Which.
    pub knob: Knob,
    /// What was to be written.
    pub wanted: u64,
    /// What the kernel answered.
    pub error: kernel::ksm_sysfs::KsmError,
}

/// What a look at the lease put right.
#[derive(Debug, Default)]
pub struct Repaired {
    /// Holders that had died without giving back.
    pub dead: Vec<Holder>,
    /// Settings that were written.
    pub changed: Vec<Change>,
    /// Settings that somebody else has written. A holder hears of each once, whoever has looked meanwhile.
    pub foreign: Vec<Foreign>,
    /// Settings that the holder asks for and that are not its to have: somebody else has written them, now or before.
    pub left: Vec<Knob>,
    /// Settings that the kernel refused.
    pub refused: Vec<Refused>,
}

impl Refused {
    /// EBUSY: pages are merged, and the trees would have to be built anew.
    pub(crate) fn is_busy(&self) -> bool {
        let kernel::ksm_sysfs::KsmError::Write { source, .. } = &self.error else { return false };
        source.kind() == std::io::ErrorKind::ResourceBusy
    }

    fn cause(&self) -> String {
        std::error::Error::source(&self.error).map_or_else(|| self.error.to_string(), ToString::to_string)
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} cannot be {} now: {}", self.knob, self.wanted, self.cause())
    }
}

impl Repaired {
    /// Nothing was wrong.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.dead.is_empty() && self.changed.is_empty() && self.foreign.is_empty() && self.refused.is_empty()
    }
}

impl fmt::Display for Repaired {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_clean() {
            return f.write_str("KSM's settings are as they should be");
        }
        let mut parts = Vec::new();
        for holder in &self.dead {
            parts.push(format!("{} (pid {}) had died holding KSM's settings", holder.command, holder.process.pid));
        }
        for change in &self.changed {
            parts.push(format!("{} {} -> {}", change.knob, change.from, change.to));
        }
        for foreign in &self.foreign {
            parts.push(format!("{} left at {}: written by somebody else", foreign.knob, foreign.found));
        }
        for refused in &self.refused {
            parts.push(refused.to_string());
        }
        f.write_str(&parts.join("; "))
    }
}
