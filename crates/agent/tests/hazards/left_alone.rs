//! What is not merged, or not any more, in programs that are managed whole.

use std::time::Duration;

use crate::stand::Stand;
use crate::victim::{Region, Victim, pid, tell};
use crate::whole::{FIRST, LARGE, large_pair, wait_whole};

pub(crate) const VICTIMS: &[Victim] = &[
    ("whole_ring", ring),
    ("whole_keys", keys),
    ("whole_limited", limited),
    ("whole_undumped", undumped),
    ("whole_unmounts", unmounts),
];

/// A ring could discard memory past the gate.
fn ring() {
    const SYS_IO_URING_SETUP: i64 = 425;
    let (one, two) = large_pair();
    wait_whole(one, two);
    let parameters = [0_u32; 30];
    // SAFETY: the kernel reads and writes 120 bytes of parameters.
    let ring = unsafe { libc::syscall(SYS_IO_URING_SETUP, 4, parameters.as_ptr()) };
    if ring < 0 {
        tell("skipped: io_uring");
        return;
    }
    assert_eq!((one.stored().len(), two.stored().len()), (0, 0), "it is there, and pages are still merged");
    one.check_from(FIRST);
    two.check_from(FIRST);
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!((one.stored().len(), two.stored().len()), (0, 0), "merged again");
}

#[test]
fn a_ring_ends_merging_before_it_is_there() {
    let stand = Stand::of_all(|_| true);
    stand.run("whole_ring");
    let stopped = stand.summary().stopped;
    assert!(matches!(&stopped[..], [one] if one.contains("io_uring")), "{stopped:?}");
}

/// Keys are marked as not to be dumped: they are nobody's twin any more.
fn keys() {
    let (one, two) = large_pair();
    wait_whole(one, two);
    assert_eq!(one.part(100, 200).advise(libc::MADV_DONTDUMP), 0);
    assert!(one.part(100, 200).stored().is_empty());
    std::thread::sleep(Duration::from_millis(2500));
    assert!(one.part(100, 200).stored().is_empty(), "merged again");
    one.check_from(FIRST);
    two.check_from(FIRST);
}

#[test]
fn what_is_not_to_be_dumped_is_not_merged() {
    Stand::of_all(|_| true).run("whole_keys");
}

/// A program under a limit of address space has it for itself.
fn limited() {
    let limit = libc::rlimit { rlim_cur: 8 << 30, rlim_max: 8 << 30 };
    // SAFETY: the kernel reads the limit.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const limit) }, 0);
    let (one, two) = large_pair();
    std::thread::sleep(Duration::from_millis(1500));
    Region::map(1).unmap();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(one.stored().len() + two.stored().len(), 0);
}

#[test]
fn a_program_with_a_limit_is_left_alone() {
    let stand = Stand::of_all(|_| true);
    stand.run("whole_limited");
    assert_eq!(stand.summary().processes_ever, 0);
}

/// Memory that was merged and then is not to be dumped consists of several mappings, which the program takes for one.
fn undumped() {
    let (one, two) = large_pair();
    wait_whole(one, two);
    // Every other page of its own again.
    (0..LARGE).step_by(2).for_each(|index| one.fill(index, FIRST + index as u64));
    assert_eq!(one.advise(libc::MADV_DONTDUMP), 0);
    assert_eq!(one.merged(), 0);
    std::thread::sleep(Duration::from_millis(800));
    assert_eq!(one.merged(), 0);
    one.check_from(FIRST);
    // SAFETY: grows memory of the victim.
    let moved = unsafe {
        libc::mremap(
            one.pointer(0),
            one.len(),
            2 * one.len(),
            libc::MREMAP_MAYMOVE,
            std::ptr::null_mut::<libc::c_void>(),
        )
    };
    assert!(moved != libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
    let grown = Region { start: moved as usize, pages: 2 * LARGE };
    grown.part(0, LARGE).check_from(FIRST);
    grown.part(LARGE, 2 * LARGE).check_zero();
    grown.fill_from(1);
    std::thread::sleep(Duration::from_millis(800));
    assert!(!(0..LARGE).step_by(64).any(|index| grown.part(index, index + 1).merged() > 0));
    grown.check_from(1);
    two.check_from(FIRST);
}

/// Seen to fail: mremap said EFAULT.
#[test]
fn v3_what_is_not_to_be_dumped_any_more_can_grow() {
    Stand::of_all(|_| true).run("whole_undumped");
}

/// A program that leaves the file system in which it was started, and unmounts it.
fn unmounts() {
    let folder = std::env::temp_dir().join(format!("pagefold-unmounts-{}", pid()));
    std::fs::create_dir(&folder).unwrap();
    let path = std::ffi::CString::new(folder.as_os_str().as_encoded_bytes()).unwrap();
    // SAFETY: mounts in a mount namespace of the victim's own.
    unsafe {
        if libc::unshare(libc::CLONE_NEWNS) != 0 {
            return println!("skipped: not root");
        }
        assert_eq!(
            libc::mount(
                c"none".as_ptr(),
                c"/".as_ptr(),
                std::ptr::null(),
                libc::MS_REC | libc::MS_PRIVATE,
                std::ptr::null()
            ),
            0
        );
        assert_eq!(libc::mount(c"none".as_ptr(), path.as_ptr(), c"tmpfs".as_ptr(), 0, std::ptr::null()), 0);
    }
    std::env::set_current_dir(&folder).unwrap();
    let (one, two) = large_pair();
    wait_whole(one, two);
    std::env::set_current_dir("/").unwrap();
    // SAFETY: what was mounted above.
    assert_eq!(unsafe { libc::umount(path.as_ptr()) }, 0, "{}", std::io::Error::last_os_error());
    std::fs::remove_dir(&folder).unwrap();
}

/// Seen to fail: the helper was still there (EBUSY).
#[test]
fn v17_a_helper_holds_no_folder() {
    Stand::of_all(|_| true).run("whole_unmounts");
}
