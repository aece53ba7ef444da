//! ksmd, driven for a tree of processes: fast while there is something to merge, slowly for the rest, then not at all.
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use kernel::ksm_sysfs::KsmSysfs;

use crate::error::KsmError;
use crate::ksmd::{Counters, Ksmd, cow_ksm};
use crate::lease::Lease;
use crate::pace::{DriveSettings, Pace, Phase, wanted};
use crate::proc_stat::ProcessId;
use crate::repaired::{Foreign, Repaired};
use crate::state::StatePath;
use crate::tree::{Member, Tree, TreeSum};

/// Where a drive stands. Counters of KSM are of the whole host; `tree` is of the driven processes.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Progress {
    /// Since the start.
    pub elapsed_seconds: f64,
    /// What ksmd is asked for.
    pub phase: Phase,
    /// The last pass over everything brought nothing new.
    pub settled: bool,
    /// The host's counters.
    pub counters: Counters,
    /// The tree's.
    pub tree: TreeSum,
    /// Processor seconds of ksmd since the start; `None` where ksmd cannot be seen.
    pub ksmd_cpu_seconds: Option<f64>,
    /// The tree's part of the host's `pages_shared`: see [`Drive::bytes_saved`].
    pub pages_shared: u64,
    /// The tree's part of the host's `pages_sharing`.
    pub pages_sharing: u64,
    /// Bytes that merging keeps the tree from using, see [`Drive::bytes_saved`].
    pub bytes_saved: u64,
    /// The most that it was.
    pub bytes_saved_peak: u64,
    /// Mappings merged since the start, each time counted that the number rose between two looks.
    pub merges: u64,
    /// Writes to merged pages of the host since the start (`cow_ksm`).
    pub unshared_by_write: u64,
}

/// ksmd at work for one tree of processes. Call [`Drive::tick`] when it asks to be called; it has no thread of its own.
#[derive(Debug)]
pub struct Drive {
    lease: Lease,
    settings: DriveSettings,
    tree: Tree,
    started: Instant,
    ksmd: Option<Ksmd>,
    ksmd_cpu_at_start: Duration,
    cow_at_start: u64,
    phase: Phase,
    entered: Instant,
    settled: bool,
    window: Window,
    seen: Seen,
    relook: Relook,
    effort: Effort,
    counters: Counters,
    sum: TreeSum,
    summed: Instant,
    bytes_saved_peak: u64,
    merges: u64,
    /// Heard of at changes of the phase, for [`Drive::stop`] to tell.
    foreign: Vec<Foreign>,
}

/// Passes that are judged together.
#[derive(Clone, Copy, Debug)]
struct Window {
    opened: Instant,
    full_scans: u64,
    pages_scanned: u64,
    merged: u64,
}

/// The tree as it was when it was last judged.
#[derive(Debug, Default)]
struct Seen {
    processes: BTreeSet<ProcessId>,
    anonymous_pages: u64,
}

/// What ksmd has cost and brought since this was last judged, over short rests too: memory that grows in steps wakes a
/// drive at each of them.
#[derive(Clone, Copy, Debug)]
struct Effort {
    since: Instant,
    full_scans: u64,
    cpu: Duration,
    merged: u64,
}

/// When an idle drive looks again although nothing seems new: pages diverge and become equal again.
#[derive(Clone, Copy, Debug)]
struct Relook {
    at: Instant,
    /// Not even growth wakes it before: the last effort was not worth it.
    not_before: Instant,
    pause: Duration,
    cpu_before: Duration,
}

/// A pass that was under way at the start saw an unknown part, a page needs two visits, and the visit that merges may
/// be the end of the last: three ends of passes lie around two whole ones.
const PASSES: u64 = 3;
const SHORTEST_RELOOK: Duration = Duration::from_secs(20);
const LONGEST_RELOOK: Duration = Duration::from_secs(600);
/// Looking again may cost one part in this many of one processor.
const RELOOK_SHARE: u32 = 100;
/// Memory that comes and goes can keep ksmd busy for nothing. An effort is judged after this time and two passes...
const JUDGED: Duration = Duration::from_secs(5);
/// ... and is worth going on if it merges this many pages in a second of ksmd.
const WORTH: f64 = 1000.0;
/// After one that was not, growth is left alone for this many times what it cost.
const PENANCE: f64 = 20.0;
/// A new process is worth a pass only if it stays.
const YOUNG: Duration = Duration::from_secs(2);

