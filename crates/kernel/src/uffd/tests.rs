#![allow(clippy::unwrap_used, reason = "tests")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::*;
use crate::test_memory::{Anonymous, as_nobody, in_own_process, started_by_a_test};
use crate::units::{PageCount, page_size};

/// A descriptor with these features, or none where it is not permitted or the kernel lacks them.
fn uffd(features: UffdFeatures) -> Option<Uffd> {
    let made = Uffd::create(CreateFlags::empty()).and_then(|uffd| uffd.api(features).map(|_| uffd));
    match made {
        Ok(uffd) => Some(uffd),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

#[test]
fn frozen_pages_are_waited_for_and_come_back() {
    let Some(uffd) = uffd(UffdFeatures::MOVE) else { return };
    let (memory, scratch) = (Anonymous::new(PageCount(4)), Anonymous::new(PageCount(4)));
    memory.advise(rustix::mm::Advice::LinuxNoHugepage);
    memory.fill(0x11);
    uffd.register(memory.range(), Mode::MISSING).unwrap();
    uffd.register(scratch.range(), Mode::MISSING).unwrap();
    // SAFETY: the memory is the test's own, and nobody holds references into it.
    let out = unsafe { uffd.move_pages(scratch.range().start(), memory.range()) };
    assert_eq!(out, MoveOutcome { moved: memory.range().len(), errno: None });
    assert_eq!(scratch.read(page_size()), 0x11);
    let arrived = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let toucher = scope.spawn(|| {
            let value = memory.read(page_size());
            arrived.store(true, Ordering::SeqCst);
            value
        });
        let event = wait_for_event(&uffd);
        let Event::Pagefault { address, flags, .. } = event else { panic!("{event:?}") };
        assert_eq!(address, memory.page(1).start());
        assert!(flags.is_empty());
        assert!(!arrived.load(Ordering::SeqCst));
        // SAFETY: as above.
        let back = unsafe { uffd.move_pages(memory.range().start(), scratch.range()) };
        assert_eq!(back.errno, None);
        uffd.wake(memory.range()).unwrap();
        assert_eq!(toucher.join().unwrap(), 0x11);
    });
    uffd.unregister(memory.range()).unwrap();
    // SAFETY: as above.
    let holes = unsafe { uffd.move_pages(memory.range().start(), scratch.range()) };
    assert_eq!(holes.moved, Bytes(0));
    assert!(holes.errno.is_some());
}

fn wait_for_event(uffd: &Uffd) -> Event {
    assert!(crate::pidfd::poll_in(uffd.as_fd(), Some(Duration::from_secs(5))).unwrap(), "no event");
    uffd.read_event().unwrap().unwrap()
}

#[test]
fn copies_tell_what_became_of_them() {
    let Some(uffd) = uffd(UffdFeatures::empty()) else { return };
    let memory = Anonymous::new(PageCount(2));
    uffd.register(memory.page(0), Mode::MISSING).unwrap();
    let page = vec![0x77; page_size() as usize];
    assert_eq!(uffd.copy(memory.range().start(), &page).unwrap(), CopyOutcome::Done);
    assert_eq!(memory.read(5), 0x77);
    assert_eq!(uffd.copy(memory.range().start(), &page).unwrap(), CopyOutcome::Exists);
    assert_eq!(uffd.copy(memory.page(1).start(), &page).unwrap(), CopyOutcome::Gone, "not registered");
    assert_eq!(uffd.zeropage(memory.page(1)).unwrap(), CopyOutcome::Gone);
    assert!(matches!(uffd.copy(memory.range().start(), &page[1..]), Err(UffdError::Range { .. })));
    memory.advise(rustix::mm::Advice::LinuxDontNeed);
    assert_eq!(uffd.zeropage(memory.page(0)).unwrap(), CopyOutcome::Done);
    assert_eq!(memory.read(0), 0);
    assert!(uffd.read_event().unwrap().is_none());
}

#[test]
fn a_copy_that_ends_at_content_reports_how_far_it_came() {
    let Some(uffd) = uffd(UffdFeatures::empty()) else { return };
    let memory = Anonymous::new(PageCount(4));
    memory.advise(rustix::mm::Advice::LinuxNoHugepage);
    memory.write(2 * page_size(), 9);
    uffd.register(memory.range(), Mode::MISSING).unwrap();
    let pages = vec![1; 4 * page_size() as usize];
    let outcome = uffd.copy(memory.range().start(), &pages).unwrap();
    assert_eq!(outcome, CopyOutcome::Again { copied: PageCount(2).bytes() });
    assert_eq!((memory.read(0), memory.read(2 * page_size())), (1, 9));
}

#[test]
fn synchronous_write_protection_reports_writes() {
    let Some(uffd) = uffd(UffdFeatures::PAGEFAULT_FLAG_WP) else { return };
    let memory = Anonymous::new(PageCount(1));
    memory.fill(1);
    uffd.register(memory.range(), Mode::WP).unwrap();
    uffd.write_protect(memory.range(), true).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| memory.write(0, 2));
        let event = wait_for_event(&uffd);
        let Event::Pagefault { flags, .. } = event else { panic!("{event:?}") };
        assert!(flags.contains(FaultFlags::WP | FaultFlags::WRITE));
        uffd.write_protect(memory.range(), false).unwrap();
    });
    assert_eq!(memory.read(0), 2);
}

// While somebody holds a descriptor with EVENT_FORK, every fork of the process waits for its reader: other tests' too.
#[test]
fn forks_are_reported() {
    in_own_process("uffd::tests::body_a_fork_hands_over_the_childs_descriptor");
    in_own_process("uffd::tests::body_a_descriptor_outlives_its_address_space");
}

