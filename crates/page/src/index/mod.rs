//! The candidate index: where a content was seen, until it is seen again.
//!
//! Kernel KSM keeps 64 bytes for every page that it has ever looked at. Most pages are the only one of their content,
//! so what they cost decides what scanning a host costs. Here a page seen once is one 64-bit word:
//!
//! ```text
//! bit  63..39       38        37 36        35..0
//!      hash         repeated  age          page id
//! ```
//!
//! in one of as many shards as the bound asks for. The fingerprint chooses the shard, so the hash distinguishes
//! `25 + log2(shards)` bits; a shard has at most 2^14 words, which leaves one false candidate in two thousand lookups
//! whatever the size. That is fine, since every candidate is compared before anything is done, and stale ones (pages
//! written or unmapped since) are far more common. Shards grow on their own by an eighth at a time, so that there is
//! neither a table twice too large nor a moment at which everything is copied.
//!
//! **When it is full**, a newcomer replaces the oldest word in its neighbourhood. A word's age counts the passes
//! ([`grow_older`](CandidateIndex::grow_older)) since it was entered or observed again, three at most; of equally old
//! ones the hash decides. Nothing is ever refused, and both kinds of loss are counted.

mod shard;
mod spans;

pub use spans::{Location, PageId, Spans};

use shard::{HASH_BITS, Inserted, Shard};

use crate::Fingerprint;

/// Most words of a shard.
const SHARD_WORDS: u64 = 1 << 14;

/// Lookups whose memory is asked for together.
const TOUCHED: usize = 32;

/// What the index knew of a content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sighting {
    /// Nothing. It is entered now.
    First,
    /// This very page was seen with it before.
    Again,
    /// That other page was seen with it, or, rarely, with something of the same hash. It may have changed since: read
    /// it and compare. The index keeps the other; see [`CandidateIndex::supersede`] and [`CandidateIndex::forget`].
    Candidate(PageId),
}

/// What an index has seen and lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IndexCounts {
    /// Contents entered: distinct ones, as far as the hash tells and none was replaced.
    pub distinct: u64,
    /// Sightings that found another page: copies beyond the first.
    pub duplicates: u64,
    /// Sightings of the same page with the same content.
    pub confirmed: u64,
    /// Entries now in the index.
    pub entries: u64,
    /// Of these, those that only one page was seen with.
    pub unique: u64,
    /// Entries not confirmed for at least one pass that a newcomer replaced because the index was full.
    pub replaced_old: u64,
    /// Entries of the current pass replaced likewise: the index is too small for what is scanned.
    pub replaced_fresh: u64,
}

/// Fingerprints seen once and the pages that had them.
pub struct CandidateIndex {
    shards: Box<[Shard]>,
    max_words: u32,
    counts: IndexCounts,
}

impl CandidateIndex {
    /// An index that never takes more than 8 bytes for each of `bound` pages, plus 24 bytes for each 2^14 of them. It
    /// begins empty and grows as pages come; full it holds 15 of 16 pages of its bound.
    pub fn new(bound: u64) -> Self {
        let shards = bound.div_ceil(SHARD_WORDS).max(1);
        let max_words = u32::try_from(bound / shards).expect("a shard's share of the bound");
        let shards = (0..shards).map(|_| Shard::default()).collect();
        Self { shards, max_words: max_words.max(16), counts: IndexCounts::default() }
    }

    /// `page` was seen with the content of `fingerprint`: enters it, or tells who else had it.
    pub fn observe(&mut self, fingerprint: Fingerprint, page: PageId) -> Sighting {
        let max_words = self.max_words;
        let (shard, hash) = self.shard_mut(fingerprint);
        match shard.find(hash) {
            Some(word) if word.id() == page => {
                shard.confirm(hash);
                self.counts.confirmed += 1;
                Sighting::Again
            }
            Some(word) => {
                if shard.mark_repeated(hash) {
                    self.counts.unique -= 1;
                }
                self.counts.duplicates += 1;
                Sighting::Candidate(word.id())
            }
            None => {
                let inserted = shard.insert(hash, page, max_words);
                self.count_insertion(inserted);
                Sighting::First
            }
        }
    }