impl Drive {
    /// Takes the lease and sets ksmd to work, at the usual state file of this user.
    ///
    /// # Errors
    /// As [`Lease::acquire`].
    pub fn start(sysfs: &KsmSysfs, settings: DriveSettings, tree: Tree) -> Result<Self, KsmError> {
        Self::start_at(&StatePath::for_this_user(), sysfs, settings, tree).map(|(drive, _)| drive)
    }

    /// As [`Drive::start`] with a state file of one's own, and with what was put right on the way.
    ///
    /// # Errors
    /// As [`Lease::acquire_at`].
    pub fn start_at(
        path: &StatePath,
        sysfs: &KsmSysfs,
        settings: DriveSettings,
        tree: Tree,
    ) -> Result<(Self, Repaired), KsmError> {
        let counters = Counters::read(sysfs)?;
        let ksmd = Ksmd::find();
        let ksmd_cpu_at_start = ksmd.and_then(|ksmd| ksmd.cpu_time()).unwrap_or_default();
        let phase = Phase::Boost;
        let (lease, repaired) = Lease::acquire_at(path, sysfs, wanted(settings, phase))?;
        let started = Instant::now();
        let relook = Relook { at: started, not_before: started, pause: SHORTEST_RELOOK, cpu_before: ksmd_cpu_at_start };
        let mut drive = Self {
            lease,
            settings,
            tree,
            started,
            ksmd,
            ksmd_cpu_at_start,
            cow_at_start: cow_ksm(),
            phase,
            entered: started,
            settled: false,
            window: Window { opened: started, full_scans: 0, pages_scanned: 0, merged: 0 },
            seen: Seen::default(),
            relook,
            effort: Effort { since: started, full_scans: counters.full_scans, cpu: ksmd_cpu_at_start, merged: 0 },
            counters,
            sum: TreeSum::default(),
            summed: started,
            bytes_saved_peak: 0,
            merges: 0,
            foreign: Vec::new(),
        };
        drive.sum = drive.tree.sum();
        drive.open_window();
        Ok((drive, repaired))
    }

    /// Looks at the counters and at the tree, and changes what is asked of ksmd if that is due. Returns how long the
    /// caller may sleep until the next look.
    ///
    /// # Errors
    /// Those of reading KSM's files and of the lease's state.
    pub fn tick(&mut self) -> Result<Duration, KsmError> {
        let now = Instant::now();
        let cpu_before = self.ksmd_cpu();
        self.counters = Counters::read(self.lease.sysfs())?;
        if self.phase == Phase::Idle {
            let members = self.tree.members();
            if let Some(phase) = self.woken_by(&members, now) {
                self.relook.cpu_before = cpu_before;
                if now.duration_since(self.entered) > JUDGED {
                    self.begin_effort(now, cpu_before);
                }
                self.enter(phase)?;
            } else if now.duration_since(self.summed) >= Duration::from_secs(5) {
                self.account();
            }
            return Ok(Duration::from_secs(1));
        }
        if now.duration_since(self.summed) >= Duration::from_secs(1) {
            self.account();
        }
        if self.settings.pace != Pace::FlatOut && self.in_vain(now, cpu_before) {
            self.rest(now, cpu_before)?;
        } else if self.grown(&self.tree.members()).is_some() {
            // New memory needs its passes from here on. A boost stays what it is.
            self.open_window();
        } else if let Some(gain) = self.window_gain(now) {
            let merged = self.merged();
            let nothing = gain <= merged / 1000 + 16;
            let little = gain <= merged / 50 + 64;
            self.settled = nothing;
            match (self.settings.pace, self.phase) {
                (Pace::FlatOut, _) => self.open_window(),
                (_, _) if nothing => self.rest(now, cpu_before)?,
                (_, Phase::Boost) if little => self.enter(Phase::Steady)?,
                (_, _) => self.open_window(),
            }
        }
        Ok(Duration::from_millis(if self.phase == Phase::Boost { 100 } else { 500 }))
    }

