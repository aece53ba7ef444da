//! Reckoning figures of a part up to the whole.

use page::census::ContentClass;

use crate::tally::{Eligible, SHARE_SHIFT, Side, Tally};

/// By what a part's figures are to be multiplied, to be those of the whole.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Factors {
    pub(crate) zero: f64,
    pub(crate) data: f64,
    pub(crate) duplicate: f64,
}

impl Factors {
    fn zero(&self, pages: u64) -> u64 {
        (pages as f64 * self.zero).round() as u64
    }

    fn data(&self, pages: u64) -> u64 {
        (pages as f64 * self.data).round() as u64
    }

    fn duplicate(&self, pages: u64) -> u64 {
        (pages as f64 * self.duplicate).round() as u64
    }
}

impl Tally {
    /// Reckons a part up to the whole.
    fn scale(&mut self, by: &Factors) {
        let zeros = self.counters.zero_pages;
        let data = by.data(self.counters.pages_scanned - zeros);
        let zero_share = zeros << SHARE_SHIFT;
        self.share = by.zero(zeros).saturating_mul(1 << SHARE_SHIFT) + by.duplicate(self.share - zero_share);
        let unique = self.counters.unique_pages as f64 / self.counters.distinct_pages.max(1) as f64;
        let counters = &mut self.counters;
        counters.zero_pages = by.zero(zeros);
        counters.zero_pages_in_huge = by.zero(counters.zero_pages_in_huge);
        counters.duplicate_pages = by.duplicate(counters.duplicate_pages).min(data);
        counters.distinct_pages = data - counters.duplicate_pages;
        counters.unique_pages = (unique * counters.distinct_pages as f64).round() as u64;
        counters.pages_scanned = data + counters.zero_pages;
        self.shared_content = by.duplicate(self.shared_content).min(data);
        self.huge = by.data(self.huge);
        self.shared_content_in_huge = by.duplicate(self.shared_content_in_huge).min(self.huge);
    }
}

impl Eligible {
    fn scale(&mut self, by: &Factors) {
        let data = by.data(self.pages - self.zero);
        self.zero = by.zero(self.zero);
        self.zero_in_huge = by.zero(self.zero_in_huge);
        self.pages = data + self.zero;
        self.duplicates = by.duplicate(self.duplicates).min(data);
        self.shared = by.duplicate(self.shared);
        self.unique = by.data(self.unique);
    }
}

impl Side {
    /// Reckons a part up to the whole. Figures of owners are rounded one by one.
    pub(crate) fn scale(&mut self, by: &Factors) {
        self.total.scale(by);
        self.mappings.iter_mut().chain(&mut self.processes).for_each(|tally| tally.scale(by));
        for scopes in &mut self.scopes {
            // The three are to add up, however each is rounded.
            let duplicates = self.total.counters.duplicate_pages;
            scopes.within_process = by.duplicate(scopes.within_process).min(duplicates);
            scopes.within_group = by.duplicate(scopes.within_group).min(duplicates - scopes.within_process);
            scopes.between_groups = duplicates - scopes.within_process - scopes.within_group;
        }
        for (class, (pages, copies)) in self.classes.iter_mut().enumerate() {
            let zero = class == ContentClass::Zero as usize - 1;
            (*pages, *copies) =
                if zero { (by.zero(*pages), by.zero(*copies)) } else { (by.data(*pages), by.duplicate(*copies)) };
        }
        for eligible in [&mut self.ksm, &mut self.store, &mut self.store_small] {
            eligible.scale(by);
        }
    }
}
