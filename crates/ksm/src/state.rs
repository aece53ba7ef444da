//! The lease's state: one file for the host, changed only under a lock.
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::KsmError;
use crate::knob::{Knob, Values};
use crate::patience;
use crate::proc_stat::ProcessId;
use crate::repaired::Foreign;
use crate::wanted::Wanted;

/// Where the state file is. Every user of one kernel's KSM must use the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatePath(PathBuf);

impl StatePath {
    /// `/run/pagefold/ksm-lease.json` for root; for a user who was given write access to KSM's files, the same below
    /// `XDG_RUNTIME_DIR`.
    #[must_use]
    pub fn for_this_user() -> Self {
        if rustix::process::geteuid().is_root() {
            return Self::of_root();
        }
        let run = std::env::var_os("XDG_RUNTIME_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
        Self(run.join("pagefold").join("ksm-lease.json"))
    }

    /// Root's, whoever asks.
    #[must_use]
    pub fn of_root() -> Self {
        Self(PathBuf::from("/run/pagefold/ksm-lease.json"))
    }

    /// Another place. Its directory is made with mode 0700 if it is missing.
    #[must_use]
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// The file.
    #[must_use]
    pub fn as_path(&self) -> &Path {
        &self.0
    }

    /// Another file in the same directory.
    #[must_use]
    pub fn neighbour(&self, name: &str) -> Self {
        Self(self.beside(name))
    }

    /// Makes the directory, or looks whether it is one that nobody else can put files into.
    pub(crate) fn private_directory(&self) -> Result<(), KsmError> {
        let directory = self.0.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(|e| self.error(e))?;
        // symlink_metadata: a link planted in a shared directory must not lead elsewhere.
        let found = fs::symlink_metadata(directory).map_err(|e| self.error(e))?;
        if !found.is_dir() || found.uid() != rustix::process::geteuid().as_raw() || found.mode() & 0o022 != 0 {
            return Err(KsmError::Unsafe { path: directory.to_owned() });
        }
        Ok(())
    }

    fn error(&self, source: io::Error) -> KsmError {
        KsmError::State { path: self.0.clone(), source }
    }

    fn beside(&self, name: &str) -> PathBuf {
        self.0.with_file_name(name)
    }

    /// Removes the file that showed that a holder lived.
    pub(crate) fn forget_life(&self, name: &str) {
        // What stays behind is an empty file that nobody names any more.
        let _ = fs::remove_file(self.beside(name));
    }
}

/// One holder of the lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The process that acquired.
    #[serde(flatten)]
    pub process: ProcessId,
    /// Which of the process's leases.
    pub serial: u64,
    /// Inode of its pid namespace: in another one its number says nothing.
    pub pid_namespace: u64,
    /// Name of the file beside the state file that is locked for as long as it lives; empty if there is none.
    #[serde(default)]
    pub life: String,
    /// Its command name, for people.
    pub command: String,
    /// What it asks for.
    pub wanted: Wanted,
    /// What others have written since it last heard of that: the first to look may be anybody.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) unheard: Vec<Foreign>,
}

impl Holder {
    pub(crate) fn current(serial: u64, wanted: Wanted) -> Result<Self, KsmError> {
        let command =
            fs::read_to_string("/proc/self/comm").map_or_else(|_| String::from("?"), |name| name.trim().to_owned());
        let (process, pid_namespace) = (ProcessId::current()?, pid_namespace());
        Ok(Self { process, serial, pid_namespace, life: String::new(), command, wanted, unheard: Vec::new() })
    }

    /// Dead beyond doubt: gone from its own pid namespace, or, from wherever one looks, with its lock on `life` gone. The
    /// lock alone would not do: a child that was just forked has it too until it executes something.
    pub(crate) fn is_dead(&self, path: &StatePath) -> bool {
        let seen_here = self.pid_namespace == pid_namespace() && kernel::procfs::shows_this_process().unwrap_or(false);
        seen_here && !self.process.is_alive() || !self.life.is_empty() && is_free(&path.beside(&self.life))
    }

