//! The address space that the helper works in: every step of a batch as system calls.
//!
//! Memory of the program is read with process_vm_readv only, never through a pointer; the exceptions are frozen pages
//! in the scratch areas, which the program cannot touch, and the store's segments.

use core::sync::atomic::Ordering::SeqCst;

use abi::control::{Control, check_mode, journal, stop};
use abi::mark::{Keep, Mark};
use abi::place::Place;
use abi::uapi::{
    PROCMAP_QUERY, PROCMAP_QUERY_COVERING_OR_NEXT_VMA, ProcmapQuery, UFFDIO_COPY, UFFDIO_MOVE, UFFDIO_REGISTER,
    UFFDIO_REGISTER_MODE_MINOR, UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_WP, UFFDIO_UNREGISTER, UFFDIO_WAKE,
    UffdioCopy, UffdioMove, UffdioRange, UffdioRegister,
};
use abi::{BATCH_MAX, SCRATCH, frozen};
use merge::{
    AddressSpace, Checked, Failure, FreezeKind, Frozen, PageState, Pages, RegisterMode, Slot, Unsettled, Vma, VmaKind,
};

use crate::calls::apply;
use crate::priority::Priority;
use crate::reserved::{self, Reserved};
use crate::segments::Segments;
use crate::state::STATE;
use crate::sys::{self, MAP_ANONYMOUS, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, MREMAP_DONTUNMAP};
use crate::sys::{MREMAP_FIXED, MREMAP_MAYMOVE, PAGE, PROT_NONE, PROT_READ, PROT_WRITE, advice, errno, nr, sys};
use crate::{gate, threads};

/// How often pages are moved back that forks keep from moving.
const THAW_TRIES: usize = 20;
/// Pause between two tries at a busy gate.
const PAUSE_NS: u64 = 500_000;

/// The helper's view of the address space.
pub(crate) struct Space {
    pub(crate) control: &'static Control,
    pub(crate) pid: u32,
    pub(crate) uffd: i32,
    /// The socket to the broker.
    pub(crate) link: i32,
    /// A reservation of the scratch area for pages of store mappings was lost: nothing is moved there any more.
    pub(crate) diverged_scratch_lost: bool,
    pub(crate) pagemap: i32,
    pub(crate) maps: i32,
    pub(crate) scratch: u64,
    pub(crate) diverged_scratch: u64,
    pub(crate) segments: Segments,
    /// Where copies are made before they are put into their place.
    pub(crate) copies: Reserved,
    /// One of [`check_mode`].
    pub(crate) check_mode: u32,
    /// Epochs that the plan was made for.
    pub(crate) layout_epoch: u32,
    pub(crate) thread_epoch: u32,
    /// Which protection the barrier's page has now.
    pub(crate) barrier: bool,
    /// A program that counts the references to pages in the scratch areas.
    pub(crate) counts: Option<i32>,
    pub(crate) priority: Priority,
    /// /proc/PID/mem shows what its protection forbids to read: here, and so to whoever gives pages back.
    pub(crate) forced: bool,
}

impl Space {
    pub(crate) fn ioctl(&self, fd: i32, request: u32, argument: u64) -> i64 {
        // SAFETY: `argument` points to the structure that the request takes, alive during the call; what the request
        // does to the address space is the step that the caller describes.
        unsafe { sys!(nr::IOCTL, fd as u64, request.into(), argument) }
    }

    fn range(&self, request: u32, start: u64, end: u64) -> i64 {
        let mut range = UffdioRange { start, len: end.saturating_sub(start) };
        self.ioctl(self.uffd, request, (&raw mut range) as u64)
    }

    /// Address of a scratch page.
    pub(crate) fn slot(&self, kind: FreezeKind, slot: Slot) -> u64 {
        let base = match kind {
            FreezeKind::Move => self.scratch,
            FreezeKind::Remap => self.diverged_scratch,
        };
        base + slot as u64 * PAGE
    }

