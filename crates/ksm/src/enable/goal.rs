//! What is wanted of a process's mappings.

use std::collections::BTreeSet;

use kernel::{MappingWord, Range, Vma};

/// Which of a process's mappings are to be marked for ksmd, and which not.
///
/// There are two kinds of marks. A *switch* of the whole process (PR_SET_MEMORY_MERGE) marks all that can be merged, now and
/// later, and is inherited by children and kept over exec. Marks of single mappings (MADV_MERGEABLE) are inherited by
/// children, and end with an exec. The switch cannot leave anything out for good: whatever is mapped later is marked
/// again, and a heap that grows gets a marked part. So where something is excluded, the switch stays off, and the rest is
/// marked piece by piece: what is excluded stays excluded, and what is mapped later is not merged, unless [`Goal::later`]
/// asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Goal {
    /// To be merged, or no more.
    pub merged: bool,
    /// Only these mappings; none named: all.
    pub only: Vec<MappingWord>,
    /// But not these.
    pub exclude: Vec<MappingWord>,
    /// Enabling, with something excluded: turn the switch on all the same.
    pub later: bool,
}

/// What is wanted of a part of a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    Marked,
    Unmarked,
    AsItIs,
}

impl Goal {
    /// All memory is merged, now and later.
    #[must_use]
    pub const fn enable() -> Self {
        Self { merged: true, only: Vec::new(), exclude: Vec::new(), later: false }
    }

    /// No memory is merged.
    #[must_use]
    pub const fn disable() -> Self {
        Self { merged: false, only: Vec::new(), exclude: Vec::new(), later: false }
    }

    /// How the switch of the process is to stand; `None`: as it does.
    #[must_use]
    pub fn switch(&self) -> Option<bool> {
        self.only.is_empty().then_some(self.merged && (self.exclude.is_empty() || self.later))
    }

    /// The parts of a mapping, in order, each with what is wanted of it.
    pub(crate) fn wishes(&self, vma: &Vma) -> Vec<(Range, Wish)> {
        if vma.is_special() {
            return vec![(vma.range, Wish::AsItIs)];
        }
        let parts = |words: &[MappingWord]| words.iter().filter_map(|word| word.part_of(vma)).collect::<Vec<_>>();
        let (only, exclude) = (parts(&self.only), parts(&self.exclude));
        let ends = |range: &Range| [range.start(), range.end()];
        let cuts: BTreeSet<_> = only.iter().chain(&exclude).chain([&vma.range]).flat_map(ends).collect();
        let places: Vec<_> = cuts.into_iter().collect();
        let part = |pair: &[kernel::Vaddr]| {
            let range = Range::new(pair[0], pair[1]).expect("ends of pages, in order");
            let in_any = |ranges: &[Range]| ranges.iter().any(|outer| outer.contains_range(&range));
            (range, self.wish(self.only.is_empty() || in_any(&only), in_any(&exclude)))
        };
        places.windows(2).map(part).collect()
    }

    fn wish(&self, meant: bool, excluded: bool) -> Wish {
        match (self.merged, meant, excluded) {
            (_, false, _) => Wish::AsItIs,
            (true, true, false) => Wish::Marked,
            (false, true, false) => Wish::Unmarked,
            // Left out of everything: not merged. Left out of some, or of what is given up: not touched.
            (true, true, true) if self.only.is_empty() => Wish::Unmarked,
            (_, true, true) => Wish::AsItIs,
        }
    }

    /// The words that stand for none of these mappings.
    pub(crate) fn without_a_mapping<'a>(&'a self, vmas: &[Vma]) -> Vec<&'a MappingWord> {
        let stands_for_none = |word: &&MappingWord| !vmas.iter().any(|vma| word.part_of(vma).is_some());
        self.only.iter().chain(&self.exclude).filter(stands_for_none).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use kernel::{Vaddr, page_size};

    fn vma(start: u64, pages: u64, name: &str) -> Vma {
        let range = Range::new(Vaddr(start * page_size()), Vaddr((start + pages) * page_size())).unwrap();
        Vma { range, name: name.into(), ..Vma::default() }
    }

    fn words(words: &[&str]) -> Vec<MappingWord> {
        words.iter().map(|word| word.parse().unwrap()).collect()
    }

    fn told(goal: &Goal, vma: &Vma) -> Vec<(u64, Wish)> {
        goal.wishes(vma).into_iter().map(|(range, wish)| (range.pages().get(), wish)).collect()
    }

    #[test]
    fn the_switch_is_for_whole_processes() {
        let (on, off) = (Goal::enable(), Goal::disable());
        assert_eq!((on.switch(), off.switch()), (Some(true), Some(false)));
        assert_eq!(Goal { only: words(&["heap"]), ..on.clone() }.switch(), None);
        let without = Goal { exclude: words(&["heap"]), ..on };
        assert_eq!(without.switch(), Some(false), "it would mark what is excluded as soon as that grows");
        assert_eq!(Goal { later: true, ..without }.switch(), Some(true));
    }

    #[test]
    fn what_is_excluded_is_unmarked_or_left() {
        let heap = vma(16, 4, "[heap]");
        let other = vma(32, 2, "");
        let without = Goal { exclude: words(&["heap"]), ..Goal::enable() };
        assert_eq!(
            (told(&without, &heap), told(&without, &other)),
            (vec![(4, Wish::Unmarked)], vec![(2, Wish::Marked)])
        );
        let all_but = Goal { exclude: words(&["heap"]), ..Goal::disable() };
        assert_eq!(
            (told(&all_but, &heap), told(&all_but, &other)),
            (vec![(4, Wish::AsItIs)], vec![(2, Wish::Unmarked)])
        );
        let only = Goal { only: words(&["heap"]), ..Goal::enable() };
        assert_eq!((told(&only, &heap), told(&only, &other)), (vec![(4, Wish::Marked)], vec![(2, Wish::AsItIs)]));
        let special = vma(64, 2, "[vdso]");
        assert_eq!(told(&Goal::enable(), &special), [(2, Wish::AsItIs)]);
    }

    #[test]
    fn addresses_cut_mappings() {
        let size = page_size();
        let (first, last) = (format!("{:x}-{:x}", 17 * size, 22 * size), format!("{:x}-{:x}", 19 * size, 20 * size));
        let goal = Goal { only: words(&[&first]), exclude: words(&[&last]), ..Goal::enable() };
        assert_eq!(
            told(&goal, &vma(16, 5, "")),
            [(1, Wish::AsItIs), (2, Wish::Marked), (1, Wish::AsItIs), (1, Wish::Marked)]
        );
    }

    #[test]
    fn words_for_nothing_are_told() {
        let goal = Goal { only: words(&["heap", "libnone.so"]), exclude: words(&["stack"]), ..Goal::enable() };
        let missing: Vec<_> = goal.without_a_mapping(&[vma(16, 4, "[heap]")]).iter().map(ToString::to_string).collect();
        assert_eq!(missing, ["libnone.so", "stack"]);
    }
}
