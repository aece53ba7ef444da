//! Whether merging a process pays.

use crate::rule::ProfitRules;

/// Looks at one process's `ksm_process_profit` over time.
///
/// Time is counted in passes of ksmd and not in seconds: until ksmd has come by, and by often enough for its smart scan to
/// have compared what there is, a process has only cost records.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Meter {
    /// `full_scans` when the profit was first seen too low, and the looks since.
    since: Option<(u64, u32)>,
    /// `full_scans` at the last look.
    last: u64,
}

/// What a look found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It costs no more than is allowed.
    Pays,
    /// It costs more, for so many passes by now.
    Losing {
        /// Passes.
        passes: u64,
    },
    /// It has cost more for long enough.
    Drop {
        /// Passes.
        passes: u64,
    },
}

/// Looks that must have agreed, however fast ksmd is: one that falls between a write and the next merge is not enough.
const LOOKS: u32 = 3;

impl Meter {
    /// A look: the process's `ksm_process_profit` in bytes, and `full_scans` now.
    pub fn look(&mut self, profit: i64, full_scans: u64, rules: &ProfitRules) -> Verdict {
        // It starts anew when 2 is written to `run`, and with it everything that was merged.
        let restarted = full_scans < self.last;
        self.last = full_scans;
        let allowed = i64::try_from(rules.loss.get()).unwrap_or(i64::MAX);
        if profit >= -allowed || rules.passes == 0 {
            self.since = None;
            return Verdict::Pays;
        }
        let (begin, looks) = self.since.filter(|_| !restarted).unwrap_or((full_scans, 0));
        self.since = Some((begin, looks.saturating_add(1)));
        let passes = full_scans - begin;
        if passes >= rules.passes && looks + 1 >= LOOKS { Verdict::Drop { passes } } else { Verdict::Losing { passes } }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kernel::Bytes;

    const RULES: ProfitRules = ProfitRules {
        passes: 5,
        loss: Bytes(1000),
        retry: std::time::Duration::ZERO,
        retry_most: std::time::Duration::ZERO,
    };

    #[test]
    fn only_passes_and_only_without_a_break_count() {
        let mut meter = Meter::default();
        assert_eq!(meter.look(-1000, 0, &RULES), Verdict::Pays, "as much as is allowed");
        for _ in 0..100 {
            assert_eq!(meter.look(-1001, 7, &RULES), Verdict::Losing { passes: 0 }, "ksmd stands still");
        }
        assert_eq!(meter.look(-9999, 11, &RULES), Verdict::Losing { passes: 4 });
        assert_eq!(meter.look(1, 12, &RULES), Verdict::Pays);
        assert_eq!(meter.look(-9999, 13, &RULES), Verdict::Losing { passes: 0 });
        assert_eq!(meter.look(-9999, 17, &RULES), Verdict::Losing { passes: 4 });
        assert_eq!(meter.look(-9999, 18, &RULES), Verdict::Drop { passes: 5 });
    }

    #[test]
    fn one_unlucky_look_is_not_enough_however_many_passes_there_were() {
        let mut meter = Meter::default();
        assert_eq!(meter.look(-9999, 0, &RULES), Verdict::Losing { passes: 0 });
        assert_eq!(meter.look(-9999, 1000, &RULES), Verdict::Losing { passes: 1000 });
        assert_eq!(meter.look(-9999, 1001, &RULES), Verdict::Drop { passes: 1001 });
    }

    #[test]
    fn a_new_count_of_passes_begins_anew() {
        let mut meter = Meter::default();
        meter.look(-9999, 100, &RULES);
        meter.look(-9999, 104, &RULES);
        assert_eq!(meter.look(-9999, 3, &RULES), Verdict::Losing { passes: 0 });
        assert_eq!(meter.look(-9999, 8, &RULES), Verdict::Losing { passes: 5 });
        assert_eq!(meter.look(-9999, 8, &RULES), Verdict::Drop { passes: 5 });
    }

    #[test]
    fn nobody_is_let_go_where_no_passes_are_asked_for() {
        let mut meter = Meter::default();
        let rules = ProfitRules { passes: 0, ..RULES };
        assert!((0..9).all(|scan| meter.look(i64::MIN, scan, &rules) == Verdict::Pays));
    }
}
