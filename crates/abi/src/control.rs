//! The control area: one memfd for each member, mapped by its gate and helper, by the broker and by the guardian.
//!
//! It holds the gate's lock word, so that whoever survives can open the gate of a dead helper; the journal, which says
//! at any instant what lies frozen where; the reference check's question and answer; and the plan, the broker's order
//! to the helper. The member's program can write all of it. Nothing here is believed by the broker beyond the member's
//! own memory: counts are clamped, addresses are only ever used on the member's own address space.

use core::sync::atomic::{AtomicU32, AtomicU64};

use crate::frozen::BUCKETS;
use crate::{BATCH_MAX, PLAN_MAX};

/// First word of a control area.
pub const MAGIC: u64 = u64::from_le_bytes(*b"pagefold");
/// Changes with every change of the layout below.
pub const VERSION: u32 = 11;
/// Threads that can be inside the gate at one time; more of them wait.
pub const GATE_SLOTS: usize = 128;
/// Ranges that a process can have under management at one time.
pub const RANGES_MAX: usize = 128;
/// Pieces of the agent's own code: its image, trampolines near each object that it has patched, and the pages patched.
pub const OWN_CODE_MAX: usize = 32;
/// Threads whose robust lists are looked up; a process with more is left alone.
pub const HEADS_MAX: usize = 1024;

/// Reasons why nothing may be merged in this process any more, as bits of [`Control::stop`].
pub mod stop {
    /// The program registers memory with a userfaultfd of its own.
    pub const USERFAULTFD: u32 = 1;
    /// The program set up an io_uring, which can run madvise past the gate.
    pub const IO_URING: u32 = 2;
    /// The program uses priority-inheritance futexes, which fail on a frozen page.
    pub const PI_FUTEX: u32 = 4;
    /// The program locked all its memory.
    pub const MLOCKALL: u32 = 8;
    /// Code that the gate does not know was mapped executable.
    pub const UNKNOWN_CODE: u32 = 16;
    /// The owner asked to leave.
    pub const LEAVING: u32 = 32;
    /// An un-merge inside the gate failed, so the marks may be wrong: nothing new is merged.
    pub const BROKEN: u32 = 64;
    /// The program filters its own system calls, and forbids some that the gate makes.
    pub const FILTERED: u32 = 128;
}

/// Values of [`Control::policies`]: whether memory of the program may have a NUMA policy of its own (mbind).
pub mod policies {
    /// It has none: the gate has been there from the start.
    pub const NONE: u32 = 0;
    /// The gate came later, and has heard of none.
    pub const UNHEARD: u32 = 1;
    /// The program has asked for one.
    pub const SET: u32 = 2;
}

/// The reader-writer lock around everything that changes managed mappings.
///
/// A reader (a thread of the program inside a mapping call) writes its thread id into a free slot, then looks at
/// `writer`; the writer (the helper) sets `writer`, then looks at the slots. Slots instead of a count, because a
/// reader may be killed inside: the writer finds that its thread is gone and clears the slot.
#[repr(C)]
pub struct Gate {
    /// 0 open, 1 taken by the helper. Readers sleep on it.
    pub writer: AtomicU32,
    /// Thread ids of the readers inside, 0 for a free slot.
    pub slots: [AtomicU32; GATE_SLOTS],
}

/// States of [`Journal::state`].
pub mod journal {
    /// Nothing is frozen.
    pub const IDLE: u32 = 0;
    /// Plain pages: scratch page i belongs at `source[i]`.
    pub const PLAIN: u32 = 1;
    /// Pages of private store mappings: scratch page i of the second scratch area belongs at `source[i]`.
    pub const DIVERGED: u32 = 2;
}

/// What lies where while pages are frozen.
#[repr(C)]
pub struct Journal {
    /// One of [`journal`]. Written last when a batch begins and when it ends.
    pub state: AtomicU32,
    /// Entries of `source` that may be in use.
    pub count: AtomicU32,
    /// First byte of the window that is registered for waiting.
    pub window_start: AtomicU64,
    /// Byte behind that window.
    pub window_end: AtomicU64,
    /// Home address of each scratch page, 0 for none.
    pub source: [AtomicU64; BATCH_MAX],
}

/// States of [`Check::state`].
pub mod check {
    /// Nobody asks.
    pub const IDLE: u32 = 0;
    /// The helper asks.
    pub const ASKED: u32 = 1;
    /// The broker is reading the counts.
    pub const SERVING: u32 = 2;
    /// The answer is in `refs`.
    pub const ANSWERED: u32 = 3;
}

