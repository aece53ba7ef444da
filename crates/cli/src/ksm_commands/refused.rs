//! What this kernel or this user cannot have is not a failure of the command.

use std::process::ExitCode;

use ksm::KsmError;

use crate::say;

/// Status 3 with the way out where KSM's settings cannot be had here; every other error as it is.
pub(super) fn refused(error: anyhow::Error) -> anyhow::Result<ExitCode> {
    let way_out = match error.downcast_ref::<KsmError>() {
        Some(KsmError::Missing { .. }) => "boot a kernel with CONFIG_KSM=y, with sysfs on /sys",
        Some(KsmError::ReadOnly { source, .. }) if source.kind() == std::io::ErrorKind::PermissionDenied => {
            "run it as root"
        }
        Some(KsmError::ReadOnly { .. }) => "run it outside of the container, where /sys can be written",
        Some(KsmError::NoProc) => "mount /proc",
        _ => return Err(error),
    };
    say::note(format_args!("{error:#}; {way_out}"));
    Ok(ExitCode::from(crate::NOT_HERE))
}
