//! Pages that need no fingerprint.

/// What a page holds, at the price of reading it until the first difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageClass {
    /// Zeros only. Such a page needs no store: it is dropped and reads as zeros again.
    Zero,
    /// One 64-bit word over and over (in native byte order), the usual fill patterns of allocators and debuggers.
    Repeated(u64),
    /// Anything else.
    Data,
}

/// Bytes compared between two looks at the result: one cache line, so that a page of data is given up after the
/// first line, while the comparison within the line is vectorised.
const BLOCK: usize = 64;

impl PageClass {
    /// The class of `page`.
    ///
    /// # Panics
    /// If `page` is empty or not a whole number of 64-byte lines; no page size is.
    pub fn of(page: &[u8]) -> Self {
        let (blocks, rest) = page.as_chunks::<BLOCK>();
        assert!(rest.is_empty() && !blocks.is_empty(), "pages consist of whole cache lines");
        let (words, _) = blocks[0].as_chunks::<8>();
        let first = u64::from_ne_bytes(words[0]);
        if blocks.iter().all(|block| difference(block, first) == 0) {
            if first == 0 { Self::Zero } else { Self::Repeated(first) }
        } else {
            Self::Data
        }
    }
}

/// Whether `page` holds zeros only.
///
/// # Panics
/// If `page` is not a whole number of 64-byte lines; no page size is.
pub fn is_zero(page: &[u8]) -> bool {
    let (blocks, rest) = page.as_chunks::<BLOCK>();
    assert!(rest.is_empty(), "pages consist of whole cache lines");
    blocks.iter().all(|block| difference(block, 0) == 0)
}

/// Bits in which any word of the block differs from `word`.
fn difference(block: &[u8; BLOCK], word: u64) -> u64 {
    let (words, _) = block.as_chunks::<8>();
    words.iter().fold(0, |bits, bytes| bits | (u64::from_ne_bytes(*bytes) ^ word))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_three_classes() {
        assert_eq!(PageClass::of(&[0; 4096]), PageClass::Zero);
        assert_eq!(PageClass::of(&[0xa5; 4096]), PageClass::Repeated(0xa5a5_a5a5_a5a5_a5a5));
        let counting: Vec<u8> = (0..4096_u32).map(|i| i.to_le_bytes()[0]).collect();
        assert_eq!(PageClass::of(&counting), PageClass::Data);
    }

    proptest! {
        /// One byte that differs anywhere makes the page data, and only then is it not zero.
        #[test]
        fn one_byte_decides(at in 0_usize..4096, base in any::<u64>(), flip in 1_u8..) {
            let mut page: Vec<u8> = base.to_ne_bytes().repeat(512);
            let class = if base == 0 { PageClass::Zero } else { PageClass::Repeated(base) };
            prop_assert_eq!(PageClass::of(&page), class);
            prop_assert_eq!(is_zero(&page), base == 0);
            page[at] ^= flip;
            prop_assert_eq!(PageClass::of(&page), PageClass::Data);
            prop_assert_eq!(is_zero(&page), page.iter().all(|byte| *byte == 0));
        }
    }
}
