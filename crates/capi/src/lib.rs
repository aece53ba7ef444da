//! The C ABI: partitions as descriptors, ranges as pointer and size. `include/pagefold.h` is made from this file,
//! `man/pagefold.3` explains it.
//!
//! Functions return 0 or a descriptor, or one of the negative numbers of [`pagefold_error`]; [`pagefold_last_error`]
//! says in words what went wrong in the calling thread.
#![allow(non_camel_case_types, reason = "names of a C header")]

use std::cell::RefCell;
use std::collections::HashMap;
use std::error::Error as _;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use pagefold::{ADDRESS_END, Error, Flags, MergeReport, Partition, Range, whole_pages_at};

/// Members do not trust each other: every run of pages lies in a sealed file of its own.
pub const PAGEFOLD_STRICT: c_uint = 1;
/// The callers vouch that nobody else holds references to the pages that they merge.
pub const PAGEFOLD_VOUCH: c_uint = 2;

/// What the functions return when they fail.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum pagefold_error {
    /// An argument makes no sense: no such partition, a null pointer, an unknown flag, or a range in which something is
    /// not private memory of the process's: a hole, a shared mapping, a file.
    PAGEFOLD_E_INVALID = -1,
    /// The descriptor is no partition's.
    PAGEFOLD_E_NOT_A_PARTITION = -2,
    /// The process that serves the partition has ended.
    PAGEFOLD_E_ENDED = -3,
    /// userfaultfd is not permitted, or cannot move pages: pagefold_merge_quiescent works without.
    PAGEFOLD_E_NO_USERFAULTFD = -4,
    /// The C library of this process is not understood, or no code can be loaded.
    PAGEFOLD_E_NO_AGENT = -5,
    /// The process has an agent, or merges in another partition. Or its helper is not there: another thread takes the
    /// process out of the partition, or the machine is slow. Then try again.
    PAGEFOLD_E_BUSY = -6,
    /// The broker does not let this process in, or may not read it.
    PAGEFOLD_E_DENIED = -7,
    /// Memory, descriptors, processes or ranges have run out.
    PAGEFOLD_E_LIMIT = -8,
    /// Anything else.
    PAGEFOLD_E_OTHER = -9,
}
use pagefold_error::*;

/// What a call did. Counts of pages but where a unit is named.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct pagefold_report {
    /// Looked at.
    pub pages_scanned: u64,
    /// Of the caller, the store's now.
    pub pages_merged: u64,
    /// Of the caller, zeros that were given back.
    pub zero_pages: u64,
    /// Of other processes, merged with the caller's.
    pub pages_merged_elsewhere: u64,
    /// Got their own copies back.
    pub pages_unmerged: u64,
    /// Had an equal partner and were left as they were.
    pub pages_refused: u64,
    /// Bytes of the caller that are no longer its own.
    pub bytes_merged: u64,
    /// How long it took, in nanoseconds.
    pub elapsed_ns: u64,
    /// CPU time, in nanoseconds.
    pub cpu_ns: u64,
}

impl From<&MergeReport> for pagefold_report {
    fn from(report: &MergeReport) -> Self {
        let nanoseconds = |time: std::time::Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        Self {
            pages_scanned: report.pages_scanned,
            pages_merged: report.pages_merged,
            zero_pages: report.zero_pages,
            pages_merged_elsewhere: report.pages_merged_elsewhere,
            pages_unmerged: report.pages_unmerged,
            pages_refused: report.pages_refused(),
            bytes_merged: report.bytes_merged(),
            elapsed_ns: nanoseconds(report.elapsed),
            cpu_ns: nanoseconds(report.cpu),
        }
    }
}

/// Partitions by their descriptors.
static OPEN: Mutex<Option<HashMap<RawFd, Arc<Partition>>>> = Mutex::new(None);

thread_local! {
    static LAST: RefCell<CString> = RefCell::new(CString::default());
}

/// Opens a new partition, which this process serves. `name` is for reports. Returns its descriptor, closed on exec,
/// which is to be closed by pagefold_close only.
///
/// # Safety
/// `name` is a string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pagefold_open(name: *const c_char, flags: c_uint) -> c_int {
    let Some(flags) = Flags::from_bits(flags).filter(|_| !name.is_null()) else {
        return fail_with(PAGEFOLD_E_INVALID, "no name, or an unknown flag");
    };
    // SAFETY: the caller passes a string.
    let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
    match Partition::open(&name, flags) {
        Ok(partition) => keep(partition),
        Err(error) => fail(&error),
    }
}

/// Joins the partition whose descriptor this is: inherited, or received over a socket. Takes the descriptor over and
/// returns it.
///
/// # Safety
/// The descriptor belongs to the caller, who leaves it to this library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pagefold_join(fd: c_int) -> c_int {
    if fd < 0 {
        return fail_with(PAGEFOLD_E_INVALID, "no descriptor");
    }
    // SAFETY: the caller leaves it to us.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    match Partition::from_fd(fd) {
        Ok(partition) => keep(partition),
        Err(error) => fail(&error),
    }
}

/// Merges a range now; other threads may use it meanwhile. Only whole pages inside the range are merged, and never the
/// last of them. All of it must be mapped, as private memory; otherwise nothing is done. `report` may be null.
///
/// # Safety
/// The range is memory of the caller's, and mapping calls on it go through the C library. `report` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pagefold_merge(
    partition: c_int,
    start: *const c_void,
    size: usize,
    report: *mut pagefold_report,
) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { with_range(partition, start, size, report, Partition::merge) }
}

