//! A worker as those see it who send it requests, whatever it speaks.

use anyhow::{Context as _, Result};

use super::wire::Wire;

/// What a worker says of all that it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Proof {
    /// Over everything that was loaded; always the same for one number of one program, and another for each number.
    pub(super) digest: String,
    /// What was written since is as it must be.
    pub(super) right: bool,
}

/// One worker.
pub(super) trait Worker: Send {
    /// Waits until it has loaded its data, or loads it; returns the digest.
    fn loaded(&mut self) -> Result<String>;
    /// A small request; `number` says what is read and written. Whether the answer is right.
    fn small(&mut self, number: u32) -> Result<bool>;
    /// A request that reads everything. Whether the answer is right.
    fn all(&mut self) -> Result<bool>;
    /// Everything is read and compared.
    fn check(&mut self) -> Result<Proof>;
}

/// A worker that answers a line with a line: worker.py and its likes.
#[derive(Debug)]
pub(super) struct Lines {
    wire: Wire,
    /// The sum that it said after loading.
    sum: String,
}

impl Lines {
    pub(super) fn new(wire: Wire) -> Self {
        Self { wire, sum: String::new() }
    }

    fn ask(&mut self, line: &str) -> Result<String> {
        self.wire.send(line.as_bytes())?;
        self.wire.line()
    }
}

impl Worker for Lines {
    fn loaded(&mut self) -> Result<String> {
        let line = self.wire.line()?;
        let (_, sum) = line.split_once(' ').context("a worker talks nonsense")?;
        sum.clone_into(&mut self.sum);
        Ok(line)
    }

    fn small(&mut self, number: u32) -> Result<bool> {
        Ok(self.ask(&format!("small {number}\n"))? == "ok")
    }

    fn all(&mut self) -> Result<bool> {
        Ok(self.ask("all\n")? == self.sum)
    }

    fn check(&mut self) -> Result<Proof> {
        let answer = self.ask("check\n")?;
        let (digest, word) = answer.rsplit_once(' ').context("a worker talks nonsense")?;
        Ok(Proof { digest: digest.to_owned(), right: word == "right" })
    }
}

/// A sum over what a worker has sent, of 64 bits (FNV-1a): it is to tell accidents, not attacks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sum(u64);

impl Sum {
    pub(super) fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    pub(super) fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
    }

    pub(super) fn text(self) -> String {
        format!("{:016x}", self.0)
    }
}
