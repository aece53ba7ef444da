//! Whose memory is looked at.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use kernel::{Pid, membership, pagemap, status, task};
use ksm::ProcessId;
use serde::Serialize;

use crate::error::EvalError;
use crate::printable::printable;

/// Why a process is left out that has ended since it was found.
pub(crate) const ENDED: &str = "ended meanwhile";
/// Why one is left out that this user may not read.
pub(crate) const NOT_PERMITTED: &str = "not permitted (CAP_SYS_PTRACE)";
/// Longest command line that is kept, in bytes.
const COMMAND_LINE: usize = 240;

/// Which processes to look at: all that any of these names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// By number.
    pub pids: Vec<Pid>,
    /// With all that these have started, children's children too.
    pub children: bool,
    /// By cgroup, with the cgroups below: a directory, or its path below /sys/fs/cgroup.
    pub cgroups: Vec<PathBuf>,
    /// By command name, as /proc/PID/comm shows it.
    pub comms: Vec<String>,
    /// All of this machine, but the calling process.
    pub all: bool,
}

/// One address space, and who it belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Process {
    /// Its number.
    pub pid: i32,
    /// Start time in clock ticks since boot, so that the number's next owner is not taken for it.
    #[serde(skip)]
    pub start_time: u64,
    /// Command name.
    pub comm: String,
    /// Command line, shortened.
    pub command: String,
    /// Effective user.
    pub uid: u32,
    /// Its cgroup.
    pub cgroup: String,
    /// Other processes that share its memory (vfork, CLONE_VM; pagefold's helper is one): counted here once.
    pub shares_memory_with: Vec<i32>,
}

/// A process that was not looked at, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Skipped {
    /// Its number.
    pub pid: i32,
    /// Command name, as far as known.
    pub comm: String,
    /// Why, in a few words.
    pub reason: String,
}

/// Processes to look at.
#[derive(Clone, Debug, Default)]
pub struct Targets {
    /// Each address space once.
    pub processes: Vec<Process>,
    /// Who was named, or found, and cannot be looked at.
    pub skipped: Vec<Skipped>,
}

impl Selection {
    /// Finds the processes.
    ///
    /// # Errors
    /// [`EvalError`] for a name that leads to nobody, and for a number that is no process, a thread of the kernel, or
    /// not ours to read. Those that are found by other names and cannot be read are [`Targets::skipped`].
    pub fn resolve(&self) -> Result<Targets, EvalError> {
        if self.pids.is_empty() && self.cgroups.is_empty() && self.comms.is_empty() && !self.all {
            return Err(EvalError::NothingNamed);
        }
        let all = status::processes()?;
        let mut named: BTreeSet<i32> = BTreeSet::new();
        let mut targets = Targets::default();
        named.extend(self.pids.iter().map(|pid| pid.get()));
        if self.children && !self.pids.is_empty() {
            add_children(&mut named, &all);
        }
        for path in &self.cgroups {
            let members = members_of(path)?;
            if members.is_empty() {
                return Err(EvalError::EmptyCgroup { path: path.clone() });
            }
            named.extend(members.iter().map(|pid| pid.get()));
        }
        for comm in &self.comms {
            let wanted = &comm.as_bytes()[..comm.len().min(15)];
            let is_called =
                |pid: &&Pid| status::read(**pid).is_ok_and(|status| status.name.as_encoded_bytes() == wanted);
            let found: Vec<i32> = all.iter().filter(is_called).map(|pid| pid.get()).collect();
            if found.is_empty() {
                return Err(EvalError::NoSuchCommand { comm: comm.clone() });
            }
            named.extend(found);
        }
        if self.all {
            let this = Pid::this().get();
            named.extend(all.iter().map(|pid| pid.get()).filter(|pid| *pid != this));
        }
        let mut found = Vec::new();
        for pid in named {
            let asked_for = self.pids.contains(&Pid(pid));
            match look_at(Pid(pid)) {
                Ok(process) => found.push(process),
                Err(error) if asked_for => return Err(error),
                // Threads of the kernel are no news to whoever asks for everything.
                Err(EvalError::KernelThread { .. }) if self.all => {}
                Err(error) => targets.skip(pid, comm_of(&error), reason_of(&error)),
            }
        }
        targets.processes = each_address_space_once(found);
        Ok(targets)
    }
}

impl Targets {
    pub(crate) fn skip(&mut self, pid: i32, comm: &str, reason: &str) {
        self.skipped.push(Skipped { pid, comm: comm.to_owned(), reason: reason.to_owned() });
    }
}

