//! What can be asked for plain memory only: NUMA policies.

use crate::stand::Stand;
use crate::victim::{Region, Victim, errno, merge_now, merge_pair, merged_pair, tell, wait_until};

pub(crate) const VICTIMS: &[Victim] = &[("policy", policy), ("policy_before", policy_before)];

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
/// Seen to fail: the pages stayed the store's, and those that were given back later had no policy.
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
