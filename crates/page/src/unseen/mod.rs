//! How many pages of a whole are duplicates, estimated from a part of it.
//!
//! Two ways to read or remember less than everything:
//!
//! - [`Sample`], a random p % of the pages. Only those are read. A sample shows few of the duplicates there are (of a
//!   pair both pages are in it with probability p²), so counts must not be scaled: what was seen once, twice, ... is
//!   explained by a mixture of contents with 1, 2, ... pages, whose samples would look like this one. That is a linear
//!   program; two more find the fewest and the most contents that explain the sample almost as well, and these are the
//!   range. After Harnik, Khaitzin and Sotnikov, "Estimating Unseen Deduplication" (FAST '16), and Valiant and
//!   Valiant, "Estimating the Unseen" (STOC '11).
//! - [`HashSubset`], all pages whose fingerprint falls into a fixed part of hash space. Every page is read, but only
//!   these are remembered: complete groups, whose counts may be scaled.
//!
//! Zero pages are one content with very many pages, and counted without a sample of fingerprints: leave them out of
//! both. For how many pages a sample's other pages stand, see [`share`].
//!
//! ```
//! use pagefold_page::unseen::Sample;
//!
//! // A million pages, a tenth of them sampled: 60,000 contents were seen once, 10,000 twice, 1,000 three times ...
//! let sample = Sample::new(1_000_000, [(1, 60_000), (2, 10_000), (3, 1_000), (8, 2_125)]).unwrap();
//! assert_eq!(sample.sampled(), 100_000);
//! let estimate = sample.estimate();
//! assert!(estimate.duplicates.low > 100_000 - sample.contents());
//! assert!(estimate.duplicates.low <= estimate.duplicates.likely);
//! assert_eq!(estimate.distinct.likely + estimate.duplicates.likely, 1_000_000);
//! ```

use std::collections::BTreeMap;

mod fit;
mod grid;
mod subset;

pub use subset::{HashSubset, Scaled};

use fit::{DEVIATIONS, Light};

/// Contents seen fewer times than this are always explained by the linear program.
const LEAST_LIMIT: u64 = 16;
/// Contents seen this often are always taken as they are: how many pages they have is known within a tenth or so.
const MOST_LIMIT: u64 = 400;

/// What cannot be a sample.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SampleError {
    /// More pages in the sample than there are.
    #[error("a sample of {sampled} pages out of {pages}")]
    TooLarge {
        /// Pages of the sample; saturates.
        sampled: u64,
        /// Pages of the whole.
        pages: u64,
    },
    /// Contents that are not in the sample have no place in it.
    #[error("{contents} contents of a sample were seen 0 times")]
    SeenNever {
        /// How many.
        contents: u64,
    },
}

/// Lowest plausible, likeliest and highest plausible value, in pages or contents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interval {
    /// No less than this, by three standard deviations of what chance does to a sample.
    pub low: u64,
    /// The best single number.
    pub likely: u64,
    /// No more than this, likewise.
    pub high: u64,
}

impl Interval {
    /// A value that is known.
    pub fn exactly(value: u64) -> Self {
        Self { low: value, likely: value, high: value }
    }

    /// What remains of `whole`, no less than `high`.
    pub fn rest_of(self, whole: u64) -> Self {
        Self { low: whole - self.high, likely: whole - self.likely, high: whole - self.low }
    }

    /// Whether `value` is plausible.
    pub fn contains(&self, value: u64) -> bool {
        (self.low..=self.high).contains(&value)
    }

    fn new(low: f64, likely: f64, high: f64, least: u64, most: u64) -> Self {
        // A float that is cast saturates, and not a number becomes 0.
        let likely = (likely.round() as u64).clamp(least, most);
        let low = (low.floor() as u64).clamp(least, likely);
        Self { low, likely, high: (high.ceil() as u64).clamp(likely, most) }
    }
}

/// What an [`Estimate`] rests on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Basis {
    /// All pages were in the sample: the numbers are exact.
    Counted,
    /// The linear programs were solved.
    Fitted,
    /// Nothing was in the sample, or the solver gave up: the range is what is certain from the counts alone, and the
    /// likely value claims no duplicate that was not seen.
    Bounds,
}

/// Contents and duplicates of the whole, of which a [`Sample`] was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Estimate {
    /// Distinct contents.
    pub distinct: Interval,
    /// Copies beyond the first of each content, in pages: what is not distinct.
    pub duplicates: Interval,
    /// Where the numbers come from.
    pub basis: Basis,
}

/// A random sample of pages: how many contents were seen how often.
///
/// Each page must be in the sample or not without regard to its content and its neighbours, with the same probability,
/// by a coin for each page or as a fixed number of pages. A sample of runs of pages or of some processes is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    pages: u64,
    sampled: u64,
    contents: u64,
    seen: BTreeMap<u64, u64>,
}

impl Sample {
    /// A sample of `pages` pages: each item of `seen` is a number of times and how many contents were seen so often.
    /// The sampling probability is not asked for: given how many pages came out, every such set is equally likely.
    pub fn new(pages: u64, seen: impl IntoIterator<Item = (u64, u64)>) -> Result<Self, SampleError> {
        let mut sample = Self { pages, sampled: 0, contents: 0, seen: BTreeMap::new() };
        for (times, contents) in seen {
            if contents == 0 {
                continue;
            }
            if times == 0 {
                return Err(SampleError::SeenNever { contents });
            }
            sample.sampled = sample.sampled.saturating_add(times.saturating_mul(contents));
            sample.contents = sample.contents.saturating_add(contents);
            let counted = sample.seen.entry(times).or_default();
            *counted = counted.saturating_add(contents);
        }
        if sample.sampled > pages {
            return Err(SampleError::TooLarge { sampled: sample.sampled, pages });
        }
        Ok(sample)
    }

