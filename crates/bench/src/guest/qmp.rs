//! QEMU's machine protocol: one JSON object a line over a socket.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

/// A connection to one QEMU, ready for commands.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
}

/// QEMU answers at once unless its main loop is stuck, as it is when its own memory stays frozen.
const PATIENCE: Duration = Duration::from_secs(30);

impl Qmp {
    /// Connects and leaves the negotiation behind.
    ///
    /// # Errors
    ///
    /// When nobody listens on the socket, or does not answer within 30 seconds.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).with_context(|| format!("connect to {}", socket.display()))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut qmp = Self { reader: BufReader::new(stream) };
        let greeting = qmp.read()?;
        if greeting.get("QMP").is_none() {
            bail!("not a QMP greeting: {greeting}");
        }
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Runs one command and returns its answer.
    ///
    /// # Errors
    ///
    /// When QEMU refuses the command, is gone, or does not answer within 30 seconds.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
        line.push('\n');
        self.reader.get_mut().write_all(line.as_bytes()).with_context(|| format!("send {command}"))?;
        loop {
            let mut answer = self.read().with_context(|| format!("answer to {command}"))?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                bail!("{command}: {error}");
            }
            // Anything else is an event.
        }
    }

    /// Asks the guest to shrink or grow to a size; it takes the guest a while. Needs the balloon of [`GuestOptions`].
    ///
    /// [`GuestOptions`]: super::GuestOptions
    ///
    /// # Errors
    ///
    /// As [`Qmp::execute`].
    pub fn balloon(&mut self, mib: u64) -> Result<()> {
        self.execute("balloon", &json!({ "value": mib << 20 })).map(|_| ())
    }

    /// The guest's size without what its balloon holds, in MiB.
    ///
    /// # Errors
    ///
    /// As [`Qmp::execute`].
    pub fn balloon_size(&mut self) -> Result<u64> {
        let answer = self.execute("query-balloon", &json!({}))?;
        Ok(answer.get("actual").and_then(Value::as_u64).context("query-balloon has no size")? >> 20)
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            bail!("QEMU closed the connection");
        }
        serde_json::from_str(&line).with_context(|| format!("not JSON: {line:?}"))
    }
}
