//! Fingerprints: 128 bits that select a page's content. They never decide: whoever merges compares every byte.
//!
//! XXH3 reads a page as fast as the cache gives it, so out of memory the reading is what costs. It is not a
//! cryptographic hash. What keeps an adversary inside a member from aiming collisions at others is the secret, drawn
//! at random for each partition and never told; and a collision costs a comparison, not a byte.

use std::fmt;

use twox_hash::xxhash3_128::Hasher;

/// The key of a partition's fingerprints.
pub struct Secret(Box<[u8; Secret::BYTES]>);

impl Secret {
    /// Length of a secret in bytes: XXH3's own default, above its minimum of 136.
    pub const BYTES: usize = 192;

    /// A secret of these bytes, which must be random and be used for one partition only.
    pub fn new(bytes: [u8; Self::BYTES]) -> Self {
        Self(Box::new(bytes))
    }

    /// The fingerprint of a page (of any size from 256 bytes on; shorter inputs take XXH3's weaker paths).
    pub fn fingerprint(&self, page: &[u8]) -> Fingerprint {
        debug_assert!(page.len() >= 256, "pages are longer than that");
        let hash = Hasher::oneshot_with_secret(&*self.0, page).expect("a secret of 192 bytes is long enough");
        Fingerprint::from_u128(hash)
    }

    /// The fingerprints of all pages of `buffer`, in order. A tail shorter than a page is left out.
    pub fn fingerprints<'a>(&'a self, buffer: &'a [u8], page_size: usize) -> impl Iterator<Item = Fingerprint> + 'a {
        buffer.chunks_exact(page_size).map(|page| self.fingerprint(page))
    }
}

impl fmt::Debug for Secret {
    /// Says nothing of the bytes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// What a page's content hashes to under a partition's [`Secret`]. Comparable within that partition only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint {
    // Two words instead of one u128: records of it then need no 16-byte alignment.
    high: u64,
    low: u64,
}

impl Fingerprint {
    /// A fingerprint from its 128 bits.
    pub const fn from_u128(bits: u128) -> Self {
        Self { high: (bits >> 64) as u64, low: bits as u64 }
    }

    /// All 128 bits.
    pub const fn as_u128(self) -> u128 {
        (self.high as u128) << 64 | self.low as u128
    }

    /// The upper 64 bits, as good as any others to place it in a table.
    pub const fn high(self) -> u64 {
        self.high
    }

    /// The lower 64 bits.
    pub const fn low(self) -> u64 {
        self.low
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn page(seed: u8) -> Vec<u8> {
        (0..4096_u32).map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()[3] ^ seed).collect()
    }

    #[test]
    fn the_secret_changes_every_fingerprint() {
        let (one, other) = (Secret::new([1; 192]), Secret::new([2; 192]));
        assert_eq!(one.fingerprint(&page(0)), one.fingerprint(&page(0)));
        assert_ne!(one.fingerprint(&page(0)), one.fingerprint(&page(1)));
        assert_ne!(one.fingerprint(&page(0)), other.fingerprint(&page(0)));
    }

    #[test]
    fn bits_survive_the_round_trip() {
        let fingerprint = Secret::new([9; 192]).fingerprint(&page(3));
        assert_eq!(Fingerprint::from_u128(fingerprint.as_u128()), fingerprint);
        assert_eq!(fingerprint.as_u128() >> 64, u128::from(fingerprint.high()));
    }

    #[test]
    fn a_buffer_is_hashed_page_by_page() {
        let secret = Secret::new([5; 192]);
        let mut buffer = page(1);
        buffer.extend(page(2));
        buffer.extend([0; 100]);
        let all: Vec<_> = secret.fingerprints(&buffer, 4096).collect();
        assert_eq!(all, [secret.fingerprint(&page(1)), secret.fingerprint(&page(2))]);
    }

    #[test]
    fn nothing_of_the_secret_is_printed() {
        assert_eq!(format!("{:?}", Secret::new([77; 192])), "Secret");
    }
}
