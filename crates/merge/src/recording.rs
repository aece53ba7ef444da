//! An address space in memory, for tests: mappings, page table, scratch areas, journal, marks, gate and store, and the
//! other parties that act between any two steps. It knows at any time what each page has to read as.
//!
//! A page's content is one number; writing replaces all of it. Whoever runs a batch here can be killed at any step
//! and inside of the longer ones, see [`Recording::kills`]; [`Recording::recover`] is what a survivor does then.

mod parties;
mod recovery;
mod steps;

use std::collections::{BTreeMap, BTreeSet};

use abi::BATCH_MAX;
use abi::mark::{Keep, Mark};
use abi::place::Place;

use crate::space::{Failure, FreezeKind, RegisterMode, Unsettled, Vma, VmaKind};

pub(crate) use parties::Event;

/// What somebody who is killed unwinds with.
pub(crate) struct Killed;

/// First page of every recorded range.
pub(crate) const BASE: u64 = 1 << 30;
pub(crate) const READ_WRITE: Keep = Keep::from_bits(3);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Anonymous,
    Store(Place),
    Other,
}

/// A page table entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Table {
    Nothing,
    Frame(usize),
    /// The store's page, read-only.
    File,
    /// In the swap cache: who holds the frame can write to it on.
    Swapped(usize),
}

/// Anonymous memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frame {
    pub(crate) content: u64,
    /// PageAnonExclusive: cleared by a fork, and not set again by the child's end.
    pub(crate) exclusive: bool,
    /// Other processes that map it.
    pub(crate) sharers: u32,
    /// Plain references from outside.
    pub(crate) refs: u32,
    /// References that count as pins.
    pub(crate) pins: u32,
    /// Freed lazily and not written since: reclaim may take it at any time.
    pub(crate) lazy: bool,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Page {
    pub(crate) kind: Kind,
    pub(crate) keep: Keep,
    pub(crate) registered: Option<RegisterMode>,
    pub(crate) table: Table,
    /// Pages of different islands lie in different mappings.
    pub(crate) island: u32,
}

/// A page of a scratch area.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ScratchPage {
    pub(crate) table: Table,
    /// What the mapping shows where the table has nothing: mappings move along with mremap.
    pub(crate) under: Option<Place>,
    readable: bool,
}

const VACANT: ScratchPage = ScratchPage { table: Table::Nothing, under: None, readable: true };

#[derive(Clone, Debug)]
pub(crate) struct Journal {
    pub(crate) kind: Option<FreezeKind>,
    pub(crate) count: usize,
    pub(crate) window: (u64, u64),
    pub(crate) source: [u64; BATCH_MAX],
}

/// Which reference check there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Oracle {
    Exact,
    Collapse,
    None,
}

/// What goes wrong, and when: numbers count the calls of a step from 0.
#[derive(Clone, Debug, Default)]
pub(crate) struct Faults {
    /// How often the gate is busy.
    pub(crate) busy: usize,
    pub(crate) settled: Option<(usize, Unsettled)>,
    pub(crate) no_states: bool,
    pub(crate) register: Option<(usize, Failure)>,
    /// The most pages that one mremap takes along.
    pub(crate) remap: Option<usize>,
    pub(crate) map: Option<(usize, Failure)>,
    /// The check that is not answered.
    pub(crate) check: Option<usize>,
    /// Moving back fails from this page on, and content has to be copied.
    pub(crate) thaw_copies: Option<usize>,
    /// This page cannot be given back at all.
    pub(crate) thaw_fails: Option<usize>,
}

/// Somebody with a reference to a frame that was taken through a page.
#[derive(Clone, Copy, Debug)]
struct Holder {
    address: u64,
    frame: usize,
    pin: bool,
    /// False once the program itself has got another frame at that page.
    attached: bool,
    /// What it writes if it writes under the read lock of the mapping.
    under_lock: Option<u64>,
}

/// A call of the program that changes mappings, and so passes the gate.
#[derive(Clone, Copy, Debug)]
enum Call {
    DontNeed(u64),
    Unmap(u64),
}

