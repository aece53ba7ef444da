//! Passes: how long they take, how many pages they compare, how far the present one is.
use std::time::Duration;

use super::goals::Look;

/// A pass that has ended, or several between two looks.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Pass {
    /// Time of its end, since the advisor's start; to half the time between two looks.
    pub at_seconds: f64,
    /// How many passes this stands for.
    pub passes: u64,
    /// What one took.
    pub seconds: f64,
    /// Pages that one compared.
    pub pages_scanned: u64,
    /// ksmd's processor time for one; `None` where ksmd cannot be seen.
    pub ksmd_cpu_seconds: Option<f64>,
    /// The goal for its time was in force from its start to its end, and nothing had to go before it.
    pub held: bool,
}

/// What is known of passes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Passes {
    /// Where the present pass began; `None` if it began unseen.
    begun: Option<Begun>,
    /// Pages met by the last whole pass, and how many records there were then.
    last: Option<(f64, u64)>,
}

#[derive(Clone, Copy, Debug)]
struct Begun {
    at: Duration,
    scanned: f64,
    skipped: f64,
    cpu: Option<Duration>,
    held: bool,
}

/// Where the present pass is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Progress {
    /// Pages met, skipped ones too.
    pub(super) met: f64,
    /// Share of them that was compared.
    pub(super) compared: f64,
    /// Seconds since its start.
    pub(super) seconds: f64,
}

impl Passes {
    /// Pages that a pass meets, from the last one and what has been recorded since; before that from what is there.
    pub(super) fn pages(&self, look: &Look) -> f64 {
        match self.last {
            // What was recorded since is met too, each page once.
            Some((pages, then)) => pages + look.rmap_items.saturating_sub(then) as f64,
            // A process that is not marked as a whole counts with all it has: too many rather than too few.
            None => look.rmap_items.max(look.mergeable_pages) as f64,
        }
        .max(1.0)
    }

    /// How far the present pass is; `None` if it began unseen.
    pub(super) fn progress(&self, look: &Look, scanned: f64) -> Option<Progress> {
        let begun = self.begun?;
        let compared = (scanned - begun.scanned).max(0.0);
        let met = compared + (look.pages_skipped as f64 - begun.skipped).max(0.0);
        let seconds = look.at.saturating_sub(begun.at).as_secs_f64();
        Some(Progress { met, compared: if met > 0.0 { compared / met } else { 1.0 }, seconds })
    }

    /// The pass that is under way will say nothing of the pace: ksmd stands still in it, or somebody set it back.
    pub(super) fn forget_present(&mut self) {
        self.begun = None;
    }

    /// Something else than the goal is in force.
    pub(super) fn not_held(&mut self) {
        if let Some(begun) = &mut self.begun {
            begun.held = false;
        }
    }

    /// Takes what came between two looks; `before` and `scanned` are those of the earlier one.
    pub(super) fn follow(
        &mut self,
        (before, before_scanned): (&Look, f64),
        (now, scanned): (&Look, f64),
    ) -> Option<Pass> {
        let Some(ended) = now.full_scans.checked_sub(before.full_scans) else {
            // Somebody unmerged the host: counts begin anew.
            *self = Self::default();
            return None;
        };
        if ended == 0 {
            return None;
        }
        // When in between is not known: half of it belongs to each pass.
        let half = |before: f64, now: f64| before + (now - before) / 2.0;
        let at = before.at + now.at.saturating_sub(before.at) / 2;
        let cpu = before.ksmd_cpu.zip(now.ksmd_cpu).map(|(before, now)| before + now.saturating_sub(before) / 2);
        let end = Begun {
            at,
            scanned: half(before_scanned, scanned),
            skipped: half(before.pages_skipped as f64, now.pages_skipped as f64),
            cpu,
            held: true,
        };
        let pass = self.begun.map(|begun| {
            let each = |whole: f64| whole / ended as f64;
            let compared = each((end.scanned - begun.scanned).max(0.0));
            let met = compared + each((end.skipped - begun.skipped).max(0.0));
            self.last = Some((self.smoothed(met, now.rmap_items), now.rmap_items));
            Pass {
                at_seconds: at.as_secs_f64(),
                passes: ended,
                seconds: each(at.saturating_sub(begun.at).as_secs_f64()),
                pages_scanned: compared.round() as u64,
                ksmd_cpu_seconds: begun.cpu.zip(cpu).map(|(begun, end)| each(end.saturating_sub(begun).as_secs_f64())),
                held: begun.held,
            }
        });
        self.begun = Some(end);
        pass
    }

    /// A pass ends somewhere between two looks, which makes short ones uncertain: while ksmd's records stay as many, so
    /// does a pass.
    fn smoothed(&self, met: f64, rmap_items: u64) -> f64 {
        match self.last {
            Some((before, then)) if then.abs_diff(rmap_items) <= then / 50 => before + (met - before) * 0.3,
            _ => met,
        }
    }

    /// Takes the size of a pass from ksmd's records, where the kernel counts no compared pages.
    pub(super) fn count_records(&mut self, look: &Look) {
        if self.last.is_some() {
            self.last = Some((look.rmap_items as f64, look.rmap_items));
        }
    }
}
