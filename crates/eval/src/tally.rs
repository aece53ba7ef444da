//! Figures of owners and of the whole, as they are summed up.

use std::collections::HashMap;

use page::census::ContentClass;

use crate::numbers::Numbers;
use crate::report::{Counters, ScopePages};

/// Binary digits behind the point of a share.
pub(crate) const SHARE_SHIFT: u32 = 20;

/// What a page's owner gets of a saving, with [`SHARE_SHIFT`] binary digits behind the point: sums of them are exact,
/// in whatever order threads add.
fn share(copies: u64, of: u64) -> u64 {
    u64::try_from(((u128::from(copies) * u128::from(of - 1)) << SHARE_SHIFT) / u128::from(of)).expect("a few pages")
}

/// Figures of one owner, or of all.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) counters: Counters,
    pub(crate) shared_content: u64,
    pub(crate) huge: u64,
    pub(crate) shared_content_in_huge: u64,
    pub(crate) share: u64,
}

impl Tally {
    pub(crate) fn add(&mut self, other: &Self) {
        self.counters.add(&other.counters);
        self.shared_content += other.shared_content;
        self.huge += other.huge;
        self.shared_content_in_huge += other.shared_content_in_huge;
        self.share += other.share;
    }

    /// Pages saved, as its part of the whole.
    pub(crate) fn share_bytes(&self, page_size: u64) -> u64 {
        u64::try_from((u128::from(self.share) * u128::from(page_size)) >> SHARE_SHIFT).unwrap_or(u64::MAX)
    }

    /// `copies` pages of one content that `all` pages hold, `huge` of the copies in huge pages.
    pub(crate) fn content(&mut self, copies: u64, all: u64, huge: u64) {
        self.counters.pages_scanned += copies;
        self.counters.distinct_pages += 1;
        self.counters.unique_pages += u64::from(all == 1);
        self.counters.duplicate_pages += copies - 1;
        self.huge += huge;
        if all > 1 {
            self.shared_content += copies;
            self.shared_content_in_huge += huge;
            self.share += share(copies, all);
        }
    }

    pub(crate) fn zero(&mut self, huge: bool) {
        self.counters.pages_scanned += 1;
        self.counters.zero_pages += 1;
        self.counters.zero_pages_in_huge += u64::from(huge);
        self.huge += u64::from(huge);
        self.share += 1 << SHARE_SHIFT;
    }
}

/// What one backend would find.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Eligible {
    pub(crate) pages: u64,
    pub(crate) zero: u64,
    /// Of these, inside huge pages.
    pub(crate) zero_in_huge: u64,
    pub(crate) duplicates: u64,
    /// Contents with duplicates.
    pub(crate) shared: u64,
    pub(crate) unique: u64,
}

impl Eligible {
    pub(crate) fn add(&mut self, other: &Self) {
        self.pages += other.pages;
        self.zero += other.zero;
        self.zero_in_huge += other.zero_in_huge;
        self.duplicates += other.duplicates;
        self.shared += other.shared;
        self.unique += other.unique;
    }

    pub(crate) fn content(&mut self, copies: u64) {
        self.pages += copies;
        self.duplicates += copies.saturating_sub(1);
        self.shared += u64::from(copies > 1);
        self.unique += u64::from(copies == 1);
    }
}

/// Figures of all pages of one point of view: as first seen, or of those that lasted.
#[derive(Clone, Debug)]
pub(crate) struct Side {
    pub(crate) total: Tally,
    pub(crate) mappings: Vec<Tally>,
    pub(crate) processes: Vec<Tally>,
    /// By [`GroupBy::ALL`].
    pub(crate) scopes: [ScopePages; 3],
    /// Pages and copies beyond the first, by class.
    pub(crate) classes: [(u64, u64); ContentClass::ALL.len()],
    pub(crate) ksm: Eligible,
    pub(crate) store: Eligible,
    /// The same without pages of huge pages.
    pub(crate) store_small: Eligible,
    /// How many contents have so many pages.
    pub(crate) sizes: Sizes,
}

impl Side {
    pub(crate) fn new(numbers: &Numbers<'_>) -> Self {
        Self {
            total: Tally::default(),
            mappings: vec![Tally::default(); numbers.mappings()],
            processes: vec![Tally::default(); numbers.processes()],
            scopes: [ScopePages::default(); 3],
            classes: Default::default(),
            ksm: Eligible::default(),
            store: Eligible::default(),
            store_small: Eligible::default(),
            sizes: Sizes::default(),
        }
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.total.add(&other.total);
        for (mine, theirs) in self.mappings.iter_mut().zip(&other.mappings) {
            mine.add(theirs);
        }
        for (mine, theirs) in self.processes.iter_mut().zip(&other.processes) {
            mine.add(theirs);
        }
        for (mine, theirs) in self.scopes.iter_mut().zip(&other.scopes) {
            mine.within_process += theirs.within_process;
            mine.within_group += theirs.within_group;
            mine.between_groups += theirs.between_groups;
        }
        for (mine, theirs) in self.classes.iter_mut().zip(&other.classes) {
            mine.0 += theirs.0;
            mine.1 += theirs.1;
        }
        self.ksm.add(&other.ksm);
        self.store.add(&other.store);
        self.store_small.add(&other.store_small);
        self.sizes.add(&other.sizes);
    }
}

/// How many contents have how many pages.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sizes {
    /// By the number of pages, as most contents have few.
    few: [u64; 32],
    many: HashMap<u64, u64>,
}

impl Sizes {
    pub(crate) fn count(&mut self, pages: u64) {
        match usize::try_from(pages).ok().and_then(|pages| self.few.get_mut(pages)) {
            Some(contents) => *contents += 1,
            None => *self.many.entry(pages).or_default() += 1,
        }
    }

    pub(crate) fn add(&mut self, other: &Self) {
        for (mine, theirs) in self.few.iter_mut().zip(&other.few) {
            *mine += theirs;
        }
        for (pages, contents) in &other.many {
            *self.many.entry(*pages).or_default() += contents;
        }
    }

    /// Pages, and how many contents have so many.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let few = (0..).zip(self.few).filter(|(_, contents)| *contents > 0);
        few.chain(self.many.iter().map(|(pages, contents)| (*pages, *contents)))
    }
}