/// The helper's question "who else holds these pages?" and the broker's answer.
#[repr(C)]
pub struct Check {
    /// One of [`check`]; both sides sleep on it.
    pub state: AtomicU32,
    /// Pages asked about, from `address` on.
    pub count: AtomicU32,
    /// First page, in one of the scratch areas.
    pub address: AtomicU64,
    /// Reference count of each page; 0 where it could not be read.
    pub refs: [AtomicU32; BATCH_MAX],
}

/// States of [`Ask::state`].
pub mod ask {
    /// Nobody asks.
    pub const IDLE: u32 = 0;
    /// A thread of the program waits for its range to be un-merged.
    pub const ASKED: u32 = 1;
    /// Done; every page of the range has its own copy.
    pub const DONE: u32 = 2;
    /// It could not be done.
    pub const FAILED: u32 = 3;
    /// The helper is at it: its answer is for whoever has asked this.
    pub const SERVED: u32 = 4;
}

/// A request from the program's own threads to the helper: give this range its own pages back, keep the content.
#[repr(C)]
pub struct Ask {
    /// One of [`ask`]; the asking thread sleeps on it.
    pub state: AtomicU32,
    /// Thread id of whoever asks, 0 for nobody; the owner of the fields below.
    pub owner: AtomicU32,
    /// First byte.
    pub start: AtomicU64,
    /// Byte behind the range.
    pub end: AtomicU64,
}

/// States of [`Code::state`].
pub mod code {
    /// Nobody asks.
    pub const IDLE: u32 = 0;
    /// A thread of the program waits for the answer.
    pub const ASKED: u32 = 1;
    /// It may be mapped.
    pub const ADMITTED: u32 = 2;
    /// Nobody knows what it does: nothing may be merged when it is there.
    pub const REFUSED: u32 = 3;
    /// [`super::Code::fd`] of code that lies in no file.
    pub const NO_FILE: u32 = u32::MAX;
}

/// A question of the program's threads to the broker, before code is mapped that was not there when the program was
/// judged: could it change mappings by itself?
#[repr(C)]
pub struct Code {
    /// One of [`code`]; both sides sleep on it.
    pub state: AtomicU32,
    /// Thread id of whoever asks, 0 for nobody.
    pub owner: AtomicU32,
    /// Descriptor of the file, in the program's table, or [`code::NO_FILE`].
    pub fd: AtomicU32,
}

/// A range that the program handed over.
#[repr(C)]
pub struct RangeSlot {
    /// First byte; valid if `end` is not 0.
    pub start: AtomicU64,
    /// Byte behind the range, 0 for a free slot.
    pub end: AtomicU64,
}

/// States of [`Plan::state`].
pub mod plan {
    /// The broker may write a plan.
    pub const IDLE: u32 = 0;
    /// The helper may execute it.
    pub const READY: u32 = 1;
    /// The outcomes are there.
    pub const DONE: u32 = 2;
}

/// How a plan's pages are to be checked for references, in [`Plan::check`].
pub mod check_mode {
    /// The broker answers with exact counts.
    pub const BPF: u32 = 1;
    /// MADV_COLLAPSE of the scratch area tells; plain pages only.
    pub const COLLAPSE: u32 = 2;
    /// The owner vouches that nobody holds references.
    pub const VOUCH: u32 = 3;
}

/// Bits of [`Plan::flags`].
pub mod plan_flags {
    /// Register the window for write tracking again when the batch is over.
    pub const TRACK: u32 = 1;
    /// The process has forked: make pages exclusive before moving them. Nobody holds any of them.
    pub const FORKED: u32 = 2;
    /// The helper may give itself real-time priority for the length of a batch.
    pub const RAISE: u32 = 4;
    /// The broker has given the helper real-time priority for the whole plan, since it may not raise limits. After each
    /// batch the helper sleeps for a moment, for those who have waited for it, and it gives the priority back at the end.
    pub const RAISED: u32 = 8;
}

