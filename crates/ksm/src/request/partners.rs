//! Which pages have a partner: an equal page in another frame, a page that KSM shares already, or the zero page.
//!
//! A huge page is split by the first of its subpages that merges, and its process walks more page tables from then on. So
//! huge pages are left whole unless enough of their subpages have partners; and who had its only partner there has none.
use std::collections::{HashMap, HashSet};

use super::look::{Seen, ZEROS};

/// What there is to know of pages beside what they hold.
pub(crate) trait Pages {
    /// Merged by KSM already.
    fn is_merged(&self, page: u32) -> bool;
    /// The frame of a page with several users, if it is known.
    fn frame(&self, page: u32) -> Option<u64>;
    /// Which huge page it is a part of.
    fn huge(&self, page: u32) -> Option<u64>;
}

/// What a page can merge with beside the request's own pages.
#[derive(Debug, Default)]
pub(crate) struct Anchors {
    /// Hashes of pages that KSM shares outside the request.
    pub(crate) shared: HashSet<u64>,
    /// Pages of zeros merge with the zero page.
    pub(crate) zeros: bool,
}

/// Pages with partners.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Chosen {
    /// By number.
    pub(crate) pages: Vec<Seen>,
    /// Pages with partners in huge pages that stay whole.
    pub(crate) left_huge: u64,
    /// Those huge pages.
    pub(crate) huge_left: u64,
    /// Huge pages that will be split.
    pub(crate) huge_split: u64,
}

/// A huge page is split for one subpage in so many. Kernel KSM does it for a single one.
const HUGE_SHARE: u64 = 32;

/// Chooses among `seen`, in any order. `split_huge`: huge pages are split for any subpage.
pub(crate) fn choose(mut seen: Vec<Seen>, pages: &impl Pages, anchors: &Anchors, split_huge: bool) -> Chosen {
    seen.sort_unstable();
    let mut chosen = Chosen::default();
    let mut left: HashSet<u64> = HashSet::new();
    loop {
        seen = with_partners(&seen, pages, anchors);
        let mut parts: HashMap<u64, u64> = HashMap::new();
        for huge in seen.iter().filter(|seen| !pages.is_merged(seen.page)).filter_map(|seen| pages.huge(seen.page)) {
            *parts.entry(huge).or_default() += 1;
        }
        let few = kernel::pages_of_huge() / HUGE_SHARE;
        let spared = |huge: u64| !split_huge && parts.get(&huge).is_some_and(|parts| *parts < few);
        let before = seen.len();
        seen.retain(|seen| match pages.huge(seen.page).filter(|huge| spared(*huge)) {
            Some(huge) => {
                left.insert(huge);
                false
            }
            None => true,
        });
        chosen.left_huge += (before - seen.len()) as u64;
        // Each round leaves fewer, so there is a last one.
        if before == seen.len() {
            chosen.huge_split = parts.len() as u64;
            break;
        }
    }
    chosen.huge_left = left.len() as u64;
    seen.retain(|seen| !pages.is_merged(seen.page));
    seen.sort_unstable_by_key(|seen| seen.page);
    chosen.pages = seen;
    chosen
}

/// Those of `seen` (sorted) that have one, with the merged pages that are one.
fn with_partners(seen: &[Seen], pages: &impl Pages, anchors: &Anchors) -> Vec<Seen> {
    let mut kept = Vec::new();
    for group in seen.chunk_by(|one, other| one.hash == other.hash) {
        if has_partners(group, pages, anchors) {
            kept.extend_from_slice(group);
        }
    }
    kept
}

fn has_partners(group: &[Seen], pages: &impl Pages, anchors: &Anchors) -> bool {
    let hash = group[0].hash;
    if hash == ZEROS && anchors.zeros || anchors.shared.contains(&hash) {
        return true;
    }
    let Some(first) = group.iter().find(|seen| !pages.is_merged(seen.page)) else { return false };
    let frame = pages.frame(first.page);
    // Mappings of one frame, as a fork leaves them, are no partners of each other.
    group.iter().any(|seen| {
        seen.page != first.page && (pages.is_merged(seen.page) || frame.is_none() || pages.frame(seen.page) != frame)
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[derive(Default)]
    struct Known {
        merged: HashSet<u32>,
        frames: HashMap<u32, u64>,
        huge: HashMap<u32, u64>,
    }

    impl Pages for Known {
        fn is_merged(&self, page: u32) -> bool {
            self.merged.contains(&page)
        }
        fn frame(&self, page: u32) -> Option<u64> {
            self.frames.get(&page).copied()
        }
        fn huge(&self, page: u32) -> Option<u64> {
            self.huge.get(&page).copied()
        }
    }

    fn seen(pages: &[(u32, u64)]) -> Vec<Seen> {
        pages.iter().map(|&(page, hash)| Seen { hash, page }).collect()
    }

    fn numbers(chosen: &Chosen) -> Vec<u32> {
        chosen.pages.iter().map(|seen| seen.page).collect()
    }

    #[test]
    fn pairs_have_partners_and_single_pages_have_none() {
        let pages = seen(&[(5, 1), (0, 1), (1, 2), (2, 3), (3, ZEROS)]);
        let chosen = choose(pages.clone(), &Known::default(), &Anchors::default(), false);
        assert_eq!(numbers(&chosen), [0, 5]);
        let anchors = Anchors { shared: HashSet::from([2]), zeros: true };
        assert_eq!(numbers(&choose(pages, &Known::default(), &anchors, false)), [0, 1, 3, 5]);
    }

    #[test]
    fn what_ksm_shares_is_a_partner_and_needs_nothing_itself() {
        let known = Known { merged: HashSet::from([1]), ..Known::default() };
        let chosen = choose(seen(&[(0, 7), (1, 7)]), &known, &Anchors::default(), false);
        assert_eq!(numbers(&chosen), [0]);
        let alone = choose(seen(&[(1, 7)]), &known, &Anchors::default(), false);
        assert_eq!(numbers(&alone), Vec::<u32>::new());
    }

    #[test]
    fn mappings_of_one_frame_are_merged_with_another_or_not_at_all() {
        let known = Known { frames: HashMap::from([(0, 9), (1, 9)]), ..Known::default() };
        assert_eq!(numbers(&choose(seen(&[(0, 7), (1, 7)]), &known, &Anchors::default(), false)), Vec::<u32>::new());
        let all = choose(seen(&[(0, 7), (1, 7), (2, 7)]), &known, &Anchors::default(), false);
        assert_eq!(numbers(&all), [0, 1, 2], "the frame is free only when none maps it");
    }

    #[test]
    fn huge_pages_are_split_for_many_subpages_only() {
        let few = u32::try_from(kernel::pages_of_huge() / HUGE_SHARE).unwrap();
        // One huge page with just enough partners in another one, and a third with one whose only partner is page 900.
        let mut pages = Vec::new();
        let mut known = Known::default();
        for part in 0..few {
            pages.extend([(part, u64::from(part) + 10), (part + 512, u64::from(part) + 10)]);
            known.huge.extend([(part, 1), (part + 512, 2)]);
        }
        pages.extend([(1100, 5), (1700, 5)]);
        known.huge.insert(1100, 3);
        let chosen = choose(seen(&pages), &known, &Anchors::default(), false);
        assert_eq!((chosen.pages.len(), chosen.huge_split), (2 * few as usize, 2));
        assert_eq!((chosen.left_huge, chosen.huge_left), (1, 1));
        let all = choose(seen(&pages), &known, &Anchors::default(), true);
        assert_eq!((all.pages.len(), all.huge_split, all.huge_left), (2 * few as usize + 2, 3, 0));
    }
}
