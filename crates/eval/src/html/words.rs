//! Figures and names as words.

pub(super) use crate::printable::{printable as name, size as bytes};

use std::fmt;

/// The same for what may be a loss.
pub(super) fn signed(amount: i64) -> String {
    if amount < 0 { format!("\u{2212}{}", bytes(amount.unsigned_abs())) } else { bytes(amount.unsigned_abs()) }
}

/// A count with its thousands apart.
pub(super) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A count that fits into a small box.
pub(super) fn short_count(number: u64) -> String {
    match number {
        0..10_000 => number.to_string(),
        10_000..1_000_000 => format!("{}k", number / 1000),
        1_000_000..10_000_000 => format!("{:.1}M", number as f64 / 1e6),
        _ => format!("{}M", number / 1_000_000),
    }
}

/// A time on an axis that ends at `longest`: all of an axis have the same unit.
pub(super) fn seconds(seconds: f64, longest: f64) -> String {
    match longest {
        ..=120.0 => format!("{seconds} s"),
        ..=7200.0 => format!("{} min", seconds / 60.0),
        _ => format!("{} h", seconds / 3600.0),
    }
}

/// The share `part` of `whole` in percent.
pub(super) fn percent(part: u64, whole: u64) -> String {
    format!("{:.0} %", share(part, whole) * 100.0)
}

/// The share `part` of `whole`, from 0 to 1.
pub(super) fn share(part: u64, whole: u64) -> f64 {
    (part as f64 / whole.max(1) as f64).min(1.0)
}

/// The first characters of a name.
pub(super) fn shortened(name: &str, most: usize) -> String {
    if name.chars().count() <= most {
        return name.to_owned();
    }
    name.chars().take(most.saturating_sub(1)).chain(['…']).collect()
}

/// A coordinate, to a hundredth of a pixel.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Px(pub(super) f64);

impl fmt::Display for Px {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", (self.0 * 100.0).round() / 100.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_readable() {
        assert_eq!((count(7), count(999), count(1000)), ("7".into(), "999".into(), "1,000".into()));
        assert_eq!(count(1_234_567), "1,234,567");
        assert_eq!(
            (short_count(9999), short_count(12_345), short_count(1_250_000)),
            ("9999".into(), "12k".into(), "1.2M".into())
        );
        assert_eq!(
            (bytes(4096), bytes(3 << 19), signed(-(5 << 30))),
            ("4.0 KiB".into(), "1.5 MiB".into(), "\u{2212}5.0 GiB".into())
        );
        assert_eq!((percent(0, 0), percent(1, 3), percent(9, 3)), ("0 %".into(), "33 %".into(), "100 %".into()));
        assert_eq!((seconds(90.0, 120.0), seconds(90.0, 600.0)), ("90 s".into(), "1.5 min".into()));
        assert_eq!(seconds(14_400.0, 1e5), "4 h");
        assert_eq!(shortened("größer", 4), "grö…");
    }

    /// What a terminal or a browser would act on, and what turns letters round: a name that ends in "gpj.exe" can look as
    /// if it ended in "exe.jpg".
    #[test]
    fn control_characters_are_seen_and_do_nothing() {
        assert_eq!(name("a\nb\0\x1b[31m\x7f"), "a\u{240a}b\u{2400}\u{241b}[31m\u{2421}");
        assert_eq!(name("\u{202e}gpj.exe\u{2066}\u{200b}\u{85}"), "\u{fffd}gpj.exe\u{fffd}\u{fffd}\u{fffd}");
        assert_eq!(name("straße 日本 <b> &amp;"), "straße 日本 <b> &amp;", "the template's part");
    }

    #[test]
    fn coordinates_are_short() {
        assert_eq!(Px(1.0 / 3.0).to_string(), "0.33");
        assert_eq!(Px(12.0).to_string(), "12");
    }
}
