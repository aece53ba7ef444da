//! A process whose memory is merged: this binary once more, which does what it is told on its standard input.
//! Shared with the tests of the command.
#![allow(dead_code, reason = "not every test binary asks for everything")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;

use kernel::{OwnedMemory, PageCount, Pid, Range, Vaddr, page_size};

/// How an answer begins, since the test harness writes to standard output too.
const ANSWER: &str = "answer: ";

pub(crate) struct Target {
    child: Child,
    to: Option<ChildStdin>,
    from: BufReader<ChildStdout>,
}

impl Target {
    pub(crate) fn start() -> Self {
        Self::start_by(Command::new(std::env::current_exe().unwrap()))
    }

    /// By way of another command, whose last words will be this program and its arguments.
    pub(crate) fn start_by(mut command: Command) -> Self {
        command.args(["target::serve", "--exact", "--ignored", "--nocapture", "--test-threads=1"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (to, from) = (child.stdin.take(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, to, from }
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid(self.child.id().cast_signed())
    }

    pub(crate) fn tell(&mut self, order: &str) {
        writeln!(self.to.as_mut().unwrap(), "{order}").unwrap();
    }

    pub(crate) fn ask(&mut self, order: &str) -> String {
        self.tell(order);
        loop {
            let mut line = String::new();
            assert!(self.from.read_line(&mut line).unwrap() > 0, "the target has ended");
            // The harness does not end its line before a test prints.
            if let Some((_, answer)) = line.split_once(ANSWER) {
                return answer.trim().to_owned();
            }
        }
    }

    /// Holds `pages` pages of which each content occurs `copies` times, other contents than under another `seed`.
    pub(crate) fn hold(&mut self, pages: u64, copies: u64, seed: u64) -> Range {
        range(&self.ask(&format!("hold {pages} {copies} {seed}")))
    }

    /// The same in huge pages, as far as the kernel has some.
    pub(crate) fn hold_huge(&mut self, pages: u64, copies: u64, seed: u64) -> Range {
        range(&self.ask(&format!("huge {pages} {copies} {seed}")))
    }

    /// Words that are not what was written last. Ends writing.
    pub(crate) fn wrong_words(&mut self) -> u64 {
        self.ask("verify").parse().unwrap()
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.to = None;
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn range(text: &str) -> Range {
    let mut ends = text.split('-').map(|end| Vaddr(u64::from_str_radix(end, 16).unwrap()));
    Range::new(ends.next().unwrap(), ends.next().unwrap()).unwrap()
}

/// The words of a content.
fn words(content: u64) -> impl Iterator<Item = u64> {
    (0..page_size() / 8).scan(content.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, |state, _| {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        Some(*state)
    })
}

/// Memory, and what each page should hold.
struct Held {
    memory: OwnedMemory,
    contents: Vec<AtomicU64>,
}

impl Held {
    fn new(memory: OwnedMemory, contents: impl Iterator<Item = u64>) -> Self {
        let held = Self { memory, contents: contents.map(AtomicU64::new).collect() };
        for page in 0..held.contents.len() {
            held.write(page, held.contents[page].load(Relaxed));
        }
        held
    }

    fn page(&self, page: usize) -> &[AtomicU64] {
        let length = page_size() as usize / 8;
        &self.memory.words()[page * length..][..length]
    }

    fn write(&self, page: usize, content: u64) {
        self.page(page).iter().zip(words(content)).for_each(|(word, value)| word.store(value, Relaxed));
        self.contents[page].store(content, Relaxed);
    }

    fn wrong_words(&self) -> usize {
        let wrong = |page: usize| {
            let values = words(self.contents[page].load(Relaxed));
            self.page(page).iter().zip(values).filter(|(word, value)| word.load(Relaxed) != *value).count()
        };
        (0..self.contents.len()).map(wrong).sum()
    }
}

#[derive(Default)]
struct Server {
    held: Vec<Arc<Held>>,
    writers: Vec<JoinHandle<()>>,
    over: Arc<AtomicBool>,
}

impl Server {
    fn hold(&mut self, pages: u64, copies: u64, seed: u64, huge: bool) -> String {
        let memory = OwnedMemory::anonymous(PageCount(pages)).unwrap();
        if huge { memory.huge_pages() } else { memory.small_pages() }.unwrap();
        let distinct = pages / copies;
        let held = Held::new(memory, (0..pages).map(|page| (seed << 32) | (page % distinct)));
        let range = held.memory.range().to_string();
        self.held.push(Arc::new(held));
        range
    }

    /// Every `step`th of the pages of a memory is there, all alike.
    fn sparse(&mut self, pages: u64, step: u64) -> String {
        let memory = OwnedMemory::anonymous(PageCount(pages * step)).unwrap();
        memory.small_pages().unwrap();
        let each = (step * page_size() / 8) as usize;
        memory.words().iter().step_by(each).for_each(|word| word.store(7, Relaxed));
        let range = memory.range().to_string();
        self.held.push(Arc::new(Held { memory, contents: Vec::new() }));
        range
    }

    /// Pages that are there, and hold nothing.
    fn zeros(&mut self, pages: u64) -> String {
        let memory = OwnedMemory::anonymous(PageCount(pages)).unwrap();
        memory.small_pages().unwrap();
        let each = page_size() as usize / 8;
        memory.words().iter().step_by(each).for_each(|word| word.store(0, Relaxed));
        let range = memory.range().to_string();
        self.held.push(Arc::new(Held { memory, contents: Vec::new() }));
        range
    }

    /// Writes pages of the last memory at random until it is verified, each as a whole, with contents that come again.
    fn begin_to_write(&mut self, percent: usize) {
        let (held, over) = (self.held.last().unwrap().clone(), self.over.clone());
        self.writers.push(std::thread::spawn(move || {
            let mut random = 1_u64;
            while !over.load(Relaxed) {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let page = (random >> 33) as usize % (held.contents.len() * percent / 100).max(1);
                held.write(page, random >> 20 & 0xff);
                std::thread::sleep(std::time::Duration::from_micros(20));
            }
        }));
    }

    fn verify(&mut self) -> String {
        self.over.store(true, Relaxed);
        self.writers.drain(..).for_each(|writer| writer.join().unwrap());
        self.over.store(false, Relaxed);
        self.held.iter().map(|held| held.wrong_words()).sum::<usize>().to_string()
    }
}

#[test]
#[ignore = "the process that the other tests start"]
fn serve() {
    let mut server = Server::default();
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let mut parts = line.split(' ');
        let order = parts.next().unwrap();
        let numbers: Vec<u64> = parts.map(|part| part.parse().unwrap()).collect();
        let answer = match order {
            "hold" | "huge" => server.hold(numbers[0], numbers[1], numbers[2], order == "huge"),
            "write" => {
                server.begin_to_write(numbers[0] as usize);
                "writing".to_owned()
            }
            "drop" => {
                server.held.pop();
                "dropped".to_owned()
            }
            "verify" => server.verify(),
            "zeros" => server.zeros(numbers[0]),
            "sparse" => server.sparse(numbers[0], numbers[1]),
            "copy" => {
                let held = server.held.last().unwrap();
                held.write(numbers[1] as usize, held.contents[numbers[0] as usize].load(Relaxed));
                "copied".to_owned()
            }
            "huge_pages" => {
                let huge = kernel::smaps::rollup(Pid::this()).unwrap().anon_huge_pages;
                (huge.get() >> 21).to_string()
            }
            "exec" => panic!("{}", Command::new("sleep").arg("60").exec()),
            other => panic!("{other}?"),
        };
        println!("{ANSWER}{answer}");
    }
}
