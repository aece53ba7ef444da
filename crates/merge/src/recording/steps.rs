//! The steps of a batch. Each is preceded by a moment in which others act, and in which the batch may be killed; the
//! longer ones have such moments inside too.

use abi::mark::{Keep, Mark};
use abi::place::Place;

use super::{Kind, Oracle, Page, Recording, ScratchPage, Table, VACANT};
use crate::space::{
    AddressSpace, Checked, Failure, FreezeKind, Frozen, PageState, Pages, RegisterMode, Slot, Unsettled, Vma,
};

impl Recording {
    fn addresses(&self, pages: Pages) -> Vec<u64> {
        (0..pages.count).map(|offset| pages.start + offset as u64 * self.page_size).collect()
    }

    fn registered(&self, start: u64, end: u64) -> Vec<u64> {
        self.pages.range(start..end).map(|(address, _)| *address).collect()
    }

    fn state(&self, table: Table, swapped: PageState) -> PageState {
        match table {
            Table::Frame(frame) if self.frames[frame].sharers == 0 => PageState::Exclusive,
            Table::Frame(_) => PageState::Shared,
            Table::File => PageState::File,
            Table::Swapped(_) => swapped,
            Table::Nothing => PageState::Absent,
        }
    }

    /// Counts a call that can fail and says whether this one does.
    fn fails(count: &mut usize, fault: Option<(usize, Failure)>) -> Result<(), Failure> {
        let now = *count;
        *count += 1;
        match fault {
            Some((when, failure)) if when == now => Err(failure),
            _ => Ok(()),
        }
    }

    /// Puts new mappings over pages: what was in the table there is gone.
    fn map_over(&mut self, pages: Pages, keep: Keep, mapping: impl Fn(&mut Self, usize) -> (Kind, Table)) {
        assert!(self.gate_closed, "a mapping is replaced with the gate open");
        for (offset, address) in self.addresses(pages).into_iter().enumerate() {
            let (kind, table) = mapping(self, offset);
            let island = self.pages.get(&address).expect("only what is mapped is mapped over").island;
            self.pages.insert(address, Page { kind, keep, registered: None, table, island });
            self.worked_on.insert(address);
        }
    }

    fn freeze_page(&mut self, address: u64, slot: Slot) -> Result<(), Failure> {
        let page = self.pages.get_mut(&address).ok_or(Failure::Absent)?;
        let movable = page.kind == Kind::Anonymous && page.keep.prot() & 2 != 0;
        let (Table::Frame(frame) | Table::Swapped(frame)) = page.table else { return Err(Failure::Absent) };
        if !movable {
            return Err(Failure::Properties);
        }
        if self.frames[frame].pins > 0 || !self.frames[frame].exclusive {
            return Err(Failure::Busy);
        }
        self.scratch[FreezeKind::Move as usize][slot] = ScratchPage { table: page.table, ..VACANT };
        page.table = Table::Nothing;
        self.worked_on.insert(address);
        Ok(())
    }