    /// Observes many pages, in order, and appends what was known of each to `sightings`. Faster than one at a time once
    /// the index has outgrown the cache, because the memory of all of them is asked for before any is waited for.
    pub fn observe_all(&mut self, pages: &[(Fingerprint, PageId)], sightings: &mut Vec<Sighting>) {
        for batch in pages.chunks(TOUCHED) {
            let touched = batch.iter().fold(0, |bits, (fingerprint, _)| {
                let (shard, hash) = self.position(*fingerprint);
                bits | self.shards[shard].touch(hash)
            });
            std::hint::black_box(touched);
            sightings.extend(batch.iter().map(|(fingerprint, page)| self.observe(*fingerprint, *page)));
        }
    }

    /// The page seen with this content, without entering or counting anything.
    pub fn peek(&self, fingerprint: Fingerprint) -> Option<PageId> {
        let (shard, hash) = self.position(fingerprint);
        self.shards[shard].find(hash).map(|word| word.id())
    }

    /// Puts `page` in the place of `stale`, which turned out to hold something else by now. Whether `stale` was still
    /// there.
    pub fn supersede(&mut self, fingerprint: Fingerprint, stale: PageId, page: PageId) -> bool {
        let (shard, hash) = self.shard_mut(fingerprint);
        if shard.find(hash).is_none_or(|word| word.id() != stale) {
            return false;
        }
        if shard.put(hash, page).is_some_and(|word| word.is_repeated()) {
            self.counts.unique += 1;
        }
        true
    }

    /// `page` is not to be offered for this content any more: merged, gone or changed. Whether it was there.
    pub fn forget(&mut self, fingerprint: Fingerprint, page: PageId) -> bool {
        let (shard, hash) = self.shard_mut(fingerprint);
        if shard.find(hash).is_none_or(|word| word.id() != page) {
            return false;
        }
        if let Some(word) = shard.remove(hash) {
            self.counts.entries -= 1;
            self.counts.unique -= u64::from(!word.is_repeated());
        }
        true
    }

    /// A pass over everything is done. Entries not observed again since the last call become replaceable before
    /// others. A plain pass over the words, about 1 ns for each.
    pub fn grow_older(&mut self) {
        for shard in &mut self.shards {
            shard.grow_older();
        }
    }

    /// Forgets everything. The counts start anew, the memory is given back.
    pub fn clear(&mut self) {
        for shard in &mut self.shards {
            *shard = Shard::default();
        }
        self.counts = IndexCounts::default();
    }

    /// What was seen and lost.
    pub fn counts(&self) -> IndexCounts {
        self.counts
    }

    /// Memory taken, in bytes.
    pub fn bytes(&self) -> usize {
        size_of_val::<[Shard]>(&self.shards) + self.shards.iter().map(Shard::bytes).sum::<usize>()
    }

    /// Memory that it will never exceed, in bytes.
    pub fn bound_bytes(&self) -> usize {
        self.shards.len() * (size_of::<Shard>() + 8 * self.max_words as usize)
    }

    fn position(&self, fingerprint: Fingerprint) -> (usize, u32) {
        let scaled = (u128::from(fingerprint.high()) * self.shards.len() as u128) >> 64;
        let shard = usize::try_from(scaled).expect("below the number of shards");
        let hash = u32::try_from(fingerprint.low() >> (64 - HASH_BITS)).expect("25 bits");
        (shard, hash)
    }

    fn shard_mut(&mut self, fingerprint: Fingerprint) -> (&mut Shard, u32) {
        let (shard, hash) = self.position(fingerprint);
        (&mut self.shards[shard], hash)
    }

    fn count_insertion(&mut self, inserted: Inserted) {
        self.counts.distinct += 1;
        match inserted {
            Inserted::Room => {
                self.counts.entries += 1;
                self.counts.unique += 1;
            }
            Inserted::ReplacedOld { repeated } => {
                self.counts.replaced_old += 1;
                self.counts.unique += u64::from(repeated);
            }
            Inserted::ReplacedFresh { repeated } => {
                self.counts.replaced_fresh += 1;
                self.counts.unique += u64::from(repeated);
            }
        }
    }
}

impl std::fmt::Debug for CandidateIndex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CandidateIndex")
            .field("shards", &self.shards.len())
            .field("bytes", &self.bytes())
            .field("counts", &self.counts)
            .finish()
    }
}

#[cfg(test)]
mod tests;
