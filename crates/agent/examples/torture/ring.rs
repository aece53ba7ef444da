//! Just enough of io_uring to read into a page, by system calls that no gate sees (linux/io_uring.h).

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU32, Ordering};

const ENTRIES: u32 = 4;
const SETUP: u64 = 425;
const ENTER: u64 = 426;
const OP_READ: u8 = 22;

/// A ring with room for one request at a time.
pub(crate) struct Ring {
    fd: RawFd,
    submissions: *mut u8,
    completions: *mut u8,
    entries: *mut u8,
    /// `struct io_uring_params`, as words.
    params: [u32; 30],
}

fn call(number: u64, a: u64, b: u64, c: u64, d: u64) -> i64 {
    let result: i64;
    // SAFETY: the two calls read and write what their callers own.
    unsafe {
        std::arch::asm!("syscall", inlateout("rax") number as i64 => result, in("rdi") a, in("rsi") b, in("rdx") c,
            in("r10") d, in("r8") 0, in("r9") 0, lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}

impl Ring {
    /// `None` where it is not to be had.
    pub(crate) fn new() -> Option<Self> {
        let mut params = [0_u32; 30];
        let fd = call(SETUP, ENTRIES.into(), params.as_mut_ptr() as u64, 0, 0);
        if fd < 0 {
            return None;
        }
        let fd = fd as RawFd;
        let map = |offset: i64| {
            let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_POPULATE);
            // SAFETY: a fresh mapping of the ring.
            let start = unsafe { libc::mmap(std::ptr::null_mut(), 4096, prot, flags, fd, offset) };
            (start != libc::MAP_FAILED).then_some(start.cast::<u8>())
        };
        Some(Self { fd, submissions: map(0)?, completions: map(0x800_0000)?, entries: map(0x1000_0000)?, params })
    }

    fn submission_word(&self, field: usize) -> &AtomicU32 {
        // SAFETY: the offsets come from the kernel; sq_off begins at word 10.
        unsafe { &*self.submissions.add(self.params[10 + field] as usize).cast() }
    }

    fn completion_word(&self, field: usize) -> &AtomicU32 {
        // SAFETY: as above; cq_off begins at word 20.
        unsafe { &*self.completions.add(self.params[20 + field] as usize).cast() }
    }

    /// Reads from a file into memory; the bytes read, or an error number below 0.
    pub(crate) fn read(&self, file: RawFd, into: *mut u8, len: usize, offset: u64) -> i32 {
        let tail = self.submission_word(1).load(Ordering::Acquire);
        let slot = tail & self.submission_word(2).load(Ordering::Acquire);
        // SAFETY: entry `slot` is free: there is never more than one request.
        unsafe {
            let entry = self.entries.add(slot as usize * 64);
            entry.write_bytes(0, 64);
            entry.write(OP_READ);
            entry.add(4).cast::<i32>().write(file);
            entry.add(8).cast::<u64>().write(offset);
            entry.add(16).cast::<u64>().write(into as u64);
            entry.add(24).cast::<u32>().write(len as u32);
            // sq_off.array
            self.submissions.add(self.params[16] as usize).cast::<u32>().add(slot as usize).write(slot);
        }
        self.submission_word(1).store(tail + 1, Ordering::Release);
        const GET_EVENTS: u64 = 1;
        loop {
            let pending = u64::from(
                self.submission_word(1).load(Ordering::Acquire) - self.submission_word(0).load(Ordering::Acquire),
            );
            call(ENTER, self.fd as u64, pending, 1, GET_EVENTS);
            let head = self.completion_word(0).load(Ordering::Acquire);
            if head != self.completion_word(1).load(Ordering::Acquire) {
                let slot = head & self.completion_word(2).load(Ordering::Acquire);
                // SAFETY: cq_off.cqes is the sixth; the completion is there.
                let result = unsafe {
                    self.completions.add(self.params[25] as usize + slot as usize * 16 + 8).cast::<i32>().read()
                };
                self.completion_word(0).store(head + 1, Ordering::Release);
                return result;
            }
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: made by `new`.
        unsafe {
            for start in [self.submissions, self.completions, self.entries] {
                libc::munmap(start.cast(), 4096);
            }
            libc::close(self.fd);
        }
    }
}