    /// One page back: by moving, or else by copying what is registered and empty.
    fn thaw_page(&mut self, kind: FreezeKind, address: u64, slot: Slot) -> bool {
        let thawed = self.calls.thawed;
        self.calls.thawed += 1;
        if self.faults.thaw_fails == Some(thawed) {
            return false;
        }
        let frozen = self.scratch[kind as usize][slot];
        let Some(page) = self.pages.get_mut(&address) else { return false };
        let moved = kind == FreezeKind::Remap && frozen.table != Table::Nothing;
        assert!(!moved || frozen.readable == (page.keep.prot() & 1 != 0), "{address:#x} has another protection now");
        let held = |frame: usize| self.frames[frame].refs + self.frames[frame].pins > 0;
        let (copy, content) = match frozen.table {
            Table::Frame(frame) | Table::Swapped(frame) => {
                let refused = kind == FreezeKind::Move && !self.frames[frame].exclusive;
                let copies = self.faults.thaw_copies.is_some_and(|from| thawed >= from);
                // What a holder writes after a copy is lost. The model keeps to moving there.
                (refused || copies && !held(frame), self.frames[frame].content)
            }
            Table::Nothing | Table::File => (false, 0),
        };
        if copy {
            if page.registered.is_none() || page.table != Table::Nothing {
                return page.table != Table::Nothing;
            }
            let new = self.new_frame(content);
            self.pages.get_mut(&address).expect("just seen").table = Table::Frame(new);
            self.wake_waiters(address, address + 1);
            return true;
        }
        if kind == FreezeKind::Move {
            if frozen.table == Table::Nothing {
                return true;
            }
            if page.registered.is_none() || page.table != Table::Nothing {
                return false;
            }
            page.table = frozen.table;
            self.scratch[kind as usize][slot] = VACANT;
            self.wake_waiters(address, address + 1);
        } else {
            // The mapping comes back with the page, and without its registration.
            let place = frozen.under.expect("a slot that holds a mapping");
            *page = Page { kind: Kind::Store(place), registered: None, table: frozen.table, ..*page };
            self.scratch[kind as usize][slot] = VACANT;
        }
        true
    }
}

impl AddressSpace for Recording {
    fn page_size(&self) -> u64 {
        self.page_size
    }

    fn close_gate(&mut self) -> bool {
        self.tick();
        assert!(!self.gate_closed, "the gate is closed twice");
        if self.faults.busy > 0 {
            self.faults.busy -= 1;
            return false;
        }
        self.gate_closed = true;
        true
    }

    fn open_gate(&mut self) {
        self.tick();
        self.gate_closed = false;
        self.let_in();
    }

    fn settled(&mut self) -> Result<(), Unsettled> {
        self.tick();
        let now = self.calls.settled;
        self.calls.settled += 1;
        match self.faults.settled {
            Some((when, reason)) if when == now => Err(reason),
            _ if self.epoch != self.planned_epoch => Err(Unsettled::Layout),
            _ => Ok(()),
        }
    }

    fn vma(&mut self, address: u64) -> Option<Vma> {
        self.tick();
        self.mapping(address)
    }

    fn page_states(&mut self, start: u64, states: &mut [PageState]) -> bool {
        self.tick();
        if self.faults.no_states {
            return false;
        }
        for (index, state) in states.iter_mut().enumerate() {
            let address = start.checked_add(index as u64 * self.page_size).expect("states of pages that exist");
            let table = self.pages.get(&address).map_or(Table::Nothing, |page| page.table);
            *state = self.state(table, PageState::Absent);
        }
        true
    }

    fn mark(&self, address: u64) -> Mark {
        self.marks.get(&address).copied().unwrap_or(Mark::EXCLUDED)
    }

    fn set_mark(&mut self, pages: Pages, mark: Mark) {
        for address in self.addresses(pages) {
            self.tick();
            self.marks.insert(address, mark);
            self.worked_on.insert(address);
        }
    }

    fn holds_thread_data(&self, address: u64) -> bool {
        self.thread_data.contains(&address)
    }

    fn robust_list_enters(&mut self, start: u64, end: u64) -> bool {
        self.tick();
        self.robust.range(start..end).next().is_some()
    }

    fn own(&mut self, pages: Pages) {
        for address in self.addresses(pages) {
            self.tick();
            // A fork or reclaim since the look costs a page of memory, and no content.
            let _ = self.fault_for_write(address);
        }
    }

    fn register(&mut self, start: u64, end: u64, mode: RegisterMode) -> Result<(), Failure> {
        self.tick();
        let result = Self::fails(&mut self.calls.register, self.faults.register);
        let pages = self.registered(start, end);
        if pages.len() as u64 != (end - start) / self.page_size {
            return Err(Failure::Properties);
        }
        let some = match result {
            Ok(()) => pages.len(),
            // Whose they are is looked at before the first is registered.
            Err(Failure::Busy) => 0,
            Err(_) => pages.len().div_ceil(2),
        };
        for address in &pages[..some] {
            self.pages.get_mut(address).expect("just seen").registered = Some(mode);
        }
        result
    }

