//! Members for tests: processes of their own, of another user where the test runs as root.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};

/// The user that members are: nobody.
pub(crate) const NOBODY: u32 = 65534;
const SCRIPT: &str = include_str!("member.py");
const PYTHON: &str = "/usr/bin/python3";

/// A member at work.
pub(crate) struct Member {
    child: Child,
    answers: BufReader<UnixStream>,
}

impl Member {
    /// Starts a member of user `uid` that does `what` with `file`; `None`, with a word, where this machine cannot.
    pub(crate) fn start(uid: u32, what: &str, file: BorrowedFd<'_>) -> Option<Self> {
        if !std::path::Path::new(PYTHON).exists() {
            println!("skipped: {PYTHON} is missing");
            return None;
        }
        let (here, there) = UnixStream::pair().unwrap();
        let child = Command::new(PYTHON)
            .args(["-I", "-c", SCRIPT, &uid.to_string(), what])
            .stdin(file.try_clone_to_owned().unwrap())
            .stdout(OwnedFd::from(there))
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        Some(Self { child, answers: BufReader::new(here) })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The next thing it says.
    pub(crate) fn answer(&mut self) -> Option<(String, String)> {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        let (name, result) = line.trim_end().split_once('\t')?;
        Some((name.to_owned(), result.to_owned()))
    }

    /// Tells it to go on.
    pub(crate) fn go_on(&mut self) {
        self.answers.get_mut().write_all(b"g").unwrap();
    }

    /// All it has to say until it ends.
    pub(crate) fn finish(mut self) -> BTreeMap<String, String> {
        let said = std::iter::from_fn(|| self.answer()).collect();
        assert!(self.child.wait().unwrap().success(), "the member failed after {said:?}");
        said
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        // Already gone after finish().
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
