//! Many processes, while they go on starting others.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use kernel::inject::{Caught, Refusal, catch};
use kernel::ksm_sysfs::ksm_stat;
use kernel::membership::{cgroup_folder, cgroup_members};
use kernel::signals::StopsHeld;
use kernel::stat::Stat;
use kernel::{KsmSysfs, Pid, ProcError, status, task};
use serde::Serialize;

use super::kin::Family;
use super::outcome::{Outcome, Processed};
use super::reach::{Reach, Rules, Switched, thread, unfit};
use super::settle::settle;
use crate::proc_stat::ProcessId;

/// Which processes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// By number.
    pub pids: Vec<Pid>,
    /// With all that these have started.
    pub children: bool,
    /// All of a cgroup and of those below it: a directory, or its path below /sys/fs/cgroup.
    pub cgroups: Vec<PathBuf>,
}

/// Why nothing was tried.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EnableError {
    /// Nobody was named.
    #[error("name processes, or a cgroup with --cgroup")]
    NothingNamed,
    /// The kernel was built without CONFIG_KSM, or sysfs is not mounted.
    #[error("this kernel has no KSM: {} is missing", KsmSysfs::host().root().display())]
    NoKsm,
    /// No /proc, or that of another PID namespace, where numbers are somebody else's.
    #[error(
        "/proc is not mounted, or belongs to another PID namespace: mount -t proc proc /proc (unshare --mount-proc)"
    )]
    NoProc,
    /// There is no such cgroup, or it cannot be read.
    #[error("no cgroup {}, neither as a directory nor below /sys/fs/cgroup", path.display())]
    NoCgroup {
        /// As it was named.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// There is nobody in it.
    #[error("no process is in cgroup {} or below it", path.display())]
    EmptyCgroup {
        /// As it was named.
        path: PathBuf,
    },
    /// No thread could be started here up to the time-out.
    #[error("no thread can be started to look for processes")]
    NoThread {
        /// What the kernel said.
        source: std::io::Error,
    },
    /// /proc cannot be read.
    #[error(transparent)]
    Proc(#[from] ProcError),
}

/// What became of all of them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// In the order of their numbers; those that ended before anything was done are not among them unless they were named.
    pub processes: Vec<Processed>,
    /// How many more were met, and ended before all was done.
    pub ended: usize,
    /// Nobody who belongs to them was left out, but for those that are named as refused and what these go on starting.
    pub complete: bool,
    /// Why that cannot be said.
    pub incomplete: Option<String>,
    /// How many times their processes were listed.
    pub looks: u32,
    /// Since the beginning.
    pub elapsed_seconds: f64,
}

/// How a report can be incomplete.
const OUTRUN: &str = "their processes started others faster than they were found until the time was up; \
    call it again, with a longer --timeout";
const UNSETTLED: &str = "a fork or an exec was under way in one of them until the time was up; \
    call it again, with a longer --timeout";
const BROKEN_OFF: &str = "it was broken off";

/// Lists without anybody who was not as he is to be, if in all of them there are some who had ended before they could be
/// asked, though not the latest: that one lives and is as he is to be. One of a chain (see [`Crowd::run`]) to be among these each time has to end
/// between the list and the look, so many times in a row.
const LISTS: u32 = 16;

/// How many times somebody is tried who is in the middle of something.
const TRIES: u32 = 100;

/// Between two tries to start a thread.
const PAUSE: Duration = Duration::from_millis(10);

/// What happens, for whoever watches.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// All processes were listed once more, so many are known.
    Listed(usize),
    /// A process is dealt with.
    Dealt(&'a Processed),
}

/// Who watches.
pub type Watch<'a> = dyn FnMut(Event<'_>) + 'a;

