//! `pagefold doctor`: each cause is made, and must be found.
#![allow(clippy::unwrap_used, reason = "tests")]

mod host;
mod merging;
mod process;
mod proof;
mod stand;
