//! Two pages side by side: which words differ, what they look like, and where they lie.

use std::fmt;

use super::words::{Pointers, WordKind, has_high_entropy};

/// One word in which two pages differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DifferingWord {
    /// Offset within the page, in bytes.
    pub offset: u32,
    /// What the two pages hold there.
    pub words: (u64, u64),
    /// What both look like; [`WordKind::Other`] where they look different.
    pub kind: WordKind,
}

impl fmt::Display for DifferingWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "+{:#x} {:#x} | {:#x}", self.offset, self.words.0, self.words.1)
    }
}

/// How two pages differ.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// Every differing word, by offset.
    pub words: Vec<DifferingWord>,
    /// Words that are equal in both and neither zero nor masked: what makes the pages alike.
    pub alike: u32,
}

impl Difference {
    /// Compares two pages of the same length, each with the addresses of its own process.
    pub fn between(one: (&[u8], &Pointers), other: (&[u8], &Pointers)) -> Self {
        let (left, _) = one.0.as_chunks::<8>();
        let (right, _) = other.0.as_chunks::<8>();
        let mut difference = Self::default();
        for (offset, (left, right)) in (0_u32..).step_by(8).zip(left.iter().zip(right)) {
            let words = (u64::from_ne_bytes(*left), u64::from_ne_bytes(*right));
            if words.0 == words.1 {
                difference.alike += u32::from(words.0 != 0 && !has_high_entropy(words.0));
                continue;
            }
            let kinds = (one.1.kind(words.0), other.1.kind(words.1));
            let kind = if kinds.0 == kinds.1 { kinds.0 } else { WordKind::Other };
            let hidden = || holds_unaligned(one, offset as usize) && holds_unaligned(other, offset as usize);
            let kind = if kind != WordKind::Pointer && hidden() { WordKind::Pointer } else { kind };
            // An address that differs by whole pages is alike as far as the layout goes.
            difference.alike += u32::from(kind == WordKind::Pointer && (words.0 ^ words.1) & 0xfff == 0);
            difference.words.push(DifferingWord { offset, words, kind });
        }
        difference
    }

    /// Differing words of a kind.
    pub fn count(&self, kind: WordKind) -> u32 {
        self.words.iter().filter(|word| word.kind == kind).count() as u32
    }

    /// Whether every differing word is of one of these kinds.
    pub(super) fn only(&self, kinds: &[WordKind]) -> bool {
        self.words.iter().all(|word| kinds.contains(&word.kind))
    }
}

/// Whether a word at `offset` is part of an address that begins at an even offset in or before it, as in byte code.
fn holds_unaligned((page, pointers): (&[u8], &Pointers), offset: usize) -> bool {
    [2, 4, 6].into_iter().flat_map(|by| [offset.checked_sub(by), Some(offset + by)]).flatten().any(|start| {
        let bytes = page.get(start..start + 8).and_then(|bytes| bytes.try_into().ok());
        bytes.is_some_and(|bytes| {
            let word = u64::from_ne_bytes(bytes);
            word >> 40 != 0 && pointers.contains(word)
        })
    })
}
