//! Processes and memory for the tests.
#![allow(dead_code, reason = "each test file uses its part")]

use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};

use kernel::{Launch, Pid, Pidfd};
use pagefold::{Partition, Range, Vaddr, page_size, whole_pages};

/// Says why a test that needs live merging cannot run.
pub(crate) fn live_here() -> bool {
    match kernel::Features::probe().live_merge() {
        Ok(()) => true,
        Err(missing) => {
            println!("skipped: {missing}");
            false
        }
    }
}

const NUMBER: &str = "PAGEFOLD_TEST_FD";

/// Runs an ignored test of this binary in a process of its own, which must succeed.
pub(crate) fn in_child(body: &str) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args([body, "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .output()
        .unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{text}");
    assert!(text.contains("1 passed"), "{text}");
    print!("{text}");
}

/// The same as nobody, with a copy of this binary that everybody may execute.
pub(crate) fn in_child_as_nobody(body: &str) {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;
    let copy = std::env::temp_dir().join(format!("pagefold-test-{}-{body}", std::process::id()));
    testing::copy_program(std::env::current_exe().unwrap(), &copy);
    std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o755)).unwrap();
    let output = Command::new(&copy)
        .args([body, "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .current_dir("/")
        .uid(65534)
        .gid(65534)
        .output();
    std::fs::remove_file(&copy).unwrap();
    let output = output.unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

/// Gives pages back with MADV_DONTNEED, through the C library.
pub(crate) fn forget(memory: &Memory, page: u64, count: u64) {
    unsafe extern "C" {
        fn madvise(start: *mut std::ffi::c_void, length: usize, advice: i32) -> i32;
    }
    let start = (memory.range.start().get() + page * page_size()) as usize as *mut std::ffi::c_void;
    // SAFETY: whole pages of this process's own memory, in which nothing but bytes lies.
    assert_eq!(unsafe { madvise(start, (count * page_size()) as usize, 4) }, 0);
}

/// Another process of this binary, with the partition's descriptor.
pub(crate) struct Child {
    launched: kernel::Launched,
}

impl Child {
    pub(crate) fn wait(self) -> String {
        let output = self.launched.child.wait_with_output().unwrap();
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{text}");
        text
    }

    pub(crate) fn pid(&self) -> Pid {
        self.launched.pid()
    }

    pub(crate) fn process(&mut self) -> &mut std::process::Child {
        &mut self.launched.child
    }
}

pub(crate) fn child(body: &str, partition: &Partition) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([body, "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut launch = Launch::new(command);
    let number = launch.inherit(partition.try_clone_fd().unwrap());
    launch.command().env(NUMBER, number.to_string());
    Child { launched: launch.spawn().unwrap() }
}

/// The number behind a word in a child's output.
pub(crate) fn number(text: &str, word: &str) -> u64 {
    let rest = text.split(word).nth(1).unwrap_or_else(|| panic!("no {word:?} in {text}"));
    rest.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap()
}

/// The partition that this process inherited.
pub(crate) fn inherited() -> Option<Partition> {
    let number = std::env::var(NUMBER).ok()?.parse().unwrap();
    let fd: OwnedFd = Pidfd::open(Pid::this()).unwrap().getfd(number).unwrap();
    Some(Partition::from_fd(fd).unwrap())
}

/// Page-aligned memory of its own mapping.
pub(crate) struct Memory {
    bytes: Vec<u8>,
    range: Range,
}

impl Memory {
    /// Every page different from every other, the same for the same `kind`.
    pub(crate) fn filled(pages: u64, kind: u64) -> Self {
        let bytes = vec![0_u8; ((pages + 1) * page_size()) as usize];
        let whole = whole_pages(&bytes).unwrap();
        let range = Range::from_pages(whole.start(), kernel::PageCount(pages)).unwrap();
        let mut memory = Self { bytes, range };
        for page in 0..pages {
            memory.fill(page, kind << 32 | page);
        }
        memory
    }

    pub(crate) fn range(&self) -> Range {
        self.range
    }

    fn offset(&self) -> usize {
        (self.range.start().get() - self.bytes.as_ptr() as u64) as usize
    }

    pub(crate) fn page(&self, page: u64) -> &[u8] {
        let start = self.offset() + (page * page_size()) as usize;
        &self.bytes[start..start + page_size() as usize]
    }

    pub(crate) fn page_mut(&mut self, page: u64) -> &mut [u8] {
        let start = self.offset() + (page * page_size()) as usize;
        &mut self.bytes[start..start + page_size() as usize]
    }

    pub(crate) fn fill(&mut self, page: u64, seed: u64) {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        for word in self.page_mut(page).chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
    }

    pub(crate) fn digest(&self) -> u64 {
        let start = self.offset();
        let len = self.range.len().get() as usize;
        self.bytes[start..start + len]
            .iter()
            .fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
    }

    pub(crate) fn write_all(&mut self) {
        for page in 0..self.range.pages().get() {
            self.page_mut(page)[0] ^= 0xff;
        }
        for page in 0..self.range.pages().get() {
            self.page_mut(page)[0] ^= 0xff;
        }
        self.page_mut(0)[0] ^= 1;
    }

    /// Mappings of the store in the range.
    pub(crate) fn store_mappings(&self) -> usize {
        let maps = kernel::maps::read(Pid::this()).unwrap();
        maps.iter()
            .filter(|vma| vma.inode != 0 && vma.range.intersect(&self.range).is_some_and(|p| !p.is_empty()))
            .count()
    }

    /// Pages that the kernel shows as the store's.
    pub(crate) fn pages_in_store(&self) -> u64 {
        let pagemap = kernel::Pagemap::open(Pid::this()).unwrap();
        let mut entries = vec![kernel::PagemapEntry(0); self.range.pages().get() as usize];
        pagemap.entries(self.range.start(), &mut entries).unwrap();
        let maps = kernel::maps::read(Pid::this()).unwrap();
        (0..entries.len())
            .filter(|index| {
                let at = Vaddr(self.range.start().get() + *index as u64 * page_size());
                let store = maps.iter().any(|vma| vma.range.contains(at) && vma.inode != 0);
                store && (entries[*index].file_or_shared() || !entries[*index].present())
            })
            .count() as u64
    }
}

/// A child made by fork that is still at work.
pub(crate) struct Forked {
    pid: i32,
    reader: std::io::PipeReader,
}

impl Forked {
    /// Waits for its end; what its body returned.
    pub(crate) fn wait(mut self) -> Result<(), String> {
        use std::io::Read;
        unsafe extern "C" {
            fn waitpid(pid: i32, status: *mut i32, options: i32) -> i32;
        }
        let mut text = String::new();
        self.reader.read_to_string(&mut text).unwrap();
        let mut status = 0;
        // SAFETY: the status is written to a word of this frame.
        assert_eq!(unsafe { waitpid(self.pid, &mut status, 0) }, self.pid);
        if text.is_empty() && status == 0 { Ok(()) } else { Err(format!("status {status}: {text}")) }
    }
}

/// Runs something in a forked child, and goes on meanwhile.
pub(crate) fn fork_and_go_on(body: impl FnOnce() -> Result<(), String>) -> Forked {
    use std::io::Write;
    unsafe extern "C" {
        fn fork() -> i32;
        fn _exit(code: i32) -> !;
    }
    let (reader, mut writer) = std::io::pipe().unwrap();
    // SAFETY: the child runs `body` and ends; glibc's allocator works in a child of a process with threads.
    let pid = unsafe { fork() };
    if pid == 0 {
        if let Err(text) = body() {
            let _ = writer.write_all(text.as_bytes());
        }
        // SAFETY: ends the child without running what the parent has registered.
        unsafe { _exit(0) }
    }
    Forked { pid, reader }
}

/// Runs something in a forked child, to its end. What came of it.
pub(crate) fn fork(body: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
    fork_and_go_on(body).wait()
}
