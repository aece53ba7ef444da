//! One CPU's records.

use std::fs::File;
use std::io::{self, Read as _};

use super::ring::{PageLayout, records};

/// One record: when, and what, as [`Format`](super::Format) says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// By the instance's clock, usually nanoseconds.
    pub time: u64,
    /// The event's bytes, its number first.
    pub bytes: Vec<u8>,
}

impl Record {
    /// The event's number.
    #[must_use]
    pub fn id(&self) -> Option<u16> {
        Some(u16::from_ne_bytes(self.bytes.get(..2)?.try_into().ok()?))
    }
}

/// The records of one CPU (`trace_pipe_raw`). Reading takes them out.
#[derive(Debug)]
pub struct Pipe {
    file: File,
    layout: PageLayout,
    page: Vec<u8>,
}

impl Pipe {
    pub(super) fn new(file: File, layout: PageLayout) -> Self {
        Self { file, layout, page: vec![0; layout.page_size()] }
    }

    /// Takes all records out that are there, in their order. Records of other CPUs may lie between by their time.
    ///
    /// # Errors
    /// What read(2) says.
    pub fn drain(&mut self, out: &mut Vec<Record>) -> io::Result<()> {
        loop {
            match self.file.read(&mut self.page) {
                Ok(0) => return Ok(()),
                Ok(length) => {
                    let page = &self.page[..length];
                    out.extend(records(page, self.layout).map(|(time, bytes)| Record { time, bytes: bytes.to_vec() }));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
}
