//! The table of segments: numbers, descriptors, fingerprints. Forty bytes each, so that a strict partition of lone
//! pages stays below 64 bytes a page with everything.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};

use kernel::{Bytes, MemfdError, memfd, page_size};
use page::{Fingerprint, Place, SegmentId};

use crate::mappings::FILE_NAME;

/// Bits of a [`SegmentId`] that number the slot; the rest count how often the slot was used.
const SLOT_BITS: u32 = 22;
const SLOTS: u32 = 1 << SLOT_BITS;

/// The contents of a segment in order. A lone page, the usual case of strict partitions, needs no allocation.
enum Contents {
    One(Fingerprint),
    Many(Box<[Fingerprint]>),
}

impl Contents {
    fn as_slice(&self) -> &[Fingerprint] {
        match self {
            Self::One(fingerprint) => std::slice::from_ref(fingerprint),
            Self::Many(fingerprints) => fingerprints,
        }
    }

    /// Bytes on the heap, with what an allocator needs for itself.
    fn heap_bytes(&self) -> usize {
        match self {
            Self::One(_) => 0,
            Self::Many(fingerprints) => size_of_val::<[Fingerprint]>(fingerprints) + 2 * size_of::<usize>(),
        }
    }
}

/// A segment that is not retired.
pub(crate) struct Segment {
    file: OwnedFd,
    contents: Contents,
    /// Pages of it that somebody maps, as last reported.
    pub(crate) pages_mapped: u32,
    /// When that number last rose or became zero, or the segment was made: tenths of a second since the partition was
    /// opened.
    pub(crate) changed: u32,
    generation: u16,
    /// No page of it is found any more.
    pub(crate) withdrawn: bool,
}

impl Segment {
    /// The descriptor, which can only be read.
    pub(crate) fn file(&self) -> &OwnedFd {
        &self.file
    }

    /// The fingerprints of its pages, in order.
    pub(crate) fn fingerprints(&self) -> &[Fingerprint] {
        self.contents.as_slice()
    }

    /// How many pages it has.
    pub(crate) fn pages(&self) -> u32 {
        u32::try_from(self.fingerprints().len()).expect("segments are small")
    }

    /// Reads one page; false where there is none of that number.
    pub(crate) fn read(&self, page: u32, buffer: &mut [u8]) -> Result<bool, MemfdError> {
        let read = memfd::pread(self.file.as_fd(), u64::from(page) * page_size(), buffer)?;
        Ok(read == buffer.len())
    }
}

/// What remembers a slot while it is free: how often it was used.
enum Slot {
    Used(Segment),
    Free { generation: u16 },
}

const _: () = assert!(size_of::<Slot>() == 40, "the bookkeeping of lone pages is reckoned with this");

/// All segments of a partition by number.
#[derive(Default)]
pub(crate) struct Segments {
    slots: Vec<Slot>,
    /// Free slots, longest free first.
    free: VecDeque<u32>,
    heap_bytes: usize,
}

impl Segments {
    /// The most segments there can be.
    pub(crate) const MOST: u32 = SLOTS;

    /// Enters a sealed file. `None` when all numbers are in use.
    pub(crate) fn add(&mut self, file: OwnedFd, fingerprints: &[Fingerprint], now: u32) -> Option<SegmentId> {
        let contents = match fingerprints {
            [one] => Contents::One(*one),
            many => Contents::Many(many.into()),
        };
        let heap_bytes = contents.heap_bytes();
        let (slot, generation) = self.next_slot()?;
        let segment = Segment { file, contents, pages_mapped: 0, changed: now, generation, withdrawn: false };
        self.heap_bytes += heap_bytes;
        self.slots[slot as usize] = Slot::Used(segment);
        Some(SegmentId(u32::from(generation) << SLOT_BITS | slot))
    }

    /// Takes a segment out: its descriptor is closed with the value returned.
    pub(crate) fn remove(&mut self, id: SegmentId) -> Option<Segment> {
        let generation = self.get(id)?.generation;
        let slot = id.0 & (SLOTS - 1);
        let next = (generation + 1) & ((1 << (u32::BITS - SLOT_BITS)) - 1);
        let Slot::Used(segment) = std::mem::replace(&mut self.slots[slot as usize], Slot::Free { generation: next })
        else {
            unreachable!("it was just found there")
        };
        self.free.push_back(slot);
        self.heap_bytes -= segment.contents.heap_bytes();
        Some(segment)
    }

