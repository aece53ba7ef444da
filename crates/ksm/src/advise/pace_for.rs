//! From pages a second to the two settings that make them.
use super::estimate::Estimate;
use crate::wanted::Rate;

/// Sleeps in milliseconds, the usual one first: shorter ones only where a batch would get long.
const SLEEPS: [u32; 4] = [20, 8, 4, 1];
/// The longest sleep while a batch has more than one page, and at all, in milliseconds.
const LONG_SLEEP: f64 = 10_000.0;
const LONGEST_SLEEP: f64 = 3_600_000.0;
/// A batch of fewer pages cannot be set finely: from here on the sleep is what changes.
const FEW: f64 = 20.0;
/// Seconds that a batch may work at a stretch, if a shorter sleep can avoid it.
const STRETCH: f64 = 0.02;
/// A pass is cut into so many batches at least.
const PARTS: f64 = 20.0;
/// By this factor a batch may be larger than that and longer than a stretch, if no sleep is short enough.
const MOST_AT_ONCE: f64 = 4.0;

/// The settings with which ksmd compares `pages_per_second` of the `pass` pages of a pass. `now` is kept where it does
/// nearly the same: writing `sleep_millisecs` wakes ksmd at once, so the sleep is changed only where it must be.
pub(super) fn rate_for(pages_per_second: f64, pass: f64, costs: &Estimate, now: Option<Rate>) -> Rate {
    let wanted = pages_per_second.max(1e-3);
    let share = costs.share(wanted);
    if share > 0.97 {
        return Rate { pages_to_scan: 10_000, sleep_millisecs: 0 };
    }
    let batch = |sleep: u32| wanted * (f64::from(sleep) / 1e3 + costs.extra) / (1.0 - share);
    let most = (pass / PARTS).min(STRETCH / costs.page).max(FEW);
    let kept = now.map(|rate| rate.sleep_millisecs).filter(|&sleep| {
        let pages = batch(sleep);
        let needlessly_short = sleep < SLEEPS[0] && batch(SLEEPS[0]) < most / 2.0;
        sleep > 0 && (FEW / 2.0..most * 1.5).contains(&pages) && !needlessly_short
    });
    let sleep =
        kept.or_else(|| SLEEPS.into_iter().find(|&sleep| batch(sleep) <= most)).unwrap_or(SLEEPS[SLEEPS.len() - 1]);
    // While ksmd gets no processor for long, a batch large enough to make up for it would be a whole pass in one go as
    // soon as it gets one again.
    let pages = batch(sleep).min(most * MOST_AT_ONCE);
    let rate = if pages >= FEW || kept.is_some() {
        Rate { pages_to_scan: whole(pages), sleep_millisecs: sleep }
    } else {
        // Whole pages, and what that takes from the pace or adds to it is given back by the sleep.
        let pages = (pass / (2.0 * PARTS)).min(wanted * LONG_SLEEP / 1e3).clamp(1.0, FEW).floor();
        let sleep = (pages / wanted - pages * costs.page - costs.extra) * 1e3;
        Rate { pages_to_scan: whole(pages), sleep_millisecs: sleep.clamp(1.0, LONGEST_SLEEP).round() as u32 }
    };
    match now {
        Some(now) if near(costs.pages_per_second(now), wanted) && kept.is_some() => now,
        _ => rate,
    }
}

fn whole(pages: f64) -> u32 {
    pages.round().clamp(1.0, 1e9) as u32
}

/// Within one part in thirty: not worth a write.
fn near(one: f64, other: f64) -> bool {
    (one / other - 1.0).abs() < 1.0 / 30.0
}
