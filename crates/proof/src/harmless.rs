//! Calls that code outside libc may make by itself: a list of what is allowed, each group with its reason.
//!
//! A number that is on neither list is not known to be harmless, and that is what is said of it. For the gate inside libc
//! it is the other way round ([`changes_mappings`](crate::changes_mappings)): libc is known.

use crate::numbers::{IOCTL, PRCTL};

/// Calls that are harmless for one reason.
struct Group {
    why: &'static str,
    calls: &'static [(u32, &'static str)],
}

const GROUPS: &[Group] = &[
    Group {
        why: "moves bytes between files and memory by ordinary accesses, which wait on a frozen page like any other",
        calls: &[
            (0, "read"),
            (1, "write"),
            (17, "pread64"),
            (18, "pwrite64"),
            (19, "readv"),
            (20, "writev"),
            (40, "sendfile"),
            (295, "preadv"),
            (296, "pwritev"),
            (326, "copy_file_range"),
            (327, "preadv2"),
            (328, "pwritev2"),
        ],
    },
    Group {
        why: "opens, names, describes or changes files and descriptors; what is mapped of them stays",
        calls: &[
            (2, "open"),
            (3, "close"),
            (4, "stat"),
            (5, "fstat"),
            (6, "lstat"),
            (8, "lseek"),
            (21, "access"),
            (22, "pipe"),
            (32, "dup"),
            (33, "dup2"),
            (72, "fcntl"),
            (73, "flock"),
            (74, "fsync"),
            (75, "fdatasync"),
            (76, "truncate"),
            (77, "ftruncate"),
            (78, "getdents"),
            (79, "getcwd"),
            (80, "chdir"),
            (81, "fchdir"),
            (82, "rename"),
            (83, "mkdir"),
            (84, "rmdir"),
            (85, "creat"),
            (86, "link"),
            (87, "unlink"),
            (88, "symlink"),
            (89, "readlink"),
            (90, "chmod"),
            (91, "fchmod"),
            (92, "chown"),
            (93, "fchown"),
            (94, "lchown"),
            (95, "umask"),
            (137, "statfs"),
            (138, "fstatfs"),
            (187, "readahead"),
            (217, "getdents64"),
            (221, "fadvise64"),
            (253, "inotify_init"),
            (254, "inotify_add_watch"),
            (255, "inotify_rm_watch"),
            (257, "openat"),
            (258, "mkdirat"),
            (260, "fchownat"),
            (262, "newfstatat"),
            (263, "unlinkat"),
            (264, "renameat"),
            (265, "linkat"),
            (266, "symlinkat"),
            (267, "readlinkat"),
            (268, "fchmodat"),
            (269, "faccessat"),
            (277, "sync_file_range"),
            (280, "utimensat"),
            (285, "fallocate"),
            (292, "dup3"),
            (293, "pipe2"),
            (294, "inotify_init1"),
            (316, "renameat2"),
            (319, "memfd_create"),
            (332, "statx"),
            (436, "close_range"),
            (437, "openat2"),
            (439, "faccessat2"),
        ],
    },
    Group {
        why: "talks over sockets; what zero copy holds on to is a reference to a page, which the reference check sees",
        calls: &[
            (41, "socket"),
            (42, "connect"),
            (43, "accept"),
            (44, "sendto"),
            (45, "recvfrom"),
            (46, "sendmsg"),
            (47, "recvmsg"),
            (48, "shutdown"),
            (49, "bind"),
            (50, "listen"),
            (51, "getsockname"),
            (52, "getpeername"),
            (53, "socketpair"),
            (54, "setsockopt"),
            (288, "accept4"),
            (299, "recvmmsg"),
            (307, "sendmmsg"),
        ],
    },
    Group {
        why: "waits, or wakes who waits; a futex is a word of memory, and no mapping",
        calls: &[
            (7, "poll"),
            (23, "select"),
            (24, "sched_yield"),
            (34, "pause"),
            (35, "nanosleep"),
            (202, "futex"),
            (213, "epoll_create"),
            (230, "clock_nanosleep"),
            (232, "epoll_wait"),
            (233, "epoll_ctl"),
            (270, "pselect6"),
            (271, "ppoll"),
            (281, "epoll_pwait"),
            (284, "eventfd"),
            (290, "eventfd2"),
            (291, "epoll_create1"),
            (441, "epoll_pwait2"),
            (449, "futex_waitv"),
        ],
    },
    Group {
        why: "tells or sets the time",
        calls: &[
            (36, "getitimer"),
            (37, "alarm"),
            (38, "setitimer"),
            (96, "gettimeofday"),
            (201, "time"),
            (222, "timer_create"),
            (223, "timer_settime"),
            (224, "timer_gettime"),
            (225, "timer_getoverrun"),
            (226, "timer_delete"),
            (228, "clock_gettime"),
            (229, "clock_getres"),
            (283, "timerfd_create"),
            (286, "timerfd_settime"),
            (287, "timerfd_gettime"),
        ],
    },
    Group {
        why: "sends, takes or masks signals",
        calls: &[
            (13, "rt_sigaction"),
            (14, "rt_sigprocmask"),
            (15, "rt_sigreturn"),
            (62, "kill"),
            (127, "rt_sigpending"),
            (128, "rt_sigtimedwait"),
            (129, "rt_sigqueueinfo"),
            (130, "rt_sigsuspend"),
            (131, "sigaltstack"),
            (200, "tkill"),
            (234, "tgkill"),
            (282, "signalfd"),
            (289, "signalfd4"),
            (297, "rt_tgsigqueueinfo"),
            (424, "pidfd_send_signal"),
            (434, "pidfd_open"),
        ],
    },
    Group {
        why: "asks about the process, its threads, user or limits",
        calls: &[
            (39, "getpid"),
            (61, "wait4"),
            (63, "uname"),
            (97, "getrlimit"),
            (98, "getrusage"),
            (99, "sysinfo"),
            (100, "times"),
            (102, "getuid"),
            (104, "getgid"),
            (107, "geteuid"),
            (108, "getegid"),
            (110, "getppid"),
            (111, "getpgrp"),
            (115, "getgroups"),
            (118, "getresuid"),
            (120, "getresgid"),
            (121, "getpgid"),
            (124, "getsid"),
            (140, "getpriority"),
            (143, "sched_getparam"),
            (145, "sched_getscheduler"),
            (146, "sched_get_priority_max"),
            (147, "sched_get_priority_min"),
            (186, "gettid"),
            (203, "sched_setaffinity"),
            (204, "sched_getaffinity"),
            (247, "waitid"),
            (309, "getcpu"),
            (318, "getrandom"),
            (324, "membarrier"),
        ],
    },
    Group {
        why: "ends the thread or the process, or leaves the address space as a whole",
        calls: &[(59, "execve"), (60, "exit"), (231, "exit_group"), (322, "execveat")],
    },
];