    fn unregister(&mut self, start: u64, end: u64) {
        for address in self.registered(start, end) {
            self.tick();
            // What has been unmapped meanwhile is out as well.
            let Some(page) = self.pages.get_mut(&address) else { continue };
            if page.registered.take().is_some() {
                self.wake_waiters(address, address + 1);
            }
        }
    }

    fn wake(&mut self, start: u64, end: u64) {
        self.tick();
        self.wake_waiters(start, end);
    }

    fn journal(&mut self, kind: FreezeKind, slot: Slot, pages: Pages) {
        assert_eq!(self.journal.kind, Some(kind), "a slot is journalled before the batch is");
        for (offset, address) in self.addresses(pages).into_iter().enumerate() {
            self.tick();
            self.journal.source[slot + offset] = address;
        }
        self.tick();
        self.journal.count = slot + pages.count;
    }

    fn journal_begin(&mut self, kind: FreezeKind, start: u64, end: u64) {
        self.tick();
        assert_eq!(self.journal.kind, None, "two batches at a time");
        self.journal.count = 0;
        self.tick();
        self.journal.window = (start, end);
        self.tick();
        self.journal.kind = Some(kind);
    }

    fn journal_end(&mut self) {
        self.tick();
        self.journal.kind = None;
        self.tick();
        self.journal.count = 0;
    }

    fn freeze(&mut self, kind: FreezeKind, pages: Pages, slot: Slot) -> Frozen {
        assert!(self.gate_closed, "pages are frozen with the gate open");
        let addresses = self.addresses(pages);
        for (offset, address) in addresses.iter().enumerate() {
            let journalled = self.journal.source[..self.journal.count].get(slot + offset) == Some(address);
            assert!(journalled && self.journal.kind == Some(kind), "{address:#x} is frozen and not in the journal");
            let registered = self.pages.get(address).is_some_and(|page| page.registered.is_some());
            assert!(registered, "{address:#x} is frozen and nobody would wait");
        }
        match kind {
            FreezeKind::Move => {
                for (moved, address) in addresses.iter().enumerate() {
                    self.tick();
                    if let Err(failure) = self.freeze_page(*address, slot + moved) {
                        return Frozen { moved, failure: Some(failure) };
                    }
                }
                Frozen { moved: pages.count, failure: None }
            }
            FreezeKind::Remap => {
                self.tick();
                let moved = pages.count.min(self.faults.remap.unwrap_or(usize::MAX));
                for (offset, address) in addresses[..moved].iter().enumerate() {
                    let page = self.pages.get_mut(address).expect("registered");
                    let Kind::Store(place) = page.kind else { panic!("{address:#x} is not the store's") };
                    let readable = page.keep.prot() & 1 != 0;
                    let slot = &mut self.scratch[kind as usize][slot + offset];
                    *slot = ScratchPage { table: page.table, under: Some(place), readable };
                    page.table = Table::Nothing;
                    self.worked_on.insert(*address);
                }
                Frozen { moved, failure: (moved < pages.count).then_some(Failure::Limit) }
            }
        }
    }

    fn thaw(&mut self, kind: FreezeKind, pages: Pages, slot: Slot) -> bool {
        let mut whole = true;
        for (offset, address) in self.addresses(pages).into_iter().enumerate() {
            self.tick();
            whole &= self.thaw_page(kind, address, slot + offset);
        }
        whole
    }

    fn protect_frozen(&mut self, slots: usize, prot: u8) -> bool {
        self.tick();
        for slot in &mut self.scratch[FreezeKind::Remap as usize][..slots] {
            slot.readable = prot & 1 != 0;
        }
        true
    }

    fn survivors_read_all(&self) -> bool {
        !self.strict
    }

    fn barrier(&mut self) {
        self.tick();
        self.drain_lock();
    }

    fn scratch_states(&mut self, kind: FreezeKind, states: &mut [PageState]) -> bool {
        self.tick();
        if self.faults.no_states {
            return false;
        }
        for (slot, state) in states.iter_mut().enumerate() {
            *state = self.state(self.scratch[kind as usize][slot].table, PageState::Swapped);
        }
        true
    }

