//! What a holder asks of ksmd, and what several holders get together.
use serde::{Deserialize, Serialize};

use crate::knob::{AdvisorMode, Knob, Values};

/// Pages that ksmd looks at before it sleeps, and for how long it sleeps then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    /// `pages_to_scan`.
    pub pages_to_scan: u32,
    /// `sleep_millisecs`; 0 lets ksmd run without a pause.
    pub sleep_millisecs: u32,
}

impl Rate {
    /// Without a pause, in batches of less than a tenth of a second: the kernel takes `run` only between two of them, so
    /// whoever gives the settings back waits for one, not for a pass over everybody's memory.
    pub const UNPAUSED: Self = Self { pages_to_scan: 8192, sleep_millisecs: 0 };

    /// Never a pause, and batches that end only with the pass.
    pub const FLAT_OUT: Self = Self { pages_to_scan: 1_000_000_000, sleep_millisecs: 0 };

    /// Whether this rate scans more pages a second than `other`. Comparing fractions crosswise needs no division, and
    /// half a millisecond is added to each sleep so that two rates without sleep still differ by their batches.
    fn faster_than(self, other: Self) -> bool {
        let cross = |pages: u32, sleep: u32| u64::from(pages) * (2 * u64::from(sleep) + 1);
        cross(self.pages_to_scan, other.sleep_millisecs) > cross(other.pages_to_scan, self.sleep_millisecs)
    }
}

/// The kernel's scan-time advisor with its four numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Advisor {
    /// `advisor_target_scan_time`, seconds for one full pass; 0 is refused by the kernel.
    pub target_scan_time: u32,
    /// `advisor_max_cpu`, per cent of one processor.
    pub max_cpu: u32,
    /// `advisor_min_pages_to_scan`: only where the advisor starts.
    pub min_pages_to_scan: u32,
    /// `advisor_max_pages_to_scan`.
    pub max_pages_to_scan: u32,
}

/// What one holder asks for; `None` leaves a setting to the others and to the administrator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Wanted {
    /// ksmd scans. `Some(false)` is the same as `None` but from a holder that [governs](Self::governs): nobody can stop
    /// the ksmd of another, nor unmerge the host.
    pub run: Option<bool>,
    /// A fixed rate. It rules the advisor out: the kernel refuses `pages_to_scan` while the advisor sets it.
    pub rate: Option<Rate>,
    /// The rate stands for the administrator's, who handed the pace over: it may be slower than his, or none at all.
    /// Other holders' are still joined with it.
    pub governs: bool,
    /// The kernel's skipping of pages that did not merge before.
    pub smart_scan: Option<bool>,
    /// Map zero-filled pages to the kernel's zero page.
    pub use_zero_pages: Option<bool>,
    /// The kernel's advisor; a fixed rate of another holder goes before it.
    pub advisor: Option<Advisor>,
    /// Mappings of one page before a second copy is made. The kernel answers EBUSY once pages are merged.
    pub max_page_sharing: Option<u32>,
    /// Merge across NUMA nodes. The kernel answers EBUSY once pages are merged.
    pub merge_across_nodes: Option<bool>,
}

/// The settings of all holders together, over the administrator's where nobody asks.
pub(crate) fn combine<'a>(administrator: &Values, holders: impl Iterator<Item = &'a Wanted> + Clone) -> Values {
    let mut target = administrator.clone();
    for (knob, value) in asked(administrator, holders).iter() {
        target.set(knob, value);
    }
    target
}