    /// Looks until a whole pass has brought nothing new, or until the time is over. Returns whether it did.
    ///
    /// # Errors
    /// As [`Drive::tick`].
    pub fn until_settled(&mut self, timeout: Duration) -> Result<bool, KsmError> {
        let deadline = Instant::now() + timeout;
        loop {
            let pause = self.tick()?;
            if self.settled || Instant::now() >= deadline {
                self.account();
                return Ok(self.settled);
            }
            std::thread::sleep(pause.min(Duration::from_millis(50)));
        }
    }

    /// The last whole pass over everything brought nothing new, and nothing new has appeared since.
    #[must_use]
    pub fn settled(&self) -> bool {
        self.settled
    }

    /// What ksmd is asked for at the moment.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Bytes that merging keeps the tree from using. The kernel counts a process's merged mappings and the host's
    /// savings, not a process's savings: the tree gets its proportional part, which is exact where only the tree uses
    /// KSM.
    #[must_use]
    pub fn bytes_saved(&self) -> u64 {
        (self.shares().1 + self.sum.ksm_zero_pages).saturating_mul(kernel::page_size())
    }

    /// The tree's parts of `pages_shared` and `pages_sharing`.
    fn shares(&self) -> (u64, u64) {
        let Counters { pages_shared, pages_sharing, .. } = self.counters;
        let mappings = (pages_shared + pages_sharing).max(1);
        let merging = self.sum.ksm_merging_pages.min(mappings);
        let sharing = u128::from(merging) * u128::from(pages_sharing) / u128::from(mappings);
        let sharing = u64::try_from(sharing).expect("not more than pages_sharing");
        (merging - sharing, sharing)
    }

    /// Where it stands, with fresh counters.
    ///
    /// # Errors
    /// Those of reading KSM's files.
    pub fn progress(&mut self) -> Result<Progress, KsmError> {
        self.counters = Counters::read(self.lease.sysfs())?;
        self.account();
        Ok(self.last_progress())
    }

    /// Where it stood at the last look.
    #[must_use]
    pub fn last_progress(&self) -> Progress {
        let (pages_shared, pages_sharing) = self.shares();
        Progress {
            pages_shared,
            pages_sharing,
            elapsed_seconds: self.started.elapsed().as_secs_f64(),
            phase: self.phase,
            settled: self.settled,
            counters: self.counters,
            tree: self.sum,
            ksmd_cpu_seconds: self.ksmd.map(|_| self.ksmd_cpu().saturating_sub(self.ksmd_cpu_at_start).as_secs_f64()),
            bytes_saved: self.bytes_saved(),
            bytes_saved_peak: self.bytes_saved_peak,
            merges: self.merges,
            unshared_by_write: cow_ksm().saturating_sub(self.cow_at_start),
        }
    }

    /// Ends the drive, and says what others have written since it began. Merged pages stay merged.
    ///
    /// # Errors
    /// As [`Lease::release`].
    pub fn stop(self) -> Result<Repaired, KsmError> {
        let Self { lease, mut foreign, .. } = self;
        let mut repaired = lease.release()?;
        foreign.append(&mut repaired.foreign);
        Ok(Repaired { foreign, ..repaired })
    }

    fn ksmd_cpu(&self) -> Duration {
        self.ksmd.and_then(|ksmd| ksmd.cpu_time()).unwrap_or_default()
    }

    fn merged(&self) -> u64 {
        self.sum.ksm_merging_pages + self.sum.ksm_zero_pages
    }

    fn account(&mut self) {
        let before = self.merged();
        self.sum = self.tree.sum();
        self.summed = Instant::now();
        self.merges += self.merged().saturating_sub(before);
        self.bytes_saved_peak = self.bytes_saved_peak.max(self.bytes_saved());
    }

    fn open_window(&mut self) {
        let members = self.tree.members();
        self.seen = Seen {
            anonymous_pages: members.iter().map(|member| member.anonymous_pages).sum(),
            processes: members.into_iter().map(|member| member.process).collect(),
        };
        self.account();
        self.window = Window {
            opened: Instant::now(),
            full_scans: self.counters.full_scans,
            pages_scanned: self.counters.pages_scanned,
            merged: self.merged(),
        };
    }

