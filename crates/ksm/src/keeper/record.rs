//! What the keeper has done, on record: in a file, so that whoever comes after it knows.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::time::Duration;

use rules::Facts;
use serde::{Deserialize, Serialize};

use super::standing::Standing;
use crate::error::KsmError;
use crate::proc_stat::ProcessId;
use crate::state::{StatePath, boot_id};

/// First pause after a refusal; each further one takes twice as long.
const PAUSE: u64 = 30;
/// Longest one.
const PAUSE_MOST: u64 = 3600;

/// One process on record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recorded {
    /// Which.
    #[serde(flatten)]
    pub process: ProcessId,
    /// Its command name, for people.
    pub comm: String,
    /// What it executed. Another program in the same process is another matter.
    pub exe: Option<PathBuf>,
    /// How it stands.
    #[serde(flatten)]
    pub standing: Standing,
    /// What it starts from then on inherits its marks; clock ticks since boot, as start times are.
    pub since: u64,
}

/// The record. While it is [held](Record::hold), nobody else keeps rules.
#[derive(Debug)]
pub struct Record {
    path: StatePath,
    /// `None` for one that is only read.
    lock: Option<File>,
    entries: HashMap<ProcessId, Recorded>,
    changed: bool,
    /// Not in the file: who comes next may try at once.
    pauses: HashMap<ProcessId, Pause>,
}

/// A time in which nothing is tried on a process.
#[derive(Clone, Debug)]
struct Pause {
    until: u64,
    times: u32,
    reason: String,
}

/// The file.
#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
struct Document {
    boot_id: String,
    processes: Vec<Recorded>,
}

impl Record {
    /// The record of this user's calls: `/run/pagefold/ksm-rules.json` for root.
    #[must_use]
    pub fn path_for_this_user() -> StatePath {
        StatePath::for_this_user().neighbour("ksm-rules.json")
    }

    /// Reads it to look at. Nothing can be entered.
    ///
    /// # Errors
    /// [`KsmError::Record`], [`KsmError::DamagedRecord`].
    pub fn read(path: &StatePath) -> Result<Self, KsmError> {
        let damaged = |source| KsmError::DamagedRecord { path: path.as_path().to_owned(), source };
        let document = match fs::read(path.as_path()) {
            Ok(text) => serde_json::from_slice::<Document>(&text).map_err(damaged)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Document::default(),
            Err(error) => return Err(unusable(path, error)),
        };
        // Processes do not outlive their boot, but their numbers come again.
        let processes = if document.boot_id == boot_id() { document.processes } else { Vec::new() };
        let entries = processes.into_iter().map(|entry| (entry.process, entry)).collect();
        Ok(Self { path: path.clone(), lock: None, entries, changed: false, pauses: HashMap::new() })
    }

