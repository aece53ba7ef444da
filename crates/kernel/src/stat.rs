//! Who a process or thread is, whose child, and in which state (/proc/PID/stat).

use crate::procfs::{self, ProcError};
use crate::units::Pid;

/// The fields that are needed here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stat {
    /// Its name; what is no text in it is replaced.
    pub comm: String,
    /// One letter: R, S, D, T, t, Z, X, I.
    pub state: u8,
    /// The parent.
    pub parent: Pid,
    /// Process group; -1 for one that has just ended.
    pub group: i32,
    /// Session; -1 for one that has just ended.
    pub session: i32,
    /// PF_... of include/linux/sched.h.
    flags: u64,
    /// Threads that the process has, of a thread too.
    pub threads: u64,
    /// Clock ticks after boot: with the number it names a process or thread for good.
    pub start_time: u64,
    /// The CPU it ran on last.
    pub cpu: Option<u64>,
}

impl Stat {
    /// Looks at a process or a thread.
    ///
    /// # Errors
    /// [`ProcError`].
    pub fn read(pid: Pid) -> Result<Self, ProcError> {
        let mut buffer = Vec::new();
        procfs::read_into(pid, "stat", &mut buffer)?;
        Self::parse(&buffer)
            .ok_or_else(|| ProcError::Parse { path: format!("/proc/{pid}/stat"), line: procfs::text(&buffer) })
    }

    /// True for a process that is no zombie. One whose first thread has ended and others go on is alive.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        !self.is_of_ended() || self.threads > 1
    }

    /// True for one that is about to end: it may have given its memory up already.
    #[must_use]
    pub fn is_exiting(&self) -> bool {
        const PF_EXITING: u64 = 4;
        self.flags & PF_EXITING != 0
    }

    /// True for a thread that runs nothing but the kernel, and has no memory of a program.
    #[must_use]
    pub fn is_kernel_thread(&self) -> bool {
        const PF_KTHREAD: u64 = 0x0020_0000;
        self.flags & PF_KTHREAD != 0
    }

    /// True for a thread that the kernel runs in a process (io_uring, vhost).
    #[must_use]
    pub fn is_worker(&self) -> bool {
        const PF_IO_WORKER: u64 = 0x10;
        const PF_USER_WORKER: u64 = 0x4000;
        self.flags & (PF_IO_WORKER | PF_USER_WORKER) != 0
    }

    /// True if there is no such thread any more, or only what is left of it.
    #[must_use]
    pub fn has_ended(tid: Pid) -> bool {
        Self::read(tid).map_or(true, |stat| stat.is_of_ended())
    }

    fn is_of_ended(&self) -> bool {
        matches!(self.state, b'Z' | b'X' | b'x')
    }

    fn parse(line: &[u8]) -> Option<Self> {
        // The name stands in parentheses and may itself hold spaces and parentheses: the last one closes it.
        let open = line.iter().position(|byte| *byte == b'(')?;
        let close = line.iter().rposition(|byte| *byte == b')')?;
        let comm = String::from_utf8_lossy(line.get(open + 1..close)?).into_owned();
        // proc_pid_stat(5) counts from 1 and this list begins with field 3.
        let fields: Vec<&[u8]> = procfs::words(&line[close + 1..]).collect();
        let number = |field: usize| procfs::decimal(fields.get(field - 3)?);
        let signed = |field: usize| std::str::from_utf8(fields.get(field - 3)?).ok()?.parse::<i32>().ok();
        Some(Self {
            comm,
            state: *fields.first()?.first()?,
            parent: Pid(signed(4)?),
            group: signed(5)?,
            session: signed(6)?,
            flags: number(9)?,
            threads: number(20)?,
            start_time: number(22)?,
            cpu: number(39),
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let text = b"42 (a) b (c) S 7 42 42 0 -1 4194304 100 0 0 0 11 22 0 0 20 0 3 0 98765 1 2 3";
        let stat = Stat::parse(text).unwrap();
        assert_eq!(stat.comm, "a) b (c");
        assert_eq!((stat.parent, stat.start_time, stat.is_alive()), (Pid(7), 98765, true));
        assert_eq!((stat.group, stat.session, stat.flags), (42, 42, 0x40_0000));
        assert_eq!(Stat::parse(b"42 (a S 7"), None);
        assert_eq!(Stat::parse(b"42 (a"), None);
    }

    #[test]
    fn one_that_has_just_ended_has_no_group() {
        let text = b"42 (a) X 0 -1 -1 0 -1 4194304 0 0 0 0 0 0 0 0 20 0 0 0 98765 0 0 0";
        let stat = Stat::parse(text).unwrap();
        assert_eq!((stat.group, stat.session, stat.is_alive()), (-1, -1, false));
    }

    #[test]
    fn the_cpu_and_our_own() {
        let line = b"42 (a) R (b) S 1 42 42 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 777 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 17 1 0 0 0";
        let stat = Stat::parse(line).unwrap();
        assert_eq!((stat.state, stat.parent, stat.flags), (b'S', Pid(1), 4_194_304));
        assert_eq!((stat.start_time, stat.cpu), (777, Some(1)));
        let own = Stat::read(Pid::this()).unwrap();
        assert!(own.start_time > 0 && own.is_alive() && own.threads > 0);
        assert!(Stat::read(Pid(i32::MAX)).unwrap_err().is_gone() && Stat::has_ended(Pid(i32::MAX)));
    }
}
