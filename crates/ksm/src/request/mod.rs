//! Merging on request: chosen memory of chosen processes, with the stock kernel, done when the call returns.
//!
//! 1. `walk` lists the pages that KSM would take, `look` reads what they hold, `partners` chooses those that have an
//!    equal page, and a second look drops what has changed. Only these are worth ksmd's time.
//! 2. `marks` plans few and exact ranges, which `advise` puts into the processes as MADV_MERGEABLE.
//! 3. `drive` takes the lease on KSM's settings and lets ksmd work flat out until each page is merged, or has been
//!    visited as often as a merge needs, and gives the settings back.
//! 4. `pages` tells by page frames what has become of each page, and why, as far as that can be told.
//!
//! Nothing here decides about contents: the kernel compares every byte under write protection before it merges. A page
//! that is marked for nothing costs time and the kernel's 64 bytes.
//!
//! `unmerge` is the way back, in steps, with a look at free memory before each. That of the whole host is
//! [`set`](crate::set)'s.
use std::collections::{BTreeSet, HashSet};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use kernel::ksm_sysfs::KsmSysfs;
use kernel::{Bytes, FrameFlagsFile, PageCount, Pid, ProcError, Range, pages_of_huge};

use self::elsewhere::Elsewhere;
use self::look::Seen;
use self::pages::{Page, State, Work};
use self::partners::{Anchors, Chosen, Pages};
use self::walk::{Target, Walk};
use crate::error::KsmError;
use crate::proc_stat::ProcessId;
use crate::state::StatePath;

mod advise;
mod drive;
mod elsewhere;
mod look;
mod marks;
mod pages;
mod partners;
mod report;
mod unmerge;
mod walk;

pub use crate::room::Short;
pub use report::{End, Left, ProcessReport, Refusal, Report};
pub use unmerge::{Unmerge, UnmergeEnd, UnmergeReport, UnmergedProcess, unmerge};

/// What is to be merged.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// Processes, each address space once.
    pub processes: Vec<Pid>,
    /// Only these addresses, in each of them; all if there are none.
    pub ranges: Vec<Range>,
    /// Look for partners in these processes only, not among the pages that KSM shares already in others.
    pub within: bool,
    /// Also what is on the list of programs that hold secrets.
    pub never_merge_anyway: bool,
    /// Split huge pages for any of their subpages.
    pub split_huge: bool,
    /// Drive ksmd until all is done, for so long at most; otherwise only mark.
    pub wait: Option<Duration>,
}

/// How far a request has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Listing pages: processes.
    Listing {
        /// Processes listed.
        done: usize,
        /// Of so many.
        of: usize,
    },
    /// Reading pages.
    Reading {
        /// Pages read.
        pages: u64,
        /// Of so many.
        of: u64,
    },
    /// Reading what KSM shares in other processes.
    ReadingElsewhere,
    /// Marking.
    Marking {
        /// Ranges marked.
        runs: u64,
        /// Of so many.
        of: u64,
    },
    /// ksmd at work.
    Merging {
        /// Pages merged.
        pages: u64,
        /// Of so many.
        of: u64,
    },
    /// Un-merging.
    Unmerging {
        /// Address space gone through.
        bytes: Bytes,
        /// Of so much.
        of: Bytes,
    },
}

/// Hears how far it is, often, and can end it: what was done stays, what was changed for the time being is put back.
pub type Tell<'a> = &'a mut dyn FnMut(Stage) -> ControlFlow<()>;

