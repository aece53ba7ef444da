//! The lock of those who change settings of the whole host to try something out.

use std::fs::File;
use std::io;

/// Where it is. Whoever may run tests may make it.
const PATH: &str = "/tmp/pagefold-host.lock";

/// Takes the lock, held until the file is closed: tests and benchmarks that change settings of the whole host run one at a
/// time, across processes. The settings themselves are guarded by a [`Lease`](crate::Lease).
///
/// # Errors
/// What open(2) or flock(2) says.
pub fn host_lock() -> io::Result<File> {
    let lock = File::options().create(true).truncate(false).write(true).open(PATH)?;
    lock.lock()?;
    Ok(lock)
}
