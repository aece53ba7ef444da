//! From a part of the pages, or of the contents, to the whole.

use page::unseen::{HashSubset, Interval, Sample, share};

use crate::count::Figures;
use crate::report;
use crate::scale::Factors;
use crate::snapshot::SampleBy;
use crate::tally::Side;

/// Reckons the figures of a sample up to all `pages` pages, of which `read` were read.
pub(crate) fn estimate(figures: &mut Figures, by: SampleBy, pages: u64, read: u64) -> report::Sample {
    let (factors, duplicates) = factors(&figures.all, by, pages, read);
    // What lasted is a part of the same sample, and stays a part of the whole.
    for side in std::iter::once(&mut figures.all).chain(&mut figures.stable) {
        side.scale(&factors);
    }
    report::Sample {
        method: match by {
            SampleBy::HashSpace(_) => "hash_space",
            SampleBy::Pages(_) => "pages",
        },
        fraction: by.fraction(),
        duplicate_pages: duplicates.likely,
        duplicate_pages_low: duplicates.low,
        duplicate_pages_high: duplicates.high,
    }
}

fn factors(side: &Side, by: SampleBy, pages: u64, read: u64) -> (Factors, Interval) {
    let counters = side.total.counters;
    let zeros = counters.zero_pages;
    let data = counters.pages_scanned - zeros;
    match by {
        SampleBy::HashSpace(fraction) => {
            // Zero pages are all counted; what is left of what was read is known, and its contents are a sample.
            let whole = read.saturating_sub(zeros);
            let mut subset = HashSubset::new(fraction).expect("the fraction was checked");
            side.sizes.iter().for_each(|(pages, contents)| subset.add(pages, contents));
            let scaled = subset.duplicates_of(whole);
            let factor = if data == 0 { 0.0 } else { whole as f64 / data as f64 };
            let likely = scaled.value.round() as u64;
            let margin = (2.0 * scaled.error).ceil() as u64;
            let interval =
                Interval { low: likely.saturating_sub(margin), likely, high: (likely + margin).min(whole.max(likely)) };
            (Factors { zero: 1.0, data: factor, duplicate: factor }, interval)
        }
        SampleBy::Pages(_) => {
            let factor = if read == 0 { 0.0 } else { pages as f64 / read as f64 };
            let whole = share(data, read, pages).likely.max(data);
            let interval = match Sample::new(whole, side.sizes.iter()) {
                Ok(sample) => sample.estimate().duplicates,
                // More was seen than there is: a page sample of everything, where pages went meanwhile.
                Err(_) => Interval::exactly(counters.duplicate_pages),
            };
            let seen = counters.duplicate_pages;
            let duplicate = if seen == 0 { factor } else { interval.likely as f64 / seen as f64 };
            (Factors { zero: factor, data: factor, duplicate }, interval)
        }
    }
}
