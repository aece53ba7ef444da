//! Whose child is whose.

use std::collections::HashMap;

use kernel::Pid;

/// All processes at one moment.
pub(super) struct Tree {
    processes: HashMap<Pid, Process>,
}

/// One of them.
#[derive(Clone, Debug)]
pub(super) struct Process {
    parent: Pid,
    pub(super) name: String,
    state: char,
}

impl Tree {
    /// Reads /proc. What ends meanwhile is left out.
    pub(super) fn read() -> Self {
        let pids = kernel::status::processes().unwrap_or_default();
        let read = |pid: Pid| {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.get())).ok()?;
            let (name, rest) = stat.split_once('(')?.1.rsplit_once(") ")?;
            let mut words = rest.split(' ');
            let state = words.next()?.chars().next()?;
            let parent = Pid(words.next()?.parse().ok()?);
            Some((pid, Process { parent, name: name.to_owned(), state }))
        };
        Self { processes: pids.into_iter().filter_map(read).collect() }
    }

    /// All living descendants of a process.
    pub(super) fn below(&self, top: Pid) -> Vec<(Pid, Process)> {
        let is_below = |mut pid: Pid| {
            while let Some(process) = self.processes.get(&pid) {
                if process.parent == top {
                    return true;
                }
                pid = process.parent;
            }
            false
        };
        let living = |process: &Process| process.state != 'Z' && process.state != 'X';
        let found = self.processes.iter().filter(|(pid, process)| living(process) && is_below(**pid));
        found.map(|(pid, process)| (*pid, process.clone())).collect()
    }
}