    pub(crate) fn get(&self, id: SegmentId) -> Option<&Segment> {
        match self.slots.get((id.0 & (SLOTS - 1)) as usize)? {
            Slot::Used(segment) if u32::from(segment.generation) == id.0 >> SLOT_BITS => Some(segment),
            _ => None,
        }
    }

    pub(crate) fn get_mut(&mut self, id: SegmentId) -> Option<&mut Segment> {
        match self.slots.get_mut((id.0 & (SLOTS - 1)) as usize)? {
            Slot::Used(segment) if u32::from(segment.generation) == id.0 >> SLOT_BITS => Some(segment),
            _ => None,
        }
    }

    /// What a place is hashed by in the partition's table: its content.
    pub(crate) fn hash(&self, place: Place) -> u64 {
        let fingerprints = self.get(place.segment).map_or(&[][..], Segment::fingerprints);
        fingerprints.get(place.page as usize).map_or(0, |fingerprint| fingerprint.low())
    }

    /// All segments that are not retired.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (SegmentId, &Segment)> {
        (0..).zip(&self.slots).filter_map(|(slot, entry)| match entry {
            Slot::Used(segment) => Some((SegmentId(u32::from(segment.generation) << SLOT_BITS | slot), segment)),
            Slot::Free { .. } => None,
        })
    }

    /// Memory that the table takes, with what is reserved.
    pub(crate) fn bytes(&self) -> usize {
        self.slots.capacity() * size_of::<Slot>() + self.free.capacity() * size_of::<u32>() + self.heap_bytes
    }

    fn next_slot(&mut self) -> Option<(u32, u16)> {
        if let Some(slot) = self.free.pop_front() {
            let Slot::Free { generation } = self.slots[slot as usize] else { unreachable!("listed as free") };
            return Some((slot, generation));
        }
        let slot = u32::try_from(self.slots.len()).ok().filter(|slot| *slot < SLOTS)?;
        if self.slots.len() == self.slots.capacity() {
            // By a sixteenth, not twofold: half-empty tables are what bookkeeping usually is.
            self.slots.reserve_exact((self.slots.len() / 16).max(16));
        }
        self.slots.push(Slot::Free { generation: 0 });
        Some((slot, 0))
    }
}

/// A memory file with these pages and nothing else, sealed, mode 0400, and the descriptor that can only be read. The
/// one that could write is closed before this returns.
pub(crate) fn make_file<'a>(pages: u32, content: impl Iterator<Item = &'a [u8]>) -> Result<OwnedFd, MemfdError> {
    let file = memfd::create(FILE_NAME, Bytes(u64::from(pages) * page_size()))?;
    let mut offset = 0;
    for piece in content {
        memfd::pwrite(file.as_fd(), offset, piece)?;
        offset += piece.len() as u64;
    }
    debug_assert_eq!(offset, u64::from(pages) * page_size(), "no holes: whoever reads one fills it at his own cost");
    memfd::seal(file.as_fd())?;
    memfd::restrict_to_owner(file.as_fd())?;
    memfd::reopen_read_only(file.as_fd())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn file() -> OwnedFd {
        let page = vec![1; page_size() as usize];
        make_file(1, std::iter::once(&*page)).unwrap()
    }

    #[test]
    fn numbers_come_back_late_and_changed() {
        let mut segments = Segments::default();
        let content = [Fingerprint::from_u128(1)];
        let first = segments.add(file(), &content, 0).unwrap();
        let second = segments.add(file(), &content, 0).unwrap();
        assert!(segments.remove(first).is_some());
        assert!(segments.remove(first).is_none() && segments.get(first).is_none());
        assert!(segments.remove(second).is_some());
        let third = segments.add(file(), &content, 0).unwrap();
        let fourth = segments.add(file(), &content, 0).unwrap();
        assert_eq!(third.0 & (SLOTS - 1), first.0 & (SLOTS - 1), "longest free first");
        assert!(![first, second].contains(&third) && ![first, second].contains(&fourth));
        assert!(segments.get(first).is_none(), "a forgotten number finds nothing");
        assert_eq!(segments.iter().map(|(id, _)| id).collect::<Vec<_>>(), [third, fourth]);
    }

    #[test]
    fn a_slots_generations_wrap() {
        let mut segments = Segments::default();
        let content = [Fingerprint::from_u128(1), Fingerprint::from_u128(2)];
        let mut seen = std::collections::HashSet::new();
        for _ in 0..1 << (u32::BITS - SLOT_BITS) {
            let id = segments.add(file(), &content, 0).unwrap();
            assert!(seen.insert(id));
            segments.remove(id);
        }
        assert!(!seen.insert(segments.add(file(), &content, 0).unwrap()), "after a thousand lives");
    }
}
