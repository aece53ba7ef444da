//! What calls do to merged pages that do not come through the gate, and what the kernel offers against that: why programs
//! without a proof are left alone, whatever guard is put around them (docs/programs.md). Nothing of pagefold runs in here:
//! a private mapping of a memory file stands for merged pages.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "tests")]

use std::io::Error;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

const PAGE: usize = 4096;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
const STORED: u8 = 0x73;
const GUARD_INSTALL: i32 = 102;
const GUARD_REMOVE: i32 = 103;
const EFAULT: Option<i32> = Some(libc::EFAULT);

/// Three pages: anonymous, of the store if `merged`, anonymous. As the program knows it they are one mapping.
struct Pages(*mut u8);

impl Pages {
    fn map(merged: bool) -> Self {
        let map = |at: *mut u8, pages: usize, flags: i32, fd: i32| {
            // SAFETY: a free place of the kernel's choice, or a part of one that was mapped so.
            let start = unsafe { libc::mmap(at.cast(), pages * PAGE, RW, libc::MAP_PRIVATE | flags, fd, 0) };
            assert!(start != libc::MAP_FAILED, "{}", Error::last_os_error());
            start.cast::<u8>()
        };
        let start = map(std::ptr::null_mut(), 3, libc::MAP_ANONYMOUS, -1);
        // SAFETY: memory that was just mapped.
        unsafe { start.write_bytes(1, 3 * PAGE) };
        // SAFETY: the second page of it.
        let middle = unsafe { start.add(PAGE) };
        if merged {
            // SAFETY: makes a descriptor and writes a page to it.
            let store = unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"store".as_ptr(), libc::MFD_CLOEXEC)) };
            // SAFETY: as above.
            assert_eq!(unsafe { libc::write(store.as_raw_fd(), [STORED; PAGE].as_ptr().cast(), PAGE) }, PAGE as isize);
            map(middle, 1, libc::MAP_FIXED, store.as_raw_fd());
            assert_eq!(Self(start).middle(), STORED);
        }
        Self(start)
    }

    fn middle_at(&self) -> *mut u8 {
        // SAFETY: the second of three pages.
        unsafe { self.0.add(PAGE) }
    }

    /// What the program reads in the middle.
    fn middle(&self) -> u8 {
        // SAFETY: mapped memory of this process.
        unsafe { self.middle_at().read_volatile() }
    }

    fn advise(&self, advice: i32) -> Result<(), Option<i32>> {
        // SAFETY: changes a page that only this test knows.
        let result = unsafe { libc::madvise(self.middle_at().cast(), PAGE, advice) };
        if result == 0 { Ok(()) } else { Err(Error::last_os_error().raw_os_error()) }
    }

    /// All three pages, to four pages elsewhere.
    fn grow(&self) -> Result<(), Option<i32>> {
        // SAFETY: moves memory that only this test knows.
        let to = unsafe { libc::mremap(self.0.cast(), 3 * PAGE, 4 * PAGE, libc::MREMAP_MAYMOVE) };
        if to == libc::MAP_FAILED { Err(Error::last_os_error().raw_os_error()) } else { Ok(()) }
    }
}

/// A page whose content was thrown away reads as zeros. Merged it reads as the store's, and a guard of threads that are
/// stopped while pages are merged comes too early to prevent it: the call is made at any time later.
#[test]
fn what_is_thrown_away_comes_back_as_the_stores() {
    let (plain, merged) = (Pages::map(false), Pages::map(true));
    for (pages, wanted) in [(&plain, 0), (&merged, STORED)] {
        // SAFETY: writes to the middle page.
        unsafe { pages.middle_at().write_volatile(9) };
        assert_eq!((pages.advise(libc::MADV_DONTNEED), pages.middle()), (Ok(()), wanted));
    }
    // Lazily freed memory is refused as a whole.
    assert_eq!((plain.advise(libc::MADV_FREE), merged.advise(libc::MADV_FREE)), (Ok(()), Err(Some(libc::EINVAL))));
    for (pages, wanted) in [(&plain, 0), (&merged, STORED)] {
        // SAFETY: as above.
        unsafe { pages.middle_at().write_volatile(9) };
        if let Err(error) = pages.advise(GUARD_INSTALL) {
            println!("skipped: guards in such memory: {error:?}");
            continue;
        }
        assert_eq!((pages.advise(GUARD_REMOVE), pages.middle()), (Ok(()), wanted));
    }
}

