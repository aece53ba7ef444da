//! One process is brought to where it is to be.

use std::io;
use std::time::{Duration, Instant};

use kernel::inject::{Advice, Call, Caught, InjectError, Injected, Options, Refusal, inject};
use kernel::ksm_sysfs::ksm_stat;
use kernel::stat::Stat;
use kernel::{Bytes, Errno, PageCount, Pid, ProcError, Range, Vma, error_chain, maps, page_size, smaps, status};

use super::goal::Goal;
use super::look::{Look, STEP};
use super::outcome::{BUSY, FAILED, LACKING, NOT_PERMITTED, Outcome, Processed};
use crate::proc_stat::ProcessId;
use crate::room;

/// How a process is dealt with.
#[derive(Clone, Copy)]
pub struct Rules<'a> {
    /// What is wanted.
    pub goal: &'a Goal,
    /// Un-merge even if that could leave the machine or a cgroup without memory.
    pub force: bool,
    /// How long one process may take, to stop and for all that is done to it. The copying of un-merged pages, which is no
    /// waiting, is not counted.
    pub timeout: Duration,
    /// Whether to go no further, asked before each call: what was done stays. Once true it must stay so.
    pub stop: &'a (dyn Fn() -> bool + Sync),
    /// Says why a process is never merged; asked before it is enabled, not before it is disabled.
    pub never: &'a (dyn Fn(Pid) -> Option<String> + Sync),
}

/// Calls in one injection. Marking takes microseconds, each call some tens more, and one thread waits for all of them.
const CALLS: usize = 32;
/// Looks at a process that changes its mappings as fast as they are marked.
const LOOKS: u32 = 8;

/// So much of the time-out each injection has, the last one too: with less it would be said not to stop.
const LEAST: Duration = Duration::from_millis(200);

/// How many times a process is tried that is in the middle of an exec, and how long it is left alone in between.
const TRIES: u32 = 10;
const PAUSE: Duration = Duration::from_millis(2);

/// How the switch of a process stood, and stands.
pub(crate) enum Switched {
    /// It stood right.
    Already,
    /// It was turned.
    Turned,
    /// There is none to be turned, or not so quickly: [`Reach::finish`] does it.
    NotSoFast,
}

/// What is done to one process.
pub(crate) struct Reach<'a> {
    process: ProcessId,
    rules: &'a Rules<'a>,
    stopped: Duration,
    injections: u32,
    interrupted: u32,
    /// The last error of a call. None is trusted: what is marked is looked up.
    errno: Option<Errno>,
    /// Up to when all must be done.
    deadline: Instant,
}

impl<'a> Reach<'a> {
    pub(crate) fn new(process: ProcessId, rules: &'a Rules<'a>) -> Self {
        Self {
            process,
            rules,
            stopped: Duration::ZERO,
            injections: 0,
            interrupted: 0,
            errno: None,
            deadline: Instant::now(),
        }
    }

    fn pid(&self) -> Pid {
        Pid(self.process.pid)
    }

    /// Turns the switch of the process, no more: what is fast enough to catch processes that live for moments, since what
    /// they start is then as they are. Whoever was caught for that is let go of.
    pub(crate) fn switch(&mut self, mut caught: Option<Caught>) -> Result<Switched, Outcome> {
        let switched = self.switch_held(caught.as_mut());
        self.let_go(caught);
        switched.map_err(|outcome| self.or_it_executes(outcome))
    }

    /// While a process executes another program its memory is nobody's for a moment: what was asked of it says, as that of
    /// one that has ended, that it is not there (ESRCH).
    fn or_it_executes(&self, outcome: Outcome) -> Outcome {
        let lives = |stat: Stat| stat.is_alive() && !stat.is_exiting();
        if outcome == Outcome::Ended && self.process.is_alive() && Stat::read(self.pid()).is_ok_and(lives) {
            return Outcome::refused(BUSY, "it was executing a program each time that it was looked at");
        }
        outcome
    }

    /// Lets go of it, if it is held, and counts what it has noticed.
    pub(crate) fn let_go(&mut self, caught: Option<Caught>) {
        self.interrupted += caught.map_or(0, Caught::let_go);
    }

