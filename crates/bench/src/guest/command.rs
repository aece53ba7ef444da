//! `bench guest ...`: the fixtures from the command line.

use std::ffi::OsString;
use std::fs::File;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Subcommand;

use super::{Fleet, GuestFile, GuestOptions, Kernel, NFS, check_initramfs, run_inside};

/// What to do with guests.
#[derive(Debug, Subcommand)]
pub enum GuestCommand {
    /// Print where a kernel of a series lies, fetching it into the cache if need be.
    Kernel {
        /// A series: 6.1, 6.12.
        series: String,
    },
    /// Boot a kernel, run one program of this host in it, and exit as it does.
    Run {
        /// Kernel series to boot.
        #[arg(long, default_value = "6.12")]
        kernel: String,
        /// More files of this host, put at the same path in the guest.
        #[arg(long = "file")]
        files: Vec<PathBuf>,
        /// Load the modules of NFS's server and client.
        #[arg(long)]
        nfs: bool,
        /// Seconds until it is given up.
        #[arg(long, default_value_t = 300)]
        timeout: u64,
        /// Print what the kernel said, too.
        #[arg(long)]
        console: bool,
        /// The program, by its path on this host, and its arguments.
        #[arg(trailing_var_arg = true, required = true)]
        command: Vec<String>,
    },
    /// Start guests that check their memory, print what they say, and end with their verdict.
    Check {
        /// Kernel series to boot.
        #[arg(long, default_value = "6.1")]
        kernel: String,
        /// How many guests.
        #[arg(long, default_value_t = 3)]
        guests: u32,
        /// Memory of each in MiB.
        #[arg(long, default_value_t = 256)]
        memory: u32,
        /// Files that each checks, in MiB.
        #[arg(long, default_value_t = 96)]
        files: u32,
        /// Size of a disk for each, in MiB; 0 for none.
        #[arg(long, default_value_t = 64)]
        disk: u64,
        /// Seconds to run once all are ready.
        #[arg(long, default_value_t = 60)]
        seconds: u64,
        /// A command to start them by, with its arguments: pagefold run --.
        #[arg(trailing_var_arg = true)]
        prefix: Vec<OsString>,
    },
}

/// How long a guest may take to boot or to go one round.
const PATIENCE: Duration = Duration::from_secs(600);

impl GuestCommand {
    /// Does it.
    ///
    /// # Errors
    ///
    /// When a guest cannot be started, or does not do what it should. Wrong checks are no error but exit status 1.
    pub fn run(&self) -> Result<ExitCode> {
        match self {
            Self::Kernel { series } => {
                let kernel = Kernel::of_series(series)?;
                println!("{}\t{}\t{}", kernel.release, kernel.image.display(), kernel.modules.display());
                Ok(ExitCode::SUCCESS)
            }
            Self::Run { kernel, files, nfs, timeout, console, command } => {
                let program = command.first().context("no command")?;
                let from = std::path::absolute(program)?;
                // Words of busybox need no file of this host.
                let here = from.exists().then_some(&from);
                let absolute = files.iter().map(std::path::absolute).collect::<Result<Vec<_>, _>>()?;
                let files: Vec<GuestFile> = here
                    .into_iter()
                    .chain(&absolute)
                    .map(|from| GuestFile { path: from.to_string_lossy().into_owned(), from: from.clone() })
                    .collect();
                let mut words: Vec<&str> = command.iter().map(String::as_str).collect();
                let path = from.to_string_lossy();
                if here.is_some()
                    && let Some(first) = words.first_mut()
                {
                    *first = &path;
                }
                let modules = if *nfs { NFS } else { &[] };
                let kernel = Kernel::of_series(kernel)?;
                let output = run_inside(&kernel, modules, &files, &words, Duration::from_secs(*timeout))?;
                if *console || output.status.is_none() {
                    eprintln!("{}", output.console);
                }
                print!("{}", output.text);
                eprintln!("{}: {:?} after {:.1} s", kernel.release, output.status, output.elapsed.as_secs_f64());
                Ok(output.status.and_then(|status| u8::try_from(status).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
            }
            Self::Check { kernel, guests, memory, files, disk, seconds, prefix } => {
                let kernel = Kernel::of_series(kernel)?;
                let folder = tempfile::Builder::new().prefix("guests").tempdir()?;
                let initramfs = folder.path().join("initramfs");
                check_initramfs(&kernel, &initramfs)?;
                let mut options = Vec::new();
                for number in 0..*guests {
                    let name = format!("guest{number}");
                    let mut guest = GuestOptions::new(&name, &kernel, &initramfs);
                    guest.memory_mib = *memory;
                    guest.append = format!("check.mib={files}");
                    if *disk > 0 {
                        let image = folder.path().join(format!("{name}.disk"));
                        File::create(&image)?.set_len(disk << 20)?;
                        guest.disk = Some(image);
                    }
                    options.push(guest);
                }
                check(Fleet::start(prefix, folder.path(), options)?, Duration::from_secs(*seconds))
            }
        }
    }
}

fn check(mut fleet: Fleet, time: Duration) -> Result<ExitCode> {
    for (guest, ready) in fleet.wait_ready(PATIENCE)?.iter().enumerate() {
        eprintln!("guest {guest} ready after {:.1} s", ready.as_secs_f64());
    }
    let start = Instant::now();
    while start.elapsed() < time {
        std::thread::sleep(Duration::from_secs(5).min(time.saturating_sub(start.elapsed())));
        for (number, guest) in fleet.guests.iter().enumerate() {
            let checks = guest.checks()?;
            eprintln!(
                "guest {number}: {} rounds ok, {} files, {} bad",
                checks.rounds_ok,
                checks.files,
                checks.bad.len()
            );
            checks.bad.iter().for_each(|line| eprintln!("guest {number}: {line}"));
        }
    }
    let verdicts = fleet.verdicts(PATIENCE)?;
    for (number, verdict) in verdicts.iter().enumerate() {
        let word = if verdict.ok { "ok" } else { "BAD" };
        println!("guest {number}: {word}, {} rounds, {} files, {} bad", verdict.rounds, verdict.files, verdict.bad);
    }
    let status = fleet.stop(PATIENCE)?;
    let right = status.success() && verdicts.iter().all(|verdict| verdict.ok);
    Ok(if right { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
