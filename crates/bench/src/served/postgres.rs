//! A backend of a PostgreSQL server as a worker, spoken to in its own protocol (version 3, simple queries).
//!
//! Each backend holds the result of one query in its own memory: a cursor WITH HOLD, as sessions of applications have
//! them. Tables would lie in memory that all share. Up to PostgreSQL 15 each row has a pointer to the server's
//! book-keeping in front of it, which moves a little with each backend that was started before: whether equal rows lie in
//! equal pages is chance.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};

use super::wire::{Launcher, Wire};
use super::worker::{Proof, Sum, Worker};

/// Rows that each backend holds and others hold too, of 330 bytes or so.
const EQUAL_ROWS: u32 = 40_000;
/// All that it holds: the rows after them are its own.
const ROWS: u32 = EQUAL_ROWS + EQUAL_ROWS / 40;
/// Rows of a small request.
const FEW: u32 = 20;
/// The superuser of the server, who is nobody's user on the machine.
pub(super) const USER: &str = "bench";

/// One backend, which starts with its connection.
#[derive(Debug)]
pub(super) struct Backend {
    socket: PathBuf,
    /// Which of the backends it is.
    number: usize,
    launcher: Launcher,
    wire: Option<Wire>,
}

/// What a query returned.
#[derive(Debug)]
struct Answer {
    rows: u32,
    sum: Sum,
    /// The tag of the last command, such as `MOVE 100`.
    tag: String,
}

impl Backend {
    pub(super) fn new(socket: PathBuf, number: usize, launcher: &Launcher) -> Self {
        Self { socket, number, launcher: launcher.clone(), wire: None }
    }

    fn ask(&mut self, query: &str) -> Result<Answer> {
        let wire = self.wire.as_mut().context("it was not loaded")?;
        let mut body = query.as_bytes().to_vec();
        body.push(0);
        wire.send(b"Q")?;
        wire.send(&counted(&body))?;
        answer(wire).with_context(|| query.to_owned())
    }

    fn rewind(&mut self) -> Result<()> {
        self.ask("move absolute 0 in held").map(|_| ())
    }

    /// All rows, sent here.
    fn fetch(&mut self) -> Result<Answer> {
        self.rewind()?;
        self.ask("fetch all from held")
    }
}

impl Worker for Backend {
    fn loaded(&mut self) -> Result<String> {
        // The server refuses connections for as long as it starts.
        let mut tries = 0;
        let wire = loop {
            let mut wire = Wire::socket(&self.socket, &self.launcher)?;
            let words = format!("user\0{USER}\0database\0postgres\0\0");
            let mut body = 196_608_u32.to_be_bytes().to_vec();
            body.extend(words.as_bytes());
            wire.send(&counted(&body))?;
            match answer(&mut wire) {
                Ok(_) => break wire,
                Err(error) if tries > 300 => return Err(error),
                Err(_) => {
                    tries += 1;
                    self.launcher.alive()?;
                    std::thread::sleep(std::time::Duration::from_millis(100));
                }
            }
        };
        self.wire = Some(wire);
        self.ask("set work_mem = '256MB'")?;
        let own = self.number;
        self.ask(&format!(
            "declare held scroll cursor with hold for \
             select n, repeat(md5(case when n > {EQUAL_ROWS} then n || ' of {own}' else n::text end), 10) \
             from generate_series(1, {ROWS}) n order by n"
        ))?;
        let all = self.fetch()?;
        anyhow::ensure!(all.rows == ROWS, "it holds {} rows in place of {ROWS}", all.rows);
        Ok(all.sum.text())
    }

    fn small(&mut self, _number: u32) -> Result<bool> {
        let mut found = self.ask(&format!("fetch forward {FEW} from held"))?.rows;
        if found == 0 {
            self.rewind()?;
            found = self.ask(&format!("fetch forward {FEW} from held"))?.rows;
        }
        Ok(found == FEW)
    }

    fn all(&mut self) -> Result<bool> {
        // It goes through all rows without sending them: most of the time would be the sending.
        self.rewind()?;
        Ok(self.ask("move forward all in held")?.tag == format!("MOVE {ROWS}"))
    }

    fn check(&mut self) -> Result<Proof> {
        let all = self.fetch()?;
        Ok(Proof { digest: all.sum.text(), right: all.rows == ROWS })
    }
}

/// With its length in front, which counts itself.
fn counted(body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).expect("a query is short");
    [&length.to_be_bytes(), body].concat()
}

/// Reads up to where the server waits for a query.
fn answer(wire: &mut Wire) -> Result<Answer> {
    let mut answer = Answer { rows: 0, sum: Sum::new(), tag: String::new() };
    let mut failed = None;
    loop {
        let head = wire.exactly(5)?;
        let (kind, length) = (head[0], u32::from_be_bytes([head[1], head[2], head[3], head[4]]));
        let length = length.checked_sub(4).context("a message shorter than its length")? as usize;
        let body = wire.exactly(length)?;
        match kind {
            b'D' => {
                answer.rows += 1;
                answer.sum.add(body);
            }
            b'C' => answer.tag = text(body),
            // Fields, each with a letter in front; M is what people read.
            b'E' => {
                let fields = body.split(|byte| *byte == 0);
                let message = fields.filter_map(|field| field.strip_prefix(b"M")).map(text).next().unwrap_or_default();
                // Before there is a session, it is the last that the server says.
                if body.starts_with(b"SFATAL") {
                    bail!("PostgreSQL: {message}");
                }
                failed = Some(message);
            }
            b'Z' => break,
            b'R' if body != 0_u32.to_be_bytes() => bail!("PostgreSQL asks for a password"),
            // Parameters, keys, notices, descriptions of columns.
            _ => {}
        }
    }
    match failed {
        Some(message) => bail!("PostgreSQL: {message}"),
        None => Ok(answer),
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::served::wire::tests::connected;
    use std::io::Write as _;

    #[test]
    fn answers_are_understood() {
        let (mut wire, mut server) = connected();
        let mut say = |kind: u8, body: &[u8]| server.write_all(&[&[kind], counted(body).as_slice()].concat()).unwrap();
        say(b'R', &[0; 4]);
        say(b'D', b"one");
        say(b'D', b"two");
        say(b'C', b"FETCH 2\0");
        say(b'Z', b"I");
        say(b'E', b"SERROR\0Mno such cursor\0\0");
        say(b'Z', b"I");
        say(b'R', &[0, 0, 0, 5]);
        let found = answer(&mut wire).unwrap();
        assert_eq!((found.rows, found.tag.as_str()), (2, "FETCH 2"));
        assert_eq!(answer(&mut wire).unwrap_err().to_string(), "PostgreSQL: no such cursor");
        assert!(answer(&mut wire).unwrap_err().to_string().contains("password"));
    }
}
