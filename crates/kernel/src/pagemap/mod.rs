//! /proc/PID/pagemap: which pages are there, and which were written since they were last protected.
//!
//! Two interfaces of one file. Reading gives one word for each page ([`PagemapEntry`]). The ioctl PAGEMAP_SCAN
//! (Linux 6.7) walks page tables in the kernel and returns only matching runs; with a userfaultfd registered for
//! asynchronous write protection it also protects what it reports, in one atomic step, and that works on the memory
//! of another process (fs/proc/task_mmu.c, `do_pagemap_scan`).
//!
//! A scan holds the target's mmap lock for reading, so long walks are cut into windows of [`SCAN_WINDOW`].

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use bitflags::bitflags;
use thiserror::Error;

use crate::sys;
use crate::uapi::{PAGE_REGION_SIZE, PAGEMAP_SCAN, PM_SCAN_CHECK_WPASYNC, PM_SCAN_WP_MATCHING, PmScanArg};
use crate::units::{Bytes, PageCount, Pid, Range, Vaddr, page_size};

mod words;

/// The most that [`Pagemap::scan_all`] walks in one call. Protecting a window takes about half a millisecond, and that
/// is how long the target's own mapping calls may have to wait.
pub const SCAN_WINDOW: Bytes = Bytes::from_mib(32);

/// Regions that one call may report. The kernel collects so many before it hands them out (PM_SCAN's buffer in
/// fs/proc/task_mmu.c). With room for more it goes on, but `walk_end` stays where the first hand-out was (seen on 6.18):
/// whoever goes on from there gets the same regions again.
const REGIONS_AT_ONCE: usize = 512;

bitflags! {
    /// What PAGEMAP_SCAN says about a page.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    #[repr(transparent)]
    pub struct Category: u64 {
        /// The mapping is registered for asynchronous write protection.
        const WPALLOWED = 1;
        /// Not write-protected: written since the last protection, or never protected. In a mapping that is not
        /// registered every present page counts as written, so ask for WPALLOWED too.
        const WRITTEN = 2;
        /// Backed by a file or shared memory.
        const FILE = 4;
        /// There is a page.
        const PRESENT = 8;
        /// Swapped out; markers of write protection on pages that are not there look like this as well.
        const SWAPPED = 16;
        /// The zero page.
        const PFNZERO = 32;
        /// Mapped as a huge page.
        const HUGE = 64;
        /// Soft-dirty, where the kernel has it.
        const SOFT_DIRTY = 128;
        /// A guard page (MADV_GUARD_INSTALL); Linux 6.15.
        const GUARD = 256;
        const _ = !0;
    }
}

/// What to look for and what to do with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScanRequest {
    /// Write-protect the written pages among those that match, in the same step.
    pub wp_matching: bool,
    /// Fail with [`PagemapError::NotTracked`] at a mapping that is not registered for asynchronous write protection.
    pub check_wpasync: bool,
    /// Categories to turn round before they are matched.
    pub inverted: Category,
    /// Categories that a page must have, all of them.
    pub mask: Category,
    /// Categories of which a page must have at least one; empty for no such condition.
    pub anyof: Category,
    /// Categories to report.
    pub ret: Category,
    /// The most pages to match, 0 for no limit.
    pub max_pages: PageCount,
}

impl ScanRequest {
    /// Report the pages that are a process's own: present, and neither a file's nor the zero page. With what says whether
    /// they are part of a huge page.
    #[must_use]
    pub fn own_pages() -> Self {
        let not = Category::FILE | Category::PFNZERO | Category::SWAPPED;
        Self { inverted: not, mask: Category::PRESENT | not, ret: Category::HUGE, ..Self::default() }
    }

    /// Report pages written since they were last protected, and protect them again.
    #[must_use]
    pub fn collect_written() -> Self {
        Self {
            wp_matching: true,
            check_wpasync: true,
            mask: Category::WRITTEN,
            ret: Category::WRITTEN | Category::PRESENT,
            ..Self::default()
        }
    }
}

