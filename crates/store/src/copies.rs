//! Contents that repeat. Neighbouring pages can share a mapping only where their pages of the store are neighbours too,
//! so a run of equal pages would get a mapping for each of them. Such a content lies in the store several times, side by
//! side, and a run is laid over its copies again and again.
//!
//! **A block is a segment** that holds one content and nothing else. Segments come and go as a whole, so its copies stay
//! side by side for as long as any of them is there, and a block of which few copies are used any more is nearly dead
//! like every other segment. Each copy counts as a page of the store, and copies take no more than half of the room that is
//! left within the store's limit: a content that is not there at all would save more.
//!
//! **The table of places has its first copy only**: a content is found once, and the other copies are counted off from
//! there. A content's older place gives way to a block. Who maps it keeps it, and runs that begin before it are still
//! found.
//!
//! **Strict partitions have no blocks**: a segment's length would tell a member that has one such page how many others
//! have.

use page::{Fingerprint, PageNumber, Place, is_zero};

use crate::error::StoreError;
use crate::partition::{Partition, Run};
use crate::segments::make_file;

impl Run {
    /// The copy for one page, of a run of copies of its content. Which it is depends on the page's number alone:
    /// neighbours get neighbours whenever each of them is merged, and a page that was written and is taken again gets
    /// the one between those of its neighbours.
    pub fn copy_for(&self, page: PageNumber) -> Place {
        let offset = page.0 % u64::from(self.pages.max(1));
        let offset = u32::try_from(offset).expect("less than the pages of a run");
        Place { segment: self.place.segment, page: self.place.page + offset }
    }
}

impl Partition {
    /// Most copies of one content side by side: a segment's worth.
    pub fn most_copies(&self) -> u32 {
        if self.options.strict { 1 } else { self.options.segment_pages }
    }

    /// The copies of a content: where it lies, and how often from there on.
    pub fn copies(&self, fingerprint: Fingerprint) -> Option<Run> {
        Some(self.copies_from(self.lookup(fingerprint)?))
    }

    /// The copies of the content of this place that lie side by side from there on.
    pub fn copies_from(&self, place: Place) -> Run {
        let contents = self.fingerprints(place.segment).and_then(|all| all.get(place.page as usize..));
        let alike = contents.map_or(1, |contents| contents.iter().take_while(|other| **other == contents[0]).count());
        let pages = if self.options.strict { 1 } else { u32::try_from(alike).expect("segments are small") };
        Run { place, pages }
    }

    /// Writes a content so often that there are `copies` of it side by side, at most a segment's worth and fewer where
    /// there is little room. Whether it was done: not if there are more than half as many, so that a content whose runs
    /// become longer and longer is written less than twice as often as it is found, and not if `page` is not what it was.
    ///
    /// # Errors
    /// [`StoreError::Make`], [`StoreError::Read`], [`StoreError::TooManySegments`].
    pub fn repeat(&mut self, fingerprint: Fingerprint, page: &[u8], copies: u32) -> Result<bool, StoreError> {
        let room = u32::try_from(self.room() / 2).unwrap_or(u32::MAX);
        let copies = copies.min(self.most_copies()).min(room);
        let before = self.copies(fingerprint);
        let enough = before.is_some_and(|before| before.pages > copies / 2);
        if copies < 2 || enough {
            return Ok(false);
        }
        if is_zero(page) || self.secret.fingerprint(page) != fingerprint {
            return Ok(false);
        }
        if let Some(before) = before
            && !self.holds(before.place, page)?
        {
            // Another content with this fingerprint: it must not be found here.
            self.counters.collisions += 1;
            return Ok(false);
        }
        let content = std::iter::repeat_n(page, copies as usize);
        let file = make_file(copies, content).map_err(|source| StoreError::Make { pages: copies, source })?;
        let segment = self.enter(file, &vec![fingerprint; copies as usize])?;
        if let Some(before) = before {
            self.forget_place(fingerprint, before.place);
        }
        self.insert_place(fingerprint, Place { segment, page: 0 });
        Ok(true)
    }
}

#[cfg(test)]
mod tests;
