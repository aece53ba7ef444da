//! Merging on request, on real processes.
#![allow(clippy::unwrap_used, reason = "tests")]

mod host;
mod merging;
mod target;