/// Neighbouring pages of the same categories: `struct page_region`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Region {
    /// The pages.
    pub range: Range,
    /// What they have in common, of what was asked.
    pub categories: Category,
}
const _: () = assert!(size_of::<Region>() == PAGE_REGION_SIZE && align_of::<Region>() == 8);
const _: () = assert!(std::mem::offset_of!(Region, categories) == 16);

/// Where a scan stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScanEnd {
    /// The first address not walked; the end of the range when the scan is complete.
    pub walk_end: Vaddr,
}

/// What can go wrong with a pagemap.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PagemapError {
    /// There is no such process, or it has ended.
    #[error("process {pid} is gone")]
    Gone {
        /// The process.
        pid: Pid,
    },
    /// The address space of an open pagemap is gone.
    #[error("the address space is gone")]
    Ended,
    /// The file could not be opened: reading another process's memory layout needs ptrace rights.
    #[error("cannot open the pagemap of process {pid}")]
    Open {
        /// The process.
        pid: Pid,
        /// What the kernel said.
        source: io::Error,
    },
    /// A mapping in the range is not registered for asynchronous write protection.
    #[error("writes to {range} are not tracked")]
    NotTracked {
        /// The range of the scan.
        range: Range,
    },
    /// This kernel has no PAGEMAP_SCAN.
    #[error("the kernel has no PAGEMAP_SCAN (Linux 6.7)")]
    NotSupported,
    /// The buffer has no room for a single region.
    #[error("no room for the regions of a scan")]
    NoRoom,
    /// The kernel refused the scan.
    #[error("cannot scan {range}")]
    Scan {
        /// The range of the scan.
        range: Range,
        /// What the kernel said.
        source: io::Error,
    },
    /// The entries could not be read.
    #[error("cannot read the pagemap from {start} on")]
    Read {
        /// First page asked for.
        start: Vaddr,
        /// What the kernel said.
        source: io::Error,
    },
}

impl PagemapError {
    /// True if the process has ended: an outcome rather than an error to whoever watches processes.
    #[must_use]
    pub const fn is_gone(&self) -> bool {
        matches!(self, Self::Gone { .. } | Self::Ended)
    }
}

/// An open pagemap. It stays with the address space it was opened on: after an exec the old, empty one.
#[derive(Debug)]
pub struct Pagemap {
    fd: OwnedFd,
}

impl Pagemap {
    /// Opens the pagemap of a process.
    ///
    /// # Errors
    /// [`PagemapError::Gone`], or [`PagemapError::Open`] without ptrace rights on it.
    pub fn open(pid: Pid) -> Result<Self, PagemapError> {
        match File::open(format!("/proc/{pid}/pagemap")) {
            Ok(file) => Ok(Self::from_file(file)),
            Err(source) if matches!(sys::errno(&source), libc::ENOENT | libc::ESRCH) => Err(PagemapError::Gone { pid }),
            Err(source) => Err(PagemapError::Open { pid, source }),
        }
    }

    /// Takes a pagemap that is open already.
    #[must_use]
    pub fn from_file(file: File) -> Self {
        Self { fd: file.into() }
    }

    /// One PAGEMAP_SCAN. `out` is cleared and filled up to its capacity; if that or `max_pages` is reached, the scan
    /// stops early and can be continued at [`ScanEnd::walk_end`].
    ///
    /// # Errors
    /// [`PagemapError::NotTracked`] where `check_wpasync` asks for it, [`PagemapError::NotSupported`] before Linux 6.7,
    /// [`PagemapError::Ended`] when the process has, [`PagemapError::NoRoom`] for a buffer without capacity, else [`PagemapError::Scan`].
    pub fn scan(&self, range: Range, request: &ScanRequest, out: &mut Vec<Region>) -> Result<ScanEnd, PagemapError> {
        out.clear();
        if out.capacity() == 0 {
            return Err(PagemapError::NoRoom);
        }
        self.scan_behind(range, request, out)
    }

