//! The same data at other offsets: where the allocator was asked in another order, a page's data is spread over two pages
//! of the other process, neither of which resembles it. But sequences of words do survive.

use super::groups::{Record, Tally};

/// Hashes kept of a page.
pub(super) const SKETCH: usize = 4;
/// A sequence found on more pages for each process than this is a pattern of the program, such as the head of every
/// string, and tells nothing of where data came from.
const COMMON: usize = 4;

/// The least hashes of all sequences of four words of a page, ascending; `u32::MAX` where there are fewer.
pub(super) type Sketch = [u32; SKETCH];

/// Collects the sketch of a page, word by word.
pub(super) struct Sequences {
    recent: u64,
    least: Sketch,
}

impl Sequences {
    pub(super) fn new() -> Self {
        Self { recent: 0, least: [u32::MAX; SKETCH] }
    }

    /// Takes the next word, with addresses wholly masked.
    #[inline]
    pub(super) fn take(&mut self, word: u64) {
        // What came before leaves at the top, 16 bits a word; the upper half is the hash of the last four words.
        let mixed = (word ^ 0x9e37_79b9_7f4a_7c15).wrapping_mul(0xd6e8_feb8_6659_fd93);
        self.recent = (self.recent << 16).wrapping_add(mixed);
        let hash = (self.recent >> 32) as u32;
        // Patterns repeat: most of what is low enough is there already.
        if hash < self.least[SKETCH - 1] && hash != self.least[0] {
            self.insert(hash);
        }
    }

    fn insert(&mut self, hash: u32) {
        if let Err(at) = self.least.binary_search(&hash) {
            self.least.copy_within(at..SKETCH - 1, at + 1);
            self.least[at] = hash;
        }
    }

    pub(super) fn sketch(&self) -> Sketch {
        self.least
    }
}

/// Where the sequences of the sketches were seen.
pub(super) struct Sightings<'a> {
    records: &'a [Record],
    /// Hash and number of the record, ascending.
    seen: Vec<(u32, u32)>,
}

impl<'a> Sightings<'a> {
    pub(super) fn of(records: &'a [Record]) -> Self {
        let mut seen: Vec<(u32, u32)> = (0_u32..)
            .zip(records)
            .flat_map(|(at, record)| record.sketch.map(|hash| (hash, at)))
            .filter(|&(hash, _)| hash != u32::MAX)
            .collect();
        seen.sort_unstable();
        Self { records, seen }
    }

    /// How many processes hold most of the data of `record`, and a page of another one that holds some of it. Nothing if
    /// there are too few sequences to tell.
    pub(super) fn holders(&self, record: &Record) -> Option<(u64, &'a Record)> {
        let mut counts = Vec::with_capacity(SKETCH);
        let mut other = None;
        for hash in record.sketch {
            let start = self.seen.partition_point(|&(seen, _)| seen < hash);
            let run = self.seen[start..].iter().take_while(|&&(seen, _)| seen == hash);
            let mut owners: Vec<u32> = run.clone().map(|&(_, at)| self.records[at as usize].owner).collect();
            let pages = owners.len();
            owners.sort_unstable();
            owners.dedup();
            if pages <= COMMON * owners.len() {
                counts.push(owners.len() as u64);
                let page = run.map(|&(_, at)| &self.records[at as usize]).find(|page| page.owner != record.owner);
                other = other.or(page);
            }
        }
        counts.sort_unstable();
        // All but one of four, or both of two, are in so many.
        let holders = if counts.len() < 2 { return None } else { counts[(counts.len() - 1) / 2] };
        Some((holders, other?))
    }
}

/// Pages of a cluster that are left once its own processes are equal to each other, and how many of these would be saved
/// if all `holders` of the data were.
pub(super) fn worth(tally: &Tally, holders: u64) -> (u64, f64) {
    let left = tally.contents - tally.between_processes();
    let own = tally.owners.len() as u64;
    (left, left as f64 * (1.0 - own as f64 / holders.max(own) as f64))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use proptest::prelude::*;

    use super::*;

    fn sketch(words: &[u64]) -> Sketch {
        let mut sequences = Sequences::new();
        words.iter().for_each(|&word| sequences.take(word));
        sequences.sketch()
    }

    proptest! {
        /// Wherever a sequence begins, its sketch holds the least hashes of its parts.
        #[test]
        fn a_sketch_is_of_what_its_parts_are(words in proptest::collection::vec(any::<u64>(), 8..200), cut in 3_usize..8) {
            let whole = sketch(&words);
            let parts = [sketch(&words[..cut]), sketch(&words[cut - 3..])].concat();
            prop_assert!(whole.is_sorted());
            // The first three hashes of a part are of fewer words and may displace others.
            prop_assert!(whole.iter().filter(|hash| parts.contains(hash)).count() >= 1);
        }
    }

    #[test]
    fn eight_holders_of_which_two_are_equal_already_leave_a_quarter_of_a_page() {
        let tally = Tally { contents: 2, owners: vec![(1, 1), (2, 1)] };
        assert_eq!(worth(&tally, 8), (1, 0.75));
        assert_eq!(worth(&tally, 1), (1, 0.0));
    }
}
