//! `pagefold ksm rules` on real processes.
#![allow(clippy::unwrap_used, reason = "tests")]

mod applying;
mod profit;
mod reading;
mod stand;
mod watching;
