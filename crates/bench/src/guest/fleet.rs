//! Guests that run, all of them below one command.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open, pidfd_send_signal};

use super::checks::{Checks, Verdict};
use super::qemu::GuestOptions;
use super::qmp::Qmp;

/// How often a file is looked at while waiting.
const TICK: Duration = Duration::from_millis(50);
/// How long the guests may take to go after they were told.
const FAREWELL: Duration = Duration::from_secs(20);

/// Running guests. Dropping it kills them.
#[derive(Debug)]
pub struct Fleet {
    /// The guests, in the order of their options.
    pub guests: Vec<Guest>,
    launcher: Child,
    folder: PathBuf,
}

/// One running guest.
#[derive(Debug)]
pub struct Guest {
    options: GuestOptions,
    folder: PathBuf,
    started: Instant,
    /// QEMU itself, found by its pid file.
    process: Option<(Pid, OwnedFd)>,
}

impl Fleet {
    /// Starts guests by `PREFIX... sh -c 'qemu ... & qemu ... & wait'`; the prefix, which may be empty, is a command
    /// like `pagefold run --`. Sockets and logs go to `folder`, whose path should be short (a socket's has 107 bytes).
    ///
    /// # Errors
    ///
    /// When the command cannot be started. Whether the guests boot is seen by [`Guest::wait_ready`].
    pub fn start(prefix: &[OsString], folder: &Path, options: Vec<GuestOptions>) -> Result<Self> {
        let mut script = OsString::new();
        for guest in &options {
            for word in guest.command(folder) {
                script.push(quote(&word));
                script.push(" ");
            }
            script.push("</dev/null 2>");
            script.push(quote(guest.file(folder, "stderr").as_os_str()));
            script.push(" & ");
        }
        script.push("wait");
        let words: Vec<&OsStr> =
            prefix.iter().map(OsString::as_os_str).chain(["sh", "-c"].map(OsStr::new)).chain([&*script]).collect();
        let (program, arguments) = words.split_first().context("no command")?;
        let output = File::create(folder.join("launcher.log")).context("create the launcher's log")?;
        let launcher = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            // A group of its own, to be killed as a whole.
            .process_group(0)
            .spawn()
            .with_context(|| format!("run {}", program.display()))?;
        let started = Instant::now();
        let guest = |options| Guest { options, folder: folder.to_owned(), started, process: None };
        Ok(Self { guests: options.into_iter().map(guest).collect(), launcher, folder: folder.to_owned() })
    }

    /// Pid of the command that the guests run below.
    #[must_use]
    pub fn launcher(&self) -> u32 {
        self.launcher.id()
    }

    /// Waits until every guest has its files and goes round checking them; returns the time that each needed.
    ///
    /// # Errors
    ///
    /// As [`Guest::wait_ready`].
    pub fn wait_ready(&mut self, timeout: Duration) -> Result<Vec<Duration>> {
        std::thread::scope(|scope| {
            // Side by side, or a guest's time would be that of the slowest before it.
            let waiting: Vec<_> =
                self.guests.iter_mut().map(|guest| scope.spawn(move || guest.wait_ready(timeout))).collect();
            waiting.into_iter().map(|guest| guest.join().expect("waiting does not panic")).collect()
        })
    }

    /// Asks every guest for a verdict, and returns them once all have gone one more round.
    ///
    /// # Errors
    ///
    /// As [`Guest::send`] and [`Guest::wait_verdict`].
    pub fn verdicts(&mut self, timeout: Duration) -> Result<Vec<Verdict>> {
        let before: Vec<usize> = self
            .guests
            .iter()
            .map(|guest| guest.checks().map(|checks| checks.verdicts.len()))
            .collect::<Result<_>>()?;
        self.guests.iter().try_for_each(|guest| guest.send("verdict"))?;
        self.guests.iter_mut().zip(before).map(|(guest, before)| guest.wait_verdict(before, timeout)).collect()
    }

    /// Lets every guest power off and waits for the command that started them.
    ///
    /// # Errors
    ///
    /// When the command is still there after `timeout`, which is to cover the longest round, and 20 seconds more; all
    /// are killed then.
    pub fn stop(mut self, timeout: Duration) -> Result<ExitStatus> {
        self.guests.iter().try_for_each(|guest| guest.send("quit"))?;
        match self.wait_end(timeout + FAREWELL)? {
            Some(status) => Ok(status),
            None => bail!("the guests in {} did not power off", self.folder.display()),
        }
    }

    /// Waits for the command to end by itself; `None` when the time is over.
    ///
    /// # Errors
    ///
    /// When the kernel does not tell.
    pub fn wait_end(&mut self, timeout: Duration) -> Result<Option<ExitStatus>> {
        let deadline = Instant::now() + timeout;
        loop {
            let status = self.launcher.try_wait().context("wait for the guests")?;
            if status.is_some() || Instant::now() > deadline {
                return Ok(status);
            }
            std::thread::sleep(TICK);
        }
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for guest in &mut self.guests {
            if let Ok((_, process)) = guest.find() {
                // Gone already is as good.
                let _ = pidfd_send_signal(process, Signal::KILL);
            }
        }
        let left = Instant::now() + Duration::from_secs(2);
        while Instant::now() < left && matches!(self.launcher.try_wait(), Ok(None)) {
            std::thread::sleep(TICK);
        }
        // Once reaped, its number may be anybody's.
        if matches!(self.launcher.try_wait(), Ok(None))
            && let Some(group) = i32::try_from(self.launcher.id()).ok().and_then(Pid::from_raw)
        {
            let _ = kill_process_group(group, Signal::KILL);
        }
        let _ = self.launcher.wait();
    }
}

