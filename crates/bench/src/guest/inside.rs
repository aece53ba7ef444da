//! One program on another kernel.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::fleet::{Fleet, quote};
use super::initramfs::Initramfs;
use super::kernel::Kernel;
use super::qemu::GuestOptions;

/// A file of this host for the guest. Programs bring their libraries along.
#[derive(Clone, Debug)]
pub struct GuestFile {
    /// Absolute path in the guest.
    pub path: String,
    /// The file here.
    pub from: PathBuf,
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Output {
    /// Exit status as the shell tells it, so 128 and the number for a signal. `None`: out of time, or the guest died.
    pub status: Option<i32>,
    /// Standard output and error.
    pub text: String,
    /// What the kernel said.
    pub console: String,
    /// From the start of QEMU to its end.
    pub elapsed: Duration,
}

impl Output {
    /// A kernel that changes its own code while it starts lets the other processor run into `int3`, which QEMU's emulation
    /// of two processors may show it once the change is over; or it stands still before it has said a word. That is
    /// before it has run anything of ours.
    fn died_of_its_emulator(&self) -> bool {
        let oops = self.console.contains("Oops: int3");
        self.status.is_none() && self.text.is_empty() && (oops || !self.console.contains(BEGUN))
    }
}

/// Marks the exit status in a guest's log; `init.sh` writes it.
const MARK: &str = "\n@@pagefold-exit ";

/// The first words of `init.sh`, on the console.
const BEGUN: &str = "init: begun";

/// A guest that has not got so far by now never will: most need two seconds, and ten on a busy host.
const BOOT: Duration = Duration::from_secs(60);

/// Memory and processors of such a guest: a test that needs more is none to run under emulation.
const MEMORY_MIB: u32 = 1024;
const CPUS: u32 = 2;

/// How often a guest is started whose kernel dies of its emulator.
const STARTS: u32 = 3;

/// Boots a kernel and runs one command in it, as root in `/tmp`, with `/proc`, `/sys`, `/dev`, cgroup2, tracefs and bpf
/// mounted, all of busybox in `/bin` and the modules of `modules` loaded ([`NFS`](super::NFS), or none).
///
/// The command's first word is a path in the guest. Emulation is 10 to 30 times slower than this machine.
///
/// # Errors
///
/// When the guest cannot be put together or started. What the command makes of it is in the output.
pub fn run_inside(
    kernel: &Kernel,
    modules: &[&str],
    files: &[GuestFile],
    command: &[&str],
    timeout: Duration,
) -> Result<Output> {
    run_inside_nodes(kernel, modules, files, command, timeout, 1)
}

/// As [`run_inside`], on a machine whose memory is divided among so many nodes.
///
/// # Errors
///
/// As [`run_inside`].
pub fn run_inside_nodes(
    kernel: &Kernel,
    modules: &[&str],
    files: &[GuestFile],
    command: &[&str],
    timeout: Duration,
    nodes: u32,
) -> Result<Output> {
    for _ in 1..STARTS {
        let output = boot(kernel, modules, files, command, timeout, nodes)?;
        if !output.died_of_its_emulator() {
            return Ok(output);
        }
        eprintln!("{}: its emulator killed it, it starts once more", kernel.release);
    }
    boot(kernel, modules, files, command, timeout, nodes)
}

fn boot(
    kernel: &Kernel,
    modules: &[&str],
    files: &[GuestFile],
    command: &[&str],
    timeout: Duration,
    nodes: u32,
) -> Result<Output> {
    let folder = tempfile::Builder::new().prefix("inside").tempdir().context("create a folder for the guest")?;
    let words: Vec<String> =
        command.iter().map(|word| quote(OsStr::new(word)).to_string_lossy().into_owned()).collect();
    let job = format!("#!/bin/sh\nexec {}\n", words.join(" "));
    let mut image = Initramfs::new(kernel, modules, job.as_bytes())?;
    for file in files {
        image.add_program(&file.path, &file.from)?;
    }
    let initramfs = folder.path().join("initramfs");
    image.write(&initramfs)?;
    let mut options = GuestOptions::new("inside", kernel, &initramfs);
    (options.memory_mib, options.cpus, options.translation_mib, options.qmp) = (MEMORY_MIB, CPUS, 128, false);
    if nodes > 1 {
        for node in 0..nodes {
            let memory = format!("memory-backend-ram,id=node{node},size={}M", MEMORY_MIB / nodes);
            let processor = if node < CPUS { format!(",cpus={node}") } else { String::new() };
            let node = format!("node,nodeid={node},memdev=node{node}{processor}");
            options.arguments.extend(["-object", &memory, "-numa", &node].map(Into::into));
        }
    }
    let start = Instant::now();
    let mut fleet = Fleet::start(&[], folder.path(), vec![options])?;
    let console = || {
        let read = |kind: &str| std::fs::read(folder.path().join(format!("inside.{kind}"))).unwrap_or_default();
        String::from_utf8_lossy(&[read("stderr"), read("console")].concat()).into_owned()
    };
    if fleet.wait_end(timeout.min(BOOT))?.is_none() && console().contains(BEGUN) {
        fleet.wait_end(timeout.saturating_sub(BOOT))?;
    }
    let elapsed = start.elapsed();
    let log = fleet.guests.first().context("one guest was started")?.log()?;
    drop(fleet);
    let console = console();
    let (text, status) = match log.rsplit_once(MARK) {
        Some((text, status)) => (text.to_owned(), status.trim().parse().ok()),
        None => (log, None),
    };
    Ok(Output { status, text, console, elapsed })
}