#[test]
#[ignore = "runs in a process of its own, started by the test above"]
fn body_a_fork_hands_over_the_childs_descriptor() {
    if !started_by_a_test() {
        return;
    }
    let Some(uffd) = uffd(UffdFeatures::EVENT_FORK | UffdFeatures::EVENT_REMOVE) else { return };
    let memory = Anonymous::new(PageCount(1));
    uffd.register(memory.range(), Mode::MISSING).unwrap();
    std::thread::scope(|scope| {
        let parent = scope.spawn(|| {
            // SAFETY: the child reads one byte of its copy of the memory and ends.
            let pid = unsafe { libc::fork() };
            if pid == 0 {
                let value = memory.read(0);
                // SAFETY: ends the child at once.
                unsafe { libc::_exit(value.into()) };
            }
            let mut status = 0;
            // SAFETY: the word is writable and lives until the call returns.
            assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
            libc::WEXITSTATUS(status)
        });
        let event = wait_for_event(&uffd);
        let Event::Fork { uffd: child } = event else { panic!("{event:?}") };
        let page = vec![0x2a; page_size() as usize];
        assert_eq!(child.copy(memory.range().start(), &page).unwrap(), CopyOutcome::Done);
        assert_eq!(parent.join().unwrap(), 0x2a);
    });
    std::thread::scope(|scope| {
        scope.spawn(|| memory.advise(rustix::mm::Advice::LinuxDontNeed));
        let event = wait_for_event(&uffd);
        let Event::Remove { start, end } = event else { panic!("{event:?}") };
        assert_eq!((start, end), (memory.range().start(), memory.range().end()));
    });
}

#[test]
fn the_handshake_is_made_once_and_only_for_known_features() {
    let Some(fresh) = uffd(UffdFeatures::empty()) else { return };
    assert!(matches!(fresh.api(UffdFeatures::empty()), Err(UffdError::Features { .. })));
    let unknown = UffdFeatures::from_bits_retain(1 << 60);
    let refused = Uffd::create(CreateFlags::empty()).unwrap().api(unknown).unwrap_err();
    assert!(matches!(refused, UffdError::Features { source, .. } if source.raw_os_error() == Some(libc::EINVAL)));
    let hole = Anonymous::new(PageCount(1)).range();
    assert!(matches!(fresh.register(hole, Mode::MISSING), Err(UffdError::Range { .. })));
    assert!(supported_features().unwrap().contains(UffdFeatures::WP_ASYNC));
}

#[test]
#[ignore = "runs in a process of its own, started by a test above"]
fn body_a_descriptor_outlives_its_address_space() {
    if !started_by_a_test() {
        return;
    }
    let Some(uffd) = uffd(UffdFeatures::EVENT_FORK) else { return };
    let memory = Anonymous::new(PageCount(1));
    memory.fill(1);
    uffd.register(memory.range(), Mode::MISSING).unwrap();
    let child = std::thread::scope(|scope| {
        scope.spawn(|| {
            // SAFETY: the child ends at once.
            let pid = unsafe { libc::fork() };
            if pid == 0 {
                // SAFETY: ends the child at once.
                unsafe { libc::_exit(0) };
            }
            // SAFETY: no status is asked for, so nothing is written.
            assert_eq!(unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) }, pid);
        });
        match wait_for_event(&uffd) {
            Event::Fork { uffd } => uffd,
            event => panic!("{event:?}"),
        }
    });
    let page = vec![0; page_size() as usize];
    assert_eq!(child.copy(memory.range().start(), &page).unwrap(), CopyOutcome::Gone);
}

#[test]
fn descriptors_from_elsewhere_are_looked_at() {
    let (one, _other) = crate::seqpacket::Seqpacket::pair().unwrap();
    assert!(matches!(Uffd::from_owned_fd(one.into_owned_fd()), Err(UffdError::NotUserfaultfd)));
    let Some(uffd) = uffd(UffdFeatures::empty()) else { return };
    let fd = uffd.into_owned_fd();
    let flags = rustix::fs::fcntl_getfl(&fd).unwrap();
    rustix::fs::fcntl_setfl(&fd, flags - rustix::fs::OFlags::NONBLOCK).unwrap();
    assert!(Uffd::from_owned_fd(fd).unwrap().read_event().unwrap().is_none(), "and does not block");
}

#[test]
fn without_a_grant_the_error_says_which() {
    if !as_nobody("uffd::tests::body_without_a_grant") {
        println!("skipped: root, or a test binary that everybody may execute");
    }
}

#[test]
#[ignore = "runs as another user, started by the test above"]
fn body_without_a_grant() {
    if !started_by_a_test() {
        return;
    }
    let sysctl = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap();
    match Uffd::create(CreateFlags::empty()) {
        Err(UffdError::NotPermitted { device, syscall }) => {
            assert!(matches!(device, Errno::ACCESS | Errno::NOENT));
            assert_eq!(syscall, Errno::PERM);
        }
        result => assert_eq!(sysctl.trim(), "1", "{result:?}"),
    }
    let uffd = Uffd::create(CreateFlags::USER_MODE_ONLY).unwrap();
    assert!(uffd.api(UffdFeatures::WP_ASYNC).is_ok());
    let forked = Uffd::create(CreateFlags::USER_MODE_ONLY).unwrap().api(UffdFeatures::EVENT_FORK).unwrap_err();
    assert!(matches!(forked, UffdError::Features { source, .. } if source.raw_os_error() == Some(libc::EPERM)));
}