#[derive(Clone, Debug)]
pub(crate) struct Recording {
    page_size: u64,
    pub(crate) pages: BTreeMap<u64, Page>,
    pub(crate) frames: Vec<Frame>,
    store: BTreeMap<(u32, u32), u64>,
    pub(crate) marks: BTreeMap<u64, Mark>,
    pub(crate) scratch: [[ScratchPage; BATCH_MAX]; 2],
    pub(crate) journal: Journal,
    pub(crate) gate_closed: bool,
    /// Threads that wait for a frozen page, with what they want to write.
    pub(crate) waiting: Vec<(u64, u64)>,
    at_gate: Vec<Call>,
    holders: Vec<Holder>,
    /// What each page has to read as.
    pub(crate) expected: BTreeMap<u64, u64>,
    /// Pages that may also read as zero, having been freed lazily.
    lazily_freed: BTreeSet<u64>,
    /// Pages that the program itself has given other mappings.
    pub(crate) changed_by_program: BTreeSet<u64>,
    pub(crate) robust: BTreeSet<u64>,
    pub(crate) thread_data: BTreeSet<u64>,
    pub(crate) oracle: Oracle,
    pub(crate) vouched: bool,
    /// Whoever recovers may not read what its protection forbids.
    pub(crate) strict: bool,
    pub(crate) faults: Faults,
    epoch: u32,
    planned_epoch: u32,
    /// Steps so far, the pieces of the longer ones counted.
    pub(crate) step: usize,
    /// What others do, and before which step; ascending.
    pub(crate) schedule: Vec<(usize, Event)>,
    acted: usize,
    /// Steps at which whoever is at work is killed.
    pub(crate) kills: BTreeSet<usize>,
    calls: Calls,
    /// Every page that was moved or mapped over, or whose mark was changed.
    pub(crate) worked_on: BTreeSet<u64>,
    /// Most runs of one batch between two openings of the gate.
    pub(crate) runs: usize,
}

#[derive(Clone, Debug, Default)]
struct Calls {
    settled: usize,
    register: usize,
    map: usize,
    check: usize,
    thawed: usize,
}

/// How a page of a range begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Init {
    /// No mapping.
    Hole,
    /// Anonymous, never touched.
    Empty,
    Anonymous(u64),
    /// Shared with a child that is gone.
    WasShared(u64),
    /// Shared with a child that lives.
    Shared(u64),
    /// Somebody holds a plain reference.
    Held(u64),
    Pinned(u64),
    Lazy(u64),
    SwappedOut(u64),
    Excluded(u64),
    ReadOnly(u64),
    Other,
    /// In the store, not looked at yet.
    Clean(Place),
    /// In the store and in the page table.
    Mapped(Place),
    Diverged(Place, u64),
    DivergedShared(Place, u64),
    DivergedHeld(Place, u64),
    DivergedSharedHeld(Place, u64),
    DivergedSwapped(Place, u64),
    DivergedSwappedHeld(Place, u64),
    DivergedDontFork(Place, u64),
    /// In the store by somebody else's doing: not marked.
    Foreign(Place, u64),
    /// In the store, with PROT_NONE.
    Unreadable(Place, u64),
    /// Marked as merged though it is not: what a killed batch leaves.
    HalfMarked(u64),
}

impl Recording {
    /// An address space whose range has these pages, in one mapping where they are alike.
    pub(crate) fn new(page_size: u64, pages: &[Init]) -> Self {
        let mut store: BTreeMap<(u32, u32), u64> =
            (0..2).flat_map(|segment| (0..128).map(move |page| ((segment, page), u64::from(page % 5)))).collect();
        store.extend([((7, u32::MAX), 1), ((7, 0), 1)]);
        let mut new = Self {
            page_size,
            pages: BTreeMap::new(),
            frames: Vec::new(),
            store,
            marks: BTreeMap::new(),
            scratch: [[VACANT; BATCH_MAX]; 2],
            journal: Journal { kind: None, count: 0, window: (0, 0), source: [0; BATCH_MAX] },
            gate_closed: false,
            waiting: Vec::new(),
            at_gate: Vec::new(),
            holders: Vec::new(),
            expected: BTreeMap::new(),
            lazily_freed: BTreeSet::new(),
            changed_by_program: BTreeSet::new(),
            robust: BTreeSet::new(),
            thread_data: BTreeSet::new(),
            oracle: Oracle::Exact,
            vouched: false,
            strict: false,
            faults: Faults::default(),
            epoch: 0,
            planned_epoch: 0,
            step: 0,
            schedule: Vec::new(),
            acted: 0,
            kills: BTreeSet::new(),
            calls: Calls::default(),
            worked_on: BTreeSet::new(),
            runs: 0,
        };
        for (index, init) in pages.iter().enumerate() {
            new.put(index, *init);
        }
        new
    }

