//! The way back: marks are taken off in steps, each page in them gets a frame of its own again.
//!
//! The kernel does a range at a stroke and calls the OOM killer when memory runs out in the middle. So each step is small,
//! and before each there is a look at what the machine and the process's control groups have left. What is done stays
//! done: the same request, made again, goes on where it stopped.
use std::time::Instant;

use kernel::inject::{Advice, Call};
use kernel::ksm_sysfs::ksm_stat;
use kernel::{Bytes, Errno, FrameFlagsFile, PageCount, Pid, Range, smaps};
use serde::Serialize;

use super::report::{Left, ProcessReport};
use super::walk::Target;
use super::{RequestError, Short, Stage, Tell, advise, ascending, pages};
use crate::proc_stat::ProcessId;
use crate::room;

/// What is to be un-merged.
#[derive(Clone, Debug)]
pub struct Unmerge {
    /// Processes, each address space once.
    pub processes: Vec<Pid>,
    /// Only these addresses, in each of them; all if there are none.
    pub ranges: Vec<Range>,
    /// Address space of one step.
    pub step: Bytes,
    /// Take back the process-wide switch too.
    pub all: bool,
}

/// How it ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum UnmergeEnd {
    /// All is done.
    #[default]
    Done,
    /// Memory would have run out.
    ShortOfMemory,
    /// It was interrupted.
    Interrupted,
}

/// One process. Counts are pages unless said otherwise.
#[derive(Clone, Debug, Default, Serialize)]
pub struct UnmergedProcess {
    /// Its number.
    pub pid: i32,
    /// Address space whose mark was taken off, in bytes.
    pub bytes_unmarked: u64,
    /// Pages that KSM shared there, and that are the process's own now; `None` for who may not see frames.
    pub pages_unmerged: Option<u64>,
    /// `ksm_merging_pages` afterwards: what is left, elsewhere or not at all un-merged. ksmd corrects it in its next pass.
    pub ksm_merging_pages: Option<u64>,
    /// The process-wide switch is on still: new memory is marked again.
    pub ksm_merge_any: Option<bool>,
    /// Times that one of its threads was stopped.
    pub stops: u64,
    /// Seconds that it was stopped, all together.
    pub stopped_seconds: f64,
    /// It has ended, or executes something else now.
    pub gone: bool,
    /// Why not all was done.
    pub left: Option<String>,
}

/// What it came to.
#[derive(Clone, Debug, Default, Serialize)]
pub struct UnmergeReport {
    /// How it ended.
    pub end: UnmergeEnd,
    /// What was short.
    pub short: Option<Short>,
    /// Each process, up to where it ended.
    pub processes: Vec<UnmergedProcess>,
    /// Seconds in all.
    pub elapsed_seconds: f64,
}

/// What a step looked like.
enum Step {
    Done,
    Left(Left),
    Short(Short),
    Interrupted,
}

/// How often a step is tried again that a signal broke off.
const TRIES: usize = 10;

/// Un-merges.
///
/// # Errors
/// [`RequestError`]; what befalls single processes is in the report.
pub fn unmerge(request: &Unmerge, tell: Tell<'_>) -> Result<UnmergeReport, RequestError> {
    let begun = Instant::now();
    // Who may not see frames counts on the worst: every page of a step.
    let mut flags = pages::frames().ok();
    let mut report = UnmergeReport::default();
    for &pid in &request.processes {
        let pages_unmerged = flags.is_some().then_some(0);
        let mut own = UnmergedProcess { pid: pid.get(), pages_unmerged, ..UnmergedProcess::default() };
        let step = match ProcessId::of(pid.get()).ok_or(Left::Gone).and_then(Target::open) {
            Ok(target) => process(&target, request, flags.as_mut(), &mut own, tell)?,
            Err(left) => Step::Left(left),
        };
        let stat = ksm_stat(pid).unwrap_or_default();
        (own.ksm_merging_pages, own.ksm_merge_any) = (stat.ksm_merging_pages, stat.ksm_merge_any);
        match step {
            Step::Done => {}
            Step::Left(left) => {
                own.gone = left == Left::Gone;
                own.left = Some(left.to_string());
            }
            Step::Short(short) => {
                own.left = Some(short.to_string());
                (report.end, report.short) = (UnmergeEnd::ShortOfMemory, Some(short));
            }
            Step::Interrupted => report.end = UnmergeEnd::Interrupted,
        }
        report.processes.push(own);
        if report.end != UnmergeEnd::Done {
            break;
        }
    }
    report.elapsed_seconds = begun.elapsed().as_secs_f64();
    Ok(report)
}

