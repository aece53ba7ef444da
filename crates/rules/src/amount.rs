//! Sizes and times with their units.

use std::time::Duration;

use kernel::Bytes;

const SIZES: [(&str, u64); 5] = [("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40)];
const TIMES: [(&str, u64); 5] = [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];

/// A whole number and `B`, `KiB`, `MiB`, `GiB` or `TiB`.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn size(text: &str) -> Result<Bytes, String> {
    amount(text, &SIZES)
        .map(Bytes)
        .map_err(|why| format!("{why}; a size is written as \"64MiB\", in B, KiB, MiB, GiB or TiB"))
}

/// A whole number and `ms`, `s`, `m`, `h` or `d`.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn time(text: &str) -> Result<Duration, String> {
    let told = |why| format!("{why}; a time is written as \"30s\", in ms, s, m (minutes), h or d");
    amount(text, &TIMES).map(Duration::from_millis).map_err(told)
}

fn amount(text: &str, units: &[(&str, u64)]) -> Result<u64, String> {
    let digits = text.find(|it: char| !it.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = (&text[..digits], text[digits..].trim_start());
    if number.is_empty() {
        return Err(format!("{text:?} does not begin with a whole number"));
    }
    let factor = units.iter().find(|(name, _)| *name == unit).map(|(_, factor)| *factor);
    let factor = factor.ok_or_else(|| {
        if unit.is_empty() { format!("{text:?} has no unit") } else { format!("{unit:?} is no unit here") }
    })?;
    // i64, as the file format has it for numbers: what is larger is a slip of the finger.
    let value = number.parse::<u64>().ok().and_then(|number| number.checked_mul(factor));
    value.filter(|value| i64::try_from(*value).is_ok()).ok_or_else(|| format!("{text:?} is too large"))
}

/// In the largest unit in which it is a whole number.
pub(crate) fn size_text(size: Bytes) -> String {
    text_of(size.get(), &SIZES)
}

/// In the largest unit in which it is a whole number; parts of a millisecond are dropped.
pub(crate) fn time_text(time: Duration) -> String {
    text_of(u64::try_from(time.as_millis()).unwrap_or(u64::MAX), &TIMES)
}

fn text_of(value: u64, units: &[(&str, u64)]) -> String {
    let whole = |(_, factor): &&(&str, u64)| value != 0 && value.is_multiple_of(*factor);
    let (unit, factor) = units.iter().rev().find(whole).unwrap_or(&units[0]);
    format!("{}{unit}", value / factor)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn units_are_needed_and_read() {
        assert_eq!(size("64MiB").unwrap(), Bytes::from_mib(64));
        assert_eq!(size("0B").unwrap(), Bytes(0));
        assert_eq!(time("30s").unwrap(), Duration::from_secs(30));
        assert_eq!(time("1 d").unwrap(), Duration::from_secs(86_400));
        for wrong in ["", "64", "MiB", "64MB", "64 mib", "-1B", "1.5GiB", "99999999999999999999B", "9999999TiB", "4s"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
        assert!(time("5 min").unwrap_err().contains("in ms, s, m (minutes)"));
    }

    #[test]
    fn the_text_of_an_amount_reads_back() {
        for text in ["0B", "1B", "1023B", "1KiB", "64MiB", "3TiB"] {
            assert_eq!(size_text(size(text).unwrap()), text);
        }
        for text in ["0ms", "1500ms", "90s", "2m", "36h", "1d"] {
            assert_eq!(time_text(time(text).unwrap()), text);
        }
    }
}