/// A process that can be looked at, or why not.
fn look_at(pid: Pid) -> Result<Process, EvalError> {
    let status = status::read(pid).map_err(|_ended| EvalError::NoSuchProcess { pid })?;
    let comm = printable(&status.name.to_string_lossy());
    let Some(id) = ProcessId::of(pid.get()) else { return Err(EvalError::Zombie { pid, comm }) };
    if status.state == b'Z' {
        return Err(EvalError::LeaderEnded { pid, comm });
    }
    if status.vm_size.get() == 0 {
        return Err(EvalError::KernelThread { pid, comm });
    }
    match pagemap::Pagemap::open(pid) {
        Ok(_) => {}
        Err(error) if error.is_gone() => return Err(EvalError::NoSuchProcess { pid }),
        Err(_) => return Err(EvalError::NotPermitted { pid, comm }),
    }
    let mut command = membership::command_line(pid).unwrap_or_default().join(" ");
    if command.len() > COMMAND_LINE {
        let cut = (0..=COMMAND_LINE).rev().find(|at| command.is_char_boundary(*at)).unwrap_or(0);
        command.truncate(cut);
        command.push('…');
    }
    Ok(Process {
        pid: pid.get(),
        start_time: id.start_time,
        comm,
        command,
        uid: status.uid.effective,
        cgroup: membership::cgroup(pid).unwrap_or_else(|_| "/".to_owned()),
        shares_memory_with: Vec::new(),
    })
}

/// Whom an error is about, as far as it knows a name.
fn comm_of(error: &EvalError) -> &str {
    match error {
        EvalError::Zombie { comm, .. }
        | EvalError::LeaderEnded { comm, .. }
        | EvalError::KernelThread { comm, .. }
        | EvalError::NotPermitted { comm, .. } => comm,
        _ => "",
    }
}

/// Why a process that was found is left out, in a few words.
fn reason_of(error: &EvalError) -> &'static str {
    match error {
        EvalError::Zombie { .. } => "has ended and waits for its parent",
        EvalError::LeaderEnded { .. } => "its first thread has ended while others go on",
        EvalError::KernelThread { .. } => "a thread of the kernel",
        EvalError::NotPermitted { .. } => NOT_PERMITTED,
        _ => ENDED,
    }
}

/// Adds everything below the named ones.
fn add_children(named: &mut BTreeSet<i32>, all: &[Pid]) {
    let mut by_parent: HashMap<i32, Vec<i32>> = HashMap::new();
    for pid in all {
        if let Ok(status) = status::read(*pid) {
            by_parent.entry(status.ppid).or_default().push(pid.get());
        }
    }
    let mut open: Vec<i32> = named.iter().copied().collect();
    while let Some(parent) = open.pop() {
        for child in by_parent.remove(&parent).unwrap_or_default() {
            if child != Pid::this().get() && named.insert(child) {
                open.push(child);
            }
        }
    }
}

fn members_of(path: &Path) -> Result<Vec<Pid>, EvalError> {
    membership::members_of(path).map_err(|source| EvalError::NoSuchCgroup { path: path.to_owned(), source })
}

/// Processes that share an address space become one. Where the kernel cannot compare them, each counts for itself.
fn each_address_space_once(mut found: Vec<Process>) -> Vec<Process> {
    // A helper lends its number to nobody: the program that it serves comes first.
    found.sort_by_key(|process| (process.comm.starts_with("pagefold-helper"), process.pid));
    let pids: Vec<Pid> = found.iter().map(|process| Pid(process.pid)).collect();
    let others: HashMap<i32, Vec<i32>> = task::by_address_space(&pids)
        .into_iter()
        .map(|space| (space[0].get(), space[1..].iter().map(|pid| pid.get()).collect()))
        .collect();
    found.retain_mut(|process| {
        others.get(&process.pid).is_some_and(|others| {
            process.shares_memory_with.clone_from(others);
            true
        })
    });
    found.sort_by_key(|process| process.pid);
    found
}

/// By what processes are taken together in reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupBy {
    /// Command name.
    #[default]
    Command,
    /// Cgroup.
    Cgroup,
    /// Effective user.
    User,
}

impl GroupBy {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Command, Self::Cgroup, Self::User];

    /// The name of the group that `process` belongs to.
    #[must_use]
    pub fn group_of(self, process: &Process) -> String {
        match self {
            Self::Command => process.comm.clone(),
            Self::Cgroup => process.cgroup.clone(),
            Self::User => process.uid.to_string(),
        }
    }

    /// The names of all groups, and the place of each process's group among them.
    pub(crate) fn assign(self, processes: &[Process]) -> (Vec<String>, Vec<u32>) {
        let mut places: BTreeMap<String, u32> = BTreeMap::new();
        for process in processes {
            let next = u32::try_from(places.len()).expect("fewer groups than processes");
            places.entry(self.group_of(process)).or_insert(next);
        }
        let of = processes.iter().map(|process| places[&self.group_of(process)]).collect();
        let mut names = vec![String::new(); places.len()];
        for (name, place) in places {
            names[place as usize] = name;
        }
        (names, of)
    }
}
