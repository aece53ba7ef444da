//! D6: advices after which a page's content must be gone, or must not be inherited.

use crate::stand::Stand;
use crate::victim::{Region, Victim, errno, fork, merged_pair, page, pid, reap};

pub(crate) const VICTIMS: &[Victim] = &[
    ("dontneed", || discard(libc::MADV_DONTNEED, true)),
    ("dontneed_locked", || discard(24, true)),
    ("free", || discard(libc::MADV_FREE, false)),
    ("guard", guard),
    ("wipe_on_fork", wipe_on_fork),
    ("process_madvise", process_madvise),
    ("remove", remove),
];

const PAGES: usize = 24;

/// Discards merged memory: it must read zero (after MADV_FREE it may), and be like any memory afterwards.
fn discard(advice: i32, at_once: bool) {
    let (one, two) = merged_pair(PAGES, 100);
    one.fill(5, 7000);
    let part = one.part(3, 17);
    assert_eq!(part.advise(advice), 0);
    if at_once {
        part.check_zero();
    } else {
        for index in 0..part.pages {
            let seed = 103 + index as u64;
            let old = if index == 2 { 7000 } else { seed };
            // Lazily freed memory shows what was there until it is taken, or zeros. Never anything else.
            assert!(part.holds(index, 0) || part.holds(index, old), "page {index}");
        }
    }
    for index in 0..part.pages {
        part.fill(index, 9000 + index as u64);
    }
    part.check_from(9000);
    one.part(0, 3).check_from(100);
    one.part(17, PAGES).check_from(117);
    two.check_from(100);
    one.unmap();
    two.check_from(100);
}

/// D6: MADV_DONTNEED on merged pages shows zeros, not the store.
#[test]
fn d6_dontneed() {
    let stand = Stand::on_request();
    stand.run("dontneed");
    stand.assert_merged(PAGES as u64);
}

/// D6: MADV_DONTNEED_LOCKED likewise.
#[test]
fn d6_dontneed_locked() {
    let stand = Stand::on_request();
    stand.run("dontneed_locked");
    stand.assert_merged(PAGES as u64);
}

/// D6, V4: MADV_FREE is permitted on merged pages, and writes after it stay.
#[test]
fn d6_free() {
    let stand = Stand::on_request();
    stand.run("free");
    stand.assert_merged(PAGES as u64);
}

/// MADV_GUARD_INSTALL and MADV_GUARD_REMOVE: the pages must read zero afterwards.
fn guard() {
    const INSTALL: i32 = 102;
    const REMOVE: i32 = 103;
    let (one, two) = merged_pair(PAGES, 200);
    let part = one.part(4, 9);
    match part.advise(INSTALL) {
        0 => {}
        libc::EINVAL => {
            println!("skipped: this kernel has no guard regions");
            return;
        }
        error => panic!("guard install: {error}"),
    }
    assert_eq!(part.advise(REMOVE), 0);
    part.check_zero();
    one.part(0, 4).check_from(200);
    one.part(9, PAGES).check_from(209);
    two.check_from(200);
}

/// D6: guard pages over merged memory.
#[test]
fn d6_guard_install_and_remove() {
    let stand = Stand::on_request();
    stand.run("guard");
    stand.assert_merged(PAGES as u64);
}

/// MADV_WIPEONFORK: permitted as on plain memory, content kept in the parent, zeros in the child.
fn wipe_on_fork() {
    let (one, two) = merged_pair(PAGES, 300);
    one.fill(6, 6000);
    let part = one.part(2, 12);
    assert_eq!(part.advise(libc::MADV_WIPEONFORK), 0);
    let check = |first: u64| {
        for index in 0..part.pages {
            let seed = if index == 4 { 6000 } else { first + index as u64 };
            assert!(part.holds(index, seed), "page {index}");
        }
    };
    check(302);
    reap(fork(|| {
        part.check_zero();
        one.part(0, 2).check_from(300);
    }));
    check(302);
    two.check_from(300);
    assert_eq!(part.advise(libc::MADV_KEEPONFORK), 0);
    reap(fork(|| check(302)));
}

/// D6, V4, D-13: WIPEONFORK on merged memory.
#[test]
fn d6_wipe_on_fork() {
    let stand = Stand::on_request();
    stand.run("wipe_on_fork");
    stand.assert_merged(PAGES as u64);
}

