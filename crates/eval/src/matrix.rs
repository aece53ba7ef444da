//! Who shares with whom.

use std::collections::HashMap;

use page::census::Groups;

use crate::numbers::Numbers;

/// Who shares with whom, for up to 32 owners: `of` gives the owner's place among them, of a process. Off the diagonal
/// contents that both hold; on it, copies within one process with `by_process`, else contents of several processes of one group.
pub(crate) fn matrix(
    groups: &Groups,
    numbers: &Numbers<'_>,
    owners: usize,
    of: impl Fn(u32) -> Option<usize> + Sync,
    by_process: bool,
    threads: usize,
) -> Vec<Vec<u64>> {
    struct Seen {
        /// By the sets of owners, and of those with several.
        sets: HashMap<(u32, u32), u64>,
        within: Vec<u64>,
    }
    let make = || Seen { sets: HashMap::new(), within: vec![0; owners] };
    let parts = groups.visit(threads, make, |seen, group| {
        if group.pages.len() < 2 {
            return;
        }
        let (mut holders, mut several) = (0_u32, 0_u32);
        let mut last = None;
        for page in group.pages {
            let process = numbers.process_of(numbers.span(*page).mapping);
            let Some(owner) = of(process) else { continue };
            let bit = 1 << owner;
            if by_process {
                seen.within[owner] += u64::from(holders & bit != 0);
            } else if holders & bit != 0 && last != Some(process) {
                several |= bit;
            }
            last = Some(process);
            holders |= bit;
        }
        if holders.count_ones() > 1 || several != 0 {
            *seen.sets.entry((holders, several)).or_default() += 1;
        }
    });
    let mut pages = vec![vec![0; owners]; owners];
    for part in parts {
        for (owner, within) in part.within.iter().enumerate() {
            pages[owner][owner] += within;
        }
        for ((holders, several), contents) in part.sets {
            for one in (0..owners).filter(|owner| holders >> owner & 1 == 1) {
                for other in (0..owners).filter(|other| *other != one && holders >> other & 1 == 1) {
                    pages[one][other] += contents;
                }
                if several >> one & 1 == 1 {
                    pages[one][one] += contents;
                }
            }
        }
    }
    pages
}
