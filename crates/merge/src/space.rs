//! What a batch needs of an address space.

use abi::mark::{Keep, Mark};
use abi::place::Place;

/// A run of neighbouring pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pages {
    /// Address of the first page.
    pub start: u64,
    /// How many.
    pub count: usize,
}

/// Number of a page in a scratch area.
pub type Slot = usize;

/// The mapping at an address, as far as a batch cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vma {
    /// First byte.
    pub start: u64,
    /// Byte behind it.
    pub end: u64,
    /// PROT bits.
    pub prot: u8,
    /// What is mapped.
    pub kind: VmaKind,
}

/// What is mapped at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmaKind {
    /// Private anonymous memory.
    Anonymous,
    /// A private mapping of a segment of the store; `first` is the place of the mapping's first page.
    Store {
        /// Place of the mapping's first page, if the segment is one that the helper still has.
        first: Option<Place>,
    },
    /// Anything else.
    Other,
}

/// What the page table says of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageState {
    /// Nothing there, or the shared zero page. Where it makes no difference, also for a page that is swapped out.
    Absent,
    /// Anonymous and swapped out; somebody may still hold it, and write to it, in the swap cache.
    Swapped,
    /// Anonymous and mapped here only.
    Exclusive,
    /// Anonymous and mapped elsewhere too (a fork).
    Shared,
    /// A page of a file: of the store, if the mapping is the store's.
    File,
}

/// Why nothing can be merged right now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unsettled {
    /// The layout is not the one that the plan was made for.
    Layout,
    /// Threads were created since their robust lists were looked up.
    Threads,
    /// A stop reason is set, see [`abi::control::stop`].
    Stopped,
}

/// How pages are frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FreezeKind {
    /// UFFDIO_MOVE of anonymous pages.
    Move,
    /// mremap(DONTUNMAP) of pages inside a private store mapping.
    Remap,
}

/// What a window is registered for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegisterMode {
    /// Wait at pages that are missing.
    Missing,
    /// Wait at pages that are missing, also where the store could fill them in.
    MissingAndMinor,
    /// Only track writes.
    Track,
}

/// What a freeze did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frozen {
    /// Pages that are in the scratch area now, from the first of the run on.
    pub moved: usize,
    /// Why the next one is not, if not all are.
    pub failure: Option<Failure>,
}

/// Why a step could not be done, as far as the decision depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// EBUSY, EAGAIN: pinned, locked, not exclusive.
    Busy,
    /// ENOENT: not there.
    Absent,
    /// EINVAL, EACCES, EPERM: this mapping cannot be treated that way.
    Properties,
    /// ENOMEM, ENFILE: a limit.
    Limit,
}

/// The answer to the reference check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checked {
    /// `refs` holds each page's count.
    Counted,
    /// Nobody holds any of the pages.
    AllFree,
    /// Somebody holds one of them, it is not known which.
    SomeHeld,
    /// No answer in time, or no check for this kind of page.
    Unknown,
}

/// An address space in which a batch runs. Every method is one step; none of them may wait for the program, nor for a
/// page that is frozen or has vanished from the scratch area: the gate is closed meanwhile.
///
/// Whoever runs the batch may be killed between any two steps, and inside of them. So a step may leave nothing behind
/// that a survivor cannot tell from the journal and from the page tables.
pub trait AddressSpace {
    /// Bytes of a page.
    fn page_size(&self) -> u64;

    /// Takes the gate for writing; `false` if a thread of the program is inside.
    fn close_gate(&mut self) -> bool;
    /// Opens the gate and wakes who waits there.
    fn open_gate(&mut self);
    /// Whether what the plan was made for still holds. Asked with the gate closed.
    ///
    /// # Errors
    /// What has changed. [`Unsettled::Stopped`] only if nothing else has: pages are un-merged in spite of it, and the
    /// robust lists must be known for that too.
    fn settled(&mut self) -> Result<(), Unsettled>;
    /// The mapping at an address, `None` for a hole.
    fn vma(&mut self, address: u64) -> Option<Vma>;
    /// What the page table says of `states.len()` pages from `start` on; `false` if it cannot be read.
    fn page_states(&mut self, start: u64, states: &mut [PageState]) -> bool;
    /// The gate's mark of a page; pages outside every managed range are excluded.
    fn mark(&self, address: u64) -> Mark;
    /// Changes the gate's marks.
    fn set_mark(&mut self, pages: Pages, mark: Mark);
    /// True if a page holds a thread's control block or robust-list head, or a neighbour does.
    fn holds_thread_data(&self, address: u64) -> bool;
    /// True if an entry of a robust list lies in a window. Asked before the freeze, since an owner that ends while its
    /// mutex is frozen releases nothing, and after it, since mutexes are locked meanwhile.
    fn robust_list_enters(&mut self, start: u64, end: u64) -> bool;

