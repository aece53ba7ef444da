//! The trials, one function for each feature.

use std::io;
use std::os::fd::AsRawFd;

use rustix::io::Errno;

use super::{Feature, Name, State};
use crate::inject::{InjectError, Refusal, SelfTest, self_test};
use crate::ksm_sysfs::{self, KsmError, KsmSysfs};
use crate::maps::MapsFile;
use crate::memfd::{self, MemfdError};
use crate::own_memory::OwnMapping;
use crate::pagemap::{Category, Pagemap, PagemapError, ScanRequest};
use crate::pidfd::{Pidfd, PidfdError};
use crate::procfs::{self, ProcError};
use crate::refcheck::{self, collapse::CollapseError};
use crate::sched::{self, Policy, SchedError};
use crate::seqpacket::Seqpacket;
use crate::uffd::{CreateFlags, USERFAULTFD_DEVICE, Uffd, UffdError, UffdFeatures};
use crate::units::{Bytes, PageCount, Pid, Range, Vaddr, page_size};
use crate::{status, sys, task};

/// All features, in the order of the report.
pub(super) const NAMES: [Name; 27] = [
    Name::OwnProc,
    Name::Userfaultfd,
    Name::UserfaultfdDevice,
    Name::UffdMove,
    Name::UffdMinorShmem,
    Name::UffdWpAsync,
    Name::UffdEventFork,
    Name::PagemapScan,
    Name::ProcmapQuery,
    Name::MadvPopulateWrite,
    Name::MemfdSeals,
    Name::PidfdGetfd,
    Name::PeerPidfd,
    Name::Kcmp,
    Name::PageFrameNumbers,
    Name::CheckBpf,
    Name::CheckCollapse,
    Name::SchedFifo,
    Name::Pressure,
    Name::Ksm,
    Name::KsmWritable,
    Name::KsmPrctl,
    Name::KsmTracing,
    Name::TransparentHugepage,
    Name::MaxMapCount,
    Name::Ptrace,
    Name::Injection,
];

pub(super) fn all() -> Vec<Feature> {
    NAMES.iter().map(|name| Feature { name: *name, state: try_one(*name), needed_for: name.needed_for() }).collect()
}

fn try_one(name: Name) -> State {
    match name {
        Name::OwnProc => own_proc(),
        Name::Userfaultfd => userfaultfd(),
        Name::UserfaultfdDevice => userfaultfd_device(),
        Name::UffdMove => uffd_feature(UffdFeatures::MOVE, "6.8"),
        Name::UffdMinorShmem => uffd_feature(UffdFeatures::MINOR_SHMEM, "5.14"),
        Name::UffdWpAsync => uffd_feature(UffdFeatures::WP_ASYNC, "6.7"),
        Name::UffdEventFork => uffd_feature(UffdFeatures::EVENT_FORK, "4.11"),
        Name::PagemapScan => pagemap_scan(),
        Name::ProcmapQuery => procmap_query(),
        Name::MadvPopulateWrite => madv_populate_write(),
        Name::MemfdSeals => memfd_seals(),
        Name::PidfdGetfd => pidfd_getfd(),
        Name::PeerPidfd => peer_pidfd(),
        Name::Kcmp => kcmp(),
        Name::PageFrameNumbers => page_frame_numbers(),
        Name::CheckBpf => check_bpf(),
        Name::CheckCollapse => check_collapse(),
        Name::SchedFifo => sched_fifo(),
        Name::Pressure => pressure(),
        Name::Ksm => ksm(),
        Name::KsmWritable => ksm_writable(),
        Name::KsmPrctl => ksm_prctl(),
        Name::KsmTracing => ksm_tracing(),
        Name::TransparentHugepage => transparent_hugepage(),
        Name::MaxMapCount => max_map_count(),
        Name::Ptrace => ptrace(),
        Name::Injection => injection(),
    }
}

fn yes(detail: impl Into<String>) -> State {
    State::Yes { detail: detail.into() }
}

fn no(reason: impl Into<String>, remedy: impl Into<String>) -> State {
    State::No { reason: reason.into(), remedy: remedy.into() }
}

/// What failed in a way that says nothing about the feature. Where it was for want of something the remedy is known.
pub(super) fn unknown(error: &(dyn std::error::Error + 'static)) -> State {
    let (mut reason, mut number) = (String::new(), None);
    let mut next = Some(error);
    while let Some(inner) = next {
        let colon = if reason.is_empty() { "" } else { ": " };
        reason = format!("{reason}{colon}{inner}");
        number = inner.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error).or(number);
        next = inner.source();
    }
    let remedy = match number {
        Some(libc::EMFILE) => "a higher limit of open files (ulimit -n)",
        Some(libc::ENFILE) => "a higher fs.file-max",
        Some(libc::EAGAIN) => "a higher limit of processes (ulimit -u)",
        Some(libc::ENOMEM) => "more memory",
        _ => "",
    };
    State::Unknown { reason, remedy: remedy.to_owned() }
}