    /// Takes it: nobody else can until this is dropped, or this process ends in whatever way.
    ///
    /// # Errors
    /// [`KsmError::Busy`] if somebody else has it; [`KsmError::Unsafe`], [`KsmError::State`] of its directory;
    /// [`KsmError::Record`], [`KsmError::DamagedRecord`].
    pub fn hold(path: &StatePath) -> Result<Self, KsmError> {
        path.private_directory()?;
        let beside = path.as_path().with_extension("lock");
        let mut file = OpenOptions::new();
        let file = file.create(true).truncate(false).read(true).write(true).mode(0o600).open(beside);
        let mut lock = file.map_err(|error| unusable(path, error))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                let mut holder = String::new();
                let _ = lock.read_to_string(&mut holder);
                return Err(KsmError::Busy { pid: holder.trim().parse().ok() });
            }
            Err(fs::TryLockError::Error(error)) => return Err(unusable(path, error)),
        }
        // Only for the message above.
        let _ = lock.set_len(0).and_then(|()| write!(lock, "{}", std::process::id()));
        Ok(Self { lock: Some(lock), ..Self::read(path)? })
    }

    /// Everybody on record.
    pub fn entries(&self) -> impl Iterator<Item = &Recorded> {
        self.entries.values()
    }

    /// How a process stands, if it is on record.
    #[must_use]
    pub fn standing(&self, process: ProcessId) -> Option<Standing> {
        self.entries.get(&process).map(|entry| entry.standing)
    }

    /// The entry of a process.
    #[must_use]
    pub fn entry(&self, process: ProcessId) -> Option<&Recorded> {
        self.entries.get(&process)
    }

    /// Nothing is tried on it now.
    #[must_use]
    pub fn is_paused(&self, process: ProcessId) -> bool {
        self.pauses.get(&process).is_some_and(|pause| pause.until > now())
    }

    /// Enters how a process stands now, from now on; what was enabled before stays so since then.
    pub(super) fn enter(&mut self, process: ProcessId, facts: &Facts, standing: Standing) {
        let before = self.entries.get(&process).filter(|before| before.standing.is_ours());
        let since = before.filter(|_| standing.is_ours()).map_or_else(now_ticks, |before| before.since);
        self.put(Recorded { process, comm: facts.comm.clone(), exe: facts.exe.clone(), standing, since });
    }

    /// Enters a process that was enabled from its start, by inheritance.
    pub(super) fn enter_heir(&mut self, process: ProcessId, facts: &Facts) {
        let (comm, exe, since) = (facts.comm.clone(), facts.exe.clone(), process.start_time);
        self.put(Recorded { process, comm, exe, standing: Standing::Enabled { drops: 0 }, since });
    }

    fn put(&mut self, entry: Recorded) {
        let process = entry.process;
        self.changed |= self.entries.insert(process, entry.clone()) != Some(entry);
    }

    /// Has a process stand as it did before; `None`: it was not on record.
    pub(super) fn put_back(&mut self, process: ProcessId, before: Option<Recorded>) {
        match before {
            Some(entry) => self.put(entry),
            None => self.forget(process),
        }
    }

    pub(super) fn forget(&mut self, process: ProcessId) {
        self.changed |= self.entries.remove(&process).is_some();
    }

    /// Forgets those that have ended.
    pub(super) fn forget_all_but(&mut self, there: &HashSet<ProcessId>) {
        let before = self.entries.len();
        self.entries.retain(|process, _| there.contains(process));
        self.pauses.retain(|process, _| there.contains(process));
        self.changed |= before != self.entries.len();
    }

    pub(super) fn forget_if(&mut self, condition: impl Fn(ProcessId) -> bool) {
        let before = self.entries.len();
        self.entries.retain(|process, _| !condition(*process));
        self.changed |= before != self.entries.len();
    }

    /// Pauses with a process, for twice as long as the last time. True if the reason is another one.
    pub(super) fn pause(&mut self, process: ProcessId, reason: &str) -> bool {
        let last = self.pauses.remove(&process);
        let times = last.as_ref().map_or(0, |pause| pause.times);
        let until = now() + doubled(PAUSE, times).min(PAUSE_MOST);
        self.pauses.insert(process, Pause { until, times: times.saturating_add(1), reason: reason.to_owned() });
        last.is_none_or(|pause| pause.reason != reason)
    }

    /// Something may be tried again.
    pub(super) fn resume(&mut self, process: ProcessId) {
        self.pauses.remove(&process);
    }

    /// Replaces the file, so that a reader or a kill at any moment finds the old or the new one.
    ///
    /// # Errors
    /// [`KsmError::Record`].
    pub(super) fn store(&mut self) -> Result<(), KsmError> {
        if self.lock.is_none() || !self.changed {
            return Ok(());
        }
        let mut processes: Vec<Recorded> = self.entries.values().cloned().collect();
        processes.sort_by_key(|entry| entry.process);
        let document = Document { boot_id: boot_id(), processes };
        let text = serde_json::to_vec_pretty(&document).expect("numbers and strings always serialise");
        let new = self.path.as_path().with_extension("new");
        let write = || -> io::Result<()> {
            if document.processes.is_empty() {
                return match fs::remove_file(self.path.as_path()) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                    _ => Ok(()),
                };
            }
            let mut file = OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&new)?;
            file.write_all(&text)?;
            fs::rename(&new, self.path.as_path())
        };
        write().map_err(|error| unusable(&self.path, error))?;
        self.changed = false;
        Ok(())
    }
}

fn unusable(path: &StatePath, source: io::Error) -> KsmError {
    KsmError::Record { path: path.as_path().to_owned(), source }
}

/// Seconds since boot, in which a suspended machine counts too.
pub(super) fn now() -> u64 {
    boottime().as_secs()
}