    /// Takes the lock that shows that this holder lives, to be kept for as long as it does. Under the state's lock: a file
    /// that is not locked yet would be taken for a dead one's.
    pub(crate) fn begin_life(&mut self, path: &StatePath, _under: &Locked) -> Result<Life, KsmError> {
        let ProcessId { pid, start_time } = self.process;
        let name = format!("{LIFE}{}-{pid}-{start_time}-{}", self.pid_namespace, self.serial);
        let file_path = path.beside(&name);
        let mut file = OpenOptions::new();
        let file = file.create(true).truncate(false).write(true).mode(0o600).open(&file_path);
        let file = file.map_err(|error| path.error(error))?;
        file.try_lock().map_err(|error| path.error(error.into()))?;
        self.life.clone_from(&name);
        Ok(Life { _locked: file, name })
    }

    pub(crate) fn is(&self, process: ProcessId, serial: u64) -> bool {
        self.process == process && self.serial == serial && self.pid_namespace == pid_namespace()
    }
}

/// How the names of holders' files begin.
const LIFE: &str = "holder-";

/// A holder's lock on its file.
#[derive(Debug)]
pub(crate) struct Life {
    /// Closed on exec, and with the process.
    _locked: File,
    pub(crate) name: String,
}

/// True if nobody holds the lock of a file that is there.
fn is_free(file: &Path) -> bool {
    File::open(file).is_ok_and(|file| file.try_lock().is_ok())
}

fn pid_namespace() -> u64 {
    fs::metadata("/proc/self/ns/pid").map_or(0, |link| link.ino())
}

pub(crate) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").map_or_else(|_| String::new(), |id| id.trim().to_owned())
}

/// What is known about the settings while somebody holds them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct State {
    /// The kernel starts with its own values, so a record of another boot says nothing.
    boot_id: String,
    /// Values found when the first holder came. Empty when nothing is leased.
    pub(crate) administrator: Values,
    /// Values that we wrote and that differ from the administrator's.
    pub(crate) written: Values,
    /// Values that are about to be written: noted before, so that a kill between two writes leaves no doubt whose value
    /// is found afterwards.
    pub(crate) pending: Values,
    /// Knobs that somebody else wrote meanwhile; they are the administrator's until the last holder goes.
    pub(crate) given_up: Vec<Knob>,
    /// Who holds.
    pub(crate) holders: Vec<Holder>,
}

impl State {
    /// Nothing is held and nothing is owed.
    pub(crate) fn is_over(&self) -> bool {
        self.holders.is_empty() && self.written.is_empty() && self.pending.is_empty()
    }
}

/// The state under its lock.
pub(crate) struct Locked {
    /// Holds the lock until it is closed.
    _lock: File,
    path: StatePath,
}

impl Locked {
    /// Waits for the lock; holders keep it for the few writes of a change, which may wait for ksmd's current batch, and
    /// for as long as un-merging the host takes. Who waits for long [says](crate::tell_waits) so.
    pub(crate) fn new(path: &StatePath) -> Result<Self, KsmError> {
        path.private_directory()?;
        // The state file is replaced as a whole, so the lock lies on a neighbour that stays.
        let file = path.0.with_extension("lock");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&file)
            .map_err(|e| path.error(e))?;
        patience::lock(&lock, &file).map_err(|e| path.error(e))?;
        Ok(Self { _lock: lock, path: path.clone() })
    }

    pub(crate) fn load(&self) -> Result<State, KsmError> {
        let fresh = || State { boot_id: boot_id(), ..State::default() };
        let text = match fs::read(&self.path.0) {
            Ok(text) => text,
            Err(missing) if missing.kind() == io::ErrorKind::NotFound => return Ok(fresh()),
            Err(source) => return Err(self.path.error(source)),
        };
        let state: State =
            serde_json::from_slice(&text).map_err(|source| KsmError::Damaged { path: self.path.0.clone(), source })?;
        Ok(if state.boot_id == boot_id() { state } else { fresh() })
    }

    /// Removes the files of holders that died, before or after they were entered.
    pub(crate) fn forget_the_dead(&self, state: &State) {
        let Ok(files) = fs::read_dir(self.path.beside(".")) else { return };
        for file in files.flatten() {
            let name = file.file_name();
            let listed = state.holders.iter().any(|holder| *holder.life == *name);
            if name.as_encoded_bytes().starts_with(LIFE.as_bytes()) && !listed && is_free(&file.path()) {
                let _ = fs::remove_file(file.path());
            }
        }
    }

    /// Replaces the file, so that a reader or a kill at any moment finds the old or the new state.
    pub(crate) fn store(&self, state: &State) -> Result<(), KsmError> {
        if state.is_over() {
            return match fs::remove_file(&self.path.0) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(self.path.error(error)),
                _ => Ok(()),
            };
        }
        let text =
            serde_json::to_vec_pretty(state).expect("numbers, strings and maps with string keys always serialise");
        replace(&self.path.0, &text).map_err(|e| self.path.error(e))
    }

    /// The file beside the state that has this name.
    pub(crate) fn beside(&self, name: &str) -> PathBuf {
        self.path.beside(name)
    }
}

