//! The scan-time advisor, in the kernel's integers (`scan_time_advisor` of mm/ksm.c).

use super::settings::ScanTime;

/// Weight in per cent of the newest change of the pass time.
const WEIGHT: u64 = 30;
/// Per cent of a processor below which the advisor never goes. A constant of the kernel, without a file in sysfs.
const MIN_CPU: u64 = 10;
const MILLISECOND: u64 = 1_000_000;

/// What the advisor remembers from pass to pass.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Memory {
    change: u64,
    /// Seconds of the pass before; 0 before the first.
    scan_time: u64,
    /// ksmd's processor time at the last call, in nanoseconds.
    cpu: u64,
}

impl Memory {
    /// The next `pages_to_scan`, after a pass of `pass` nanoseconds in batches of `pages_to_scan` at whose end ksmd has
    /// used `cpu` nanoseconds in all.
    pub(super) fn advise(&mut self, settings: &ScanTime, pages_to_scan: u32, pass: u64, cpu: u64) -> u32 {
        let seconds = (pass / MILLISECOND / 1000).max(1);
        let cpu_percent = ((cpu - self.cpu) / MILLISECOND * 100 / (seconds * 1000)).max(1);
        let before = if self.scan_time == 0 { seconds } else { self.scan_time };
        let factor = (u64::from(settings.target_scan_time) * 100 / seconds).max(1);
        let change = (seconds * 100 / before).max(1);
        let change = ((100 - WEIGHT) * self.change + WEIGHT * change) / 100;

        let now = u64::from(pages_to_scan);
        let wanted = (now * 100 / factor).saturating_mul(change) / 100;
        let for_one_percent = (now / cpu_percent).max(1);
        let pages = wanted
            .min(for_one_percent * u64::from(settings.max_cpu))
            .max(for_one_percent * MIN_CPU)
            .min(u64::from(settings.max_pages_to_scan));

        *self = Self { change, scan_time: seconds, cpu };
        u32::try_from(pages).unwrap_or(u32::MAX).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn the_change_starts_at_nothing_and_is_smoothed() {
        let mut memory = Memory::default();
        let changes: Vec<u64> = (1..=4)
            .map(|pass| {
                memory.advise(&ScanTime::default(), 1000, 10 * SECOND, pass * SECOND);
                memory.change
            })
            .collect();
        assert_eq!(changes, [30, 51, 65, 75]);
    }

    #[test]
    fn ten_per_cent_is_the_floor_and_max_cpu_the_ceiling() {
        let settings = ScanTime::default();
        // A pass of 10 s is 20 times as fast as asked, but ksmd used 20 % only: half the batch is the least.
        assert_eq!(Memory::default().advise(&settings, 1000, 10 * SECOND, 2 * SECOND), 500);
        // Ten times too slow at 1 %: 1000 pages for 1 %, so 70,000 for 70 %, and 30,000 at most.
        let mut memory = Memory { change: 100, scan_time: 2000, cpu: 0 };
        assert_eq!(memory.advise(&settings, 1000, 2000 * SECOND, 20 * SECOND), 10_000);
        let mut memory = Memory { change: 100, scan_time: 2000, cpu: 0 };
        assert_eq!(memory.advise(&settings, 1000, 2000 * SECOND, 1000 * SECOND), 20 * 70);
        let mut memory = Memory { change: 100, scan_time: 2000, cpu: 0 };
        assert_eq!(memory.advise(&settings, 5000, 2000 * SECOND, 20 * SECOND), 30_000);
    }

    #[test]
    fn a_pass_of_less_than_a_second_counts_as_one() {
        let mut memory = Memory::default();
        // 1 ms of processor time in "1 s" is 0 %, taken as 1 %: ten times the batch.
        assert_eq!(memory.advise(&ScanTime::default(), 500, 2_000_000, 1_000_000), 5000);
        assert_eq!(memory.advise(&ScanTime::default(), 5000, 2_000_000, 2_000_000), 30_000);
    }
}
