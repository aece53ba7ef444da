//! Scaling what a part of hash space holds.

/// An estimate and its standard error, in pages or contents.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Scaled {
    /// The count that is expected of the whole.
    pub value: f64,
    /// One standard deviation of `value`.
    pub error: f64,
}

/// All pages whose fingerprint falls into a fixed part of hash space: groups are complete, and a fair draw of all
/// groups.
///
/// The error counts contents, not pages, because a group is in the part or not as a whole: one group of a million pages
/// makes the estimate much worse than a million pairs do. Count such groups apart, without sampling, as zero pages are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HashSubset {
    fraction: f64,
    contents: u64,
    pages: u64,
    copies_squared: f64,
    pages_squared: f64,
}

impl HashSubset {
    /// An empty part of hash space, `fraction` of all of it. `None` unless it is above 0 and at most 1.
    pub fn new(fraction: f64) -> Option<Self> {
        (fraction > 0.0 && fraction <= 1.0).then_some(Self {
            fraction,
            contents: 0,
            pages: 0,
            copies_squared: 0.0,
            pages_squared: 0.0,
        })
    }

    /// The first fingerprint word that is outside; `None` if all are inside.
    pub fn bound(&self) -> Option<u64> {
        // 2^64 does not fit and saturates.
        let bound = (self.fraction * 2_f64.powi(64)) as u64;
        (bound < u64::MAX).then_some(bound)
    }

    /// Adds `contents` groups with `pages` pages each. Groups without pages are none.
    pub fn add(&mut self, pages: u64, contents: u64) {
        if pages == 0 {
            return;
        }
        let (size, count) = (pages as f64, contents as f64);
        self.contents = self.contents.saturating_add(contents);
        self.pages = self.pages.saturating_add(pages.saturating_mul(contents));
        self.copies_squared += (size - 1.0) * (size - 1.0) * count;
        self.pages_squared += size * size * count;
    }

    /// Contents of the part, exact.
    pub fn contents(&self) -> u64 {
        self.contents
    }

    /// Pages of the part, exact.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Distinct contents of the whole.
    pub fn distinct(&self) -> Scaled {
        self.scaled(self.contents as f64, self.contents as f64)
    }

    /// Copies beyond the first of each content, of the whole.
    pub fn duplicates(&self) -> Scaled {
        self.scaled(self.pages.saturating_sub(self.contents) as f64, self.copies_squared)
    }

    /// Pages of the whole, where it is not known better.
    pub fn all_pages(&self) -> Scaled {
        self.scaled(self.pages as f64, self.pages_squared)
    }

    /// The part of pages that are duplicates times the known number of pages: where contents have similar numbers of
    /// pages, the chance by which more or fewer groups fell into the part cancels.
    pub fn duplicates_of(&self, pages: u64) -> Scaled {
        if self.pages == 0 {
            return Scaled { value: 0.0, error: pages as f64 };
        }
        let (all, copies) = (self.pages as f64, self.pages.saturating_sub(self.contents) as f64);
        let ratio = copies / all;
        // Sum over groups of (copies - ratio * pages)^2, where copies = pages - 1: the residuals of a ratio estimate.
        let rest = 1.0 - ratio;
        let squares = rest * rest * self.pages_squared - 2.0 * rest * all + self.contents as f64;
        let scale = pages as f64 / all;
        Scaled { value: ratio * pages as f64, error: scale * (squares.max(0.0) * (1.0 - self.fraction)).sqrt() }
    }

    /// Each group is in with probability `fraction`: the sum's variance is that of its terms. Where nothing fell into
    /// the part, something may be outside: one content at least.
    fn scaled(&self, sum: f64, squares: f64) -> Scaled {
        Scaled { value: sum / self.fraction, error: (squares.max(1.0) * (1.0 - self.fraction)).sqrt() / self.fraction }
    }
}
