//! Does injection work here? Tried on a child of which the right answers are known.

use std::io::{self, PipeReader, PipeWriter, Write as _};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use super::{Call, InjectError, Options, inject};
use crate::sys;
use crate::units::Pid;

/// What the self-test came to.
#[derive(Debug)]
pub(crate) enum SelfTest {
    /// The call was made, and the child noticed nothing.
    Passed,
    /// Something else came out than should.
    Wrong(&'static str),
    /// It could not be done.
    Failed(InjectError),
    /// There is no child to try it on.
    NoChild(io::Error),
}

/// What the child is to read, and to end with.
const ANSWER: u8 = 42;

/// Makes a child that waits for a byte, runs a call in it, and sends the byte.
pub(crate) fn self_test() -> SelfTest {
    let (pipe, child) = match io::pipe().and_then(|(reader, writer)| {
        let child = wait_for_a_byte(reader, &writer)?;
        Ok((writer, child))
    }) {
        Ok(made) => made,
        Err(error) => return SelfTest::NoChild(error),
    };
    let options = Options { timeout: Duration::from_secs(2), ..Options::default() };
    let injected = inject(child, &[Call::getpid()], &options);
    let told = (&pipe).write_all(&[ANSWER]);
    // Ends the child's wait if it did not get the byte.
    drop(pipe);
    let ended = wait(child);
    match injected {
        Err(error) => SelfTest::Failed(error),
        Ok(done) if done.results != [Ok(child.0 as u64)] => SelfTest::Wrong("the call returned something else"),
        Ok(_) if told.is_err() || !ended.is_ok_and(|status| exited_with(status) == Some(ANSWER)) => {
            SelfTest::Wrong("the child did not go on as it should")
        }
        Ok(_) => SelfTest::Passed,
    }
}

fn wait_for_a_byte(reader: PipeReader, writer: &PipeWriter) -> io::Result<Pid> {
    let (here, other) = (reader.as_raw_fd(), writer.as_raw_fd());
    // SAFETY: the child makes system calls only, and ends.
    let pid = sys::check(unsafe { libc::fork() }.into())? as i32;
    if pid == 0 {
        let mut byte = 0_u8;
        // SAFETY: the descriptors are open in the child; the byte is writable and lives until the call returns.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            libc::close(other);
            let read = libc::read(here, (&raw mut byte).cast(), 1);
            libc::_exit(if read == 1 { byte.into() } else { 1 });
        }
    }
    Ok(Pid(pid))
}

fn wait(child: Pid) -> io::Result<i32> {
    let mut status = 0;
    loop {
        // SAFETY: the status is writable and lives until the call returns.
        match sys::check(unsafe { libc::waitpid(child.0, &raw mut status, 0) }.into()) {
            Ok(_) => return Ok(status),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn exited_with(status: i32) -> Option<u8> {
    libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status) as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_works_here() {
        let outcome = self_test();
        assert!(matches!(outcome, SelfTest::Passed), "{outcome:?}");
    }
}
