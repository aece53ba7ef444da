//! Near duplicates: pages that are not equal but nearly so, why, and what it would be worth to make them equal.
//!
//! Processes of one program hold the same data, with addresses of their own in it, hashes under a seed of their own,
//! and counters of their own. None of those pages merge. What keeps them apart is found in two steps:
//!
//! 1. [`NearIndex::feed`] reduces each page to a *signature*. Addresses are replaced by their offset within the page,
//!    high-entropy words by a constant; what remains is hashed as a whole and in sixteenths. Pages of one *group* have
//!    equal masked contents; groups with 12 of 16 blocks in common, each at its place, are a *cluster*.
//!    Of what remains, pages whose sequences of words are found in other processes are *shifted*.
//! 2. [`NearIndex::finish`] reads a few pages of each group again and compares them word by word ([`Difference`]), which
//!    gives the [`Cause`].
//!
//! What a cause is *worth* is counted in pages beyond those that are equal already. A remedy that makes processes equal
//! to each other leaves as many pages of a group as the process with the most contents holds. Moving a header or a
//! trailer away leaves one.
//!
//! **Bounds.** 80 bytes are kept for a page, of as many pages as the index is made for; `finish` takes up to
//! 200 bytes more for each of them. When it is full it keeps half of all groups, chosen so that near pages stay together, and goes on with these
//! only: the figures are then those of the share that [`NearReport::share`] says.
//!
//! **What it does not see.** Tables whose *order* depends on a seed; tables of addresses whose targets are shifted; pages that consist of high-entropy words, such as compressed data.

mod cause;
mod compare;
mod groups;
mod judge;
mod report;
mod shifted;
mod signature;
#[cfg(test)]
mod tests;
mod words;

use std::collections::HashMap;

use twox_hash::XxHash3_64;

pub use cause::Cause;
pub use compare::{Difference, DifferingWord};
pub use report::{NearCause, NearCounts, NearExample, NearReport};
pub use words::{Pointers, WordKind};

use crate::PageClass;
use groups::{Record, Tally};
use judge::Judge;
use shifted::Sightings;
use signature::{Signature, sample_key};

/// Pages that were fed, reduced to what is needed to find near ones.
#[derive(Debug)]
pub struct NearIndex {
    records: Vec<Record>,
    bound: usize,
    /// Pages with a higher sample key are not kept.
    limit: u64,
    halved: u32,
    owners: HashMap<u32, Pointers>,
    unknown: Pointers,
    counts: NearCounts,
}

impl NearIndex {
    /// Bytes kept for each page.
    pub const PAGE_BYTES: usize = size_of::<Record>();

    /// An index for up to `bound` pages.
    pub fn new(bound: usize) -> Self {
        Self {
            records: Vec::new(),
            bound: bound.max(2),
            limit: u64::MAX,
            halved: 0,
            owners: HashMap::new(),
            unknown: Pointers::default(),
            counts: NearCounts::default(),
        }
    }

    /// Says what is an address in a process. Without it, [`Pointers::default`] is taken.
    pub fn owner(&mut self, owner: u32, pointers: Pointers) {
        self.owners.insert(owner, pointers);
    }

    /// Takes a page of a process. `id` is whatever lets the caller find the page again. Equal pages may be fed or left
    /// out: they change no figure.
    ///
    /// # Panics
    /// If `page` is not a multiple of 1024 bytes; every page size is.
    pub fn feed(&mut self, id: u64, owner: u32, page: &[u8]) {
        assert!(page.len().is_multiple_of(1024), "pages are multiples of 1024 bytes");
        self.counts.fed += 1;
        if PageClass::of(page) != PageClass::Data {
            self.counts.plain += 1;
            return;
        }
        let signature = Signature::of(page, self.pointers(owner));
        if signature.random {
            self.counts.random += 1;
            return;
        }
        if sample_key(&signature.blocks) > self.limit {
            self.counts.left_out += 1;
            return;
        }
        if self.records.len() == self.bound {
            self.make_room();
        }
        let content = XxHash3_64::oneshot(page);
        self.records.push(Record {
            masked: signature.masked,
            content,
            id,
            owner,
            sketch: signature.sketch,
            blocks: signature.blocks,
        });
    }

    /// What was found, once all pages are fed. `read` fills the buffer with the page of an id, and says whether it could.
    /// `page_size` is the length of a page in bytes.
    pub fn finish(mut self, page_size: usize, read: impl FnMut(u64, &mut [u8]) -> bool) -> NearReport {
        groups::unite_equal(&mut self.records);
        groups::sort(&mut self.records);
        let records = std::mem::take(&mut self.records);
        let groups: Vec<&[Record]> = records.chunk_by(|one, next| one.masked == next.masked).collect();
        let tallies: Vec<Tally> = groups.iter().map(|group| Tally::of(group)).collect();
        let mut judge = Judge::new(&mut self, page_size, read);
        for (group, tally) in groups.iter().zip(&tallies).filter(|(_, tally)| tally.contents > 1) {
            judge.group(group, tally);
        }
        let signatures: Vec<_> = groups.iter().map(|group| group[0].blocks).collect();
        let mut near: Vec<(u32, u32)> = groups::cluster(&signatures).into_iter().zip(0..).collect();
        near.sort_unstable_by_key(|&(centre, at)| (centre, at != centre, at));
        let mut clusters: Vec<(&Record, Tally)> = Vec::new();
        for cluster in near.chunk_by(|one, next| one.0 == next.0) {
            let all = || cluster.iter().map(|&(_, at)| at as usize);
            let mut tally = Tally::default();
            all().for_each(|at| tally.add(&tallies[at]));
            if cluster.len() > 1 {
                // What the groups have been credited with, whatever their cause.
                let between = all().map(|at| tallies[at].between_processes()).sum();
                let altogether = all().map(|at| tallies[at].altogether()).sum();
                let members: Vec<_> = all().map(|at| groups[at]).collect();
                judge.cluster(&members, &tally, (between, altogether));
            }
            clusters.push((&groups[cluster[0].1 as usize][0], tally));
        }
        judge.shifted(&Sightings::of(&records), &clusters);
        let causes = report::by_worth(judge.causes);
        NearReport { counts: self.counts, share: 0.5_f64.powi(self.halved.cast_signed()), causes }
    }

    fn pointers(&self, owner: u32) -> &Pointers {
        self.owners.get(&owner).unwrap_or(&self.unknown)
    }

    /// Equal pages of a process go first, then half of the groups, until a quarter of the room is free.
    fn make_room(&mut self) {
        groups::sort(&mut self.records);
        while self.records.len() > self.bound - self.bound.div_ceil(4) {
            let before = self.records.len();
            self.limit /= 2;
            self.halved += 1;
            let limit = self.limit;
            self.records.retain(|record| sample_key(&record.blocks) <= limit);
            self.counts.left_out += (before - self.records.len()) as u64;
        }
    }
}
