//! Files that users write for a command to read: rules, settings.

use std::fs::OpenOptions;
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use crate::summary_file::CAREFUL;

/// Such a file has no more than so many bytes: that is thousands of lines.
const MOST: u64 = 1 << 20;

/// The text of a regular file. What could have no end, or be waited for, is not read: a pipe, a device, a file that somebody
/// else makes longer all the time.
pub(crate) fn text_of(file: &Path) -> io::Result<String> {
    // A pipe that nobody writes to would be waited for when it is opened.
    let opened = OpenOptions::new().read(true).custom_flags(CAREFUL).open(file)?;
    if !opened.metadata()?.is_file() {
        return Err(io::Error::other("it must be a regular file, not a pipe, a device or a folder"));
    }
    let mut bytes = Vec::new();
    opened.take(MOST + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MOST {
        return Err(io::Error::other(format!("it has more than {MOST} bytes")));
    }
    String::from_utf8(bytes).map_err(io::Error::other)
}