/// Replaces a file as a whole. To be called under the lock.
pub(crate) fn replace(file: &Path, text: &[u8]) -> io::Result<()> {
    let new = file.with_extension("new");
    let mut written = OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&new)?;
    written.write_all(text).and_then(|()| fs::rename(&new, file)).inspect_err(|_| {
        // What a full /run did not take needs no room there either.
        let _ = fs::remove_file(&new);
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn the_directory_is_private_and_an_open_one_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let path = StatePath::at(temp.path().join("a/b/lease.json"));
        drop(Locked::new(&path).unwrap());
        assert_eq!(fs::metadata(temp.path().join("a/b")).unwrap().mode() & 0o777, 0o700);
        fs::set_permissions(temp.path().join("a/b"), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(Locked::new(&path), Err(KsmError::Unsafe { .. })));
    }

    #[test]
    fn a_state_of_another_boot_is_forgotten_and_a_damaged_one_is_not() {
        let temp = tempfile::tempdir().unwrap();
        let path = StatePath::at(temp.path().join("lease.json"));
        let locked = Locked::new(&path).unwrap();
        let mut state = locked.load().unwrap();
        state.administrator.set(Knob::Run, 0);
        state.written.set(Knob::Run, 1);
        state.holders.push(Holder::current(3, Wanted::default()).unwrap());
        locked.store(&state).unwrap();
        assert_eq!(locked.load().unwrap(), state);
        locked.store(&State { boot_id: "another".into(), ..state }).unwrap();
        assert!(locked.load().unwrap().holders.is_empty());
        fs::write(path.as_path(), "{\"holders\": 3").unwrap();
        assert!(matches!(locked.load(), Err(KsmError::Damaged { .. })));
    }

    /// Seen to fail: half of a file stayed behind in a full /run.
    #[test]
    fn a_file_that_cannot_be_replaced_leaves_nothing_beside_it() {
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("lease.json");
        // As a full disk would, a directory refuses, and later.
        fs::create_dir(&file).unwrap();
        assert!(replace(&file, b"{}").is_err());
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_reused_pid_is_a_dead_holder_but_one_of_another_namespace_is_not_judged_by_it() {
        let temp = tempfile::tempdir().unwrap();
        let path = StatePath::at(temp.path().join("lease.json"));
        let mut holder = Holder::current(0, Wanted::default()).unwrap();
        assert!(!holder.is_dead(&path));
        holder.process.start_time += 1;
        assert!(holder.is_dead(&path));
        holder.pid_namespace += 1;
        assert!(!holder.is_dead(&path));
    }

    /// Seen to fail: whoever held the settings in another namespace held them for ever.
    #[test]
    fn a_holder_of_another_namespace_lives_as_long_as_its_lock() {
        let temp = tempfile::tempdir().unwrap();
        let path = StatePath::at(temp.path().join("lease.json"));
        let mut holder = Holder::current(0, Wanted::default()).unwrap();
        holder.pid_namespace += 1;
        let locked = Locked::new(&path).unwrap();
        let life = holder.begin_life(&path, &locked).unwrap();
        assert!(!holder.is_dead(&path));
        locked.forget_the_dead(&State::default());
        assert!(!life.name.is_empty() && path.beside(&life.name).exists(), "whoever lives keeps his");
        drop(life);
        // A process that another test has just forked has a copy of the lock until it executes something.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while !holder.is_dead(&path) {
            assert!(std::time::Instant::now() < deadline, "it still counts as alive");
            std::thread::yield_now();
        }
        locked.forget_the_dead(&State { holders: vec![holder.clone()], ..State::default() });
        assert!(holder.is_dead(&path), "who is entered keeps his");
        locked.forget_the_dead(&State::default());
        assert!(!holder.is_dead(&path), "without the file nobody can tell");
    }
}
