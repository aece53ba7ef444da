//! What a process is (/proc/PID/status), and the system's memory (/proc/meminfo, /proc/vmstat, pressure).

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use crate::procfs::{self, ProcError};
use crate::units::{Bytes, Pid};

/// The four ids of a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ids {
    /// Real.
    pub real: u32,
    /// Effective.
    pub effective: u32,
    /// Saved.
    pub saved: u32,
    /// For file access.
    pub filesystem: u32,
}

/// /proc/PID/status, as far as it is needed. Memory figures are 0 for kernel threads and zombies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Command name, at most 15 bytes; control characters are escaped by the kernel.
    pub name: OsString,
    /// State, one letter: R, S, D, T, t, Z, X, I.
    pub state: u8,
    /// Thread group, i.e. the process.
    pub tgid: i32,
    /// The thread.
    pub pid: i32,
    /// The parent.
    pub ppid: i32,
    /// The process that traces this one, 0 for none.
    pub tracer_pid: i32,
    /// User ids.
    pub uid: Ids,
    /// Group ids.
    pub gid: Ids,
    /// Size of the address space.
    pub vm_size: Bytes,
    /// Locked memory.
    pub vm_lck: Bytes,
    /// Memory pinned by drivers.
    pub vm_pin: Bytes,
    /// Memory in use.
    pub vm_rss: Bytes,
    /// Anonymous part of it.
    pub rss_anon: Bytes,
    /// File part.
    pub rss_file: Bytes,
    /// Shared memory part.
    pub rss_shmem: Bytes,
    /// Swapped out.
    pub vm_swap: Bytes,
    /// Number of threads.
    pub threads: u32,
    /// PR_SET_NO_NEW_PRIVS.
    pub no_new_privs: bool,
    /// 0 none, 1 strict, 2 filter.
    pub seccomp: u32,
    /// Number of filters.
    pub seccomp_filters: u32,
    /// Signals that are blocked, bit 0 for the first: the mask in force.
    pub blocked: u64,
    /// Effective capabilities.
    pub cap_eff: u64,
    /// True while it dumps core.
    pub core_dumping: bool,
    /// False if PR_SET_THP_DISABLE is on.
    pub thp_enabled: bool,
    /// In how many process namespaces below that of the mounted /proc it lives: 0 if its own number is the one that is
    /// seen here.
    pub namespaces_below: usize,
}

/// Reads the status of a process or thread.
///
/// # Errors
/// [`ProcError`].
pub fn read(pid: Pid) -> Result<Status, ProcError> {
    let mut buffer = Vec::new();
    procfs::read_into(pid, "status", &mut buffer)?;
    let status = parse(&buffer);
    // Its parent is just taking note of its end: the kernel shows what is left, and that it belongs to nothing.
    if status.tgid == 0 { Err(ProcError::Gone { pid }) } else { Ok(status) }
}

/// [`Status::namespaces_below`] of a process.
///
/// # Errors
/// [`ProcError`].
pub fn namespaces_below(pid: Pid) -> Result<usize, ProcError> {
    read(pid).map(|status| status.namespaces_below)
}

fn parse(bytes: &[u8]) -> Status {
    let mut status = Status { thp_enabled: true, ..Status::default() };
    for line in procfs::lines(bytes) {
        let Some((key, value)) = procfs::field(line) else { continue };
        let number = || procfs::words(value).next().and_then(procfs::decimal).unwrap_or(0);
        let pid = || i32::try_from(number()).unwrap_or(0);
        let size = || procfs::kib(value).unwrap_or_default();
        let small = || u32::try_from(number()).unwrap_or(0);
        match key {
            b"Name" => status.name = OsStr::from_bytes(value).to_owned(),
            b"State" => status.state = value.first().copied().unwrap_or(b'?'),
            b"Tgid" => status.tgid = pid(),
            b"Pid" => status.pid = pid(),
            b"PPid" => status.ppid = pid(),
            b"TracerPid" => status.tracer_pid = pid(),
            b"Uid" => status.uid = ids(value),
            b"Gid" => status.gid = ids(value),
            b"VmSize" => status.vm_size = size(),
            b"VmLck" => status.vm_lck = size(),
            b"VmPin" => status.vm_pin = size(),
            b"VmRSS" => status.vm_rss = size(),
            b"RssAnon" => status.rss_anon = size(),
            b"RssFile" => status.rss_file = size(),
            b"RssShmem" => status.rss_shmem = size(),
            b"VmSwap" => status.vm_swap = size(),
            b"Threads" => status.threads = small(),
            b"NoNewPrivs" => status.no_new_privs = number() != 0,
            b"Seccomp" => status.seccomp = small(),
            b"Seccomp_filters" => status.seccomp_filters = small(),
            b"SigBlk" => status.blocked = procfs::hexadecimal(value).unwrap_or(0),
            b"CapEff" => status.cap_eff = procfs::hexadecimal(value).unwrap_or(0),
            b"CoreDumping" => status.core_dumping = number() != 0,
            b"THP_enabled" => status.thp_enabled = number() != 0,
            b"NSpid" => status.namespaces_below = procfs::words(value).count().saturating_sub(1),
            _ => {}
        }
    }
    status
}

