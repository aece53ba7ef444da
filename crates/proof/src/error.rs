//! What can go wrong while a file is looked at.

use std::io;
use std::path::PathBuf;

/// Why the sites of an object could not be listed at all.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProofError {
    /// The file is no 64-bit little-endian ELF file, or its tables point outside it.
    #[error("malformed ELF file")]
    Elf(#[from] object::Error),
    /// The code is for another machine.
    #[error("ELF machine {machine} is not x86-64")]
    Machine {
        /// The file's `e_machine`.
        machine: u16,
    },
    /// The file has no section headers, so there is no telling code from constants in its executable segments.
    #[error("no executable sections")]
    NoCode,
    /// An object file, a core dump: nothing that a loader maps.
    #[error("neither a program nor a shared library")]
    NotLoadable,
    /// More than any real file has, so it is not read.
    #[error("{what} beyond all bounds")]
    TooBig {
        /// Of what there is too much.
        what: &'static str,
    },
    /// A table points outside the file.
    #[error("{what} lies outside the file")]
    Outside {
        /// What does.
        what: &'static str,
    },
    /// The file cannot be read.
    #[error("cannot read the file")]
    Read(#[source] io::Error),
    /// A segment or section that no address space has room for.
    #[error("{length} bytes cannot lie at {address:#x}")]
    Extent {
        /// Link-time address.
        address: u64,
        /// Length in bytes.
        length: u64,
    },
    /// A build-id longer than the 32 bytes that a table has room for.
    #[error("build-id of {length} bytes is longer than 32")]
    BuildId {
        /// Length of the build-id in bytes.
        length: usize,
    },
    /// A site beyond 4 GiB of the link-time base: no libc is that big.
    #[error("code at {vaddr:#x} lies beyond 4 GiB")]
    Address {
        /// Link-time address of the site.
        vaddr: u64,
    },
}

/// Why a command could not be resolved to the program that the kernel would run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProgramError {
    /// No directory of `PATH` has such a file, or the path does not exist; `env` exits 127.
    #[error("{} was not found", path.display())]
    NotFound {
        /// The command as given, or the interpreter that a script names.
        path: PathBuf,
    },
    /// The file exists and cannot be executed by this user; `env` exits 126.
    #[error("{} is not executable", path.display())]
    NotExecutable {
        /// The file.
        path: PathBuf,
    },
    /// The file cannot be read, so nothing is known about it.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// More interpreters of interpreters than the kernel follows (`exec_binprm` in fs/exec.c: five).
    #[error("{} has too many levels of interpreters", path.display())]
    TooManyInterpreters {
        /// The script that the chain started with.
        path: PathBuf,
    },
}
