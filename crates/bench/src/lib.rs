//! Measurements of pagefold and its peers in one run, and what they run on.
//!
//! * [`report`] is the document that every scenario prints;
//! * [`guest`] starts guests with kernels of their own, for scenarios and for tests;
//! * [`inside`] is what tests run on other kernels, in such guests;
//! * [`mod@eval`] and [`predict`] are those of evaluating;
//! * [`advisor`] is the scenario of the advisors of ksmd;
//! * [`vm`] is the scenario of guests that hold the same files;
//! * [`served`] is that of workers of real programs that serve requests;
//! * [`ksm_merge`] is that of merging on request with the kernel's KSM;
//! * [`merge`], [`cow`] and [`stall`] are those of merging itself, on [`workers`], by both [`sides`].
#![forbid(unsafe_code)]

pub mod advisor;
pub mod cow;
pub mod eval;
pub mod guest;
pub mod inside;
pub mod ksm_merge;
pub mod merge;
pub mod predict;
pub mod programs;
pub mod report;
pub mod served;
pub mod sides;
pub mod soak;
pub mod stall;
pub mod start;
pub mod vm;
pub mod workers;
