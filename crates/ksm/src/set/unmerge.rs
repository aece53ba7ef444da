//! `run=2`: the whole host unmerged.

use std::time::{Duration, Instant};

use kernel::ksm_sysfs::{KsmStat, KsmSysfs, ksm_stat};
use kernel::{KsmCounters, PageCount, status};

use super::record::Record;
use super::refusal::SetError;
use crate::error::KsmError;
use crate::knob::{Knob, Values};
use crate::lease::Session;
use crate::room;
use crate::state::StatePath;
use crate::sysfs;

/// What unmerging the host came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unmerged {
    /// Pages that got copies of their own: `pages_sharing` and `ksm_zero_pages` as they were.
    pub pages: u64,
    /// How long it took.
    pub time: Duration,
}

/// Unmerges the whole host (`run=2`), if there is memory for it: every user of a merged page gets a copy of his own.
/// Returns when it is done; ksmd then stands still and `full_scans` begins again at 0.
///
/// `force`: without a look at the memory that there is. The kernel makes the caller the first whom its OOM killer takes.
///
/// # Errors
/// [`SetError::Held`], [`SetError::TooLittle`]: nothing was changed. [`SetError::Unmerge`]: half-way.
pub fn unmerge_host_at(path: &StatePath, sysfs: &KsmSysfs, force: bool) -> Result<Unmerged, SetError> {
    sysfs::check_writable(sysfs)?;
    // Under the lease's lock all the while: whoever comes waits until it is done.
    let mut session = Session::open(path, sysfs)?;
    session.apply(&Values::default())?;
    if !session.state.holders.is_empty() {
        let named = |holder: &crate::Holder| format!("{} ({})", holder.command, holder.process.pid);
        return Err(SetError::Held { holders: session.state.holders.iter().map(named).collect() });
    }
    let counters = sysfs.counters().map_err(KsmError::from)?;
    let pages = counters.pages_sharing.unwrap_or(0) + zero_pages(&counters);
    if !force {
        check_memory(pages)?;
    }
    let mut record = Record::load(&session.locked)?;
    let mut wish = Values::default();
    wish.set(Knob::Run, 2);
    record.note(&session.current, &wish);
    record.store(&session.locked)?;
    let begun = Instant::now();
    let done = sysfs.write(Knob::Run.file_name(), "2");
    let time = begun.elapsed();
    let run = sysfs::get(sysfs, Knob::Run)?.unwrap_or(0);
    if !session.state.is_over() {
        // A debt, as max_page_sharing, that the kernel takes now that nothing is merged. What was written to `run` is
        // nobody else's: who comes next would leave it alone.
        session.state.administrator.set(Knob::Run, run);
        session.state.written.remove(Knob::Run);
        session.apply(&Values::default())?;
    }
    if let Err(source) = done {
        wish.set(Knob::Run, run);
        record.note(&session.current, &wish);
        record.store(&session.locked)?;
        return Err(SetError::Unmerge { run, source });
    }
    Ok(Unmerged { pages, time })
}

/// Zero pages that KSM placed: by the host's counter, or where that has drifted by what processes say.
fn zero_pages(counters: &KsmCounters) -> u64 {
    let by_processes = || status::processes().unwrap_or_default().into_iter().filter_map(|pid| ksm_stat(pid).ok());
    let of = |stat: KsmStat| stat.ksm_zero_pages.unwrap_or(0);
    counters.ksm_zero_pages.unwrap_or_else(|| by_processes().map(of).sum())
}

/// Whether the copies fit, on the host and below the limits of those who get them.
fn check_memory(pages: u64) -> Result<(), SetError> {
    let too_little = |short, whose| SetError::TooLittle { short, whose };
    room::on_host(PageCount(pages).bytes())
        .map_err(KsmError::from)?
        .map_err(|short| too_little(short, String::new()))?;
    for pid in status::processes().map_err(KsmError::from)? {
        let stat = ksm_stat(pid).unwrap_or_default();
        // A copy is charged to who gets it; the page that all had may be charged to anybody.
        let own = PageCount(stat.ksm_merging_pages.unwrap_or(0) + stat.ksm_zero_pages.unwrap_or(0));
        if own.get() == 0 {
            continue;
        }
        // One that has ended meanwhile gets no copy.
        if let Ok(Err(short)) = room::for_process(pid, own.bytes()) {
            return Err(too_little(short, format!(" for process {pid}")));
        }
    }
    Ok(())
}
