//! What a worker of `pagefold demo` says, with an end to waiting for it.

use std::io::Read as _;
use std::os::fd::AsFd as _;
use std::process::ChildStdout;
use std::time::{Duration, Instant};

use anyhow::Context as _;

/// The reading end of a worker's output.
pub(crate) struct Hearing {
    from: ChildStdout,
    /// Read, and not taken yet.
    heard: Vec<u8>,
}

impl Hearing {
    pub(crate) fn new(from: ChildStdout) -> Self {
        Self { from, heard: Vec::new() }
    }

    /// The next line without its end.
    ///
    /// # Errors
    /// If the worker has ended or says no whole line within that time.
    pub(crate) fn line(&mut self, within: Duration) -> anyhow::Result<String> {
        let deadline = Instant::now() + within;
        loop {
            if let Some(end) = self.heard.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.heard.drain(..=end).collect();
                return Ok(String::from_utf8_lossy(&line).trim_end().to_owned());
            }
            anyhow::ensure!(self.more(deadline)?, "a worker has ended");
        }
    }

    /// All that is said until the end.
    ///
    /// # Errors
    /// If the end does not come within that time.
    pub(crate) fn all(mut self, within: Duration) -> anyhow::Result<String> {
        let deadline = Instant::now() + within;
        while self.more(deadline)? {}
        String::from_utf8(self.heard).context("a worker talks nonsense")
    }

    /// Reads what is there; `false` at the end. Half a line and then nothing must not hold anybody up, so there is a wait
    /// with a limit before each read.
    fn more(&mut self, deadline: Instant) -> anyhow::Result<bool> {
        let left = deadline.saturating_duration_since(Instant::now());
        let readable = kernel::pidfd::poll_in(self.from.as_fd(), Some(left)).context("cannot hear a worker")?;
        anyhow::ensure!(readable, "a worker does not answer");
        let mut piece = [0; 4096];
        let read = self.from.read(&mut piece).context("cannot hear a worker")?;
        self.heard.extend_from_slice(&piece[..read]);
        Ok(read > 0)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use std::process::{Command, Stdio};

    /// Seen to fail: with `read_line` behind one poll, as part (a) had it, the half line was waited for until the worker
    /// ended; part (b) had no limit at all.
    #[test]
    fn a_worker_that_hangs_holds_nobody_up() {
        let script = "printf 'one\ntwo\nhal'; exec sleep 5";
        let mut worker = Command::new("sh").args(["-c", script]).stdout(Stdio::piped()).spawn().unwrap();
        let mut hearing = Hearing::new(worker.stdout.take().unwrap());
        let patience = Duration::from_secs(3);
        assert_eq!(hearing.line(patience).unwrap(), "one");
        assert_eq!(hearing.line(patience).unwrap(), "two");
        let begun = Instant::now();
        assert!(hearing.line(Duration::from_millis(200)).unwrap_err().to_string().contains("does not answer"));
        assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
        worker.kill().unwrap();
        worker.wait().unwrap();
        assert!(hearing.line(patience).unwrap_err().to_string().contains("has ended"));
    }
}
