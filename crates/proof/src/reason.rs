//! Why no gate can get into a program, told from its file before it starts.

use std::path::PathBuf;

use object::elf::{self, FileHeader32, FileHeader64};
use object::read::elf::{Dyn, FileHeader, ProgramHeader};
use object::{Endianness, FileKind};

use crate::headers::Headers;
use crate::verdict::LOADER;

/// Why pages of a program cannot be merged from inside. Every message names the way out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Reason {
    /// Neither ELF nor a script that names an interpreter.
    #[error("not an ELF program; try --backend ksm")]
    NotElf,
    /// The ELF file's tables cannot be read.
    #[error("malformed ELF program; try --backend ksm")]
    Malformed,
    /// A program for the i386 or the x32 ABI.
    #[error("a 32-bit program, and the agent is 64-bit; use --backend ksm")]
    ThirtyTwoBit,
    /// A program for another machine, run by an emulator.
    #[error("not an x86-64 program (ELF machine {machine}); use --backend ksm")]
    Machine {
        /// The file's `e_machine`.
        machine: u16,
    },
    /// No dynamic loader, so nothing preloads the agent.
    #[error("statically linked, so the agent cannot be loaded; use --backend ksm")]
    Static,
    /// Go programs enter the kernel from their own run-time.
    #[error("a Go program, whose run-time makes its own system calls; use --backend ksm")]
    Go,
    /// Linked against musl.
    #[error("linked against musl, and only glibc is understood; use --backend ksm")]
    Musl,
    /// Built with AddressSanitizer, with its run-time in a library.
    #[error("built with AddressSanitizer, whose library must be the first that is loaded; use --backend ksm")]
    AddressSanitizer,
    /// A dynamic loader that is not glibc's.
    #[error("unknown dynamic loader {}; use --backend ksm", loader.display())]
    Loader {
        /// The path in `PT_INTERP`.
        loader: PathBuf,
    },
    /// The file changes the user: the loader ignores the preload.
    #[error("set-user-ID program, for which the loader ignores the agent; run it as its owner or use --backend ksm")]
    SetUid,
    /// The file changes the group: the loader ignores the preload.
    #[error("set-group-ID program, for which the loader ignores the agent; use --backend ksm")]
    SetGid,
    /// The file raises capabilities: the loader ignores the preload.
    #[error(
        "program with file capabilities, for which the loader ignores the agent; run it as root or use --backend ksm"
    )]
    FileCapabilities,
}

/// Tells from the bytes of a program why the agent cannot work in it, or `None` when nothing speaks against it.
///
/// What follows from the file's owner, mode and attributes is not in its bytes: see
/// [`resolve_program`](crate::resolve_program), which also follows scripts.
#[must_use]
pub fn needs_no_agent(elf: &[u8]) -> Option<Reason> {
    if !elf.starts_with(&elf::ELFMAG) {
        return Some(Reason::NotElf);
    }
    match FileKind::parse(elf) {
        Ok(FileKind::Elf64) => judge(elf),
        Ok(FileKind::Elf32) => match FileHeader32::<Endianness>::parse(elf) {
            Ok(header) => match header.endian().map(|endian| header.e_machine(endian)) {
                Ok(elf::EM_386 | elf::EM_X86_64) => Some(Reason::ThirtyTwoBit),
                Ok(machine) => Some(Reason::Machine { machine }),
                Err(_) => Some(Reason::Malformed),
            },
            Err(_) => Some(Reason::Malformed),
        },
        _ => Some(Reason::Malformed),
    }
}

fn judge(data: &[u8]) -> Option<Reason> {
    match facts(data) {
        Err(_) => Some(Reason::Malformed),
        Ok(Facts { machine, .. }) if machine != elf::EM_X86_64 => Some(Reason::Machine { machine }),
        Ok(Facts { go: true, .. }) => Some(Reason::Go),
        // The loader run as a program (`ld.so --preload`, or with a program as argument) has no loader of its own.
        Ok(Facts { loader: None, is_loader, .. }) => (!is_loader).then_some(Reason::Static),
        Ok(Facts { loader: Some(loader), .. }) => {
            let name = loader.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            if name == LOADER {
                let headers = Headers::read(data).unwrap_or_default();
                is_sanitized(&headers.dynamic.needed).then_some(Reason::AddressSanitizer)
            } else if name.starts_with("ld-musl") {
                Some(Reason::Musl)
            } else {
                Some(Reason::Loader { loader })
            }
        }
    }
}

/// True for a program that needs AddressSanitizer's library (of gcc or of clang) first. It does not start unless that
/// library is the first one, and so no compiler names it later.
pub(crate) fn is_sanitized(needed: &[String]) -> bool {
    needed.first().is_some_and(|name| name.starts_with("libasan.so") || name.starts_with("libclang_rt.asan"))
}

struct Facts {
    machine: u16,
    go: bool,
    /// `PT_INTERP`.
    loader: Option<PathBuf>,
    /// The file is glibc's loader itself.
    is_loader: bool,
}

/// Owner of the notes that Go's linker writes.
const GO_NOTES: &[u8] = b"Go";

fn facts(data: &[u8]) -> Result<Facts, object::Error> {
    use std::os::unix::ffi::OsStrExt;

    let header = FileHeader64::<Endianness>::parse(data)?;
    let endian = header.endian()?;
    let mut facts = Facts { machine: header.e_machine(endian), go: false, loader: None, is_loader: false };
    for segment in header.program_headers(endian, data)? {
        if let Some(path) = segment.interpreter(endian, data)? {
            facts.loader = Some(PathBuf::from(std::ffi::OsStr::from_bytes(path)));
        }
        if let Some(mut notes) = segment.notes(endian, data)? {
            while let Ok(Some(note)) = notes.next() {
                facts.go |= note.name() == GO_NOTES;
            }
        }
    }
    // Section headers are not needed to run, so damaged ones say nothing.
    let Ok(sections) = header.sections(endian, data) else { return Ok(facts) };
    for section in sections.iter() {
        let name = sections.section_name(endian, section).unwrap_or_default();
        facts.go |= name == b".go.buildinfo" || name == b".note.go.buildid" || name == b".gopclntab";
    }
    if let Ok(Some((entries, link))) = sections.dynamic(endian, data)
        && let Ok(strings) = sections.strings(endian, data, link)
    {
        facts.is_loader = entries.iter().any(|entry| {
            entry.tag32(endian) == Some(elf::DT_SONAME)
                && entry.string(endian, strings).is_ok_and(|name| name == LOADER.as_bytes())
        });
    }
    Ok(facts)
}
