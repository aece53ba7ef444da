//! A network file system reads and writes by O_DIRECT: its client holds plain references to the program's pages from the
//! request until the answer, without pinning them, and writes through them when the answer arrives.
//!
//! The server is one of ours that answers late, so the pages are held for as long as it takes to try to merge them.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use pagefold::{Flags, Partition, Range};
use rustix::fs::{Mode, OFlags};
use serde::Serialize;

use super::pages::{Content, Pages, fill, size, wrong};
use super::server::{Answers, FILE_NAME, Server};

/// Threads that read or write, each a part of the buffer.
const THREADS: usize = 4;
/// Pages of a part: one request.
const PART: usize = 16;
const PAGES: usize = THREADS * PART;
/// What the buffer and its twin hold before something is read: equal, so that they can be merged.
const BEFORE: u64 = 1;
/// What the file holds.
const FILE: u64 = 2;
/// Requests for merging while pages are held.
const ASKED: usize = 3;
/// How long reads and merges go on side by side, and how late the answers come then.
const SIDE_BY_SIDE: Duration = Duration::from_secs(8);
const LATE: Answers = Answers::Within(4000);
/// A request that has not arrived by then will not.
const ARRIVED_WITHIN: Duration = Duration::from_secs(60);

/// What was seen.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// How references were checked.
    pub check: String,
    /// Pages that were held by requests while they were asked to be merged.
    pub held: u64,
    /// Pages that were merged while others were held.
    pub merged_beside: u64,
    /// Pages refused while they were held, by reason; each request for merging counts.
    pub refused: BTreeMap<String, u64>,
    /// Pages merged after their requests had been answered.
    pub merged_after: u64,
    /// Requests answered while merging went on all the time.
    pub requests: u64,
    /// Pages merged meanwhile.
    pub merged_meanwhile: u64,
    /// Pages that held something else than what had been read into them, or arrived at the server as something else than
    /// what had been written.
    pub wrong: u64,
    /// Pages that nobody read into, and that held a wrong byte.
    pub wrong_beside: u64,
}

/// Does it.
///
/// # Errors
/// When the file system cannot be mounted, for which its modules must be there, or something cannot be tried.
pub fn run(vouch: bool) -> Result<Report> {
    let server = Server::start(FILE, PAGES as u64)?;
    let mount = Mount::of(server.port())?;
    let mut stand = Stand {
        file: mount.open()?,
        server,
        partition: Partition::open("nfs", if vouch { Flags::VOUCH } else { Flags::default() })?,
        buffer: Pages::filled(PAGES, BEFORE)?,
        twin: Pages::filled(PAGES, BEFORE)?,
        read: Pages::filled(PAGES, FILE)?,
        report: Report::default(),
    };
    // First pages of the program's own, then pages of the store, of which the request gets copies.
    for _ in 0..2 {
        stand.held(Way::Read)?;
        fill(stand.buffer.bytes_mut(), BEFORE, 0);
        stand.merge()?;
    }
    fill(stand.buffer.bytes_mut(), BEFORE, 0);
    stand.held(Way::Write)?;
    stand.side_by_side()?;
    let summary = stand.partition.summary()?;
    stand.report.check = summary["check"].as_str().unwrap_or_default().to_owned();
    stand.partition.leave()?;
    Ok(stand.report)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Read,
    Write,
}

struct Stand {
    server: Server,
    file: OwnedFd,
    partition: Partition,
    /// What is read into and written from.
    buffer: Pages,
    /// What the buffer is equal to before, and afterwards.
    twin: Pages,
    read: Pages,
    report: Report,
}

impl Stand {
    fn ranges(&self) -> Result<[Range; 3]> {
        Ok([self.buffer.range()?, self.twin.range()?, self.read.range()?])
    }

    fn merge(&mut self) -> Result<u64> {
        Ok(self.partition.merge_all(&self.ranges()?)?.pages_merged)
    }

