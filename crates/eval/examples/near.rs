//! Near duplicates of real processes, and whether what is said of them is true.
//!
//! Without arguments eight Python workers of the demonstration are started in four ways: as they come, with one hash
//! seed, with one address-space layout, and with both. What the first round predicts of the others stands beside what
//! they reach. With PIDs, those processes are looked at.
//!
//! `cargo run --release -p pagefold-eval --example near [PID...]`
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::error::Error;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::time::Instant;

use kernel::{BatchReader, Launch, Launched, Pagemap, Pid, Range, ScanRequest, Vaddr, page_size};
use page::near::{Cause, NearIndex, NearReport, Pointers};
use page::{Fingerprint, Secret, is_zero};

const WORKER: &str = include_str!("../../cli/src/demo_worker.py");
const WORKERS: usize = 8;
/// Bytes of files that each worker loads.
const CORPUS: u64 = 3_000_000;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// A process that is looked at, with its pages that are there and belong to nobody else's file.
struct Target {
    pid: Pid,
    regions: Vec<Range>,
    pointers: Pointers,
}

impl Target {
    fn of(pid: Pid) -> Outcome<Self> {
        let vmas = kernel::maps::read(pid)?;
        let pagemap = Pagemap::open(pid)?;
        let (mut regions, mut found) = (Vec::new(), Vec::new());
        for vma in vmas.iter().filter(|vma| !vma.shared && !vma.is_special()) {
            pagemap.scan_all(vma.range, &ScanRequest::own_pages(), &mut found)?;
            regions.extend(found.iter().map(|region| region.range));
        }
        let pointers = Pointers::within(vmas.iter().map(|vma| (vma.range.start().get(), vma.range.end().get())));
        Ok(Self { pid, regions, pointers })
    }

    fn each(&self, mut visit: impl FnMut(u64, &[u8])) -> Outcome<()> {
        let size = page_size();
        BatchReader::new().read(self.pid, &self.regions, |range, bytes| {
            for (address, page) in range.page_addresses().zip(bytes.chunks_exact(size as usize)) {
                visit(address.get(), page);
            }
        })?;
        Ok(())
    }
}

/// What was found in a set of processes, in pages.
struct Found {
    all: u64,
    zero: u64,
    distinct: u64,
    near: NearReport,
    feed_nanoseconds: f64,
    finish_seconds: f64,
}

impl Found {
    fn look(pids: &[Pid]) -> Outcome<Self> {
        let targets = pids.iter().map(|&pid| Target::of(pid)).collect::<Outcome<Vec<_>>>()?;
        let secret = Secret::new(std::array::from_fn(|at| (at * 37 % 251) as u8));
        let mut contents: HashMap<Fingerprint, ()> = HashMap::new();
        let mut index = NearIndex::new(1 << 20);
        let mut places = Vec::new();
        let (mut all, mut zero, mut fed) = (0, 0, 0.0);
        for (owner, target) in (0_u32..).zip(&targets) {
            index.owner(owner, target.pointers.clone());
            let mut kept: Vec<u8> = Vec::new();
            let first = places.len() as u64;
            target.each(|address, page| {
                all += 1;
                if is_zero(page) {
                    zero += 1;
                } else if contents.insert(secret.fingerprint(page), ()).is_none() {
                    // Equal ones change nothing: only the first of each content is fed.
                    places.push((target.pid, address));
                    kept.extend(page);
                }
            })?;
            let started = processor_seconds();
            for (id, page) in (first..).zip(kept.chunks_exact(page_size() as usize)) {
                index.feed(id, owner, page);
            }
            fed += processor_seconds() - started;
        }
        let started = Instant::now();
        let near = index.finish(page_size() as usize, |id, page| {
            let (pid, address) = places[id as usize];
            kernel::remote::read(pid, Vaddr(address), page).is_ok_and(|read| read.bytes().get() == page_size())
        });
        Ok(Self {
            all,
            zero,
            distinct: contents.len() as u64,
            feed_nanoseconds: fed * 1e9 / places.len().max(1) as f64,
            finish_seconds: started.elapsed().as_secs_f64(),
            near,
        })
    }

    /// The share of all pages that merging would save once `more` pages are equal that are not.
    fn saved(&self, more: u64) -> f64 {
        (self.all - self.distinct + more) as f64 * 100.0 / self.all.max(1) as f64
    }

    /// What sharing the layout and the seed would bring; with what is only guessed to become equal, or without.
    fn worth(&self, layout: bool, seed: bool, guesses: bool) -> u64 {
        self.near
            .causes
            .iter()
            .map(|cause| match cause.cause {
                Cause::AddressSpaceLayout if layout => cause.worth,
                Cause::HashSeed if seed && layout => cause.worth,
                Cause::HashSeed if seed => cause.worth - cause.worth_with_layout,
                Cause::Counters if layout && seed => cause.worth,
                Cause::Shifted if layout && seed && guesses => cause.worth,
                _ => 0,
            })
            .sum()
    }