/// Brings everybody who is selected to where they are to be. `limit`: for how long those are hunted that go on starting
/// others.
///
/// # Errors
/// [`EnableError`], when nothing was done yet.
pub fn apply_to_all(
    selection: &Selection,
    rules: &Rules<'_>,
    limit: Duration,
    watch: &mut Watch<'_>,
) -> Result<Report, EnableError> {
    if selection.pids.is_empty() && selection.cgroups.is_empty() {
        return Err(EnableError::NothingNamed);
    }
    if !KsmSysfs::host().exists() {
        return Err(EnableError::NoKsm);
    }
    if !kernel::procfs::shows_this_process().unwrap_or(false) {
        return Err(EnableError::NoProc);
    }
    Crowd::new(selection, rules, limit)?.run(watch)
}

struct Crowd<'a> {
    rules: &'a Rules<'a>,
    named: Vec<Pid>,
    family: Option<Family>,
    cgroups: Vec<PathBuf>,
    begun: Instant,
    deadline: Instant,
    seen: BTreeMap<ProcessId, Seen<'a>>,
    settled: BTreeSet<ProcessId>,
    /// Numbers that nobody had any more when they were looked at.
    gone: BTreeSet<Pid>,
    /// The number that was given last, as of the last list.
    last: Pid,
    looks: u32,
}

/// Somebody who was listed.
enum Seen<'a> {
    /// What its children inherit is right, the rest is to be done when everybody is found.
    Switched(Reach<'a>),
    Dealt(Box<Processed>),
    /// Ended before it was dealt with.
    Ended,
    /// Could not be dealt with yet: it was in the middle of something, an exec most likely, so many times; the last outcome.
    Busy(u32, Box<Processed>),
}

/// What a list has in it.
enum Round {
    /// Only who is as he is to be.
    Nobody,
    /// And some, not seen before, who had ended before they could be asked, `by_now` the latest of all in the list too.
    Ended { by_now: bool },
    /// Somebody who was not as he is to be.
    Somebody,
}

/// How somebody was met.
enum Met {
    /// As he is to be.
    Right,
    /// Otherwise.
    Dealt,
    /// Too late.
    Ended,
}

impl Seen<'_> {
    /// It was dealt with, so that its children are to be like it.
    fn is_met(&self) -> bool {
        match self {
            Self::Switched(_) => true,
            Self::Dealt(dealt) => dealt.outcome.is_done(),
            Self::Ended | Self::Busy(..) => false,
        }
    }
}

impl<'a> Crowd<'a> {
    fn new(selection: &Selection, rules: &'a Rules<'a>, limit: Duration) -> Result<Self, EnableError> {
        let error = |path: &PathBuf, source| EnableError::NoCgroup { path: path.clone(), source };
        let mut cgroups = Vec::new();
        for path in &selection.cgroups {
            let folder = cgroup_folder(path).map_err(|source| error(path, source))?;
            let members = cgroup_members(&folder).map_err(|source| error(path, source))?;
            if members.iter().all(|pid| *pid == Pid::this()) {
                return Err(EnableError::EmptyCgroup { path: path.clone() });
            }
            cgroups.push(folder);
        }
        let begun = Instant::now();
        Ok(Self {
            rules,
            named: selection.pids.clone(),
            family: (selection.children && !selection.pids.is_empty()).then(|| Family::of(&selection.pids)),
            cgroups,
            begun,
            deadline: begun + limit,
            seen: BTreeMap::new(),
            settled: BTreeSet::new(),
            gone: BTreeSet::new(),
            last: Pid(0),
            looks: 0,
        })
    }

