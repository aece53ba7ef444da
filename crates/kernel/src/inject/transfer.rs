//! Calls that move many bytes: a stop makes them return with what they have moved by then, as any signal does.
//!
//! What is moved is moved, so nobody can repair that. Programs have to expect it, and some do not: such threads are taken
//! last, and what is seen of it is counted.

use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use super::call::Call;
use super::place;
use super::restart::SYS_IO_PGETEVENTS;
use crate::units::{Pid, page_size};

/// Where such a call says how much it is to move.
enum Amount {
    /// In this argument: bytes, or messages.
    Argument(usize),
    /// In so many buffers (`struct iovec`), which are described at this address.
    Buffers { at: u64, count: u64 },
    /// In the buffers of the message (`struct msghdr`) at this address.
    Message(u64),
    /// It has moved what it was to move, and waited for something else.
    All,
}

/// UIO_MAXIOV: a call takes no more buffers.
const BUFFERS_MAX: u64 = 1024;

/// `None` for a call that does not wait for more once it has moved something.
fn amount(Call { number, arguments }: &Call) -> Option<Amount> {
    let waits_for_all = |argument: usize| arguments[argument] & u64::from(libc::MSG_WAITALL.cast_unsigned()) != 0;
    Some(match number.0 {
        libc::SYS_write | libc::SYS_sendto | libc::SYS_sendmmsg | libc::SYS_recvmmsg => Amount::Argument(2),
        libc::SYS_recvfrom if waits_for_all(3) => Amount::Argument(2),
        libc::SYS_writev | libc::SYS_vmsplice => Amount::Buffers { at: arguments[1], count: arguments[2] },
        libc::SYS_sendmsg => Amount::Message(arguments[1]),
        libc::SYS_recvmsg if waits_for_all(2) => Amount::Message(arguments[1]),
        libc::SYS_sendfile => Amount::Argument(3),
        libc::SYS_splice | libc::SYS_copy_file_range => Amount::Argument(4),
        libc::SYS_tee => Amount::Argument(2),
        libc::SYS_getrandom => Amount::Argument(1),
        // Events; one is waited for by most.
        libc::SYS_io_getevents | SYS_IO_PGETEVENTS if arguments[1] > 1 => Amount::Argument(1),
        // It says what it has submitted, whether or not it has waited for completions to the end.
        libc::SYS_io_uring_enter if arguments[1] > 0 && arguments[2] > 0 => Amount::All,
        _ => return None,
    })
}

/// True if a thread that waits in this call may be in the middle of its bytes.
pub(super) fn transfers(call: &Call) -> bool {
    amount(call).is_some()
}

/// How much a call reads that waits for nothing, but that a device may break off between two pages, as /dev/zero and
/// /dev/urandom do.
fn copied(Call { number, arguments }: &Call) -> Option<Amount> {
    match number.0 {
        libc::SYS_read | libc::SYS_pread64 => Some(Amount::Argument(2)),
        libc::SYS_readv | libc::SYS_preadv | libc::SYS_preadv2 => {
            Some(Amount::Buffers { at: arguments[1], count: arguments[2] })
        }
        _ => None,
    }
}

/// True if a descriptor of a thread is a character device that gives as much as is asked for: a terminal gives a line.
fn is_device(tid: Pid, descriptor: u64) -> bool {
    // The kernel takes the lower half.
    let Ok(meta) = std::fs::metadata(format!("/proc/{tid}/fd/{}", descriptor as u32)) else { return false };
    meta.file_type().is_char_device() && !is_terminal(meta.rdev())
}

fn is_terminal(device: u64) -> bool {
    let (major, minor) = (libc::major(device), libc::minor(device));
    // Consoles, and the slaves of pseudo-terminals, which sysfs does not know; serial lines it knows.
    if matches!(major, 4 | 5 | 136..=143) {
        return true;
    }
    let subsystem = std::fs::read_link(format!("/sys/dev/char/{major}:{minor}/subsystem"));
    subsystem.is_ok_and(|link| link.file_name() == Path::new("tty").file_name())
}

/// True if a call of a stopped thread returned with less than it was asked for.
pub(super) fn broke_off(tid: Pid, call: &Call, result: i64) -> bool {
    let read = |address| place::two_words(tid, address);
    is_short(call, result, read, |descriptor| is_device(tid, descriptor))
}

