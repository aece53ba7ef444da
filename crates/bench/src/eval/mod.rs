//! `bench eval`: how fast an evaluation is beside reading the same memory and doing nothing with it, what its index
//! takes, and what the processes feel of it.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use eval::{Options, Selection, evaluate};
use kernel::remote::BatchReader;
use kernel::{Pagemap, Pid, Range, ScanRequest, maps};
use serde_json::json;

use crate::report::{Better, Machine, Ratio, Report};
use crate::workers::{Fleet, Layout};

/// What an index may take for a page seen once, for a shared one, and on top, in bytes.
const BOUND: (u64, u64, u64) = (8, 64, 64 << 20);

/// `bench eval`.
#[derive(Args, Clone, Debug)]
pub struct EvalCommand {
    /// Print one JSON document to stdout.
    #[arg(long)]
    pub json: bool,
    /// A short form for tests: little memory, two rounds.
    #[arg(long)]
    pub quick: bool,
    /// MiB of all processes together.
    #[arg(long, default_value_t = 2048)]
    pub size: u64,
    /// Processes.
    #[arg(long, default_value_t = 4)]
    pub workers: u64,
    /// How often each content occurs.
    #[arg(long, default_value_t = 2)]
    pub copies: u64,
    /// Rounds of each.
    #[arg(long, default_value_t = 5)]
    pub rounds: usize,
}

/// One round of both.
struct Round {
    /// Bytes a second of process_vm_readv alone.
    plain: f64,
    /// Bytes a second of an evaluation, from its first look to its answer.
    evaluated: f64,
    /// The same for the reading alone.
    reading: f64,
    pages: u64,
    duplicates: u64,
    shared: u64,
    index_bytes: u64,
    /// Most memory that this process has had until then.
    peak_bytes: u64,
}

impl EvalCommand {
    /// Measures and reports. A wrong count is exit status 1.
    ///
    /// # Errors
    /// When the processes cannot be started or read.
    pub fn run(&self) -> Result<ExitCode> {
        let machine = Machine::here();
        let (size, rounds) = if self.quick { (64, 2) } else { (self.size, self.rounds) };
        let layout = Layout::new((size << 20) / kernel::page_size(), 16, self.copies, self.workers);
        let mut fleet = Fleet::start(layout, |_| ())?;
        let pids: Vec<Pid> = fleet.pids().collect();
        let mut seen = Vec::new();
        for round in 0..rounds.max(1) {
            seen.push(measure(&pids).with_context(|| format!("round {round}"))?);
        }
        let right = seen.iter().all(|round| round.duplicates >= layout.saved());
        let best = |of: fn(&Round) -> f64| seen.iter().map(of).fold(0.0, f64::max);
        let (plain, evaluated) = (best(|round| round.plain), best(|round| round.evaluated));
        let last = seen.last().context("there was a round")?;
        let once = last.pages - last.duplicates - last.shared;
        let bound = BOUND.0 * once + BOUND.1 * last.shared + BOUND.2;
        let milliseconds = if self.quick { 300 } else { 3000 };
        let idle = fleet.touch(milliseconds, u64::MAX, || {
            std::thread::sleep(std::time::Duration::from_millis(20));
            Ok(())
        })?;
        let busy = fleet.touch(milliseconds, u64::MAX, || measure(&pids).map(|_| ()))?;
        let rate = |touched: &crate::workers::Touched| {
            (touched.reads.accesses + touched.writes.accesses) as f64 / touched.seconds
        };
        let ratios = vec![
            Ratio::new(
                ("evaluation, one thread", "bytes/s", Better::More),
                evaluated,
                ("process_vm_readv alone", plain),
                0.7,
            ),
            Ratio::new(
                ("index", "bytes", Better::Less),
                last.index_bytes as f64,
                ("8 B a page seen once, 64 B a shared one, 64 MiB", bound as f64),
                1.0,
            ),
            Ratio::new(
                ("memory of the whole process at its peak", "bytes", Better::Less),
                last.peak_bytes as f64,
                ("8 B a page seen once, 64 B a shared one, 64 MiB", bound as f64),
                1.0,
            ),
            Ratio::new(
                ("accesses of two threads while they are read", "1/s", Better::More),
                rate(&busy),
                ("not being read", rate(&idle)),
                0.0,
            ),
        ];
        for ratio in &ratios {
            eprintln!(
                "{:44} {:>12.4e} {:8} {}: {:.4e}, {:.2}x",
                ratio.metric, ratio.ours, ratio.unit, ratio.against, ratio.theirs, ratio.ratio
            );
        }
        if !right {
            eprintln!("bench: fewer duplicates were counted than there are ({})", layout.saved());
        }
        if self.json {
            let sample = |round: &Round| {
                json!({
                    "plain_bytes_per_second": round.plain,
                    "eval_bytes_per_second": round.evaluated,
                    "eval_reading_bytes_per_second": round.reading,
                    "pages": round.pages,
                    "duplicate_pages": round.duplicates,
                    "index_bytes": round.index_bytes,
                    "peak_bytes": round.peak_bytes,
                })
            };
            let samples = seen.iter().map(sample).collect();
            println!("{}", serde_json::to_string(&Report { scenario: "eval", machine, samples, ratios })?);
        }
        Ok(if right { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// Reads everything for nothing, then evaluates, each with one thread.
fn measure(pids: &[Pid]) -> Result<Round> {
    let (mut bytes, begun) = (0, Instant::now());
    let mut reader = BatchReader::new();
    for pid in pids {
        let ranges = anonymous(*pid)?;
        let read = reader.read(*pid, &ranges, |_, piece| {
            std::hint::black_box(piece[0]);
        })?;
        bytes += read.read.get();
    }
    let plain = bytes as f64 / begun.elapsed().as_secs_f64();
    let options =
        Options { selection: Selection { pids: pids.to_vec(), ..Selection::default() }, ..Options::default() };
    let report = evaluate(&options, &|_| {})?;
    let counters = report.totals.counters;
    ensure!(counters.pages_scanned > 0, "nothing was read");
    Ok(Round {
        plain,
        evaluated: (counters.pages_scanned * kernel::page_size()) as f64 / report.reading.elapsed_seconds,
        reading: report.reading.bytes_per_second,
        pages: counters.pages_scanned,
        duplicates: counters.duplicate_pages,
        shared: counters.distinct_pages - counters.unique_pages,
        index_bytes: report.reading.index_bytes,
        peak_bytes: kernel::sched::usage(kernel::sched::Whose::Own).max_rss.get(),
    })
}

/// The pages of a process that an evaluation reads.
fn anonymous(pid: Pid) -> Result<Vec<Range>> {
    let pagemap = Pagemap::open(pid)?;
    let (mut ranges, mut regions) = (Vec::new(), Vec::new());
    for vma in maps::read(pid)?.iter().filter(|vma| !vma.shared && vma.read && !vma.is_special()) {
        pagemap.scan_all(vma.range, &ScanRequest::own_pages(), &mut regions)?;
        ranges.extend(regions.iter().map(|region| region.range));
    }
    Ok(ranges)
}