fn ids(value: &[u8]) -> Ids {
    let mut words =
        procfs::words(value).map(|word| procfs::decimal(word).and_then(|id| u32::try_from(id).ok()).unwrap_or(0));
    let mut next = || words.next().unwrap_or(0);
    Ids { real: next(), effective: next(), saved: next(), filesystem: next() }
}

/// /proc/meminfo, as far as it is needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Meminfo {
    /// All memory.
    pub mem_total: Bytes,
    /// Unused memory.
    pub mem_free: Bytes,
    /// What could be had without swapping, by the kernel's estimate.
    pub mem_available: Bytes,
    /// Page cache, with shared memory.
    pub cached: Bytes,
    /// Anonymous pages; KSM pages count once.
    pub anon_pages: Bytes,
    /// Shared memory and memory files.
    pub shmem: Bytes,
    /// Kernel structures.
    pub slab: Bytes,
    /// Page tables.
    pub page_tables: Bytes,
    /// Committed address space.
    pub committed_as: Bytes,
    /// Swap there is.
    pub swap_total: Bytes,
    /// Swap that is unused.
    pub swap_free: Bytes,
}

/// Reads /proc/meminfo.
///
/// # Errors
/// [`ProcError::Read`].
pub fn meminfo() -> Result<Meminfo, ProcError> {
    let mut info = Meminfo::default();
    for line in procfs::lines(&procfs::read_system("/proc/meminfo")?) {
        let Some((key, value)) = procfs::field(line) else { continue };
        let place = match key {
            b"MemTotal" => &mut info.mem_total,
            b"MemFree" => &mut info.mem_free,
            b"MemAvailable" => &mut info.mem_available,
            b"Cached" => &mut info.cached,
            b"AnonPages" => &mut info.anon_pages,
            b"Shmem" => &mut info.shmem,
            b"Slab" => &mut info.slab,
            b"PageTables" => &mut info.page_tables,
            b"Committed_AS" => &mut info.committed_as,
            b"SwapTotal" => &mut info.swap_total,
            b"SwapFree" => &mut info.swap_free,
            _ => continue,
        };
        *place = procfs::kib(value).unwrap_or_default();
    }
    Ok(info)
}

/// A counter of /proc/vmstat, e.g. `cow_ksm`; `None` if the kernel has none of that name.
///
/// # Errors
/// [`ProcError::Read`].
pub fn vmstat(name: &str) -> Result<Option<u64>, ProcError> {
    Ok(procfs::lines(&procfs::read_system("/proc/vmstat")?).find_map(|line| {
        let mut words = procfs::words(line);
        (words.next()? == name.as_bytes()).then(|| words.next().and_then(procfs::decimal))?
    }))
}

/// Runnable threads now, and all threads (/proc/loadavg).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RunQueue {
    /// Threads that run or could run, the caller among them.
    pub runnable: u64,
    /// All threads.
    pub threads: u64,
}

/// How many threads are runnable, for whoever does not want to add to it.
///
/// # Errors
/// [`ProcError::Read`], [`ProcError::Parse`].
pub fn run_queue() -> Result<RunQueue, ProcError> {
    let path = "/proc/loadavg";
    let bytes = procfs::read_system(path)?;
    let word = procfs::words(&bytes).nth(3).unwrap_or_default();
    let mut parts = word.split(|byte| *byte == b'/').map(procfs::decimal);
    match (parts.next().flatten(), parts.next().flatten()) {
        (Some(runnable), Some(threads)) => Ok(RunQueue { runnable, threads }),
        _ => Err(ProcError::Parse { path: path.to_owned(), line: procfs::text(&bytes) }),
    }
}