    fn switch_held(&mut self, caught: Option<&mut Caught>) -> Result<Switched, Outcome> {
        self.deadline = Instant::now() + self.rules.timeout;
        let Some(on) = self.rules.goal.switch() else { return Ok(Switched::NotSoFast) };
        let stat = ksm_stat(self.pid()).map_err(unreadable)?;
        if stat.ksm_merge_any == Some(on) {
            return Ok(Switched::Already);
        }
        // A copy of every merged page: weighed first, and done in steps if there are many.
        if !on {
            let zero = PageCount(stat.ksm_zero_pages.unwrap_or(0)).bytes();
            let merged = smaps::rollup(self.pid()).map_err(unreadable)?.ksm + zero;
            if merged > STEP {
                return Ok(Switched::NotSoFast);
            }
            self.room(merged)?;
        }
        // Before Linux 6.16 only the process itself is told how it stands.
        let calls = [Call::is_memory_merged(), Call::memory_merge(on)];
        let injected = match caught {
            Some(caught) => {
                let injected = caught.inject(&calls, &self.options()).map_err(|error| left(&error))?;
                self.count(&injected)?;
                injected
            }
            None => self.call(&calls)?,
        };
        let stood_right = injected.results.first() == Some(&Ok(on.into()));
        Ok(if stood_right { Switched::Already } else { Switched::Turned })
    }

    /// False if the switch is known to stand wrong: an exec that was under way can do that. One who is gone has none.
    pub(crate) fn is_switched(&self) -> bool {
        let is = ksm_stat(self.pid()).ok().and_then(|stat| stat.ksm_merge_any);
        is.is_none() || is == self.rules.goal.switch()
    }

    /// Looks and acts until a look finds nothing left to do. Whatever the process does meanwhile, what it is said to be is
    /// what the last look found.
    pub(crate) fn finish(&mut self) -> Processed {
        self.deadline = Instant::now() + self.rules.timeout;
        let mut last = None;
        let mut without = Vec::new();
        let injections = self.injections;
        let mut outcome = self.rounds(&mut last, &mut without).unwrap_or_else(|outcome| outcome);
        for _ in 0..TRIES {
            if !outcome.may_pass() || Instant::now() >= self.deadline || (self.rules.stop)() {
                break;
            }
            std::thread::sleep(PAUSE);
            outcome = self.rounds(&mut last, &mut without).unwrap_or_else(|outcome| outcome);
        }
        // One program after the other: what the kernel leaves unmarked in each (its stack) does not matter.
        if outcome.may_pass() && self.rules.goal.switch() == Some(true) && self.is_switched() {
            outcome = if self.injections > 0 { Outcome::Done } else { Outcome::Already };
        }
        // In the middle: what is marked by now is not what the last look found.
        if !outcome.is_done()
            && self.injections > injections
            && let (Some(last), Ok(vmas)) = (&mut last, smaps::read(self.pid()))
        {
            *last = Look::at(&vmas, self.rules.goal, &[]);
        }
        self.told(outcome, last.as_ref(), without)
    }

    fn rounds(&mut self, last: &mut Option<Look>, without: &mut Vec<String>) -> Result<Outcome, Outcome> {
        let goal = self.rules.goal;
        // The switch takes all marks with it, those too that are to stay: they are made again.
        let mut kept: Vec<Range> = Vec::new();
        let mut turned = false;
        // What was to be marked in the look before: the kernel leaves some unmarked that look as if they could be.
        let mut before: Vec<Range> = Vec::new();
        for _ in 0..LOOKS {
            let stat = ksm_stat(self.pid()).map_err(unreadable)?;
            // Before Linux 6.16 nobody shows the switch: it is turned once, which changes nothing if it stood right.
            let turn = goal.switch().filter(|on| stat.ksm_merge_any.map_or(!turned, |is| is != *on));
            if turn == Some(true) {
                self.call(&[Call::memory_merge(true)])?;
                turned = true;
                continue;
            }
            let vmas = smaps::read(self.pid()).map_err(unreadable)?;
            let look = last.insert(Look::at(&vmas, goal, &kept)).clone();
            *without = missing(goal, vmas.into_iter().map(|entry| entry.vma).collect());
            let zero = PageCount(stat.ksm_zero_pages.unwrap_or(0)).bytes();
            if turn == Some(false) {
                kept.clone_from(&look.to_keep);
                self.unmark(&look.marked, zero)?;
                self.call(&[Call::memory_merge(false)])?;
                turned = true;
                continue;
            }
            let stubborn = look.to_unmark.is_empty() && !before.is_empty() && look.to_mark == before;
            if look.to_unmark.is_empty() && (look.to_mark.is_empty() || stubborn) {
                return self.judge(&look, stubborn);
            }
            self.unmark(&look.to_unmark, zero)?;
            let marks: Vec<Call> = look.to_mark.iter().map(|range| Call::madvise(*range, Advice::Mergeable)).collect();
            for calls in marks.chunks(CALLS) {
                self.call(calls)?;
            }
            before = look.to_mark;
        }
        // What is mapped after the first look is marked by the switch if that is on, and else nobody's business.
        match last {
            Some(look) if look.to_unmark.is_empty() => self.judge(look, false),
            _ => Err(Outcome::refused("unsettled", self.with_errno("it marks again what is unmarked"))),
        }
    }

