//! What merging saves once its own bookkeeping is paid: the kernel's formula, to compare with, and ours.

/// What the kernel's KSM counts, host-wide or for one process, in pages and items.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KsmBooks {
    /// Mappings saved: `pages_sharing` host-wide, `ksm_merging_pages` of one process (which counts first copies too,
    /// so that the profits of all processes add up to more than the host's).
    pub pages: u64,
    /// `ksm_zero_pages`: mappings of the zero page placed by KSM.
    pub zero_pages: u64,
    /// `rmap_items`: one for every page ksmd has looked at. Host-wide it is the sum of `pages_shared`,
    /// `pages_sharing`, `pages_unshared` and `pages_volatile`.
    pub rmap_items: u64,
}

impl KsmBooks {
    /// Bytes of one rmap item on a 64-bit kernel.
    pub const RMAP_ITEM: u64 = 64;

    /// `general_profit` or `ksm_process_profit` in bytes, as mm/ksm.c computes them: stable nodes and process slots
    /// are not in it.
    pub fn profit(&self, page_size: u64) -> i64 {
        difference(
            self.pages.saturating_add(self.zero_pages).saturating_mul(page_size),
            self.rmap_items.saturating_mul(Self::RMAP_ITEM),
        )
    }
}

/// What the store backend saves and what it keeps for that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreBooks {
    /// Private pages that went away: merged mappings, less the store pages that hold their content.
    pub pages_saved: u64,
    /// Zero pages dropped.
    pub zero_pages: u64,
    /// Mappings that merged runs added to their processes.
    pub vmas_added: u64,
    /// Managed pages: one byte each.
    pub managed_pages: u64,
    /// Entries of the candidate index.
    pub index_entries: u64,
    /// Pages in the store: one record each.
    pub pages_shared: u64,
    /// Segments of the store: the kernel's inode, file and page-cache nodes of one memfd each.
    pub segments: u64,
}

/// Bytes of one [`StoreBooks`], by what they are kept for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreCost {
    /// The kernel's records of mappings.
    pub vmas: u64,
    /// The byte for each managed page.
    pub managed: u64,
    /// The candidate index.
    pub index: u64,
    /// The records of shared pages.
    pub records: u64,
    /// The kernel's records of memfds.
    pub segments: u64,
}

impl StoreCost {
    /// All of it.
    pub fn total(&self) -> u64 {
        [self.vmas, self.managed, self.index, self.records, self.segments].into_iter().fold(0, u64::saturating_add)
    }
}

impl StoreBooks {
    /// Bytes of a mapping: its slab object (192 B on 6.18) and its share of a maple-tree node.
    pub const VMA: u64 = 192 + 64;
    /// Bytes for each managed page.
    pub const MANAGED_PAGE: u64 = 1;
    /// Bytes of an index entry at load.
    pub const INDEX_ENTRY: u64 = 8;
    /// Most bytes of a shared page's records in the broker.
    pub const SHARED_PAGE: u64 = 64;
    /// Slab bytes of one memfd (measured on 6.18: 1,192 with one page, 1,713 to 1,781 with more).
    pub const SEGMENT: u64 = 1_781;

    /// What the bookkeeping takes.
    pub fn cost(&self) -> StoreCost {
        StoreCost {
            vmas: self.vmas_added.saturating_mul(Self::VMA),
            managed: self.managed_pages.saturating_mul(Self::MANAGED_PAGE),
            index: self.index_entries.saturating_mul(Self::INDEX_ENTRY),
            records: self.pages_shared.saturating_mul(Self::SHARED_PAGE),
            segments: self.segments.saturating_mul(Self::SEGMENT),
        }
    }

    /// Bytes saved before bookkeeping.
    pub fn saved(&self, page_size: u64) -> u64 {
        self.pages_saved.saturating_add(self.zero_pages).saturating_mul(page_size)
    }

    /// Bytes saved after bookkeeping; below zero where merging costs more than it gives.
    pub fn profit(&self, page_size: u64) -> i64 {
        difference(self.saved(page_size), self.cost().total())
    }

    /// The fewest pages that a run must have to pay for the two mappings it may add.
    pub fn pages_to_pay_a_run(page_size: u64) -> u64 {
        (2 * Self::VMA + Self::MANAGED_PAGE).div_ceil(page_size - Self::SHARED_PAGE)
    }
}

fn difference(gain: u64, cost: u64) -> i64 {
    let clamp = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    clamp(gain) - clamp(cost)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn the_kernels_break_even_is_one_page_for_64_items() {
        let mut books = KsmBooks { pages: 1, zero_pages: 0, rmap_items: 64 };
        assert_eq!(books.profit(4096), 0);
        books.rmap_items = 65;
        assert_eq!(books.profit(4096), -64);
        books.zero_pages = 1;
        assert_eq!(books.profit(4096), 4096 - 64);
    }

    #[test]
    fn a_store_that_shares_nothing_costs_nine_bytes_a_page() {
        let books = StoreBooks { managed_pages: 1000, index_entries: 1000, ..StoreBooks::default() };
        assert_eq!(books.profit(4096), -9_000);
    }

    #[test]
    fn one_long_run_pays_and_the_parts_add_up() {
        let books = StoreBooks {
            pages_saved: 256,
            zero_pages: 4,
            vmas_added: 2,
            managed_pages: 512,
            index_entries: 10,
            pages_shared: 256,
            segments: 1,
        };
        let cost = books.cost();
        assert_eq!(cost.total(), 512 + 512 + 80 + 16_384 + 1_781);
        assert_eq!(books.profit(4096), 260 * 4096 - 19_269);
        assert_eq!(StoreBooks::pages_to_pay_a_run(4096), 1);
    }

    #[test]
    fn absurd_counts_saturate() {
        let books = KsmBooks { pages: u64::MAX, zero_pages: u64::MAX, rmap_items: 0 };
        assert_eq!(books.profit(4096), i64::MAX);
    }
}
