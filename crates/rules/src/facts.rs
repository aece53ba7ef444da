//! What there is to know about a process before it is decided about: all of it from /proc, all of it here.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kernel::procfs::ProcError;
use kernel::{Bytes, Pid, age, membership, program, status};
use serde::Serialize;

use crate::belonging::{self, Container};
use crate::loader;
use crate::script::script;
use crate::users::Users;

/// What kind of thing a number under /proc is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A program.
    #[default]
    Program,
    /// A thread of the kernel.
    KernelThread,
    /// It has ended and waits for its parent.
    Zombie,
}

/// What is known about a process. Each figure is of its own instant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Its number.
    pub pid: i32,
    /// Its parent.
    pub parent: i32,
    /// Program or not.
    pub kind: Kind,
    /// The executable's path as the process sees it, without the kernel's ` (deleted)`; `None` if this user may not see
    /// it. A process cannot change it without executing another file.
    pub exe: Option<PathBuf>,
    /// What it runs if the executable is the dynamic loader, called by hand: every file that it has mapped for execution
    /// and that is no shared object. Mostly one.
    pub loaded: Vec<PathBuf>,
    /// It is pagefold: it runs the same file as the calling process, or one that is called `pagefold`.
    pub is_pagefold: bool,
    /// What an interpreter runs, as [`script`] finds it.
    pub script: Option<String>,
    /// The command name; the process can change it.
    pub comm: String,
    /// The words that it was started with; the process can change them.
    pub command_line: Vec<String>,
    /// Effective user.
    pub uid: u32,
    /// The user's name, if it has one here.
    pub user: Option<String>,
    /// The executable is setuid or setgid, or its user ids differ.
    pub setuid: bool,
    /// Its cgroups in all hierarchies, each path once; `/` if it is at the root of all.
    pub cgroups: Vec<String>,
    /// The containers it is in, outermost first.
    pub containers: Vec<Container>,
    /// The units of systemd it is in, outermost first.
    pub units: Vec<String>,
    /// Time since it was started.
    pub age: Duration,
    /// Resident memory.
    pub rss: Bytes,
    /// Anonymous part of it: what KSM can merge.
    pub anon: Bytes,
    /// It lives in another PID namespace than this /proc's.
    pub other_pid_namespace: bool,
}

impl Facts {
    /// The files that it runs: its executable, and what that has loaded in its place.
    pub(crate) fn programs(&self) -> impl Iterator<Item = &Path> {
        self.exe.iter().chain(&self.loaded).map(PathBuf::as_path)
    }
}

/// Gathers the facts about a process; `None` if there is none, or it ended meanwhile. What this user may not see is left
/// out. Cheap: small files, no page tables.
#[must_use]
pub fn facts(pid: Pid, users: &Users) -> Option<Facts> {
    gather(pid, users).ok()
}

fn gather(pid: Pid, users: &Users) -> Result<Facts, ProcError> {
    let status = status::read(pid)?;
    let mut facts = Facts {
        pid: pid.get(),
        parent: status.ppid,
        kind: match status.state {
            b'Z' | b'X' => Kind::Zombie,
            _ if status.vm_size == Bytes(0) => Kind::KernelThread,
            _ => Kind::Program,
        },
        comm: status.name.to_string_lossy().into_owned(),
        uid: status.uid.effective,
        user: users.name(status.uid.effective).map(ToOwned::to_owned),
        setuid: status.uid.real != status.uid.effective || status.uid.saved != status.uid.effective,
        age: age::age(pid)?,
        rss: status.vm_rss,
        anon: status.rss_anon,
        other_pid_namespace: status.namespaces_below > 0,
        ..Facts::default()
    };
    if facts.kind != Kind::Program {
        return Ok(facts);
    }
    match program::program(pid) {
        Ok(program) => {
            facts.setuid |= program.is_setuid;
            facts.is_pagefold = program.file.is_some() && program.file == own_file();
            let exe = without_deleted(&program.path);
            if loader::may_be_loader(pid, &exe) {
                facts.loaded = loader::loaded(pid, &exe)?;
            }
            facts.exe = Some(exe);
            let is_called_so = facts.programs().any(|exe| exe.file_name() == Some(OsStr::new("pagefold")));
            facts.is_pagefold |= is_called_so;
        }
        Err(error @ ProcError::Gone { .. }) => return Err(error),
        Err(_) => {}
    }
    facts.command_line = membership::command_line(pid)?;
    facts.cgroups = membership::cgroups(pid)?;
    if facts.cgroups.is_empty() {
        facts.cgroups.push("/".to_owned());
    }
    facts.script = facts.exe.as_deref().and_then(|exe| match facts.loaded.as_slice() {
        [] => script(exe, &facts.command_line),
        loaded => {
            let words = loader::words_behind(&facts.command_line);
            loaded.iter().find_map(|program| script(program, words))
        }
    });
    for cgroup in &facts.cgroups {
        for container in Container::all(cgroup) {
            if !facts.containers.contains(&container) {
                facts.containers.push(container);
            }
        }
        for unit in belonging::units(cgroup) {
            if !facts.units.contains(&unit) {
                facts.units.push(unit);
            }
        }
    }
    Ok(facts)
}

/// The file that this process runs.
fn own_file() -> Option<(u64, u64)> {
    static OWN: std::sync::OnceLock<Option<(u64, u64)>> = std::sync::OnceLock::new();
    *OWN.get_or_init(|| program::program(Pid::this()).ok().and_then(|program| program.file))
}

/// A program that was replaced by an update goes on under a name with ` (deleted)` behind it.
pub(crate) fn without_deleted(path: &Path) -> PathBuf {
    let bytes = path.as_os_str().as_bytes();
    PathBuf::from(OsStr::from_bytes(bytes.strip_suffix(b" (deleted)").unwrap_or(bytes)))
}