    fn judge(&self, look: &Look, stubborn: bool) -> Result<Outcome, Outcome> {
        if !look.meant && self.rules.goal.switch().is_none() {
            return Ok(Outcome::Nothing);
        }
        if stubborn {
            let text = format!("{} ranges stay unmarked, the first at {}", look.to_mark.len(), look.to_mark[0]);
            // madvise's word for a mapping that cannot be split.
            if self.errno == Some(Errno::AGAIN)
                && let Some(limit) = at_the_limit(self.pid())
            {
                return Err(Outcome::refused("too_many_mappings", format!("{text}: {limit}")));
            }
            return Err(Outcome::refused("unmarked", self.with_errno(&text)));
        }
        Ok(if self.injections > 0 { Outcome::Done } else { Outcome::Already })
    }

    fn with_errno(&self, text: &str) -> String {
        match self.errno {
            Some(errno) => format!("{text}; the kernel said: {}", io::Error::from(errno)),
            None => text.to_owned(),
        }
    }

    /// Un-merges, a little at a time. Death in between leaves a part merged, as marked as it was. `zero`: how much of the
    /// process is KSM's zero page, nobody knows where; that takes copies too.
    fn unmark(&mut self, ranges: &[(Range, Bytes)], zero: Bytes) -> Result<(), Outcome> {
        let weight = |(range, ksm): &(Range, Bytes)| (*ksm + zero).min(range.len());
        // All or nothing, as far as can be foreseen. Before each step again: others take memory meanwhile.
        self.room(ranges.iter().map(weight).sum::<Bytes>().min(Look::merged(ranges) + zero))?;
        let mut light = Vec::new();
        for range in ranges {
            let (weight, range) = (weight(range), range.0);
            if weight == Bytes(0) {
                light.push(Call::madvise(range, Advice::Unmergeable));
                continue;
            }
            // Merged pages may lie together or far apart: so many pieces that each has little if they are spread.
            let pieces = weight.get().div_ceil(STEP.get());
            let length = Bytes(range.len().get().div_ceil(pieces).next_multiple_of(page_size()));
            for piece in range.pieces(length) {
                self.room(weight.min(piece.len()))?;
                let begun = Instant::now();
                self.call(&[Call::madvise(piece, Advice::Unmergeable)])?;
                self.deadline += begun.elapsed();
            }
        }
        for calls in light.chunks(CALLS) {
            self.call(calls)?;
        }
        Ok(())
    }

    fn room(&self, need: Bytes) -> Result<(), Outcome> {
        if self.rules.force {
            return Ok(());
        }
        let short = room::for_process(self.pid(), need).map_err(unreadable)?;
        short.map_err(|short| Outcome::refused("no_memory", format!("{short}; --force goes on all the same")))
    }

    fn call(&mut self, calls: &[Call]) -> Result<Injected, Outcome> {
        // The number may be somebody else's by now.
        if !self.process.is_alive() {
            return Err(Outcome::Ended);
        }
        if (self.rules.stop)() {
            return Err(Outcome::refused("broken_off", "it was broken off; what was done to it stays"));
        }
        if self.injections > 0 && Instant::now() >= self.deadline {
            let text = "its time was up before all was done, and what was done stays: call it again, or with a longer --timeout";
            return Err(Outcome::refused("time_up", text));
        }
        let injected = inject(self.pid(), calls, &self.options()).map_err(|error| left(&error))?;
        self.count(&injected)?;
        Ok(injected)
    }

