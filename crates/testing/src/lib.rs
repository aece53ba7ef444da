//! What the tests of several rooms share.
//!
//! A file that is open for writing anywhere cannot be executed (ETXTBSY, `exec(2)`). A test that writes a program and
//! runs it must not write it itself: another test of the same binary may fork at that moment, and its child keeps the
//! descriptor until it executes something. Here a child process writes.
#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "for tests only")]

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

/// Writes a program that is going to be executed, with the mode that new files have.
///
/// # Panics
/// If it cannot be written.
pub fn write_program(path: impl AsRef<Path>, content: impl AsRef<[u8]>) {
    let mut writer = Command::new("sh").args(["-c", "cat >\"$0\""]).arg(path.as_ref()).stdin(Stdio::piped()).spawn();
    let writer = writer.as_mut().unwrap();
    writer.stdin.take().unwrap().write_all(content.as_ref()).unwrap();
    assert!(writer.wait().unwrap().success(), "{} cannot be written", path.as_ref().display());
}

/// Copies a program that is going to be executed, what it names if it is a symbolic link, with its mode.
///
/// # Panics
/// If it cannot be copied.
pub fn copy_program(from: impl AsRef<Path>, to: impl AsRef<Path>) {
    let copied = Command::new("cp")
        .args(["--dereference", "--preserve=mode", "--remove-destination", "--"])
        .args([from.as_ref(), to.as_ref()])
        .status();
    assert!(copied.unwrap().success(), "{} cannot be copied", from.as_ref().display());
}
