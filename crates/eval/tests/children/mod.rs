//! Children of a test whose memory holds what the test says.
#![allow(dead_code, reason = "each test file uses a part")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use kernel::{PageCount, Pid, Range, Vaddr};

/// Where all children have their pages.
const PLACE: u64 = 0x2000_0000_0000;

const CONTENTS: &str = "PAGEFOLD_TEST_CONTENTS";
const MODE: &str = "PAGEFOLD_TEST_MODE";

/// A child, ended when this value goes.
pub(crate) struct Holder {
    child: Child,
    stdin: Option<ChildStdin>,
    /// A child of the child, if it has one.
    pub(crate) grandchild: Option<Pid>,
}

/// What a child does beside holding its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Rest,
    /// Writes new contents to every second page, ten times a second.
    Rewrite,
    /// Forks, and both rest.
    Fork,
    /// Asks for huge pages first.
    Huge,
    /// Gives every second page back.
    Holes,
    /// Huge pages of which some small ones are given back, and then a fork whose child is gone.
    Torn,
    /// Marks its pages mergeable.
    Mergeable,
}

/// Starts a child that holds one page for each number, of the content of that number; 0 is zeros.
pub(crate) fn hold(contents: &[u32], mode: Mode) -> Holder {
    let words: Vec<String> = contents.iter().map(u32::to_string).collect();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["child", "--exact", "--ignored", "--nocapture"])
        .env(CONTENTS, words.join(","))
        .env(MODE, format!("{mode:?}"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let ready = lines.find_map(|line| line.unwrap().strip_prefix("ready ").map(str::to_owned)).unwrap();
    let grandchild = ready.parse().ok().filter(|pid| *pid != 0).map(Pid);
    // Whoever prints to a closed pipe would end.
    std::thread::spawn(move || lines.for_each(drop));
    Holder { stdin: child.stdin.take(), child, grandchild }
}

impl Holder {
    pub(crate) fn pid(&self) -> Pid {
        Pid(self.child.id().cast_signed())
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.stdin.take());
        if let Some(pid) = self.grandchild {
            let pid = rustix::process::Pid::from_raw(pid.get()).unwrap();
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Where a child has `pages` pages.
pub(crate) fn place(pages: usize) -> Range {
    Range::from_pages(Vaddr(PLACE), PageCount(pages as u64)).unwrap()
}

/// The content of a number.
pub(crate) fn content(number: u32) -> Vec<u8> {
    if number == 0 {
        return vec![0; kernel::page_size() as usize];
    }
    let words = kernel::page_size() as u32 / 4;
    (0..words)
        .flat_map(|at: u32| (at ^ 0x9e37).wrapping_mul(number).wrapping_mul(2_654_435_761).to_le_bytes())
        .collect()
}

/// What the child runs: called by the ignored test `child` of each file.
pub(crate) fn child_main() {
    let Ok(contents) = std::env::var(CONTENTS) else { return };
    let mode = std::env::var(MODE).unwrap();
    let numbers: Vec<u32> = contents.split(',').map(|word| word.parse().unwrap()).collect();
    let size = kernel::page_size() as usize;
    let flags = rustix::mm::MapFlags::PRIVATE | rustix::mm::MapFlags::FIXED_NOREPLACE;
    let protection = rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE;
    let length = numbers.len() * size;
    let at = std::ptr::with_exposed_provenance_mut(PLACE as usize);
    // SAFETY: takes only what is free.
    let memory = unsafe { rustix::mm::mmap_anonymous(at, length, protection, flags) }.unwrap();
    let advise = |advice| {
        // SAFETY: the mapping just made; these advices change no content.
        unsafe { rustix::mm::madvise(memory, length, advice) }.unwrap();
    };
    match mode.as_str() {
        "Huge" | "Torn" => advise(rustix::mm::Advice::LinuxHugepage),
        "Mergeable" => {
            advise(rustix::mm::Advice::LinuxNoHugepage);
            advise(rustix::mm::Advice::LinuxMergeable);
        }
        _ => advise(rustix::mm::Advice::LinuxNoHugepage),
    }
    let write = |page: usize, number: u32| {
        let bytes = content(number);
        // SAFETY: inside the mapping just made, which only this thread writes.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), memory.cast::<u8>().add(page * size), size) };
    };
    for (page, number) in numbers.iter().enumerate() {
        write(page, *number);
    }
    if mode == "Torn" {
        for page in (7..numbers.len()).step_by(512) {
            // SAFETY: a page of the mapping just made, which nobody refers to.
            let torn = unsafe { memory.cast::<u8>().add(page * size) };
            // SAFETY: as above.
            unsafe { rustix::mm::madvise(torn.cast(), size, rustix::mm::Advice::LinuxDontNeed) }.unwrap();
        }
        // A child that is gone again: what it shared is this process's alone, and not marked so.
        Command::new("true").status().unwrap();
        // SAFETY: the child ends at once.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: nothing else is to be done.
            unsafe { libc::_exit(0) };
        }
        // SAFETY: takes no pointer but null.
        unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
    }
    if mode == "Holes" {
        for page in (1..numbers.len()).step_by(2) {
            // SAFETY: a page of the mapping just made, which nobody refers to.
            let hole = unsafe { memory.cast::<u8>().add(page * size) };
            // SAFETY: as above.
            unsafe { rustix::mm::madvise(hole.cast(), size, rustix::mm::Advice::LinuxDontNeed) }.unwrap();
        }
    }
    let mut grandchild = 0;
    if mode == "Fork" {
        // SAFETY: the child does nothing but sleep.
        grandchild = unsafe { libc::fork() };
        if grandchild == 0 {
            loop {
                std::thread::sleep(Duration::from_secs(60));
            }
        }
    }
    println!("\nready {grandchild}");
    std::io::stdout().flush().unwrap();
    if mode == "Rewrite" {
        std::thread::spawn(|| {
            // Until the test is over.
            let _ = std::io::stdin().lines().count();
            std::process::exit(0);
        });
        for round in 1.. {
            for page in (0..numbers.len()).step_by(2) {
                write(page, numbers[page].wrapping_add(round * 1_000_003));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    let _ = std::io::stdin().lines().count();
}
