//! A process that does with its memory what it is told.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use kernel::ksm_sysfs::ksm_stat;
use kernel::{KsmStat, Launch, PageCount, Pid, Range, Vaddr, page_size};

/// madvise's, in numbers.
pub(crate) const DONTNEED: u32 = 4;
pub(crate) const MERGEABLE: u32 = 12;
pub(crate) const UNMERGEABLE: u32 = 13;
pub(crate) const HUGEPAGE: u32 = 14;

const SCRIPT: &str = r"
import ctypes, os, platform, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
PAGE = os.sysconf('SC_PAGESIZE')
SYS = {'x86_64': {'userfaultfd': 323, 'set_mempolicy': 238}, 'aarch64': {'userfaultfd': 282, 'set_mempolicy': 237}}
SYS = SYS.get(platform.machine(), {})

def done(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result

def anonymous(pages):
    at = libc.mmap(None, pages * PAGE, 3, 0x22, -1, 0)
    assert at not in (None, ctypes.c_void_p(-1).value)
    # No large pages, which are split first.
    libc.madvise(at, pages * PAGE, 15)
    return at

def fresh(pages, byte):
    # What a child of fork or exec does: memory of its own, said of itself on the parent's stdout.
    at = anonymous(pages)
    ctypes.memset(at, byte, pages * PAGE)
    print(os.getpid(), hex(at), libc.prctl(68, 0, 0, 0, 0), flush=True)
    while True:
        signal.pause()

if len(sys.argv) > 1:
    fresh(int(sys.argv[1]), int(sys.argv[2]))

for line in sys.stdin:
    word, *args = line.split()
    numbers = [int(arg, 0) for arg in args]
    answer = ''
    if word == 'map':
        answer = hex(anonymous(numbers[0]))
    elif word == 'fill':
        at, pages, byte = numbers
        ctypes.memset(at, byte, pages * PAGE)
    elif word == 'pairs':
        at, pages = numbers
        for page in range(pages):
            ctypes.memset(at + page * PAGE, 0x5a, PAGE)
            ctypes.memmove(at + page * PAGE, b'%16d' % (page // 2), 16)
    elif word == 'touch':
        at, pages, byte = numbers
        for page in range(pages):
            ctypes.memset(at + page * PAGE, byte, 1)
    elif word == 'byte':
        at, byte = numbers
        ctypes.memset(at, byte, 1)
    elif word == 'check':
        at, pages, byte, last = numbers
        text = bytes([byte]) * (pages * PAGE - 1) + bytes([last])
        answer = int(ctypes.string_at(at, pages * PAGE) == text)
    elif word == 'advise':
        at, pages, advice = numbers
        done(libc.madvise(at, pages * PAGE, advice))
    elif word == 'protect':
        at, pages, rights = numbers
        done(libc.mprotect(at, pages * PAGE, rights))
    elif word == 'lock':
        at, pages = numbers
        done(libc.mlock(at, pages * PAGE))
    elif word == 'prctl':
        done(libc.prctl(67, numbers[0], 0, 0, 0))
        answer = libc.prctl(68, 0, 0, 0, 0)
    elif word == 'bind':
        mask = ctypes.c_ulong(1 << numbers[0])
        done(libc.syscall(SYS['set_mempolicy'], 2, ctypes.byref(mask), 64))
    elif word == 'userfaultfd':
        answer = done(libc.syscall(SYS['userfaultfd'], 0o2000000 | 0o4000))
    elif word in ('fork', 'exec'):
        if os.fork() == 0:
            if word == 'exec':
                os.execv(sys.executable, [sys.executable, '-c', os.environ['SCRIPT']] + args)
            fresh(*numbers)
        continue
    elif word == 'forked':
        pid = os.fork()
        if pid == 0:
            while True:
                signal.pause()
        answer = pid
    elif word == 'crash':
        pid = os.fork()
        if pid == 0:
            at = anonymous(numbers[0])
            ctypes.memset(at, 7, numbers[0] * PAGE)
            libc.madvise(at, numbers[0] * PAGE, 12)
            ctypes.string_at(0)
        answer = os.waitpid(pid, 0)[1] & 127
    print(answer, flush=True)
";

/// The process.
pub(crate) struct Worker {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    /// Children of its own, killed with it.
    children: Vec<Pid>,
}

/// Memory of a worker.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory {
    pub(crate) start: u64,
    pub(crate) pages: u64,
}

impl Memory {
    pub(crate) fn range(self) -> Range {
        Range::from_pages(Vaddr(self.start), PageCount(self.pages)).unwrap()
    }

    /// A part of it, in pages.
    pub(crate) fn part(self, first: u64, pages: u64) -> Self {
        assert!(first + pages <= self.pages);
        Self { start: self.start + first * page_size(), pages }
    }
}

impl Worker {
    pub(crate) fn new() -> Self {
        Self::with_merging(false)
    }

    /// One that was started with merging of all its memory, as `pagefold run --backend ksm` starts a command.
    pub(crate) fn with_merging(on: bool) -> Self {
        let mut command = Command::new("python3");
        // A core of a child that crashes is of no use.
        command.args(["-c", SCRIPT]).env("SCRIPT", SCRIPT).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut launch = Launch::new(command);
        launch.memory_merge(on);
        let mut child = launch.spawn().unwrap().child;
        let (to, from) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, to, from, children: Vec::new() }
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid(self.child.id().cast_signed())
    }

    pub(crate) fn ask(&mut self, what: &str) -> String {
        writeln!(self.to, "{what}").unwrap();
        let mut line = String::new();
        self.from.read_line(&mut line).unwrap();
        assert!(line.ends_with('\n'), "{what}: the worker has ended");
        line.trim().to_owned()
    }

    /// Memory, filled and, if wanted, marked with madvise.
    pub(crate) fn map(&mut self, pages: u64, byte: u8, marked: bool) -> Memory {
        let start = hexadecimal(&self.ask(&format!("map {pages}")));
        let memory = Memory { start, pages };
        self.fill(memory, byte);
        if marked {
            self.advise(memory, MERGEABLE);
        }
        memory
    }

    pub(crate) fn fill(&mut self, memory: Memory, byte: u8) {
        self.ask(&format!("fill {} {} {byte}", memory.start, memory.pages));
    }

    /// Writes the first byte of each page.
    pub(crate) fn touch(&mut self, memory: Memory, byte: u8) {
        self.ask(&format!("touch {} {} {byte}", memory.start, memory.pages));
    }

    pub(crate) fn advise(&mut self, memory: Memory, advice: u32) {
        self.ask(&format!("advise {} {} {advice}", memory.start, memory.pages));
    }

    /// Whether all bytes are `byte`, and the last one `last`.
    pub(crate) fn check(&mut self, memory: Memory, byte: u8, last: u8) -> bool {
        self.ask(&format!("check {} {} {byte} {last}", memory.start, memory.pages)) == "1"
    }

    pub(crate) fn stat(&self) -> KsmStat {
        ksm_stat(self.pid()).unwrap()
    }

    /// A child that maps and fills memory of its own, by `fork` or by `exec` after it; with what it says of the prctl.
    pub(crate) fn child(&mut self, how: &str, pages: u64, byte: u8) -> (Pid, Memory, bool) {
        let said = self.ask(&format!("{how} {pages} {byte}"));
        let mut words = said.split(' ');
        let pid = Pid(words.next().unwrap().parse().unwrap());
        self.children.push(pid);
        (pid, Memory { start: hexadecimal(words.next().unwrap()), pages }, words.next() == Some("1"))
    }

    /// A child that is its copy and does nothing.
    pub(crate) fn forked(&mut self) -> Pid {
        let pid = Pid(self.ask("forked").parse().unwrap());
        self.children.push(pid);
        pid
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        for child in &self.children {
            let _ = rustix::process::Pid::from_raw(child.get())
                .map(|pid| rustix::process::kill_process(pid, rustix::process::Signal::KILL));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn hexadecimal(text: &str) -> u64 {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap()
}
