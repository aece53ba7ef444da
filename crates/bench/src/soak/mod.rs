//! The soak: programs that torture managed memory under `pagefold run`, while helpers, brokers and guardians are killed
//! at random, up to two at a time.
//!
//! The programs (`crates/agent/examples/torture`) know what every byte must be and check it all the time. This side
//! kills, starts new rounds, and sees that nothing hangs and that nothing is left behind.
//!
//! With `--allocator` they mark nothing and torture an allocator instead, managed whole.
//!
//! With `SOAK_HOLDS` in the environment a program in which a thread hangs says so and stays, to be looked at.

mod allocator;
mod processes;
mod round;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use serde::Serialize;

pub use allocator::Allocator;
use processes::Tree;
use round::{Kills, Torture};

use crate::programs::Programs;

/// Shared memory that may have grown meanwhile by other doings of the machine.
const SLACK: u64 = 64 << 20;
/// Processes and memory may take so long to go after a round.
const SETTLED_WITHIN: Duration = Duration::from_secs(20);

/// What to do.
#[derive(Clone, Debug, Args)]
pub struct SoakArgs {
    /// How long.
    #[arg(long, default_value_t = 600)]
    pub seconds: u64,
    /// Where the dice begin; a run is repeated by its seed as far as timing allows.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// The `pagefold` program; built if it is not named.
    #[arg(long)]
    pub pagefold: Option<PathBuf>,
    /// The torture program, with `heap` beside it; both are built if it is not named.
    #[arg(long)]
    pub torture: Option<PathBuf>,
    /// Manage the programs whole (`run --scope all`), and torture this allocator.
    #[arg(long, value_enum)]
    pub allocator: Option<Allocator>,
    /// A folder on a file system that knows O_DIRECT.
    #[arg(long, default_value = "/var/tmp")]
    pub folder: PathBuf,
    /// Print the report as JSON.
    #[arg(long)]
    pub json: bool,
}

/// What was done, and that it was right: a wrong byte, a hang or a leak is an error instead.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Launches of `pagefold run`.
    pub rounds: u64,
    /// Seconds it took.
    pub seconds: f64,
    /// Operations of the programs.
    pub operations: u64,
    /// Pages compared word by word.
    pub pages_checked: u64,
    /// Forks, each child with all bytes checked.
    pub forks: u64,
    /// Ranges moved, grown or shrunk by mremap.
    pub remaps: u64,
    /// Pages read with O_DIRECT.
    pub direct_reads: u64,
    /// Pages read through io_uring.
    pub ring_reads: u64,
    /// Pages that went through pipes, copied or spliced.
    pub pipe_pages: u64,
    /// Pages that a FUSE daemon filled.
    pub fuse_reads: u64,
    /// Calls that failed because no helper lived.
    pub refused: u64,
    /// Pages merged, as far as brokers lived to tell.
    pub merges: u64,
    /// Diverged pages taken again.
    pub retaken: u64,
    /// Most mappings of one process.
    pub maps: u64,
    /// Helpers killed.
    pub helpers_killed: u64,
    /// Brokers killed.
    pub brokers_killed: u64,
    /// Guardians killed.
    pub guardians_killed: u64,
    /// Bytes of shared memory of the machine before and after.
    pub shmem: [u64; 2],
}

impl SoakArgs {
    /// Runs it and prints the report.
    ///
    /// # Errors
    /// As [`run`].
    pub fn command(&self) -> Result<ExitCode> {
        let report = run(self)?;
        if self.json {
            println!("{}", serde_json::to_string_pretty(&report)?);
        } else {
            println!("{report:#?}");
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Runs the soak.
///
/// # Errors
/// The first wrong byte, hang or leak; or that it could not be run.
pub fn run(options: &SoakArgs) -> Result<Report> {
    kernel::task::set_child_subreaper(true).context("cannot become a child subreaper")?;
    let programs = Programs::named_or_built(options.pagefold.as_deref(), options.torture.as_deref())?;
    let folder = tempfile::Builder::new().prefix("pagefold-soak").tempdir_in(&options.folder)?;
    let mut report = Report { shmem: [shmem()?, 0], ..Report::default() };
    let preload = options.allocator.map(Allocator::library).transpose()?;
    let fuse = if preload.is_none() { Fuse::mount(&programs.torture, folder.path()) } else { None };
    let begun = Instant::now();
    let until = begun + Duration::from_secs(options.seconds);
    let mut seed = options.seed;
    while Instant::now() < until {
        let left = until.saturating_duration_since(Instant::now());
        let kills = Kills::drawn(seed);
        let about = format!("round {} with seed {seed}, {kills:?}", report.rounds);
        round::run(
            &programs,
            seed,
            left,
            folder.path(),
            &match &preload {
                Some(preload) => Torture::Allocator(preload.as_deref()),
                None => Torture::Marked(fuse.as_ref().map(|fuse| fuse.mount.as_path())),
            },
            kills,
            &mut report,
        )
        .with_context(|| about)?;
        report.rounds += 1;
        seed += 1;
    }
    drop(fuse);
    settle(&mut report)?;
    report.seconds = begun.elapsed().as_secs_f64();
    Ok(report)
}

/// Nothing may be left: no process, no memory.
fn settle(report: &mut Report) -> Result<()> {
    let deadline = Instant::now() + SETTLED_WITHIN;
    loop {
        kernel::signals::reap_others(kernel::Pid(0));
        let left = Tree::read().below(kernel::Pid::this());
        report.shmem[1] = shmem()?;
        if left.is_empty() && report.shmem[1] <= report.shmem[0] + SLACK {
            return Ok(());
        }
        if Instant::now() > deadline {
            ensure!(left.is_empty(), "processes are left: {left:?}");
            bail!("shared memory grew from {} to {} bytes", report.shmem[0], report.shmem[1]);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn shmem() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("Shmem:")).context("no Shmem in /proc/meminfo")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().context("Shmem is a number")?;
    Ok(kib << 10)
}

/// A FUSE daemon that lives as long as the soak.
struct Fuse {
    mount: PathBuf,
    daemon: std::process::Child,
}

impl Fuse {
    /// `None` where it cannot be had, which is said.
    fn mount(torture: &Path, folder: &Path) -> Option<Self> {
        use std::io::BufRead as _;
        let mount = folder.join("mount");
        std::fs::create_dir(&mount).ok()?;
        let mut command = Command::new(torture);
        command.arg("--fuse").arg(&mount).stdout(std::process::Stdio::piped());
        let mut daemon = command.spawn().ok()?;
        let mut line = String::new();
        std::io::BufReader::new(daemon.stdout.take()?).read_line(&mut line).ok()?;
        if line.trim() == "mounted" {
            return Some(Self { mount, daemon });
        }
        eprintln!("soak: without FUSE: {}", line.trim());
        let _ = daemon.wait();
        None
    }
}

impl Drop for Fuse {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.mount).status();
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}