/// What the program knows as one mapping are several.
#[test]
fn what_is_one_mapping_to_the_program_cannot_grow() {
    assert_eq!((Pages::map(false).grow(), Pages::map(true).grow()), (Ok(()), Err(EFAULT)));
}

/// userfaultfd tells of DONTNEED before it takes place, but lets it go on when the event is read, and says nothing of
/// guards.
#[test]
fn events_come_for_some_calls_only() {
    const EVENT_REMOVE: u64 = 1 << 3;
    const WRITE_PROTECT: u64 = 2;
    // SAFETY: makes a descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) } as i32;
    if fd < 0 {
        println!("skipped: userfaultfd: {}", Error::last_os_error());
        return;
    }
    // SAFETY: just made.
    let uffd = unsafe { OwnedFd::from_raw_fd(fd) };
    let merged = Pages::map(true);
    let mut api = [0xaa_u64, EVENT_REMOVE, 0];
    let mut register = [merged.middle_at() as u64, PAGE as u64, WRITE_PROTECT, 0];
    // SAFETY: the kernel reads and writes a struct uffdio_api and a struct uffdio_register.
    unsafe {
        assert_eq!(libc::ioctl(uffd.as_raw_fd(), 0xc018_aa3f, api.as_mut_ptr()), 0, "{}", Error::last_os_error());
        assert_eq!(libc::ioctl(uffd.as_raw_fd(), 0xc020_aa00, register.as_mut_ptr()), 0, "{}", Error::last_os_error());
    }
    let pending = |wait: i32| {
        let mut poll = libc::pollfd { fd: uffd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: the kernel writes one pollfd.
        unsafe { libc::poll(&raw mut poll, 1, wait) == 1 }
    };
    if merged.advise(GUARD_INSTALL).is_ok() {
        assert!(!pending(0), "an event for a guard would be a way");
        merged.advise(GUARD_REMOVE).unwrap();
    }
    let at = merged.middle_at() as usize;
    std::thread::scope(|scope| {
        // SAFETY: discards a page of this test.
        let caller = scope.spawn(move || unsafe { libc::madvise(at as *mut libc::c_void, PAGE, libc::MADV_DONTNEED) });
        assert!(pending(10_000), "no event for DONTNEED");
        let mut event = [0_u8; 32];
        // SAFETY: the kernel writes one struct uffd_msg.
        assert_eq!(unsafe { libc::read(uffd.as_raw_fd(), event.as_mut_ptr().cast(), 32) }, 32);
        assert_eq!(caller.join().unwrap(), 0);
    });
    assert_eq!(merged.middle(), STORED, "whoever has read the event has let it happen");
}

/// A supervisor of system calls (seccomp's notifications) can look at each one before it takes place; when the supervisor
/// ends, those calls fail.
#[test]
fn calls_fail_when_their_supervisor_is_gone() {
    const NOTIFY: u32 = 0x7fc0_0000;
    const ALLOW: u32 = 0x7fff_0000;
    let rule = |code: u16, jf: u8, k: u32| libc::sock_filter { code, jt: 0, jf, k };
    let number = rule(0x20, 0, 0);
    let mut rules = [number, rule(0x15, 1, libc::SYS_madvise as u32), rule(0x06, 0, NOTIFY), rule(0x06, 0, ALLOW)];
    let program = libc::sock_fprog { len: 4, filter: rules.as_mut_ptr() };
    let pages = Pages::map(false);
    // SAFETY: the child makes system calls only.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: filters this child, and ends it.
        unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            let listener = libc::syscall(libc::SYS_seccomp, 1, 8, &raw const program) as i32;
            if listener < 0 {
                libc::_exit(100);
            }
            libc::close(listener);
            libc::madvise(pages.middle_at().cast(), PAGE, libc::MADV_DONTNEED);
            libc::_exit(*libc::__errno_location());
        }
    }
    let mut status = 0;
    // SAFETY: waits for that child.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    if libc::WEXITSTATUS(status) == 100 {
        println!("skipped: seccomp's notifications");
        return;
    }
    assert_eq!(libc::WEXITSTATUS(status), libc::ENOSYS);
}
