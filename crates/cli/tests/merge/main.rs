//! `pagefold merge --backend ksm` and `unmerge` as a user meets them.
#![allow(clippy::unwrap_used, reason = "tests")]

mod commands;
mod host;
mod killed;
mod meanwhile;
#[path = "../../../ksm/tests/request/target.rs"]
mod target;
mod unmerging;
