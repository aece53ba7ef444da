//! What can be asked for plain memory only: NUMA policies, and huge pages at once.

use crate::stand::Stand;
use crate::victim::{Region, Victim, errno, field_at, merge_now, merge_pair, merged_pair, page, tell, wait_until};

pub(crate) const VICTIMS: &[Victim] = &[("policy", policy), ("policy_before", policy_before), ("collapse", collapse)];

const PAGES: usize = 24;
const DEFAULT: i32 = 0;
const BIND: i32 = 2;

/// mbind, as libnuma makes it; 0 or the error. To the first node, which every machine has.
fn bind(region: Region, mode: i32) -> i32 {
    let node = 1_u64;
    let (mask, bits) = if mode == DEFAULT { (std::ptr::null(), 0) } else { (&raw const node, 65) };
    // SAFETY: where pages of the victim's own lie; the mask is as long as is said.
    let result = unsafe { libc::syscall(libc::SYS_mbind, region.start, region.len(), mode, mask, bits, 0) };
    if result == 0 { 0 } else { errno() }
}

/// The policy at an address.
fn policy_at(address: usize) -> i32 {
    const ADDRESS: i32 = 2;
    let mut mode = 0_i32;
    let none = std::ptr::null_mut::<u64>();
    // SAFETY: the kernel writes one integer.
    let result = unsafe { libc::syscall(libc::SYS_get_mempolicy, &raw mut mode, none, 0, address, ADDRESS) };
    assert_eq!(result, 0, "error {}", errno());
    mode
}

fn assert_bound(part: Region) {
    for index in 0..part.pages {
        assert_eq!(policy_at(part.address(index)), BIND, "page {index}");
    }
    assert_eq!(part.stored().len(), 0, "memory with a policy is merged");
}

/// A policy for merged memory, and none again.
fn policy() {
    let (one, two) = merged_pair(PAGES, 50);
    one.fill(6, 6000);
    let part = one.part(4, 16);
    if bind(part, BIND) == libc::ENOSYS {
        tell("skipped: CONFIG_NUMA");
        return;
    }
    for _ in 0..10 {
        assert_bound(part);
        merge_now();
    }
    assert!(part.holds(2, 6000));
    assert!(one.part(0, 4).merged() == 4 && two.merged() > PAGES / 2);
    // What is written later still has it.
    part.fill(2, 56);
    part.fill(3, 57);
    assert_bound(part);
    one.check_from(50);
    two.check_from(50);
    assert_eq!(bind(part, DEFAULT), 0);
    assert_eq!(policy_at(part.start), DEFAULT);
    wait_until("it is merged again", || {
        merge_now();
        part.merged() == part.pages
    });
    one.check_from(50);
    two.check_from(50);
}

/// V14: a NUMA policy for merged memory.
///
/// By hand, without the remedy: the pages stayed the store's, and those that were given back later had no policy.
#[test]
fn v14_a_policy_for_merged_memory() {
    let stand = Stand::on_request();
    if !stand.run("policy").contains("skipped:") {
        stand.assert_merged(PAGES as u64);
    }
}

/// Memory that has a policy before it comes under management.
fn policy_before() {
    let (one, two) = (Region::map(PAGES), Region::map(PAGES));
    one.fill_from(50);
    two.fill_from(50);
    let part = one.part(4, 8);
    if bind(part, BIND) == libc::ENOSYS {
        tell("skipped: CONFIG_NUMA");
        return;
    }
    one.mergeable();
    two.mergeable();
    wait_until("the rest is merged", || {
        merge_now();
        assert_bound(part);
        two.part(8, PAGES - 1).merged() + one.part(8, PAGES - 1).merged() == 2 * (PAGES - 9)
    });
    for _ in 0..5 {
        merge_now();
        assert_bound(part);
    }
    one.check_from(50);
    two.check_from(50);
}

/// V14: a policy that was there before.
#[test]
fn v14_memory_that_has_a_policy_is_left_alone() {
    let stand = Stand::on_request();
    if !stand.run("policy_before").contains("skipped:") {
        stand.assert_merged(PAGES as u64);
    }
}

/// MADV_COLLAPSE of merged memory, of memory whose writes are tracked, and by process_madvise.
fn collapse() {
    const COLLAPSE: i32 = 25;
    const HUGE: usize = 512;
    let all = Region::map(5 * HUGE);
    let skip = (HUGE - all.start / page() % HUGE) % HUGE;
    let nth = |index: usize| all.part(skip + index * HUGE, skip + (index + 1) * HUGE);
    let (one, two, unique, unmanaged) = (nth(0), nth(1), nth(2), nth(3));
    unmanaged.fill_from(9000);
    if unmanaged.advise(COLLAPSE) != 0 {
        tell("skipped: MADV_COLLAPSE");
        return;
    }
    one.fill_from(50);
    two.fill_from(50);
    unique.fill_from(5000);
    unique.mergeable();
    merge_pair(one, two);
    one.fill(7, 6000);
    assert_eq!(one.advise(COLLAPSE), 0);
    assert_eq!(one.stored().len(), 0);
    assert!(one.holds(7, 6000));
    one.fill(7, 57);
    one.check_from(50);
    two.check_from(50);
    // Its pages are protected to see writes.
    for _ in 0..5 {
        merge_now();
    }
    assert_eq!(unique.advise(COLLAPSE), 0);
    let huge = field_at(unique.start, "AnonHugePages:");
    assert!(!huge.ends_with(" 0 kB"), "{huge}");
    unique.check_from(5000);
    // It stays managed, and can be asked for again.
    assert_eq!(one.advise(COLLAPSE), 0);
    // A part, which has no room for a huge page.
    assert_eq!(two.part(3, 9).advise(COLLAPSE), 0);
    let vector = libc::iovec { iov_base: two.pointer(0), iov_len: two.len() };
    // SAFETY: the kernel reads one vector; it is about this process.
    let advised = unsafe {
        let own = libc::syscall(libc::SYS_pidfd_open, crate::victim::pid(), 0);
        libc::syscall(libc::SYS_process_madvise, own, &raw const vector, 1, COLLAPSE, 0)
    };
    assert!(advised == two.len() as i64 || advised == -1 && errno() == libc::EPERM, "{advised}: {}", errno());
    one.check_from(50);
    two.check_from(50);
    wait_until("it is merged again", || {
        merge_now();
        one.merged() > HUGE / 2
    });
    one.check_from(50);
    two.check_from(50);
}

/// V15: huge pages where pages are merged.
///
/// Seen to fail: EINVAL, also when the pages had been given back before.
#[test]
fn v15_collapse() {
    let stand = Stand::on_request();
    if !stand.run("collapse").contains("skipped:") {
        stand.assert_merged(900);
    }
}
