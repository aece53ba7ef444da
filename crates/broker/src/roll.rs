//! Who was taken in, by program, for those who wonder whether theirs was.

use std::collections::{BTreeMap, HashMap};

use kernel::Pid;
use serde::Serialize;

/// Different programs that are told apart; what comes beyond them is summed up.
const PROGRAMS_MAX: usize = 256;
/// The name for those.
const OTHERS: &str = "others";

/// What became of the processes of one program that were taken in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Managed {
    /// The program's file.
    pub program: String,
    /// Processes, ever.
    pub processes: u64,
    /// Pages merged in them, ever.
    pub merges: u64,
}

/// The list of them.
#[derive(Debug, Default)]
pub(crate) struct Roll {
    programs: BTreeMap<String, Managed>,
    /// Which program a member runs, by the member's index.
    members: HashMap<u32, String>,
}

impl Roll {
    /// A process becomes a member.
    pub(crate) fn take_in(&mut self, member: u32, pid: Pid) {
        self.enter(member, program_of(pid));
    }

    fn enter(&mut self, member: u32, mut program: String) {
        if self.programs.len() >= PROGRAMS_MAX && !self.programs.contains_key(&program) {
            OTHERS.clone_into(&mut program);
        }
        let managed = self.programs.entry(program.clone()).or_default();
        managed.program.clone_from(&program);
        managed.processes += 1;
        self.members.insert(member, program);
    }

    /// Pages of a member were merged.
    pub(crate) fn merged(&mut self, member: u32, pages: u64) {
        if let Some(managed) = self.members.get(&member).and_then(|program| self.programs.get_mut(program)) {
            managed.merges += pages;
        }
    }

    /// A member leaves; what became of it stays in the list.
    pub(crate) fn let_go(&mut self, member: u32) {
        self.members.remove(&member);
    }

    /// All programs, those with the most merged pages first.
    pub(crate) fn list(&self) -> Vec<Managed> {
        let mut list: Vec<Managed> = self.programs.values().cloned().collect();
        list.sort_by_key(|managed| std::cmp::Reverse((managed.merges, managed.processes)));
        list
    }
}

/// The file that a process executes, for people.
pub(crate) fn program_of(pid: Pid) -> String {
    let program = std::fs::read_link(format!("/proc/{pid}/exe")).map(|exe| exe.display().to_string());
    program.unwrap_or_else(|_ended| "a program that has ended".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn programs(roll: &Roll) -> Vec<(String, u64, u64)> {
        roll.list().into_iter().map(|one| (one.program, one.processes, one.merges)).collect()
    }

    #[test]
    fn those_who_have_left_are_told_too() {
        let mut roll = Roll::default();
        for (member, program) in [(1, "/a"), (2, "/b"), (3, "/b")] {
            roll.enter(member, program.to_owned());
        }
        roll.merged(2, 5);
        roll.let_go(2);
        roll.merged(2, 100);
        roll.merged(3, 1);
        assert_eq!(programs(&roll), [("/b".to_owned(), 2, 6), ("/a".to_owned(), 1, 0)]);
    }

    #[test]
    fn a_crowd_of_programs_is_summed_up() {
        let mut roll = Roll::default();
        for member in 0..1000 {
            roll.enter(member, format!("/program/{member}"));
            roll.merged(member, 1);
        }
        let list = roll.list();
        assert_eq!(list.len(), PROGRAMS_MAX + 1);
        assert_eq!((list[0].program.as_str(), list[0].merges), (OTHERS, 1000 - PROGRAMS_MAX as u64));
    }
}
