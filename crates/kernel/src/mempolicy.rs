//! On which memory node this thread's new pages are put.

use std::io;

use crate::sys;

const MPOL_DEFAULT: i32 = 0;
const MPOL_BIND: i32 = 2;

/// Has new pages of this thread come from one node, and from no other.
///
/// # Errors
/// What set_mempolicy(2) says: EINVAL for a node that there is not, ENOSYS from a kernel without CONFIG_NUMA.
pub fn bind(node: u32) -> io::Result<()> {
    set(MPOL_BIND, 1_u64.checked_shl(node).ok_or(io::ErrorKind::InvalidInput)?)
}

/// Puts new pages of this thread where the kernel likes again.
///
/// # Errors
/// What set_mempolicy(2) says.
pub fn unbind() -> io::Result<()> {
    set(MPOL_DEFAULT, 0)
}

fn set(mode: i32, nodes: u64) -> io::Result<()> {
    // The length counts one bit more than it has (mm/mempolicy.c, get_nodes).
    let (mask, bits) = if nodes == 0 { (std::ptr::null(), 0) } else { (&raw const nodes, u64::BITS + 1) };
    // SAFETY: the mask has as many bits as are said, and lives until the call returns.
    sys::check(unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, mask, libc::c_ulong::from(bits)) }).map(|_| ())
}

/// True if the machine has memory of more than one node, so that policies matter.
#[must_use]
pub fn has_nodes() -> bool {
    // A list, such as `0-3,7`.
    std::fs::read("/sys/devices/system/node/has_memory").is_ok_and(|list| list.iter().any(|byte| b",-".contains(byte)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn the_first_node_is_there_and_the_last_is_not() {
        if let Err(error) = bind(0) {
            assert_eq!(error.raw_os_error(), Some(libc::ENOSYS));
            return println!("skipped: CONFIG_NUMA");
        }
        unbind().unwrap();
        assert_eq!(bind(63).unwrap_err().raw_os_error(), Some(libc::EINVAL));
        assert!(bind(64).is_err());
    }
}
