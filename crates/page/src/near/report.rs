//! What was found: near duplicates by their cause.

use std::collections::BTreeMap;

use super::cause::Cause;
use super::compare::DifferingWord;

/// Sets of fixed offsets that are told apart; rarer ones go under no offsets at all.
const OFFSET_SETS: usize = 16;

/// What became of the pages that were fed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NearCounts {
    /// All of them.
    pub fed: u64,
    /// Zero pages and pages that repeat one word.
    pub plain: u64,
    /// Pages that consist mostly of high-entropy words.
    pub random: u64,
    /// Pages left out because the index was full; 0 if [`NearReport::share`] is 1.
    pub left_out: u64,
    /// Pages read again for comparison.
    pub compared: u64,
    /// Of these, those that had gone or changed meanwhile.
    pub changed: u64,
}

/// Near duplicates by their cause.
#[derive(Clone, Debug, PartialEq)]
pub struct NearReport {
    /// What became of the pages.
    pub counts: NearCounts,
    /// The share of all groups that was kept, 1 unless the index was full. Divide the figures of the causes by it for an
    /// estimate of the whole.
    pub share: f64,
    /// The causes, most worth first.
    pub causes: Vec<NearCause>,
}

/// What one cause is worth.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NearCause {
    /// The cause.
    pub cause: Cause,
    /// Groups of near pages.
    pub groups: u64,
    /// Different contents in these groups.
    pub pages: u64,
    /// Pages that the remedy would save beyond what equal pages save already. Of [`Cause::Mixed`], which has none, what
    /// processes that became equal to each other would.
    pub worth: u64,
    /// Of `worth`, pages in which addresses differ too, so that the layout has to be shared as well.
    pub worth_with_layout: u64,
    /// Two pages of the group that is worth most.
    pub example: NearExample,
}

/// Two near pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NearExample {
    /// The caller's numbers for them.
    pub ids: (u64, u64),
    /// Their processes.
    pub owners: (u32, u32),
    /// In how many words they differ.
    pub differing: u32,
    /// The first of these words.
    pub first: Vec<DifferingWord>,
    /// What their group is worth.
    pub worth: u64,
}

/// The causes by what they are worth. Sets of fixed offsets beyond the most worthy are taken together.
pub(super) fn by_worth(causes: BTreeMap<Cause, NearCause>) -> Vec<NearCause> {
    let mut sorted: Vec<NearCause> = causes.into_values().collect();
    sorted.sort_by_key(|cause| std::cmp::Reverse(cause.worth));
    let mut sets = 0;
    let mut kept: Vec<NearCause> = Vec::new();
    let mut various: Option<NearCause> = None;
    for mut cause in sorted {
        let is_set = matches!(cause.cause, Cause::FixedOffsets { .. });
        sets += usize::from(is_set);
        if !is_set || sets <= OFFSET_SETS {
            kept.push(cause);
        } else if let Some(sum) = &mut various {
            sum.groups += cause.groups;
            sum.pages += cause.pages;
            sum.worth += cause.worth;
            sum.worth_with_layout += cause.worth_with_layout;
        } else {
            cause.cause = Cause::FixedOffsets { offsets: Vec::new() };
            various = Some(cause);
        }
    }
    kept.extend(various);
    kept.sort_by_key(|cause| std::cmp::Reverse(cause.worth));
    kept
}
