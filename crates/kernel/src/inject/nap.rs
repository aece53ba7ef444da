//! When did the call begin that a thread sleeps in? Nothing says so, but the scheduler notes when a thread last ran.
//!
//! `se.exec_start` of /proc/TID/sched is that moment, on the clock of the CPU that it ran on. That clock cannot be read,
//! but whoever runs on that CPU finds the present in its own `se.exec_start`; so this thread goes there for a moment.
//!
//! A thread may have woken by itself, done other things and made another call just before it was stopped, and a
//! time-out must never end early. So it counts only if it ran just once between the look before and the stop, and if
//! that run, whose length is in its CPU time, began after it was asked to stop. Nor has it slept for longer than its
//! time-out. And a thread that falls asleep may stay in its queue for a while and be moved to another CPU there, which
//! forgets when it last ran: 0 (`migrate_task_rq_fair` in kernel/sched/fair.c).

use std::time::Duration;

use crate::procfs;
use crate::stat::Stat;
use crate::sys;
use crate::units::Pid;

/// What the scheduler says of a sleeping thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Nap {
    /// When it last ran, nanoseconds on the clock of its CPU; 0 if that is not known any more.
    ran: u64,
    /// CPU time in nanoseconds.
    used: u64,
    switches: u64,
    cpu: u64,
}

impl Nap {
    /// `None` where the kernel does not tell (CONFIG_SCHED_DEBUG), or if the thread is not at rest: what is told of it comes
    /// from two files, and is of one moment only if it is the same twice.
    pub(super) fn look(tid: Pid) -> Option<Self> {
        let look = Self::once(tid)?;
        (Self::once(tid)? == look).then_some(look)
    }

    fn once(tid: Pid) -> Option<Self> {
        let mut buffer = Vec::new();
        procfs::read_into(tid, "sched", &mut buffer).ok()?;
        let value = |key: &[u8]| {
            let mut fields = procfs::lines(&buffer).filter_map(procfs::field);
            fields.find(|(name, _)| name.trim_ascii() == key).map(|(_, value)| value)
        };
        Some(Self {
            ran: nanos(value(b"se.exec_start")?)?,
            used: nanos(value(b"se.sum_exec_runtime")?)?,
            switches: procfs::decimal(value(b"nr_switches")?)?,
            cpu: Stat::read(tid).ok()?.cpu?,
        })
    }

    /// When the thread fell asleep, on the monotonic clock, if it slept until it was asked to stop: `self` is from before
    /// that, `asked` when it was asked, `stopped` from now. It had `total` to sleep.
    pub(super) fn began(self, asked: u64, stopped: Self, total: Duration) -> Option<u64> {
        if !self.ran_once_until(stopped) {
            return None;
        }
        let there = Present::on(stopped.cpu)?;
        let here = if self.cpu == stopped.cpu { there } else { Present::on(self.cpu)? };
        began(self, asked, stopped, there, here, total)
    }

    /// False too if it is not known when it ran before that.
    fn ran_once_until(self, stopped: Self) -> bool {
        self.ran != 0 && stopped.switches == self.switches + 1
    }
}

fn began(before: Nap, asked: u64, stopped: Nap, there: Present, here: Present, total: Duration) -> Option<u64> {
    let run = stopped.used.checked_sub(before.used)?;
    let woke = there.earliest(stopped.ran.checked_sub(run)?)?;
    let began = here.latest(before.ran)?;
    // A sleep of that length would have ended by itself.
    let over = Duration::from_nanos(asked.saturating_sub(began)) > total;
    (woke >= asked && !over).then_some(began)
}

/// The present on the clock of a CPU, between two moments of the monotonic clock.
#[derive(Clone, Copy, Debug)]
struct Present {
    cpu: u64,
    before: u64,
    after: u64,
}

impl Present {
    /// Goes to a CPU and looks. `None` if this process may not run there.
    fn on(cpu: u64) -> Option<Self> {
        let own = Pid(rustix::thread::gettid().as_raw_nonzero().get());
        run_on(cpu)?;
        let look = || {
            let before = super::clock();
            // Makes the scheduler note the present, without letting others run first.
            let _ = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
            let noted = Nap::once(own)?;
            // Not before: if this thread had to wait meanwhile, the present that is noted is later.
            let after = super::clock();
            (noted.cpu == cpu).then_some(Self { cpu: noted.ran, before, after })
        };
        (0..3).filter_map(|_| look()).min_by_key(|present| present.after - present.before)
    }

