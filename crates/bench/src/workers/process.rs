//! A worker: fills its memory, hands it over, writes to it and checks it, as it is told on its standard input.

use std::io::{BufRead as _, Write as _};
use std::process::ExitCode;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use kernel::{OwnedMemory, PageCount, page_size};
use serde::{Deserialize, Serialize};

use super::layout::{Layout, Random, words};
use super::touch::{Touched, touch};

/// `bench worker`: not for people.
#[derive(Args, Clone, Debug)]
pub struct WorkerCommand {
    #[command(flatten)]
    layout: Layout,
    /// Which of the workers this is.
    #[arg(long)]
    worker: u64,
}

/// What a worker is told, one line of JSON each. Each is answered by one line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Order {
    /// Hand the memory over for merging.
    HandOver,
    /// Compare every word with what it should be.
    Verify,
    /// Write the same word again to so many pages, and say how long each write took.
    Write {
        /// Most pages written.
        pages: u64,
    },
    /// Read and write random pages in two threads.
    Touch {
        /// For how long, in milliseconds.
        milliseconds: u64,
        /// Writes in a second; the writer rests in between.
        writes: u64,
    },
}

/// What a worker answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Answer {
    /// Done.
    Done,
    /// Words that were not what they should be.
    Wrong(u64),
    /// Nanoseconds of each write.
    Wrote(Vec<u64>),
    /// How long accesses took.
    Touched(Box<Touched>),
    /// It could not be done.
    Failed(String),
}

/// The memory of a worker and what belongs there.
pub(crate) struct Held {
    pub(crate) memory: OwnedMemory,
    contents: Vec<u64>,
    pub(crate) page_words: usize,
}

impl WorkerCommand {
    /// Runs until the standard input ends.
    ///
    /// # Errors
    /// When the memory cannot be had or the pipe breaks.
    pub fn run(&self) -> Result<ExitCode> {
        let held = Held::fill(self.layout.contents(self.worker))?;
        let mut out = std::io::stdout().lock();
        let mut answer = |answer: &Answer| -> Result<()> {
            serde_json::to_writer(&mut out, answer)?;
            out.write_all(b"\n")?;
            out.flush().context("the one who started this worker does not listen")
        };
        answer(&Answer::Done)?;
        for line in std::io::stdin().lock().lines() {
            let order: Order = serde_json::from_str(&line?)?;
            let done = held.execute(order).unwrap_or_else(|error| Answer::Failed(format!("{error:#}")));
            answer(&done)?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Held {
    fn fill(contents: Vec<u64>) -> Result<Self> {
        let memory = OwnedMemory::anonymous(PageCount(contents.len() as u64)).context("cannot map memory")?;
        // A kernel without huge pages refuses the advice and needs none.
        let _ = memory.small_pages();
        let page_words = usize::try_from(page_size() / 8)?;
        for (page, content) in memory.words().chunks(page_words).zip(&contents) {
            page.iter().zip(words(*content)).for_each(|(word, value)| word.store(value, Relaxed));
        }
        Ok(Self { memory, contents, page_words })
    }

    fn execute(&self, order: Order) -> Result<Answer> {
        Ok(match order {
            Order::HandOver => {
                self.memory.hand_over().context("madvise(MADV_MERGEABLE)")?;
                Answer::Done
            }
            Order::Verify => Answer::Wrong(self.wrong_words()),
            Order::Write { pages } => Answer::Wrote(self.write(pages)),
            Order::Touch { milliseconds, writes } => {
                if self.contents.len() < 2 {
                    bail!("there is nothing to touch");
                }
                Answer::Touched(Box::new(touch(self, Duration::from_millis(milliseconds), writes)))
            }
        })
    }

    fn wrong_words(&self) -> u64 {
        let pages = self.memory.words().chunks(self.page_words).zip(&self.contents);
        pages
            .map(|(page, content)| {
                page.iter().zip(words(*content)).filter(|(word, value)| word.load(Relaxed) != *value).count() as u64
            })
            .sum()
    }

    /// Pages that may be merged.
    pub(crate) fn pages(&self) -> u64 {
        self.contents.len() as u64 - 1
    }

    /// The first word of a page.
    pub(crate) fn first_word(&self, page: u64) -> &std::sync::atomic::AtomicU64 {
        &self.memory.words()[usize::try_from(page).expect("a page's number") * self.page_words]
    }

    /// Writes to pages in random order what is there already. Each is read first, so that a write finds a mapped page
    /// and pays for nothing but its own copy.
    fn write(&self, pages: u64) -> Vec<u64> {
        let mut order: Vec<u64> = (0..self.pages()).collect();
        let mut random = Random::new(1);
        for index in (1..order.len()).rev() {
            let other = usize::try_from(random.below(index as u64 + 1)).expect("an index");
            order.swap(index, other);
        }
        order.truncate(usize::try_from(pages).unwrap_or(usize::MAX));
        let nanoseconds = order.iter().map(|page| {
            let word = self.first_word(*page);
            let value = word.load(Relaxed);
            let begun = Instant::now();
            word.store(value, Relaxed);
            u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX)
        });
        nanoseconds.collect()
    }
}