    fn print(&self, name: &str) {
        println!(
            "{name}: {} pages, {} zero, {} distinct; merging saves {:.1} % (fed at {:.0} ns a page, finished in {:.2} s)",
            self.all,
            self.zero,
            self.distinct,
            self.saved(0),
            self.feed_nanoseconds,
            self.finish_seconds
        );
        println!("  {:?}, share {}", self.near.counts, self.near.share);
        for cause in self.near.causes.iter().take(10) {
            println!(
                "  {:<22} worth {:>7} pages ({:4.1} %), {:>7} with the layout; {:>6} groups, {:>7} pages",
                cause.cause.code(),
                cause.worth,
                100.0 * cause.worth as f64 / self.all as f64,
                cause.worth_with_layout,
                cause.groups,
                cause.pages
            );
            let first: Vec<String> = cause.example.first.iter().map(|word| format!("{word} {:?}", word.kind)).collect();
            println!("      {} words differ: {}", cause.example.differing, first.join(", "));
        }
    }
}

/// What this thread has had of the processors: others may be busy.
fn processor_seconds() -> f64 {
    let told = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    told.split(' ').next().and_then(|nanoseconds| nanoseconds.parse::<f64>().ok()).unwrap_or_default() / 1e9
}

struct Python {
    program: PathBuf,
    files: Vec<PathBuf>,
}

impl Python {
    fn find() -> Outcome<Self> {
        const QUESTION: &str = "import sys, sysconfig; print(sys.executable); print(sysconfig.get_paths()['stdlib'])";
        let answer = Command::new("python3").args(["-c", QUESTION]).output()?;
        let text = String::from_utf8(answer.stdout)?;
        let (program, library) = text.trim().split_once('\n').ok_or("python3 does not say where it is")?;
        let (mut files, mut left) = (Vec::new(), CORPUS);
        collect(Path::new(library), &mut files, &mut left)?;
        Ok(Self { program: program.into(), files })
    }

    /// Starts a worker and waits until it has loaded its data.
    fn start(&self, layout: bool, seed: bool) -> Outcome<(Launched, Option<ChildStdin>)> {
        let mut command = Command::new(&self.program);
        command.args(["-c", WORKER]).args(&self.files).stdin(Stdio::piped()).stdout(Stdio::piped());
        command.env("PYTHONHASHSEED", if seed { "0" } else { "random" }).env("PYTHONDONTWRITEBYTECODE", "1");
        let mut launch = Launch::new(command);
        launch.no_randomization(layout);
        let mut launched = launch.spawn()?;
        let input = launched.child.stdin.take();
        let output = launched.child.stdout.take().ok_or("a worker without output")?;
        BufReader::new(output).read_line(&mut String::new())?;
        Ok((launched, input))
    }

    fn round(&self, layout: bool, seed: bool) -> Outcome<Found> {
        let mut workers = Vec::new();
        for _ in 0..WORKERS {
            workers.push(self.start(layout, seed)?);
        }
        let found = Found::look(&workers.iter().map(|(worker, _)| worker.pid()).collect::<Vec<_>>());
        for (mut worker, input) in workers {
            // The end of its input ends it.
            drop(input);
            worker.child.wait()?;
        }
        found
    }
}

fn collect(directory: &Path, files: &mut Vec<PathBuf>, left: &mut u64) -> Outcome<()> {
    let mut entries = fs::read_dir(directory)?.collect::<Result<Vec<_>, _>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for path in entries.into_iter().map(|entry| entry.path()) {
        if *left == 0 {
            break;
        }
        if path.is_dir() {
            collect(&path, files, left)?;
        } else if path.extension().is_some_and(|end| end == "py") {
            let size = fs::metadata(&path)?.len();
            if (1..=1 << 20).contains(&size) {
                *left = left.saturating_sub(size);
                files.push(path);
            }
        }
    }
    Ok(())
}

fn main() -> Outcome<()> {
    let pids = std::env::args().skip(1).map(|pid| pid.parse().map(Pid)).collect::<Result<Vec<_>, _>>()?;
    if !pids.is_empty() {
        Found::look(&pids)?.print("as it is");
        return Ok(());
    }
    let python = Python::find()?;
    let ways = [
        ("as they come", false, false),
        ("one seed", false, true),
        ("one layout", true, false),
        ("one layout, one seed", true, true),
    ];
    let mut rounds = Vec::new();
    for (name, layout, seed) in ways {
        let found = python.round(layout, seed)?;
        found.print(name);
        rounds.push((name, layout, seed, found));
    }
    println!("\nsaved by merging, %      reached   predicted as they come   predicted with one seed");
    for (name, layout, seed, found) in &rounds {
        let of = |round: &Found, within: bool| {
            let saved = |guesses| round.saved(round.worth(*layout, *seed, guesses));
            if within { format!("{:.1} to {:.1}", saved(false), saved(true)) } else { "-".to_owned() }
        };
        println!(
            "  {name:<22} {:>6.1}   {:>22}   {:>23}",
            found.saved(0),
            of(&rounds[0].3, true),
            of(&rounds[1].3, *seed)
        );
    }
    Ok(())
}
