//! What ksmd keeps for a page.

use super::capture::{ABSENT, Id};
use super::tree::NONE;

/// A page's record (`rmap_item`), and what its page-table entry points to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Item {
    /// The content whose checksum was taken last; [`ABSENT`] before the first time.
    pub(super) checksum: Id,
    /// The node of the stable tree that it hangs on.
    pub(super) node: u32,
    pub(super) age: u8,
    pub(super) skips: u8,
    /// There is a record.
    pub(super) known: bool,
    /// The record is in the unstable tree.
    pub(super) unstable: bool,
    /// The page is the node's and not one of the process's own. Not so for a record whose page was written since.
    pub(super) merged: bool,
    /// The page is the kernel's zero page, placed by KSM.
    pub(super) zero: bool,
}

impl Item {
    pub(super) const NONE: Self = Self {
        checksum: ABSENT,
        node: NONE,
        age: 0,
        skips: 0,
        known: false,
        unstable: false,
        merged: false,
        zero: false,
    };

    /// Whether smart scan passes over the page this time. Neither a change of content nor a merge makes the record
    /// young again.
    pub(super) fn skipped(&mut self) -> bool {
        let age = self.age;
        self.age = age.saturating_add(1);
        if age < 3 {
            return false;
        }
        if self.skips > 0 {
            self.skips -= 1;
            return true;
        }
        self.skips = match age {
            0..=3 => 1,
            4..=5 => 2,
            6..=8 => 4,
            _ => 8,
        };
        false
    }
}
