//! Runs of neighbouring pages with one content, which the store is to have side by side as well.
//!
//! How often is decided when a content is copied into the store, since only then all pages are known that wait for it: a
//! run is met in pieces. At most a sixteenth of the pages that stand in runs, so that of a run fifteen sixteenths and
//! more are saved whoever makes it, and never more than the longest run has. Runs that are met later and are longer get
//! more copies; pages that are merged already keep theirs.

use page::{Fingerprint, Location};
use store::Partition;

/// Neighbours with one content that are a run.
const RUN: usize = 16;
/// Pages of runs for each copy.
const PAGES_FOR_A_COPY: usize = 16;

/// Whether so many neighbours are a run.
pub(crate) fn is_run(pages: usize) -> bool {
    pages >= RUN
}

/// Gives the contents of runs their copies in the store. `content_of` says what the takers of a fill hold. Takers are
/// put into the order of their fills.
pub(crate) fn widen<'a>(
    partition: &mut Partition,
    takers: &mut [(Location, usize)],
    content_of: impl Fn(usize) -> (Fingerprint, &'a [u8]),
) {
    takers.sort_unstable_by_key(|(location, fill)| (*fill, *location));
    for takers in takers.chunk_by(|(_, fill), (_, other)| fill == other) {
        let copies = copies_for(takers);
        if copies < 2 {
            continue;
        }
        let (content, page) = content_of(takers[0].1);
        // One copy may still be made or found: the fill will tell what is wrong.
        let _ = partition.repeat(content, page, copies);
    }
}

/// How many copies the pages that wait for one content deserve; they are in order.
fn copies_for(takers: &[(Location, usize)]) -> u32 {
    let neighbours = |(before, _): &(Location, usize), (after, _): &(Location, usize)| {
        before.owner == after.owner && before.page.next() == after.page
    };
    let runs = || takers.chunk_by(neighbours).map(<[_]>::len).filter(|pages| is_run(*pages));
    let (longest, all) = (runs().max().unwrap_or(0), runs().sum::<usize>());
    u32::try_from((all / PAGES_FOR_A_COPY).min(longest)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use page::PageNumber;
    use store::Options;

    use super::*;

    fn pages(owner: u32, first: u64, count: u64) -> Vec<(Location, usize)> {
        (first..first + count).map(|page| (Location { owner, page: PageNumber(page) }, 0)).collect()
    }

    #[test]
    fn a_sixteenth_of_what_stands_in_runs_is_copied() {
        assert_eq!(copies_for(&pages(1, 0, 2)), 0);
        assert_eq!(copies_for(&pages(1, 0, 16)), 1, "as every content has");
        assert_eq!(copies_for(&pages(1, 0, 1600)), 100);
        let scattered: Vec<_> = (0..1000).flat_map(|n| pages(1, n * 100, 15)).collect();
        assert_eq!(copies_for(&scattered), 0, "no runs");
        let short: Vec<_> = (0..1000).flat_map(|n| pages(1, n * 100, 20)).collect();
        assert_eq!(copies_for(&short), 20, "no more than a run can use");
        let two = [pages(1, 0, 16), pages(2, 16, 16)].concat();
        assert_eq!(copies_for(&two), 2, "two members' pages are no neighbours");
        assert_eq!(copies_for(&[pages(1, 0, 8), pages(2, 8, 8)].concat()), 0);
    }

    #[test]
    fn each_content_has_copies_of_its_own() {
        let mut partition = Partition::open(Options::for_user(1)).unwrap();
        let bytes = |fill: usize| if fill == 0 { [7; 4096] } else { [8; 4096] };
        let contents = [0, 1].map(|fill| (partition.secret().fingerprint(&bytes(fill)), bytes(fill)));
        // A run of one content, and scattered pages of another.
        let mut takers = pages(1, 1000, 320);
        takers.extend(pages(1, 0, 64).into_iter().step_by(2).map(|(location, _)| (location, 1)));
        takers.reverse();
        widen(&mut partition, &mut takers, |fill| (contents[fill].0, &contents[fill].1));
        assert_eq!(partition.copies(contents[0].0).unwrap().pages, 20);
        assert_eq!(partition.copies(contents[1].0), None, "its pages are scattered");
    }
}