    /// UFFDIO_MOVE; returns the bytes moved and the error that stopped it.
    fn move_pages(&self, dst: u64, src: u64, len: u64) -> (u64, i64) {
        let mut request = UffdioMove { dst, src, len, mode: 0, moved: 0 };
        let result = self.ioctl(self.uffd, UFFDIO_MOVE, (&raw mut request) as u64);
        let moved = if request.moved > 0 { request.moved as u64 } else { 0 };
        if result == 0 { (len, 0) } else { (moved, if request.moved < 0 { -request.moved } else { -result }) }
    }

    /// Copies one scratch page back into a registered hole.
    fn copy_back(&self, address: u64, from: u64) -> bool {
        let mut request = UffdioCopy { dst: address, src: from, len: PAGE, mode: 0, copy: 0 };
        let result = self.ioctl(self.uffd, UFFDIO_COPY, (&raw mut request) as u64);
        self.control.counters.copied_back.fetch_add(1, SeqCst);
        // EEXIST: somebody has put a page there already, which only an earlier step of ours can have been.
        result == 0 || request.copy == -errno::EEXIST || result == -errno::EEXIST
    }

    /// The last resort: the place of a frozen page is not registered any more, because its mapping was changed past
    /// the gate. The content must not be lost: memory is put there anew.
    fn put_anew(&mut self, address: u64, from: u64) -> bool {
        STATE.stop(stop::BROKEN);
        let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        let Ok(fresh) = self.copies.map(PAGE, PROT_READ | PROT_WRITE, flags, -1, 0) else { return false };
        // SAFETY: one page each, the source frozen and the destination fresh.
        unsafe { core::ptr::copy_nonoverlapping(from as *const u8, fresh as *mut u8, PAGE as usize) };
        // Replaces the hole that the freeze left.
        self.copies.move_to(address) == 0
    }

    pub(crate) fn mapping(&mut self, address: u64) -> Option<ProcmapQuery> {
        self.query(address, 0).filter(|mapping| mapping.vma_start <= address)
    }

    /// Takes a range out of the registration, but for what a userfaultfd of the program's own has of it. Up to Linux 6.16 it
    /// would be taken from that one; but only what is nobody's or this one's can be registered, so trying shows whose it
    /// is. Not where it need not be: memory that is registered for a moment is a mapping of its own, and an mremap of the
    /// program's that spans it would fail in that moment.
    pub(crate) fn release(&mut self, start: u64, end: u64) {
        if self.control.stop.load(SeqCst) & stop::USERFAULTFD == 0 {
            return self.unregister(start, end);
        }
        self.for_each_part(start, end, |space, from, to| {
            if space.register(from, to, RegisterMode::Track) != Err(Failure::Busy) {
                space.range(UFFDIO_UNREGISTER, from, to);
            }
        });
    }

    /// Calls `act` with what of each mapping lies in a range.
    fn for_each_part(&mut self, start: u64, end: u64, mut act: impl FnMut(&mut Self, u64, u64)) {
        let mut at = start;
        while let Some(mapping) = self.query(at, PROCMAP_QUERY_COVERING_OR_NEXT_VMA)
            && mapping.vma_start < end
        {
            act(self, mapping.vma_start.max(at), mapping.vma_end.min(end));
            at = mapping.vma_end;
        }
    }

    /// True if all of a range is private anonymous memory that can be read and written, and not executed.
    pub(crate) fn is_plain(&mut self, start: u64, end: u64) -> bool {
        const ALL: u64 = 15;
        let mut at = start;
        while at < end {
            let Some(mapping) = self.mapping(at) else { return false };
            let file = mapping.inode != 0 || mapping.dev_major != 0 || mapping.dev_minor != 0;
            if file || mapping.vma_flags & ALL != PROT_READ | PROT_WRITE {
                return false;
            }
            at = mapping.vma_end;
        }
        true
    }

    fn query(&mut self, address: u64, query_flags: u64) -> Option<ProcmapQuery> {
        query(self.maps, address, query_flags)
    }
}

const fn failure(error: i64) -> Failure {
    match error {
        errno::ENOENT | errno::ESRCH => Failure::Absent,
        errno::EBUSY | errno::EAGAIN | errno::EEXIST => Failure::Busy,
        errno::ENOMEM => Failure::Limit,
        _ => Failure::Properties,
    }
}

const fn bytes(pages: Pages) -> u64 {
    pages.count as u64 * PAGE
}

