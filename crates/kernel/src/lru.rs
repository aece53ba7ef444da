//! The kernel's per-CPU batches of pages on their way to the LRU lists.
//!
//! A page that was just populated waits in a batch of the CPU that did it, and the batch holds a reference. It is
//! emptied when it is full (31 pages, mm/swap.c); on a CPU that has nothing to do that can take hours. Until then no
//! count tells such a page from one that somebody is about to write to.

use std::io;
use std::sync::OnceLock;

use crate::sys;
use crate::units::page_size;

/// Where the kernel can be asked to empty the batches: room for one huge page.
static AREA: OnceLock<usize> = OnceLock::new();

/// Empties the batches of all CPUs that have something in them, and waits for it: some 10 us for each such CPU.
///
/// MADV_COLLAPSE does it first of all (mm/khugepaged.c, `madvise_collapse`, since Linux 6.1); asked for a single page
/// it then finds no huge page to make.
///
/// # Errors
/// What the kernel said: EINVAL where it has no huge pages or this process may not have any.
pub fn drain_batches() -> io::Result<()> {
    const HUGE: usize = 2 << 20;
    const MADV_COLLAPSE: i32 = 25;
    let area = match AREA.get() {
        Some(area) => *area,
        None => {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: the kernel chooses the address, so no existing memory is touched.
            let raw = unsafe { libc::mmap(std::ptr::null_mut(), 2 * HUGE, prot, flags, -1, 0) };
            if raw == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            // Only memory that was once touched can have huge pages.
            // SAFETY: the first page of the mapping just made.
            unsafe { raw.cast::<u8>().write_volatile(1) };
            // Two threads at once: the area that comes second is address space and one page.
            *AREA.get_or_init(|| raw.expose_provenance().next_multiple_of(HUGE))
        }
    };
    let area = std::ptr::with_exposed_provenance_mut(area);
    // SAFETY: the area is our own; collapsing less than a huge page changes nothing.
    sys::check(unsafe { libc::madvise(area, page_size() as usize, MADV_COLLAPSE) }.into()).map(|_| ())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::test_memory::Anonymous;
    use crate::{BpfCheck, PageCount, Pagemap, Pid};

    #[test]
    fn a_page_that_waits_in_a_batch_is_free_afterwards() {
        let mut check = match BpfCheck::new() {
            Ok(check) => check,
            Err(error) => {
                println!("skipped: {error}; {}", error.grant);
                return;
            }
        };
        let pagemap = Pagemap::open(Pid::this()).unwrap();
        let mut held = 0;
        for _ in 0..20 {
            let memory = Anonymous::new(PageCount(8));
            memory.advise(rustix::mm::Advice::LinuxNoHugepage);
            memory.fill(3);
            let mut counts = [0; 8];
            check.refs_at(&pagemap, memory.range().start(), &mut counts).unwrap();
            held += counts.iter().filter(|count| **count > 1).count();
            drain_batches().unwrap();
            check.refs_at(&pagemap, memory.range().start(), &mut counts).unwrap();
            assert_eq!(counts, [1; 8]);
        }
        assert!(held > 0, "no page was in a batch, so nothing was tried");
    }
}