    /// Lists, deals with whoever is new, and lists again, until a list that was begun after everybody known was as he is to
    /// be, and settled, has nobody in it who is not. Then nobody is left out:
    ///
    /// - What a settled process starts inherits its marks ([`settle`]): only processes that have not been dealt with can
    ///   start others that are to be.
    /// - One of those that was there when the last list was begun, and still was when the list came to its place, is in
    ///   the list: it is not the last one. So it ended meanwhile, and had begun another one, which did the same, and so on: a
    ///   chain, of which somebody is there at each moment. Lists do not miss all of a chain: numbers of /proc are listed in
    ///   rising order and a child's is higher; a cgroup keeps its processes in the order in which they came to it and lists
    ///   them so, and the next one of the chain comes behind all others. Somebody of the chain is in the list, if only as a
    ///   number that is gone when it is looked at, and nobody has seen that number before.
    /// - What that leaves: a process that moves between the cgroups below a folder while they are listed one after the
    ///   other, and somebody who is put into the cgroup from outside, by whoever has the right to.
    ///
    /// Whoever lives too shortly to be dealt with shows up in each list, until one is caught or time is up.
    /// Nobody is stopped for the search but the one thread that does the call, and nothing has to be undone if this process
    /// is killed. Freezing a cgroup would be surer, but whoever is killed between freezing and thawing leaves a service that
    /// hangs for good, and all threads of it lose the calls that they sleep in (EINTR).
    fn run(mut self, watch: &mut Watch<'_>) -> Result<Report, EnableError> {
        let incomplete = self.search(watch)?;
        self.finish(watch);
        let broken_off = self.is_broken_off();
        Ok(self.report(if broken_off { Some(BROKEN_OFF) } else { incomplete }))
    }

