//! Sizes, times and shares in words.

use std::time::Duration;

use kernel::Bytes;

/// `12.3 GiB`.
pub(super) fn size(bytes: Bytes) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes.get() as f64 / 1024.0;
    let mut unit = 0;
    // What would be shown as 1024.0 belongs to the next unit.
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let number = if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.1}") };
    format!("{} {}", number.trim_end_matches(".0"), UNITS[unit])
}

/// `11 min`.
pub(super) fn time(duration: Duration) -> String {
    match duration.as_secs_f64() {
        s if s < 0.9995 => format!("{:.0} ms", s * 1000.0),
        s if s < 9.95 => format!("{s:.1} s"),
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s if s < 172_800.0 => format!("{:.0} h", s / 3600.0),
        s => format!("{:.0} days", s / 86_400.0),
    }
}

/// How many percent of `whole` a part is, 0 of nothing.
pub(super) fn percent(part: u64, whole: u64) -> u64 {
    if whole == 0 { 0 } else { u64::try_from(u128::from(part) * 100 / u128::from(whole)).unwrap_or(u64::MAX) }
}

/// `1 page`, `2 pages`.
pub(super) fn count(number: u64, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_short() {
        let sizes = [4 << 10, 1536 << 10, 19_456 << 10, (1 << 30) - 1, 13_207_024_435, 5 << 50].map(|n| size(Bytes(n)));
        assert_eq!(sizes, ["4 KiB", "1.5 MiB", "19 MiB", "1 GiB", "12.3 GiB", "5120 TiB"]);
        let times = [0.02, 0.9999, 2.5, 45.0, 660.0, 36_000.0, 1e6].map(|s| time(Duration::from_secs_f64(s)));
        assert_eq!(times, ["20 ms", "1.0 s", "2.5 s", "45 s", "11 min", "10 h", "12 days"]);
        assert_eq!((percent(1, 3), percent(5, 0), percent(u64::MAX, u64::MAX)), (33, 0, 100));
        assert_eq!((count(1, "page", "pages"), count(0, "page", "pages")), ("1 page".into(), "0 pages".into()));
    }
}
