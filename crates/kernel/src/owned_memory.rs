//! Memory of this process whose owner hands it over for merging, seen as words that any thread may change.
//!
//! All calls go through libc's functions, as those of a program that knows nothing of pagefold do: the gate of a member
//! sees them.

use std::fmt;
use std::io;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use crate::sys;
use crate::units::{PageCount, Range, Vaddr};

/// Private anonymous memory, zero at first and unmapped when it goes.
pub struct OwnedMemory {
    pointer: NonNull<AtomicU64>,
    length: usize,
}

// SAFETY: the mapping belongs to the value, and its content is reached by shared references to atomics only.
unsafe impl Send for OwnedMemory {}
// SAFETY: as above; atomics are Sync.
unsafe impl Sync for OwnedMemory {}

impl OwnedMemory {
    /// Maps new memory, at least one page.
    ///
    /// # Errors
    /// What mmap(2) says.
    pub fn anonymous(pages: PageCount) -> io::Result<Self> {
        let length = usize::try_from(pages.bytes().get()).map_err(|_too_long| io::ErrorKind::OutOfMemory)?;
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: the kernel chooses the address, so no existing memory is touched.
        let pointer = unsafe { libc::mmap(std::ptr::null_mut(), length, prot, flags, -1, 0) };
        if pointer == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let pointer = NonNull::new(pointer.cast()).expect("a mapping is never at address 0");
        Ok(Self { pointer, length })
    }

    /// Where it lies.
    #[must_use]
    pub fn range(&self) -> Range {
        let start = self.pointer.as_ptr().expose_provenance() as u64;
        Range::new(Vaddr(start), Vaddr(start + self.length as u64)).expect("a mapping ascends and is page-aligned")
    }

    /// Its content, 64 bits at a time.
    #[must_use]
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is readable and writable, as long as this, lives as long as `self`, and any bits are a
        // valid word. Threads reach it through these atomics only.
        unsafe { std::slice::from_raw_parts(self.pointer.as_ptr(), self.length / size_of::<AtomicU64>()) }
    }

    /// Keeps huge pages out of it (MADV_NOHUGEPAGE).
    ///
    /// # Errors
    /// What madvise(2) says; EINVAL from a kernel that has no huge pages.
    pub fn small_pages(&self) -> io::Result<()> {
        self.advise(libc::MADV_NOHUGEPAGE)
    }

    /// Asks for huge pages (MADV_HUGEPAGE).
    ///
    /// # Errors
    /// What madvise(2) says; EINVAL from a kernel that has no huge pages.
    pub fn huge_pages(&self) -> io::Result<()> {
        self.advise(libc::MADV_HUGEPAGE)
    }

    /// Hands it over for merging (MADV_MERGEABLE): to the partition in a member, to the kernel's KSM elsewhere.
    ///
    /// # Errors
    /// What madvise(2) says; EINVAL from a kernel without KSM.
    pub fn hand_over(&self) -> io::Result<()> {
        self.advise(libc::MADV_MERGEABLE)
    }

    /// Takes it back (MADV_UNMERGEABLE): every page has its own copy again.
    ///
    /// # Errors
    /// What madvise(2) says.
    pub fn take_back(&self) -> io::Result<()> {
        self.advise(libc::MADV_UNMERGEABLE)
    }

    /// Keeps it in memory (mlock).
    ///
    /// # Errors
    /// What mlock(2) says: ENOMEM above RLIMIT_MEMLOCK.
    pub fn lock(&self) -> io::Result<()> {
        // SAFETY: the range is our own mapping, and no content changes.
        sys::check(unsafe { libc::mlock(self.pointer.as_ptr().cast(), self.length) }.into()).map(|_| ())
    }

    fn advise(&self, advice: i32) -> io::Result<()> {
        // SAFETY: the range is our own mapping, and the advices above change no content.
        sys::check(unsafe { libc::madvise(self.pointer.as_ptr().cast(), self.length, advice) }.into()).map(|_| ())
    }
}

impl fmt::Debug for OwnedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OwnedMemory({})", self.range())
    }
}

impl Drop for OwnedMemory {
    fn drop(&mut self) {
        // SAFETY: this is our own mapping, and no reference into it outlives `self`.
        let unmapped = unsafe { libc::munmap(self.pointer.as_ptr().cast(), self.length) };
        debug_assert_eq!(unmapped, 0, "a mapping of our own can be unmapped");
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::sync::atomic::Ordering::Relaxed;

    use super::*;
    use crate::maps;
    use crate::units::Pid;

    #[test]
    fn memory_is_zero_keeps_what_is_written_and_goes() {
        let memory = OwnedMemory::anonymous(PageCount(3)).unwrap();
        memory.small_pages().unwrap();
        let range = memory.range();
        assert_eq!(range.pages(), PageCount(3));
        let words = memory.words();
        assert_eq!(words.len() as u64 * 8, range.len().get());
        assert!(words.iter().all(|word| word.load(Relaxed) == 0));
        words.iter().zip(1..).for_each(|(word, value)| word.store(value, Relaxed));
        assert!(words.iter().zip(1..).all(|(word, value)| word.load(Relaxed) == value));
        let there = |range: Range| {
            maps::read(Pid::this()).unwrap().iter().any(|vma| vma.range.contains(range.start()) && vma.write)
        };
        assert!(there(range));
        drop(memory);
        // Another thread may have got the place meanwhile, but not as anonymous memory of exactly this kind: only
        // what was seen before is asserted.
        assert!(OwnedMemory::anonymous(PageCount(1)).is_ok());
    }

    #[test]
    fn memory_can_be_handed_over_and_taken_back() {
        let memory = OwnedMemory::anonymous(PageCount(2)).unwrap();
        memory.words()[0].store(7, Relaxed);
        if let Err(error) = memory.hand_over() {
            println!("skipped: KSM ({error})");
            return;
        }
        memory.take_back().unwrap();
        assert_eq!(memory.words()[0].load(Relaxed), 7);
    }
}
