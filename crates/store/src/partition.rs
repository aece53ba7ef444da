//! A partition: its secret, its segments, and what lies where.

use std::fmt;
use std::time::Instant;

use hashbrown::HashTable;
use kernel::{Bytes, page_size};
use page::{Fingerprint, Place, Secret, SegmentId};

use crate::counters::StoreCounters;
use crate::error::StoreError;
use crate::segments::Segments;

/// How a partition is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// The user whose processes may be members. Mixed users are refused: one partition is one trust domain.
    pub uid: u32,
    /// Whether members do not trust each other: a segment for every run, handed out only to who holds all of it.
    pub strict: bool,
    /// Most pages of a segment. Small segments come back sooner, large ones need fewer descriptors.
    pub segment_pages: u32,
    /// Most memory that the pages of all segments may take; `None` means no limit.
    pub limit: Option<Bytes>,
}

impl Options {
    /// For the processes of one user: not strict, segments of 256 pages, no limit.
    pub fn for_user(uid: u32) -> Self {
        Self { uid, strict: false, segment_pages: 256, limit: None }
    }
}

/// Neighbouring pages of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Run {
    /// The first.
    pub place: Place,
    /// How many.
    pub pages: u32,
}

/// One trust domain and the pages that its members share. See the [crate](crate) for what it promises.
pub struct Partition {
    pub(crate) options: Options,
    pub(crate) secret: Secret,
    pub(crate) segments: Segments,
    /// Where each content lies, hashed by its fingerprint, which the segment keeps. A content is there once, however
    /// many copies lie side by side, in strict partitions once for each run that has it.
    pub(crate) places: HashTable<Place>,
    pub(crate) counters: StoreCounters,
    opened: Instant,
}

impl Partition {
    /// Opens an empty partition with a secret of its own.
    ///
    /// # Errors
    /// [`StoreError::Secret`].
    pub fn open(options: Options) -> Result<Self, StoreError> {
        let options = Options { segment_pages: options.segment_pages.max(1), ..options };
        Ok(Self {
            options,
            secret: draw_secret()?,
            segments: Segments::default(),
            places: HashTable::new(),
            counters: StoreCounters::default(),
            opened: Instant::now(),
        })
    }

    /// The secret that keys this partition's fingerprints. It must not leave the broker.
    pub fn secret(&self) -> &Secret {
        &self.secret
    }

    /// How the partition was opened.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Where a page with this fingerprint lies. Whoever maps it must compare it first.
    pub fn lookup(&self, fingerprint: Fingerprint) -> Option<Place> {
        self.places.find(fingerprint.low(), |place| self.fingerprint_at(*place) == Some(fingerprint)).copied()
    }

    /// The longest run of the store that a member with these pages, neighbours in this order, can map from the first
    /// on. In a strict partition only whole segments count, since only those may be handed out.
    pub fn lookup_run(&self, fingerprints: &[Fingerprint]) -> Option<Run> {
        let first = fingerprints.first()?;
        let starts = self.places.iter_hash(first.low()).filter(|place| self.fingerprint_at(**place) == Some(*first));
        let runs = starts.filter_map(|place| {
            let there = self.segments.get(place.segment)?.fingerprints().get(place.page as usize..)?;
            let equal = there.iter().zip(fingerprints).take_while(|(there, wanted)| there == wanted).count();
            let whole = place.page == 0 && equal == there.len();
            let pages = u32::try_from(equal).expect("segments are small");
            (whole || !self.options.strict).then_some(Run { place: *place, pages })
        });
        runs.max_by_key(|run| run.pages)
    }

    /// The fingerprints of a segment's pages, in order; `None` once it is retired.
    pub fn fingerprints(&self, segment: SegmentId) -> Option<&[Fingerprint]> {
        Some(self.segments.get(segment)?.fingerprints())
    }

    /// Copies a page of the store into `buffer`, a page long; false once it is retired.
    ///
    /// # Errors
    /// [`StoreError::Read`].
    pub fn read_page(&self, place: Place, buffer: &mut [u8]) -> Result<bool, StoreError> {
        let Some(segment) = self.segments.get(place.segment) else { return Ok(false) };
        segment.read(place.page, buffer).map_err(|source| StoreError::Read {
            segment: place.segment,
            page: place.page,
            source,
        })
    }

    /// What the store holds and has done.
    pub fn counters(&self) -> StoreCounters {
        self.counters
    }

    /// Memory that the records of segments and pages take in this process. The kernel's share (a descriptor, an inode
    /// and page-cache nodes for each segment, 1.2 to 1.8 KiB) is apart.
    pub fn bookkeeping(&self) -> Bytes {
        Bytes((self.segments.bytes() + self.places.allocation_size()) as u64)
    }

    pub(crate) fn fingerprint_at(&self, place: Place) -> Option<Fingerprint> {
        self.segments.get(place.segment)?.fingerprints().get(place.page as usize).copied()
    }

    pub(crate) fn insert_place(&mut self, fingerprint: Fingerprint, place: Place) {
        let segments = &self.segments;
        self.places.insert_unique(fingerprint.low(), place, |place| segments.hash(*place));
    }

    /// Lets no lookup find a place any more, if one did.
    pub(crate) fn forget_place(&mut self, fingerprint: Fingerprint, place: Place) {
        if let Ok(entry) = self.places.find_entry(fingerprint.low(), |other| *other == place) {
            entry.remove();
        }
    }

    /// Tenths of a second since the partition was opened.
    pub(crate) fn clock(&self, now: Instant) -> u32 {
        let tenths = now.saturating_duration_since(self.opened).as_millis() / 100;
        u32::try_from(tenths).unwrap_or(u32::MAX)
    }

    /// Pages that the limit leaves room for.
    pub(crate) fn room(&self) -> u64 {
        match self.options.limit {
            Some(limit) => limit.saturating_sub(self.counters.bytes).pages().0,
            None => u64::MAX,
        }
    }

    pub(crate) fn count_pages(&mut self) {
        self.counters.bytes = Bytes(self.counters.pages_shared * page_size());
    }
}

impl fmt::Debug for Partition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Partition").field("options", &self.options).field("counters", &self.counters).finish()
    }
}

fn draw_secret() -> Result<Secret, StoreError> {
    let mut bytes = [0; Secret::BYTES];
    let mut drawn = 0;
    while drawn < bytes.len() {
        match rustix::rand::getrandom(&mut bytes[drawn..], rustix::rand::GetRandomFlags::empty()) {
            Ok(more) => drawn += more,
            Err(rustix::io::Errno::INTR) => {}
            Err(source) => return Err(StoreError::Secret { source: source.into() }),
        }
    }
    Ok(Secret::new(bytes))
}