    /// Scans the whole range in windows of [`SCAN_WINDOW`]. `out` is cleared and grows as needed. The pages are not
    /// all seen at the same instant.
    ///
    /// Before Linux 6.7 a request that asks only which pages are there is answered from the pagemap's words, where no
    /// page is a zero page or a huge one.
    ///
    /// # Errors
    /// As [`Pagemap::scan`]; what was found up to then is in `out`, and with `wp_matching` it is protected already.
    pub fn scan_all(&self, range: Range, request: &ScanRequest, out: &mut Vec<Region>) -> Result<(), PagemapError> {
        out.clear();
        for window in range.pieces(SCAN_WINDOW) {
            let mut rest = window;
            while !rest.is_empty() {
                let before = out.len();
                if out.capacity() - before < 64 {
                    out.reserve(out.capacity().max(1024));
                }
                let end = match self.scan_behind(rest, request, out) {
                    Err(PagemapError::NotSupported) if request.is_in_words() => {
                        self.scan_words(window, request, out)?;
                        break;
                    }
                    end => end?,
                };
                join_at(out, before);
                match Range::new(end.walk_end, window.end()) {
                    Ok(next) if next.start() > rest.start() => rest = next,
                    // No headway, which only max_pages or a kernel that reports nonsense can cause.
                    _ => break,
                }
            }
        }
        Ok(())
    }

    /// Write-protects all of a registered range without reporting anything, the fastest way to start tracking.
    ///
    /// # Errors
    /// As [`Pagemap::scan`].
    pub fn protect(&self, range: Range) -> Result<(), PagemapError> {
        let request = ScanRequest {
            wp_matching: true,
            check_wpasync: true,
            mask: Category::WRITTEN,
            ret: Category::WRITTEN,
            ..ScanRequest::default()
        };
        for window in range.pieces(SCAN_WINDOW) {
            let mut arg = argument(window, &request);
            self.ioctl(window, &mut arg)?;
        }
        Ok(())
    }

    /// Reads the entries of the pages from `start` on. Returns how many were read: fewer than `out` has room for at the
    /// end of the address space, none when the address space is gone.
    ///
    /// # Errors
    /// [`PagemapError::Read`].
    pub fn entries(&self, start: Vaddr, out: &mut [PagemapEntry]) -> Result<usize, PagemapError> {
        let size = size_of::<PagemapEntry>();
        let mut done = 0;
        while done < out.len() {
            let rest = &mut out[done..];
            // SAFETY: the entries are plain words, for which any bytes are valid, and the slice covers exactly them.
            let bytes = unsafe { std::slice::from_raw_parts_mut(rest.as_mut_ptr().cast::<u8>(), size_of_val(rest)) };
            let offset = (start.page_index() + done as u64) * size as u64;
            match rustix::io::pread(&self.fd, bytes, offset) {
                Ok(read) if read < size => break,
                Ok(read) => done += read / size,
                Err(rustix::io::Errno::INTR) => {}
                Err(source) => return Err(PagemapError::Read { start, source: source.into() }),
            }
        }
        Ok(done)
    }

    /// The entry of one page; an empty one when the address space is gone.
    ///
    /// # Errors
    /// [`PagemapError::Read`].
    pub fn entry(&self, address: Vaddr) -> Result<PagemapEntry, PagemapError> {
        let mut entry = [PagemapEntry(0)];
        self.entries(address.page_start(), &mut entry)?;
        Ok(entry[0])
    }

    /// One ioctl into the spare capacity of `out`.
    fn scan_behind(&self, range: Range, request: &ScanRequest, out: &mut Vec<Region>) -> Result<ScanEnd, PagemapError> {
        let mut arg = argument(range, request);
        let room = out.spare_capacity_mut();
        arg.vec = room.as_mut_ptr().addr() as u64;
        arg.vec_len = room.len().min(REGIONS_AT_ONCE) as u64;
        room.as_mut_ptr().expose_provenance();
        let found = self.ioctl(range, &mut arg)?;
        let length = out.len() + found;
        assert!(length <= out.capacity(), "the kernel reports no more regions than it was given room for");
        // SAFETY: the kernel has written `found` regions behind the first `len` ones, and any bits are a valid Region.
        unsafe { out.set_len(length) };
        Ok(ScanEnd { walk_end: Vaddr(arg.walk_end) })
    }