    /// Address of the page with this number.
    pub(crate) fn address(&self, index: usize) -> u64 {
        BASE + index as u64 * self.page_size
    }

    /// What the store holds at a place.
    pub(crate) fn stored(&self, place: Place) -> Option<u64> {
        self.store.get(&(place.segment, place.page)).copied()
    }

    pub(crate) fn put(&mut self, index: usize, init: Init) {
        let address = self.address(index);
        let frame = Frame { content: 0, exclusive: true, sharers: 0, refs: 0, pins: 0, lazy: false };
        let shared = Frame { exclusive: false, sharers: 1, ..frame };
        let anonymous = |content| (Kind::Anonymous, Some(Frame { content, ..frame }));
        let diverged = |place, content| (Kind::Store(place), Some(Frame { content, ..frame }));
        let (kind, frame) = match init {
            Init::Hole => {
                self.marks.insert(address, Mark::PLAIN);
                return;
            }
            Init::Empty => (Kind::Anonymous, None),
            Init::Anonymous(content)
            | Init::Held(content)
            | Init::Pinned(content)
            | Init::SwappedOut(content)
            | Init::Excluded(content)
            | Init::ReadOnly(content)
            | Init::HalfMarked(content) => anonymous(content),
            Init::WasShared(content) => (Kind::Anonymous, Some(Frame { content, exclusive: false, ..frame })),
            Init::Shared(content) => (Kind::Anonymous, Some(Frame { content, ..shared })),
            Init::Lazy(content) => (Kind::Anonymous, Some(Frame { content, lazy: true, ..frame })),
            Init::Other => (Kind::Other, None),
            Init::Clean(place) | Init::Mapped(place) => (Kind::Store(place), None),
            Init::Diverged(place, content)
            | Init::DivergedHeld(place, content)
            | Init::DivergedSwapped(place, content)
            | Init::DivergedSwappedHeld(place, content)
            | Init::DivergedDontFork(place, content)
            | Init::Foreign(place, content)
            | Init::Unreadable(place, content) => diverged(place, content),
            Init::DivergedShared(place, content) | Init::DivergedSharedHeld(place, content) => {
                (Kind::Store(place), Some(Frame { content, ..shared }))
            }
        };
        let keep = match init {
            Init::ReadOnly(_) => Keep::from_bits(1),
            Init::Unreadable(..) => Keep::from_bits(0),
            Init::DivergedDontFork(..) => READ_WRITE.with(Keep::DONTFORK, 0),
            _ => READ_WRITE,
        };
        let number = self.frames.len();
        let table = match init {
            Init::SwappedOut(_) | Init::DivergedSwapped(..) | Init::DivergedSwappedHeld(..) => Table::Swapped(number),
            Init::Mapped(_) => Table::File,
            _ if frame.is_some() => Table::Frame(number),
            _ => Table::Nothing,
        };
        self.frames.extend(frame);
        let mark = match (init, kind) {
            (Init::Excluded(_) | Init::Foreign(..), _) => Mark::EXCLUDED,
            (Init::HalfMarked(_), _) | (_, Kind::Store(_)) => Mark::merged(keep),
            _ => Mark::PLAIN,
        };
        self.marks.insert(address, mark);
        self.pages.insert(address, Page { kind, keep, registered: None, table, island: 0 });
        let content = self.content(address).expect("just put there");
        self.expected.insert(address, content);
        if matches!(init, Init::Lazy(_)) {
            self.lazily_freed.insert(address);
        }
        let held = matches!(
            init,
            Init::Held(_) | Init::DivergedHeld(..) | Init::DivergedSharedHeld(..) | Init::DivergedSwappedHeld(..)
        );
        if held || matches!(init, Init::Pinned(_)) {
            self.hold(address, number, !held, None);
        }
    }

    fn hold(&mut self, address: u64, frame: usize, pin: bool, under_lock: Option<u64>) {
        if pin {
            self.frames[frame].pins += 1;
        } else {
            self.frames[frame].refs += 1;
        }
        self.holders.push(Holder { address, frame, pin, attached: true, under_lock });
    }