fn process(
    target: &Target,
    request: &Unmerge,
    mut flags: Option<&mut FrameFlagsFile>,
    own: &mut UnmergedProcess,
    tell: Tell<'_>,
) -> Result<Step, RequestError> {
    let pieces = match pieces(target, request) {
        Ok(pieces) => pieces,
        Err(left) => return Ok(Step::Left(left)),
    };
    let of: Bytes = pieces.iter().map(Range::len).sum();
    for piece in pieces {
        if tell(Stage::Unmerging { bytes: Bytes(own.bytes_unmarked), of }).is_break() {
            return Ok(Step::Interrupted);
        }
        let merged = match flags.as_deref_mut() {
            Some(flags) => pages::merged_in(&target.pagemap, piece, flags)?,
            None => piece.pages(),
        };
        if let Err(short) = check(target, merged)? {
            return Ok(Step::Short(short));
        }
        if let Err(left) = take_off(target, piece, own) {
            return Ok(Step::Left(left));
        }
        own.bytes_unmarked += piece.len().get();
        own.pages_unmerged = own.pages_unmerged.map(|pages| pages + merged.get());
    }
    // Kernels before 6.16 do not say whether it is on.
    if request.all && ksm_stat(target.pid()).unwrap_or_default().ksm_merge_any != Some(false) {
        return switch_off(target, own);
    }
    Ok(Step::Done)
}

/// The marked parts of a process, in steps.
fn pieces(target: &Target, request: &Unmerge) -> Result<Vec<Range>, Left> {
    let vmas = smaps::read(target.pid())?;
    let marked: Vec<Range> = vmas.iter().filter(|vma| vma.flags.mergeable()).map(|vma| vma.vma.range).collect();
    let ranges = ascending(&request.ranges);
    let parts: Vec<Range> = if ranges.is_empty() {
        marked
    } else {
        marked.iter().flat_map(|vma| ranges.iter().filter_map(|range| range.intersect(vma))).collect()
    };
    Ok(parts.iter().flat_map(|part| part.pieces(request.step)).collect())
}

fn check(target: &Target, pages: PageCount) -> Result<Result<(), Short>, RequestError> {
    match room::for_process(target.pid(), pages.bytes()) {
        // What has ended needs no memory; the step finds that out.
        Err(error) if error.is_gone() => Ok(Ok(())),
        other => Ok(other?),
    }
}

/// One step. The kernel leaves the mark on where it has not un-merged all.
fn take_off(target: &Target, piece: Range, own: &mut UnmergedProcess) -> Result<(), Left> {
    for _ in 0..TRIES {
        let mut stops = ProcessReport::default();
        let results = advise::put(target, &[piece], Advice::Unmergeable, &mut stops)?;
        own.stops += stops.stops;
        own.stopped_seconds += stops.stopped_seconds;
        match results.first() {
            Some(Ok(_)) => return Ok(()),
            Some(Err(Errno::INTR)) | None => {}
            // ENOMEM is also the answer where a part of the range is not mapped any more, and the rest is done then.
            Some(Err(Errno::NOMEM)) if !is_marked(target, piece) => return Ok(()),
            Some(Err(errno)) => return Err(Left::Failed(format!("{piece} cannot be un-merged: {errno}"))),
        }
    }
    Err(Left::Failed(format!("signals have broken off the un-merging of {piece} {TRIES} times")))
}

fn is_marked(target: &Target, piece: Range) -> bool {
    let vmas = smaps::read(target.pid()).unwrap_or_default();
    vmas.iter().any(|vma| vma.flags.mergeable() && vma.vma.range.intersect(&piece).is_some())
}

/// Takes the process-wide switch back, which un-merges what has been merged since the steps before, all at once.
fn switch_off(target: &Target, own: &mut UnmergedProcess) -> Result<Step, RequestError> {
    let zeros = ksm_stat(target.pid()).unwrap_or_default().ksm_zero_pages.unwrap_or(0);
    // smaps counts what is mapped now; ksm_stat counts what ksmd has found in its last pass.
    let left = smaps::rollup(target.pid()).unwrap_or_default().ksm.pages().get() + zeros;
    if let Err(short) = check(target, PageCount(left))? {
        return Ok(Step::Short(short));
    }
    match advise::calls_in(target, &[Call::memory_merge(false)]) {
        Ok(injected) => {
            own.stops += 1;
            own.stopped_seconds += injected.stopped_for.as_secs_f64();
            Ok(match injected.results.first() {
                Some(Err(errno)) => Step::Left(Left::Failed(format!("the switch cannot be taken back: {errno}"))),
                _ => Step::Done,
            })
        }
        Err(left) => Ok(Step::Left(left)),
    }
}
