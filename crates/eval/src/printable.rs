//! Names and sizes as they are shown, in a terminal and on the page.

/// A name that a process gave itself, or its user a file: nobody can be trusted with control characters, nor with
/// those that turn the direction of what follows.
#[must_use]
pub fn printable(name: &str) -> String {
    let visible = |letter: char| match letter {
        // The pictures of control characters stand in their order.
        '\0'..='\x1f' => char::from_u32(0x2400 + u32::from(letter)).unwrap_or(char::REPLACEMENT_CHARACTER),
        '\x7f' => '\u{2421}',
        '\u{80}'..='\u{9f}'
        | '\u{61c}'
        | '\u{200b}'..='\u{200f}'
        | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}' => char::REPLACEMENT_CHARACTER,
        '\u{feff}' => char::REPLACEMENT_CHARACTER,
        other => other,
    };
    name.chars().map(visible).collect()
}

/// A size in bytes, with a unit.
#[must_use]
pub fn size(bytes: u64) -> String {
    let (value, unit) = match bytes {
        0..1_048_576 => (bytes as f64 / 1024.0, "KiB"),
        1_048_576..1_073_741_824 => (bytes as f64 / 1_048_576.0, "MiB"),
        _ => (bytes as f64 / 1_073_741_824.0, "GiB"),
    };
    format!("{value:.1} {unit}")
}
