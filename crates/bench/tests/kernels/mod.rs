//! Kernels for tests that boot guests.

use std::process::Command;

use bench::guest::Kernel;

/// A kernel of a series, if this machine can boot one.
pub(crate) fn kernel(series: &str) -> Option<Kernel> {
    for (program, argument) in [("qemu-system-x86_64", "--version"), ("busybox", "true"), ("xz", "--version")] {
        if !Command::new(program).arg(argument).output().is_ok_and(|output| output.status.success()) {
            println!("skipped: no {program}");
            return None;
        }
    }
    match Kernel::of_series(series) {
        Ok(kernel) => Some(kernel),
        Err(error) => {
            println!("skipped: {error:#}");
            None
        }
    }
}
