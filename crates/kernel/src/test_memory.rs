//! Memory of a test's own, which it may treat as it likes.

#![allow(clippy::unwrap_used, reason = "tests")]

use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::units::{PageCount, Range, Vaddr, page_size};

/// Private anonymous memory.
pub(crate) struct Anonymous {
    range: Range,
}

impl Anonymous {
    pub(crate) fn new(pages: PageCount) -> Self {
        Self::with_flags(pages, MapFlags::empty())
    }

    pub(crate) fn with_flags(pages: PageCount, flags: MapFlags) -> Self {
        let length = pages.bytes().0 as usize;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the address, so no existing memory is touched.
        let pointer =
            unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), length, prot, MapFlags::PRIVATE | flags) }
                .unwrap();
        let start = Vaddr(pointer.expose_provenance() as u64);
        Self { range: Range::from_pages(start, pages).unwrap() }
    }

    pub(crate) fn range(&self) -> Range {
        self.range
    }

    pub(crate) fn page(&self, index: u64) -> Range {
        Range::from_pages(self.range.start() + PageCount(index), PageCount(1)).unwrap()
    }

    pub(crate) fn pointer(&self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.range.start().0 as usize)
    }

    /// Writes the first byte of every page.
    pub(crate) fn fill(&self, byte: u8) {
        for page in 0..self.range.pages().0 {
            self.write(page * page_size(), byte);
        }
    }

    pub(crate) fn write(&self, offset: u64, byte: u8) {
        assert!(offset < self.range.len().0);
        // SAFETY: the offset lies in our mapping, which nobody holds references into.
        unsafe { self.pointer().add(offset as usize).write_volatile(byte) };
    }

    pub(crate) fn read(&self, offset: u64) -> u8 {
        assert!(offset < self.range.len().0);
        // SAFETY: the offset lies in our mapping.
        unsafe { self.pointer().add(offset as usize).read_volatile() }
    }

    /// Takes all rights from a page.
    pub(crate) fn protect_none(&self, index: u64) {
        let page = self.page(index);
        let pointer = std::ptr::with_exposed_provenance_mut(page.start().0 as usize);
        // SAFETY: the page is our mapping's, which nobody holds references into.
        unsafe { rustix::mm::mprotect(pointer, page.len().0 as usize, rustix::mm::MprotectFlags::empty()) }.unwrap();
    }

    pub(crate) fn advise(&self, advice: Advice) {
        // SAFETY: the range is our mapping, which nobody holds references into.
        unsafe { rustix::mm::madvise(self.pointer().cast(), self.range.len().0 as usize, advice) }.unwrap();
    }
}

impl Drop for Anonymous {
    fn drop(&mut self) {
        // SAFETY: the range is our mapping, which nobody holds references into.
        unsafe { rustix::mm::munmap(self.pointer().cast(), self.range.len().0 as usize) }.unwrap();
    }
}

/// Runs an ignored test of this binary as the user nobody; false if that cannot be done here. Fails if the test fails.
pub(crate) fn as_nobody(test: &str) -> bool {
    rustix::process::geteuid().is_root() && run(test, true)
}

/// Runs an ignored test of this binary in a process of its own. Fails if the test fails.
pub(crate) fn in_own_process(test: &str) {
    assert!(run(test, false), "a test binary can execute itself");
}

/// True in the process that [`as_nobody`] or [`in_own_process`] has started; ignored tests that were asked for in
/// another way would do harm or fail.
pub(crate) fn started_by_a_test() -> bool {
    let started = std::env::var_os("PAGEFOLD_TEST_BODY").is_some();
    if !started {
        println!("skipped: runs only from within another test");
    }
    started
}

fn run(test: &str, as_nobody: bool) -> bool {
    use std::os::unix::process::CommandExt;
    const NOBODY: u32 = 65534;
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--ignored", "--nocapture"]).current_dir("/").env("PAGEFOLD_TEST_BODY", "1");
    if as_nobody {
        command.uid(NOBODY).gid(NOBODY);
    }
    match command.output() {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
            assert!(text.contains("1 passed"), "no such test: {text}");
            for line in text.lines().filter(|line| line.starts_with("skipped: ")) {
                println!("{line}");
            }
            true
        }
        Err(error) => {
            assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied, "{error}");
            false
        }
    }
}

/// A child with a copy of this process's memory that waits until it is dropped.
pub(crate) struct ForkedChild(i32);

impl ForkedChild {
    pub(crate) fn start() -> Self {
        // SAFETY: the child makes system calls only.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            // SAFETY: makes the child end with its parent, and waits for that or a signal.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
                loop {
                    libc::pause();
                }
            }
        }
        assert!(pid > 0);
        Self(pid)
    }

    pub(crate) fn pid(&self) -> crate::units::Pid {
        crate::units::Pid(self.0)
    }
}

impl Drop for ForkedChild {
    fn drop(&mut self) {
        // SAFETY: the number is our child's, which nobody else waits for.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, std::ptr::null_mut(), 0);
        }
    }
}
