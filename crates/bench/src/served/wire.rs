//! Bytes to a worker and from it, through two pipes or a socket, with an end to waiting.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use kernel::Pidfd;
use kernel::pidfd::poll_in;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat};
use rustix::io::Errno;

use super::interrupt;

/// Longest that a worker may take for one answer, or to take what it is sent, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(300);
/// How often it is asked meanwhile whether to go on.
const TICK: Duration = Duration::from_millis(200);

/// The command that all workers of a group run below, once it has been started.
#[derive(Clone, Debug, Default)]
pub(super) struct Launcher(Arc<OnceLock<Pidfd>>);

impl Launcher {
    /// It has been started.
    pub(super) fn started(&self, process: Pidfd) {
        // Nobody starts a second one.
        let _ = self.0.set(process);
    }

    /// Fails once it has ended, or somebody has interrupted all this.
    ///
    /// # Errors
    /// That it is so.
    pub(super) fn alive(&self) -> Result<()> {
        interrupt::go_on()?;
        let ended = self.0.get().is_some_and(|process| process.wait_exited(Duration::ZERO).unwrap_or(true));
        ensure!(!ended, "the command that starts the workers has ended");
        Ok(())
    }
}

/// Both directions.
#[derive(Debug)]
pub(super) struct Wire {
    launcher: Launcher,
    from: File,
    /// Takes what there is room for, and does not wait.
    to: File,
    /// Longest that is waited for anything to come or go.
    patience: Duration,
    /// Read, and taken up to `taken`.
    heard: Vec<u8>,
    taken: usize,
}

