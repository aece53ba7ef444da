//! Huge pages: split only where that pays.

use std::collections::HashMap;

use kernel::{page_size, pages_of_huge};
use page::PageNumber;

use crate::cycle::Findings;
use crate::order::Item;

/// Subpages of a huge page that must have twins before it is worth splitting: a 32nd, which saves 64 KiB of 2 MiB. Kernel
/// KSM splits for a single one. A guest's memory is one large range of huge pages in which files and everything else
/// lie mixed: with a quarter, 15,000 of 93,000 pages with a twin stayed where they were.
const HUGE_SHARE: u64 = 32;

/// Twins found in each huge page, by the number of its first page.
#[derive(Default)]
pub(crate) struct HugeCount {
    seen: HashMap<u64, ()>,
}

impl HugeCount {
    pub(crate) fn seen(&mut self, page: PageNumber) {
        self.seen.insert(page.0 / pages_of_huge(), ());
    }

    /// Takes back the items of huge pages that have too few of them.
    pub(crate) fn spare(&self, owner: u32, from: usize, findings: &mut Findings) {
        if self.seen.is_empty() {
            return;
        }
        let Some(items) = findings.items.get_mut(&owner) else { return };
        let huge_of = |item: &Item| item.address / page_size() / pages_of_huge();
        let mut twins: HashMap<u64, u64> = HashMap::new();
        for item in &items[from.min(items.len())..] {
            *twins.entry(huge_of(item)).or_default() += 1;
        }
        // Pages that wait for a fill count too.
        for (taker, _) in findings.takers.iter().filter(|(taker, _)| taker.owner == owner) {
            *twins.entry(taker.page.0 / pages_of_huge()).or_default() += 1;
        }
        let few = |huge: u64| {
            self.seen.contains_key(&huge) && twins.get(&huge).copied().unwrap_or(0) < pages_of_huge() / HUGE_SHARE
        };
        let before = items.len() + findings.takers.len();
        let mut index = 0;
        items.retain(|item| {
            index += 1;
            index <= from || !few(huge_of(item))
        });
        findings.takers.retain(|(taker, _)| taker.owner != owner || !few(taker.page.0 / pages_of_huge()));
        findings.spared += (before - items.len() - findings.takers.len()) as u64;
    }
}
