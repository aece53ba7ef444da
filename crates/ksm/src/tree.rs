//! A process with everything below it.
use std::collections::BTreeMap;
use std::fs;

use kernel::Pid;
use kernel::ksm_sysfs::ksm_stat;
use kernel::stat::Stat;

use crate::proc_stat::ProcessId;

/// The processes below one process. If that one is a child subreaper, a daemon that leaves its parent still counts.
#[derive(Clone, Debug)]
pub struct Tree {
    root: i32,
    without: Vec<i32>,
}

/// One process of the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Which.
    pub process: ProcessId,
    /// Resident pages that are not of files: a cheap figure (`statm`) to see growth by, not to account with.
    pub anonymous_pages: u64,
}

/// What KSM says of all processes of a tree together (`/proc/PID/ksm_stat`), in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct TreeSum {
    /// Processes.
    pub processes: u64,
    /// Processes whose `ksm_stat` could not be read: gone meanwhile, or not ours to read.
    pub unreadable: u64,
    /// Page addresses that ksmd knows.
    pub ksm_rmap_items: u64,
    /// Mappings of merged pages, the first of each included. What was merged before a fork counts only in the parent.
    pub ksm_merging_pages: u64,
    /// Mappings of the zero page that KSM placed.
    pub ksm_zero_pages: u64,
}

impl Tree {
    /// Everything below `root`, which itself is no part of it.
    #[must_use]
    pub fn below(root: i32) -> Self {
        Self { root, without: Vec::new() }
    }

    /// Everything below the calling process.
    #[must_use]
    pub fn below_self() -> Self {
        Self::below(i32::try_from(std::process::id()).expect("a pid fits i32"))
    }

    /// Leaves one process out with what is below it, as the guardian.
    #[must_use]
    pub fn without(mut self, pid: i32) -> Self {
        self.without.push(pid);
        self
    }

    /// Leaves out everybody who is there now, with what is below them.
    #[must_use]
    pub fn without_those_there(mut self) -> Self {
        let there: Vec<i32> = self.members().iter().map(|member| member.process.pid).collect();
        self.without.extend(there);
        self
    }

    /// The process that was left out, 0 if none was.
    pub(crate) fn left_out(&self) -> i32 {
        self.without.first().copied().unwrap_or(0)
    }

    /// The processes that there are now. Zombies and processes that end meanwhile are left out.
    #[must_use]
    pub fn members(&self) -> Vec<Member> {
        let mut members = Vec::new();
        let mut open = vec![self.root];
        while let Some(parent) = open.pop() {
            let Some(children) = children(parent) else { return self.members_by_parent() };
            for pid in children {
                if !self.without.contains(&pid) {
                    open.push(pid);
                    members.extend(member(pid));
                }
            }
        }
        members
    }

    /// For kernels without `CONFIG_PROC_CHILDREN`: from everybody's parent.
    fn members_by_parent(&self) -> Vec<Member> {
        let mut below: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
        for pid in numbers("/proc") {
            if let Ok(stat) = Stat::read(Pid(pid)) {
                below.entry(stat.parent.get()).or_default().push(pid);
            }
        }
        let mut members = Vec::new();
        let mut open = vec![self.root];
        while let Some(parent) = open.pop() {
            for &pid in below.get(&parent).into_iter().flatten() {
                if !self.without.contains(&pid) {
                    open.push(pid);
                    members.extend(member(pid));
                }
            }
        }
        members
    }

    /// Reads `ksm_stat` of every member, which takes each one's mapping lock for reading.
    #[must_use]
    pub fn sum(&self) -> TreeSum {
        let mut sum = TreeSum::default();
        for member in self.members() {
            sum.processes += 1;
            match ksm_stat(Pid(member.process.pid)) {
                Ok(stat) => {
                    sum.ksm_rmap_items += stat.ksm_rmap_items.unwrap_or(0);
                    sum.ksm_merging_pages += stat.ksm_merging_pages.unwrap_or(0);
                    sum.ksm_zero_pages += stat.ksm_zero_pages.unwrap_or(0);
                }
                Err(_) => sum.unreadable += 1,
            }
        }
        sum
    }
}

pub(crate) fn member(pid: i32) -> Option<Member> {
    let process = ProcessId::of(pid)?;
    let statm = fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    let mut pages = statm.split_ascii_whitespace().skip(1).map_while(|word| word.parse::<u64>().ok());
    let (resident, of_files) = (pages.next()?, pages.next()?);
    Some(Member { process, anonymous_pages: resident.saturating_sub(of_files) })
}

/// The children of all threads of a process; `None` if this kernel does not tell. A process that is gone has none.
fn children(pid: i32) -> Option<Vec<i32>> {
    let mut found = Vec::new();
    for thread in numbers(&format!("/proc/{pid}/task")) {
        match fs::read_to_string(format!("/proc/{pid}/task/{thread}/children")) {
            Ok(list) => found.extend(list.split_ascii_whitespace().filter_map(|word| word.parse::<i32>().ok())),
            // The thread may have ended; only a living one without the file means that there are no such files.
            Err(_) if Stat::read(Pid(thread)).is_ok_and(|stat| stat.is_alive()) => return None,
            Err(_) => {}
        }
    }
    Some(found)
}

fn numbers(directory: &str) -> impl Iterator<Item = i32> {
    fs::read_dir(directory).into_iter().flatten().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use std::io::{BufRead as _, BufReader};
    use std::process::{Command, Stdio};

    #[test]
    fn grandchildren_are_found_both_ways_and_what_is_left_out_is_not() {
        let script = "sleep 30 & echo $!; wait";
        let mut shell = Command::new("sh").args(["-c", script]).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(shell.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let sleeper: i32 = line.trim().parse().unwrap();
        let pid = i32::try_from(shell.id()).unwrap();
        let pids = |members: Vec<Member>| members.iter().map(|member| member.process.pid).collect::<Vec<_>>();
        let tree = Tree::below_self();
        for found in [pids(tree.members()), pids(tree.members_by_parent())] {
            assert!(found.contains(&pid) && found.contains(&sleeper), "{found:?} lacks {pid} or {sleeper}");
        }
        assert_eq!(pids(Tree::below(pid).members()), [sleeper]);
        assert!(!pids(tree.clone().without(pid).members()).contains(&sleeper));
        assert!(Tree::below(pid).sum().processes == 1);
        for pid in [sleeper, pid] {
            rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), rustix::process::Signal::KILL)
                .unwrap();
        }
        shell.wait().unwrap();
    }
}