/// An own file of /proc that is not there: there is no /proc.
fn own_proc_file(error: &ProcError) -> State {
    if error.is_gone() {
        no("/proc is not mounted, or not for this process namespace", "a mounted /proc")
    } else {
        unknown(error)
    }
}

fn too_old(version: &str) -> State {
    no("this kernel does not have it", format!("Linux {version} or later"))
}

fn sysctl(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

fn own_proc() -> State {
    const REMEDY: &str = "mount -t proc proc /proc (unshare --mount-proc)";
    match procfs::shows_this_process() {
        Ok(true) => yes(""),
        Ok(false) => no("it belongs to another PID namespace", REMEDY),
        Err(error) if error.kind() == io::ErrorKind::NotFound => no("it is not mounted", REMEDY),
        Err(error) => unknown(&error),
    }
}

fn userfaultfd() -> State {
    let device = Uffd::open_device().and_then(|device| {
        use std::os::fd::AsFd;
        Uffd::from_device(device.as_fd(), CreateFlags::empty())
    });
    let setting = sysctl("/proc/sys/vm/unprivileged_userfaultfd").unwrap_or_else(|| "absent".to_owned());
    match (device, Uffd::create(CreateFlags::empty())) {
        (Ok(_), _) => yes(format!("by {USERFAULTFD_DEVICE}; vm.unprivileged_userfaultfd is {setting}")),
        (Err(_), Ok(_)) => yes(format!("by the system call; vm.unprivileged_userfaultfd is {setting}")),
        (Err(_), Err(error @ UffdError::NotPermitted { .. })) => match scarcity(&error) {
            Some(error) => unknown(&error),
            None => no(
                error.to_string(),
                format!(
                    "access to {USERFAULTFD_DEVICE} (setfacl -m u:USER:rw), or CAP_SYS_PTRACE, or \
                 sysctl vm.unprivileged_userfaultfd=1 (now {setting})"
                ),
            ),
        },
        (Err(_), Err(UffdError::NotSupported)) => {
            no("the kernel was built without userfaultfd", "a kernel with CONFIG_USERFAULTFD")
        }
        (Err(_), Err(error)) => unknown(&error),
    }
}

/// What the kernel said, if it was for want of descriptors or memory.
fn scarcity(error: &UffdError) -> Option<io::Error> {
    let UffdError::NotPermitted { device, syscall } = error else { return None };
    [*device, *syscall]
        .into_iter()
        .find(|errno| matches!(*errno, Errno::MFILE | Errno::NFILE | Errno::NOMEM))
        .map(io::Error::from)
}

fn userfaultfd_device() -> State {
    match Uffd::open_device() {
        Ok(_) => yes(""),
        Err(error) => match sys::errno(&error) {
            libc::ENOENT | libc::ENXIO | libc::ENODEV => {
                no(format!("no {USERFAULTFD_DEVICE}"), "Linux 6.1 or later, and a /dev that has it")
            }
            libc::EACCES | libc::EPERM => {
                no("this user may not open it", format!("setfacl -m u:USER:rw {USERFAULTFD_DEVICE}"))
            }
            _ => unknown(&error),
        },
    }
}

fn uffd_feature(feature: UffdFeatures, version: &str) -> State {
    let created = Uffd::create(CreateFlags::empty()).or_else(|_| Uffd::create(CreateFlags::USER_MODE_ONLY));
    let uffd = match created {
        Ok(uffd) => uffd,
        Err(error) => match scarcity(&error) {
            Some(error) => return unknown(&error),
            None => return no("no userfaultfd", "see userfaultfd"),
        },
    };
    match uffd.api(feature) {
        Ok(_) => yes(""),
        Err(UffdError::Features { source, .. }) if sys::errno(&source) == libc::EINVAL => too_old(version),
        Err(UffdError::Features { source, .. }) if sys::errno(&source) == libc::EPERM => {
            no("this user may not have it", "CAP_SYS_PTRACE, as a broker that runs as root has it")
        }
        Err(error) => unknown(&error),
    }
}

fn pagemap_scan() -> State {
    let here = Range::covering(Vaddr(1 << 20), Vaddr(1 << 20)).unwrap_or_default();
    let request = ScanRequest { mask: Category::PRESENT, ret: Category::PRESENT, ..ScanRequest::default() };
    let result =
        Pagemap::open(Pid::this()).and_then(|pagemap| pagemap.scan(here, &request, &mut Vec::with_capacity(1)));
    match result {
        Ok(_) => yes(""),
        Err(PagemapError::NotSupported) => too_old("6.7"),
        Err(error) => unknown(&error),
    }
}

fn procmap_query() -> State {
    match MapsFile::open(Pid::this()).and_then(|maps| maps.query_next(Vaddr(0))) {
        Ok(_) => yes(""),
        Err(ProcError::NotSupported { .. }) => too_old("6.11"),
        Err(error) => own_proc_file(&error),
    }
}

fn madv_populate_write() -> State {
    match OwnMapping::anonymous(PageCount(1)).and_then(|page| page.advise(libc::MADV_POPULATE_WRITE)) {
        Ok(()) => yes(""),
        Err(error) if sys::errno(&error) == libc::EINVAL => too_old("5.14"),
        Err(error) => unknown(&error),
    }
}

fn memfd_seals() -> State {
    use std::os::fd::AsFd;
    let sealed = memfd::create("pagefold-probe", Bytes(page_size())).and_then(|fd| {
        memfd::seal(fd.as_fd())?;
        memfd::is_sealed(fd.as_fd())
    });
    match sealed {
        Ok(true) => yes(""),
        Ok(false) => no("the seals do not hold", "another kernel"),
        Err(error @ MemfdError::FileSizeLimit { .. }) => {
            State::Unknown { reason: error.to_string(), remedy: "a higher file size limit (ulimit -f)".to_owned() }
        }
        Err(error) => unknown(&error),
    }
}

fn pidfd_getfd() -> State {
    let result = Pidfd::open(Pid::this()).and_then(|pidfd| {
        let (end, _other) = io::pipe().map_err(|source| PidfdError::Wait { source })?;
        pidfd.getfd(end.as_raw_fd())
    });
    match result {
        Ok(_) => yes(""),
        Err(PidfdError::GetFd { source, .. } | PidfdError::Open { source, .. })
            if sys::errno(&source) == libc::ENOSYS =>
        {
            too_old("5.6")
        }
        Err(PidfdError::GetFd { source, .. }) if sys::errno(&source) == libc::EPERM => {
            no("refused, e.g. by a container's system-call filter", "a filter that allows pidfd_getfd")
        }
        Err(error) => unknown(&error),
    }
}

fn peer_pidfd() -> State {
    match Seqpacket::pair().and_then(|(one, _other)| one.peer_pidfd()) {
        Ok(Some(_)) => yes(""),
        Ok(None) => too_old("6.5"),
        Err(error) => unknown(&error),
    }
}

fn kcmp() -> State {
    match task::kcmp_vm(Pid::this(), Pid::this()) {
        Ok(_) => yes(""),
        Err(ProcError::NotSupported { .. }) => no("the kernel was built without kcmp", "a kernel with CONFIG_KCMP"),
        Err(ProcError::Denied { .. }) => {
            no("refused, e.g. by a container's system-call filter", "a filter that allows it")
        }
        Err(error) => unknown(&error),
    }
}

fn page_frame_numbers() -> State {
    let page = match OwnMapping::anonymous(PageCount(1)) {
        Ok(page) => page,
        Err(error) => return unknown(&error),
    };
    page.touch(1);
    match Pagemap::open(Pid::this()).and_then(|pagemap| pagemap.entry(page.start())) {
        Ok(entry) if entry.pfn().is_some() => yes(""),
        Ok(_) => no("pagemap hides them from this user", "CAP_SYS_ADMIN"),
        Err(error) => unknown(&error),
    }
}

fn check_bpf() -> State {
    match refcheck::BpfCheck::new() {
        Ok(_) => yes("self-test passed"),
        Err(error) => no(error.reason, error.grant),
    }
}

fn check_collapse() -> State {
    match refcheck::collapse_oracle_works() {
        Ok(true) => yes("self-test passed"),
        Ok(false) => no(
            "the self-test failed: the kernel looks at the pages in another way, or huge pages are off",
            "huge pages not disabled for this process (PR_SET_THP_DISABLE), Linux 6.1 or later",
        ),
        Err(CollapseError::Step { step, source }) if sys::errno(&source) == libc::EPERM => {
            no(format!("{step} is not permitted"), "see userfaultfd")
        }
        Err(error) => unknown(&error),
    }
}

fn sched_fifo() -> State {
    // In a thread of its own, which ends with its policy: giving it back may need more rights than taking it.
    let tried = std::thread::Builder::new().spawn(|| sched::set_policy(Pid(0), Policy::Fifo { priority: 1 }));
    let thread = match tried {
        Ok(thread) => thread,
        Err(error) => return unknown(&error),
    };
    match thread.join() {
        Ok(Ok(())) => yes(""),
        Ok(Err(SchedError::Denied { .. })) => no("this user may not have it", "CAP_SYS_NICE, or a limit: ulimit -r 1"),
        Ok(Err(error)) => unknown(&error),
        Err(_) => State::Unknown { reason: "the thread that tried it panicked".to_owned(), remedy: String::new() },
    }
}

fn pressure() -> State {
    match status::pressure("cpu") {
        Ok(Some(pressure)) => yes(format!("cpu {} %", pressure.some_avg10)),
        Ok(None) => no("not measured", "boot with psi=1, or a kernel with CONFIG_PSI"),
        Err(error) => unknown(&error),
    }
}

fn no_ksm() -> State {
    no("the kernel was built without KSM", "a kernel with CONFIG_KSM")
}

fn ksm() -> State {
    let ksm = KsmSysfs::host();
    match ksm.knob("run") {
        Ok(Some(run)) => yes(format!("run is {run}")),
        Ok(None) => no_ksm(),
        Err(error) => unknown(&error),
    }
}

fn ksm_writable() -> State {
    let ksm = KsmSysfs::host();
    // Opened, not written: whatever is written there has an effect.
    match std::fs::File::options().write(true).open(ksm.root().join("run")) {
        Ok(_) => yes(""),
        Err(error) => match sys::errno(&error) {
            libc::ENOENT => no_ksm(),
            libc::EACCES | libc::EPERM => no("this user may not write them", "root"),
            libc::EROFS => no("/sys is mounted read-only", "a container with a writable /sys, or the host"),
            _ => unknown(&error),
        },
    }
}

fn ksm_prctl() -> State {
    match ksm_sysfs::memory_merge() {
        Ok(on) => yes(if on { "on for this process" } else { "" }),
        Err(KsmError::Prctl { source }) if sys::errno(&source) == libc::EINVAL => too_old("6.4"),
        Err(error) => unknown(&error),
    }
}

fn ksm_tracing() -> State {
    let path = "/sys/kernel/tracing/events/ksm/enable";
    match std::fs::File::options().write(true).open(path) {
        Ok(_) => yes(""),
        Err(error) => match sys::errno(&error) {
            libc::ENOENT => {
                no(format!("no {path}"), "mount -t tracefs tracefs /sys/kernel/tracing, Linux 6.4 or later")
            }
            libc::EACCES | libc::EPERM => no("this user may not use it", "root"),
            _ => unknown(&error),
        },
    }
}

fn transparent_hugepage() -> State {
    match std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled") {
        Ok(text) => {
            let chosen = text.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map_or("?", |(word, _)| word);
            yes(chosen)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            no("the kernel was built without them", "a kernel with CONFIG_TRANSPARENT_HUGEPAGE")
        }
        Err(error) => unknown(&error),
    }
}