    /// Makes pages exclusive that a fork had marked as shared (MADV_POPULATE_WRITE). Only ever asked for pages that
    /// were just seen as [`PageState::Exclusive`].
    fn own(&mut self, pages: Pages);
    /// Registers a window with the userfaultfd.
    ///
    /// # Errors
    /// Why it could not be done. Parts of the window may be registered then; a batch takes them out again.
    fn register(&mut self, start: u64, end: u64, mode: RegisterMode) -> Result<(), Failure>;
    /// Takes a window out again, piece by piece where it must, and wakes who waits there.
    fn unregister(&mut self, start: u64, end: u64);
    /// Wakes who waits in a window, also at pages that are out of the registration since their mapping was replaced.
    fn wake(&mut self, start: u64, end: u64);

    /// Says that scratch slots from `slot` on belong to `pages`, before they are moved there.
    fn journal(&mut self, kind: FreezeKind, slot: Slot, pages: Pages);
    /// Says that a batch begins and which window it is going to register, before it does. No scratch slot belongs to
    /// any page until [`AddressSpace::journal`] says so.
    fn journal_begin(&mut self, kind: FreezeKind, start: u64, end: u64);
    /// Says that nothing is frozen any more.
    fn journal_end(&mut self);

    /// Moves pages to the scratch area, from `slot` on. Registered before, they are waited for from now on.
    fn freeze(&mut self, kind: FreezeKind, pages: Pages, slot: Slot) -> Frozen;
    /// Moves pages back from the scratch area; falls back to copying. A slot that holds nothing (its page was freed
    /// lazily and has vanished) is given back as it is. `false` only if the content is still in the scratch area and
    /// could not be given back in any way; the batch then ends as [`Ended::Trapped`](crate::Ended::Trapped).
    fn thaw(&mut self, kind: FreezeKind, pages: Pages, slot: Slot) -> bool;
    /// Gives the mapping of scratch pages `0..slots` of store mappings another protection. `false` if that was refused.
    fn protect_frozen(&mut self, slots: usize, prot: u8) -> bool;
    /// True if a survivor could read frozen pages that nobody may read, to give them back.
    fn survivors_read_all(&self) -> bool;
    /// Waits until everybody who writes to pages under the read lock of the mapping has finished.
    fn barrier(&mut self);
    /// What the page table says of scratch pages `0..states.len()`; `false` if it cannot be read. Asked after the
    /// freeze, when nothing but reclaim can change the answer any more. Unlike [`AddressSpace::page_states`] it has to
    /// tell [`PageState::Swapped`] from [`PageState::Absent`].
    fn scratch_states(&mut self, kind: FreezeKind, states: &mut [PageState]) -> bool;
    /// Who else holds scratch pages `0..refs.len()`. For [`Checked::Counted`] the count of a page that nobody holds is
    /// 1, and anything but 1 where it could not be read (a hole, a page that is swapped out). [`Checked::AllFree`]
    /// need not cover what comes behind a slot that holds no page: see [`AddressSpace::scratch_states`].
    fn check(&mut self, kind: FreezeKind, refs: &mut [u32]) -> Checked;
    /// True if a scratch page equals a store page, all bytes of it. False for a place that the store does not have.
    fn equals_store(&mut self, kind: FreezeKind, slot: Slot, place: Place) -> bool;
    /// True if a scratch page holds only zeros.
    fn is_zero(&mut self, kind: FreezeKind, slot: Slot) -> bool;
    /// Puts a private mapping of the store over pages, with the protection and properties to keep.
    ///
    /// # Errors
    /// Why not; the old mapping is then still there, empty and registered, or has been made so by the implementation:
    /// the pages go back to it.
    fn map_store(&mut self, pages: Pages, place: Place, keep: Keep) -> Result<(), Failure>;
    /// Puts fresh anonymous memory over pages, with the protection and properties to keep.
    ///
    /// # Errors
    /// As [`AddressSpace::map_store`].
    fn map_anonymous(&mut self, pages: Pages, keep: Keep) -> Result<(), Failure>;
    /// Puts anonymous memory with the content of scratch pages over pages, in one step that no reader can see. The
    /// scratch pages can be read.
    ///
    /// # Errors
    /// Why not; then nothing has changed.
    fn map_copy(&mut self, pages: Pages, slot: Slot, keep: Keep) -> Result<(), Failure>;
    /// Frees scratch pages `0..slots`.
    fn discard_scratch(&mut self, kind: FreezeKind, slots: usize);

    /// Nanoseconds of a monotonic clock.
    fn now(&mut self) -> u64;
    /// Records how long pages were frozen.
    fn record_frozen(&mut self, nanoseconds: u64);
    /// Records that a batch mapped runs.
    fn record_runs(&mut self, runs: usize);
    /// Waits a moment before the gate is tried again.
    fn pause(&mut self);
}
