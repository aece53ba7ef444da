//! A redis server as a worker, spoken to in its own protocol (RESP 2).

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail, ensure};

use super::wire::{Launcher, Wire};
use super::worker::{Proof, Sum, Worker};

/// Keys that every server holds with the same values.
const KEYS: u32 = 10_000;
/// Keys after them whose values no other server holds.
const OWN: u32 = KEYS / 40;
/// Keys for one command, where several are read or written.
const BATCH: u32 = 250;
/// Keys that are counted up.
const COUNTERS: u32 = 1000;

/// One server, to which a connection is made when it is first needed.
#[derive(Debug)]
pub(super) struct Redis {
    socket: PathBuf,
    /// Which of the servers it is.
    server: usize,
    launcher: Launcher,
    wire: Option<Wire>,
    /// How often each counter was raised.
    raised: Vec<u32>,
}

impl Redis {
    pub(super) fn new(socket: PathBuf, server: usize, launcher: &Launcher) -> Self {
        Self { socket, server, launcher: launcher.clone(), wire: None, raised: vec![0; COUNTERS as usize] }
    }

    fn wire(&mut self) -> Result<&mut Wire> {
        self.wire.as_mut().context("it was not loaded")
    }

    fn ask(&mut self, words: &[&str]) -> Result<Option<Vec<u8>>> {
        let wire = self.wire()?;
        wire.send(&command(words))?;
        value(wire)
    }

    /// Reads all keys; the sum over them, and whether each is right.
    fn read(&mut self) -> Result<(Sum, bool)> {
        let server = self.server;
        let wire = self.wire()?;
        let (mut sum, mut right) = (Sum::new(), true);
        for from in (0..KEYS + OWN).step_by(BATCH as usize) {
            let keys: Vec<String> = (from..from + BATCH).map(key).collect();
            let words: Vec<&str> = std::iter::once("MGET").chain(keys.iter().map(String::as_str)).collect();
            wire.send(&command(&words))?;
            let line = wire.line()?;
            ensure!(line == format!("*{BATCH}"), "redis answered {line}");
            for number in from..from + BATCH {
                let found = value(wire)?.unwrap_or_default();
                sum.add(&found[..found.len().min(64)]);
                right &= found == content(server, number).as_bytes();
            }
        }
        Ok((sum, right))
    }
}

impl Worker for Redis {
    fn loaded(&mut self) -> Result<String> {
        let mut wire = Wire::socket(&self.socket, &self.launcher)?;
        for from in (0..KEYS + OWN).step_by(BATCH as usize) {
            let mut bytes = Vec::new();
            for number in from..from + BATCH {
                bytes.extend(command(&["SET", &key(number), &content(self.server, number)]));
            }
            wire.send(&bytes)?;
            for _ in 0..BATCH {
                value(&mut wire)?;
            }
        }
        self.wire = Some(wire);
        let (sum, right) = self.read()?;
        ensure!(right, "redis does not hold what it was sent");
        Ok(sum.text())
    }

    fn small(&mut self, number: u32) -> Result<bool> {
        let place = number.wrapping_mul(7919) % (KEYS + OWN);
        let found = self.ask(&["GET", &key(place)])?;
        let counter = number % COUNTERS;
        let raised = self.ask(&["INCR", &format!("counter:{counter}")])?;
        let before = self.raised.get_mut(counter as usize).context("a counter of those that there are")?;
        *before += 1;
        Ok(found.is_some_and(|found| found == content(self.server, place).as_bytes())
            && raised == Some(before.to_string().into()))
    }

    fn all(&mut self) -> Result<bool> {
        Ok(self.read()?.1)
    }

    fn check(&mut self) -> Result<Proof> {
        let (sum, mut right) = self.read()?;
        for (counter, raised) in self.raised.clone().into_iter().enumerate() {
            let found = self.ask(&["GET", &format!("counter:{counter}")])?;
            right &= found == (raised > 0).then(|| raised.to_string().into());
        }
        Ok(Proof { digest: sum.text(), right })
    }
}

fn key(number: u32) -> String {
    format!("key:{number}")
}

/// 1500 bytes or a little more, of every key its own, and as long in every server.
fn content(server: usize, number: u32) -> String {
    let one = if number < KEYS {
        format!("value {number} of all servers, ")
    } else {
        format!("value {number} of server {server:03} alone, ")
    };
    one.repeat(1500usize.div_ceil(one.len()))
}

fn command(words: &[&str]) -> Vec<u8> {
    let mut text = format!("*{}\r\n", words.len());
    for word in words {
        text.push_str(&format!("${}\r\n{word}\r\n", word.len()));
    }
    text.into_bytes()
}

/// A value that is no list; `None` for nil.
fn value(wire: &mut Wire) -> Result<Option<Vec<u8>>> {
    let line = wire.line()?;
    let (kind, rest) = line.split_at_checked(1).context("redis says nothing")?;
    match kind {
        "+" | ":" => Ok(Some(rest.as_bytes().to_vec())),
        "$" if rest == "-1" => Ok(None),
        "$" => {
            let count: usize = rest.parse().with_context(|| format!("redis answered {line}"))?;
            let mut found = wire.exactly(count + 2)?.to_vec();
            found.truncate(count);
            Ok(Some(found))
        }
        _ => bail!("redis answered {line}"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::served::wire::tests::connected;
    use std::io::{Read as _, Write as _};

    #[test]
    fn servers_hold_the_same_and_a_fortieth_of_their_own() {
        assert_eq!((KEYS % BATCH, OWN % BATCH), (0, 0));
        assert_eq!(content(0, KEYS - 1), content(1, KEYS - 1));
        assert_ne!(content(0, KEYS), content(1, KEYS));
        assert_eq!(content(0, KEYS).len(), content(255, KEYS).len());
    }

    #[test]
    fn answers_are_understood() {
        let (mut wire, mut server) = connected();
        server.write_all(b"+OK\r\n:3\r\n$-1\r\n$4\r\na\r\nb\r\n$0\r\n\r\n-ERR no\r\n").unwrap();
        assert_eq!(value(&mut wire).unwrap().unwrap(), b"OK");
        assert_eq!(value(&mut wire).unwrap().unwrap(), b"3");
        assert_eq!(value(&mut wire).unwrap(), None);
        assert_eq!(value(&mut wire).unwrap().unwrap(), b"a\r\nb");
        assert_eq!(value(&mut wire).unwrap().unwrap(), b"");
        assert!(value(&mut wire).unwrap_err().to_string().contains("-ERR no"));
        wire.send(&command(&["GET", "key:7"])).unwrap();
        let mut sent = [0; 24];
        server.read_exact(&mut sent).unwrap();
        assert_eq!(&sent, b"*2\r\n$3\r\nGET\r\n$5\r\nkey:7\r\n");
    }
}
