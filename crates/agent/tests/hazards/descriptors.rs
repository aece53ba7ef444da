//! The program may close any descriptor at any time: the gate's too, in the middle of what it reads.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use crate::stand::Stand;
use crate::victim::{Region, Victim, merged_pair, page};

pub(crate) const VICTIMS: &[Victim] = &[("closed_while_read", closed_while_read)];

const PAGES: usize = 24;

/// Mappings that stand before everything else in the list, so that reading it takes a while.
fn many_mappings() {
    let low = Region { start: 1 << 32, pages: 6000 };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    for index in 0..low.pages {
        let prot = if index % 2 == 0 { libc::PROT_READ } else { libc::PROT_NONE };
        // SAFETY: a place where nothing is.
        let mapped = unsafe { libc::mmap(low.pointer(index), page(), prot, flags, -1, 0) };
        assert_eq!(mapped, low.pointer(index));
    }
}

/// The protection of a page, as the kernel shows it.
fn protection(address: usize) -> String {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("proc is mounted");
    let holds = |line: &&str| {
        let (from, to) = line.split(' ').next().and_then(|range| range.split_once('-')).expect("a line of maps");
        let number = |digits: &str| usize::from_str_radix(digits, 16).expect("an address");
        (number(from)..number(to)).contains(&address)
    };
    let line = maps.lines().find(holds).expect("it is mapped");
    line.split(' ').nth(1).expect("a line of maps").to_owned()
}

/// mprotect up to a hole, while another thread closes the descriptor by which the gate finds out how far it came.
fn closed_while_read() {
    many_mappings();
    let (one, two) = merged_pair(PAGES, 900);
    one.part(20, PAGES).unmap();
    // The lowest free number is the gate's next descriptor.
    // SAFETY: a descriptor of this process, closed at once.
    let next = unsafe {
        let next = libc::dup(0);
        libc::close(next);
        next
    };
    let (closed, over) = (AtomicBool::new(false), AtomicBool::new(false));
    let allowed = std::thread::scope(|scope| {
        scope.spawn(|| {
            // Once: whoever looks again finds everything.
            // SAFETY: whatever has this number is to be closed.
            while !over.load(SeqCst) && unsafe { libc::close(next) } != 0 {
                std::hint::spin_loop();
            }
            closed.store(true, SeqCst);
        });
        let mut allowed = libc::PROT_READ;
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            assert_eq!(one.protect(allowed), libc::ENOMEM, "there is a hole");
            if closed.load(SeqCst) || Instant::now() > until {
                over.store(true, SeqCst);
                return allowed;
            }
            allowed ^= libc::PROT_WRITE;
        }
    });
    let shown = if allowed & libc::PROT_WRITE == 0 { "r--p" } else { "rw-p" };
    assert_eq!(protection(one.address(3)), shown);
    // What is put in the place of discarded pages has the protection that the gate believes in.
    assert_eq!(one.part(2, 6).advise(libc::MADV_DONTNEED), 0);
    assert_eq!(protection(one.address(3)), shown);
    one.part(2, 6).check_zero();
    one.part(6, 20).check_from(906);
    two.check_from(900);
}

/// V7: a list of mappings that was read in part is not taken for the whole.
///
/// Seen to fail: discarded pages had the protection from before the call.
#[test]
fn v7_a_descriptor_is_closed_while_mappings_are_read() {
    let stand = Stand::on_request();
    stand.run("closed_while_read");
    stand.assert_merged(PAGES as u64);
}