/// The number that was given to a process or thread last, in this PID namespace (/proc/loadavg). It falls when numbers begin
/// anew at the lowest.
///
/// # Errors
/// [`ProcError::Read`], [`ProcError::Parse`].
pub fn last_number() -> Result<Pid, ProcError> {
    let path = "/proc/loadavg";
    let bytes = procfs::read_system(path)?;
    let number = procfs::words(&bytes).nth(4).and_then(procfs::decimal).and_then(|number| i32::try_from(number).ok());
    number.map(Pid).ok_or_else(|| ProcError::Parse { path: path.to_owned(), line: procfs::text(&bytes) })
}

/// Pressure stall information: the share of the last 10 seconds in which some thread waited.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pressure {
    /// Percent of the last 10 seconds.
    pub some_avg10: f64,
    /// Microseconds since boot.
    pub some_total: u64,
}

/// The pressure on `cpu`, `memory` or `io`; `None` where the kernel does not measure it.
///
/// # Errors
/// [`ProcError::Read`].
pub fn pressure(resource: &str) -> Result<Option<Pressure>, ProcError> {
    let path = format!("/proc/pressure/{resource}");
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EOPNOTSUPP)) => return Ok(None),
        Err(source) => return Err(ProcError::Read { path, source }),
    };
    let mut pressure = Pressure::default();
    let Some(line) = procfs::lines(&bytes).find(|line| line.starts_with(b"some ")) else { return Ok(None) };
    for word in procfs::words(line) {
        let word = String::from_utf8_lossy(word);
        match word.split_once('=') {
            Some(("avg10", value)) => pressure.some_avg10 = value.parse().unwrap_or(0.0),
            Some(("total", value)) => pressure.some_total = value.parse().unwrap_or(0),
            _ => {}
        }
    }
    Ok(Some(pressure))
}

/// The processes that there are, in the order of their numbers.
///
/// # Errors
/// [`ProcError::Read`].
pub fn processes() -> Result<Vec<Pid>, ProcError> {
    numbered("/proc").map_err(|source| ProcError::Read { path: "/proc".to_owned(), source })
}

/// The threads of a process, in the order of their numbers.
///
/// # Errors
/// [`ProcError`].
pub fn threads(pid: Pid) -> Result<Vec<Pid>, ProcError> {
    numbered(&format!("/proc/{pid}/task")).map_err(|source| ProcError::of(pid, "task", source))
}

fn numbered(path: &str) -> std::io::Result<Vec<Pid>> {
    let mut out = Vec::new();
    for entry in std::fs::read_dir(path)? {
        if let Some(number) = procfs::decimal(entry?.file_name().as_bytes()).and_then(|id| i32::try_from(id).ok()) {
            out.push(Pid(number));
        }
    }
    out.sort_unstable();
    Ok(out)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn our_own_status() {
        let status = read(Pid::this()).unwrap();
        assert_eq!((status.pid, status.tgid), (Pid::this().0, Pid::this().0));
        assert_eq!(status.uid.effective, rustix::process::geteuid().as_raw());
        assert!(status.threads >= 1 && status.vm_rss > Bytes(0) && status.ppid > 0);
        assert!(threads(Pid::this()).unwrap().contains(&Pid::this()));
        assert!(processes().unwrap().contains(&Pid::this()));
        assert!(read(Pid(i32::MAX)).unwrap_err().is_gone());
    }

    /// Seen to fail: of some processes that were ending it said that they were threads of process 0.
    #[test]
    fn who_is_being_buried_is_gone() {
        use std::sync::atomic::{AtomicI32, Ordering::SeqCst};
        let newest = AtomicI32::new(Pid::this().0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..2000 {
                    let mut child = std::process::Command::new("true").spawn().unwrap();
                    newest.store(child.id().cast_signed(), SeqCst);
                    child.wait().unwrap();
                }
                newest.store(0, SeqCst);
            });
            loop {
                match newest.load(SeqCst) {
                    0 => break,
                    pid => assert!(!read(Pid(pid)).is_ok_and(|status| status.tgid == 0), "process {pid}"),
                }
            }
        });
    }

    #[test]
    fn the_systems_memory() {
        let info = meminfo().unwrap();
        assert!(info.mem_total > info.mem_available && info.anon_pages > Bytes(0));
        assert!(vmstat("nr_anon_pages").unwrap().unwrap() > 0);
        assert_eq!(vmstat("nr_anon_page").unwrap(), None);
        let queue = run_queue().unwrap();
        assert!(queue.runnable >= 1 && queue.threads > queue.runnable);
        assert!(last_number().unwrap() > Pid(0));
        if let Some(cpu) = pressure("cpu").unwrap() {
            assert!(cpu.some_avg10 >= 0.0 && cpu.some_total > 0);
        }
        assert_eq!(pressure("nothing").unwrap(), None);
    }
}
