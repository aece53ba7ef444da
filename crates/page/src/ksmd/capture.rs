//! Page contents over time.

use std::collections::HashMap;
use std::time::Duration;

use thiserror::Error;

/// What a page held when it was looked at: nothing, zeros, or content that a hash stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Content(u64);

impl Content {
    /// Nothing that ksmd could take: not populated, swapped out, or the page of a process that is not there.
    pub const ABSENT: Self = Self(0);
    /// A page of its own, full of zeros.
    pub const ZERO: Self = Self(1);

    /// Content with this hash. The two hashes that mean something else are moved aside.
    pub const fn hashed(hash: u64) -> Self {
        if hash <= Self::ZERO.0 { Self(!hash) } else { Self(hash) }
    }

    /// The 64 bits, to be stored.
    pub const fn to_bits(self) -> u64 {
        self.0
    }

    /// What [`Content::to_bits`] gave.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }
}

/// Contents as the model works with them: small numbers, so that a tree is an array.
pub(super) type Id = u32;
pub(super) const ABSENT: Id = 0;
pub(super) const ZERO: Id = 1;

/// Why a look was not taken into a capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CaptureError {
    /// Every look must tell of the same pages.
    #[error("a look at {found} pages after one at {expected}")]
    Pages {
        /// Pages of the first look.
        expected: usize,
        /// Pages of this one.
        found: usize,
    },
    /// Looks come in the order of time.
    #[error("a look at {at:?} after one at {last:?}")]
    Time {
        /// The look before.
        last: Duration,
        /// This one.
        at: Duration,
    },
    /// The numbers of contents or of pages do not fit 32 bits.
    #[error("more than {} contents or pages", Id::MAX - 1)]
    Contents,
}

/// The same pages at several times. Four bytes for each page and look.
///
/// Pages stand in the order in which ksmd meets them: address spaces one after the other, the oldest member first, and
/// in each the pages of its mergeable areas by address.
#[derive(Clone, Debug)]
pub struct Capture {
    pub(super) looks: Vec<Look>,
    pub(super) contents: usize,
}

/// One look.
#[derive(Clone, Debug)]
pub(super) struct Look {
    /// Since the first look.
    pub(super) at: Duration,
    pub(super) pages: Box<[Id]>,
}

/// Takes looks, one after the other.
#[derive(Debug)]
pub struct CaptureBuilder {
    capture: Capture,
    known: HashMap<Content, Id>,
}

impl CaptureBuilder {
    /// Adds what all pages held at the time `at`. The first look's time is the model's time 0.
    ///
    /// # Errors
    /// [`CaptureError`]; the look is then left out.
    pub fn look(&mut self, at: Duration, pages: impl IntoIterator<Item = Content>) -> Result<(), CaptureError> {
        let first = self.capture.looks.first().map(|look| look.pages.len());
        if let Some(last) = self.capture.looks.last().map(|look| look.at)
            && at <= last
        {
            return Err(CaptureError::Time { last, at });
        }
        let (mut full, mut next) = (false, self.capture.contents);
        let known = &mut self.known;
        let pages: Box<[Id]> = pages
            .into_iter()
            .map(|content| {
                *known.entry(content).or_insert_with(|| {
                    let id = Id::try_from(next).unwrap_or(Id::MAX);
                    full |= id == Id::MAX;
                    next += 1;
                    id
                })
            })
            .collect();
        self.capture.contents = next;
        if full || Id::try_from(pages.len()).is_err() {
            return Err(CaptureError::Contents);
        }
        if let Some(expected) = first.filter(|&expected| expected != pages.len()) {
            return Err(CaptureError::Pages { expected, found: pages.len() });
        }
        self.capture.looks.push(Look { at, pages });
        Ok(())
    }

    /// The capture; the table of contents is dropped.
    pub fn build(mut self) -> Capture {
        let start = self.capture.looks.first().map_or(Duration::ZERO, |look| look.at);
        for look in &mut self.capture.looks {
            look.at -= start;
        }
        self.capture
    }
}

/// What merging could give at best, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reachable {
    /// Copies beyond the first of each content, zeros apart.
    pub duplicates: u64,
    /// Pages of zeros.
    pub zero_pages: u64,
}

impl Reachable {
    /// All that merging could save: with `use_zero_pages` and without a limit of mappings.
    pub fn pages(&self) -> u64 {
        self.duplicates + self.zero_pages
    }
}

impl Capture {
    /// An empty capture, to be filled.
    pub fn builder() -> CaptureBuilder {
        let capture = Self { looks: Vec::new(), contents: 2 };
        CaptureBuilder { capture, known: HashMap::from([(Content::ABSENT, ABSENT), (Content::ZERO, ZERO)]) }
    }

    /// How many pages each look tells of, present or not.
    pub fn pages(&self) -> usize {
        self.looks.first().map_or(0, |look| look.pages.len())
    }

    /// How many looks.
    pub fn looks(&self) -> usize {
        self.looks.len()
    }

    /// Time from the first to the last look; after that contents stay.
    pub fn length(&self) -> Duration {
        self.looks.last().map_or(Duration::ZERO, |look| look.at)
    }

    /// What could be merged of the last look. Pages that differ from the look before do not hold still and are left
    /// out.
    pub fn reachable(&self) -> Reachable {
        let Some((last, before)) = self.looks.split_last() else { return Reachable::default() };
        let before = before.last().unwrap_or(last);
        let mut seen = vec![false; self.contents];
        let mut found = Reachable::default();
        for (&id, _) in last.pages.iter().zip(&before.pages).filter(|(id, before)| id == before) {
            match id {
                ABSENT => {}
                ZERO => found.zero_pages += 1,
                _ => found.duplicates += u64::from(std::mem::replace(&mut seen[id as usize], true)),
            }
        }
        found
    }
}
