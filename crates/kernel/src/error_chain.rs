//! Errors in words.

use std::error::Error;

/// An error with all that is below it, on one line.
#[must_use]
pub fn error_chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(inner) = next {
        text.push_str(&format!(": {inner}"));
        next = inner.source();
    }
    text
}
