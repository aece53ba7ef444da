//! From a command to the ELF file that the kernel will run.

use std::env;
use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};

use crate::error::ProgramError;
use crate::reason::{Reason, needs_no_agent};

/// How deep the kernel follows interpreters that are scripts themselves (`exec_binprm` in fs/exec.c).
const DEPTH: usize = 5;
/// Bytes of a script that the kernel looks at (`BINPRM_BUF_SIZE`).
const LINE: usize = 256;
/// What `execvp` runs a text without `#!` with.
const SHELL: &str = "/bin/sh";
/// Where programs are looked for when there is no `PATH` (`_CS_PATH` of glibc).
const DEFAULT_PATH: &str = "/bin:/usr/bin";

/// Can the agent work in a program?
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Class {
    /// Dynamically linked against glibc for x86-64, and the loader honours the preload.
    Gated,
    /// It cannot, and this is why. The program runs all the same, unmerged.
    NoAgent(Reason),
}

/// What the kernel will run for a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// The script first, then every interpreter but the last: empty for an ELF program.
    pub interpreter_chain: Vec<PathBuf>,
    /// The file whose code will run: the program, or the last interpreter.
    pub elf_path: PathBuf,
    /// Can the agent work in it?
    pub class: Class,
}

/// Finds what the kernel would run for a command, as `execvp` finds it: a name without a slash along `PATH`, `#!` lines
/// followed, and text without one given to the shell.
///
/// The class is what the file says now, for the calling user. `env` and its like exec once more, which is seen only then.
///
/// # Errors
///
/// When there is no such file, it cannot be executed or read, or interpreters nest too deep.
pub fn resolve_program(path: &Path) -> Result<Program, ProgramError> {
    let mut current = search(path)?;
    let mut interpreter_chain = Vec::new();
    loop {
        let read = |source| ProgramError::Read { path: current.clone(), source };
        let mut head = Vec::with_capacity(LINE);
        let mut file = File::open(&current).map_err(read)?;
        file.by_ref().take(LINE as u64).read_to_end(&mut head).map_err(read)?;
        let next = match head.strip_prefix(b"#!") {
            Some(line) => interpreter(line),
            None if !head.starts_with(b"\x7fELF") && !head.contains(&0) => Some(PathBuf::from(SHELL)),
            None => None,
        };
        let Some(next) = next else {
            let mut image = head;
            file.read_to_end(&mut image).map_err(read)?;
            let class = match needs_no_agent(&image).map_or_else(|| secure(&file), |reason| Ok(Some(reason))) {
                Ok(None) => Class::Gated,
                Ok(Some(reason)) => Class::NoAgent(reason),
                Err(source) => return Err(read(source)),
            };
            return Ok(Program { interpreter_chain, elf_path: current, class });
        };
        interpreter_chain.push(current);
        if interpreter_chain.len() > DEPTH {
            return Err(ProgramError::TooManyInterpreters { path: path.to_owned() });
        }
        // The kernel takes the interpreter's name as a path, whatever it looks like.
        current = executable(next)?;
    }
}

/// The path behind `#!`, without its argument.
fn interpreter(line: &[u8]) -> Option<PathBuf> {
    let line = line.split(|byte| *byte == b'\n').next()?;
    let name = line.split(|byte| matches!(byte, b' ' | b'\t' | 0)).find(|word| !word.is_empty())?;
    Some(PathBuf::from(std::ffi::OsString::from_vec(name.to_vec())))
}

/// Why the loader would ignore the agent although the file is right: it runs with more rights than the caller has
/// (`AT_SECURE`, set by cap_bprm_creds_from_file in security/commoncap.c).
fn secure(file: &File) -> std::io::Result<Option<Reason>> {
    const SET_UID: u32 = 0o4000;
    const SET_GID: u32 = 0o2010;

    let metadata = file.metadata()?;
    let mode = metadata.mode();
    if mode & SET_UID != 0 && metadata.uid() != rustix::process::getuid().as_raw() {
        return Ok(Some(Reason::SetUid));
    }
    // Set-group-ID without the group's execute bit is the mark of mandatory locking.
    if mode & SET_GID == SET_GID && metadata.gid() != rustix::process::getgid().as_raw() {
        return Ok(Some(Reason::SetGid));
    }
    // Root gains nothing by them.
    if !rustix::process::getuid().is_root() && has_capabilities(file)? {
        return Ok(Some(Reason::FileCapabilities));
    }
    Ok(None)
}

/// Does the file carry a `security.capability` attribute?
fn has_capabilities(file: &File) -> std::io::Result<bool> {
    let mut value = [0_u8; 64];
    match rustix::fs::fgetxattr(file, "security.capability", &mut value) {
        Ok(_) => Ok(true),
        Err(rustix::io::Errno::NODATA | rustix::io::Errno::OPNOTSUPP) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

fn search(command: &Path) -> Result<PathBuf, ProgramError> {
    if command.as_os_str().as_bytes().contains(&b'/') {
        return executable(command.to_owned());
    }
    let directories = env::var_os("PATH").unwrap_or_else(|| DEFAULT_PATH.into());
    let mut denied = None;
    for directory in env::split_paths(&directories).filter(|_| !command.as_os_str().is_empty()) {
        // An empty element is the current directory; joining keeps the result free of a PATH search.
        let directory = if directory.as_os_str().is_empty() { PathBuf::from(".") } else { directory };
        match executable(directory.join(command)) {
            Ok(found) => return Ok(found),
            Err(error @ ProgramError::NotExecutable { .. }) => denied = Some(error),
            Err(_) => {}
        }
    }
    Err(denied.unwrap_or_else(|| ProgramError::NotFound { path: command.to_owned() }))
}

fn executable(path: PathBuf) -> Result<PathBuf, ProgramError> {
    match fs::metadata(&path) {
        Err(_) => Err(ProgramError::NotFound { path }),
        Ok(metadata) if !metadata.is_file() || access(&path, Access::EXEC_OK).is_err() => {
            Err(ProgramError::NotExecutable { path })
        }
        Ok(_) => Ok(path),
    }
}