impl AddressSpace for Space {
    fn page_size(&self) -> u64 {
        PAGE
    }

    fn close_gate(&mut self) -> bool {
        let closed = gate::close(self.control);
        if closed {
            self.priority.begin_batch();
        }
        closed
    }

    fn open_gate(&mut self) {
        #[cfg(feature = "faults")]
        crate::faults::step();
        gate::open(self.control);
        self.priority.end_batch(&self.control.plan);
    }

    fn settled(&mut self) -> Result<(), Unsettled> {
        if self.control.layout_epoch.load(SeqCst) != self.layout_epoch {
            return Err(Unsettled::Layout);
        }
        if self.control.thread_epoch.load(SeqCst) != self.thread_epoch {
            return Err(Unsettled::Threads);
        }
        // Last: un-merging goes on in a process that is stopped, but not over a layout that has changed.
        if self.control.stop.load(SeqCst) != 0 {
            return Err(Unsettled::Stopped);
        }
        Ok(())
    }

    fn vma(&mut self, address: u64) -> Option<Vma> {
        const SHARED: u64 = 8;
        let query = self.mapping(address)?;
        let kind = if query.vma_flags & SHARED != 0 {
            VmaKind::Other
        } else if query.inode == 0 && query.dev_major == 0 && query.dev_minor == 0 {
            VmaKind::Anonymous
        } else {
            let page = u32::try_from(query.vma_offset / PAGE).ok();
            let segment = self.segments.by_inode(query.inode);
            let first = segment.zip(page).map(|(segment, page)| Place { segment, page });
            VmaKind::Store { first }
        };
        let prot = (query.vma_flags & u64::from(Keep::PROT)) as u8;
        Some(Vma { start: query.vma_start, end: query.vma_end, prot, kind })
    }

    fn page_states(&mut self, start: u64, states: &mut [PageState]) -> bool {
        const PRESENT: u64 = 1 << 63;
        const SWAPPED: u64 = 1 << 62;
        const FILE: u64 = 1 << 61;
        const EXCLUSIVE: u64 = 1 << 56;
        let mut entries = [0_u64; 64];
        for (index, chunk) in states.chunks_mut(entries.len()).enumerate() {
            let first = start / PAGE + (index * 64) as u64;
            let len = chunk.len() * 8;
            // SAFETY: the kernel writes at most `len` bytes into `entries`.
            let got =
                unsafe { sys!(nr::PREAD64, self.pagemap as u64, entries.as_mut_ptr() as u64, len as u64, first * 8) };
            if got != len as i64 {
                return false;
            }
            for (state, entry) in chunk.iter_mut().zip(entries) {
                *state = if entry & SWAPPED != 0 {
                    PageState::Swapped
                } else if entry & PRESENT == 0 {
                    PageState::Absent
                } else if entry & FILE != 0 {
                    PageState::File
                } else if entry & EXCLUSIVE != 0 {
                    PageState::Exclusive
                } else {
                    PageState::Shared
                };
            }
        }
        true
    }

    fn scratch_states(&mut self, kind: FreezeKind, states: &mut [PageState]) -> bool {
        self.page_states(self.slot(kind, 0), states)
    }

    fn mark(&self, address: u64) -> Mark {
        STATE.table.mark(address)
    }

    fn set_mark(&mut self, pages: Pages, mark: Mark) {
        #[cfg(feature = "faults")]
        crate::faults::step();
        STATE.table.set(pages.start, pages.start + bytes(pages), mark);
    }

    fn holds_thread_data(&self, address: u64) -> bool {
        threads::holds_head(self.control, address)
    }

    fn robust_list_enters(&mut self, start: u64, end: u64) -> bool {
        threads::lists_enter(self.control, self.pid, start, end)
    }

    fn own(&mut self, pages: Pages) {
        // SAFETY: pages that are present, mapped here alone and held by nobody: nothing is allocated, no content changes.
        unsafe { sys!(nr::MADVISE, pages.start, bytes(pages), advice::POPULATE_WRITE) };
    }

