//! What an owner does with its memory.

use std::fs::File;
use std::os::fd::{AsRawFd as _, FromRawFd as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use crate::arena::{Arena, COMMON, PAGE, ZERO, content};
use crate::ring::Ring;
use crate::{COUNTS, Dice, OVER, fail};

const PAGES: usize = 384;

struct Owner {
    arena: Arena,
    /// Grows, shrinks and moves.
    mover: Arena,
    /// Comes and goes.
    guests: Vec<Arena>,
    dice: Dice,
    direct: Option<File>,
    buffered: File,
    mount: Option<File>,
    ring: Option<Ring>,
    pipe: [File; 2],
}

/// A file with the common contents, page after page.
pub(crate) fn content_file(path: &Path) -> PathBuf {
    let bytes: Vec<u8> = (0..COMMON).flat_map(content).collect();
    std::fs::write(path, bytes).unwrap();
    path.to_owned()
}

pub(crate) fn run(seed: u64, beat: &AtomicU64, file: &Path, mount: Option<&str>) {
    let mut ends = [0; 2];
    // SAFETY: the kernel writes two numbers, which are owned from here on.
    let pipe = unsafe {
        assert_eq!(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC), 0);
        ends.map(|end| File::from_raw_fd(end))
    };
    let mut owner = Owner {
        arena: Arena::new(PAGES + 1),
        mover: Arena::new(17),
        guests: Vec::new(),
        dice: Dice::new(seed),
        direct: std::fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(file).ok(),
        buffered: File::open(file).unwrap(),
        mount: mount.and_then(|mount| File::open(Path::new(mount).join("content")).ok()),
        ring: Ring::new(),
        pipe,
    };
    for page in 0..PAGES {
        let id = owner.dice.id();
        owner.arena.write(page, id);
    }
    while !OVER.load(SeqCst) {
        for _ in 0..owner.dice.below(24) {
            owner.step();
            COUNTS.operations.fetch_add(1, SeqCst);
            beat.fetch_add(1, SeqCst);
        }
        // Long enough, now and then, for memory to settle and be merged.
        let pause = if owner.dice.below(8) == 0 { 250 } else { 12 };
        std::thread::sleep(Duration::from_millis(owner.dice.below(pause)));
        beat.fetch_add(1, SeqCst);
    }
    owner.arena.check_all("at the end");
    owner.mover.check_all("at the end");
    owner.guests.iter().for_each(|guest| guest.check_all("at the end"));
}

/// The same for all threads of the program.
fn calm() -> bool {
    static BEGUN: OnceLock<Instant> = OnceLock::new();
    BEGUN.get_or_init(Instant::now).elapsed().as_secs() % 4 < 2
}

impl Owner {
    fn page(&mut self) -> usize {
        self.dice.below(PAGES as u64) as usize
    }

    fn run_of(&mut self) -> (usize, usize) {
        let from = self.page();
        (from, (from + 1 + self.dice.below(32) as usize).min(PAGES))
    }

    fn step(&mut self) {
        let what = self.dice.below(40);
        // Every other while the layout stays as it is, for memory to be merged in it.
        let changes_layout = (21..=27).contains(&what) || what >= 38;
        match if changes_layout && calm() { 0 } else { what } {
            0..=13 => {
                let page = self.page();
                self.arena.check(page, "looked at");
            }
            14..=20 => {
                let (page, id) = (self.page(), self.dice.id());
                self.arena.write(page, id);
            }
            21 => {
                let (from, to) = self.run_of();
                if self.arena.advise(from, to, libc::MADV_DONTNEED) {
                    self.arena.expected[from..to].fill(ZERO);
                }
                (from..to).for_each(|page| self.arena.check(page, "after DONTNEED"));
            }
            22 => {
                let (from, to) = self.run_of();
                self.arena.map_anew(from, to);
                self.arena.check(from, "in fresh memory");
            }
            23 => {
                let (from, to) = self.run_of();
                self.arena.protect(from, to, libc::PROT_READ);
                self.arena.check(from, "while read-only");
                self.arena.protect(from, to, libc::PROT_READ | libc::PROT_WRITE);
                self.arena.check(from, "writable again");
            }
            24 | 25 => self.move_it(),
            26 | 27 => self.guests(),
            28 => self.fork(),
            29..=31 => self.direct_read(),
            32 | 33 => self.ring_read(),
            34 | 35 => self.through_pipe(),
            36 => self.splice(),
            37 => self.fuse_read(),
            38 => {
                let (from, to) = self.run_of();
                self.arena.advise(from, to, if self.dice.below(2) == 0 { libc::MADV_COLD } else { libc::MADV_PAGEOUT });
                self.arena.check(from, "after COLD or PAGEOUT");
            }
            _ => {
                let (from, to) = self.run_of();
                if self.arena.advise(from, to, libc::MADV_UNMERGEABLE) {
                    (from..to).for_each(|page| self.arena.check(page, "after UNMERGEABLE"));
                } else {
                    COUNTS.refused.fetch_add(1, SeqCst);
                }
                self.arena.hand_over();
            }
        }
    }