    /// A sample of `pages` pages, from how often each content of it was seen.
    pub fn of_contents(pages: u64, times: impl IntoIterator<Item = u64>) -> Result<Self, SampleError> {
        let mut seen = BTreeMap::<u64, u64>::new();
        times.into_iter().for_each(|times| *seen.entry(times).or_default() += 1);
        Self::new(pages, seen)
    }

    /// Pages of the whole.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Pages in the sample.
    pub fn sampled(&self) -> u64 {
        self.sampled
    }

    /// Distinct contents in the sample.
    pub fn contents(&self) -> u64 {
        self.contents
    }

    /// Estimates the whole: a few dozen linear programs of at most a few hundred rows and columns, whatever the number of
    /// pages, which take less than a tenth of a second together.
    pub fn estimate(&self) -> Estimate {
        let (distinct, basis) = if self.sampled == self.pages {
            (Interval::exactly(self.contents), Basis::Counted)
        } else {
            self.fitted().map_or_else(|| (self.certain(), Basis::Bounds), |distinct| (distinct, Basis::Fitted))
        };
        Estimate { distinct, duplicates: distinct.rest_of(self.pages), basis }
    }

    /// What the counts alone say of the distinct contents.
    fn certain(&self) -> Interval {
        let most = self.most();
        Interval { low: self.contents.max(1).min(most), likely: most, high: most }
    }

    /// Every page outside the sample may be a content of its own.
    fn most(&self) -> u64 {
        self.contents + (self.pages - self.sampled)
    }

    fn fitted(&self) -> Option<Interval> {
        if self.sampled == 0 {
            return None;
        }
        let p = self.sampled as f64 / self.pages as f64;
        let limit = self.limit();
        let heavy: u64 = self.seen.range(limit..).map(|(_, contents)| contents).sum();
        let pages = self.light_pages(limit, p);
        let rows = grid::rows(limit);
        let seen: Vec<u64> =
            rows.iter().map(|row| self.seen.range(row.first..=row.last).map(|(_, contents)| contents).sum()).collect();
        let columns = grid::columns(&rows, limit, p, pages.1 as u64);
        let light = if pages.1 < 1.0 {
            fit::Fit { low: 0.0, likely: 0.0, high: 0.0 }
        } else {
            Light { columns: &columns, seen: &seen, pages }.fit()?
        };
        let heavy = heavy as f64;
        Some(Interval::new(heavy + light.low, heavy + light.likely, heavy + light.high, self.contents, self.most()))
    }

    /// Contents seen so often are heavy: taken as they are. It is put where no content is near, if there is such a
    /// place, because one near it may be on either side.
    fn limit(&self) -> u64 {
        (LEAST_LIMIT..=MOST_LIMIT)
            .map(|limit| (limit, self.strays(limit)))
            .reduce(|best, next| if next.1 < best.1 { next } else { best })
            .map_or(LEAST_LIMIT, |(limit, _)| limit)
    }

    /// Upper bound of the sampled pages that the contents near `limit` make the heavy part look too large by: each is
    /// above when chance was kind to it.
    fn strays(&self, limit: u64) -> f64 {
        let deviation = (limit as f64).sqrt();
        let near = (limit as f64 - 2.0 * deviation) as u64..=(limit as f64 + 2.0 * deviation) as u64;
        0.4 * deviation * self.seen.range(near).map(|(_, &contents)| contents as f64).sum::<f64>()
    }

    /// Fewest and most pages of contents seen fewer than `limit` times.
    fn light_pages(&self, limit: u64, p: f64) -> (f64, f64) {
        let light: u64 = self.seen.range(..limit).map(|(times, contents)| times * contents).sum();
        let heavy = self.sampled - light;
        if heavy == 0 {
            return (self.pages as f64, self.pages as f64);
        }
        let (low, high) = wilson(heavy, self.sampled, p);
        let (pages, strays) = (self.pages as f64, self.strays(limit) / p);
        let most = (pages * (1.0 - low) + strays).min((self.pages - heavy) as f64);
        // No fewer than were seen.
        ((pages * (1.0 - high) - strays).max(light as f64).min(most), most)
    }
}

/// For how many of `pages` pages the `part` stands that was found among the `sampled` pages of a random sample, for
/// instance those that are not zero. Counts larger than the next are taken as equal to it.
pub fn share(part: u64, sampled: u64, pages: u64) -> Interval {
    let sampled = sampled.min(pages);
    let part = part.min(sampled);
    if sampled == 0 {
        return Interval { low: 0, likely: 0, high: pages };
    }
    let p = sampled as f64 / pages as f64;
    let (low, high) = wilson(part, sampled, p);
    let pages_f = pages as f64;
    let likely = part as f64 / sampled as f64 * pages_f;
    Interval::new(low * pages_f, likely, high * pages_f, part, pages - (sampled - part))
}

/// Wilson's interval for the share of a `part` of `sampled` pages, which are the fraction `p` of all.
fn wilson(part: u64, sampled: u64, p: f64) -> (f64, f64) {
    let (count, share) = (sampled as f64, part as f64 / sampled as f64);
    let square = DEVIATIONS * DEVIATIONS * (1.0 - p);
    let centre = share + square / (2.0 * count);
    let spread = (square * (share * (1.0 - share) + square / (4.0 * count)) / count).sqrt();
    let scale = 1.0 + square / count;
    ((centre - spread) / scale, (centre + spread) / scale)
}

#[cfg(test)]
mod tests;