    fn release(&mut self, index: usize) {
        let holder = self.holders.remove(index);
        if holder.pin {
            self.frames[holder.frame].pins -= 1;
        } else {
            self.frames[holder.frame].refs -= 1;
        }
    }

    fn new_frame(&mut self, content: u64) -> usize {
        self.frames.push(Frame { content, exclusive: true, sharers: 0, refs: 0, pins: 0, lazy: false });
        self.frames.len() - 1
    }

    /// What a page reads as, were it not frozen; `None` where nothing is mapped.
    pub(crate) fn content(&self, address: u64) -> Option<u64> {
        let page = self.pages.get(&address)?;
        Some(match (page.table, page.kind) {
            (Table::Frame(frame) | Table::Swapped(frame), _) => self.frames[frame].content,
            (_, Kind::Store(place)) => self.stored(place).expect("a mapping of the store shows what is there"),
            _ => 0,
        })
    }

    pub(crate) fn reads_right(&self, address: u64) -> bool {
        let content = self.content(address);
        content == self.expected.get(&address).copied() || content == Some(0) && self.lazily_freed.contains(&address)
    }

    /// What a page of a scratch area reads as.
    fn scratch_content(&self, kind: FreezeKind, slot: usize) -> u64 {
        let page = self.scratch[kind as usize][slot];
        match (page.table, page.under) {
            (Table::Frame(frame) | Table::Swapped(frame), _) => self.frames[frame].content,
            (_, Some(place)) => self.stored(place).expect("moved along with its mapping"),
            _ => 0,
        }
    }

    /// True if whoever touches a page waits.
    fn is_frozen(page: &Page) -> bool {
        page.table == Table::Nothing
            && match page.registered {
                Some(RegisterMode::Missing) => page.kind == Kind::Anonymous,
                // All of the store lies in the page cache.
                Some(RegisterMode::MissingAndMinor) => true,
                Some(RegisterMode::Track) | None => false,
            }
    }

    /// The program, or the kernel on its behalf, writes: which frame it gets. `None` if it cannot, or not now.
    fn fault_for_write(&mut self, address: u64) -> Option<usize> {
        let page = *self.pages.get(&address)?;
        if page.keep.prot() & 2 == 0 || page.kind == Kind::Other || Self::is_frozen(&page) {
            return None;
        }
        let frame = match page.table {
            Table::Frame(frame) | Table::Swapped(frame) if self.frames[frame].sharers == 0 => {
                self.frames[frame].exclusive = true;
                frame
            }
            Table::Frame(old) | Table::Swapped(old) => {
                self.frames[old].sharers -= 1;
                self.detach(address);
                self.new_frame(self.frames[old].content)
            }
            Table::Nothing | Table::File => self.new_frame(self.content(address)?),
        };
        self.pages.get_mut(&address)?.table = Table::Frame(frame);
        Some(frame)
    }

    /// From now on writes of earlier holders are not seen at this page any more, merged or not.
    fn detach(&mut self, address: u64) {
        for holder in self.holders.iter_mut().filter(|holder| holder.address == address) {
            holder.attached = false;
        }
    }

    /// The mapping at an address, as the kernel would join pages to it.
    fn mapping(&self, address: u64) -> Option<Vma> {
        let page = self.pages.get(&address)?;
        let joins = |before: &Page, next: &Page| {
            let kinds = match (before.kind, next.kind) {
                (Kind::Store(before), Kind::Store(next)) => {
                    before.segment == next.segment && before.page.checked_add(1) == Some(next.page)
                }
                (before, next) => before == next,
            };
            kinds && before.keep == next.keep && before.registered == next.registered && before.island == next.island
        };
        let (mut start, mut end) = (address, address + self.page_size);
        while let Some(before) = self.pages.get(&(start - self.page_size)).filter(|it| joins(it, &self.pages[&start])) {
            debug_assert!(before.kind != Kind::Other || page.kind == Kind::Other);
            start -= self.page_size;
        }
        while self.pages.get(&end).is_some_and(|next| joins(&self.pages[&(end - self.page_size)], next)) {
            end += self.page_size;
        }
        let kind = match self.pages[&start].kind {
            Kind::Anonymous => VmaKind::Anonymous,
            Kind::Store(first) => VmaKind::Store { first: Some(first) },
            Kind::Other => VmaKind::Other,
        };
        Some(Vma { start, end, prot: page.keep.prot(), kind })
    }
}
