//! The two that are compared: a partition of the store, and ksmd as fast as it goes.

mod ksmd;
mod spread;
mod store;

pub use ksmd::{KsmGuardianCommand, Reached, Scanner};
pub use spread::Spread;
pub use store::{GuardianCommand, Store};