impl Wire {
    /// Makes two named pipes that a worker is to be started with: it reads `FOLDER/NUMBER.in` and writes
    /// `FOLDER/NUMBER.out`. Its input ends with this value, however that ends.
    ///
    /// # Errors
    /// When they cannot be made.
    pub(super) fn pipes(folder: &Path, number: usize, launcher: &Launcher) -> Result<Self> {
        let open = |name: &str, options: &mut OpenOptions| -> Result<File> {
            let path = folder.join(format!("{number}.{name}"));
            mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).context("make a pipe")?;
            options.open(&path).with_context(|| format!("open {}", path.display()))
        };
        // Neither waits for the worker: a pipe opened for both does not, nor does a reader that asks not to. The worker
        // opens its ends anew, so that they wait as it is used to.
        let nonblocking = i32::try_from(OFlags::NONBLOCK.bits()).context("a flag of open(2)")?;
        let to = open("in", OpenOptions::new().read(true).write(true).custom_flags(nonblocking))?;
        let from = open("out", OpenOptions::new().read(true).custom_flags(nonblocking))?;
        Ok(Self::new(launcher, from, to))
    }

    fn new(launcher: &Launcher, from: File, to: File) -> Self {
        Self { launcher: launcher.clone(), from, to, patience: PATIENCE, heard: Vec::new(), taken: 0 }
    }

    /// Connects to a socket, as soon as somebody listens there.
    ///
    /// # Errors
    /// When nobody does in time.
    pub(super) fn socket(path: &Path, launcher: &Launcher) -> Result<Self> {
        let deadline = Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) => {
                    launcher.alive()?;
                    let waited = Instant::now() > deadline;
                    ensure!(!waited, "nobody listens at {}: {error}", path.display());
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        };
        stream.set_nonblocking(true).context("a socket that does not wait")?;
        let to = OwnedFd::from(stream.try_clone().context("a second descriptor of a socket")?);
        Ok(Self::new(launcher, OwnedFd::from(stream).into(), to.into()))
    }

    /// Sends.
    ///
    /// # Errors
    /// When the worker is gone, or takes nothing in time.
    pub(super) fn send(&mut self, mut bytes: &[u8]) -> Result<()> {
        let mut deadline = Instant::now() + self.patience;
        while !bytes.is_empty() {
            match self.to.write(bytes) {
                Ok(taken) => {
                    bytes = &bytes[taken..];
                    deadline = Instant::now() + self.patience;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.launcher.alive()?;
                    ensure!(Instant::now() < deadline, "a worker does not take what it is sent");
                    self.wait_for_room()?;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("a worker has ended"),
            }
        }
        Ok(())
    }

    fn wait_for_room(&self) -> Result<()> {
        let tick = Timespec::try_from(TICK).context("a short time")?;
        match poll(&mut [PollFd::new(&self.to, PollFlags::OUT)], Some(&tick)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error).context("cannot wait for a worker"),
        }
    }

    /// The next line, without its end.
    ///
    /// # Errors
    /// When the worker is gone, or says no whole line in time.
    pub(super) fn line(&mut self) -> Result<String> {
        let mut seen = 0;
        loop {
            let rest = &self.heard[self.taken..];
            if let Some(end) = rest[seen..].iter().position(|byte| *byte == b'\n') {
                let line = String::from_utf8_lossy(&rest[..seen + end]).trim_end().to_owned();
                self.taken += seen + end + 1;
                return Ok(line);
            }
            seen = rest.len();
            self.more()?;
        }
    }

    /// The next bytes, so many.
    ///
    /// # Errors
    /// As [`Self::line`].
    pub(super) fn exactly(&mut self, count: usize) -> Result<&[u8]> {
        while self.heard.len() - self.taken < count {
            self.more()?;
        }
        self.taken += count;
        Ok(&self.heard[self.taken - count..self.taken])
    }

    /// Reads what is there, once something is.
    fn more(&mut self) -> Result<()> {
        self.heard.drain(..self.taken);
        self.taken = 0;
        let deadline = Instant::now() + self.patience;
        while !poll_in(self.from.as_fd(), Some(TICK)).context("cannot hear a worker")? {
            self.launcher.alive()?;
            ensure!(Instant::now() < deadline, "a worker does not answer");
        }
        let filled = self.heard.len();
        self.heard.resize(filled + (64 << 10), 0);
        let read = self.from.read(&mut self.heard[filled..]);
        self.heard.truncate(filled + *read.as_ref().unwrap_or(&0));
        ensure!(read.context("cannot hear a worker")? > 0, "a worker has ended");
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::process::Command;

    /// A socket, and a server's end of it that says what a test wants.
    pub(in crate::served) fn connected() -> (Wire, UnixStream) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let wire = Wire::socket(&path, &Launcher::default()).unwrap();
        let (server, _) = listener.accept().unwrap();
        (wire, server)
    }

    #[test]
    fn pipes_carry_lines_and_tell_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let mut wire = Wire::pipes(folder.path(), 0, &Launcher::default()).unwrap();
        let script = "read a; echo \"$a and more\"; echo bytes; read b";
        let at = |name| File::options().read(true).write(name == "0.out").open(folder.path().join(name)).unwrap();
        let mut child = Command::new("sh").args(["-c", script]).stdin(at("0.in")).stdout(at("0.out")).spawn().unwrap();
        wire.send(b"one\n").unwrap();
        assert_eq!(wire.line().unwrap(), "one and more");
        assert_eq!(wire.exactly(3).unwrap(), b"byt");
        wire.send(b"two\n").unwrap();
        assert_eq!(wire.line().unwrap(), "es");
        assert!(child.wait().unwrap().success());
        assert!(wire.line().unwrap_err().to_string().contains("ended"));
    }

    /// Seen to fail: a test that never ended.
    #[test]
    fn a_worker_that_hangs_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let (socket, _server) = connected();
        for mut wire in [socket, Wire::pipes(folder.path(), 0, &Launcher::default()).unwrap()] {
            wire.patience = Duration::from_millis(500);
            let error = wire.send(&vec![0; 16 << 20]).unwrap_err().to_string();
            assert!(error.contains("does not take"), "{error}");
        }
        let (mut wire, _server) = connected();
        wire.patience = Duration::from_millis(500);
        let error = wire.line().unwrap_err().to_string();
        assert!(error.contains("does not answer"), "{error}");
    }

    #[test]
    fn a_slow_worker_gets_everything() {
        let (mut wire, mut server) = connected();
        wire.patience = Duration::from_secs(5);
        let sent: Vec<u8> = (0..8_u32 << 20).map(|number| (number % 251) as u8).collect();
        let length = sent.len();
        let reader = std::thread::spawn(move || {
            let mut heard = vec![0; length];
            for part in heard.chunks_mut(1 << 20) {
                std::thread::sleep(Duration::from_millis(30));
                server.read_exact(part).unwrap();
            }
            heard
        });
        wire.send(&sent).unwrap();
        assert!(reader.join().unwrap() == sent);
    }
}