fn now_ticks() -> u64 {
    let ticks = u128::from(rustix::param::clock_ticks_per_second());
    u64::try_from(boottime().as_millis() * ticks / 1000).unwrap_or(u64::MAX)
}

fn boottime() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// Twice as much for each time.
pub(super) fn doubled(first: u64, times: u32) -> u64 {
    first.saturating_mul(1_u64.checked_shl(times).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn process(pid: i32) -> ProcessId {
        ProcessId { pid, start_time: 7 }
    }

    #[test]
    fn what_is_entered_is_read_again_and_only_in_this_boot() {
        let folder = tempfile::tempdir().unwrap();
        let path = StatePath::at(folder.path().join("a/rules.json"));
        let mut record = Record::hold(&path).unwrap();
        let facts = Facts { comm: "x".to_owned(), exe: Some("/x".into()), ..Facts::default() };
        let kept = [
            (process(1), Standing::Enabled { drops: 2 }),
            (process(2), Standing::Released),
            (process(3), Standing::Dropped { until: 5, drops: 1 }),
            (process(4), Standing::Asked { drops: 0 }),
        ];
        for (process, standing) in kept {
            record.enter(process, &facts, standing);
        }
        record.store().unwrap();
        drop(record);
        let read = Record::read(&path).unwrap();
        for (process, standing) in kept {
            assert_eq!(read.standing(process), Some(standing));
        }
        assert_eq!(read.standing(ProcessId { start_time: 8, ..process(1) }), None, "the number's next owner");
        let text = fs::read_to_string(path.as_path()).unwrap().replace(&boot_id(), "another");
        fs::write(path.as_path(), text).unwrap();
        assert_eq!(Record::read(&path).unwrap().entries().count(), 0);
        fs::write(path.as_path(), "{").unwrap();
        assert!(matches!(Record::read(&path), Err(KsmError::DamagedRecord { .. })));
    }

    #[test]
    fn it_is_known_since_when_a_process_passes_its_marks_on() {
        let folder = tempfile::tempdir().unwrap();
        let mut record = Record::read(&StatePath::at(folder.path().join("rules.json"))).unwrap();
        let (own, facts) = (ProcessId::current().unwrap(), Facts::default());
        record.enter(own, &facts, Standing::Asked { drops: 0 });
        let since = record.entry(own).unwrap().since;
        assert!(since >= own.start_time && since <= now_ticks(), "{since}");
        std::thread::sleep(Duration::from_millis(50));
        record.enter(own, &facts, Standing::Enabled { drops: 0 });
        assert_eq!(record.entry(own).unwrap().since, since);
        record.enter(own, &facts, Standing::Released);
        record.enter(own, &facts, Standing::Asked { drops: 0 });
        assert!(record.entry(own).unwrap().since > since);
        record.enter_heir(own, &facts);
        assert_eq!(record.entry(own).unwrap().since, own.start_time);
    }

    #[test]
    fn one_at_a_time_and_the_other_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = StatePath::at(folder.path().join("rules.json"));
        let first = Record::hold(&path).unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(matches!(Record::hold(&path), Err(KsmError::Busy { pid: Some(pid) }) if pid == own));
        assert!(Record::read(&path).is_ok());
        drop(first);
        // A process that another test has just forked has a copy of the lock until it executes something.
        let deadline = std::time::Instant::now() + Duration::from_secs(5);
        while Record::hold(&path).is_err() {
            assert!(std::time::Instant::now() < deadline, "it is still held");
            std::thread::yield_now();
        }
    }

    #[test]
    fn pauses_grow_and_each_reason_is_new_once() {
        let folder = tempfile::tempdir().unwrap();
        let mut record = Record::read(&StatePath::at(folder.path().join("rules.json"))).unwrap();
        assert!(!record.is_paused(process(1)));
        assert!(record.pause(process(1), "traced") && !record.pause(process(1), "traced"));
        assert!(record.pause(process(1), "stopped"));
        assert!(record.is_paused(process(1)) && !record.is_paused(process(2)));
        let until = record.pauses[&process(1)].until;
        assert!((now() + 115..=now() + 120).contains(&until), "the third time: four times as long");
        assert_eq!((doubled(30, 0), doubled(30, 2), doubled(30, 80)), (30, 120, u64::MAX));
        record.forget_all_but(&HashSet::new());
        assert!(!record.is_paused(process(1)));
    }
}