    /// A moment of that CPU on the monotonic clock, or some microseconds earlier. Later by the time that interrupts and the
    /// host have taken since, for which that clock stands still.
    fn earliest(self, moment: u64) -> Option<u64> {
        self.before.checked_sub(self.cpu.checked_sub(moment)?)
    }

    /// The same, or later.
    fn latest(self, moment: u64) -> Option<u64> {
        self.after.checked_sub(self.cpu.checked_sub(moment)?)
    }
}

/// Keeps the calling thread, which ends soon, on one CPU.
fn run_on(cpu: u64) -> Option<()> {
    let mut set = [0_u64; 128];
    *set.get_mut(cpu as usize / 64)? = 1 << (cpu % 64);
    // SAFETY: the kernel reads the words that are said to be there.
    let result = unsafe { libc::syscall(libc::SYS_sched_setaffinity, 0, size_of_val(&set), set.as_ptr()) };
    sys::check(result).ok().map(|_| ())
}

/// Milliseconds with six digits behind the point.
fn nanos(text: &[u8]) -> Option<u64> {
    let point = text.iter().position(|byte| *byte == b'.')?;
    let (whole, part) = (procfs::decimal(&text[..point])?, &text[point + 1..]);
    if part.len() != 6 {
        return None;
    }
    whole.checked_mul(1_000_000)?.checked_add(procfs::decimal(part)?)
}

/// At most this much of a time-out is believed to have passed: whatever the clocks say, nobody sleeps longer.
pub(super) fn rest(now: u64, began: Option<u64>, total: Duration) -> u64 {
    let total = u64::try_from(total.as_nanos()).unwrap_or(u64::MAX);
    began.unwrap_or(now).min(now).saturating_add(total).max(1)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    /// CPU 0 is 1000 behind the monotonic clock, CPU 1 is 500 ahead; each is read within 10.
    const THERE: Present = Present { cpu: 10_500, before: 9_995, after: 10_005 };
    const HERE: Present = Present { cpu: 9_100, before: 10_095, after: 10_105 };

    #[test]
    fn a_sleep_counts_only_if_it_lasted_up_to_the_stop() {
        let before = Nap { ran: 2_000, used: 100, switches: 7, cpu: 0 };
        // Ran for 50 until 10_400 there, i.e. from 9_850 on.
        let stopped = Nap { ran: 10_400, used: 150, switches: 8, cpu: 1 };
        let total = |nanos| Duration::from_nanos(nanos);
        let found = |before, asked, stopped, total| began(before, asked, stopped, THERE, HERE, total);
        assert_eq!(found(before, 9_800, stopped, total(7_000)), Some(3_005));
        assert_eq!(found(before, 9_846, stopped, total(7_000)), None, "it ran before it was asked");
        assert_eq!(found(before, 9_800, Nap { used: 99, ..stopped }, total(7_000)), None);
        assert_eq!(found(before, 9_800, stopped, total(6_795)), Some(3_005));
        assert_eq!(found(before, 9_800, stopped, total(6_794)), None, "it would be over");
        assert!(before.ran_once_until(stopped));
        assert!(!before.ran_once_until(Nap { switches: 9, ..stopped }), "it ran twice");
        assert!(!Nap { ran: 0, ..before }.ran_once_until(stopped), "it was moved");
    }

    #[test]
    fn the_present_of_each_cpu() {
        assert_eq!(nanos(b"784392.610611"), Some(784_392_610_611));
        assert_eq!(nanos(b"784392"), None);
        assert_eq!(nanos(b"784392.61061"), None);
        let thread = std::thread::spawn(|| {
            let cpu = Stat::read(Pid(rustix::thread::gettid().as_raw_nonzero().get())).unwrap().cpu.unwrap();
            let Some(present) = Present::on(cpu) else {
                println!("skipped: /proc/PID/sched");
                return;
            };
            assert!(present.before <= present.after);
            assert!(present.latest(present.cpu - 5).unwrap() >= present.earliest(present.cpu - 5).unwrap());
            assert!(Present::on(8191).is_none());
        });
        thread.join().unwrap();
    }

    #[test]
    fn a_time_out_ends_when_it_would_have_and_is_never_0() {
        let total = Duration::from_nanos(1000);
        assert_eq!(rest(5000, Some(4600), total), 5600);
        assert_eq!(rest(5000, None, total), 6000);
        assert_eq!(rest(5000, Some(9000), total), 6000);
        assert_eq!(rest(0, Some(0), Duration::ZERO), 1);
    }
}
