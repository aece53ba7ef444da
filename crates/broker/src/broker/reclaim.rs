//! Space comes back by whole segments: the survivors of a nearly dead one are moved out.

use std::time::{Duration, Instant};

use abi::place::Outcome;
use kernel::{maps, page_size};

use super::Broker;
use crate::order::{Item, Task};

/// A segment with at most so many percent of its pages in use is nearly dead. Moving a survivor costs each of its users
/// a few microseconds, and gives back three pages for each that is moved.
const NEARLY_DEAD: u32 = 25;
/// For how long its use must not have risen.
const FOR: Duration = Duration::from_secs(30);
/// Segments emptied at one time: their survivors take memory until they are merged again.
const AT_ONCE: usize = 8;

impl Broker {
    /// Gives the last users of nearly dead segments their own copies back. Pages that still have twins are merged
    /// again once they have settled, side by side in a new segment; the old one goes with its last mapping.
    pub(super) fn move_survivors(&mut self) {
        let dead: Vec<_> = self
            .partition
            .nearly_dead(NEARLY_DEAD, Instant::now(), FOR)
            .map(|dead| dead.segment)
            .take(AT_ONCE)
            .collect();
        let mut orders = Vec::new();
        for segment in dead {
            self.partition.withdraw(segment);
            let inode = self.inode_of.get(&segment);
            let Some((inode, file)) = inode.and_then(|inode| Some((*inode, self.inodes.get(inode)?))) else { continue };
            for member in &self.members {
                let vmas = maps::read(member.pid).unwrap_or_default();
                let shown = vmas.iter().filter(|vma| vma.inode == inode).filter_map(|vma| file.shown_by(vma));
                let items: Vec<Item> = shown
                    .flat_map(|shown| shown.range.start().page_index()..shown.range.end().page_index())
                    .map(|page| Item { address: page * page_size(), task: Task::Unmerge })
                    .collect();
                orders.push((member.index, items));
            }
        }
        for (owner, items) in orders {
            self.order(owner, items);
        }
        let mut moved = 0;
        self.drive(&mut |_, results| {
            moved += results.iter().filter(|(_, outcome)| *outcome == Outcome::Unmerged).count() as u64;
        });
        self.totals.moved += moved;
    }
}
