//! Measurements of pagefold and its peers in one run, and what they run on.
//!
//! * [`report`] is the document that every scenario prints;
//! * [`guest`] starts guests with kernels of their own, for scenarios and for tests;
//! * [`vm`] is the scenario of guests that hold the same files.
#![forbid(unsafe_code)]

pub mod guest;
pub mod report;
pub mod soak;
pub mod vm;
