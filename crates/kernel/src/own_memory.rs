//! Memory of this process that nothing else uses: to try things on, and to share with the kernel.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::mm::{MapFlags, ProtFlags};
use rustix::pipe::{IoSliceRaw, PipeFlags, SpliceFlags, pipe_with, vmsplice};

use crate::sys;
use crate::units::{PageCount, Vaddr, page_size};

/// A mapping of our own, unmapped when it goes.
#[derive(Debug)]
pub(crate) struct OwnMapping {
    pointer: *mut u8,
    length: usize,
}

// SAFETY: the mapping belongs to the value alone.
unsafe impl Send for OwnMapping {}

impl OwnMapping {
    pub(crate) fn anonymous(pages: PageCount) -> io::Result<Self> {
        let length = pages.bytes().0 as usize;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the address, so no existing memory is touched.
        let pointer = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), length, prot, MapFlags::PRIVATE) }?;
        let mapping = Self { pointer: pointer.cast(), length };
        // A large folio counts in its first page, which would be of no use to the self-test. Where the kernel has no
        // huge pages the advice is refused, and not needed.
        // SAFETY: the range is our own mapping.
        let _ = unsafe { rustix::mm::madvise(pointer, length, rustix::mm::Advice::LinuxNoHugepage) };
        // A child of a fork at this moment would hold each page too, and the counts of the self-tests would be wrong.
        // SAFETY: the range is our own mapping.
        let _ = unsafe { rustix::mm::madvise(pointer, length, rustix::mm::Advice::LinuxDontFork) };
        Ok(mapping)
    }

    pub(crate) fn shared(file: &OwnedFd, length: usize) -> io::Result<Self> {
        let length = length.next_multiple_of(page_size() as usize);
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: the kernel chooses the address, so no existing memory is touched.
        let pointer = unsafe { rustix::mm::mmap(std::ptr::null_mut(), length, prot, flags, file.as_fd(), 0) }?;
        Ok(Self { pointer: pointer.cast(), length })
    }

    pub(crate) fn pointer(&self) -> *mut u8 {
        self.pointer
    }

    pub(crate) fn start(&self) -> Vaddr {
        Vaddr(self.pointer.expose_provenance() as u64)
    }

    /// madvise of all of it.
    pub(crate) fn advise(&self, advice: i32) -> io::Result<()> {
        // SAFETY: the range is our own mapping, whose content nobody relies on.
        sys::check(unsafe { libc::madvise(self.pointer.cast(), self.length, advice) }.into()).map(|_| ())
    }

    /// Writes the first byte of every page, so that all are there.
    pub(crate) fn touch(&self, value: u8) {
        for offset in (0..self.length).step_by(page_size() as usize) {
            // SAFETY: the offset lies in our own mapping, into which nobody holds references.
            unsafe { self.pointer.add(offset).write_volatile(value) };
        }
    }

    /// Writes the first byte of one page.
    pub(crate) fn touch_page(&self, index: usize, value: u8) {
        let offset = index * page_size() as usize;
        assert!(offset < self.length);
        // SAFETY: the offset lies in our own mapping, into which nobody holds references.
        unsafe { self.pointer.add(offset).write_volatile(value) };
    }

    /// Lets a pipe hold a reference to a page, as long as what is returned lives.
    pub(crate) fn hold(&self, index: usize) -> io::Result<(OwnedFd, OwnedFd)> {
        let pipe = pipe_with(PipeFlags::CLOEXEC)?;
        let slice = [IoSliceRaw::from_slice(self.page(index))];
        // SAFETY: the page is our own mapping's, and nobody reads the pipe.
        unsafe { vmsplice(&pipe.1, &slice, SpliceFlags::empty()) }?;
        Ok(pipe)
    }

    pub(crate) fn page(&self, index: usize) -> &[u8] {
        let size = page_size() as usize;
        assert!((index + 1) * size <= self.length);
        // SAFETY: the page lies in our own mapping and is not written while the slice is alive.
        unsafe { std::slice::from_raw_parts(self.pointer.add(index * size), size) }
    }
}

impl Drop for OwnMapping {
    fn drop(&mut self) {
        // SAFETY: this is our own mapping, and no reference into it outlives `self`.
        let unmapped = unsafe { rustix::mm::munmap(self.pointer.cast(), self.length) };
        debug_assert!(unmapped.is_ok(), "a mapping of our own can be unmapped");
    }
}
