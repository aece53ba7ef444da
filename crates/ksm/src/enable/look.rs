//! What is marked in a process, and what is still to be done.

use kernel::{Bytes, Range, VmaUse};

use super::goal::{Goal, Wish};
use super::outcome::Marks;

/// Merged memory that one call un-merges: it is copied under the lock of all mappings, for which other threads wait too.
pub(crate) const STEP: Bytes = Bytes::from_mib(16);

/// A look at all mappings of a process with a goal in mind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Look {
    /// What is marked.
    pub(crate) marks: Marks,
    /// Ranges to mark. Neighbours are joined: one call marks them all, and what cannot be marked is passed over.
    pub(crate) to_mark: Vec<Range>,
    /// Ranges to unmark, with the bytes that are merged in their mappings. Neighbours are joined while that is little.
    pub(crate) to_unmark: Vec<(Range, Bytes)>,
    /// Ranges that are marked, likewise.
    pub(crate) marked: Vec<(Range, Bytes)>,
    /// What is marked and is to stay as it is.
    pub(crate) to_keep: Vec<Range>,
    /// Some part was meant to be marked or unmarked.
    pub(crate) meant: bool,
}

impl Look {
    pub(crate) fn at(vmas: &[VmaUse], goal: &Goal, kept: &[Range]) -> Self {
        let mut look = Self::default();
        // The last part that was to be marked, if the next one continues it.
        let mut run: Option<(Range, bool)> = None;
        for entry in vmas {
            let (marked, compatible) = (entry.flags.mergeable(), entry.flags.ksm_compatible());
            if marked {
                look.marks.marked_vmas += 1;
                look.marks.marked_bytes += entry.vma.range.len().get();
                look.marks.marked_anonymous_bytes += entry.memory.anonymous.get();
                add(&mut look.marked, entry.vma.range, entry.memory.ksm);
            }
            look.marks.ksm_bytes += entry.memory.ksm.get();
            for (range, wish) in goal.wishes(&entry.vma) {
                let was_kept = kept.iter().any(|kept| kept.contains_range(&range));
                let wish = if wish == Wish::AsItIs && was_kept { Wish::Marked } else { wish };
                look.meant |= wish != Wish::AsItIs && compatible;
                if wish != Wish::Marked {
                    look.to_mark.extend(ended(&mut run));
                }
                match wish {
                    Wish::Marked => {
                        look.marks.unmergeable_vmas += u64::from(!compatible);
                        let lacks = compatible && !marked;
                        run = match run {
                            Some((before, lacking)) if before.end() == range.start() => {
                                Some((joined(before, range), lacking || lacks))
                            }
                            _ => {
                                look.to_mark.extend(ended(&mut run));
                                Some((range, lacks))
                            }
                        };
                    }
                    Wish::Unmarked if marked => add(&mut look.to_unmark, range, entry.memory.ksm),
                    Wish::AsItIs if marked => look.to_keep.push(range),
                    _ => {}
                }
            }
        }
        look.to_mark.extend(ended(&mut run));
        look
    }

    /// Bytes that are merged in these ranges, or more where a range is a part of a mapping.
    pub(crate) fn merged(ranges: &[(Range, Bytes)]) -> Bytes {
        ranges.iter().map(|(range, ksm)| (*ksm).min(range.len())).sum()
    }
}

/// Ends a run. `None` if nothing in it lacks its mark.
fn ended(run: &mut Option<(Range, bool)>) -> Option<Range> {
    run.take().filter(|(_, lacking)| *lacking).map(|(range, _)| range)
}

/// Adds a range, to the one before it if one call does for both.
fn add(ranges: &mut Vec<(Range, Bytes)>, range: Range, merged: Bytes) {
    match ranges.last_mut() {
        Some((before, ksm)) if before.end() == range.start() && *ksm + merged <= STEP => {
            (*before, *ksm) = (joined(*before, range), *ksm + merged);
        }
        _ => ranges.push((range, merged)),
    }
}

