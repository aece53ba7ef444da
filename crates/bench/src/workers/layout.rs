//! Which page of which worker holds what.
//!
//! A content is a number; the bytes follow from it, so that a worker can fill its pages and check them again without
//! being told more. Contents come in units of a run's length, each unit several times, and the units are shuffled:
//! neighbours are equal within a run and no further.

use clap::Args;

/// How the pages of a group of workers are laid out.
#[derive(Args, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Pages of all workers together.
    #[arg(long)]
    pub pages: u64,
    /// Pages of a run.
    #[arg(long)]
    pub run: u64,
    /// How often each content occurs.
    #[arg(long)]
    pub copies: u64,
    /// Workers.
    #[arg(long)]
    pub workers: u64,
}

impl Layout {
    /// Whole units in all workers.
    #[must_use]
    pub fn new(pages: u64, run: u64, copies: u64, workers: u64) -> Self {
        let (run, copies, workers) = (run.max(1), copies.max(1), workers.max(1));
        // Every worker has as many slots for units as the others, every unit all its copies.
        let distinct = (pages / run / copies / workers).max(1) * workers;
        Self { pages: distinct * copies * run, run, copies, workers }
    }

    /// Contents that occur.
    #[must_use]
    pub fn distinct(&self) -> u64 {
        self.pages / self.copies
    }

    /// Pages that merging everything saves.
    #[must_use]
    pub fn saved(&self) -> u64 {
        self.pages - self.distinct()
    }

    /// The contents of one worker's pages, in order, and one more that nobody else has: the last page of a mapping is
    /// never merged. Layouts with different numbers of copies have no content in common.
    #[must_use]
    pub fn contents(&self, worker: u64) -> Vec<u64> {
        let units = self.pages / self.run;
        let distinct_units = units / self.copies;
        let mut slots: Vec<u64> = (0..units).map(|slot| slot % distinct_units).collect();
        let mut random = Random::new(self.run << 8 | self.copies);
        for slot in (1..slots.len()).rev() {
            let other = usize::try_from(random.below(slot as u64 + 1)).expect("below a slot's number");
            slots.swap(slot, other);
        }
        let here = units / self.workers;
        let first = usize::try_from(worker * here).expect("a slot's number");
        let here = usize::try_from(here).expect("a slot's number");
        let mut contents: Vec<u64> = slots[first..first + here]
            .iter()
            .flat_map(|unit| (0..self.run).map(move |page| self.copies << 40 | (unit * self.run + page)))
            .collect();
        contents.push(u64::MAX - (self.copies << 16 | worker));
        contents
    }
}

/// The words of a content.
pub(crate) fn words(content: u64) -> impl Iterator<Item = u64> {
    let mut random = Random::new(content);
    std::iter::from_fn(move || Some(random.next()))
}

/// Numbers that look random and are always the same (xorshift64*, seeded through splitmix64).
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        let mut word = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        Self((word ^ word >> 31) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Below `end`, which is not 0.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        let scaled = (u128::from(self.next()) * u128::from(end)) >> 64;
        u64::try_from(scaled).expect("below `end`")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn every_content_occurs_as_often_as_it_should() {
        for (run, copies, workers) in [(1, 2, 3), (16, 8, 2), (256, 2, 1)] {
            let layout = Layout::new(16_384, run, copies, workers);
            let mut seen: HashMap<u64, u64> = HashMap::new();
            for worker in 0..layout.workers {
                let mut contents = layout.contents(worker);
                assert_eq!(contents.pop(), Some(u64::MAX - (copies << 16 | worker)));
                contents.into_iter().for_each(|content| *seen.entry(content).or_default() += 1);
            }
            assert_eq!(seen.len() as u64, layout.distinct());
            assert!(seen.values().all(|count| *count == copies));
            assert!(layout.pages > 16_384 / 2 && layout.pages <= 16_384, "{layout:?}");
            let other = Layout::new(16_384, run, copies + 1, workers);
            assert!(other.contents(0).iter().all(|content| !seen.contains_key(content)));
        }
    }

    #[test]
    fn neighbours_are_equal_within_a_run_and_no_further() {
        let layout = Layout::new(4096, 16, 2, 1);
        let contents = layout.contents(0);
        let follows = |pair: &&[u64]| pair[0] + 1 == pair[1];
        let within = contents.chunks(16).take(4096 / 16).all(|run| run.windows(2).all(|pair| pair[0] + 1 == pair[1]));
        assert!(within);
        let beyond = contents[15..].windows(2).step_by(16).filter(follows).count();
        assert!(beyond < 8, "{beyond} of 255 units happen to follow each other");
    }

    #[test]
    fn contents_differ_from_their_first_word_on() {
        let first: std::collections::HashSet<u64> = (0..10_000).filter_map(|content| words(content).next()).collect();
        assert_eq!(first.len(), 10_000);
        assert_eq!(words(7).take(9).collect::<Vec<_>>(), words(7).take(9).collect::<Vec<_>>());
    }
}