impl Guest {
    /// QEMU's pid.
    ///
    /// # Errors
    ///
    /// When it has not written it down yet, or is gone.
    pub fn pid(&mut self) -> Result<u32> {
        let (pid, _) = self.find()?;
        Ok(pid.as_raw_nonzero().get().unsigned_abs())
    }

    fn find(&mut self) -> Result<&(Pid, OwnedFd)> {
        if self.process.is_none() {
            let text = fs::read_to_string(self.options.file(&self.folder, "pid")).context("read QEMU's pid file")?;
            let pid = text.trim().parse().ok().and_then(Pid::from_raw).context("no pid in QEMU's pid file")?;
            let process = pidfd_open(pid, PidfdFlags::empty()).context("QEMU is gone")?;
            // Only now is it certain that this pid cannot become somebody else's; is it still QEMU's?
            let name = fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_nonzero())).unwrap_or_default();
            if !name.starts_with("qemu") {
                bail!("QEMU is gone, its pid is now {}", name.trim());
            }
            self.process = Some((pid, process));
        }
        self.process.as_ref().context("found above")
    }

    /// Has QEMU run and ended?
    fn is_gone(&mut self) -> bool {
        let Ok((_, process)) = self.find() else { return false };
        let mut events = [PollFd::new(process, PollFlags::IN)];
        // A pidfd becomes readable when its process ends, reaped or not.
        poll(&mut events, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }

    /// Everything that the guest has said on its second serial port.
    ///
    /// # Errors
    ///
    /// When its log cannot be read.
    pub fn log(&self) -> Result<String> {
        let file = self.options.file(&self.folder, "log");
        match File::open(&file) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
            opened => {
                let mut bytes = Vec::new();
                opened
                    .and_then(|mut log| log.read_to_end(&mut bytes))
                    .with_context(|| format!("read {}", file.display()))?;
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
        }
    }

    /// The same, parsed.
    ///
    /// # Errors
    ///
    /// As [`Guest::log`].
    pub fn checks(&self) -> Result<Checks> {
        self.log().map(|text| Checks::parse(&text))
    }

    /// Sends a line to the guest's job: `verdict`, `pause SECONDS` or `quit`.
    ///
    /// # Errors
    ///
    /// When QEMU is gone.
    pub fn send(&self, line: &str) -> Result<()> {
        let socket = self.options.file(&self.folder, "socket");
        let mut stream = UnixStream::connect(&socket).with_context(|| format!("connect to {}", socket.display()))?;
        stream.write_all(format!("{line}\n").as_bytes())?;
        // QEMU reads when the emulated port has room, and drops what it has not read when the connection ends.
        stream.shutdown(std::net::Shutdown::Write)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let mut rest = [0; 4096];
        while stream.read(&mut rest).is_ok_and(|read| read > 0) {}
        Ok(())
    }

    /// Connects to its QMP socket.
    ///
    /// # Errors
    ///
    /// As [`Qmp::connect`].
    pub fn qmp(&self) -> Result<Qmp> {
        Qmp::connect(&self.options.file(&self.folder, "qmp"))
    }

    /// Waits until the guest has its files; returns the time since its start.
    ///
    /// # Errors
    ///
    /// When it ends or the time is over, with what it has said.
    pub fn wait_ready(&mut self, timeout: Duration) -> Result<Duration> {
        self.wait(timeout, |checks| checks.ready_at.map(|_| ()))?;
        Ok(self.started.elapsed())
    }

    /// Waits for the verdict behind the first `before` ones.
    ///
    /// # Errors
    ///
    /// As [`Guest::wait_ready`].
    pub fn wait_verdict(&mut self, before: usize, timeout: Duration) -> Result<Verdict> {
        self.wait(timeout, |checks| checks.verdicts.get(before).copied())
    }

    /// Waits until what the guest has said satisfies a condition.
    ///
    /// # Errors
    ///
    /// When it ends or the time is over, with what it has said.
    pub fn wait<T>(&mut self, timeout: Duration, condition: impl Fn(&Checks) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + timeout;
        loop {
            // Before the look at the log, so that the last words of a guest that goes are not missed.
            let gone = self.is_gone();
            if let Some(value) = condition(&self.checks()?) {
                return Ok(value);
            }
            if gone || Instant::now() > deadline {
                let text = |kind| fs::read_to_string(self.options.file(&self.folder, kind)).unwrap_or_default();
                let launcher = fs::read_to_string(self.folder.join("launcher.log")).unwrap_or_default();
                bail!(
                    "guest {} {}\n{}{}{}{launcher}",
                    self.options.name,
                    if gone { "ended" } else { "took too long" },
                    self.log()?,
                    text("console"),
                    text("stderr"),
                );
            }
            std::thread::sleep(TICK);
        }
    }
}

/// One word for the shell.
pub(crate) fn quote(word: &OsStr) -> OsString {
    OsString::from(format!("'{}'", word.to_string_lossy().replace('\'', r"'\''")))
}
