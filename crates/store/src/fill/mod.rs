//! Copying pages in: read, hash again, write, seal, and only then enter.

use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::OwnedFd;

use kernel::page_size;
use page::{Fingerprint, Place, SegmentId, is_zero};

use crate::error::StoreError;
use crate::partition::Partition;
use crate::segments::{Segments, make_file};

/// A page to be copied into the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FillRequest<S> {
    /// What it hashed to when it was seen.
    pub fingerprint: Fingerprint,
    /// Where the reader finds it.
    pub source: S,
    /// Whether it comes right behind the page of the request before in every member that has both. A strict partition
    /// makes a segment of each such run; others only keep the order.
    pub continues: bool,
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// It is in the store now.
    Placed(Place),
    /// It was there already, byte for byte.
    Known(Place),
    /// Its content is not the one that was seen.
    Changed,
    /// It holds only zeros, which need no store.
    Zero,
    /// The reader did not deliver it.
    Unread,
    /// The store's limit is reached.
    Full,
    /// Another content with the same fingerprint is there. Such a page cannot be shared.
    Collision,
    /// An error came before its turn.
    NotTried,
}

impl Outcome {
    /// Where the page is, if it is in the store.
    pub fn place(&self) -> Option<Place> {
        match self {
            Self::Placed(place) | Self::Known(place) => Some(*place),
            _ => None,
        }
    }
}

/// What became of all requests of a fill.
#[derive(Debug)]
pub struct FillReport {
    /// One for each request, in order.
    pub outcomes: Vec<Outcome>,
    /// What ended the fill early, if anything. What was placed before stays.
    pub stopped: Option<StoreError>,
}

/// Memory for the pages on their way: as many as a segment has, since a segment's size must be known when it is made
/// and is known only once its pages are read and hashed. One buffer serves any number of partitions.
#[derive(Debug, Default)]
pub struct FillBuffer {
    bytes: Vec<u8>,
    read: Vec<bool>,
    /// First slot of each content of this round.
    seen: HashMap<Fingerprint, usize>,
}

impl FillBuffer {
    /// An empty buffer; it grows to the size of a segment when it is first used.
    pub fn new() -> Self {
        Self::default()
    }

    fn prepare(&mut self, pages: usize) -> PageReads<'_> {
        let bytes = pages * page_bytes();
        if self.bytes.len() < bytes {
            self.bytes.resize(bytes, 0);
        }
        self.read.clear();
        self.read.resize(pages, false);
        self.seen.clear();
        PageReads { bytes: &mut self.bytes[..bytes], read: &mut self.read }
    }

    fn pages(&self, slots: Range<usize>) -> &[u8] {
        &self.bytes[slots.start * page_bytes()..slots.end * page_bytes()]
    }

    fn page(&self, slot: usize) -> &[u8] {
        self.pages(slot..slot + 1)
    }
}

/// Where a reader puts the pages that were asked for: one slot for each request, in order.
#[derive(Debug)]
pub struct PageReads<'a> {
    bytes: &'a mut [u8],
    read: &'a mut [bool],
}

impl PageReads<'_> {
    /// Delivers the page of one request.
    ///
    /// # Panics
    /// If `page` is not a page long or there are fewer requests.
    pub fn put(&mut self, slot: usize, page: &[u8]) {
        self.slots(slot, 1).copy_from_slice(page);
        self.mark(slot, 1);
    }

    /// The memory of `count` slots in a row, to read into; [`mark`](Self::mark) what was delivered afterwards.
    pub fn slots(&mut self, first: usize, count: usize) -> &mut [u8] {
        &mut self.bytes[first * page_bytes()..(first + count) * page_bytes()]
    }

    /// `count` slots from `first` on hold their pages.
    pub fn mark(&mut self, first: usize, count: usize) {
        self.read[first..first + count].fill(true);
    }
}

/// What is to be done with a slot once it is read.
#[derive(Clone, Copy)]
enum Verdict {
    /// Nothing more.
    Done(Outcome),
    /// Its content is as it was seen and belongs into the store.
    Good,
    /// Its content is that of an earlier slot of the round.
    Same(usize),
}