/// What `ioctl` may be asked for: terminals, flags of descriptors, bytes that wait. Other requests reach userfaultfd and
/// a thousand drivers.
const REQUESTS: &[u32] = &[
    0x5401,      // TCGETS
    0x5402,      // TCSETS
    0x5403,      // TCSETSW
    0x5404,      // TCSETSF
    0x540f,      // TIOCGPGRP
    0x5410,      // TIOCSPGRP
    0x5411,      // TIOCOUTQ
    0x5413,      // TIOCGWINSZ
    0x5414,      // TIOCSWINSZ
    0x541b,      // FIONREAD
    0x5421,      // FIONBIO
    0x5450,      // FIONCLEX
    0x5451,      // FIOCLEX
    0x5452,      // FIOASYNC
    0x4004_9409, // FICLONE
    0x4020_940d, // FICLONERANGE
    0x8008_6601, // FS_IOC_GETFLAGS
    0x4008_6602, // FS_IOC_SETFLAGS
];

/// What `prctl` may be asked for: names of threads, and what the process is told or tells.
const OPTIONS: &[u32] = &[
    1,           // PR_SET_PDEATHSIG
    2,           // PR_GET_PDEATHSIG
    3,           // PR_GET_DUMPABLE
    15,          // PR_SET_NAME
    16,          // PR_GET_NAME
    23,          // PR_CAPBSET_READ
    29,          // PR_SET_TIMERSLACK
    30,          // PR_GET_TIMERSLACK
    39,          // PR_GET_NO_NEW_PRIVS
    0x5961_6d61, // PR_SET_PTRACER
];

/// Why a call with this number cannot touch mappings, whatever its arguments; `None` if it could or nobody has looked.
#[must_use]
pub fn why_harmless(number: u32) -> Option<&'static str> {
    GROUPS.iter().find(|group| group.calls.iter().any(|call| call.0 == number)).map(|group| group.why)
}

/// The kernel's name of a number on the list.
pub(crate) fn name(number: u32) -> Option<&'static str> {
    GROUPS.iter().flat_map(|group| group.calls).find(|call| call.0 == number).map(|call| call.1)
}

/// Is a call with this number harmless for what it is asked for?
pub(crate) fn is_harmless_request(number: u32, requests: &[u32]) -> bool {
    let allowed = match number {
        IOCTL => REQUESTS,
        PRCTL => OPTIONS,
        _ => return false,
    };
    !requests.is_empty() && requests.iter().all(|request| allowed.contains(request))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numbers::changes_mappings;

    #[test]
    fn nothing_is_both_harmless_and_gated() {
        for number in 0..1024 {
            assert!(why_harmless(number).is_none() || !changes_mappings(number), "{number}");
        }
        assert_eq!(why_harmless(0x4000_0000), None, "the x32 table");
    }

    #[test]
    fn every_number_stands_once() {
        let mut numbers: Vec<u32> = GROUPS.iter().flat_map(|group| group.calls).map(|call| call.0).collect();
        let all = numbers.len();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), all);
    }
}
