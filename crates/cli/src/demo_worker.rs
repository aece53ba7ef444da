//! A worker of the store part: loads files into memory of its own, goes on reading and writing, merges when it is told.
//!
//! It is this very binary, executed anew with the partition's descriptor. The parent speaks to it in lines.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use anyhow::Context as _;
use kernel::{Pid, Pidfd};
use pagefold::{Partition, whole_pages};
use serde::{Deserialize, Serialize};

/// Pages that a worker keeps writing and checking, beside the files that it only reads.
const OWN_PAGES: usize = 64;
/// Words read or written between two looks at whether somebody wants the memory for itself.
const CHUNK: usize = 1 << 16;

/// Eight workers on two processors are to leave room for the merge itself.
const READ_EVERY: Duration = Duration::from_millis(300);
const WRITE_EVERY: Duration = Duration::from_millis(20);

/// What a worker says of itself.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Digest {
    /// Bytes of files.
    pub(crate) bytes: u64,
    /// Over all of them.
    pub(crate) digest: u64,
    /// Times that another thread has read all of it and found this digest.
    pub(crate) reads: u64,
    /// Pages written and read back.
    pub(crate) writes: u64,
    /// Digests and values that were not what they should have been.
    pub(crate) wrong: u64,
}

/// The memory: files in front, the pages that are written behind.
struct Held {
    words: RwLock<Vec<AtomicU64>>,
    files: usize,
    digest: AtomicU64,
    reads: AtomicU64,
    writes: AtomicU64,
    wrong: AtomicU64,
    over: AtomicBool,
}

/// The worker's life.
pub(crate) fn worker_main(args: &[OsString]) -> anyhow::Result<ExitCode> {
    let number = args.first().and_then(|number| number.to_str()).and_then(|number| number.parse().ok());
    let number = number.context("this is for pagefold itself")?;
    let descriptor = Pidfd::open(Pid::this())?.getfd(number).context("there is no such descriptor")?;
    let partition = Partition::from_fd(descriptor)?;
    let mut lines = std::io::stdin().lines();
    let mut next = || lines.next().transpose().context("cannot hear the parent");
    let bytes: usize = next()?.context("no size")?.parse()?;
    let mut paths = Vec::new();
    while let Some(path) = next()?
        && !path.is_empty()
    {
        paths.push(path);
    }
    let held = load(&paths, bytes)?;
    say(&held.state())?;
    std::thread::scope(|scope| {
        scope.spawn(|| held.keep_reading());
        scope.spawn(|| held.keep_writing());
        let result = (|| {
            while let Some(word) = next()? {
                match word.as_str() {
                    "live" => {
                        let range = whole_pages(&held.words.read().unwrap_or_else(PoisonError::into_inner));
                        say(&partition.merge(range.context("nothing was loaded")?)?)?;
                    }
                    "quiescent" => {
                        let mut words = held.words.write().unwrap_or_else(PoisonError::into_inner);
                        say(&partition.merge_exclusive(&mut words)?)?;
                    }
                    _ => {
                        held.check();
                        say(&held.state())?;
                    }
                }
            }
            anyhow::Ok(())
        })();
        held.over.store(true, SeqCst);
        result
    })?;
    Ok(ExitCode::SUCCESS)
}

fn say(what: &impl Serialize) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(what)?).and_then(|()| out.flush()).context("the parent is gone")
}

/// Reads files one behind the other until there are enough bytes.
fn load(paths: &[String], bytes: usize) -> anyhow::Result<Held> {
    let page = usize::try_from(kernel::page_size()).context("a page is small")? / 8;
    let (files, own) = (bytes / 8 / page * page, OWN_PAGES * page);
    let mut words: Vec<AtomicU64> = Vec::with_capacity(files + own);
    let mut buffer = vec![0; 1 << 20];
    'files: for path in paths {
        let Ok(mut file) = File::open(path) else { continue };
        loop {
            let mut filled = 0;
            while filled < buffer.len()
                && let Ok(read) = file.read(&mut buffer[filled..])
                && read > 0
            {
                filled += read;
            }
            let (whole, rest) = buffer[..filled].as_chunks::<8>();
            words.extend(whole.iter().take(files - words.len()).map(|word| AtomicU64::new(u64::from_le_bytes(*word))));
            if words.len() == files {
                break 'files;
            }
            if !rest.is_empty() || filled < buffer.len() {
                // The next file begins on a page of its own.
                let end = words.len().next_multiple_of(page).min(files);
                words.resize_with(end, AtomicU64::default);
                break;
            }
        }
    }
    let files = words.len();
    words.resize_with(files + own, AtomicU64::default);
    let held = Held {
        words: RwLock::new(words),
        files,
        digest: AtomicU64::new(0),
        reads: AtomicU64::new(0),
        writes: AtomicU64::new(0),
        wrong: AtomicU64::new(0),
        over: AtomicBool::new(false),
    };
    held.digest.store(held.digest().context("nobody has asked to end")?, SeqCst);
    Ok(held)
}

impl Held {
    fn state(&self) -> Digest {
        Digest {
            bytes: (self.files * 8) as u64,
            digest: self.digest.load(SeqCst),
            reads: self.reads.load(SeqCst),
            writes: self.writes.load(SeqCst),
            wrong: self.wrong.load(SeqCst),
        }
    }

    /// A digest of all files; `None` if it is time to end.
    fn digest(&self) -> Option<u64> {
        let mut sum = 0xcbf2_9ce4_8422_2325_u64;
        for start in (0..self.files).step_by(CHUNK) {
            if self.over.load(Relaxed) {
                return None;
            }
            let words = self.words.read().unwrap_or_else(PoisonError::into_inner);
            for word in &words[start..self.files.min(start + CHUNK)] {
                sum = (sum.rotate_left(5) ^ word.load(Relaxed)).wrapping_mul(0x517c_c1b7_2722_0a95);
            }
        }
        Some(sum)
    }

    fn check(&self) {
        if self.digest().is_some_and(|digest| digest != self.digest.load(SeqCst)) {
            self.wrong.fetch_add(1, SeqCst);
        }
    }

    fn keep_reading(&self) {
        while !self.over.load(SeqCst) {
            self.check();
            self.reads.fetch_add(1, SeqCst);
            std::thread::sleep(READ_EVERY);
        }
    }

    /// Writes pages again and again and checks what was written before. For some rounds a page holds the same in all
    /// workers, so that it may be merged just when it is written.
    fn keep_writing(&self) {
        let mut round = 0_u64;
        while !self.over.load(SeqCst) {
            {
                let words = self.words.read().unwrap_or_else(PoisonError::into_inner);
                let own = &words[self.files..];
                for (index, word) in own.iter().enumerate() {
                    let expected = if round == 0 { 0 } else { value(round - 1, index) };
                    if word.swap(value(round, index), Relaxed) != expected {
                        self.wrong.fetch_add(1, SeqCst);
                    }
                }
                self.writes.fetch_add(OWN_PAGES as u64, SeqCst);
            }
            round += 1;
            std::thread::sleep(WRITE_EVERY);
        }
    }
}

fn value(round: u64, index: usize) -> u64 {
    (round / 8) << 32 | (index as u64 % 7)
}
