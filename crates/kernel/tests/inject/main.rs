//! System calls run in programs that check what happens to them (`target.c`).
#![allow(clippy::unwrap_used, reason = "tests")]

mod caught;
mod forks;
mod harness;
mod kills;
mod refusals;
mod restarts;
mod signals;
mod stops;
mod storms;
