//! How much address space this process may still take (RLIMIT_AS).

use crate::procfs;
use crate::sched::{Resource, SchedError, limit};
use crate::units::{Bytes, Pid, page_size};

/// What is left below the soft limit, `None` without one.
///
/// # Errors
/// [`SchedError`] if the limit cannot be read. What is in use counts as all of it where /proc does not tell.
pub fn left() -> Result<Option<Bytes>, SchedError> {
    let Some(soft) = limit(Pid::this(), Resource::AddressSpace)?.soft else { return Ok(None) };
    let used = std::fs::read("/proc/self/statm").ok().and_then(|text| procfs::words(&text).next().map(procfs::decimal));
    let used = used.flatten().map_or(u64::MAX, |pages| pages.saturating_mul(page_size()));
    Ok(Some(Bytes(soft.saturating_sub(used))))
}

/// Has all threads share one arena of the allocator. By default glibc reserves 64 MiB of address space for every thread,
/// up to eight for each CPU, and each keeps what its threads have freed. To be called before there are threads.
pub fn one_arena() {
    // SAFETY: the call takes integers; a C library that does not know this one says so and changes nothing.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Gives what is free in the allocator's arenas back to the kernel: after something that took much for a moment, above all
/// in a thread that ends, whose arena would keep it.
pub fn trim() {
    // SAFETY: the call takes an integer, and touches nothing that is allocated.
    unsafe { libc::malloc_trim(0) };
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::sched::{Limit, set_limit};

    #[test]
    fn what_is_left_is_the_limit_less_what_is_mapped() {
        let hard = limit(Pid::this(), Resource::AddressSpace).unwrap().hard;
        let most = hard.unwrap_or(1 << 46);
        let before = set_limit(Pid::this(), Resource::AddressSpace, Limit { soft: Some(most), hard }).unwrap();
        let first = left().unwrap().unwrap();
        let memory = crate::OwnedMemory::anonymous(crate::PageCount(1 << 16)).unwrap();
        let second = left().unwrap().unwrap();
        drop(memory);
        set_limit(Pid::this(), Resource::AddressSpace, before).unwrap();
        assert!(first.get() < most && second.get() < most, "{first:?} {second:?}");
        // Other tests map and unmap meanwhile.
        assert!(first.get() - second.get() > 128 << 20, "{first:?} {second:?}");
    }
}
