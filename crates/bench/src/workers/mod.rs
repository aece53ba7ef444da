//! Processes whose memory is merged: this program, started again, filled and checked over a pipe.

mod fleet;
mod layout;
mod process;
mod touch;

pub use fleet::{Fleet, SpinCommand};
pub use layout::Layout;
pub use process::WorkerCommand;
pub use touch::{Access, Touched};