    fn register(&mut self, start: u64, end: u64, mode: RegisterMode) -> Result<(), Failure> {
        let mode = match mode {
            RegisterMode::Missing => UFFDIO_REGISTER_MODE_MISSING,
            RegisterMode::MissingAndMinor => UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR,
            RegisterMode::Track => UFFDIO_REGISTER_MODE_WP,
        };
        let mut request =
            UffdioRegister { range: UffdioRange { start, len: end.saturating_sub(start) }, mode, ioctls: 0 };
        match self.ioctl(self.uffd, UFFDIO_REGISTER, (&raw mut request) as u64) {
            0 => Ok(()),
            error => Err(failure(-error)),
        }
    }

    fn unregister(&mut self, start: u64, end: u64) {
        if self.range(UFFDIO_UNREGISTER, start, end) == 0 {
            return;
        }
        // A mapping that userfaultfd does not know lies in between: piece by piece, or the rest would stay registered
        // and the next first touch there would wait for ever.
        self.for_each_part(start, end, |space, from, to| {
            space.range(UFFDIO_UNREGISTER, from, to);
        });
    }

    fn wake(&mut self, start: u64, end: u64) {
        self.range(UFFDIO_WAKE, start, end);
    }

    fn journal(&mut self, _kind: FreezeKind, slot: Slot, pages: Pages) {
        #[cfg(feature = "faults")]
        crate::faults::step();
        let journal = &self.control.journal;
        for offset in 0..pages.count {
            if let Some(source) = journal.source.get(slot + offset) {
                source.store(pages.start + offset as u64 * PAGE, SeqCst);
            }
        }
        journal.count.store((slot + pages.count).min(BATCH_MAX) as u32, SeqCst);
    }

    fn journal_begin(&mut self, kind: FreezeKind, start: u64, end: u64) {
        #[cfg(feature = "faults")]
        crate::faults::step();
        let journal = &self.control.journal;
        journal.count.store(0, SeqCst);
        journal.window_start.store(start, SeqCst);
        journal.window_end.store(end, SeqCst);
        journal.state.store(
            match kind {
                FreezeKind::Move => journal::PLAIN,
                FreezeKind::Remap => journal::DIVERGED,
            },
            SeqCst,
        );
    }

    fn journal_end(&mut self) {
        #[cfg(feature = "faults")]
        crate::faults::step();
        self.let_forks_pass();
        self.control.journal.state.store(journal::IDLE, SeqCst);
        self.control.journal.count.store(0, SeqCst);
    }

    fn freeze(&mut self, kind: FreezeKind, pages: Pages, slot: Slot) -> Frozen {
        let target = self.slot(kind, slot);
        match kind {
            FreezeKind::Move => {
                let (moved, error) = self.move_pages(target, pages.start, bytes(pages));
                let moved = (moved / PAGE) as usize;
                let failure = (moved < pages.count).then(|| failure(error));
                Frozen { moved, failure }
            }
            FreezeKind::Remap => {
                if self.diverged_scratch_lost {
                    return Frozen { moved: 0, failure: Some(Failure::Limit) };
                }
                let flags = MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP;
                // SAFETY: moves pages of a registered private mapping to the scratch area, which the agent reserved.
                let result = unsafe { sys!(nr::MREMAP, pages.start, bytes(pages), bytes(pages), flags, target) };
                if result as u64 == target {
                    Frozen { moved: pages.count, failure: None }
                } else {
                    self.diverged_scratch_lost = !reserved::again(self.maps, target, bytes(pages));
                    Frozen { moved: 0, failure: Some(failure(-result)) }
                }
            }
        }
    }

