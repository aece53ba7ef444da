//! How segments end: use, reports of it, and giving space back.

use std::time::{Duration, Instant};

use page::{Place, SegmentId};

use crate::partition::Partition;

/// A segment most of whose pages nobody maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NearlyDead {
    /// The segment.
    pub segment: SegmentId,
    /// Pages that somebody maps.
    pub pages_mapped: u32,
    /// Pages that it has.
    pub pages: u32,
}

/// What [`Partition::reclaim`] gave back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reclaimed {
    /// Segments retired.
    pub segments: u64,
    /// Their pages.
    pub pages: u64,
}

impl Partition {
    /// Tells how many pages of a segment somebody maps, for [`reclaim`](Self::reclaim) and
    /// [`nearly_dead`](Self::nearly_dead). Whether the segment was still there.
    pub fn report_use(&mut self, segment: SegmentId, pages_mapped: u32, now: Instant) -> bool {
        let now = self.clock(now);
        let Some(segment) = self.segments.get_mut(segment) else { return false };
        // A use that falls bit by bit, as written pages leave one after the other, must not put off the end.
        if pages_mapped > segment.pages_mapped || pages_mapped == 0 && segment.pages_mapped > 0 {
            segment.changed = now;
        }
        segment.pages_mapped = pages_mapped;
        true
    }

    /// Lets no lookup find the segment's pages any more, so that no new mappings of it come about; its descriptor
    /// stays. The first half of moving its survivors elsewhere. Whether the segment was there.
    pub fn withdraw(&mut self, segment: SegmentId) -> bool {
        let Some(entry) = self.segments.get_mut(segment) else { return false };
        if std::mem::replace(&mut entry.withdrawn, true) {
            return true;
        }
        for page in 0..entry.pages() {
            let place = Place { segment, page };
            let Some(fingerprint) = self.fingerprint_at(place) else { continue };
            self.forget_place(fingerprint, place);
        }
        if self.places.len() < self.places.capacity() / 4 {
            let segments = &self.segments;
            self.places.shrink_to(self.places.len() * 2, |place| segments.hash(*place));
        }
        true
    }

    /// Forgets a segment: no lookup finds it, and the broker's descriptor is closed. Members that map it go on as
    /// before; the kernel frees the file when the last mapping and descriptor are gone. Whether the segment was there.
    pub fn retire(&mut self, segment: SegmentId) -> bool {
        self.withdraw(segment);
        let Some(segment) = self.segments.remove(segment) else { return false };
        let pages = u64::from(segment.pages());
        self.counters.segments -= 1;
        self.counters.pages_shared -= pages;
        self.counters.retired += 1;
        self.counters.pages_retired += pages;
        self.count_pages();
        true
    }

    /// Retires the segments that nobody has mapped for at least `grace`, among them those that were filled that long
    /// ago and never used.
    pub fn reclaim(&mut self, now: Instant, grace: Duration) -> Reclaimed {
        let latest = self.latest(now, grace);
        let unused = |(id, segment): (SegmentId, &crate::segments::Segment)| {
            let idle = segment.pages_mapped == 0 && latest.is_some_and(|latest| segment.changed <= latest);
            idle.then_some((id, u64::from(segment.pages())))
        };
        let dead: Vec<_> = self.segments.iter().filter_map(unused).collect();
        for (id, _) in &dead {
            self.retire(*id);
        }
        Reclaimed { segments: dead.len() as u64, pages: dead.iter().map(|(_, pages)| pages).sum() }
    }

    /// Segments of which at most `percent` of the pages are mapped, some are, and whose use has not risen for `grace`:
    /// their survivors are worth moving into a common segment. To move them, [`withdraw`](Self::withdraw) the segment,
    /// fill its pages again from a member, merge, and [`retire`](Self::retire) it.
    pub fn nearly_dead(&self, percent: u32, now: Instant, grace: Duration) -> impl Iterator<Item = NearlyDead> + '_ {
        let latest = self.latest(now, grace);
        self.segments.iter().filter_map(move |(id, segment)| {
            let (mapped, pages) = (segment.pages_mapped, segment.pages());
            let few = u64::from(mapped) * 100 <= u64::from(pages) * u64::from(percent);
            let settled = latest.is_some_and(|latest| segment.changed <= latest);
            (mapped > 0 && few && settled).then_some(NearlyDead { segment: id, pages_mapped: mapped, pages })
        })
    }

    /// The latest time on the partition's clock that is `grace` before `now`, if the partition is that old.
    fn latest(&self, now: Instant, grace: Duration) -> Option<u32> {
        let tenths = u32::try_from(grace.as_millis().div_ceil(100)).ok()?;
        self.clock(now).checked_sub(tenths)
    }
}