    fn move_it(&mut self) {
        let old = self.mover.pages();
        let new = 8 + self.dice.below(40) as usize;
        // SAFETY: the owner's own mapping.
        let moved = unsafe { libc::mremap(self.mover.page(0).cast(), old * PAGE, new * PAGE, libc::MREMAP_MAYMOVE) };
        if moved == libc::MAP_FAILED {
            COUNTS.refused.fetch_add(1, SeqCst);
        } else {
            self.mover.moved_to(moved.cast(), new);
            COUNTS.remaps.fetch_add(1, SeqCst);
        }
        self.mover.check_all("after mremap");
        let (page, id) = (self.dice.below(self.mover.pages() as u64) as usize, self.dice.id());
        self.mover.write(page, id);
        self.mover.hand_over();
    }

    fn guests(&mut self) {
        if self.guests.len() < 4 {
            let mut guest = Arena::new(2 + self.dice.below(30) as usize);
            for page in 0..guest.pages() {
                guest.check(page, "in new memory");
                guest.write(page, self.dice.id());
            }
            self.guests.push(guest);
        } else {
            let guest = self.guests.swap_remove(self.dice.below(4) as usize);
            guest.check_all("before it goes");
        }
    }

    fn fork(&mut self) {
        // SAFETY: the child checks its copy, writes to it and ends without unwinding.
        unsafe {
            let child = libc::fork();
            if child == 0 {
                self.arena.check_all("in a child");
                for page in (0..PAGES).step_by(7) {
                    self.arena.write(page, 5);
                }
                self.arena.check_all("written in a child");
                libc::_exit(0);
            }
            if child > 0 {
                let page = self.page();
                let id = self.dice.id();
                self.arena.write(page, id);
                let mut status = 0;
                while libc::waitpid(child, &raw mut status, 0) < 0 {}
                if status != 0 {
                    fail(&format!("a child ended with {status:#x}"));
                }
                COUNTS.forks.fetch_add(1, SeqCst);
            }
        }
    }

    /// The kernel writes a page on our behalf; what it wrote must be there.
    fn kernel_wrote(&mut self, page: usize, id: u64, got: isize, how: &str, count: &AtomicU64) {
        if got != PAGE as isize {
            fail(&format!("{how}: {got}, {}", std::io::Error::last_os_error()));
        }
        self.arena.expected[page] = id;
        self.arena.check(page, how);
        count.fetch_add(1, SeqCst);
    }

    fn direct_read(&mut self) {
        let (page, id) = (self.page(), self.dice.below(COMMON));
        let Some(direct) = &self.direct else { return };
        let (fd, to) = (direct.as_raw_fd(), self.arena.page(page));
        // SAFETY: the page is this owner's.
        let got = unsafe { libc::pread(fd, to.cast(), PAGE, (id as usize * PAGE) as i64) };
        self.kernel_wrote(page, id, got, "O_DIRECT", &COUNTS.direct_reads);
    }

    fn ring_read(&mut self) {
        let (page, id) = (self.page(), self.dice.below(COMMON));
        let fd = match (&self.direct, self.dice.below(2)) {
            (Some(direct), 0) => direct.as_raw_fd(),
            _ => self.buffered.as_raw_fd(),
        };
        let Some(ring) = &self.ring else { return };
        let got = ring.read(fd, self.arena.page(page), PAGE, id * PAGE as u64);
        self.kernel_wrote(page, id, got as isize, "io_uring", &COUNTS.ring_reads);
    }

    fn through_pipe(&mut self) {
        let (from, to) = (self.page(), self.page());
        // SAFETY: both pages are this owner's, and a pipe has room for a page.
        let got = unsafe {
            let wrote = libc::write(self.pipe[1].as_raw_fd(), self.arena.page(from).cast(), PAGE);
            assert_eq!(wrote, PAGE as isize);
            libc::read(self.pipe[0].as_raw_fd(), self.arena.page(to).cast(), PAGE)
        };
        let id = self.arena.expected[from];
        self.kernel_wrote(to, id, got, "a pipe", &COUNTS.pipe_pages);
    }

    fn splice(&mut self) {
        let page = self.page();
        let part = libc::iovec { iov_base: self.arena.page(page).cast(), iov_len: PAGE };
        let mut out = vec![0_u8; PAGE];
        // SAFETY: the page is this owner's and stays as it is until it is read from the pipe.
        let got = unsafe {
            assert_eq!(libc::vmsplice(self.pipe[1].as_raw_fd(), &raw const part, 1, 0), PAGE as isize);
            std::thread::sleep(Duration::from_millis(self.dice.below(3)));
            libc::read(self.pipe[0].as_raw_fd(), out.as_mut_ptr().cast(), PAGE)
        };
        if got != PAGE as isize || out != content(self.arena.expected[page]) {
            fail("vmsplice");
        }
        COUNTS.pipe_pages.fetch_add(1, SeqCst);
    }

    fn fuse_read(&mut self) {
        let (page, id) = (self.page(), self.dice.below(COMMON));
        let Some(mount) = &self.mount else { return };
        let (fd, to) = (mount.as_raw_fd(), self.arena.page(page));
        // SAFETY: the page is this owner's.
        let got = unsafe { libc::pread(fd, to.cast(), PAGE, (id as usize * PAGE) as i64) };
        self.kernel_wrote(page, id, got, "FUSE", &COUNTS.fuse_reads);
    }
}
