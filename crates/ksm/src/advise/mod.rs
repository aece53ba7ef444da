//! An advisor in user space: goals in, `pages_to_scan` and `sleep_millisecs` out.
//!
//! The kernel's own advisor sets `pages_to_scan` from whole seconds after each pass, never below 10 % of a processor.
//! This one sees a pass while it runs, sets the sleep too, and so holds a fast goal within a pass and a slow one at a
//! part of a per cent; and it lets ksmd rest while there is nothing to gain.
//!
//! [`Law`] decides and does nothing else; [`Advisor`] looks, asks it, and acts under a lease.
mod advisor;
mod census;
mod estimate;
mod goals;
mod law;
mod pace_for;
mod passes;
mod stage;
mod summary;
#[cfg(test)]
mod tests;

pub use advisor::{Advisor, Event};
pub use goals::{Goals, Look};
pub use law::{Decision, Law, Pace};
pub use passes::Pass;
pub use stage::Turn;
pub use summary::Summary;
