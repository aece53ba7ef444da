//! Whose address spaces the events are about.
//!
//! No file tells. But whoever reads a process's `ksm_stat` locks its address space for a moment, and the kernel has an
//! event for that, in the reader's name. So the processes are read one by one with a mark before each, while this event
//! is on for the reader alone: the address space that he locks after a mark, and that is not his own, is that process's.
//! A child's first event is no help: `ksm_enter` comes in its parent's name.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write as _;

use kernel::ksm_sysfs::ksm_stat;
use kernel::tracefs::{Instance, TraceError};
use kernel::{Pid, maps, status};

use super::decode::{Event, LOCK, Mm};
use crate::proc_stat::ProcessId;

/// A process, as it was when it was named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Name {
    pub(super) process: ProcessId,
    pub(super) comm: String,
}

/// What is known.
#[derive(Debug, Default)]
pub(super) struct Names {
    known: HashMap<Mm, Name>,
    /// This thread's number where the events number threads, and its own address space.
    thread: Option<i64>,
    own: Option<Mm>,
    /// The process after whose mark we are.
    reading: Option<Name>,
    /// Whether this kernel has that event; not known before it was asked for.
    supported: Option<bool>,
}

const HELLO: &str = "pagefold hello";
const ASK: &str = "pagefold ask ";
const DONE: &str = "pagefold done";

impl Names {
    /// Makes a mark by which this thread is known, unless it is.
    pub(super) fn hello(&self, marker: &mut File) -> Result<(), TraceError> {
        if self.thread.is_none() { mark(marker, HELLO) } else { Ok(()) }
    }

    /// Has an event come for each process. They are read later.
    pub(super) fn ask(&mut self, instance: &Instance, marker: &mut File) -> Result<(), TraceError> {
        let Some(thread) = self.thread.filter(|_| self.supported != Some(false)) else { return Ok(()) };
        let enable = format!("events/{LOCK}/enable");
        match instance.write(&format!("events/{LOCK}/filter"), &format!("common_pid == {thread}")) {
            Ok(()) => instance.write(&enable, "1")?,
            Err(error) if error.is_missing() => {
                self.supported = Some(false);
                return Ok(());
            }
            Err(error) => return Err(error),
        }
        self.supported = Some(true);
        let asked = ask_each(marker);
        // Off again whatever happened: it costs everybody a little.
        instance.write(&enable, "0")?;
        asked
    }

    /// Looks at an event, in the order of time.
    pub(super) fn take(&mut self, event: &Event) {
        match event {
            // Nobody else writes marks into an instance of ours.
            Event::Mark { text, thread } if text == HELLO => self.thread = Some(*thread),
            Event::Mark { text, thread } if Some(*thread) == self.thread => {
                self.reading = text.strip_prefix(ASK).and_then(named);
            }
            Event::Locked { mm, thread } if Some(*thread) == self.thread => self.locked(*mm),
            _ => {}
        }
    }

    fn locked(&mut self, mm: Mm) {
        let Some(name) = &self.reading else { return };
        if name.process.pid == Pid::this().get() {
            self.own = Some(mm);
        } else if self.own == Some(mm) {
            // An allocation or a page fault of our own lies between.
            return;
        }
        self.known.insert(mm, name.clone());
        self.reading = None;
    }

    /// Forgets an address space that has gone: its place in the kernel may be given to another.
    pub(super) fn forget(&mut self, mm: Mm) -> Option<Name> {
        self.known.remove(&mm)
    }

    #[cfg(test)]
    pub(super) fn with(known: impl IntoIterator<Item = (Mm, Name)>) -> Self {
        Self { known: known.into_iter().collect(), thread: Some(1), supported: Some(true), ..Self::default() }
    }

    pub(super) fn of(&self, mm: Mm) -> Option<&Name> {
        self.known.get(&mm)
    }

    /// False if this kernel cannot tell.
    pub(super) fn can_tell(&self) -> bool {
        self.supported == Some(true)
    }
}

fn mark(marker: &mut File, text: &str) -> Result<(), TraceError> {
    let (path, value) = ("trace_marker".to_owned(), text.to_owned());
    marker.write_all(text.as_bytes()).map_err(|source| TraceError::Write { path, value, source })
}

fn ask_each(marker: &mut File) -> Result<(), TraceError> {
    // Its own first: whatever it locks beside is that.
    let this = Pid::this();
    let others = status::processes().unwrap_or_default().into_iter().filter(|pid| *pid != this);
    for pid in std::iter::once(this).chain(others) {
        let Some(process) = ProcessId::of(pid.get()) else { continue };
        mark(marker, &format!("{ASK}{} {}", process.pid, process.start_time))?;
        // Before 6.16 this file takes no lock, and this one does up to then.
        if ksm_stat(pid).is_ok_and(|stat| stat.ksm_mergeable.is_none()) {
            let _ = maps::count(pid);
        }
    }
    mark(marker, DONE)
}

/// `PID START_TIME`, with the name that it has now.
fn named(text: &str) -> Option<Name> {
    let (pid, start_time) = text.split_once(' ')?;
    let process = ProcessId { pid: pid.parse().ok()?, start_time: start_time.parse().ok()? };
    let comm = status::read(Pid(process.pid)).map(|about| about.name.to_string_lossy().into_owned());
    Some(Name { process, comm: comm.unwrap_or_else(|_| "?".to_owned()) })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn the_lock_after_a_mark_names_unless_it_is_our_own() {
        let this = ProcessId::current().unwrap();
        let mut names = Names::default();
        let mark = |text: String| Event::Mark { text, thread: 77 };
        let ask = |pid: i32, start: u64| mark(format!("{ASK}{pid} {start}"));
        let lock = |mm: u64, thread: i64| Event::Locked { mm: Mm(mm), thread };
        for event in [
            mark(HELLO.to_owned()),
            ask(this.pid, this.start_time),
            lock(0x1000, 77),
            ask(2_000_000_001, 5),
            lock(0x1000, 77),
            lock(0x9000, 78),
            lock(0x2000, 77),
            lock(0x3000, 77),
            // Gone before it could be read.
            ask(2_000_000_002, 6),
            mark(DONE.to_owned()),
            lock(0x4000, 77),
        ] {
            names.take(&event);
        }
        assert_eq!(names.of(Mm(0x1000)).unwrap().process, this);
        assert_eq!(names.of(Mm(0x2000)).unwrap().process, ProcessId { pid: 2_000_000_001, start_time: 5 });
        assert!([0x3000, 0x4000, 0x9000].iter().all(|mm| names.of(Mm(*mm)).is_none()));
    }
}
