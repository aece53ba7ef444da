//! Processes and everything that they start, found again and again while they go on starting.

use std::collections::{BTreeMap, BTreeSet};

use kernel::stat::Stat;
use kernel::{Pid, status};

/// A family: processes that were named, and their descendants.
///
/// Numbers are listed in rising order. A child's number is above its parent's, so a chain of processes that each fork and exit
/// climbs ahead of the look and is met by it. When numbers begin anew at the lowest, everything has to be looked at again
/// ([`Family::forget`]), and what was known by the number of somebody who has ended is forgotten.
///
/// A process whose parent has ended is given to another (init, or a subreaper), and then nothing tells whose it was, but for
/// what it inherits: a session that a member leads has only descendants of that member in it, and a process that appeared
/// during the search, in a process group that a member is or was in, whose parent is outside of its session, is taken for
/// one as well. One that has left its session (`setsid`, as daemons do) and lost its parent before it was looked at is not
/// found: `--cgroup` finds it.
#[derive(Debug, Default)]
pub(crate) struct Family {
    /// Those that live, each with its start time.
    members: BTreeMap<i32, u64>,
    others: BTreeSet<i32>,
    /// Numbers of members that have ended. A number is not given again while a session or a process group has it.
    past: BTreeSet<i32>,
    /// Process groups that members were seen in.
    groups: BTreeSet<i32>,
    looked: bool,
}

/// What a look found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    /// All members that live.
    pub(crate) members: Vec<Pid>,
    /// The latest of those that are seen for the first time and have ended already: members, or such as could have been.
    pub(crate) ended: Option<Pid>,
}

impl Family {
    /// The family of these, which are members whoever started them.
    pub(crate) fn of(roots: &[Pid]) -> Self {
        let mut family = Self::default();
        for pid in roots.iter().map(|pid| pid.get()) {
            match Stat::read(Pid(pid)) {
                Ok(stat) => drop(family.members.insert(pid, stat.start_time)),
                Err(_) => drop(family.past.insert(pid)),
            }
        }
        family
    }

    /// Numbers have begun anew: those that were seen may be others' by now.
    pub(crate) fn forget(&mut self) {
        self.others.clear();
        self.past.clear();
        self.groups.clear();
        self.looked = false;
    }

    pub(crate) fn look(&mut self) -> Result<Found, kernel::ProcError> {
        let numbers = status::processes()?;
        let mut found = Found::default();
        let unknown = self.read(&numbers, &mut found);
        // Somebody's parent may come behind him.
        loop {
            let before = self.members.len();
            for (pid, stat) in &unknown {
                if !self.members.contains_key(pid) && self.is_member(stat) {
                    self.members.insert(*pid, stat.start_time);
                    if !stat.is_alive() {
                        found.ended = found.ended.max(Some(Pid(*pid)));
                    }
                }
                if self.members.contains_key(pid) {
                    self.groups.insert(stat.group);
                }
            }
            if self.members.len() == before {
                break;
            }
        }
        for (pid, stat) in unknown {
            if !self.members.contains_key(&pid) {
                self.others.insert(pid);
            } else if stat.is_alive() {
                found.members.push(Pid(pid));
            } else {
                self.end(pid);
            }
        }
        self.looked = true;
        Ok(found)
    }

    /// Reads all that are not known to be none, the latest first: they may be gone soonest. Members that are gone, or whose
    /// number is somebody else's, are members no more.
    fn read(&mut self, numbers: &[Pid], found: &mut Found) -> Vec<(i32, Stat)> {
        let there: BTreeSet<i32> = numbers.iter().map(|pid| pid.get()).collect();
        for pid in self.members.keys().copied().filter(|pid| !there.contains(pid)).collect::<Vec<_>>() {
            self.end(pid);
        }
        let mut unknown = Vec::new();
        for pid in there.into_iter().rev().filter(|pid| *pid != Pid::this().get()) {
            if self.others.contains(&pid) || self.past.contains(&pid) {
                continue;
            }
            match (Stat::read(Pid(pid)).ok(), self.members.get(&pid).copied()) {
                (Some(stat), known) => {
                    if known.is_some_and(|start_time| start_time != stat.start_time) {
                        self.members.remove(&pid);
                    }
                    unknown.push((pid, stat));
                }
                (None, Some(_)) => self.end(pid),
                (None, None) => {
                    self.others.insert(pid);
                    found.ended = found.ended.max(Some(Pid(pid)));
                }
            }
        }
        unknown
    }

