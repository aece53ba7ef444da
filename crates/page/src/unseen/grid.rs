//! What a sample is expected to show of contents of each size.

/// Contents seen up to this often have a row of their own.
const SINGLE_ROWS: u64 = 12;
/// Sizes up to this are all on the grid.
const SINGLE_SIZES: u64 = 64;
/// Distance of the grid's larger sizes. A mixture of two neighbours is spread by a thirtieth of a size, which is less
/// than chance spreads what a sample sees of it.
const RATIO: f64 = 1.07;
/// A size that shows less often than this below the light limit is left to the heavy part.
const RARELY_LIGHT: f64 = 1e-5;

/// How often a content was seen: `first` to `last` times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) first: u64,
    pub(super) last: u64,
}

/// Rows for contents that were seen fewer than `limit` times: one by one, then half a standard deviation wide.
pub(super) fn rows(limit: u64) -> Vec<Row> {
    let mut rows = Vec::new();
    let mut first = 1;
    while first < limit {
        let width = if first <= SINGLE_ROWS { 1 } else { (first.isqrt() / 2).max(1) };
        let last = (first + width).min(limit) - 1;
        rows.push(Row { first, last });
        first = last + 1;
    }
    rows
}

/// The contents of one size, in pages, and the part of them expected in each row.
#[derive(Clone, Debug)]
pub(super) struct Column {
    pub(super) size: u64,
    /// For each row, the probability that a content of this size is seen so often, given that it is light.
    pub(super) shows: Vec<f64>,
}

/// A geometric grid of sizes up to `largest`, each page of which is sampled with probability `p` below 1; contents
/// are light when seen fewer than `limit` times.
pub(super) fn columns(rows: &[Row], limit: u64, p: f64, largest: u64) -> Vec<Column> {
    let mut columns = Vec::new();
    let mut size = 1;
    while size <= largest {
        let seen = light(size, limit, p);
        let sum: f64 = seen.iter().sum();
        if sum < RARELY_LIGHT {
            break;
        }
        let shows = rows
            .iter()
            .map(|row| (row.first..=row.last).filter_map(|times| seen.get(times as usize)).sum::<f64>() / sum)
            .collect();
        columns.push(Column { size, shows });
        size = if size < SINGLE_SIZES { size + 1 } else { (size as f64 * RATIO).ceil() as u64 };
    }
    columns
}

/// The probabilities that a content of `size` pages is seen 0, 1, ... times, fewer than `limit`: binomial, since each
/// of its pages is in the sample or not. In logarithms, or the first would be 0 where many pages are expected.
fn light(size: u64, limit: u64, p: f64) -> Vec<f64> {
    let odds = p.ln() - (-p).ln_1p();
    let mut log = size as f64 * (-p).ln_1p();
    let mut seen = Vec::new();
    for times in 0..limit.min(size + 1) {
        seen.push(log.exp());
        log += odds + ((size - times) as f64).ln() - ((times + 1) as f64).ln();
    }
    seen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_follow_each_other_and_end_at_the_limit() {
        for limit in [1, 2, 13, 14, 100, 512] {
            let rows = rows(limit);
            assert_eq!(rows.first().map_or(1, |row| row.first), 1);
            assert_eq!(rows.last().map_or(1, |row| row.last + 1), limit);
            assert!(rows.windows(2).all(|pair| pair[0].last + 1 == pair[1].first && pair[0].first <= pair[0].last));
        }
        assert!(rows(512).len() < 120, "small programs");
    }

    #[test]
    fn a_column_is_a_binomial_distribution() {
        let rows = rows(100);
        let columns = columns(&rows, 100, 0.25, 1 << 20);
        assert!((columns[0].shows[0] - 0.25).abs() < 1e-12);
        let pair = &columns[1].shows;
        assert!((pair[0] - 0.375).abs() < 1e-12 && (pair[1] - 0.0625).abs() < 1e-12 && pair[2] == 0.0);
        for column in &columns {
            let unseen = if column.size < 60 { 0.75_f64.powi(column.size as i32) } else { 0.0 };
            assert!((column.shows.iter().sum::<f64>() + unseen - 1.0).abs() < 1e-6, "size {}", column.size);
        }
        let largest = columns[columns.len() - 1].size;
        assert!((500..700).contains(&largest), "larger ones are heavy, all but one in 100,000: {largest}");
    }
}
