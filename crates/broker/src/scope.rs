//! `--scope all`: which memory of a program that has handed nothing over is managed, and who says that its gate is complete.
//!
//! Left alone is what a thread's life hangs on (stacks, with the thread's control block in them), what has a property that
//! says "not this" (locked, not to be dumped, registered with a userfaultfd of the program's), and what is too small to be
//! worth a row of the gate's table.

use std::fs::File;
use std::sync::atomic::Ordering::SeqCst;

use abi::control::Control;
use kernel::{Pid, Range, Vaddr, Vma, VmaUse, task};

use crate::layout::{Layout, refuses};
use crate::left_alone::by_reason;
use crate::member::Member;
use crate::order::robust_lists;

/// Says whether code can change mappings past the gate.
pub trait Judge: Send + Sync + std::fmt::Debug {
    /// Whether a program may be managed: all code that it has now, and what it is. Asked once, when its helper has come.
    /// `own`: where the agent's code lies.
    ///
    /// # Errors
    /// Why it is left alone, in a few words.
    fn program(&self, pid: Pid, own: &[Range]) -> Result<(), String>;

    /// Whether code that a program is about to map may come: a file, or memory that the program writes.
    ///
    /// # Errors
    /// Which code it is that nobody vouches for, and why, in a few words.
    fn admits(&self, pid: Pid, file: Option<&File>) -> Result<(), String>;
}

/// Where the agent's code lies in a program, by its own account: a program that says something else about itself has
/// only itself to lose.
pub(crate) fn own_code(control: &Control) -> Vec<Range> {
    let slots = control.own_code.iter().map(|slot| (slot.start.load(SeqCst), slot.end.load(SeqCst)));
    slots.filter_map(|(start, end)| Range::new(Vaddr(start), Vaddr(end)).ok()).filter(|own| !own.is_empty()).collect()
}

/// Ranges that are smaller are not worth their row and their mappings: 128 KiB.
const PAGES_MIN: u64 = 32;
/// Rows of the gate's table that are used for this; the rest is for ranges that are cut in two.
const ROWS: usize = abi::control::RANGES_MAX * 3 / 4;

/// What was looked at and not chosen: every process has a stack. To look costs as much as all else that is done for a
/// process in some cycles, so the same is looked at again only now and then, since properties change. Ranges ascend.
#[derive(Debug, Default)]
pub(crate) struct PassedOver {
    ranges: Vec<Range>,
    times: u32,
}

/// So often the same is not looked at.
const PASSED_OVER: u32 = 8;

impl PassedOver {
    /// Whether it is time to look at these.
    fn is_due(&mut self, ranges: &[Range]) -> bool {
        self.times += 1;
        self.times > PASSED_OVER || ranges.iter().any(|range| !self.has(range))
    }

    fn has(&self, range: &Range) -> bool {
        self.ranges.binary_search_by_key(&range.start(), Range::start).is_ok_and(|found| self.ranges[found] == *range)
    }

    /// These were looked at, and so much was chosen.
    fn note(&mut self, looked_at: Vec<Range>, chosen: &[Range]) {
        let mut chosen = chosen.to_vec();
        chosen.sort_by_key(Range::start);
        self.ranges = looked_at;
        self.ranges.retain(|range| {
            let next = chosen.partition_point(|chosen| chosen.end() <= range.start());
            chosen.get(next).is_none_or(|chosen| range.end() <= chosen.start())
        });
        self.times = 0;
    }
}

/// What may come under management in a member of which these are the mappings, and is not managed yet; the largest first.
/// Reads the properties of its mappings only if there is something that looks new.
/// The rest is counted by its reason then.
pub(crate) fn chosen(member: &mut Member, mapped: &[Vma]) -> Vec<Range> {
    let managed = member.ranges();
    let room = ROWS.saturating_sub(managed.len());
    let new = mapped.iter().filter(|vma| vma.is_private_anonymous() && vma.read && vma.write);
    let mut new: Vec<Range> = new.flat_map(|vma| without(vma.range, &managed)).collect();
    // What lies behind a managed range comes into its row, however short it is.
    let goes_on = |range: &Range| managed.binary_search_by_key(&range.start(), Range::end).is_ok();
    new.retain(|range| is_worth_it(*range) || goes_on(range));
    if room == 0 || new.is_empty() || !member.view.passed_over.is_due(&new) {
        return Vec::new();
    }
    let Ok(vmas) = Layout::at(member).read() else { return Vec::new() };
    let Some(heads) = thread_heads(member.pid) else { return Vec::new() };
    member.view.left_alone = by_reason(&vmas, &heads);
    let mut ranges: Vec<Range> = eligible(&vmas, &heads)
        .into_iter()
        .flat_map(|range| without(range, &managed))
        .filter(|range| is_worth_it(*range) || goes_on(range))
        .collect();
    ranges.sort_by_key(|range| std::cmp::Reverse(range.pages()));
    ranges.truncate(room);
    member.view.passed_over.note(new, &ranges);
    ranges
}

