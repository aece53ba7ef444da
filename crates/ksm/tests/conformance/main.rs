//! What the kernel's own tests and those of LTP ask of KSM, asked through this crate: settings by the lease, counters and
//! processes by what [`pagefold_ksm`] and [`kernel`] read. Cases keep the names that they have there; what each asserts is
//! theirs, the code is not.
//!
//! What changes a process is done by a worker ([`worker`]), from outside or at its own hands where the kernel takes it from
//! nobody else. Cases that need a second memory node run in a guest: `crates/bench/tests/ksm_nodes.rs`.
#![allow(clippy::unwrap_used, reason = "tests")]

mod ksm_functional_tests;
mod ksm_tests;
mod ltp;
mod stand;
mod worker;
