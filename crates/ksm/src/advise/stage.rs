//! Whether there is something to gain: boost, steady pace, or rest.
use std::time::Duration;

use super::goals::{Goals, Look};
use crate::pace::Phase;

/// A page needs two visits, and one pass was under way at the start: three ends of passes lie around two whole ones.
const PASSES: u64 = 3;
const SHORTEST_REST: Duration = Duration::from_secs(20);
const LONGEST_REST: Duration = Duration::from_secs(600);
/// Looking again may cost one part in this many of one processor.
const RELOOK_SHARE: u32 = 100;

/// Why the phase changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(tag = "reason", rename_all = "snake_case")]
pub enum Turn {
    /// The start: what is there has not been scanned for this advisor yet.
    Started {
        /// Anonymous pages of mergeable processes.
        mergeable_pages: u64,
    },
    /// Memory that KSM may merge has appeared.
    Grown {
        /// By so many pages.
        pages: u64,
    },
    /// Little was merged of late: the goal's pace will do.
    Little {
        /// Pages, in the passes that were judged.
        merged: u64,
    },
    /// Whole passes merged next to nothing.
    Nothing {
        /// Pages, in the passes that were judged.
        merged: u64,
    },
    /// Merging saves less than the kernel's records of pages take, and it gets no better.
    Unprofitable {
        /// Bytes, below 0.
        general_profit: i64,
    },
    /// No process has memory that KSM may merge.
    NobodyThere,
    /// Pages change and become equal again: time to look once more.
    LookAgain {
        /// Seconds of rest before it.
        after_seconds: u64,
    },
}

/// The phase, and what it is judged by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stage {
    pub(super) phase: Phase,
    window: Window,
    /// Pages merged since the start, each time counted that they were.
    merges: u64,
    /// When a rest ends, how long it is, and ksmd's processor time when the work before it began.
    rest_until: Duration,
    rest: Duration,
    cpu_before: Option<Duration>,
    found: bool,
}

/// Passes that are judged together.
#[derive(Clone, Copy, Debug)]
struct Window {
    full_scans: u64,
    merges: u64,
    appeared: u64,
    mergeable: u64,
}

impl Stage {
    pub(super) fn begin(goals: &Goals, look: &Look) -> (Self, Turn) {
        let mut stage = Self {
            phase: Phase::Steady,
            window: Window { full_scans: 0, merges: 0, appeared: 0, mergeable: 0 },
            merges: 0,
            rest_until: look.at,
            rest: SHORTEST_REST,
            cpu_before: look.ksmd_cpu,
            found: true,
        };
        stage.open(look);
        if goals.rest && nobody(look) {
            stage.phase = Phase::Idle;
            stage.rest_until = look.at + SHORTEST_REST;
            return (stage, Turn::NobodyThere);
        }
        stage.phase = eager(goals);
        (stage, Turn::Started { mergeable_pages: look.mergeable_pages })
    }

    /// Takes the time between two looks into account. Returns the reason if the phase has changed.
    pub(super) fn follow(&mut self, goals: &Goals, before: &Look, now: &Look) -> Option<Turn> {
        // A write to a merged page takes one away and a merge adds one: together they say how many there were.
        let copies = now.cow.saturating_sub(before.cow);
        self.merges += (now.merged + copies).saturating_sub(before.merged);
        if now.full_scans < before.full_scans {
            self.open(now);
            return None;
        }
        let growth = now.appeared_pages.saturating_sub(self.window.appeared);
        let much = growth > self.window.mergeable / 10 + 1024;
        if growth > self.window.mergeable / 50 + 512 {
            let phase = match self.phase {
                Phase::Boost => Phase::Boost,
                _ if much => eager(goals),
                _ => Phase::Steady,
            };
            self.found = true;
            return self.enter(phase, now).then_some(Turn::Grown { pages: growth });
        }
        match self.phase {
            Phase::Idle => self.awaken(goals, now),
            Phase::Boost | Phase::Steady => self.judge(goals, now),
        }
    }

    fn awaken(&mut self, goals: &Goals, now: &Look) -> Option<Turn> {
        if goals.rest && (now.at < self.rest_until || nobody(now)) {
            return None;
        }
        let after_seconds = self.rest.as_secs();
        self.found = false;
        self.enter(Phase::Steady, now).then_some(Turn::LookAgain { after_seconds })
    }

    /// Judges a window that has seen enough passes.
    fn judge(&mut self, goals: &Goals, now: &Look) -> Option<Turn> {
        if goals.rest && nobody(now) {
            return self.lie_down(now).then_some(Turn::NobodyThere);
        }
        if now.full_scans.saturating_sub(self.window.full_scans) < PASSES {
            return None;
        }
        let merged = self.merges - self.window.merges;
        let nothing = merged <= now.merged / 1000 + 16;
        let little = merged <= now.merged / 50 + 64;
        self.found |= !nothing;
        let loss = now.general_profit.filter(|&profit| profit < 0 && little);
        match (goals.rest, loss) {
            (true, Some(general_profit)) => self.lie_down(now).then_some(Turn::Unprofitable { general_profit }),
            (true, None) if nothing => self.lie_down(now).then_some(Turn::Nothing { merged }),
            _ if little => self.enter(Phase::Steady, now).then_some(Turn::Little { merged }),
            _ => {
                self.open(now);
                None
            }
        }
    }

    /// Rests twice as long as last time if that found nothing, and long enough for what looking costs.
    fn lie_down(&mut self, now: &Look) -> bool {
        let cost = now.ksmd_cpu.zip(self.cpu_before).map(|(now, before)| now.saturating_sub(before));
        let rest = if self.found { SHORTEST_REST } else { self.rest * 2 };
        self.rest = rest.max(cost.unwrap_or_default() * RELOOK_SHARE).clamp(SHORTEST_REST, LONGEST_REST);
        self.rest_until = now.at + self.rest;
        self.enter(Phase::Idle, now)
    }

    /// Whether that is another phase than before.
    fn enter(&mut self, phase: Phase, now: &Look) -> bool {
        self.open(now);
        let from = std::mem::replace(&mut self.phase, phase);
        if from == Phase::Idle && phase != Phase::Idle {
            self.cpu_before = now.ksmd_cpu;
        }
        from != phase
    }

    fn open(&mut self, now: &Look) {
        self.window = Window {
            full_scans: now.full_scans,
            merges: self.merges,
            appeared: now.appeared_pages,
            mergeable: now.mergeable_pages,
        };
    }

    /// Pages merged since the start.
    pub(super) fn merges(&self) -> u64 {
        self.merges
    }

    /// Seconds until a rest ends.
    pub(super) fn rest_left(&self, now: Duration) -> Duration {
        self.rest_until.saturating_sub(now)
    }
}

fn eager(goals: &Goals) -> Phase {
    if goals.boost.is_some() { Phase::Boost } else { Phase::Steady }
}

fn nobody(look: &Look) -> bool {
    look.mergeable_pages == 0 && look.rmap_items == 0
}
