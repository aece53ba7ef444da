//! Processes that merge in their own threads: no helper, no userfaultfd. The broker looks at their pages and says what
//! lies where in the store; they compare and map.

use std::os::fd::OwnedFd;

use kernel::{MemoryFile, Pidfd, Range};

use crate::view::View;

/// A process that has asked for a quiescent merge.
pub(crate) struct Quiet {
    pub(crate) pidfd: Pidfd,
    pub(crate) memory: MemoryFile,
    pub(crate) index: u32,
    pub(crate) uid: u32,
    /// Everything that it ever named, ascending and apart from each other: pages of earlier calls are first sightings
    /// for later ones.
    pub(crate) ranges: Vec<Range>,
    pub(crate) view: View,
}

impl Quiet {
    /// Adds ranges that it names now.
    pub(crate) fn name(&mut self, ranges: &[Range]) {
        self.ranges.extend_from_slice(ranges);
        self.ranges.sort_by_key(Range::start);
        let mut joined: Vec<Range> = Vec::with_capacity(self.ranges.len());
        for range in self.ranges.drain(..) {
            match joined.last_mut() {
                Some(last) if range.start() < last.end() => {
                    let end = last.end().max(range.end());
                    *last = Range::new(last.start(), end).expect("two ranges that overlap are one");
                }
                _ => joined.push(range),
            }
        }
        self.ranges = joined;
    }
}

/// Pages of a caller that equal pages of the store one behind the other, or zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PlacedRun {
    /// The caller's pages.
    pub(crate) pages: Range,
    /// Protection and properties that the mapping must keep.
    pub(crate) keep: u8,
    /// Number of the segment in the plan and page in it; `None` for zeros.
    pub(crate) place: Option<(usize, u32)>,
}

/// What a caller is to compare and map.
#[derive(Debug, Default)]
pub(crate) struct QuietPlan {
    pub(crate) segments: Vec<OwnedFd>,
    /// Ordered by segment.
    pub(crate) runs: Vec<PlacedRun>,
    pub(crate) pages_scanned: u64,
    pub(crate) pages_merged_elsewhere: u64,
    /// Pages of the caller that have a twin and are not in the plan, by reason.
    pub(crate) refused: Vec<(String, u64)>,
    pub(crate) cpu: std::time::Duration,
    /// Where to go on; `None` when everything was looked at.
    pub(crate) next: Option<u64>,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use kernel::{Pid, Vaddr};

    #[test]
    fn named_ranges_are_kept_apart() {
        let range = |start: u64, end: u64| {
            Range::new(Vaddr(start * kernel::page_size()), Vaddr(end * kernel::page_size())).unwrap()
        };
        let pidfd = Pidfd::open(Pid::this()).unwrap();
        let memory = MemoryFile::open(Pid::this()).unwrap();
        let mut quiet = Quiet { pidfd, memory, index: 0, uid: 0, ranges: Vec::new(), view: View::default() };
        quiet.name(&[range(10, 20), range(40, 50)]);
        quiet.name(&[range(15, 25), range(12, 13), range(25, 30)]);
        assert_eq!(quiet.ranges, [range(10, 25), range(25, 30), range(40, 50)]);
    }
}