    fn thaw(&mut self, kind: FreezeKind, pages: Pages, slot: Slot) -> bool {
        let from = self.slot(kind, slot);
        let mut done = 0;
        // While a fork waits for its event to be read the kernel refuses to move or copy anything.
        self.begin_thaw();
        match kind {
            FreezeKind::Move => {
                for _ in 0..THAW_TRIES {
                    let (moved, error) = self.move_pages(pages.start + done, from + done, bytes(pages) - done);
                    done += moved;
                    if done == bytes(pages) || error != errno::EAGAIN {
                        break;
                    }
                    // A fork has begun since.
                    self.end_thaw();
                    self.begin_thaw();
                }
            }
            FreezeKind::Remap => {
                let flags = MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP;
                // Neighbours that came from several mappings lie in several mappings here too. Before Linux 6.17 one
                // call moves pages of one mapping only, and refuses others after it has unmapped their place already:
                // whoever touches that is killed, and what is copied there is not what others hold references to.
                while done < bytes(pages) {
                    let Some(mapping) = self.mapping(from + done) else { break };
                    let (to, len) = (pages.start + done, (mapping.vma_end - from).min(bytes(pages)) - done);
                    // SAFETY: moves the same pages back where they came from.
                    if unsafe { sys!(nr::MREMAP, from + done, len, len, flags, to) } as u64 != to {
                        break;
                    }
                    done += len;
                }
            }
        }
        let mut whole = true;
        while done < bytes(pages) {
            let (address, source) = (pages.start + done, from + done);
            let mut state = [PageState::Exclusive];
            // A page that was freed lazily can vanish meanwhile. Reading its slot would wait for ever.
            if kind == FreezeKind::Move && self.page_states(source, &mut state) && state[0] == PageState::Absent {
                done += PAGE;
                continue;
            }
            if !self.copy_back(address, source) && !self.put_anew(address, source) {
                whole = false;
            }
            done += PAGE;
        }
        self.end_thaw();
        if !whole {
            STATE.stop(stop::BROKEN);
        }
        whole
    }

    fn protect_frozen(&mut self, slots: usize, prot: u8) -> bool {
        let start = self.slot(FreezeKind::Remap, 0);
        // SAFETY: frozen pages, of which nobody else knows where they are.
        unsafe { sys!(nr::MPROTECT, start, slots as u64 * PAGE, u64::from(prot)) == 0 }
    }

    fn survivors_read_all(&self) -> bool {
        self.forced
    }

    fn barrier(&mut self) {
        // Takes the address space's write lock, which waits for everybody who writes under the read lock
        // (/proc/PID/mem, ptrace). Another protection each time, or the kernel would see that there is nothing to do.
        self.barrier = !self.barrier;
        let prot = if self.barrier { PROT_READ } else { PROT_NONE };
        // SAFETY: the page behind the agent's own scratch area, always a hole.
        unsafe { sys!(nr::MPROTECT, self.scratch + SCRATCH, PAGE, prot) };
    }

    fn check(&mut self, kind: FreezeKind, refs: &mut [u32]) -> Checked {
        match self.check_mode {
            check_mode::BPF => self.count(kind, refs).unwrap_or_else(|| self.ask_broker(kind, refs)),
            check_mode::COLLAPSE if kind == FreezeKind::Move => self.ask_collapse(),
            check_mode::VOUCH => Checked::AllFree,
            _ => Checked::Unknown,
        }
    }

    fn equals_store(&mut self, kind: FreezeKind, slot: Slot, place: Place) -> bool {
        let Some(view) = self.segments.view(place) else { return false };
        // SAFETY: a frozen page and a page of a sealed segment, both mapped readable and changed by nobody.
        unsafe { same(self.slot(kind, slot), view) }
    }

    fn is_zero(&mut self, kind: FreezeKind, slot: Slot) -> bool {
        let address = self.slot(kind, slot);
        let words = address as *const [u64; 8];
        // SAFETY: one frozen page.
        (0..PAGE as usize / 64).all(|index| unsafe { (*words.add(index)).iter().fold(0, |sum, word| sum | word) == 0 })
    }

    fn map_store(&mut self, pages: Pages, place: Place, keep: Keep) -> Result<(), Failure> {
        let Some(fd) = self.segments.descriptor(place, pages.count) else { return Err(Failure::Limit) };
        let flags = MAP_PRIVATE | MAP_FIXED | if keep.has(Keep::NORESERVE) { MAP_NORESERVE } else { 0 };
        // SAFETY: every page that is replaced here was compared with the store while frozen.
        let result = unsafe {
            sys::mmap(pages.start, bytes(pages), keep.prot().into(), flags, fd, u64::from(place.page) * PAGE)
        };
        match result {
            Ok(_) => {
                apply(pages.start, bytes(pages), keep);
                Ok(())
            }
            Err(error) => Err(failure(error)),
        }
    }