/// What the holders together ask for; a knob that this kernel does not have stays out.
///
/// The more eager wish wins where wishes differ (a running ksmd, the faster rate, no skipping, the larger sharing), the
/// more careful one for `merge_across_nodes`. An administrator who runs ksmd counts as one more holder: his scan does
/// not become slower because of us.
pub(crate) fn asked<'a>(administrator: &Values, holders: impl Iterator<Item = &'a Wanted> + Clone) -> Values {
    let mut asked = Values::default();
    let mut set = |knob: Knob, value: u64| {
        if administrator.contains(knob) {
            asked.set(knob, value);
        }
    };
    if holders.clone().any(|wanted| wanted.run == Some(true)) {
        set(Knob::Run, 1);
    } else if holders.clone().any(|wanted| wanted.governs && wanted.run == Some(false)) {
        set(Knob::Run, 0);
    }
    let advisor_on = |values: &Values| values.get(Knob::AdvisorMode) == Some(AdvisorMode::ScanTime.into());
    // An advisor's rate is not a number to compare with: it gives way to an explicit one.
    let governed = holders.clone().any(|wanted| wanted.governs && wanted.rate.is_some());
    let administrators_rate = (administrator.get(Knob::Run) == Some(1) && !advisor_on(administrator) && !governed)
        .then(|| administrator.rate())
        .flatten();
    let mut rates = holders.clone().filter_map(|wanted| wanted.rate);
    if let Some(first) = rates.next() {
        let fastest =
            rates.chain(administrators_rate).fold(first, |best, rate| if rate.faster_than(best) { rate } else { best });
        set(Knob::AdvisorMode, AdvisorMode::None.into());
        set(Knob::PagesToScan, u64::from(fastest.pages_to_scan));
        set(Knob::SleepMillisecs, u64::from(fastest.sleep_millisecs));
    } else if let Some(advisor) = holders.clone().filter_map(|wanted| wanted.advisor).min_by_key(|a| a.target_scan_time)
    {
        set(Knob::AdvisorMode, AdvisorMode::ScanTime.into());
        set(Knob::AdvisorTargetScanTime, u64::from(advisor.target_scan_time.max(1)));
        set(Knob::AdvisorMaxCpu, u64::from(advisor.max_cpu));
        set(Knob::AdvisorMinPagesToScan, u64::from(advisor.min_pages_to_scan));
        set(Knob::AdvisorMaxPagesToScan, u64::from(advisor.max_pages_to_scan));
    }
    if let Some(smart) = holders.clone().filter_map(|wanted| wanted.smart_scan).min() {
        set(Knob::SmartScan, u64::from(smart));
    }
    if let Some(zero) = holders.clone().filter_map(|wanted| wanted.use_zero_pages).max() {
        set(Knob::UseZeroPages, u64::from(zero));
    }
    if let Some(sharing) = holders.clone().filter_map(|wanted| wanted.max_page_sharing).max() {
        set(Knob::MaxPageSharing, u64::from(sharing.max(2)));
    }
    if let Some(across) = holders.clone().filter_map(|wanted| wanted.merge_across_nodes).min() {
        set(Knob::MergeAcrossNodes, u64::from(across));
    }
    asked
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn administrator(run: u64, pages: u64, sleep: u64, advisor: u64) -> Values {
        let mut values = Values::default();
        for knob in Knob::ALL {
            values.set(knob, 1);
        }
        values.set(Knob::Run, run);
        values.set(Knob::PagesToScan, pages);
        values.set(Knob::SleepMillisecs, sleep);
        values.set(Knob::AdvisorMode, advisor);
        values
    }

    fn rate(pages_to_scan: u32, sleep_millisecs: u32) -> Wanted {
        Wanted { run: Some(true), rate: Some(Rate { pages_to_scan, sleep_millisecs }), ..Wanted::default() }
    }

    #[test]
    fn the_fastest_wins_and_nobody_asking_is_the_administrator() {
        let admin = administrator(0, 100, 20, 0);
        assert_eq!(combine(&admin, [].iter()), admin);
        assert_eq!(
            combine(&admin, [Wanted::default(), Wanted { run: Some(false), ..Wanted::default() }].iter()),
            admin
        );
        let both = combine(&admin, [rate(100, 1), rate(1000, 100)].iter());
        assert_eq!((both.get(Knob::Run), both.rate()), (Some(1), rate(100, 1).rate));
        let flat = combine(&admin, [rate(4000, 0), Wanted { rate: Some(Rate::FLAT_OUT), ..Wanted::default() }].iter());
        assert_eq!(flat.rate(), Some(Rate::FLAT_OUT));
    }

    #[test]
    fn an_administrator_who_runs_ksmd_is_not_slowed_down() {
        let wishes = [rate(100, 20)];
        assert_eq!(combine(&administrator(1, 5000, 10, 0), wishes.iter()).rate().unwrap().pages_to_scan, 5000);
        assert_eq!(combine(&administrator(0, 5000, 10, 0), wishes.iter()).rate().unwrap().pages_to_scan, 100);
        let over_advisor = combine(&administrator(1, 5000, 10, 1), wishes.iter());
        assert_eq!(over_advisor.get(Knob::AdvisorMode), Some(0));
        assert_eq!(over_advisor.rate().unwrap().pages_to_scan, 100);
    }

    #[test]
    fn who_governs_may_be_slower_than_the_administrator_but_not_than_another_holder() {
        let governor = Wanted { governs: true, ..rate(100, 20) };
        let admin = administrator(1, 5000, 10, 0);
        assert_eq!(combine(&admin, [governor].iter()).rate(), governor.rate);
        assert_eq!(combine(&admin, [governor, rate(300, 20)].iter()).rate(), rate(300, 20).rate);
        // One that asks for nothing hands the pace back.
        let resting = Wanted { governs: true, ..Wanted::default() };
        assert_eq!(combine(&admin, [resting].iter()), admin);
        let stopped = Wanted { run: Some(false), ..resting };
        assert_eq!(combine(&admin, [stopped].iter()).get(Knob::Run), Some(0));
        assert_eq!(combine(&admin, [stopped, rate(300, 20)].iter()).get(Knob::Run), Some(1));
    }

    #[test]
    fn a_kernel_without_a_knob_is_not_asked_for_it() {
        let mut admin = Values::default();
        admin.set(Knob::Run, 0);
        let target = combine(&admin, [rate(100, 20)].iter());
        assert_eq!(target.get(Knob::AdvisorMode), None);
        assert_eq!(target.get(Knob::SmartScan), None);
    }
}
