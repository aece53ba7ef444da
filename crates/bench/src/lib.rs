//! What the benchmarks run on, for them and for tests: guests with kernels of their own.
#![forbid(unsafe_code)]

pub mod guest;
