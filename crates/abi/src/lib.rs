//! What the two sides of a process boundary agree on.
//!
//! The broker reads and writes a member's [`control::Control`] area from outside; the gate and the helper use it from
//! inside. Both sides see the same memory at the same time and the member's side may be hostile, so every field is an
//! atomic and no reader may assume that a value it has checked once is still the same at its next look.
//!
//! [`uapi`] holds the kernel structures and ioctl numbers that both sides pass to the kernel, [`wire`] the messages of
//! the socket between helper and broker.

#![no_std]
#![forbid(unsafe_code)]

pub mod cbpf;
pub mod control;
pub mod frozen;
pub mod jump;
pub mod mark;
pub mod place;
pub mod told;
pub mod uapi;
pub mod wire;

/// The most pages that one batch freezes at a time: enough to spread the cost of its fixed steps, few enough that a
/// thread that runs into it waits for tens of microseconds.
pub const BATCH_MAX: usize = 64;

/// Bytes of the scratch area for plain pages: one huge page, for the collapse oracle.
pub const SCRATCH: u64 = 2 << 20;

/// The most entries of one plan, i.e. of one order from the broker to a helper.
pub const PLAN_MAX: usize = 4096;
