//! The kernel's per-CPU batches of pages on their way to the LRU lists.
//!
//! A page that was just populated waits in a batch of the CPU that did it, and the batch holds a reference. It is
//! emptied when it is full (31 pages, mm/swap.c); on a CPU that has nothing to do that can take hours. Until then no
//! count tells such a page from one that somebody is about to write to.

use std::io;

use crate::own_memory::OwnMapping;
use crate::sys;
use crate::units::{Bytes, page_size};

/// Empties the batches of all CPUs that have something in them, and waits for it: some 10 us for each such CPU.
///
/// MADV_COLLAPSE does it first of all (mm/khugepaged.c, `madvise_collapse`, since Linux 6.1); asked for a single page
/// it then finds no huge page to make.
///
/// # Errors
/// What the kernel said: EINVAL where it has no huge pages or this process may not have any.
pub fn drain_batches() -> io::Result<()> {
    const HUGE: u64 = 2 << 20;
    const MADV_COLLAPSE: i32 = 25;
    let memory = OwnMapping::anonymous(Bytes(2 * HUGE).pages())?;
    // Only memory that was once touched can have huge pages; touched before it may have any, it has a small one.
    memory.touch_page(0, 1);
    memory.advise(libc::MADV_HUGEPAGE)?;
    let area = memory.pointer().map_addr(|address| address.next_multiple_of(HUGE as usize));
    // SAFETY: a page of our own mapping, and collapsing less than a huge page changes nothing.
    sys::check(unsafe { libc::madvise(area.cast(), page_size() as usize, MADV_COLLAPSE) }.into()).map(|_| ())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::refcheck::bpf::tests::check;
    use crate::test_memory::Anonymous;
    use crate::{PageCount, Pagemap, Pid};

    #[test]
    fn a_page_that_waits_in_a_batch_is_free_afterwards() {
        let Some(mut check) = check() else { return };
        let pagemap = Pagemap::open(Pid::this()).unwrap();
        let mut held = 0;
        for _ in 0..20 {
            let memory = Anonymous::new(PageCount(8));
            memory.advise(rustix::mm::Advice::LinuxNoHugepage);
            // Other tests fork meanwhile.
            memory.advise(rustix::mm::Advice::LinuxDontFork);
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
