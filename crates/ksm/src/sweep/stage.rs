//! What a sweep holds for as long as it lasts: the lease, ksmd in sight, the processes below.
use std::time::{Duration, Instant};

use kernel::ksm_sysfs::KsmSysfs;

use super::SweepError;
use crate::knob::Values;
use crate::ksmd::{Counters, Ksmd};
use crate::lease::{Lease, Session};
use crate::repaired::{Refused, Repaired};
use crate::state::StatePath;
use crate::tree::Tree;
use crate::wanted::{Rate, Wanted, asked};

/// Counters that stay as they are for so long are taken to be final.
const QUIET: Duration = Duration::from_millis(500);
const LOOK: Duration = Duration::from_millis(20);

#[derive(Debug)]
pub(super) struct Stage {
    lease: Lease,
    path: StatePath,
    ksmd: Option<Ksmd>,
    tree: Tree,
    /// The administrator's settings when the sweep began, below all that is asked for.
    administrator: Values,
}

impl Stage {
    pub(super) fn set(path: &StatePath, sysfs: &KsmSysfs, tree: Tree) -> Result<(Self, Repaired), SweepError> {
        let (lease, repaired) = Lease::acquire_at(path, sysfs, Wanted::default())?;
        let administrator = Session::open(path, sysfs)?.state.administrator;
        Ok((Self { lease, path: path.clone(), ksmd: Ksmd::find(), tree, administrator }, repaired))
    }

    /// Asks for settings. Returns what the kernel refused. What somebody else has written stays his, so what is measured
    /// with it is something else than was to be measured.
    pub(super) fn ask(&self, wanted: Wanted) -> Result<Vec<Refused>, SweepError> {
        let done = self.lease.update(wanted)?;
        match done.foreign.iter().map(|foreign| foreign.knob).chain(done.left).next() {
            Some(knob) => Err(SweepError::Taken(knob)),
            None => Ok(done.refused),
        }
    }

    /// Fails with what has been changed since the sweep began of that which nobody holds while this is asked for: runs
    /// before and after could not be compared.
    pub(super) fn unchanged(&self, wanted: &Wanted) -> Result<(), SweepError> {
        let now = Session::open(&self.path, self.lease.sysfs())?.state.administrator;
        let asked = asked(&now, std::iter::once(wanted));
        let mut others = self.administrator.iter().filter(|(knob, _)| !asked.contains(*knob));
        others
            .find(|(knob, before)| now.get(*knob) != Some(*before))
            .map_or(Ok(()), |(knob, _)| Err(SweepError::Taken(knob)))
    }

    pub(super) fn counters(&self) -> Result<Counters, SweepError> {
        Ok(Counters::read(self.lease.sysfs())?)
    }

    pub(super) fn ksmd_cpu(&self) -> Duration {
        self.ksmd.and_then(|ksmd| ksmd.cpu_time()).unwrap_or_default()
    }

    pub(super) fn sees_ksmd(&self) -> bool {
        self.ksmd.is_some()
    }

    pub(super) fn path(&self) -> &StatePath {
        &self.path
    }

    pub(super) fn sysfs(&self) -> &KsmSysfs {
        self.lease.sysfs()
    }

    /// Whether somebody else holds the settings too.
    pub(super) fn others(&self) -> Result<bool, SweepError> {
        let me = i32::try_from(std::process::id()).unwrap_or_default();
        Ok(Lease::holders_at(&self.path)?.iter().any(|holder| holder.process.pid != me))
    }

    /// Has ksmd meet the end of the processes that are gone, which count as if they lived until it has been there:
    /// without a pause, until its counters stay as they are, for `at_most`. Returns whether they did.
    pub(super) fn forget(&self, at_most: Duration, interrupted: &mut dyn FnMut() -> bool) -> Result<bool, SweepError> {
        let unpaused = Wanted {
            run: Some(true),
            governs: true,
            rate: Some(Rate::UNPAUSED),
            smart_scan: Some(false),
            ..Wanted::default()
        };
        self.ask(unpaused)?;
        let deadline = Instant::now() + at_most;
        let known = |counters: &Counters| (counters.pages_shared, counters.pages_sharing, counters.ksm_zero_pages);
        let (mut last, mut since) = (self.counters()?, Instant::now());
        let mut quiet = false;
        while !quiet && Instant::now() < deadline && !interrupted() {
            std::thread::sleep(LOOK);
            let now = self.counters()?;
            // Other processes may be merged meanwhile and change little: what counts is that nothing falls any more.
            if known(&now) != known(&last) {
                (last, since) = (now, Instant::now());
            }
            let passes = now.full_scans.saturating_sub(last.full_scans) >= 2;
            // With nobody left to scan ksmd sleeps and ends no pass.
            let asleep = now.pages_scanned == last.pages_scanned;
            quiet = since.elapsed() >= QUIET && (passes || asleep);
        }
        self.ask(Wanted::default())?;
        Ok(quiet)
    }

    /// Ends what the command left below us. Returns how many there were.
    pub(super) fn end_left_behind(&self) -> u64 {
        let members = self.tree.members();
        for member in &members {
            // Gone meanwhile is what is wanted.
            if let Some(pid) = rustix::process::Pid::from_raw(member.process.pid) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
        let deadline = Instant::now() + Duration::from_secs(2);
        while !self.tree.members().is_empty() && Instant::now() < deadline {
            kernel::signals::reap_others(kernel::Pid(self.tree.left_out()));
            std::thread::sleep(LOOK);
        }
        members.len() as u64
    }

    pub(super) fn leave(self) -> Result<Repaired, SweepError> {
        Ok(self.lease.release()?)
    }
}