    fn options(&self) -> Options {
        let left = self.deadline.saturating_duration_since(Instant::now());
        Options { timeout: left.max(self.rules.timeout.min(LEAST)), ..Options::default() }
    }

    fn count(&mut self, injected: &Injected) -> Result<(), Outcome> {
        self.injections += 1;
        self.stopped += injected.stopped_for;
        self.interrupted += injected.interrupted;
        self.errno = injected.results.iter().find_map(|result| result.err()).or(self.errno);
        if self.errno == Some(Errno::INVAL) {
            return Err(Outcome::refused("not_supported", "this kernel has no KSM for whole processes (Linux 6.4)"));
        }
        Ok(())
    }

    /// The process with what became of it, and what the kernel shows.
    pub(crate) fn told(&self, outcome: Outcome, look: Option<&Look>, without: Vec<String>) -> Processed {
        let comm = Stat::read(self.pid()).map(|stat| stat.comm).unwrap_or_default();
        Processed {
            process: self.process,
            comm,
            outcome,
            marks: look.map(|look| look.marks),
            ksm_stat: ksm_stat(self.pid()).ok(),
            without_a_mapping: without,
            stopped_seconds: self.stopped.as_secs_f64(),
            injections: self.injections,
            interrupted: self.interrupted,
        }
    }
}

fn missing(goal: &Goal, vmas: Vec<Vma>) -> Vec<String> {
    goal.without_a_mapping(&vmas).into_iter().map(ToString::to_string).collect()
}

/// What keeps a mapping from being split, where it is that the process has as many as it may have.
fn at_the_limit(pid: Pid) -> Option<String> {
    let most = maps::max_map_count();
    (maps::count(pid).ok()? >= most).then(|| {
        format!(
            "it has as many mappings as a process may have ({most}, vm.max_map_count), and a mark on a part of a mapping \
             makes more of it; allow more (sysctl -w vm.max_map_count={}), or name whole mappings",
            2 * most
        )
    })
}

/// What became of a process that could not be injected.
pub(crate) fn left(error: &InjectError) -> Outcome {
    match error {
        InjectError::Refused { refusal, .. } => Outcome::of(refusal),
        InjectError::Unfinished { .. } => Outcome::refused("unfinished", error_chain(error)),
        InjectError::Proc(error) if error.is_gone() => Outcome::Ended,
        InjectError::Proc(ProcError::Read { source, .. }) if is_want(source) => {
            Outcome::refused(LACKING, error_chain(error))
        }
        InjectError::Setup { .. } => Outcome::refused(LACKING, error_chain(error)),
        other => Outcome::refused(FAILED, error_chain(other)),
    }
}

/// What became of a process that could not be looked at.
fn unreadable(error: ProcError) -> Outcome {
    match error {
        ProcError::Gone { .. } => Outcome::Ended,
        ProcError::Denied { .. } => Outcome::refused(
            NOT_PERMITTED,
            format!("{error}: it is another user's or protected, this needs CAP_SYS_PTRACE"),
        ),
        ProcError::Read { ref source, .. } if is_want(source) => Outcome::refused(LACKING, error_chain(&error)),
        other => Outcome::refused(FAILED, error_chain(&other)),
    }
}

/// True for what this process, or the machine, has not enough of.
fn is_want(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM))
}

/// Brings one process to where it is to be.
#[must_use]
pub fn apply(process: ProcessId, rules: &Rules<'_>) -> Processed {
    let mut reach = Reach::new(process, rules);
    match unfit(process, rules) {
        Some(outcome) => reach.told(outcome, None, Vec::new()),
        None => reach.finish(),
    }
}

/// Refuses a number that is no process's but another thread's.
pub(crate) fn thread(pid: Pid) -> Option<Outcome> {
    let status = status::read(pid).ok().filter(|status| status.tgid != status.pid)?;
    Some(Outcome::of(&Refusal::Thread { of: Pid(status.tgid) }))
}

/// Why nothing is tried on a process.
pub(crate) fn unfit(process: ProcessId, rules: &Rules<'_>) -> Option<Outcome> {
    let pid = Pid(process.pid);
    if pid == Pid::this() {
        return Some(Outcome::of(&Refusal::Own));
    }
    if rules.goal.merged
        && let Some(why) = (rules.never)(pid)
    {
        return Some(Outcome::refused("never_merge", why));
    }
    None
}