    fn ioctl(&self, range: Range, arg: &mut PmScanArg) -> Result<usize, PagemapError> {
        // SAFETY: PAGEMAP_SCAN takes this structure, and `vec` is either 0 or the spare capacity of a vector.
        match unsafe { sys::ioctl(self.fd.as_fd(), PAGEMAP_SCAN, arg) } {
            Ok(found) => Ok(usize::try_from(found).unwrap_or(0)),
            Err(source) => Err(match sys::errno(&source) {
                libc::EPERM if arg.flags & PM_SCAN_CHECK_WPASYNC != 0 => PagemapError::NotTracked { range },
                libc::ESRCH => PagemapError::Ended,
                libc::ENOTTY => PagemapError::NotSupported,
                _ => PagemapError::Scan { range, source },
            }),
        }
    }
}

impl AsFd for Pagemap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn argument(range: Range, request: &ScanRequest) -> PmScanArg {
    let mut flags = 0;
    if request.wp_matching {
        flags |= PM_SCAN_WP_MATCHING;
    }
    if request.check_wpasync {
        flags |= PM_SCAN_CHECK_WPASYNC;
    }
    PmScanArg {
        size: size_of::<PmScanArg>() as u64,
        flags,
        start: range.start().0,
        end: range.end().0,
        max_pages: request.max_pages.0,
        category_inverted: request.inverted.bits(),
        category_mask: request.mask.bits(),
        category_anyof_mask: request.anyof.bits(),
        return_mask: request.ret.bits(),
        ..PmScanArg::default()
    }
}

/// Joins the region at `index` to the one before it, if they touch and are alike: a run that a window cut in two.
fn join_at(regions: &mut Vec<Region>, index: usize) {
    if index == 0 || index >= regions.len() {
        return;
    }
    let (before, after) = (regions[index - 1], regions[index]);
    if before.range.end() == after.range.start()
        && before.categories == after.categories
        && let Ok(range) = Range::new(before.range.start(), after.range.end())
    {
        regions[index - 1].range = range;
        regions.remove(index);
    }
}

/// One word of a pagemap (Documentation/admin-guide/mm/pagemap.rst).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct PagemapEntry(pub u64);

impl PagemapEntry {
    const fn bit(self, bit: u32) -> bool {
        self.0 >> bit & 1 != 0
    }

    /// There is a page.
    #[must_use]
    pub const fn present(self) -> bool {
        self.bit(63)
    }

    /// Swapped out.
    #[must_use]
    pub const fn swapped(self) -> bool {
        self.bit(62)
    }

    /// A page of a file or of shared memory.
    #[must_use]
    pub const fn file_or_shared(self) -> bool {
        self.bit(61)
    }

    /// Mapped nowhere else.
    #[must_use]
    pub const fn exclusive(self) -> bool {
        self.bit(56)
    }

    /// Write-protected by a userfaultfd.
    #[must_use]
    pub const fn uffd_wp(self) -> bool {
        self.bit(57)
    }

    /// A guard page (Linux 6.15).
    #[must_use]
    pub const fn guard(self) -> bool {
        self.bit(58)
    }

    /// The page frame number, `None` where there is no page or the reader lacks CAP_SYS_ADMIN.
    #[must_use]
    pub const fn pfn(self) -> Option<u64> {
        let pfn = self.0 & ((1 << 55) - 1);
        if self.present() && pfn != 0 { Some(pfn) } else { None }
    }
}

/// The size of a pagemap's word for each page of a range; what [`Pagemap::entries`] needs to hold all of it.
#[must_use]
pub fn entries_len(range: Range) -> usize {
    (range.len().0 / page_size()) as usize
}

#[cfg(test)]
mod tests;