    fn map_anonymous(&mut self, pages: Pages, keep: Keep) -> Result<(), Failure> {
        let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | if keep.has(Keep::NORESERVE) { MAP_NORESERVE } else { 0 };
        // SAFETY: every page that is replaced here was seen to hold zeros while frozen.
        let result = unsafe { sys::mmap(pages.start, bytes(pages), keep.prot().into(), flags, -1, 0) };
        match result {
            Ok(_) => {
                apply(pages.start, bytes(pages), keep);
                Ok(())
            }
            Err(error) => Err(failure(error)),
        }
    }

    fn map_copy(&mut self, pages: Pages, slot: Slot, keep: Keep) -> Result<(), Failure> {
        let len = bytes(pages);
        let flags = MAP_PRIVATE | MAP_ANONYMOUS | if keep.has(Keep::NORESERVE) { MAP_NORESERVE } else { 0 };
        let fresh = self.copies.map(len, PROT_READ | PROT_WRITE, flags, -1, 0).map_err(failure)?;
        let frozen = self.slot(FreezeKind::Remap, slot);
        // SAFETY: frozen pages that can be read, into fresh memory.
        unsafe { core::ptr::copy_nonoverlapping(frozen as *const u8, fresh as *mut u8, len as usize) };
        let wanted = u64::from(keep.prot());
        if wanted != PROT_READ | PROT_WRITE {
            // SAFETY: the fresh memory.
            unsafe { sys!(nr::MPROTECT, fresh, len, wanted) };
        }
        apply(fresh, len, keep);
        // Replaces the emptied mapping by memory with the same content, in one step.
        match self.copies.move_to(pages.start) {
            0 => Ok(()),
            error => Err(failure(error)),
        }
    }

    fn discard_scratch(&mut self, kind: FreezeKind, slots: usize) {
        if slots == 0 {
            return;
        }
        self.let_forks_pass();
        let (start, len) = (self.slot(kind, 0), slots as u64 * PAGE);
        match kind {
            FreezeKind::Move => self.discard(start, len),
            // Nothing but what is frozen may come there.
            FreezeKind::Remap => {
                reserved::reserve(start, len);
            }
        }
    }

    fn now(&mut self) -> u64 {
        sys::monotonic()
    }

    fn record_frozen(&mut self, nanoseconds: u64) {
        let counters = &self.control.counters;
        counters.batches.fetch_add(1, SeqCst);
        counters.frozen[frozen::bucket(nanoseconds)].fetch_add(1, SeqCst);
        counters.frozen_max_ns.fetch_max(nanoseconds, SeqCst);
    }

    fn record_runs(&mut self, runs: usize) {
        self.control.counters.runs.fetch_add(runs as u64, SeqCst);
    }

    fn pause(&mut self) {
        sys::sleep_ns(PAUSE_NS);
    }
}

/// Asks the list of mappings `maps` (PROCMAP_QUERY). With the flag for the next one, what comes back may lie behind the
/// address.
pub(crate) fn query(maps: i32, address: u64, query_flags: u64) -> Option<ProcmapQuery> {
    let size = size_of::<ProcmapQuery>() as u64;
    let mut query = ProcmapQuery { size, query_flags, query_addr: address, ..ProcmapQuery::default() };
    // SAFETY: the kernel reads and writes the structure.
    let result = unsafe { sys!(nr::IOCTL, maps as u64, PROCMAP_QUERY.into(), (&raw mut query) as u64) };
    (result == 0 && address < query.vma_end).then_some(query)
}

/// True if two pages hold the same bytes.
///
/// # Safety
/// Both must be readable for a page and unchanged meanwhile.
unsafe fn same(a: u64, b: u64) -> bool {
    let (a, b) = (a as *const [u64; 8], b as *const [u64; 8]);
    (0..PAGE as usize / 64).all(|index| {
        // SAFETY: inside the page, by the loop's bound and the caller's promise.
        let (a, b) = unsafe { (&*a.add(index), &*b.add(index)) };
        a.iter().zip(b).fold(0, |sum, (a, b)| sum | (a ^ b)) == 0
    })
}
