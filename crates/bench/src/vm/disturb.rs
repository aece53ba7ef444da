//! What an operator or another program may do to a guest's QEMU at any moment, while its memory is being merged.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use kernel::{Pid, Pidfd, Signal};
use serde::Serialize;

use crate::guest::{Fleet, Qmp};

/// The older cgroup hierarchy's freezer.
const FREEZER: &str = "/sys/fs/cgroup/freezer";

/// How often each thing was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Disturbed {
    /// SIGSTOP, and SIGCONT after a while.
    pub(crate) stopped: u64,
    /// A debugger came and went.
    pub(crate) debugged: u64,
    /// Frozen by a cgroup, and thawed.
    pub(crate) frozen: u64,
    /// The balloon took memory, or gave it back.
    pub(crate) ballooned: u64,
}

/// A thread that disturbs guests until it is stopped.
pub(crate) struct Disturbance {
    over: Arc<AtomicBool>,
    thread: JoinHandle<Result<Disturbed>>,
}

/// One guest as the disturber sees it.
struct Victim {
    pid: Pid,
    process: Pidfd,
    qmp: Qmp,
    small: bool,
}

impl Disturbance {
    /// Starts.
    pub(crate) fn start(fleet: &mut Fleet) -> Result<Self> {
        let mut victims = Vec::new();
        for guest in &mut fleet.guests {
            let pid = Pid(i32::try_from(guest.pid()?)?);
            let process = Pidfd::open(pid).context("QEMU is gone")?;
            victims.push(Victim { pid, process, qmp: guest.qmp()?, small: false });
        }
        let over = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&over);
        let thread = std::thread::Builder::new()
            .name("disturb".to_owned())
            .spawn(move || disturb(&mut victims, &told))
            .context("start a thread")?;
        Ok(Self { over, thread })
    }

    /// Stops, with every guest running again.
    pub(crate) fn stop(self) -> Result<Disturbed> {
        self.over.store(true, Ordering::SeqCst);
        self.thread.join().map_err(|_payload| anyhow::anyhow!("the disturber panicked"))?
    }
}

fn disturb(victims: &mut [Victim], over: &AtomicBool) -> Result<Disturbed> {
    let freezer = Freezer::make();
    let debugger = Command::new("gdb").arg("--version").stdout(Stdio::null()).status().is_ok();
    let mut done = Disturbed::default();
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    while !over.load(Ordering::SeqCst) {
        let at = dice.below(victims.len() as u64) as usize;
        let Some(victim) = victims.get_mut(at) else { break };
        let while_ = Duration::from_millis(50 + dice.below(1500));
        match dice.below(4) {
            0 => {
                victim.process.send_signal(Signal::STOP).context("stop a guest")?;
                std::thread::sleep(while_);
                victim.process.send_signal(Signal::CONT).context("let a guest go on")?;
                done.stopped += 1;
            }
            1 if debugger => {
                debug(victim.pid)?;
                done.debugged += 1;
            }
            2 => {
                if let Some(freezer) = &freezer {
                    freezer.freeze(victim.pid, while_)?;
                    done.frozen += 1;
                }
            }
            _ => {
                victim.small = !victim.small;
                victim.qmp.balloon(if victim.small { 216 } else { 256 })?;
                done.ballooned += 1;
            }
        }
        std::thread::sleep(Duration::from_millis(200 + dice.below(1500)));
    }
    for victim in victims.iter_mut().filter(|victim| victim.small) {
        victim.qmp.balloon(256)?;
    }
    Ok(done)
}

/// A debugger attaches, looks at every thread and lets go.
fn debug(pid: Pid) -> Result<()> {
    let mut gdb = Command::new("gdb")
        .args(["-nx", "-batch", "-iex", "set auto-load off", "-p", &pid.to_string()])
        .args(["-ex", "info threads", "-ex", "detach"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("run gdb")?;
    for _ in 0..1200 {
        if gdb.try_wait().context("wait for gdb")?.is_some() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let _ = gdb.kill();
    let _ = gdb.wait();
    bail!("gdb did not come to an end with process {pid}")
}

/// A freezer cgroup of our own.
struct Freezer(PathBuf);

impl Freezer {
    /// `None` where there is no such hierarchy, or it is not ours to use.
    fn make() -> Option<Self> {
        let folder = Path::new(FREEZER).join(format!("pagefold-bench-{}", std::process::id()));
        fs::create_dir(&folder).ok()?;
        Some(Self(folder))
    }

    fn freeze(&self, pid: Pid, time: Duration) -> Result<()> {
        let write = |file: &str, text: &str| {
            fs::write(self.0.join(file), text).with_context(|| format!("write {text} to {}/{file}", self.0.display()))
        };
        write("cgroup.procs", &pid.to_string())?;
        write("freezer.state", "FROZEN")?;
        std::thread::sleep(time);
        write("freezer.state", "THAWED")?;
        fs::write(Path::new(FREEZER).join("cgroup.procs"), pid.to_string()).context("give a guest its cgroup back")
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        let _ = fs::write(self.0.join("freezer.state"), "THAWED");
        for pid in fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default().lines() {
            let _ = fs::write(Path::new(FREEZER).join("cgroup.procs"), pid);
        }
        let _ = fs::remove_dir(&self.0);
    }
}

/// The same disturbances in every run (xorshift64*).
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) % limit.max(1)
    }
}