fn joined(first: Range, second: Range) -> Range {
    Range::new(first.start(), second.end()).expect("neighbours, in order")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use kernel::{MemoryUse, Vaddr, VmFlags, Vma, page_size};

    fn entry(start: u64, pages: u64, flags: &[[u8; 2]], name: &str) -> VmaUse {
        let range = range(start, pages);
        let mut vm_flags = VmFlags::default();
        flags.iter().for_each(|flag| vm_flags.insert(*flag));
        let ksm = if flags.contains(b"mg") { Bytes(page_size()) } else { Bytes(0) };
        let memory = MemoryUse { ksm, anonymous: range.len(), ..MemoryUse::default() };
        VmaUse { vma: Vma { range, name: name.into(), ..Vma::default() }, memory, flags: vm_flags, ..VmaUse::default() }
    }

    fn range(start: u64, pages: u64) -> Range {
        Range::new(Vaddr(start * page_size()), Vaddr((start + pages) * page_size())).unwrap()
    }

    #[test]
    fn neighbours_are_marked_in_one_call_and_nothing_is_marked_twice() {
        let vmas = [
            entry(16, 2, &[], ""),
            entry(18, 2, &[*b"mg"], ""),
            entry(20, 2, &[*b"sh"], ""),
            entry(30, 4, &[*b"mg"], ""),
            entry(40, 1, &[*b"ht"], ""),
            entry(50, 1, &[], ""),
        ];
        let look = Look::at(&vmas, &Goal::enable(), &[]);
        assert_eq!(look.to_mark, [range(16, 6), range(50, 1)]);
        assert_eq!((look.marks.marked_vmas, look.marks.unmergeable_vmas), (2, 2));
        assert_eq!(look.marks.ksm_bytes, 2 * page_size());
        assert!(look.to_unmark.is_empty() && look.meant);
        assert!(Look::at(&vmas[1..5], &Goal::enable(), &[]).to_mark.is_empty());
    }

    #[test]
    fn neighbours_are_unmarked_in_one_call_while_little_is_merged_in_them() {
        let merged = |start, pages, ksm| {
            let mut entry = entry(start, pages, &[*b"mg"], "");
            entry.memory.ksm = ksm;
            entry
        };
        let vmas = [
            merged(16, 2, Bytes(0)),
            merged(18, 2, Bytes(page_size())),
            // A hole.
            merged(30, 1, STEP),
            merged(31, 1, Bytes(0)),
            merged(32, 1, Bytes(1)),
        ];
        let look = Look::at(&vmas, &Goal::disable(), &[]);
        let joined = [(range(16, 4), Bytes(page_size())), (range(30, 2), STEP), (range(32, 1), Bytes(1))];
        assert_eq!((&look.to_unmark[..], &look.marked[..]), (&joined[..], &joined[..]));
        assert_eq!(look.marks.marked_vmas, 5);
    }

    #[test]
    fn what_is_kept_is_marked_again() {
        let vmas = [entry(16, 2, &[*b"mg"], "[heap]"), entry(18, 2, &[*b"mg"], "")];
        let all_but_heap = Goal { exclude: vec!["heap".parse().unwrap()], ..Goal::disable() };
        let first = Look::at(&vmas, &all_but_heap, &[]);
        assert_eq!(
            (&first.to_unmark[..], &first.to_keep[..]),
            (&[(range(18, 2), Bytes(page_size()))][..], &[range(16, 2)][..])
        );
        let unmarked = [entry(16, 2, &[], "[heap]"), entry(18, 2, &[], "")];
        let second = Look::at(&unmarked, &all_but_heap, &first.to_keep);
        assert_eq!(second.to_mark, [range(16, 2)]);
    }

    #[test]
    fn nothing_meant_is_told_from_nothing_left_to_do() {
        let only = |word: &str| Goal { only: vec![word.parse().unwrap()], ..Goal::enable() };
        let vmas = [entry(16, 2, &[*b"mg"], "[heap]"), entry(18, 2, &[*b"sh"], "/shared")];
        assert!(Look::at(&vmas, &only("heap"), &[]).meant);
        let shared = Look::at(&vmas, &only("shared"), &[]);
        assert!(!shared.meant && shared.marks.unmergeable_vmas == 1);
        assert!(!Look::at(&vmas, &only("stack"), &[]).meant);
    }
}
