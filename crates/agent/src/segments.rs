//! The store's segments that the broker gave the helper descriptors of.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

use abi::place::Place;

use crate::link;
use crate::reserved::{Reserved, WINDOW, WINDOWS};
use crate::sys::{PAGE, advice, nr, sys};

/// Segments that a helper can know at one time.
pub(crate) const KNOWN_MAX: usize = 4096;

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
#[repr(align(4096))]
struct Lone(UnsafeCell<[u8; PAGE as usize]>);

// SAFETY: the helper has one thread, and only its own `Segments` gives the address away.
unsafe impl Sync for Lone {}

static LONE: Lone = Lone(UnsafeCell::new([0; PAGE as usize]));

/// [`WINDOW`] pages of a segment, or what there is of them.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Window {
    segment: u32,
    /// The first of them, a multiple of their number.
    first: u32,
}

/// A place where a window can be mapped.
struct View {
    shows: Option<Window>,
    place: Reserved,
}

/// The table of segments.
pub(crate) struct Segments {
    /// Segments from this one on were never given.
    used: usize,
    views: [View; WINDOWS],
    next_view: usize,
    /// The window that a page was last asked for and that was not mapped.
    missed: Option<Window>,
}

impl Segments {
    /// An empty table. A helper in a forked child finds the parent's entries and forgets them.
    pub(crate) fn new(windows: [Reserved; WINDOWS]) -> Self {
        for segment in KNOWN.iter().filter(|segment| segment.descriptor().is_some()) {
            segment.set(0, 0, 0);
        }
        Self { used: 0, views: windows.map(|place| View { shows: None, place }), next_view: 0, missed: None }
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
        let shows = |view: &&mut View| view.shows.is_some_and(|window| window.segment == index);
        self.views.iter_mut().filter(shows).for_each(View::close);
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

    /// Where a page of a segment can be read, until the next page is asked for. The first page of a window is read, with
    /// the second it is mapped: a run's pages are compared in a row, scattered ones each in another segment.
    pub(crate) fn view(&mut self, place: Place) -> Option<u64> {
        let fd = self.descriptor(place, 1)?;
        let inside = place.page % WINDOW;
        let window = Window { segment: place.segment, first: place.page - inside };
        let offset = u64::from(inside) * PAGE;
        let address = match self.views.iter().find(|view| view.shows == Some(window)) {
            Some(view) => Some(view.place.address()),
            None if self.missed.replace(window) == Some(window) => self.open(window, fd),
            None => None,
        };
        if let Some(address) = address {
            return Some(address + offset);
        }
        let page = LONE.0.get() as u64;
        // SAFETY: the kernel writes a page into memory that nothing refers to: who asked before is done with it.
        let read = unsafe { sys!(nr::PREAD64, fd as u64, page, PAGE, u64::from(place.page) * PAGE) };
        (read == PAGE as i64).then_some(page)
    }

    /// Maps a window instead of the one that was mapped first. `None` if the kernel refuses.
    fn open(&mut self, window: Window, fd: i32) -> Option<u64> {
        let pages = KNOWN.get(window.segment as usize)?.pages.load(SeqCst);
        // Whoever touched what is mapped behind the end of a file would be killed.
        let pages = pages.checked_sub(window.first)?.min(WINDOW);
        let view = &mut self.views[self.next_view];
        self.next_view = (self.next_view + 1) % WINDOWS;
        view.shows = None;
        let address = view.place.show(fd, u64::from(window.first) * PAGE, u64::from(pages) * PAGE).ok()?;
        view.shows = Some(window);
        Some(address)
    }

    /// Unmaps what was mapped for comparing, and gives back the page that was read. It would count as the program's
    /// memory, in its own eyes and in the broker's, which keeps what is mapped; and it would be in its core dumps.
    pub(crate) fn close_views(&mut self) {
        self.views.iter_mut().for_each(View::close);
        if self.missed.take().is_some() {
            // Locked memory (mlockall) keeps the page, which does no harm.
            // SAFETY: a page of its own that nothing refers to: who asked for it is done with it.
            unsafe { sys!(nr::MADVISE, LONE.0.get() as u64, PAGE, advice::DONTNEED) };
        }
    }
}

impl View {
    fn close(&mut self) {
        self.shows = None;
        self.place.empty();
    }
}
