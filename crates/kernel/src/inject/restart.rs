//! Calls that a mere stop breaks: they return EINTR where others are made again by the kernel.
//!
//! signal(7) lists them. To the program the stop never happened, so they must go on, and those with a time-out must end
//! when they would have ended: one that began anew at each injection could be put off for ever. Calls that have done
//! something when they return EINTR are not in here: close, for one, has closed.

use std::time::Duration;

use super::call::Call;

/// Not in the libc crate.
#[cfg(target_arch = "x86_64")]
pub(super) const SYS_IO_PGETEVENTS: i64 = 333;
#[cfg(not(target_arch = "x86_64"))]
pub(super) const SYS_IO_PGETEVENTS: i64 = 292;

/// Where a call has its time-out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TimeOut {
    /// Milliseconds in this argument; negative for none.
    Milliseconds(usize),
    /// This argument points to a `struct timespec` that the kernel reads only; null for none.
    Timespec(usize),
}

/// How a call goes on that returned EINTR because its thread was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Interrupted {
    /// It begins again, and nobody can tell.
    Again,
    /// It begins again; if its socket has a time-out (SO_RCVTIMEO, SO_SNDTIMEO) that begins again too.
    AgainHidden,
    /// It begins again with the time that is left.
    Limited {
        /// Where.
        time_out: TimeOut,
        /// All of the time.
        total: Duration,
    },
    /// It is not known to bear that.
    Leave,
}

/// Where the calls that are broken by a stop have their time-out.
pub(super) fn time_out(number: i64) -> Option<TimeOut> {
    #[cfg(target_arch = "x86_64")]
    if number == libc::SYS_epoll_wait {
        return Some(TimeOut::Milliseconds(3));
    }
    Some(match number {
        libc::SYS_epoll_pwait => TimeOut::Milliseconds(3),
        libc::SYS_epoll_pwait2 | libc::SYS_semtimedop => TimeOut::Timespec(3),
        libc::SYS_rt_sigtimedwait => TimeOut::Timespec(2),
        libc::SYS_io_getevents | SYS_IO_PGETEVENTS => TimeOut::Timespec(4),
        // Only where the rest of the time could not be written back, into read-only memory.
        libc::SYS_ppoll => TimeOut::Timespec(2),
        libc::SYS_pselect6 => TimeOut::Timespec(4),
        _ => return None,
    })
}

/// True for a call that the kernel makes again by itself, with all of its time.
pub(super) fn begins_anew(number: i64) -> bool {
    number == SYS_IO_PGETEVENTS
}

/// True for a call that bears to be made again, if not in all of its time.
pub(super) fn may_begin_again(number: i64) -> bool {
    time_out(number).is_some() || waits_for_socket(number) || number == libc::SYS_semop
}

/// Calls that may return EINTR for a time-out that their socket has, and have done nothing then.
fn waits_for_socket(number: i64) -> bool {
    matches!(
        number,
        libc::SYS_read
            | libc::SYS_readv
            | libc::SYS_recvfrom
            | libc::SYS_recvmsg
            | libc::SYS_recvmmsg
            | libc::SYS_write
            | libc::SYS_writev
            | libc::SYS_sendto
            | libc::SYS_sendmsg
            | libc::SYS_sendmmsg
            | libc::SYS_accept
            | libc::SYS_accept4
            | libc::SYS_connect
            | libc::SYS_io_uring_enter
    )
}

/// Sorts a call that returned EINTR. `read` reads two words of the process.
pub(super) fn sort(call: &Call, read: impl FnOnce(u64) -> Option<[i64; 2]>) -> Interrupted {
    let number = call.number.0;
    match time_out(number) {
        Some(time_out @ TimeOut::Milliseconds(argument)) => match u64::try_from(call.arguments[argument] as u32 as i32)
        {
            Ok(total) => Interrupted::Limited { time_out, total: Duration::from_millis(total) },
            Err(_negative) => Interrupted::Again,
        },
        Some(time_out @ TimeOut::Timespec(argument)) => match call.arguments[argument] {
            0 => Interrupted::Again,
            address => match read(address).map(|[seconds, nanos]| (u64::try_from(seconds), u32::try_from(nanos))) {
                Some((Ok(seconds), Ok(nanos))) => Interrupted::Limited {
                    time_out,
                    total: Duration::from_secs(seconds) + Duration::from_nanos(nanos.into()),
                },
                // The call read it a moment ago; made again it finds out itself what is there now.
                _ => Interrupted::AgainHidden,
            },
        },
        None if number == libc::SYS_semop => Interrupted::Again,
        None if waits_for_socket(number) => Interrupted::AgainHidden,
        None => Interrupted::Leave,
    }
}

/// The rest of a time-out in milliseconds: rounded up, as a time-out may end late and never early.
pub(super) fn milliseconds(left: Duration) -> u64 {
    left.as_nanos().div_ceil(1_000_000).min(i32::MAX as u128) as u64
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::inject::call::CallNumber;

    fn call(number: i64, arguments: [u64; 6]) -> Call {
        Call { number: CallNumber(number), arguments }
    }

    #[test]
    fn time_outs_are_found_in_registers_and_behind_pointers() {
        let nothing = |_| panic!("nothing to read");
        let infinite = call(libc::SYS_epoll_pwait, [3, 4, 5, 0xffff_ffff, 0, 0]);
        assert_eq!(sort(&infinite, nothing), Interrupted::Again);
        let limited = call(libc::SYS_epoll_pwait, [3, 4, 5, 0xdead_0000_0000_0064, 0, 0]);
        let (time_out, total) = (TimeOut::Milliseconds(3), Duration::from_millis(100));
        assert_eq!(sort(&limited, nothing), Interrupted::Limited { time_out, total });
        let wait = call(libc::SYS_rt_sigtimedwait, [1, 0, 0x1000, 8, 0, 0]);
        let (time_out, total) = (TimeOut::Timespec(2), Duration::from_millis(1500));
        assert_eq!(
            sort(&wait, |at| (at == 0x1000).then_some([1, 500_000_000])),
            Interrupted::Limited { time_out, total }
        );
        assert_eq!(sort(&wait, |_| None), Interrupted::AgainHidden);
        let for_ever = call(libc::SYS_semtimedop, [1, 2, 3, 0, 0, 0]);
        assert_eq!(sort(&for_ever, nothing), Interrupted::Again);
        assert_eq!(sort(&call(libc::SYS_recvfrom, [0; 6]), nothing), Interrupted::AgainHidden);
        assert_eq!(sort(&call(libc::SYS_close, [0; 6]), nothing), Interrupted::Leave);
    }

    #[test]
    fn what_is_left_is_rounded_up() {
        assert_eq!(milliseconds(Duration::ZERO), 0);
        assert_eq!(milliseconds(Duration::from_nanos(1)), 1);
        assert_eq!(milliseconds(Duration::from_secs(u64::MAX)), i32::MAX as u64);
    }
}