/// process_madvise on oneself with several ranges.
fn process_madvise() {
    let (one, two) = merged_pair(PAGES, 400);
    // SAFETY: a descriptor of this process.
    let own = unsafe { libc::syscall(libc::SYS_pidfd_open, pid(), 0) };
    let piece = |from: usize, to: usize| libc::iovec { iov_base: one.pointer(from), iov_len: (to - from) * page() };
    let vectors = [piece(1, 3), piece(6, 10)];
    // SAFETY: the kernel reads the two vectors; their memory is this process's.
    let result = unsafe { libc::syscall(libc::SYS_process_madvise, own, vectors.as_ptr(), 2, libc::MADV_DONTNEED, 0) };
    if result < 0 {
        println!("skipped: this kernel has no process_madvise(MADV_DONTNEED)");
        return;
    }
    assert_eq!(result as usize, 6 * page());
    one.part(1, 3).check_zero();
    one.part(6, 10).check_zero();
    one.part(0, 1).check_from(400);
    one.part(3, 6).check_from(403);
    one.part(10, PAGES).check_from(410);
    two.check_from(400);

    // The second range is refused, and what comes behind it is as it was. Neither is anything done if the vectors cannot
    // be read whole, and nothing at all where they are about the same place in another process.
    let odd = libc::iovec { iov_base: (one.address(12) + 8) as *mut libc::c_void, iov_len: page() };
    let advise = |of: i64, vectors: *const libc::iovec, count: usize| {
        // SAFETY: the kernel reads the vectors; their memory is this process's, or nobody's.
        unsafe { libc::syscall(libc::SYS_process_madvise, of, vectors, count, libc::MADV_DONTNEED, 0) }
    };
    assert_eq!(advise(own, [piece(11, 12), odd, piece(13, 14)].as_ptr(), 3) as usize, page());
    one.part(11, 12).check_zero();
    assert_eq!((advise(own, [odd, piece(13, 14)].as_ptr(), 2), errno()), (-1, libc::EINVAL));
    let ends = Region::map(2);
    ends.part(1, 2).unmap();
    let last = (ends.address(1) - size_of::<libc::iovec>()) as *mut libc::iovec;
    // SAFETY: the last vector's place in memory of the victim.
    unsafe { last.write(piece(13, 14)) };
    assert_eq!((advise(own, last, 2), errno()), (-1, libc::EFAULT));
    let child = fork(|| {
        // SAFETY: this child ends when the victim does.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) };
        std::thread::sleep(std::time::Duration::from_secs(60));
    });
    // SAFETY: a descriptor of the child.
    let other = unsafe { libc::syscall(libc::SYS_pidfd_open, child, 0) };
    assert_eq!((advise(other, [piece(13, 20)].as_ptr(), 1), errno()), (-1, libc::EINVAL));
    one.part(12, PAGES).check_from(412);
    two.check_from(400);
    // Where no program has addresses nothing is done either; empty vectors are passed over.
    let at = |address: usize, iov_len: usize| libc::iovec { iov_base: address as *mut libc::c_void, iov_len };
    let beyond = at(usize::MAX << 47, page());
    assert_eq!((advise(own, [piece(14, 15), beyond].as_ptr(), 2), errno()), (-1, libc::EFAULT));
    assert_eq!(advise(own, [at(0x123, 0), at(0, 0)].as_ptr(), 0), 0);
    one.part(12, PAGES).check_from(412);
    assert_eq!(advise(own, [piece(14, 15), at(0x123, 0), piece(15, 16)].as_ptr(), 3) as usize, 2 * page());
    one.part(14, 16).check_zero();
    one.part(16, PAGES).check_from(416);
    // Many ranges.
    let many: Vec<_> = (0..100).map(|index| if index % 2 == 0 { piece(20, 21) } else { piece(22, 23) }).collect();
    assert_eq!(advise(own, many.as_ptr(), 100) as usize, 100 * page());
    one.part(20, 21).check_zero();
    one.part(21, 22).check_from(421);
    // SAFETY: ends the child.
    unsafe { libc::kill(child, libc::SIGKILL) };
}

/// D6: process_madvise on merged memory.
///
/// Seen to fail: an advice about another process, which the kernel refuses, cleared the caller's own pages, and so did one
/// that stops before it comes to them.
#[test]
fn d6_process_madvise_on_oneself() {
    let stand = Stand::on_request();
    stand.run("process_madvise");
    stand.assert_merged(PAGES as u64);
}

/// MADV_REMOVE is refused with the error of anonymous memory, and changes nothing.
fn remove() {
    let (one, two) = merged_pair(PAGES, 500);
    let plain = Region::map(2);
    plain.fill_from(1);
    let expected = plain.advise(libc::MADV_REMOVE);
    assert_eq!(one.advise(libc::MADV_REMOVE), expected);
    one.check_from(500);
    two.check_from(500);
}

/// V4: MADV_REMOVE on merged memory.
#[test]
fn v4_remove_has_the_error_of_anonymous_memory() {
    let stand = Stand::on_request();
    stand.run("remove");
    stand.assert_merged(PAGES as u64);
}
