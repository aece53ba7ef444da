//! What a 64-bit word of a page looks like, judged by its bits and by where its process has mappings.

/// What a word looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WordKind {
    /// An address of its process.
    Pointer,
    /// Bits as if drawn at random: a hash, a seed, a checksum, a key; some floating-point numbers look the same.
    HighEntropy,
    /// Zero, a number below 2^32 or one or two's complement of it, or two halves below 2^20 each: counts, sizes, flags.
    SmallInteger,
    /// Eight bytes of ASCII text, NULs between or behind.
    Text,
    /// Anything else.
    Other,
}

/// Which words count as addresses in a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pointers {
    /// One bit for each 64 GiB of the 256 TiB below 2^48.
    high: [u64; 64],
    /// First address and length of the part below 1 TiB, where numbers are common.
    low: (u64, u64),
}

impl Default for Pointers {
    /// Where this architecture's kernel puts executables, mappings and stacks when it is not told otherwise. The heap of
    /// a program with a fixed address is not in it: its addresses cannot be told from numbers.
    fn default() -> Self {
        Self::within([if cfg!(target_arch = "aarch64") {
            (0xaaaa_0000_0000, 1 << 48)
        } else {
            (0x5500_0000_0000, 1 << 47)
        }])
    }
}

impl Pointers {
    /// Addresses below this are never mapped (`vm.mmap_min_addr`), and small numbers are common.
    const LOWEST: u64 = 0x1_0000;
    /// Below it lies the executable and the heap of a program with a fixed address, and nothing else.
    const HIGH: u64 = 1 << 40;

    /// Addresses within the mapped ranges of a process, given as first address and the one behind the last, in any
    /// order. Ranges from 1 TiB on are widened to multiples of 64 GiB, within which glibc hides the links of its free
    /// lists (by a shifted address, XORed); those below are taken as one.
    pub fn within(ranges: impl IntoIterator<Item = (u64, u64)>) -> Self {
        let mut high = [0; 64];
        let (mut first, mut behind) = (u64::MAX, 0);
        for (start, end) in ranges {
            let start = start.max(Self::LOWEST);
            if start < end.min(Self::HIGH) {
                first = first.min(start);
                behind = behind.max(end.min(Self::HIGH));
            }
            let (from, to) = (start.max(Self::HIGH) >> 36, end.div_ceil(1 << 36).min(1 << 12));
            (from..to).for_each(|bit| high[(bit / 64) as usize] |= 1 << (bit % 64));
        }
        Self { high, low: (first, behind.saturating_sub(first)) }
    }

    /// Whether `word` would be an address, or the number of a page far up, which is what a hidden null link looks like.
    #[inline]
    pub fn contains(&self, word: u64) -> bool {
        if (Self::LOWEST..Self::HIGH).contains(&word) {
            return word.wrapping_sub(self.low.0) < self.low.1 || word >> 32 != 0 && self.is_high(word << 12);
        }
        self.is_high(word)
    }

    #[inline]
    fn is_high(&self, word: u64) -> bool {
        let bit = word >> 36;
        (bit < 1 << 12) & (self.high[(bit / 64 % 64) as usize] >> (bit % 64) & 1 != 0)
    }

    /// What `word` looks like in this process.
    pub fn kind(&self, word: u64) -> WordKind {
        let halves = |limit: u64| word >> 32 < limit && (word & 0xffff_ffff) < limit;
        if self.contains(word) {
            WordKind::Pointer
        } else if word.cast_signed().unsigned_abs() < 1 << 32 || halves(1 << 20) {
            WordKind::SmallInteger
        } else if is_text(word) {
            WordKind::Text
        } else if has_high_entropy(word) {
            WordKind::HighEntropy
        } else {
            WordKind::Other
        }
    }
}

const ONES: u64 = 0x0101_0101_0101_0101;
const TOPS: u64 = 0x8080_8080_8080_8080;

/// Whether `word` may be drawn at random: neither half begins with 16 equal bits, as numbers and round floating-point
/// values do, and it is no text. Of random words it misses six in ten thousand.
#[inline]
pub(super) fn has_high_entropy(word: u64) -> bool {
    let varied = |bits: u64| (bits.wrapping_add(1) & 0xffff) > 1;
    varied(word >> 48) & varied(word >> 16) && (word & TOPS != 0 || !is_text(word))
}

/// Whether all eight bytes are printable ASCII, blanks, line ends or NULs.
#[inline]
pub(super) fn is_text(word: u64) -> bool {
    // With no top bit set, a byte plus 0x7f less what it is compared with has its top bit set from there on.
    let from = |least: u64| word + (0x80 - least) * ONES;
    let unlike = |byte: u64| (word ^ (byte * ONES)) + 0x7f * ONES;
    word & TOPS == 0 && {
        let control = !from(0x20) & unlike(0) & unlike(0x09) & unlike(0x0a) & unlike(0x0d);
        (control | from(0x7f)) & TOPS == 0
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn words_by_their_looks() {
        let pointers = Pointers::default();
        let expected = [
            (0x7f12_3456_7890, WordKind::Pointer),
            (0x5555_5555_4010, WordKind::Pointer),
            (0, WordKind::SmallInteger),
            (41, WordKind::SmallInteger),
            (u64::MAX, WordKind::SmallInteger),
            (0x0000_0017_0000_2040, WordKind::SmallInteger),
            (u64::from_le_bytes(*b"import s"), WordKind::Text),
            (u64::from_le_bytes(*b"x = 1\n\0\0"), WordKind::Text),
            (0x9d3f_20c7_8871_a4e6, WordKind::HighEntropy),
            (1.0_f64.to_bits(), WordKind::Other),
        ];
        for (word, kind) in expected {
            assert_eq!(pointers.kind(word), kind, "{word:#x}");
        }
    }

    #[test]
    fn addresses_are_where_the_process_has_mappings() {
        let mut ranges: Vec<(u64, u64)> =
            (0..50).map(|n| (0x5555_0000_0000 + n * 0x3000, 0x5555_0000_1000 + n * 0x3000)).collect();
        ranges.extend([(0x7f00_0000_0000, 0x7f00_0010_0000), (0x7ffc_0000_0000, 0x7ffc_0002_0000), (0, 0x2000)]);
        ranges.push((0x40_0000, 0x50_0000));
        let pointers = Pointers::within(ranges);
        assert!(
            pointers.contains(0x5555_0000_2fff)
                && pointers.contains(0x5550_5555_5fff)
                && pointers.contains(0x5_5550_0002)
                && pointers.contains(0x7ffc_0001_0008)
        );
        assert!(pointers.contains(0x40_0000) && !pointers.contains(0x50_0000));
        assert!(!pointers.contains(0x1000) && !pointers.contains(0x6000_0000_0000));
        assert!(!Pointers::within([]).contains(0));
    }

    #[test]
    fn few_random_words_look_like_anything_else() {
        let mut state = 1_u64;
        let missed = (0..1_000_000)
            .filter(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let word = (state ^ state >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                Pointers::default().kind(word ^ word >> 32) != WordKind::HighEntropy
            })
            .count();
        assert!((300..1000).contains(&missed), "{missed}");
    }

    proptest! {
        #[test]
        fn text_is_what_a_look_at_each_byte_says(bytes in any::<[u8; 8]>(), low in any::<bool>()) {
            let bytes = bytes.map(|byte| if low { byte & 0x7f } else { byte });
            let each = bytes.iter().all(|byte| matches!(byte, 0 | 9 | 10 | 13 | 0x20..0x7f));
            prop_assert_eq!(is_text(u64::from_le_bytes(bytes)), each);
        }
    }
}
