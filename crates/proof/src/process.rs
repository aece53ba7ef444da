//! All that a running process can execute.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use kernel::maps::{self, Vma};
use kernel::procfs::ProcError;
use kernel::{Pagemap, Pid, ScanRequest};
use object::elf;

use crate::judge::Verdict;
use crate::object::Facts;
use crate::report::{Object, Progress, Prover, Report, check_libcs, name_of};
use crate::table::FILE_NAME;

/// How often a process is looked at whose mappings change meanwhile.
const LOOKS: usize = 3;

/// Bytes of the code that sites of libc or the loader are led to: the largest piece of it.
const TRAMPOLINES: u64 = 64 << 10;

/// Which executable mappings belong to one file.
type Files = BTreeMap<(u32, u32, u64), Vec<Vma>>;

impl Prover<'_> {
    /// Judges every executable mapping of a process. A thread of the kernel, or a process that has ended, has none, and a
    /// report without objects.
    ///
    /// # Errors
    /// If the process has ended or its mappings may not be read. A file that cannot be read is part of the report.
    pub fn judge_process(&mut self, pid: Pid) -> Result<Report, ProcError> {
        let mut look = 1;
        loop {
            let before = executable(pid)?;
            if before.is_empty() {
                return Ok(self.report(Vec::new()));
            }
            let decoded = self.decoded;
            let mut objects = self.all(pid, &before);
            // A library that was opened meanwhile, or an exec: the answer would be about another program. Where nothing
            // had to be decoded hardly any time has passed.
            if self.decoded == decoded || executable(pid)? == before {
                return Ok(self.report(objects));
            }
            if look == LOOKS {
                objects.push(Object::other("[mappings]", Verdict::Unknown, "change faster than they can be looked at"));
                return Ok(self.report(objects));
            }
            look += 1;
        }
    }

    fn all(&mut self, pid: Pid, mappings: &[Vma]) -> Vec<Object> {
        let exe = std::fs::read_link(format!("/proc/{pid}/exe")).map(|path| without_mark(path.into_os_string()).0);
        let program = exe.as_deref().map(name_of).unwrap_or_default();
        let (mut files, mut memory, mut objects) = (Files::new(), Vec::new(), Vec::new());
        for vma in mappings {
            if vma.is_special() {
                objects.push(Object::other(
                    &vma.name,
                    Verdict::Benign,
                    "the kernel's own page: it asks for the time and the processor",
                ));
            } else if vma.inode == 0 {
                memory.push(vma.clone());
            } else {
                files.entry((vma.dev_major, vma.dev_minor, vma.inode)).or_default().push(vma.clone());
            }
        }
        let (mut all, mut own) = (Vec::new(), None);
        let pagemap = Pagemap::open(pid).ok();
        let count = files.len();
        for (done, mappings) in files.into_values().enumerate() {
            let Some(first) = mappings.first() else { continue };
            let (name, _) = without_mark(first.name.clone());
            (self.progress)(Progress { done, all: count, path: &name });
            let file = match open(pid, first) {
                Ok(file) => file,
                // It has no path by which it could be opened, and nobody but a compiler runs one.
                Err(_) if name.as_os_str().as_bytes().starts_with(b"/memfd:") => {
                    memory.extend(mappings);
                    continue;
                }
                Err(why) => {
                    objects.push(Object::other(name, Verdict::Unknown, why));
                    continue;
                }
            };
            let (mut object, facts) = self.object(&file, name, &program);
            let mut magic = [0; 4];
            if !facts.is_image && (file.read_exact_at(&mut magic, 0).is_err() || magic != elf::ELFMAG) {
                // A file that a compiler writes to and runs (a memfd, mapped twice) is memory like any other.
                memory.extend(mappings);
                continue;
            }
            for vma in mappings.iter().filter(|_| facts.is_image) {
                worsen(&mut object, vma, &facts);
            }
            // What the gate itself writes into libc and the loader is no surprise.
            if facts.gate.is_none() {
                worsen_by_changes(&mut object, pagemap.as_ref(), &mappings);
            } else if is_loaded_twice(&mappings) {
                let reason = "is loaded twice (dlmopen), and the gate is in one of them";
                objects.push(Object::other(&object.path, Verdict::Unknown, reason));
            }
            if self.lists.is_own(&facts, &name_of(&object.path)) {
                own = Some(PathBuf::from(&object.path));
            }
            objects.push(object);
            all.push(facts);
        }
        check_libcs(&all, &mut objects);
        // The agent's patched sites lead to small pieces of code within reach of them, which nobody can write to; the
        // pages that they are in are copies, or those of a file beside the agent's. All of this is what the process says of
        // itself, as a gate is: the name of a file that it chose is no more evidence than its copies are.
        let beside = own.as_deref().map(|agent| agent.with_file_name(FILE_NAME));
        memory.retain(|vma| {
            let is_own = match self.own_code {
                Some(pieces) => pieces.iter().any(|piece| piece.intersect(&vma.range) == Some(vma.range)),
                None => vma.range.len().0 <= TRAMPOLINES,
            };
            let of_other_file = vma.inode != 0 && beside.as_deref() != Some(without_mark(vma.name.clone()).0.as_ref());
            beside.is_none() || !is_own || vma.write || of_other_file
        });
        if !memory.is_empty() {
            objects.push(compiled(&memory, &objects, exe.ok().as_deref()));
        }
        objects
    }
}

/// The executable mappings of a process, by address.
fn executable(pid: Pid) -> Result<Vec<Vma>, ProcError> {
    let mut mappings = maps::read(pid)?;
    mappings.retain(|vma| vma.exec);
    Ok(mappings)
}