/// Why a request cannot be done at all. What befalls single processes is in the report.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// KSM's settings or the lease on them.
    #[error(transparent)]
    Ksm(#[from] KsmError),
    /// It cannot be seen which pages are merged.
    #[error("cannot see which pages KSM shares: root, or CAP_SYS_ADMIN in the first user namespace, is needed")]
    Frames(#[source] ProcError),
    /// Something of /proc.
    #[error(transparent)]
    Proc(#[from] ProcError),
    /// No random numbers.
    #[error("cannot draw a secret")]
    Secret(#[source] std::io::Error),
}

/// Pages may change between the two looks for so long at least.
const BETWEEN_LOOKS: Duration = Duration::from_millis(100);

/// Does a request, under a lease whose state is at `path` if it is to wait.
///
/// # Errors
/// [`RequestError`].
pub fn merge(request: &Request, sysfs: &KsmSysfs, path: &StatePath, tell: Tell<'_>) -> Result<Report, RequestError> {
    let begun = Instant::now();
    if !sysfs.exists() {
        return Err(KsmError::Missing { path: sysfs.root().to_owned() }.into());
    }
    if request.wait.is_some() {
        crate::sysfs::check_writable(sysfs)?;
    }
    let mut flags = pages::frames().map_err(RequestError::Frames)?;
    let secret = look::secret().map_err(RequestError::Secret)?;
    let mut report = Report::default();
    let mut found = Found::list(request, &mut flags, &mut report, tell);
    let chosen = found.choose(request, &secret, &mut flags, &mut report, tell);
    report.look_seconds = begun.elapsed().as_secs_f64();
    let Some((chosen, anchors)) = chosen else {
        report.end = End::Interrupted;
        return Ok(found.finish(report, begun));
    };
    let marking = Instant::now();
    let marked = found.mark(&chosen, tell);
    report.mark_seconds = marking.elapsed().as_secs_f64();
    match (marked, request.wait) {
        (ControlFlow::Break(()), _) => report.end = End::Interrupted,
        (ControlFlow::Continue(()), None) => report.end = End::Marked,
        (ControlFlow::Continue(()), Some(_)) if found.works.iter().all(|work| work.pages.is_empty()) => {
            report.end = End::Done;
        }
        (ControlFlow::Continue(()), Some(timeout)) => {
            let more_passes = chosen.huge_split > 0;
            let works = &mut found.works;
            let driven = drive::drive((path, sysfs), works, &mut flags, timeout, more_passes, &mut report, tell)?;
            report.end = driven.end;
            for work in works.iter_mut() {
                work.look(true, &mut flags)?;
            }
            pages::judge(works, &anchors, &secret, driven.visited);
            let shared: HashSet<u64> = &found.walk.merged_frames | &found.elsewhere;
            let (frames, zeros) = pages::saved(works, &shared);
            report.bytes_saved = PageCount(frames).bytes().get();
            report.zero_pages_merged = zeros;
        }
    }
    Ok(found.finish(report, begun))
}

/// What a request has found.
struct Found {
    works: Vec<Work>,
    /// Those that were left at once.
    left: Vec<ProcessReport>,
    walk: Walk,
    /// Frames that KSM shares in other processes.
    elsewhere: HashSet<u64>,
}

impl Found {
    /// Lists the pages of all processes.
    fn list(request: &Request, flags: &mut FrameFlagsFile, report: &mut Report, tell: Tell<'_>) -> Self {
        let mut found = Self { works: Vec::new(), left: Vec::new(), walk: Walk::default(), elsewhere: HashSet::new() };
        let ranges = ascending(&request.ranges);
        let users = rules::Users::host();
        let pids: BTreeSet<Pid> = request.processes.iter().copied().collect();
        for (done, pid) in pids.iter().enumerate() {
            // Whoever ends it hears that a moment later, where it is looked at.
            let _ = tell(Stage::Listing { done, of: pids.len() });
            let place = u32::try_from(found.works.len()).expect("pids are fewer");
            let target = ProcessId::of(pid.get()).ok_or(Left::Gone).and_then(Target::open);
            let allowed = match (request.never_merge_anyway, rules::facts(*pid, &users)) {
                (false, Some(facts)) => rules::never_merge(&facts),
                _ => None,
            };
            let target = match allowed {
                Some(why) => Err(Left::NeverMerge(format!("{} ({})", why.name, why.reason))),
                None => target,
            };
            let listed = target.and_then(|target| {
                found.walk.add(&target, place, &ranges, Some(&mut *flags))?;
                Ok(target)
            });
            let mut own = ProcessReport { pid: pid.get(), ..ProcessReport::default() };
            match listed {
                Ok(target) => found.works.push(Work { target, pages: Vec::new(), report: own, gone: false }),
                Err(left) => {
                    own.leave(&left);
                    found.left.push(own);
                }
            }
        }
        report.pages_merged_before = found.walk.merged_before;
        report.pages_not_eligible = std::mem::take(&mut found.walk.refused);
        found
    }

    /// Reads everything, and what seems worth it once more. `None` if it was ended.
    fn choose(
        &mut self,
        request: &Request,
        secret: &page::Secret,
        flags: &mut FrameFlagsFile,
        report: &mut Report,
        tell: Tell<'_>,
    ) -> Option<(Chosen, Anchors)> {
        let targets: Vec<&Target> = self.works.iter().map(|work| &work.target).collect();
        let first = Instant::now();
        let of = u64::from(self.walk.pages);
        let all = [(0, self.walk.pages)];
        let seen =
            look::read(&self.walk, &targets, &all, secret, |pages| tell(Stage::Reading { pages, of }).is_continue())?;
        let processes: Vec<ProcessId> = targets.iter().map(|target| target.process).collect();
        let mut elsewhere = Elsewhere::default();
        if !request.within {
            let mut go_on = || tell(Stage::ReadingElsewhere).is_continue();
            elsewhere = elsewhere::look(&processes, secret, flags, &mut go_on)?;
        }
        for seen in &seen {
            self.works[self.walk.span_of(seen.page).target as usize].report.pages_read += 1;
        }
        report.pages_read = seen.len() as u64;
        report.pages_read_elsewhere = elsewhere.pages;
        self.elsewhere = elsewhere.frames;
        let anchors = Anchors { shared: elsewhere.hashes, zeros: true };
        let chosen = partners::choose(seen, self, &anchors, request.split_huge);
        // A page that is being written to is not worth a mark.
        std::thread::sleep(BETWEEN_LOOKS.saturating_sub(first.elapsed()));
        let merged =
            self.walk.spans.iter().filter(|span| span.merged).flat_map(|span| span.first..span.first + span.pages);
        let again: BTreeSet<u32> = chosen.pages.iter().map(|seen| seen.page).chain(merged).collect();
        let of = again.len() as u64;
        let targets: Vec<&Target> = self.works.iter().map(|work| &work.target).collect();
        let runs = look::runs(again);
        let mut seen =
            look::read(&self.walk, &targets, &runs, secret, |pages| tell(Stage::Reading { pages, of }).is_continue())?;
        let before = chosen.pages.len();
        seen.retain(|now| match chosen.pages.binary_search_by_key(&now.page, |seen| seen.page) {
            Ok(at) => chosen.pages[at].hash == now.hash,
            Err(_) => true,
        });
        let lasted = seen.iter().filter(|seen| !self.is_merged(seen.page)).count();
        report.pages_volatile = (before - lasted) as u64;
        let mut last = partners::choose(seen, self, &anchors, request.split_huge);
        last.left_huge += chosen.left_huge;
        last.huge_left += chosen.huge_left;
        report.pages_with_partner = last.pages.len() as u64;
        report.huge_pages_left = last.huge_left;
        report.pages_left_huge = last.left_huge;
        report.huge_pages_to_split = last.huge_split;
        Some((last, anchors))
    }

    /// Marks the chosen pages, and keeps those of each process that are mergeable then.
    fn mark(&mut self, chosen: &Chosen, tell: Tell<'_>) -> ControlFlow<()> {
        for &Seen { hash, page } in &chosen.pages {
            let work = &mut self.works[self.walk.span_of(page).target as usize];
            let (address, frame) = (self.walk.address_of(page), self.walk.frames.get(&page).copied());
            work.pages.push(Page { address, hash, frame, state: State::Waiting });
        }
        let mut result = ControlFlow::Continue(());
        for (place, work) in (0..).zip(&mut self.works) {
            work.pages.sort_unstable_by_key(|page| page.address);
            work.report.pages_with_partner = work.pages.len() as u64;
            let areas: Vec<_> = self.walk.areas.iter().filter(|area| area.target == place).copied().collect();
            if result.is_continue() {
                result = advise::mark(work, &areas, tell);
            }
            work.keep_marked();
        }
        result
    }

    fn finish(self, mut report: Report, begun: Instant) -> Report {
        for mut work in self.works {
            work.report.gone |= work.gone;
            work.report.pages_merged = work.pages.len() as u64 - work.waiting();
            report.processes.push(work.report);
        }
        report.processes.extend(self.left);
        report.processes.sort_by_key(|process| process.pid);
        for process in &report.processes {
            report.pages_marked += process.pages_marked;
            report.pages_merged += process.pages_merged;
            for (reason, pages) in &process.refused {
                *report.refused.entry(reason).or_default() += pages;
            }
        }
        report.elapsed_seconds = begun.elapsed().as_secs_f64();
        report
    }
}

impl Pages for Found {
    fn is_merged(&self, page: u32) -> bool {
        self.walk.span_of(page).merged
    }

    fn frame(&self, page: u32) -> Option<u64> {
        self.walk.frames.get(&page).copied()
    }

    fn huge(&self, page: u32) -> Option<u64> {
        let span = self.walk.span_of(page);
        let place = u64::from(span.target) << 48;
        span.huge.then(|| place | (self.walk.address_of(page).page_index() / pages_of_huge()))
    }
}

/// Ranges in order, overlapping ones as one.
fn ascending(ranges: &[Range]) -> Vec<Range> {
    let mut sorted = ranges.to_vec();
    sorted.sort_unstable();
    let mut out: Vec<Range> = Vec::new();
    for range in sorted {
        match out.last_mut() {
            Some(last) if range.start() <= last.end() => {
                *last = Range::new(last.start(), last.end().max(range.end())).expect("it begins no later");
            }
            _ => out.push(range),
        }
    }
    out
}
