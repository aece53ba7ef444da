//! A page reduced to what does not depend on where its process lies nor on the seeds that it drew.

use super::shifted::{Sequences, Sketch};
use super::words::{Pointers, has_high_entropy};

/// Blocks of a page that have a signature each.
pub(super) const BLOCKS: usize = 16;
/// Blocks that near pages have in common, each at its place.
pub(super) const NEAR_BLOCKS: usize = 12;

/// Bytes of a word, and words that are hashed side by side.
const WORD: usize = 8;
const LANES: usize = 4;

/// What stands for an address (with its offset within 4 KiB) and for a high-entropy word: values that are neither.
const POINTER: u64 = 0x8000_0bad_0000_0000;
const ENTROPY: u64 = 0x8000_0bad_ffff_0000;

/// A page with its addresses and seeds masked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Signature {
    /// Hash of the masked page.
    pub(super) masked: u64,
    /// Hashes of its sixteenths; 0 for zeros only.
    pub(super) blocks: [u16; BLOCKS],
    /// What pages that hold the same data at other offsets share some of.
    pub(super) sketch: Sketch,
    /// More than half of what is not zero is masked as high entropy: such a page resembles all of its kind.
    pub(super) random: bool,
}

impl Signature {
    /// The signature of `page`, whose length is a multiple of 512 bytes.
    pub(super) fn of(page: &[u8], pointers: &Pointers) -> Self {
        let mut masked = 0x9e37_79b9_7f4a_7c15;
        let (mut zeros, mut entropy) = (0, 0);
        let mut blocks = [0; BLOCKS];
        let mut sequences = Sequences::new();
        for (block, signature) in page.chunks_exact(page.len() / BLOCKS).zip(&mut blocks) {
            let (lines, _) = block.as_chunks::<{ WORD * LANES }>();
            let mut lanes = [1_u64, 3, 5, 7];
            let mut any = 0;
            for line in lines {
                let (words, _) = line.as_chunks::<WORD>();
                for (lane, word) in lanes.iter_mut().zip(words) {
                    let word = u64::from_ne_bytes(*word);
                    any |= word;
                    zeros += u32::from(word == 0);
                    let random = has_high_entropy(word);
                    entropy += u32::from(random);
                    let plain = if random { ENTROPY } else { word };
                    let pointer = pointers.contains(word);
                    let shown = if pointer { POINTER | word & 0xfff } else { plain };
                    sequences.take(if pointer { POINTER } else { plain });
                    *lane = (*lane ^ shown).wrapping_mul(0xd6e8_feb8_6659_fd93).rotate_left(29);
                }
            }
            if any != 0 {
                let hash = lanes.into_iter().fold(0, |hash, lane| mix(hash ^ lane));
                *signature = (hash as u16).max(1);
                masked = mix(masked ^ hash);
            } else {
                masked = mix(masked);
            }
        }
        let words = (page.len() / WORD) as u32;
        Self { masked, blocks, sketch: sequences.sketch(), random: 2 * entropy > words - zeros }
    }
}

/// Whether two pages have enough blocks in common.
pub(super) fn near(one: &[u16; BLOCKS], other: &[u16; BLOCKS]) -> bool {
    one.iter().zip(other).filter(|(one, other)| one == other).count() >= NEAR_BLOCKS
}

/// A number that near pages are likely to share and equal ones always do: it chooses which pages a sample keeps, so that
/// it keeps groups and not pages.
pub(super) fn sample_key(blocks: &[u16; BLOCKS]) -> u64 {
    mix(u64::from(blocks.iter().copied().filter(|&block| block != 0).min().unwrap_or(0)) + 1)
}

/// Spreads every bit of `word` over all of the result.
pub(super) fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    let word = (word ^ (word >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    word ^ (word >> 32)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use proptest::prelude::*;

    use super::*;

    fn page(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    fn of(words: &[u64]) -> Signature {
        Signature::of(&page(words), &Pointers::default())
    }

    fn numbers() -> Vec<u64> {
        (0..512).map(|n| n * 3 + 1).collect()
    }

    #[test]
    fn a_pointer_counts_by_its_offset_within_the_page() {
        let (mut one, mut moved, mut elsewhere) = (numbers(), numbers(), numbers());
        (one[7], moved[7], elsewhere[7]) = (0x7f00_1234_5018, 0x7fab_cdef_0018, 0x7fab_cdef_0020);
        assert_eq!(of(&one), of(&moved));
        assert_ne!(of(&one).masked, of(&elsewhere).masked);
    }

    #[test]
    fn a_page_of_random_words_resembles_nothing() {
        let random: Vec<u64> = (0..512).map(|n| mix(n + 99)).collect();
        assert!(of(&random).random);
        let mut third = numbers();
        third.iter_mut().step_by(3).for_each(|word| *word = mix(*word));
        assert!(!of(&third).random);
        assert!(!of(&[0; 512]).random);
    }

    proptest! {
        /// A word that changes to anything shows in its own block only, unless both are masked.
        #[test]
        fn one_word_shows_in_one_block(at in 0_usize..512, word in any::<u64>()) {
            let (before, mut after) = (numbers(), numbers());
            after[at] = word;
            let (one, other) = (of(&before), of(&after));
            prop_assert_eq!(before == after, one.masked == other.masked);
            for block in 0..BLOCKS {
                prop_assert!(block == at / 32 || one.blocks[block] == other.blocks[block]);
            }
            prop_assert!(near(&one.blocks, &other.blocks));
        }

        /// Whatever seeds are drawn, the page is the same.
        #[test]
        fn seeds_do_not_show(offsets in proptest::collection::btree_set(0_usize..512, 1..100), seed in any::<u64>()) {
            let (mut one, mut other) = (numbers(), numbers());
            for &at in &offsets {
                // Set bits that make it high entropy for sure: that some random words are not is known.
                one[at] = mix(at as u64) | 0x8001_0000_0001_0000 & !0x4000_0000_4000_0000;
                other[at] = mix(at as u64 ^ seed) | 0x8001_0000_0001_0000 & !0x4000_0000_4000_0000;
            }
            prop_assume!(one.iter().chain(&other).filter(|&&word| word >> 60 != 0).all(|&word| has_high_entropy(word)));
            prop_assert_eq!(of(&one).masked, of(&other).masked);
        }
    }
}