/// One order from the broker to the helper, all in one range of one layout.
#[repr(C)]
pub struct Plan {
    /// One of [`plan`].
    pub state: AtomicU32,
    /// Entries in use.
    pub count: AtomicU32,
    /// One of [`check_mode`].
    pub check: AtomicU32,
    /// Bits of [`plan_flags`].
    pub flags: AtomicU32,
    /// [`Control::layout_epoch`] at the time when the broker looked at the range.
    pub layout_epoch: AtomicU32,
    /// [`Control::thread_epoch`] at the time when the broker looked up the robust lists.
    pub thread_epoch: AtomicU32,
    /// Protection and properties of the range, see [`crate::mark::Keep`].
    pub keep: AtomicU32,
    /// Entries that the helper has finished.
    pub done: AtomicU32,
    /// First byte of the mapping as its owner made it.
    pub range_start: AtomicU64,
    /// Byte behind it; its last page is never merged.
    pub range_end: AtomicU64,
    /// Page addresses, ascending.
    pub address: [AtomicU64; PLAN_MAX],
    /// What to do with each, see [`crate::place::Action`].
    pub action: [AtomicU64; PLAN_MAX],
    /// What became of each, see [`crate::place::Outcome`].
    pub outcome: [AtomicU32; PLAN_MAX],
}

/// Where the threads' robust lists begin, as the broker found them.
#[repr(C)]
pub struct Heads {
    /// Entries in use.
    pub count: AtomicU32,
    /// Address of each thread's `struct robust_list_head`.
    pub address: [AtomicU64; HEADS_MAX],
    /// Whose it is: once that thread is gone its list says nothing any more.
    pub owner: [AtomicU32; HEADS_MAX],
}

/// Counters that only the helper and the gate know; pages or calls since the start.
#[repr(C)]
pub struct Counters {
    /// Batches that froze at least one page.
    pub batches: AtomicU64,
    /// Runs that were mapped.
    pub runs: AtomicU64,
    /// Calls that waited at the gate.
    pub gate_waits: AtomicU64,
    /// Pages whose store mapping a destructive call replaced by fresh memory.
    pub dropped: AtomicU64,
    /// Reference checks that were not answered in time.
    pub check_timeouts: AtomicU64,
    /// Pages that could not be moved back and were copied back.
    pub copied_back: AtomicU64,
    /// Nanoseconds of CPU time that the helper used.
    pub helper_cpu_ns: AtomicU64,
    /// Longest freeze in nanoseconds.
    pub frozen_max_ns: AtomicU64,
    /// Freezes by duration, see [`crate::frozen`].
    pub frozen: [AtomicU64; BUCKETS],
}

/// The whole area.
#[repr(C)]
pub struct Control {
    /// [`MAGIC`].
    pub magic: AtomicU64,
    /// [`VERSION`].
    pub version: AtomicU32,
    /// Bits of [`stop`].
    pub stop: AtomicU32,
    /// Process id of the program.
    pub member: AtomicU32,
    /// Process id of the helper, 0 before it is ready and after it has left, or after what it held is back.
    pub helper: AtomicU32,
    /// Not 0 once the broker may have taken it in. Before that it touches nothing, and nobody would give anything back.
    pub joined: AtomicU32,
    /// Doorbell: incremented for every message or request to the helper, which sleeps on it.
    pub bell: AtomicU32,
    /// Incremented by the gate for every call that changes a managed range's mapping or properties.
    pub layout_epoch: AtomicU32,
    /// Incremented by the gate before every creation of a thread, and with [`Control::forks`].
    pub thread_epoch: AtomicU32,
    /// Forks that passed the gate.
    pub forks: AtomicU32,
    /// The scratch area for plain pages, 2 MiB aligned.
    pub scratch: AtomicU64,
    /// The scratch area for pages of store mappings, [`BATCH_MAX`] pages.
    pub diverged_scratch: AtomicU64,
    /// The lock.
    pub gate: Gate,
    /// What lies where.
    pub journal: Journal,
    /// Reference check.
    pub check: Check,
    /// Requests of the program's threads.
    pub ask: Ask,
    /// Ranges under management.
    pub ranges: [RangeSlot; RANGES_MAX],
    /// Robust lists.
    pub heads: Heads,
    /// Counters.
    pub counters: Counters,
    /// The broker's order.
    pub plan: Plan,
    /// 1 while the broker or the guardian reads fork events and fills children: the journal must stay as it is.
    pub filling: AtomicU32,
    /// 1 while the helper puts frozen pages back, having seen that no fork is being dealt with. One that begins just
    /// then is not dealt with before this is over: its child gets what the parent's places hold.
    pub thawing: AtomicU32,
    /// Code that is about to be mapped.
    pub code: Code,
    /// The agent's own code, which is not to be judged.
    pub own_code: [RangeSlot; OWN_CODE_MAX],
    /// One of [`policies`].
    pub policies: AtomicU32,
}

impl core::fmt::Debug for Control {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Control").field("member", &self.member).field("helper", &self.helper).finish_non_exhaustive()
    }
}