/// Merges a range in the calling thread. Needs no userfaultfd. The first process with a page makes it known, the
/// second one's is merged, the first one's at its next call.
///
/// # Safety
/// As pagefold_merge, and until this returns nothing writes the range or changes its mapping.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pagefold_merge_quiescent(
    partition: c_int,
    start: *const c_void,
    size: usize,
    report: *mut pagefold_report,
) -> c_int {
    // SAFETY: the caller's promise.
    let merge = |partition: &Partition, range| unsafe { partition.merge_quiescent(range) };
    // SAFETY: the caller's promise.
    unsafe { with_range(partition, start, size, report, merge) }
}

/// Gives a range its own pages back. `report` may be null.
///
/// # Safety
/// `report` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pagefold_unmerge(
    partition: c_int,
    start: *const c_void,
    size: usize,
    report: *mut pagefold_report,
) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { with_range(partition, start, size, report, Partition::unmerge) }
}

/// Gives everything that this process handed over its own pages back and takes it out of the partition.
#[unsafe(no_mangle)]
pub extern "C" fn pagefold_leave(partition: c_int) -> c_int {
    match find(partition) {
        Ok(partition) => partition.leave().map_or_else(|error| fail(&error), |_| 0),
        Err(code) => code,
    }
}

/// Closes a partition. If this process serves it, it ends; what is merged stays merged.
#[unsafe(no_mangle)]
pub extern "C" fn pagefold_close(partition: c_int) -> c_int {
    let removed = table(|open| open.remove(&partition));
    if removed.is_some() { 0 } else { fail_with(PAGEFOLD_E_INVALID, "no such partition") }
}

/// A short text for a number that one of these functions returned. Static.
#[unsafe(no_mangle)]
pub extern "C" fn pagefold_strerror(error: c_int) -> *const c_char {
    let text = match error {
        0.. => c"success",
        -1 => c"invalid argument",
        -2 => c"not a partition's descriptor",
        -3 => c"the process that serves the partition has ended",
        -4 => c"userfaultfd is not available",
        -5 => c"no gate can be set up in this process",
        -6 => c"the process has an agent or another partition already, or its helper is not there",
        -7 => c"not permitted by the partition's broker",
        -8 => c"a limit was met",
        _ => c"failed",
    };
    text.as_ptr()
}

/// What went wrong in the last call of this thread that failed, with its cause and the way out. Valid until the
/// thread's next call.
#[unsafe(no_mangle)]
pub extern "C" fn pagefold_last_error() -> *const c_char {
    LAST.with_borrow(|text| text.as_ptr())
}

/// # Safety
/// As for the functions that use it.
unsafe fn with_range(
    partition: c_int,
    start: *const c_void,
    size: usize,
    report: *mut pagefold_report,
    what: impl FnOnce(&Partition, Range) -> Result<MergeReport, Error>,
) -> c_int {
    let partition = match find(partition) {
        Ok(partition) => partition,
        Err(code) => return code,
    };
    let (first, size) = (start.addr() as u64, size as u64);
    if start.is_null() || first.checked_add(size).is_none_or(|end| end > ADDRESS_END) {
        return fail_with(PAGEFOLD_E_INVALID, "the range does not lie in the address space");
    }
    let done = match whole_pages_at(first, size) {
        Some(range) => what(&partition, range),
        None => Ok(MergeReport::default()),
    };
    match done {
        Ok(done) => {
            if !report.is_null() {
                // SAFETY: the caller passes a writable report.
                unsafe { report.write(pagefold_report::from(&done)) };
            }
            0
        }
        Err(error) => fail(&error),
    }
}

fn table<T>(with: impl FnOnce(&mut HashMap<RawFd, Arc<Partition>>) -> T) -> T {
    let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    with(open.get_or_insert_default())
}

fn keep(partition: Partition) -> c_int {
    let fd = partition.as_fd().as_raw_fd();
    table(|open| open.insert(fd, Arc::new(partition)));
    fd
}

fn find(partition: c_int) -> Result<Arc<Partition>, c_int> {
    let found = table(|open| open.get(&partition).cloned());
    found.ok_or_else(|| fail_with(PAGEFOLD_E_INVALID, "no such partition"))
}

fn fail(error: &Error) -> c_int {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    let code = match error {
        Error::NotMergeable { .. } => PAGEFOLD_E_INVALID,
        Error::NotAPartition => PAGEFOLD_E_NOT_A_PARTITION,
        Error::Ended => PAGEFOLD_E_ENDED,
        Error::NoUserfault | Error::NoMove => PAGEFOLD_E_NO_USERFAULTFD,
        Error::UnknownLibc { .. } | Error::Load(_) => PAGEFOLD_E_NO_AGENT,
        Error::AgentPresent { .. } | Error::OtherPartition | Error::HelperGone => PAGEFOLD_E_BUSY,
        Error::Rejected | Error::Unreadable { .. } | Error::HelperRefused { .. } => PAGEFOLD_E_DENIED,
        Error::NoHelper { .. } | Error::TooManyRanges { .. } | Error::NotGivenBack { .. } => PAGEFOLD_E_LIMIT,
        _ => PAGEFOLD_E_OTHER,
    };
    fail_with(code, &text)
}

fn fail_with(code: pagefold_error, text: &str) -> c_int {
    let text = CString::new(text.replace('\0', " ")).unwrap_or_default();
    LAST.with_borrow_mut(|last| *last = text);
    code as c_int
}