    fn check(&mut self, kind: FreezeKind, refs: &mut [u32]) -> Checked {
        self.tick();
        let now = self.calls.check;
        self.calls.check += 1;
        if self.faults.check == Some(now) {
            return Checked::Unknown;
        }
        let slots = &self.scratch[kind as usize][..refs.len()];
        let holders = |frame: usize| self.frames[frame].refs + 1024 * self.frames[frame].pins;
        match self.oracle {
            Oracle::Exact => {
                for (count, slot) in refs.iter_mut().zip(slots) {
                    *count = match slot.table {
                        Table::Frame(frame) => 1 + self.frames[frame].sharers + holders(frame),
                        Table::File => 3,
                        Table::Swapped(_) | Table::Nothing => 0,
                    };
                }
                Checked::Counted
            }
            Oracle::Collapse if kind == FreezeKind::Move => {
                for slot in slots {
                    match slot.table {
                        Table::Frame(frame) if holders(frame) > 0 => return Checked::SomeHeld,
                        Table::Frame(_) | Table::Swapped(_) => {}
                        Table::Nothing | Table::File => break,
                    }
                }
                Checked::AllFree
            }
            Oracle::Collapse | Oracle::None => Checked::Unknown,
        }
    }

    fn equals_store(&mut self, kind: FreezeKind, slot: Slot, place: Place) -> bool {
        self.tick();
        let vanished = kind == FreezeKind::Move && self.scratch[kind as usize][slot].table == Table::Nothing;
        !vanished && self.stored(place) == Some(self.scratch_content(kind, slot))
    }

    fn is_zero(&mut self, kind: FreezeKind, slot: Slot) -> bool {
        self.tick();
        let vanished = kind == FreezeKind::Move && self.scratch[kind as usize][slot].table == Table::Nothing;
        !vanished && self.scratch_content(kind, slot) == 0
    }

    fn map_store(&mut self, pages: Pages, place: Place, keep: Keep) -> Result<(), Failure> {
        self.tick();
        Self::fails(&mut self.calls.map, self.faults.map)?;
        let places: Option<Vec<Place>> = (0..pages.count)
            .map(|offset| Some(Place { page: place.page.checked_add(offset as u32)?, ..place }))
            .map(|place| place.filter(|place| self.stored(*place).is_some()))
            .collect();
        let places = places.expect("what is mapped was compared with the store, page by page");
        self.map_over(pages, keep, |_, offset| (Kind::Store(places[offset]), Table::Nothing));
        Ok(())
    }

    fn map_anonymous(&mut self, pages: Pages, keep: Keep) -> Result<(), Failure> {
        self.tick();
        Self::fails(&mut self.calls.map, self.faults.map)?;
        self.map_over(pages, keep, |_, _| (Kind::Anonymous, Table::Nothing));
        Ok(())
    }

    fn map_copy(&mut self, pages: Pages, slot: Slot, keep: Keep) -> Result<(), Failure> {
        self.tick();
        Self::fails(&mut self.calls.map, self.faults.map)?;
        self.map_over(pages, keep, |space, offset| {
            let slot = slot + offset;
            assert!(space.scratch[FreezeKind::Remap as usize][slot].readable, "the copier meets SIGSEGV");
            let content = space.scratch_content(FreezeKind::Remap, slot);
            let frame = space.new_frame(content);
            (Kind::Anonymous, Table::Frame(frame))
        });
        Ok(())
    }

    fn discard_scratch(&mut self, kind: FreezeKind, slots: usize) {
        self.tick();
        self.scratch[kind as usize][..slots].fill(VACANT);
    }

    fn now(&mut self) -> u64 {
        self.step as u64
    }

    fn record_frozen(&mut self, _nanoseconds: u64) {}

    fn record_runs(&mut self, runs: usize) {
        self.runs += runs;
    }

    fn pause(&mut self) {
        self.tick();
    }
}
