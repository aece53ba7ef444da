//! The store's segments that the broker gave the helper descriptors of.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

use abi::place::Place;

use crate::link;
use crate::sys::{self, MAP_PRIVATE, PAGE, PROT_READ, nr, sys};

/// Segments that a helper can know at one time.
pub(crate) const KNOWN_MAX: usize = 4096;
/// Segments that are mapped for comparing at one time.
const VIEWS: usize = 4;

/// One segment. Static, since the helper's stack is small; zero means nothing, so that it costs no memory unused.
struct Segment {
    /// Descriptor + 1.
    fd: AtomicU32,
    pages: AtomicU32,
    inode: AtomicU64,
}

static KNOWN: [Segment; KNOWN_MAX] =
    [const { Segment { fd: AtomicU32::new(0), pages: AtomicU32::new(0), inode: AtomicU64::new(0) } }; KNOWN_MAX];

impl Segment {
    fn descriptor(&self) -> Option<i32> {
        self.fd.load(SeqCst).checked_sub(1).and_then(|fd| i32::try_from(fd).ok())
    }

    fn set(&self, fd: u32, pages: u32, inode: u64) {
        self.pages.store(pages, SeqCst);
        self.inode.store(inode, SeqCst);
        self.fd.store(fd, SeqCst);
    }
}

/// A page of a segment that is needed on its own: reading it costs less than mapping its segment would.
#[repr(align(64))]
struct Lone(UnsafeCell<[u8; PAGE as usize]>);

// SAFETY: the helper has one thread, and only its own `Segments` gives the address away.
unsafe impl Sync for Lone {}

static LONE: Lone = Lone(UnsafeCell::new([0; PAGE as usize]));

#[derive(Clone, Copy)]
struct View {
    segment: u32,
    address: u64,
    len: u64,
}

/// The table of segments.
pub(crate) struct Segments {
    /// Segments from this one on were never given.
    used: usize,
    views: [View; VIEWS],
    next_view: usize,
    /// The segment that a page was last asked for and that was not mapped.
    missed: Option<u32>,
}

impl Segments {
    /// An empty table. A helper in a forked child finds the parent's entries and forgets them.
    pub(crate) fn new() -> Self {
        for segment in KNOWN.iter().filter(|segment| segment.descriptor().is_some()) {
            segment.set(0, 0, 0);
        }
        Self { used: 0, views: [View { segment: 0, address: 0, len: 0 }; VIEWS], next_view: 0, missed: None }
    }

    /// Takes a segment's descriptor.
    pub(crate) fn add(&mut self, index: u32, pages: u32, fd: i32) {
        self.retire(index);
        let Some(segment) = KNOWN.get(index as usize) else {
            link::close(fd);
            return;
        };
        // struct stat: the inode number is the second word.
        let mut stat = [0_u64; 18];
        // SAFETY: the kernel writes a struct stat of 144 bytes.
        let known = unsafe { sys!(nr::FSTAT, fd as u64, stat.as_mut_ptr() as u64) } == 0;
        segment.set(fd as u32 + 1, pages, if known { stat[1] } else { 0 });
        self.used = self.used.max(index as usize + 1);
    }

    /// Closes a segment's descriptor; what is mapped of it stays.
    pub(crate) fn retire(&mut self, index: u32) {
        let Some(segment) = KNOWN.get(index as usize) else { return };
        let Some(fd) = segment.descriptor() else { return };
        link::close(fd);
        segment.set(0, 0, 0);
        for view in self.views.iter_mut().filter(|view| view.len != 0 && view.segment == index) {
            unmap(view);
        }
    }

    /// The segment with this inode.
    pub(crate) fn by_inode(&self, inode: u64) -> Option<u32> {
        let at = KNOWN[..self.used]
            .iter()
            .position(|segment| segment.descriptor().is_some() && segment.inode.load(SeqCst) == inode)?;
        u32::try_from(at).ok()
    }

    /// The descriptor to map `pages` pages from `place` on.
    pub(crate) fn descriptor(&self, place: Place, pages: usize) -> Option<i32> {
        let segment = KNOWN.get(place.segment as usize)?;
        let end = u64::from(place.page) + pages as u64;
        segment.descriptor().filter(|_| end <= u64::from(segment.pages.load(SeqCst)))
    }

    /// Where a page of a segment can be read, until the next page is asked for. The first page of a segment is read,
    /// with the second it is mapped: a run's pages are compared in a row, scattered ones each in another segment.
    pub(crate) fn view(&mut self, place: Place) -> Option<u64> {
        let fd = self.descriptor(place, 1)?;
        let offset = u64::from(place.page) * PAGE;
        if let Some(view) = self.views.iter().find(|view| view.len != 0 && view.segment == place.segment) {
            return Some(view.address + offset);
        }
        if self.missed.replace(place.segment) != Some(place.segment) {
            let page = LONE.0.get() as u64;
            // SAFETY: the kernel writes a page into memory that nothing refers to: who asked before is done with it.
            let read = unsafe { sys!(nr::PREAD64, fd as u64, page, PAGE, offset) };
            return (read == PAGE as i64).then_some(page);
        }
        let len = u64::from(KNOWN[place.segment as usize].pages.load(SeqCst)) * PAGE;
        let view = &mut self.views[self.next_view];
        self.next_view = (self.next_view + 1) % VIEWS;
        unmap(view);
        // SAFETY: a free place of the kernel's choice; read-only.
        let address = unsafe { sys::mmap(0, len, PROT_READ, MAP_PRIVATE, fd, 0) }.ok()?;
        *view = View { segment: place.segment, address, len };
        Some(address + offset)
    }

    /// Unmaps what was mapped for comparing. It would count as the program's memory, in its own eyes and in the
    /// broker's, which keeps what is mapped.
    pub(crate) fn close_views(&mut self) {
        self.views.iter_mut().for_each(unmap);
        self.missed = None;
    }
}

fn unmap(view: &mut View) {
    if view.len != 0 {
        // SAFETY: mapped by `view` for comparing, used by nothing else.
        unsafe { sys!(nr::MUNMAP, view.address, view.len) };
        view.len = 0;
    }
}