fn max_map_count() -> State {
    match sysctl("/proc/sys/vm/max_map_count") {
        Some(value) => yes(value),
        None => no("/proc/sys/vm/max_map_count cannot be read", "a mounted /proc"),
    }
}

/// Rights over other processes depend on which ones; what limits them is the Yama setting.
fn ptrace() -> State {
    const CAP_SYS_PTRACE: u32 = 19;
    let scope = sysctl("/proc/sys/kernel/yama/ptrace_scope");
    let privileged = status::read(Pid::this()).is_ok_and(|status| status.cap_eff >> CAP_SYS_PTRACE & 1 != 0);
    match scope.as_deref() {
        None | Some("0" | "1" | "2") if privileged => yes("all processes"),
        None | Some("0") => yes("processes of the same user"),
        Some("1") => yes("descendants only; sysctl kernel.yama.ptrace_scope=0 for processes of the same user"),
        Some(_) => no("kernel.yama.ptrace_scope forbids it", "CAP_SYS_PTRACE, or sysctl kernel.yama.ptrace_scope=0"),
    }
}

fn injection() -> State {
    match self_test() {
        SelfTest::Passed => yes("self-test passed"),
        SelfTest::Wrong(what) => no(format!("the self-test failed: {what}"), "another kernel"),
        SelfTest::NoChild(error) => unknown(&error),
        SelfTest::Failed(InjectError::Refused { refusal, .. }) => {
            let remedy = match &refusal {
                Refusal::NotPermitted { .. } => "CAP_SYS_PTRACE, a system-call filter that allows ptrace",
                Refusal::SeccompUnreadable { .. } | Refusal::Seccomp { .. } => {
                    "CAP_SYS_ADMIN, or without a system-call filter around pagefold itself"
                }
                Refusal::Traced { .. } => "without a debugger or strace on pagefold itself",
                Refusal::NoPlaceForCode { .. } => "a kernel that gives processes a vDSO (not booted with vdso=0)",
                _ => "another kernel",
            };
            no(refusal.to_string(), remedy)
        }
        SelfTest::Failed(error) => unknown(&error),
    }
}