/// Says what the way in which a file is mapped adds to its verdict.
fn worsen(object: &mut Object, vma: &Vma, facts: &Facts) {
    let mut add = |reason: String| {
        object.judgement.verdict = object.judgement.verdict.max(Verdict::Unknown);
        object.judgement.reasons.insert(0, reason);
    };
    if vma.write {
        add(format!("may be written to and executed at {:#x}", vma.range.start().0));
    }
    let length = vma.range.len().0;
    let holds = |(begin, end): &(u64, u64)| *begin <= vma.offset && vma.offset.saturating_add(length) <= *end;
    if !facts.mapped.iter().any(holds) {
        add(format!("what it does not call code is executable at {:#x}", vma.range.start().0));
    }
}

/// Is one part of a file mapped at two places?
fn is_loaded_twice(mappings: &[Vma]) -> bool {
    let mut offsets: Vec<u64> = mappings.iter().map(|vma| vma.offset).collect();
    offsets.sort_unstable();
    offsets.windows(2).any(|pair| matches!(pair, [one, other] if one == other))
}

/// Code whose pages are the process's own copies is not what its file says: a debugger, a profiler or the program itself
/// has written to it. Kernels before 6.7 do not tell.
fn worsen_by_changes(object: &mut Object, pagemap: Option<&Pagemap>, mappings: &[Vma]) {
    let Some(pagemap) = pagemap else { return };
    let mut regions = Vec::new();
    for vma in mappings.iter().filter(|vma| !vma.shared) {
        if pagemap.scan_all(vma.range, &ScanRequest::own_pages(), &mut regions).is_err() {
            return;
        }
    }
    if let Some(first) = regions.first() {
        object.judgement.verdict = object.judgement.verdict.max(Verdict::Unknown);
        let at = first.range.start().0;
        object.judgement.reasons.insert(0, format!("its code was changed in memory, the first page at {at:#x}"));
    }
}

/// The verdict on memory that is executable and has no image behind it.
fn compiled(memory: &[Vma], objects: &[Object], exe: Option<&Path>) -> Object {
    let bytes: u64 = memory.iter().map(|vma| vma.range.len().0).sum();
    let first = memory.first().map_or(0, |vma| vma.range.start().0);
    let what = match memory.len() {
        1 => format!("{} KiB of executable memory at {first:#x}", bytes >> 10),
        many => format!("{} KiB of executable memory in {many} mappings, the first at {first:#x}", bytes >> 10),
    };
    // Memory does not tell who made it, so all that may have must be trusted.
    let engines = || objects.iter().filter_map(|object| object.engine.as_ref().map(|engine| (object, engine)));
    let unknown = engines().find(|(_, engine)| engine.why.is_none());
    let reason = match (unknown, engines().next()) {
        (None, Some(_)) => {
            let mut names: Vec<&str> = engines().map(|(_, engine)| engine.name.as_str()).collect();
            names.dedup();
            let names = names.join(" or ");
            return Object::other("[compiled code]", Verdict::Known, format!("{what}, taken for that of {names}"));
        }
        (Some((_, engine)), _) => format!("{what}, and this build of {} is on no list", engine.name),
        (None, None) => format!("{what}, and no engine that is trusted"),
    };
    let mut object = Object::other("[compiled code]", Verdict::Unknown, reason);
    let program = || objects.iter().find(|object| Some(object.path.as_path()) == exe);
    object.judgement.trust_line = unknown.map(|(object, _)| object).or_else(program).and_then(Object::engine_line);
    object
}

/// Opens the very file that is mapped, or says why it cannot be.
fn open(pid: Pid, vma: &Vma) -> Result<File, String> {
    let (start, end) = (vma.range.start().0, vma.range.end().0);
    // The kernel's own link to it, which also leads to files that were deleted or lie in another mount namespace.
    let by_kernel = File::open(format!("/proc/{pid}/map_files/{start:x}-{end:x}"));
    if let Ok(file) = by_kernel {
        return Ok(file);
    }
    let (name, deleted) = without_mark(vma.name.clone());
    if deleted {
        return Err("was deleted or replaced; only root can look at what is mapped".to_owned());
    }
    let mut path = OsString::from(format!("/proc/{pid}/root"));
    path.push(&name);
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::CLOEXEC;
    let file = rustix::fs::open(path.as_os_str(), flags, rustix::fs::Mode::empty());
    let file = File::from(file.map_err(|errno| format!("cannot be read: {errno}"))?);
    let about = file.metadata().map_err(|error| format!("cannot be read: {error}"))?;
    let device = (rustix::fs::major(about.dev()), rustix::fs::minor(about.dev()));
    if about.ino() != vma.inode || device != (vma.dev_major, vma.dev_minor) {
        return Err("the file at its path is not the one that is mapped, as far as its file system tells; root can look at the latter".to_owned());
    }
    Ok(file)
}

/// A name in `maps` without what the kernel puts behind those of deleted files, and in place of newlines.
fn without_mark(name: OsString) -> (PathBuf, bool) {
    let bytes = name.as_bytes();
    let (bytes, deleted) = match bytes.strip_suffix(b" (deleted)") {
        Some(bytes) => (bytes, true),
        None => (bytes, false),
    };
    let mut plain = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some((first, after)) = rest.split_first() {
        match rest.strip_prefix(b"\\012") {
            Some(after) => {
                plain.push(b'\n');
                rest = after;
            }
            None => {
                plain.push(*first);
                rest = after;
            }
        }
    }
    (PathBuf::from(OsString::from_vec(plain)), deleted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_of_the_kernel_are_taken_off_names() {
        assert_eq!(without_mark("/a b (deleted)".into()), (PathBuf::from("/a b"), true));
        assert_eq!(without_mark("/a\\012b".into()), (PathBuf::from("/a\nb"), false));
    }
}
