//! How durations are spread.

use serde::Serialize;

/// Nanoseconds at some places of an ordered list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Spread {
    /// How many.
    pub count: u64,
    /// The middle one.
    pub p50: u64,
    /// 99 % take no longer.
    pub p99: u64,
    /// 99.9 % take no longer.
    pub p999: u64,
    /// The longest.
    pub max: u64,
}

impl Spread {
    /// Of durations in any order.
    #[must_use]
    pub fn of(mut nanoseconds: Vec<u64>) -> Self {
        nanoseconds.sort_unstable();
        let at = |share: f64| {
            let rank = (nanoseconds.len() as f64 * share).ceil() as usize;
            nanoseconds.get(rank.saturating_sub(1)).copied().unwrap_or(0)
        };
        Self {
            count: nanoseconds.len() as u64,
            p50: at(0.5),
            p99: at(0.99),
            p999: at(0.999),
            max: nanoseconds.last().copied().unwrap_or(0),
        }
    }

    /// The cells of a table row, in microseconds.
    #[must_use]
    pub fn row(&self) -> String {
        let us = |nanoseconds: u64| nanoseconds as f64 / 1e3;
        format!(
            "{:>9} {:>10.1} {:>10.1} {:>10.1} {:>10.1}",
            self.count,
            us(self.p50),
            us(self.p99),
            us(self.p999),
            us(self.max)
        )
    }

    /// The head of such a table.
    #[must_use]
    pub fn head() -> &'static str {
        "    count     p50 us     p99 us   p99.9 us     max us"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_those_of_the_ordered_list() {
        let spread = Spread::of((1..=1000).rev().collect());
        assert_eq!((spread.count, spread.p50, spread.p99, spread.p999, spread.max), (1000, 500, 990, 999, 1000));
        assert_eq!(Spread::of(Vec::new()), Spread::default());
        assert_eq!(Spread::of(vec![5]).p999, 5);
    }
}
