//! ksmd at work until every marked page is merged or has been visited often enough.
use std::time::{Duration, Instant};

use kernel::ksm_sysfs::{KsmSysfs, ksm_stat};
use kernel::{FrameFlagsFile, Pid};

use super::pages::Work;
use super::report::{End, Report};
use super::{RequestError, Stage, Tell};
use crate::ksmd::{Counters, Ksmd};
use crate::lease::Lease;
use crate::repaired::Repaired;
use crate::state::StatePath;
use crate::wanted::{Rate, Wanted};

/// Passes whose end must be seen. The one that is under way at the start has seen an unknown part; a page is remembered by
/// its first whole one and merged by the second; and what was locked or in another core's batch just then has one more.
const PASSES: u64 = 4;
/// While passes still bring something, no more than so many.
const PASSES_AT_MOST: u64 = 12;
const LOOK: Duration = Duration::from_millis(10);
/// A look at all pages that wait may take one part in so many of the time.
const LOOK_SHARE: u32 = 10;
/// ksmd that scans nothing for so long is not going to.
const ASLEEP: Duration = Duration::from_secs(10);

/// What the drive has used.
pub(crate) struct Driven {
    pub(crate) end: End,
    /// Every page has had its visits.
    pub(crate) visited: bool,
}

/// Takes the lease, drives ksmd, gives the lease back. `more_passes`: huge pages are to be split first, by a pass of its
/// own.
pub(crate) fn drive(
    (path, sysfs): (&StatePath, &KsmSysfs),
    works: &mut [Work],
    flags: &mut FrameFlagsFile,
    timeout: Duration,
    more_passes: bool,
    report: &mut Report,
    tell: Tell<'_>,
) -> Result<Driven, RequestError> {
    let begun = Instant::now();
    let ksmd = Ksmd::find();
    let cpu = || ksmd.and_then(|ksmd| ksmd.cpu_time());
    let cpu_before = cpu();
    let before = Counters::read(sysfs)?;
    let wanted = Wanted {
        run: Some(true),
        rate: Some(Rate::UNPAUSED),
        smart_scan: Some(false),
        use_zero_pages: Some(true),
        ..Wanted::default()
    };
    let (lease, _) = Lease::acquire_at(path, sysfs, wanted)?;
    let passes = PASSES + u64::from(more_passes);
    let driven = until_merged(sysfs, works, flags, begun + timeout, passes, tell);
    // Also when the look failed: first of all the settings.
    let repaired = lease.release()?;
    report.settings_left = left(&repaired);
    let driven = driven?;
    let after = Counters::read(sysfs)?;
    report.scan_seconds = begun.elapsed().as_secs_f64();
    report.ksmd_cpu_seconds = cpu().zip(cpu_before).map(|(after, before)| after.saturating_sub(before).as_secs_f64());
    report.full_scans = after.full_scans.saturating_sub(before.full_scans);
    report.pages_scanned = after.pages_scanned.saturating_sub(before.pages_scanned);
    report.pages_scanned_of_others = of_others(works, &after, report.pages_scanned);
    Ok(driven)
}

fn until_merged(
    sysfs: &KsmSysfs,
    works: &mut [Work],
    flags: &mut FrameFlagsFile,
    deadline: Instant,
    passes: u64,
    tell: Tell<'_>,
) -> Result<Driven, RequestError> {
    let of: u64 = works.iter().map(|work| work.pages.len() as u64).sum();
    let mut start = Counters::read(sysfs)?;
    let (mut last, mut last_moved) = (start, Instant::now());
    let mut next_look = Instant::now();
    let (mut waiting, mut waiting_at_pass) = (of, of);
    loop {
        let now = Counters::read(sysfs)?;
        if now.pages_scanned != last.pages_scanned {
            last_moved = Instant::now();
        }
        if now.full_scans < last.full_scans {
            // Somebody has unmerged the host, which also stops ksmd; if it goes on, it begins anew.
            start = now;
        }
        let pass_ended = now.full_scans != last.full_scans;
        last = now;
        if pass_ended || next_look <= Instant::now() {
            let began = Instant::now();
            for work in works.iter_mut() {
                work.look(false, flags)?;
            }
            waiting = works.iter().filter(|work| !work.gone).map(Work::waiting).sum();
            next_look = Instant::now() + (began.elapsed() * LOOK_SHARE).max(LOOK * 5);
        }
        if waiting == 0 {
            return Ok(Driven { end: End::Done, visited: true });
        }
        if pass_ended {
            let ended = now.full_scans - start.full_scans;
            let in_vain = waiting == waiting_at_pass || ended >= PASSES_AT_MOST;
            if ended >= passes && in_vain {
                return Ok(Driven { end: End::Done, visited: true });
            }
            waiting_at_pass = waiting;
        }
        let end = match () {
            () if tell(Stage::Merging { pages: of - waiting, of }).is_break() => Some(End::Interrupted),
            () if Instant::now() >= deadline => Some(End::Timeout),
            () if last_moved.elapsed() > ASLEEP => Some(End::NotScanning),
            () => None,
        };
        if let Some(end) = end {
            return Ok(Driven { end, visited: false });
        }
        std::thread::sleep(LOOK);
    }
}

/// Of the pages that ksmd looked at, those of others, as far as the pages it knows tell.
fn of_others(works: &[Work], counters: &Counters, scanned: u64) -> u64 {
    let known = counters.pages_shared + counters.pages_sharing + counters.pages_unshared + counters.pages_volatile;
    let stats = works.iter().filter_map(|work| ksm_stat(Pid(work.target.process.pid)).ok());
    let ours = stats.filter_map(|stat| stat.ksm_rmap_items).sum::<u64>().min(known);
    let others = u128::from(scanned) * u128::from(known - ours) / u128::from(known.max(1));
    u64::try_from(others).expect("no more than were scanned")
}

/// Settings that are not as they were found.
fn left(repaired: &Repaired) -> Vec<String> {
    let foreign = repaired.foreign.iter().map(|foreign| {
        format!("{} was set to {} by somebody else meanwhile and is left so", foreign.knob, foreign.found)
    });
    let refused = repaired.refused.iter().map(|refused| format!("{} cannot be {} now", refused.knob, refused.wanted));
    foreign.chain(refused).collect()
}
