//! Advice put into processes that do not cooperate.
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use kernel::inject::{self, Advice, Call, Injected, Refusal};
use kernel::{Errno, Range, error_chain, maps};

use super::pages::Work;
use super::report::{Left, ProcessReport};
use super::walk::{Area, Target};
use super::{Stage, Tell, marks};

/// Calls for one stop of a thread: some 64 splits of mappings, well below a millisecond.
const CALLS: usize = 64;
/// Of the mappings that a process may have, those that it has for itself.
const VMA_SHARE: u64 = 4;
/// How long a process is waited for that somebody else is at work on, another request most likely.
const BUSY: Duration = Duration::from_secs(5);

/// Marks the pages of `work` and counts what that came to.
pub(crate) fn mark(work: &mut Work, areas: &[Area], tell: Tell<'_>) -> ControlFlow<()> {
    if work.pages.is_empty() {
        return ControlFlow::Continue(());
    }
    let pid = work.target.pid();
    let wanted = work.ranges(|_| true);
    let most = maps::max_map_count();
    // Without a count there is no telling how many are left.
    let have = maps::count(pid).unwrap_or(most);
    let budget = (most - most / VMA_SHARE).saturating_sub(have);
    let marks = marks::plan(&wanted, areas, budget);
    work.report.pages_marked_besides = marks.besides;
    work.report.pages_over_budget = marks.over_budget;
    let (mut done, of) = (0, marks.runs.len() as u64);
    let mut refused = None;
    for runs in marks.runs.chunks(CALLS) {
        tell(Stage::Marking { runs: done, of })?;
        match put(&work.target, runs, Advice::Mergeable, &mut work.report) {
            Ok(results) => {
                done += results.iter().filter(|result| result.is_ok()).count() as u64;
                refused = refused.or(results.into_iter().find_map(Result::err));
            }
            Err(left) => {
                work.gone = left == Left::Gone;
                work.report.leave(&left);
                break;
            }
        }
    }
    work.report.runs_marked = done;
    if let Some(errno) = refused {
        // ENOMEM: the range is not mapped any more, or the process has got more mappings meanwhile.
        work.report.leave(&Left::Failed(format!("{} of {of} ranges cannot be marked: {errno}", of - done)));
    }
    if done > 0 {
        work.report.vmas_added = maps::count(pid).unwrap_or(have).saturating_sub(have);
    }
    ControlFlow::Continue(())
}

/// Gives one advice for some ranges, with one stop of one thread. Results in order.
pub(crate) fn put(
    target: &Target,
    ranges: &[Range],
    advice: Advice,
    report: &mut ProcessReport,
) -> Result<Vec<Result<u64, Errno>>, Left> {
    let calls: Vec<Call> = ranges.iter().map(|range| Call::madvise(*range, advice)).collect();
    let injected = calls_in(target, &calls)?;
    report.stopped(injected.stopped_for);
    Ok(injected.results)
}

/// Runs calls in a process.
pub(crate) fn calls_in(target: &Target, calls: &[Call]) -> Result<Injected, Left> {
    let deadline = Instant::now() + BUSY;
    loop {
        // In a program that was executed meanwhile the addresses would be something else's.
        if !target.is_there() {
            return Err(Left::Gone);
        }
        let error = match inject::inject(target.pid(), calls, &inject::Options::default()) {
            Ok(injected) => return Ok(injected),
            Err(error) => error,
        };
        match error.refusal() {
            Some(Refusal::Gone | Refusal::Zombie) => return Err(Left::Gone),
            Some(Refusal::Busy | Refusal::Vfork { .. } | Refusal::Traced { .. }) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Some(refusal) => return Err(Left::Injection(format!("nothing can be injected: {refusal}"))),
            None => return Err(Left::Injection(error_chain(&error))),
        }
    }
}
