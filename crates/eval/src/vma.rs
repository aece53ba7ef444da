//! What a mapping is for, and who would merge its pages.

use kernel::{Range, VmaUse};
use serde::{Deserialize, Serialize};
use store::mappings::is_segment;

/// What a mapping is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmaKind {
    /// What brk gave.
    Heap,
    /// The main thread's stack.
    Stack,
    /// Behind a guard, as threads' stacks lie.
    ThreadStack,
    /// Anonymous, with a name that the program gave it (PR_SET_VMA_ANON_NAME).
    NamedAnonymous,
    /// Anonymous and executable: code made at run time.
    Jit,
    /// Anonymous otherwise: mmap, large allocations, guest RAM.
    Anonymous,
    /// Copied pages of a mapped file's code.
    FileText,
    /// Copied pages of a mapped file's data.
    FileData,
    /// Copied pages of a mapped file that can only be read now, as after relocation.
    FileRodata,
    /// A page store's segment: shared through pagefold already; its copied pages have diverged.
    Store,
}

impl VmaKind {
    /// The word that reports use.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::Heap => "heap",
            Self::Stack => "stack",
            Self::ThreadStack => "thread stack",
            Self::NamedAnonymous => "named anonymous",
            Self::Jit => "JIT",
            Self::Anonymous => "anonymous",
            Self::FileText => "file text",
            Self::FileData => "file data",
            Self::FileRodata => "file read-only data",
            Self::Store => "page store",
        }
    }

    /// What `vma` is for, with the mapping in front of it.
    pub(crate) fn of(vma: &VmaUse, before: Option<&VmaUse>) -> Self {
        let map = &vma.vma;
        let name = map.name.as_encoded_bytes();
        if map.inode != 0 {
            return match () {
                () if is_segment(map) => Self::Store,
                () if map.exec => Self::FileText,
                () if map.write => Self::FileData,
                () => Self::FileRodata,
            };
        }
        match name {
            b"[heap]" => Self::Heap,
            b"[stack]" => Self::Stack,
            _ if map.exec => Self::Jit,
            _ if name.starts_with(b"[anon:") => Self::NamedAnonymous,
            _ if before.is_some_and(|before| is_guard(before, map.range)) => Self::ThreadStack,
            _ => Self::Anonymous,
        }
    }
}

/// A page or a few without access, right in front of a mapping: pthread_create puts it before a stack.
fn is_guard(before: &VmaUse, range: Range) -> bool {
    let map = &before.vma;
    let closed = !map.read && !map.write && !map.exec;
    closed && map.inode == 0 && map.range.end() == range.start() && map.range.pages().get() <= 16
}

/// All words of [`ksm_refuses`] and [`store::mappings::refuses`].
pub(crate) const REFUSALS: [&str; 13] = [
    "hugetlb",
    "shared",
    "droppable",
    "device",
    "special",
    "file",
    "stack",
    "protection",
    "locked",
    "wipe_on_fork",
    "sealed",
    "tagged",
    "protection_key",
];

/// Why the kernel's KSM leaves a mapping alone whatever is advised, or `None` where it would take its anonymous pages.
#[must_use]
pub fn ksm_refuses(vma: &VmaUse) -> Option<&'static str> {
    vma.flags.ksm_refuses().or(vma.vma.is_special().then_some("special"))
}
