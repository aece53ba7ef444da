//! What others do meanwhile: the program's threads, writers from outside, forks, reclaim.

use abi::mark::Mark;

use super::{Call, Kind, Recording, Table};

/// One act of another party, on the page with a number.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Event {
    /// A thread writes; if the page is frozen it waits.
    Write(usize, u64),
    /// A thread reads.
    Read(usize),
    /// Somebody takes a plain reference for writing (NFS, FUSE, process_vm_writev, a driver).
    Hold(usize),
    /// Somebody pins the page for DMA.
    Pin(usize),
    /// Whoever holds the page writes to it.
    HolderWrites(usize, u64),
    /// Whoever holds the page lets go.
    LetGo(usize),
    /// Somebody begins to write under the read lock of the mapping (/proc/PID/mem, ptrace).
    WriteUnderLock(usize, u64),
    /// A child shares the page from now on.
    Fork(usize),
    /// That child ends.
    ChildEnds(usize),
    SwapOut(usize),
    /// A thread locks a robust mutex in the page.
    Lock(usize),
    /// Reclaim takes a page that was freed lazily.
    Reclaim(usize),
    /// A call of the program through the gate: the page shall read as zero.
    DontNeed(usize),
    /// A call of the program through the gate: the page is gone.
    Unmap(usize),
}

impl Recording {
    /// Every other party that is due acts; whoever is at work may be killed.
    pub(super) fn tick(&mut self) {
        while let Some((_, event)) = self.schedule.get(self.acted).copied().filter(|(when, _)| *when <= self.step) {
            self.acted += 1;
            self.act(event);
        }
        let killed = self.kills.contains(&self.step);
        self.step += 1;
        if killed {
            std::panic::resume_unwind(Box::new(super::Killed));
        }
    }

    pub(crate) fn act(&mut self, event: Event) {
        match event {
            Event::Write(page, value) => self.write(self.address(page), value),
            Event::Read(page) => self.read(self.address(page)),
            Event::Hold(page) => self.take(page, false, None),
            Event::Pin(page) => self.take(page, true, None),
            Event::WriteUnderLock(page, value) => self.take(page, false, Some(value)),
            Event::HolderWrites(page, value) => {
                if let Some(index) = self.holder(page) {
                    self.write_as_holder(index, value);
                }
            }
            Event::LetGo(page) => {
                if let Some(index) = self.holder(page) {
                    self.release(index);
                }
            }
            Event::Fork(page) => self.fork(self.address(page)),
            Event::ChildEnds(page) => {
                if let Some(frame) = self.frame_of(self.address(page)) {
                    self.frames[frame].sharers = 0;
                }
            }
            Event::Lock(page) => {
                self.robust.insert(self.address(page));
            }
            Event::SwapOut(page) => self.swap_out(self.address(page)),
            Event::Reclaim(page) => self.reclaim(self.address(page)),
            Event::DontNeed(page) => self.call(Call::DontNeed(self.address(page))),
            Event::Unmap(page) => self.call(Call::Unmap(self.address(page))),
        }
    }

    fn holder(&self, page: usize) -> Option<usize> {
        let address = self.address(page);
        self.holders.iter().position(|holder| holder.address == address && holder.under_lock.is_none())
    }

    fn write(&mut self, address: u64, value: u64) {
        match self.fault_for_write(address) {
            Some(frame) => {
                self.frames[frame].content = value;
                self.frames[frame].lazy = false;
                self.expected.insert(address, value);
                self.lazily_freed.remove(&address);
            }
            None if self.pages.get(&address).is_some_and(Self::is_frozen) => self.waiting.push((address, value)),
            None => {}
        }
    }

    fn read(&mut self, address: u64) {
        let Some(page) = self.pages.get(&address).copied() else { return };
        if Self::is_frozen(&page) || page.keep.prot() & 1 == 0 {
            return;
        }
        assert!(self.reads_right(address), "a reader of {address:#x} sees {:?}", self.content(address));
        let content = self.content(address).expect("mapped");
        // What it has seen once is true from now on.
        self.expected.insert(address, content);
        let table = match (page.table, page.kind) {
            (Table::Swapped(frame), _) => Table::Frame(frame),
            (Table::Nothing, Kind::Store(_)) => Table::File,
            (table, _) => table,
        };
        self.pages.get_mut(&address).expect("mapped").table = table;
    }

    fn take(&mut self, page: usize, pin: bool, under_lock: Option<u64>) {
        if self.vouched && under_lock.is_none() {
            return;
        }
        let address = self.address(page);
        if let Some(frame) = self.fault_for_write(address) {
            self.hold(address, frame, pin, under_lock);
        }
    }

    fn write_as_holder(&mut self, index: usize, value: u64) {
        let holder = self.holders[index];
        self.frames[holder.frame].content = value;
        if holder.attached {
            self.expected.insert(holder.address, value);
            self.lazily_freed.remove(&holder.address);
        }
        self.frames[holder.frame].lazy = false;
    }

