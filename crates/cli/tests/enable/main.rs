//! `pagefold enable` and `disable` on real processes.
#![allow(clippy::unwrap_used, reason = "tests")]

mod many;
mod newborn;
mod programs;
mod refused;
mod spaces;
mod stand;
mod storms;
mod words;