    /// Why the search is not known to have found everybody.
    fn search(&mut self, watch: &mut Watch<'_>) -> Result<Option<&'static str>, EnableError> {
        let mut quiet = 0;
        loop {
            let round = self.round_apart()?;
            quiet = match round {
                Round::Nobody => LISTS,
                Round::Ended { by_now: false } => quiet + 1,
                Round::Ended { by_now: true } => quiet,
                Round::Somebody => 0,
            };
            watch(Event::Listed(self.seen.len()));
            if self.is_broken_off() {
                return Ok(Some(BROKEN_OFF));
            }
            let settled = self.settle();
            let alone = self.family.is_none() && self.cgroups.is_empty();
            if alone || quiet >= LISTS && settled {
                return Ok(None);
            }
            if Instant::now() >= self.deadline {
                return Ok(Some(if settled { OUTRUN } else { UNSETTLED }));
            }
        }
    }

    fn is_broken_off(&self) -> bool {
        (self.rules.stop)()
    }

    fn round(&mut self) -> Result<Round, EnableError> {
        self.looks += 1;
        let begun = status::last_number()?;
        if begun < self.last {
            self.forget();
        }
        // Whoever was not in the first list has just begun, and may be gone in a moment: caught first, in every other list,
        // and looked at then, unless one look shows that there is nothing to be done. The latest comes first: of a chain, it is the one that has not yet started its next.
        let (newborn, hunt) = (self.looks > 1, self.looks.is_multiple_of(2));
        let (found, mut ended) = self.list()?;
        let mut somebody = false;
        let mut latest = None;
        for pid in found.into_iter().rev() {
            if self.is_broken_off() {
                somebody = true;
                break;
            }
            let caught = if hunt && !self.knows(pid) && self.may_be_wrong(pid) { catch(pid).ok() } else { None };
            let Some(process) = ProcessId::of(pid.get()) else {
                ended = ended.max(self.gone(pid));
                continue;
            };
            let tries = match self.seen.get(&process) {
                None => 0,
                Some(Seen::Busy(tries, _)) => *tries,
                Some(_) => continue,
            };
            match self.meet(process, tries, caught) {
                // Born as it is to be, all that it started is too. Unless it has the memory of its parent (vfork), and
                // became so together with that one, while it started something itself.
                Met::Right if newborn && !shares_memory_with_its_parent(pid) => {
                    self.settled.insert(process);
                    latest = latest.max(Some(pid));
                }
                Met::Ended => ended = ended.max(Some(pid)),
                Met::Right | Met::Dealt => somebody = true,
            }
        }
        self.last = status::last_number()?;
        if self.last < begun {
            // What is numbered anew may have been taken for what was known.
            self.forget();
            somebody = true;
        }
        Ok(match ended {
            _ if somebody => Round::Somebody,
            None => Round::Nobody,
            Some(_) => Round::Ended { by_now: ended >= latest },
        })
    }

    /// A thread for each list: who was caught and did not come to a stop is free when it ends. Where processes end faster than
    /// they are collected there may be none to be had for a while. Ctrl-Z waits for its end.
    fn round_apart(&mut self) -> Result<Round, EnableError> {
        let _held = StopsHeld::begin();
        loop {
            let ended = std::thread::scope(|scope| {
                std::thread::Builder::new()
                    .spawn_scoped(scope, || self.round())
                    .map(std::thread::ScopedJoinHandle::join)
            });
            match ended {
                Ok(Ok(result)) => return result,
                Ok(Err(panic)) => std::panic::resume_unwind(panic),
                Err(source) if Instant::now() >= self.deadline || self.is_broken_off() => {
                    return Err(EnableError::NoThread { source });
                }
                Err(_) => std::thread::sleep(PAUSE),
            }
        }
    }

    /// Numbers have begun anew at the lowest: those that were seen may be others' by now.
    fn forget(&mut self) {
        self.gone.clear();
        if let Some(family) = &mut self.family {
            family.forget();
        }
    }

    /// True for a number that was in a list before.
    fn knows(&self, pid: Pid) -> bool {
        let any = |start_time| ProcessId { pid: pid.get(), start_time };
        self.seen.range(any(0)..=any(u64::MAX)).next().is_some()
    }

    /// True for one whose switch is to be turned, as far as can be seen in some microseconds. Most of those who have just
    /// begun are as they are to be, by birth, and are not to be disturbed.
    fn may_be_wrong(&self, pid: Pid) -> bool {
        let Some(on) = self.rules.goal.switch() else { return false };
        !ksm_stat(pid).is_ok_and(|stat| stat.ksm_merge_any == Some(on))
    }

    /// Who there is, and the latest of those who have ended already.
    fn list(&mut self) -> Result<(Vec<Pid>, Option<Pid>), EnableError> {
        let mut found = self.named.clone();
        let mut ended = None;
        if let Some(family) = &mut self.family {
            let look = family.look()?;
            ended = look.ended;
            found.extend(look.members);
        }
        for folder in &self.cgroups {
            // A folder that is gone has nobody in it.
            found.extend(cgroup_members(folder).unwrap_or_default());
        }
        found.sort_unstable();
        found.dedup();
        // Its own end is near, and it starts nobody.
        found.retain(|pid| *pid != Pid::this() || self.named.contains(pid));
        Ok((found, ended))
    }

    /// A number that nobody has any more, or a zombie, if it was not seen before: it may have started others.
    fn gone(&mut self, pid: Pid) -> Option<Pid> {
        // One that was dealt with has started nobody who is not like it.
        let dealt = |(process, seen): (&ProcessId, &Seen<'_>)| process.pid == pid.get() && seen.is_met();
        let any = |start_time| ProcessId { pid: pid.get(), start_time };
        let known = self.seen.range(any(0)..=any(u64::MAX)).any(dealt);
        (self.gone.insert(pid) && !known).then_some(pid)
    }

    /// Deals with somebody, or with what his children inherit.
    fn meet(&mut self, process: ProcessId, tries: u32, caught: Option<Caught>) -> Met {
        let mut reach = Reach::new(process, self.rules);
        let dealt = |reach: &Reach<'_>, outcome| Seen::Dealt(Box::new(reach.told(outcome, None, Vec::new())));
        // Only who is named may be one: lists have processes in them.
        let named = self.named.contains(&Pid(process.pid));
        let unfit = named.then(|| thread(Pid(process.pid))).flatten().or_else(|| unfit(process, self.rules));
        let (seen, met) = match unfit {
            Some(outcome) => {
                reach.let_go(caught);
                (dealt(&reach, outcome), Met::Dealt)
            }
            None => match reach.switch(caught) {
                Ok(Switched::Already) => (Seen::Switched(reach), Met::Right),
                Ok(Switched::Turned) => (Seen::Switched(reach), Met::Dealt),
                Ok(Switched::NotSoFast) => {
                    let done = reach.finish();
                    match &done.outcome {
                        outcome if tries < TRIES && outcome.may_pass() => {
                            (Seen::Busy(tries + 1, Box::new(done)), Met::Dealt)
                        }
                        Outcome::Already => (Seen::Dealt(Box::new(done)), Met::Right),
                        Outcome::Ended => (Seen::Ended, Met::Ended),
                        _ => (Seen::Dealt(Box::new(done)), Met::Dealt),
                    }
                }
                Err(Outcome::Ended) => (Seen::Ended, Met::Ended),
                Err(outcome) if tries < TRIES && outcome.may_pass() => {
                    (Seen::Busy(tries + 1, Box::new(reach.told(outcome, None, Vec::new()))), Met::Dealt)
                }
                Err(outcome) => (dealt(&reach, outcome), Met::Dealt),
            },
        };
        self.seen.insert(process, seen);
        met
    }

    /// Waits for forks and execs that are under way. Whoever came out of an exec as it was before is forgotten, to be met
    /// again.
    fn settle(&mut self) -> bool {
        let open = self.seen.iter().filter(|(process, seen)| seen.is_met() && !self.settled.contains(process));
        let open: Vec<ProcessId> = open.map(|(process, _)| *process).collect();
        for process in &open {
            if !settle(Pid(process.pid), self.deadline, self.rules.stop) {
                continue;
            }
            match self.seen.get(process) {
                Some(Seen::Switched(reach)) if !reach.is_switched() => {
                    self.seen.remove(process);
                }
                _ => {
                    self.settled.insert(*process);
                }
            }
        }
        open.iter().all(|process| self.settled.contains(process))
    }

    /// Does what is left to be done to those who were found.
    fn finish(&mut self, watch: &mut Watch<'_>) {
        let stop = self.rules.stop;
        for seen in self.seen.values_mut() {
            if stop() {
                return;
            }
            if let Seen::Switched(reach) = seen {
                *seen = Seen::Dealt(Box::new(reach.finish()));
            }
            if let Seen::Dealt(dealt) = seen {
                watch(Event::Dealt(dealt));
            }
        }
    }

    fn report(self, incomplete: Option<&str>) -> Report {
        let mut processes = Vec::new();
        let met = self.seen.len();
        for (process, seen) in self.seen {
            let named = self.named.contains(&Pid(process.pid));
            match seen {
                Seen::Dealt(dealt) if named || dealt.outcome != Outcome::Ended => processes.push(*dealt),
                Seen::Busy(_, last) if process.is_alive() => processes.push(*last),
                Seen::Ended if named => {
                    processes.push(Reach::new(process, self.rules).told(Outcome::Ended, None, Vec::new()));
                }
                // Broken off.
                Seen::Switched(reach) => {
                    let why = Outcome::refused("broken_off", "only its switch was turned");
                    processes.push(reach.told(why, None, Vec::new()));
                }
                _ => {}
            }
        }
        // Named by a number that nobody had at any time, or a zombie.
        for pid in self.named.iter().filter(|pid| self.gone.contains(pid)) {
            if !processes.iter().any(|process: &Processed| process.process.pid == pid.get()) {
                let zombie = Stat::read(*pid).ok().filter(|stat| !stat.is_alive());
                let outcome = match zombie {
                    Some(_) => Outcome::refused(Refusal::Zombie.word(), Refusal::Zombie),
                    None => Outcome::Ended,
                };
                let nobody = ProcessId { pid: pid.get(), start_time: zombie.map_or(0, |stat| stat.start_time) };
                processes.push(Reach::new(nobody, self.rules).told(outcome, None, Vec::new()));
            }
        }
        processes.sort_by_key(|process| process.process.pid);
        Report {
            ended: met.saturating_sub(processes.len()),
            processes,
            complete: incomplete.is_none(),
            incomplete: incomplete.map(str::to_owned),
            looks: self.looks,
            elapsed_seconds: self.begun.elapsed().as_secs_f64(),
        }
    }
}

fn shares_memory_with_its_parent(pid: Pid) -> bool {
    let parent = Stat::read(pid).map(|stat| stat.parent);
    parent.is_ok_and(|parent| task::kcmp_vm(pid, parent).is_ok_and(Ordering::is_eq))
}