    /// Merging is asked for while all pages of the buffer wait for the server's answer.
    fn held(&mut self, way: Way) -> Result<()> {
        let ranges = self.ranges()?;
        let Self { server, file, partition, buffer, report, .. } = self;
        let file = &*file;
        server.answer(Answers::Held);
        std::thread::scope(|scope| {
            let parts = buffer.bytes_mut().chunks_exact_mut(PART * size()).enumerate();
            let threads: Vec<_> =
                parts.map(|(part, bytes)| scope.spawn(move || transfer(file, way, part, bytes))).collect();
            let mut merging = || -> Result<()> {
                server.wait_for((PAGES * size()) as u64, ARRIVED_WITHIN)?;
                report.held += PAGES as u64;
                for _ in 0..ASKED {
                    let merged = partition.merge_all(&ranges)?;
                    report.merged_beside += merged.pages_merged;
                    for (reason, pages) in merged.refused {
                        *report.refused.entry(reason).or_default() += pages;
                    }
                }
                Ok(())
            };
            let merged = merging();
            // Whatever went wrong, nobody is to wait for ever.
            server.answer(Answers::Within(0));
            for thread in threads {
                thread.join().map_err(|_panic| anyhow!("a thread that reads or writes has panicked"))??;
            }
            merged
        })?;
        match way {
            Way::Read => self.report.wrong += wrong(self.buffer.bytes(), FILE, 0),
            Way::Write => {
                let written = self.server.take_written();
                let right = |page: &u64| {
                    written.get(page).is_some_and(|bytes| Content { kind: BEFORE, page: *page }.is_on(bytes))
                };
                self.report.wrong += (0..PAGES as u64).filter(|page| !right(page)).count() as u64;
                self.report.wrong += wrong(self.buffer.bytes(), BEFORE, 0);
            }
        }
        let merged = self.merge()?;
        self.report.merged_after += merged;
        self.check_the_rest();
        if way == Way::Read {
            self.report.wrong += wrong(self.buffer.bytes(), FILE, 0);
        }
        Ok(())
    }

    /// Reads go on while merging goes on, with every chance to meet at any step.
    fn side_by_side(&mut self) -> Result<()> {
        let ranges = self.ranges()?;
        let Self { server, file, partition, buffer, report, .. } = self;
        let file = &*file;
        let before = server.requests();
        server.answer(LATE);
        let until = Instant::now() + SIDE_BY_SIDE;
        std::thread::scope(|scope| {
            let parts = buffer.bytes_mut().chunks_exact_mut(PART * size()).enumerate();
            let read_on = |part: usize, bytes: &mut [u8]| -> Result<u64> {
                let (mut lost, first) = (0, (part * PART) as u64);
                while Instant::now() < until {
                    fill(bytes, BEFORE, first);
                    transfer(file, Way::Read, part, bytes)?;
                    lost += wrong(bytes, FILE, first);
                }
                Ok(lost)
            };
            let threads: Vec<_> = parts.map(|(part, bytes)| scope.spawn(move || read_on(part, bytes))).collect();
            while Instant::now() < until {
                report.merged_meanwhile += partition.merge_all(&ranges)?.pages_merged;
            }
            for thread in threads {
                report.wrong += thread.join().map_err(|_panic| anyhow!("a thread that reads has panicked"))??;
            }
            anyhow::Ok(())
        })?;
        self.report.requests = self.server.requests() - before;
        self.check_the_rest();
        Ok(())
    }

    fn check_the_rest(&mut self) {
        self.report.wrong_beside += wrong(self.twin.bytes(), BEFORE, 0) + wrong(self.read.bytes(), FILE, 0);
    }
}

/// Reads or writes one part.
fn transfer(file: &OwnedFd, way: Way, part: usize, bytes: &mut [u8]) -> Result<()> {
    let at = (part * bytes.len()) as u64;
    let done = match way {
        Way::Read => rustix::io::pread(file, &mut *bytes, at),
        Way::Write => rustix::io::pwrite(file, bytes, at),
    };
    let done = done.with_context(|| format!("{way:?} of part {part}"))?;
    ensure!(done == bytes.len(), "{way:?} of part {part} ended after {done} bytes");
    Ok(())
}

/// The mounted file system.
struct Mount {
    folder: PathBuf,
}

impl Mount {
    fn of(port: u16) -> Result<Self> {
        let folder = std::env::temp_dir().join("pagefold-nfs");
        std::fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        // One request for each part. No daemons: neither one for locks nor one that tells ports.
        let bytes = PART * size();
        let options = format!(
            "addr=127.0.0.1,vers=3,proto=tcp,port={port},mountproto=tcp,mountport={port},nolock,noacl,\
             rsize={bytes},wsize={bytes}"
        );
        let mount = Self { folder };
        let mut command = Command::new("mount");
        command.args(["-i", "-t", "nfs", "-o", &options, "127.0.0.1:/folder"]).arg(&mount.folder);
        let output = command.output().context("run mount")?;
        if !output.status.success() {
            bail!("mount -o {options}: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(mount)
    }

    fn open(&self) -> Result<OwnedFd> {
        let flags = OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC;
        let file = self.folder.join(FILE_NAME);
        rustix::fs::open(&file, flags, Mode::empty()).with_context(|| format!("open {}", file.display()))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Left mounted it would keep the guest from its end.
        let _ = Command::new("umount").arg("-l").arg(&self.folder).status();
    }
}