/// True if a call returned with less than it was asked for. `read` reads two words of the process, `is_device` tells
/// whether a descriptor of it is a device that gives what it is asked for.
fn is_short(call: &Call, result: i64, read: impl Fn(u64) -> Option<[i64; 2]>, is_device: impl Fn(u64) -> bool) -> bool {
    let Ok(moved @ 1..) = u64::try_from(result) else { return false };
    let words = |at: u64| read(at).map(|words| words.map(i64::cast_unsigned));
    let buffers = |at: u64, count: u64| {
        let lengths = (0..count.min(BUFFERS_MAX)).map_while(|index| Some(words(at.checked_add(16 * index)?)?[1]));
        lengths.fold(0, u64::saturating_add)
    };
    let total = |amount: Amount| match amount {
        Amount::Argument(argument) => call.arguments[argument],
        Amount::All => u64::MAX,
        Amount::Buffers { at, count } => buffers(at, count),
        Amount::Message(at) => at.checked_add(16).and_then(words).map_or(0, |[at, count]| buffers(at, count)),
    };
    if let Some(wanted) = amount(call) {
        return moved < total(wanted);
    }
    let Some(wanted) = copied(call).map(total) else { return false };
    // Less than a page is not broken off.
    moved < wanted && wanted > page_size() && is_device(call.arguments[0])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inject::call::CallNumber;

    fn call(number: i64, arguments: [u64; 6]) -> Call {
        Call { number: CallNumber(number), arguments }
    }

    #[test]
    fn what_is_asked_for_is_found_in_registers_and_behind_pointers() {
        let (nothing, no) = (|_| None, |_| false);
        let write = call(libc::SYS_write, [1, 2, 1000, 0, 0, 0]);
        assert!(transfers(&write) && is_short(&write, 999, nothing, no));
        assert!(
            !is_short(&write, 1000, nothing, no)
                && !is_short(&write, 0, nothing, no)
                && !is_short(&write, -512, nothing, no)
        );
        // Two buffers of 100 bytes at 0x100, a message at 0x200 that names them.
        let memory = |at| match at {
            0x100 | 0x110 => Some([0x5000, 100]),
            0x210 => Some([0x100, 2]),
            _ => None,
        };
        let writev = call(libc::SYS_writev, [1, 0x100, 2, 0, 0, 0]);
        assert!(is_short(&writev, 199, memory, no) && !is_short(&writev, 200, memory, no));
        let sendmsg = call(libc::SYS_sendmsg, [1, 0x200, 0, 0, 0, 0]);
        assert!(is_short(&sendmsg, 199, memory, no) && !is_short(&sendmsg, 200, memory, no));
        assert!(!is_short(&sendmsg, 199, nothing, no));
    }

    #[test]
    fn who_waits_for_anything_moves_all_of_it_at_once() {
        let all = libc::MSG_WAITALL as u64;
        assert!(!transfers(&call(libc::SYS_read, [0, 0, 1000, 0, 0, 0])));
        assert!(!transfers(&call(libc::SYS_recvfrom, [0, 0, 1000, 0, 0, 0])));
        assert!(transfers(&call(libc::SYS_recvfrom, [0, 0, 1000, all, 0, 0])));
        assert!(transfers(&call(libc::SYS_recvmsg, [0, 0, all, 0, 0, 0])));
        assert!(!transfers(&call(libc::SYS_io_getevents, [0, 1, 8, 0, 0, 0])));
        assert!(transfers(&call(SYS_IO_PGETEVENTS, [0, 2, 8, 0, 0, 0])));
        assert!(transfers(&call(libc::SYS_copy_file_range, [3, 0, 4, 0, 1 << 20, 0])));
        let submits = call(libc::SYS_io_uring_enter, [3, 1, 1, 1, 0, 0]);
        assert!(transfers(&submits) && is_short(&submits, 1, |_| None, |_| false));
        assert!(!transfers(&call(libc::SYS_io_uring_enter, [3, 0, 1, 1, 0, 0])));
    }

    #[test]
    fn a_device_is_broken_off_between_pages() {
        let (nothing, memory) = (|_| None, |at| (at == 0x100).then_some([0x5000, 3 << 12]));
        let (device, other) = (|descriptor| descriptor == 3, |_| false);
        let much = 3 * page_size();
        for number in [libc::SYS_read, libc::SYS_pread64] {
            let read = call(number, [3, 0, much, 0, 0, 0]);
            assert!(is_short(&read, 4096, nothing, device) && !is_short(&read, 4096, nothing, other));
            assert!(!is_short(&read, much.cast_signed(), nothing, device) && !is_short(&read, 0, nothing, device));
            assert!(!is_short(&call(number, [3, 0, 100, 0, 0, 0]), 50, nothing, device));
        }
        for number in [libc::SYS_readv, libc::SYS_preadv, libc::SYS_preadv2] {
            assert!(is_short(&call(number, [3, 0x100, 1, 0, 0, 0]), 4096, memory, device) == (page_size() < 3 << 12));
        }
    }

    #[test]
    fn devices_are_told_from_terminals_and_files() {
        use std::os::fd::AsRawFd as _;
        let is_ours = |path: &str| {
            let Ok(file) = std::fs::File::open(path) else { return None };
            Some(is_device(Pid::this(), u64::from(file.as_raw_fd().cast_unsigned())))
        };
        for (path, known) in
            [("/dev/zero", true), ("/dev/urandom", true), ("/dev/ptmx", false), ("/proc/self/maps", false)]
        {
            assert_eq!(is_ours(path).unwrap_or(known), known, "{path}");
        }
        assert!(!is_device(Pid::this(), u64::MAX));
    }
}