impl Partition {
    /// Copies pages into the store, in the order given, so that neighbours stay neighbours. `read` is called for up to
    /// a segment's worth of requests at a time.
    ///
    /// A page is placed only if it is still what was seen: its bytes are hashed where they lie in the buffer, and these
    /// very bytes go into the segment. Nothing of a segment can be found before it is sealed.
    pub fn fill<S>(
        &mut self,
        buffer: &mut FillBuffer,
        requests: &[FillRequest<S>],
        mut read: impl FnMut(&[FillRequest<S>], &mut PageReads<'_>),
    ) -> FillReport {
        let mut outcomes = Vec::with_capacity(requests.len());
        let mut stopped = None;
        let mut rest = requests;
        while !rest.is_empty() {
            let (round, behind) = rest.split_at(self.round(rest));
            read(round, &mut buffer.prepare(round.len()));
            let start = outcomes.len();
            outcomes.resize(start + round.len(), Outcome::NotTried);
            if let Err(error) = self.fill_round(buffer, round, &mut outcomes[start..]) {
                stopped = Some(error);
                break;
            }
            rest = behind;
        }
        outcomes.resize(requests.len(), Outcome::NotTried);
        FillReport { outcomes, stopped }
    }

    /// How many of the requests are read at once: a segment's worth, but in a strict partition no run is cut that
    /// would fit into the next round.
    fn round<S>(&self, requests: &[FillRequest<S>]) -> usize {
        let most = self.options.segment_pages as usize;
        if requests.len() <= most {
            return requests.len();
        }
        let cut = (1..=most).rev().find(|at| !requests[*at].continues);
        if self.options.strict { cut.unwrap_or(most) } else { most }
    }

    fn fill_round<S>(
        &mut self,
        buffer: &mut FillBuffer,
        requests: &[FillRequest<S>],
        outcomes: &mut [Outcome],
    ) -> Result<(), StoreError> {
        let mut verdicts = Vec::with_capacity(requests.len());
        for (slot, request) in requests.iter().enumerate() {
            verdicts.push(self.judge(buffer, slot, request.fingerprint)?);
        }
        if self.options.strict {
            for (outcome, verdict) in outcomes.iter_mut().zip(&verdicts) {
                if let Verdict::Done(done) = verdict {
                    *outcome = *done;
                }
            }
            let mut slot = 0;
            while slot < requests.len() {
                let end = end_of_run(requests, &verdicts, slot);
                if end > slot {
                    self.fill_strict_run(buffer, requests, slot..end, outcomes)?;
                }
                slot = end.max(slot + 1);
            }
            return Ok(());
        }
        self.fill_packed(buffer, requests, &verdicts, outcomes)
    }

    /// Looks at a slot that was read; counts what is left out.
    fn judge(&mut self, buffer: &mut FillBuffer, slot: usize, seen: Fingerprint) -> Result<Verdict, StoreError> {
        if !buffer.read[slot] {
            self.counters.unread += 1;
            return Ok(Verdict::Done(Outcome::Unread));
        }
        let page = buffer.page(slot);
        if self.secret.fingerprint(page) != seen {
            self.counters.hash_mismatch += 1;
            return Ok(Verdict::Done(Outcome::Changed));
        }
        if is_zero(page) {
            self.counters.zero_refused += 1;
            return Ok(Verdict::Done(Outcome::Zero));
        }
        if self.options.strict {
            return Ok(Verdict::Good);
        }
        if let Some(place) = self.lookup(seen) {
            let equal = self.holds(place, page)?;
            return Ok(Verdict::Done(if equal { self.known(place) } else { self.collision() }));
        }
        match buffer.seen.get(&seen).copied() {
            Some(first) if buffer.page(first) == buffer.page(slot) => Ok(Verdict::Same(first)),
            Some(_) => Ok(Verdict::Done(self.collision())),
            None => {
                buffer.seen.insert(seen, slot);
                Ok(Verdict::Good)
            }
        }
    }

    /// One segment for all good pages of the round.
    fn fill_packed<S>(
        &mut self,
        buffer: &FillBuffer,
        requests: &[FillRequest<S>],
        verdicts: &[Verdict],
        outcomes: &mut [Outcome],
    ) -> Result<(), StoreError> {
        let mut room = self.room();
        let mut slots = Vec::with_capacity(requests.len());
        let mut filled = vec![Outcome::Full; requests.len()];
        for (slot, verdict) in verdicts.iter().enumerate() {
            match verdict {
                Verdict::Done(outcome) => outcomes[slot] = *outcome,
                Verdict::Good if room == 0 => {}
                Verdict::Good => {
                    room -= 1;
                    slots.push(slot);
                }
                Verdict::Same(_) => {}
            }
        }
        if !slots.is_empty() {
            let fingerprints: Vec<_> = slots.iter().map(|slot| requests[*slot].fingerprint).collect();
            let segment = self.make_segment(buffer, &slots, &fingerprints)?;
            for (page, slot) in (0..).zip(&slots) {
                filled[*slot] = Outcome::Placed(Place { segment, page });
            }
        }
        for (slot, verdict) in verdicts.iter().enumerate() {
            match verdict {
                Verdict::Done(_) => continue,
                Verdict::Good => outcomes[slot] = filled[slot],
                Verdict::Same(first) => {
                    outcomes[slot] = match filled[*first].place() {
                        Some(place) => self.known(place),
                        None => Outcome::Full,
                    };
                }
            }
            self.counters.full += u64::from(outcomes[slot] == Outcome::Full);
        }
        Ok(())
    }

    /// A segment for one run, unless one of exactly these pages is there.
    fn fill_strict_run<S>(
        &mut self,
        buffer: &FillBuffer,
        requests: &[FillRequest<S>],
        run: Range<usize>,
        outcomes: &mut [Outcome],
    ) -> Result<(), StoreError> {
        let fingerprints: Vec<_> = requests[run.clone()].iter().map(|request| request.fingerprint).collect();
        let slots: Vec<_> = run.clone().collect();
        if let Some(segment) = self.segment_of_exactly(&fingerprints) {
            for (page, slot) in (0..).zip(slots) {
                let place = Place { segment, page };
                let equal = self.holds(place, buffer.page(slot))?;
                outcomes[slot] = if equal { self.known(place) } else { self.collision() };
            }
            return Ok(());
        }
        if (slots.len() as u64) > self.room() {
            outcomes[run].fill(Outcome::Full);
            self.counters.full += slots.len() as u64;
            return Ok(());
        }
        let segment = self.make_segment(buffer, &slots, &fingerprints)?;
        for (page, slot) in (0..).zip(slots) {
            outcomes[slot] = Outcome::Placed(Place { segment, page });
        }
        Ok(())
    }

    fn segment_of_exactly(&self, fingerprints: &[Fingerprint]) -> Option<SegmentId> {
        let first = fingerprints.first()?;
        self.places
            .iter_hash(first.low())
            .filter(|place| place.page == 0)
            .find(|place| self.fingerprints(place.segment) == Some(fingerprints))
            .map(|place| place.segment)
    }

    /// Whether a place holds these bytes.
    pub(crate) fn holds(&self, place: Place, page: &[u8]) -> Result<bool, StoreError> {
        let mut stored = vec![0; page.len()];
        Ok(self.read_page(place, &mut stored)? && stored == page)
    }

    fn known(&mut self, place: Place) -> Outcome {
        self.counters.known += 1;
        Outcome::Known(place)
    }

    fn collision(&mut self) -> Outcome {
        self.counters.collisions += 1;
        Outcome::Collision
    }

    /// Writes and seals the pages of these slots, then enters them.
    fn make_segment(
        &mut self,
        buffer: &FillBuffer,
        slots: &[usize],
        fingerprints: &[Fingerprint],
    ) -> Result<SegmentId, StoreError> {
        let pages = u32::try_from(slots.len()).expect("segments are small");
        let runs = slots.chunk_by(|before, after| before + 1 == *after);
        let content = runs.map(|run| buffer.pages(run[0]..run[0] + run.len()));
        let file = make_file(pages, content).map_err(|source| StoreError::Make { pages, source })?;
        let segment = self.enter(file, fingerprints)?;
        for (page, fingerprint) in (0..).zip(fingerprints) {
            self.insert_place(*fingerprint, Place { segment, page });
        }
        Ok(segment)
    }

    /// Numbers and counts a sealed file. Nothing of it is found yet.
    pub(crate) fn enter(&mut self, file: OwnedFd, fingerprints: &[Fingerprint]) -> Result<SegmentId, StoreError> {
        let now = self.clock(std::time::Instant::now());
        let segment = self
            .segments
            .add(file, fingerprints, now)
            .ok_or(StoreError::TooManySegments { segments: Segments::MOST })?;
        let pages = fingerprints.len() as u64;
        self.counters.segments += 1;
        self.counters.pages_shared += pages;
        self.counters.filled += pages;
        self.count_pages();
        Ok(segment)
    }
}

/// The end of the run of good pages that begins with `slot`: `slot` itself if that page is not good.
fn end_of_run<S>(requests: &[FillRequest<S>], verdicts: &[Verdict], slot: usize) -> usize {
    let good = |at: usize| matches!(verdicts[at], Verdict::Good);
    let mut end = slot;
    while end < requests.len() && good(end) && (end == slot || requests[end].continues) {
        end += 1;
    }
    end
}

fn page_bytes() -> usize {
    usize::try_from(page_size()).expect("a page fits into memory")
}

#[cfg(test)]
mod tests;