    /// Pages merged in this window if it has seen enough passes.
    fn window_gain(&mut self, now: Instant) -> Option<u64> {
        let passes = match self.counters.full_scans.checked_sub(self.window.full_scans) {
            Some(passes) => passes,
            None => {
                // Somebody unmerged the host, which sets the count back.
                self.open_window();
                return None;
            }
        };
        // ksmd sleeps while no process has anything to merge; its passes never end then.
        let asleep = self.counters.pages_scanned == self.window.pages_scanned
            && passes == 0
            && now.duration_since(self.window.opened) > Duration::from_secs(5);
        if passes < PASSES && !asleep {
            return None;
        }
        self.account();
        Some(self.merged().saturating_sub(self.window.merged))
    }

    /// Whether the last passes cost time and merged next to nothing. Starts the next judgement.
    fn in_vain(&mut self, now: Instant, cpu: Duration) -> bool {
        let passes = self.counters.full_scans.saturating_sub(self.effort.full_scans);
        let spent = cpu.saturating_sub(self.effort.cpu).as_secs_f64();
        if now.duration_since(self.effort.since) < JUDGED || passes < 2 || spent < 0.5 {
            return false;
        }
        let gain = self.merged().saturating_sub(self.effort.merged) as f64;
        self.begin_effort(now, cpu);
        let vain = gain < spent * WORTH;
        if vain {
            self.relook.not_before = now + Duration::from_secs_f64(spent * PENANCE).min(LONGEST_RELOOK);
        }
        vain
    }

    fn begin_effort(&mut self, since: Instant, cpu: Duration) {
        self.effort = Effort { since, full_scans: self.counters.full_scans, cpu, merged: self.merged() };
    }

    /// Pages by which the tree has outgrown the last look, if that is worth a pass.
    fn grown(&self, members: &[Member]) -> Option<u64> {
        let pages: u64 = members.iter().map(|member| member.anonymous_pages).sum();
        let growth = pages.saturating_sub(self.seen.anonymous_pages);
        (growth > self.seen.anonymous_pages / 50 + 512).then_some(growth)
    }

    /// What an idle drive has to wake up for.
    fn woken_by(&mut self, members: &[Member], now: Instant) -> Option<Phase> {
        if now < self.relook.not_before {
            return None;
        }
        if let Some(growth) = self.grown(members) {
            let much = growth > self.seen.anonymous_pages / 10 + 1024;
            self.relook.pause = SHORTEST_RELOOK / 2;
            return Some(if much { Phase::Boost } else { Phase::Steady });
        }
        let uptime_ticks = uptime().as_secs_f64() * rustix::param::clock_ticks_per_second() as f64;
        let young = YOUNG.as_secs_f64() * rustix::param::clock_ticks_per_second() as f64;
        let newcomer = members.iter().any(|member| {
            !self.seen.processes.contains(&member.process) && (member.process.start_time as f64) + young < uptime_ticks
        });
        (newcomer || now >= self.relook.at).then_some(Phase::Steady)
    }

    fn enter(&mut self, phase: Phase) -> Result<(), KsmError> {
        self.phase = phase;
        self.settled = phase == Phase::Idle;
        self.foreign.extend(self.lease.update(wanted(self.settings, phase))?.foreign);
        self.open_window();
        self.entered = Instant::now();
        Ok(())
    }

    /// Stops asking for anything until something new appears or the next look is due.
    fn rest(&mut self, now: Instant, cpu: Duration) -> Result<(), KsmError> {
        let cost = cpu.saturating_sub(self.relook.cpu_before);
        self.relook.pause = (self.relook.pause * 2).max(cost * RELOOK_SHARE).clamp(SHORTEST_RELOOK, LONGEST_RELOOK);
        self.relook.at = now + self.relook.pause;
        self.enter(Phase::Idle)
    }
}

fn uptime() -> Duration {
    let text = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    Duration::from_secs_f64(text.split(' ').next().and_then(|seconds| seconds.parse().ok()).unwrap_or(0.0))
}