pub(crate) fn is_worth_it(range: Range) -> bool {
    range.pages().get() >= PAGES_MIN
}

/// Where the robust lists of the threads but the first begin, each in its thread's control block on its stack.
pub(crate) fn thread_heads(pid: Pid) -> Option<Vec<Vaddr>> {
    let others = task::threads(pid).map(|threads| threads.into_iter().filter(|tid| *tid != pid).collect());
    Some(robust_lists(others, task::robust_list)?.into_iter().map(|(_, head)| head).collect())
}

/// The ranges of all mappings that may be managed; neighbours are one.
fn eligible(vmas: &[VmaUse], heads: &[Vaddr]) -> Vec<Range> {
    let mut ranges: Vec<Range> = Vec::new();
    for vma in vmas.iter().filter(|vma| leaves_alone(vma, heads).is_none()) {
        match ranges.last_mut() {
            Some(before) if before.end() == vma.vma.range.start() => {
                *before = Range::new(before.start(), vma.vma.range.end()).expect("two neighbouring ranges are one");
            }
            _ => ranges.push(vma.vma.range),
        }
    }
    ranges
}

/// Why a mapping is not chosen, or `None`.
pub(crate) fn leaves_alone(vma: &VmaUse, heads: &[Vaddr]) -> Option<&'static str> {
    let flags = &vma.flags;
    match refuses(vma) {
        Some(why) => Some(why),
        None if vma.vma.inode != 0 => Some("file"),
        None if vma.vma.exec => Some("code"),
        None if flags.dontdump() => Some("not_dumped"),
        None if flags.uffd_missing() || flags.uffd_minor() || flags.uffd_wp() => Some("userfaultfd"),
        // Of a thread, by its control block; the first one's stack grows down.
        None if heads.iter().any(|head| vma.vma.range.contains(*head)) => Some("stack"),
        None => None,
    }
}

/// A range without what others have of it. `others` ascend and are apart.
fn without(range: Range, others: &[Range]) -> Vec<Range> {
    let mut rest = Vec::new();
    let mut at = range.start();
    for other in others.iter().filter(|other| other.end() > range.start() && other.start() < range.end()) {
        if let Ok(before) = Range::new(at, other.start().max(at)) {
            rest.push(before);
        }
        at = other.end().max(at);
    }
    rest.extend(Range::new(at.min(range.end()), range.end()).ok());
    rest.retain(|part| !part.is_empty());
    rest
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn range(start: u64, end: u64) -> Range {
        Range::new(Vaddr(start << 12), Vaddr(end << 12)).unwrap()
    }

    /// Seen to fail: with `is_due` that says yes each time.
    #[test]
    fn what_was_passed_over_is_looked_at_seldom() {
        let mut passed_over = PassedOver::default();
        let (stack, heap) = (range(10, 50), range(100, 200));
        assert!(passed_over.is_due(&[stack]));
        passed_over.note(vec![stack], &[]);
        assert!((0..PASSED_OVER).all(|_| !passed_over.is_due(&[stack])) && passed_over.is_due(&[stack]));
        passed_over.note(vec![stack], &[]);
        assert!(passed_over.is_due(&[stack, heap]));
        passed_over.note(vec![stack, heap], &[heap]);
        // What was chosen and still is not managed is chosen again, and what has grown is another range.
        assert!(
            !passed_over.is_due(&[stack]) && passed_over.is_due(&[stack, heap]) && passed_over.is_due(&[range(9, 50)])
        );
    }

    #[test]
    fn what_is_managed_is_left_out() {
        assert_eq!(without(range(10, 20), &[]), [range(10, 20)]);
        assert_eq!(without(range(10, 20), &[range(0, 5), range(20, 30)]), [range(10, 20)]);
        assert_eq!(
            without(range(10, 20), &[range(5, 12), range(14, 15), range(18, 25)]),
            [range(12, 14), range(15, 18)]
        );
        assert_eq!(without(range(10, 20), &[range(10, 20)]), []);
        assert_eq!(without(range(10, 20), &[range(0, 30)]), []);
    }
}
