//! Why a program is not managed that has the agent: its gate or its helper could not come, and the broker hears of nobody
//! without a helper. The agent writes it down in its own memory (`abi::told`), which is read here.
//!
//! The program may have written something else there. It is text for people, by numbers that are known here, and no more.

use std::ffi::OsStr;
use std::path::Path;

use abi::told::{self, helper, start};
use kernel::{Pid, ReadOutcome, Vma, remote};

/// The image's data is a few pages; a mapping that is much longer is something else.
const DATA_MAX: u64 = 1 << 20;

/// What is known of the agent in a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum InProcess {
    /// It is not there.
    Absent,
    /// It is there and at work, or cannot be seen.
    AtWork,
    /// It is there, and this keeps it from work.
    Hindered(&'static str),
}

/// Looks at a process.
pub(crate) fn look(pid: Pid) -> InProcess {
    let maps = kernel::maps::read(pid).unwrap_or_default();
    if maps.is_empty() {
        return InProcess::AtWork;
    }
    if !maps.iter().any(is_agents) {
        return InProcess::Absent;
    }
    let mut data = maps.iter().filter(|vma| is_agents(vma) && vma.write && vma.range.len().get() <= DATA_MAX);
    let told = data.find_map(|vma| told_in(pid, vma));
    told.and_then(|(start, helper)| hindrance(start, helper)).map_or(InProcess::AtWork, InProcess::Hindered)
}

fn is_agents(vma: &Vma) -> bool {
    // Also once its folder is gone.
    let file = Path::new(&vma.name).file_name().map(OsStr::as_encoded_bytes);
    file.is_some_and(|file| file.strip_suffix(b" (deleted)").unwrap_or(file) == broker::AGENT.as_bytes())
}

fn told_in(pid: Pid, vma: &Vma) -> Option<(u32, u32)> {
    let mut bytes = vec![0; usize::try_from(vma.range.len().get()).ok()?];
    match remote::read(pid, vma.range.start(), &mut bytes) {
        Ok(ReadOutcome::Complete { .. }) => bytes.windows(told::LEN).step_by(8).find_map(told::parse),
        _ => None,
    }
}

fn hindrance(of_start: u32, of_helper: u32) -> Option<&'static str> {
    let why = match of_start {
        start::NOTHING => {
            "it does not find PAGEFOLD_AGENT in the environment, which somebody has changed; start the program with what \
             `pagefold run` has put there"
        }
        start::READY => return no_helper(of_helper),
        start::NO_TABLE => {
            "it cannot read the table of libc's system calls, as in a container that has its file and not the table, or \
             without descriptors (ulimit -n)"
        }
        start::UNKNOWN_LIBC => {
            "libc is not the one that `pagefold run` itself runs with; start `pagefold run` where it is"
        }
        start::SECOND_LIBC => "a second libc is loaded, as LD_AUDIT does; start the program without it",
        start::CHANGED_CODE => {
            "libc's code is not as in its file: a breakpoint or a uprobe (perf, bpftrace) lies on one of its system calls; \
             take that away before the program starts"
        }
        start::PATCH_FAILED => {
            "libc's code could not be changed: a security module forbids it (SELinux's execmem and execmod), or no address \
             space is left near it"
        }
        start::DENIED => {
            "libc's code must not be changed under PR_SET_MDWE (systemd: MemoryDenyWriteExecute=yes); start the program \
             without it"
        }
        start::KERNEL_LACKS => "this kernel lacks MADV_WIPEONFORK, which Linux 4.14 has",
        _ => return None,
    };
    Some(why)
}

fn no_helper(why: u32) -> Option<&'static str> {
    match why {
        helper::LIMITED => Some(
            "no helper comes under a limit of address space or of data (ulimit -v, -d), which it would take a part of; \
             start the program without it",
        ),
        helper::RESTRICTED => Some("no helper comes to a program that has restricted its own system calls (seccomp)"),
        helper::ELSEWHERE => Some(
            "no helper comes where new processes belong to another process name space (unshare --pid); start \
             `pagefold run` inside it",
        ),
        helper::STOPPED => Some(
            "no helper comes to a program that uses a userfaultfd, an io_uring or mutexes with priority inheritance, has \
             locked all its memory, or has loaded code that nobody vouches for",
        ),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn whatever_is_written_there_is_one_of_a_few_texts() {
        assert_eq!(hindrance(start::READY, helper::MAY_COME), None);
        for number in [9, 77, u32::MAX] {
            assert_eq!((hindrance(number, 0), hindrance(start::READY, number)), (None, None));
        }
        assert!((2..=8).all(|number| hindrance(number, 0).is_some()));
        assert!((1..=4).all(|number| hindrance(start::READY, number).is_some()));
    }

    #[test]
    fn the_image_tells() {
        let image = broker::image_bytes();
        let told: Vec<_> = image.windows(told::LEN).filter_map(told::parse).collect();
        assert_eq!(told, [(start::NOTHING, helper::MAY_COME)]);
    }

    #[test]
    fn who_has_no_agent_has_none() {
        let mut child = std::process::Command::new("sleep").arg("60").env_remove("LD_PRELOAD").spawn().unwrap();
        assert_eq!(look(Pid(i32::try_from(child.id()).unwrap())), InProcess::Absent);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