    /// Those who write under the read lock of the mapping come to an end.
    pub(super) fn drain_lock(&mut self) {
        while let Some(index) = self.holders.iter().position(|holder| holder.under_lock.is_some()) {
            let value = self.holders[index].under_lock.expect("just seen");
            self.write_as_holder(index, value);
            self.release(index);
        }
    }

    /// Everybody who holds a page writes to it a last time and lets go: who wrote earlier proves nothing.
    pub(crate) fn last_words(&mut self) {
        self.drain_lock();
        while let Some(index) = self.holders.len().checked_sub(1) {
            self.write_as_holder(index, 1000 + index as u64);
            self.release(index);
        }
    }

    /// The frame that belongs to a page, in its place or frozen.
    fn frame_of(&self, address: u64) -> Option<usize> {
        match self.table_of(address)? {
            Table::Frame(frame) | Table::Swapped(frame) => Some(frame),
            Table::Nothing | Table::File => None,
        }
    }

    fn table_of(&self, address: u64) -> Option<Table> {
        let here = self.pages.get(&address)?.table;
        if here != Table::Nothing {
            return Some(here);
        }
        let (kind, slot) = self.slot_of(address)?;
        Some(self.scratch[kind as usize][slot].table)
    }

    fn slot_of(&self, address: u64) -> Option<(crate::FreezeKind, usize)> {
        let kind = self.journal.kind?;
        let slot = self.journal.source[..self.journal.count].iter().position(|source| *source == address)?;
        Some((kind, slot))
    }

    fn set_table(&mut self, address: u64, table: Table) {
        let page = self.pages.get_mut(&address).expect("has a table entry");
        if page.table != Table::Nothing {
            page.table = table;
        } else if let Some((kind, slot)) = self.slot_of(address) {
            self.scratch[kind as usize][slot].table = table;
        }
    }

    /// Pages that somebody holds are left out: which process sees the holder's writes after a fork is a matter between
    /// the program and the kernel.
    fn fork(&mut self, address: u64) {
        let Some(frame) = self.frame_of(address) else { return };
        if self.frames[frame].refs + self.frames[frame].pins == 0 {
            self.frames[frame].sharers += 1;
            self.frames[frame].exclusive = false;
        }
    }

    fn swap_out(&mut self, address: u64) {
        if let Some(Table::Frame(frame)) = self.table_of(address)
            && self.frames[frame].pins == 0
        {
            self.set_table(address, Table::Swapped(frame));
        }
    }

    fn reclaim(&mut self, address: u64) {
        if let Some(Table::Frame(frame)) = self.table_of(address)
            && self.frames[frame].lazy
            && self.frames[frame].refs + self.frames[frame].pins == 0
        {
            self.set_table(address, Table::Nothing);
        }
    }

    fn call(&mut self, call: Call) {
        if self.gate_closed {
            self.at_gate.push(call);
            return;
        }
        let (Call::DontNeed(address) | Call::Unmap(address)) = call;
        let mark = self.marks.get(&address).copied().unwrap_or(Mark::EXCLUDED);
        let Some(page) = self.pages.get_mut(&address) else { return };
        if page.kind == Kind::Other {
            return;
        }
        match call {
            Call::DontNeed(_) => {
                if let Some(keep) = mark.keep() {
                    // Fresh memory instead of the store's.
                    page.kind = Kind::Anonymous;
                    page.keep = keep;
                    page.registered = None;
                    self.marks.insert(address, Mark::PLAIN);
                    self.changed_by_program.insert(address);
                    self.epoch += 1;
                }
                page.table = Table::Nothing;
                if mark != Mark::EXCLUDED || page.kind == Kind::Anonymous {
                    self.expected.insert(address, 0);
                } else {
                    let content = self.content(address).expect("mapped");
                    self.expected.insert(address, content);
                }
            }
            Call::Unmap(_) => {
                self.pages.remove(&address);
                self.expected.remove(&address);
                self.marks.insert(address, Mark::PLAIN);
                self.changed_by_program.insert(address);
                self.waiting.retain(|(waiter, _)| *waiter != address);
                self.epoch += 1;
            }
        }
        self.lazily_freed.remove(&address);
        self.detach(address);
    }

    pub(super) fn let_in(&mut self) {
        for call in std::mem::take(&mut self.at_gate) {
            self.call(call);
        }
    }

    /// Those who wait in a window look again.
    pub(super) fn wake_waiters(&mut self, start: u64, end: u64) {
        let (woken, asleep) =
            std::mem::take(&mut self.waiting).into_iter().partition(|(address, _)| (start..end).contains(address));
        self.waiting = asleep;
        for (address, value) in woken {
            self.write(address, value);
        }
    }
}
