//! A slot: 192 bytes of the other process that hold the code for one thread, and what a later injector must know of it.
//!
//! The code of a slot is one system-call instruction, for whose arguments the injector sets the registers, and behind it
//! what brings the thread back to where it was: all registers that the call changed, from constants, and a jump. So
//! whoever dies while the thread is in there leaves a thread that goes on by itself. It uses no stack, changes no flag
//! and no floating-point state, and it needs no signal frame: rt_sigreturn would forget the rest of a sleep.
//!
//! A slot of zeros is free. A slot in use is written with its owner first, and made zeros again when the thread is known
//! to be outside. The code cannot mark it itself: the page is not writable.

use crate::units::{Bytes, Pid, Range, Vaddr};

/// Bytes of a slot.
pub(super) const SLOT: u64 = 192;
/// Bytes of its head.
pub(super) const HEAD: u64 = 64;
/// Bytes of its code.
pub(super) const CODE: usize = (SLOT - HEAD) as usize;

/// First word of a slot in use. Changes with every change of the layout: a slot of another version is not touched.
const MAGIC: u64 = u64::from_le_bytes(*b"pgfold-1");

/// The thread that a slot was written for. All of it must fit before a slot is said to be one's own: numbers come again,
/// a fork copies the page with what is in it, and another PID namespace has other numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Owner {
    /// Inode of the injector's PID namespace.
    pub(super) namespace: u32,
    pub(super) process: Pid,
    pub(super) thread: Pid,
    /// Clock ticks after boot.
    pub(super) process_start: u64,
    /// The same of the thread.
    pub(super) thread_start: u64,
}

/// The page that a stack pointer points into, as far as 32 bits tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StackPage(u32);

impl StackPage {
    pub(super) fn of(stack: u64) -> Self {
        Self((stack >> 12) as u32)
    }

    /// True if a thread with this stack pointer is still on that stack, and not much deeper or higher: so much that
    /// stacks of a scheduler in user space, side by side, are told apart.
    pub(super) fn is_near(self, stack: u64) -> bool {
        const NEAR: u32 = 4;
        let distance = Self::of(stack).0.wrapping_sub(self.0);
        distance.min(distance.wrapping_neg()) <= NEAR
    }

    /// True if it may be a page of this range.
    pub(super) fn may_be_in(self, range: Range) -> bool {
        u64::from(self.0.wrapping_sub(Self::of(range.start().0).0)) < range.len().0 >> 12
    }
}

/// What a slot begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) owner: Owner,
    /// Where the thread's stack was when the slot was written.
    pub(super) stack: StackPage,
    /// When the call that goes on in this slot is to end, in nanoseconds of the monotonic clock; 0 for none.
    pub(super) deadline: u64,
    /// The rest of its time at the moment of writing, for calls that take it by pointer: seconds, nanoseconds.
    pub(super) left: [u64; 2],
}

impl Head {
    pub(super) fn to_bytes(self) -> [u8; HEAD as usize] {
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        let owner = self.owner;
        let words = [
            MAGIC,
            pair(owner.process.0.cast_unsigned(), owner.thread.0.cast_unsigned()),
            owner.process_start,
            owner.thread_start,
            pair(owner.namespace, self.stack.0),
            self.deadline,
            self.left[0],
            self.left[1],
        ];
        let mut bytes = [0; HEAD as usize];
        for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    /// `None` if this is no head of a slot that this version wrote.
    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let word = |index: usize| Some(u64::from_ne_bytes(bytes.get(8 * index..8 * index + 8)?.try_into().ok()?));
        if word(0)? != MAGIC {
            return None;
        }
        let (numbers, more) = (word(1)?, word(4)?);
        let owner = Owner {
            namespace: more as u32,
            process: Pid((numbers as u32).cast_signed()),
            thread: Pid(((numbers >> 32) as u32).cast_signed()),
            process_start: word(2)?,
            thread_start: word(3)?,
        };
        Some(Self { owner, stack: StackPage((more >> 32) as u32), deadline: word(5)?, left: [word(6)?, word(7)?] })
    }
}

/// Where a slot lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot(pub(super) Vaddr);

impl Slot {
    /// Its first instruction, the system call.
    pub(super) fn code(self) -> Vaddr {
        self.0 + Bytes(HEAD)
    }

    /// The rest of the time, for calls that take it by pointer.
    pub(super) fn left(self) -> Vaddr {
        self.0 + Bytes(HEAD - 16)
    }

    pub(super) fn holds(self, address: u64) -> bool {
        (self.0.0..self.0.0 + SLOT).contains(&address)
    }

    /// The slots in the last page of `range` behind `used` bytes of it, the last first.
    pub(super) fn all(range: Range, used: u64) -> Vec<Self> {
        let first = (range.start().0 + used).max(range.end().0 - crate::units::page_size());
        let mut slots = Vec::new();
        let mut end = range.end().0;
        while end - SLOT >= first {
            end -= SLOT;
            slots.push(Self(Vaddr(end)));
        }
        slots
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn a_head_is_read_as_it_was_written() {
        let owner = Owner { namespace: 7, process: Pid(1), thread: Pid(i32::MAX), process_start: 3, thread_start: 4 };
        let head = Head { owner, stack: StackPage(9), deadline: u64::MAX - 1, left: [5, 6] };
        assert_eq!(Head::from_bytes(&head.to_bytes()), Some(head));
        assert_eq!(Head::from_bytes(&[0; 64]), None);
        assert_eq!(Head::from_bytes(&head.to_bytes()[..60]), None);
    }

    #[test]
    fn stacks_are_told_apart() {
        let page = StackPage::of(0x7fff_0001_0000);
        assert!(page.is_near(0x7fff_0001_0008) && page.is_near(0x7fff_0000_c000) && page.is_near(0x7fff_0001_4fff));
        let stack = Range::new(Vaddr(0x7fff_0000_f000), Vaddr(0x7fff_0001_1000)).unwrap();
        assert!(page.may_be_in(stack) && StackPage::of(0x7fff_0000_f008).may_be_in(stack));
        assert!(!StackPage::of(0x7fff_0001_1000).may_be_in(stack) && !StackPage::of(0x7fff_0000_e000).may_be_in(stack));
        assert!(!page.is_near(0x7fff_0000_bfff) && !page.is_near(0x7fff_0001_5000) && !page.is_near(0x7fff_1001_0000));
    }

    #[test]
    fn slots_stay_in_the_last_page_and_behind_what_is_used() {
        let page = crate::units::page_size();
        let range = Range::new(Vaddr(16 * page), Vaddr(18 * page)).unwrap();
        let slots = Slot::all(range, page + 6 * SLOT);
        assert_eq!(slots.len() as u64, (page - 6 * SLOT) / SLOT);
        assert_eq!(slots[0].0.0 + SLOT, range.end().0);
        assert!(slots.iter().all(|slot| slot.0.0 >= range.start().0 + page + 6 * SLOT));
        assert_eq!(Slot::all(range, 0).len() as u64, page / SLOT);
        assert_eq!(Slot::all(range, 2 * page), []);
        assert_eq!(slots[0].left().0 + 16, slots[0].code().0);
    }
}
