//! Which processes of the host have mergeable memory.

use std::path::PathBuf;
use std::time::Duration;

use kernel::ksm_sysfs::ksm_stat;
use kernel::{Bytes, KsmStat, Pid, ProcError, Vaddr, Vma, maps, procfs, status};

/// A process that has mergeable memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Marked {
    /// The process.
    pub pid: Pid,
    /// How long it has been there.
    pub age: Duration,
    /// Its anonymous memory: what can be merged is at most that.
    pub anonymous: Bytes,
    /// What it runs and where that lies.
    pub layout: Option<ProgramLayout>,
}

/// A program, and the places that differ from process to process where addresses are drawn at random.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct ProgramLayout {
    /// The program's file.
    pub program: PathBuf,
    /// Where the program itself begins.
    pub program_start: Vaddr,
    /// Where the last of its libraries begins, 0 for a program without any.
    pub library_start: Vaddr,
}

impl ProgramLayout {
    /// That of a process with these mappings.
    #[must_use]
    pub fn of(program: PathBuf, vmas: impl IntoIterator<Item = Vma>) -> Self {
        let mut layout = Self { program, ..Self::default() };
        for vma in vmas.into_iter().filter(|vma| vma.inode != 0) {
            if vma.name == layout.program.as_os_str() {
                if layout.program_start == Vaddr(0) {
                    layout.program_start = vma.range.start();
                }
            } else if vma.exec {
                layout.library_start = vma.range.start();
            }
        }
        layout
    }

    /// That of a process, `None` if it cannot be looked at.
    #[must_use]
    pub fn read(pid: Pid) -> Option<Self> {
        let program = kernel::program::program(pid).ok()?.path;
        Some(Self::of(program, maps::read(pid).ok()?))
    }
}

/// What a look at all processes found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fleet {
    /// Those with mergeable memory, but for the caller.
    pub marked: Vec<Marked>,
    /// Those that could not be looked at.
    pub refused: u64,
    /// False if it cannot be told: no ksm_stat here, or the /proc of another PID namespace.
    pub told: bool,
    /// False where ksm_stat does not say yes or no (before Linux 6.16): those that ksmd has not come to are missing.
    pub complete: bool,
}

impl Fleet {
    /// Looks at all processes. Those that end meanwhile are left out.
    #[must_use]
    pub fn observe() -> Self {
        let own = procfs::shows_this_process().unwrap_or(false).then(|| ksm_stat(Pid::this()));
        let Some(Ok(own)) = own else { return Self::default() };
        let mut fleet = Self { told: true, complete: own.ksm_mergeable.is_some(), ..Self::default() };
        for pid in status::processes().unwrap_or_default() {
            match ksm_stat(pid) {
                Ok(stat) if is_marked(&stat) && pid != Pid::this() => fleet.marked.extend(look(pid)),
                Err(ProcError::Denied { .. }) => fleet.refused += 1,
                _ => {}
            }
        }
        fleet
    }

    /// Anonymous memory of all of them.
    #[must_use]
    pub fn anonymous(&self) -> Bytes {
        self.marked.iter().map(|marked| marked.anonymous).sum()
    }
}

/// True if a process has mergeable memory, or had it when ksmd last passed.
pub(super) fn is_marked(stat: &KsmStat) -> bool {
    let word = stat.ksm_merge_any == Some(true) || stat.ksm_mergeable == Some(true);
    word || stat.ksm_mergeable.is_none() && stat.ksm_rmap_items.is_some_and(|items| items > 0)
}

fn look(pid: Pid) -> Option<Marked> {
    let age = kernel::age::age(pid).ok()?;
    Some(Marked { pid, age, anonymous: status::read(pid).ok()?.rss_anon, layout: ProgramLayout::read(pid) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use kernel::Range;

    fn file(start: u64, name: &str, exec: bool) -> Vma {
        let range = Range::covering(Vaddr(start), Vaddr(start + 4096)).unwrap_or_default();
        Vma { range, exec, inode: 7, name: name.into(), ..Vma::default() }
    }

    #[test]
    fn a_layout_is_where_program_and_libraries_begin() {
        let vmas = [file(0x1000, "/p", false), file(0x2000, "/p", true), file(0x8000, "/l", true)];
        let layout = ProgramLayout::of("/p".into(), vmas);
        assert_eq!((layout.program_start, layout.library_start), (Vaddr(0x1000), Vaddr(0x8000)));
        assert_ne!(layout, ProgramLayout::of("/p".into(), [file(0x1000, "/p", false), file(0x9000, "/l", true)]));
    }

    #[test]
    fn marks_are_the_kernels_word_where_it_has_one() {
        let stat = |any, some, items| KsmStat {
            ksm_merge_any: any,
            ksm_mergeable: some,
            ksm_rmap_items: Some(items),
            ..KsmStat::default()
        };
        assert!(is_marked(&stat(Some(true), Some(false), 0)) && is_marked(&stat(Some(false), Some(true), 0)));
        assert!(!is_marked(&stat(Some(false), Some(false), 9)), "records of what was marked once");
        assert!(is_marked(&stat(None, None, 9)) && !is_marked(&stat(None, None, 0)));
    }
}