    fn end(&mut self, pid: i32) {
        self.members.remove(&pid);
        self.past.insert(pid);
    }

    fn is_member(&self, stat: &Stat) -> bool {
        let is_or_was = |number: &i32| self.members.contains_key(number) || self.past.contains(number);
        self.members.contains_key(&stat.parent.get()) || is_or_was(&stat.session) || self.looked && self.is_orphan(stat)
    }

    /// True for one that appeared since the first look, in a member's process group, and that has lost its parent.
    fn is_orphan(&self, stat: &Stat) -> bool {
        let same_session = || Stat::read(stat.parent).is_ok_and(|parent| parent.session == stat.session);
        self.groups.contains(&stat.group) && !same_session()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use std::io::{BufRead as _, BufReader};
    use std::os::unix::process::CommandExt as _;
    use std::process::{Child, Command, Stdio};

    /// A shell that says numbers of processes, and ends with all that it started.
    struct Shell(Child, BufReader<std::process::ChildStdout>);

    impl Shell {
        fn new(script: &str) -> Self {
            let mut command = Command::new("sh");
            command.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
            let mut child = command.spawn().unwrap();
            let out = BufReader::new(child.stdout.take().unwrap());
            Self(child, out)
        }

        fn pid(&self) -> Pid {
            Pid(self.0.id().cast_signed())
        }

        fn number(&mut self) -> Pid {
            let mut line = String::new();
            self.1.read_line(&mut line).unwrap();
            Pid(line.trim().parse().unwrap())
        }
    }

    fn end(pid: Pid) {
        if let Ok(pidfd) = kernel::Pidfd::open(pid) {
            let _ = pidfd.send_signal(kernel::Signal::KILL);
        }
    }

    impl Drop for Shell {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn descendants_are_members_and_the_caller_and_its_other_children_are_not() {
        let mut shell = Shell::new("sh -c 'sleep 60 & echo $!; wait' & wait");
        let stranger = Shell::new("read line");
        let sleeper = shell.number();
        let mut family = Family::of(&[shell.pid()]);
        let found = family.look().unwrap().members;
        end(sleeper);
        assert!(found.contains(&shell.pid()) && found.contains(&sleeper) && found.len() == 3, "{found:?}");
        assert!(!found.contains(&stranger.pid()) && !found.contains(&Pid::this()));
    }

    #[test]
    fn a_number_that_is_given_again_makes_no_member() {
        let (mut shell, stranger) = (Shell::new("sleep 60 & echo $!; wait"), Shell::new("sleep 60 & echo $!; wait"));
        let sleeper = shell.number();
        let mut family = Family::of(&[shell.pid()]);
        // As if the stranger had the number of a member that has ended.
        family.members.insert(stranger.pid().get(), 1);
        let found = family.look().unwrap().members;
        end(sleeper);
        assert!(found.contains(&sleeper) && !found.contains(&stranger.pid()) && found.len() == 2, "{found:?}");
    }

    #[test]
    fn an_orphan_is_found_in_a_members_session_and_in_its_group() {
        // The first look finds what lost its parent before only in a session that the shell leads.
        let script = "setsid -w sh -c 'echo $$; (sleep 60 & echo $!); read line' <&0";
        let mut shell = Shell::new(script);
        let (leader, orphan) = (shell.number(), shell.number());
        let mut family = Family::of(&[leader]);
        let found = family.look().unwrap().members;
        end(orphan);
        end(leader);
        assert!(found.contains(&orphan), "{found:?} lacks {orphan}");

        let mut shell = Shell::new("read line; (sleep 60 & echo $!); read line");
        let mut family = Family::of(&[shell.pid()]);
        assert_eq!(family.look().unwrap().members, [shell.pid()]);
        std::io::Write::write_all(shell.0.stdin.as_mut().unwrap(), b"\n").unwrap();
        let orphan = shell.number();
        let found = family.look().unwrap().members;
        end(orphan);
        // Its parent is whoever takes up orphans here; only one outside of its session shows that it is one.
        let session = |pid| Stat::read(pid).ok().map(|stat| stat.session);
        if session(Pid(1)) != session(Pid::this()) {
            assert!(found.contains(&orphan), "{found:?} lacks {orphan}");
        }
    }
}
