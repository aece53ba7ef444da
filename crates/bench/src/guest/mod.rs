//! Virtual machines as fixtures: real guests whose memory is merged, and other kernels to run our tests on.
//!
//! Everything runs under QEMU's own emulation (TCG), so that no `/dev/kvm` is needed, from an initramfs that is written
//! here: busybox, a shell script as init, and a few modules of a Debian kernel.
//!
//! * [`Kernel`] is an installed kernel, or one fetched into a cache without installing it.
//! * [`Fleet`] starts guests that check their memory for ever, all of them below one command when asked to:
//!   `pagefold run ... -- sh -c 'qemu & qemu & wait'`. [`Guest`] talks to one of them.
//! * [`run_inside`] boots a kernel, runs one program in it and returns what it said.

mod checks;
mod closure;
mod command;
mod cpio;
mod fleet;
mod initramfs;
mod inside;
mod kernel;
mod modules;
mod qemu;
mod qmp;

pub use checks::{Checks, Verdict};
pub use command::GuestCommand;
pub use fleet::{Fleet, Guest};
pub use initramfs::{Initramfs, check_initramfs};
pub use inside::{GuestFile, Output, run_inside, run_inside_nodes};
pub use kernel::Kernel;
pub use modules::{DISK, NFS};
pub use qemu::GuestOptions;
pub use qmp::Qmp;

use std::path::PathBuf;

/// Where kernels and initramfs images are kept between runs: `PAGEFOLD_BENCH_CACHE`, or a folder of the user's cache.
#[must_use]
pub fn cache() -> PathBuf {
    if let Some(folder) = std::env::var_os("PAGEFOLD_BENCH_CACHE") {
        return PathBuf::from(folder);
    }
    let base = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))
        .unwrap_or_else(std::env::temp_dir);
    base.join("pagefold-bench")
}
