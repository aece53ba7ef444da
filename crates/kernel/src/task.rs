//! What is known about other tasks beside /proc: where their robust lists are, whether they share memory.

use std::cmp::Ordering;
use std::io;

use crate::procfs::ProcError;
pub use crate::status::threads;
use crate::sys;
use crate::units::{Pid, Vaddr};

/// Where a thread keeps its list of robust futexes (get_robust_list). `None` if it has none, as threads of programs
/// without libc. glibc puts the head into the thread's control block, which tells where that is.
///
/// # Errors
/// [`ProcError::Gone`], [`ProcError::Denied`] without ptrace rights.
pub fn robust_list(tid: Pid) -> Result<Option<Vaddr>, ProcError> {
    let mut head = 0_usize;
    let mut length = 0_usize;
    // SAFETY: both words are writable and live until the call returns.
    let result = unsafe { libc::syscall(libc::SYS_get_robust_list, tid.0, &raw mut head, &raw mut length) };
    sys::check(result).map_err(|source| ProcError::of(tid, "robust list", source))?;
    Ok((head != 0).then_some(Vaddr(head as u64)))
}

/// Compares the address spaces of two processes (kcmp KCMP_VM): equal if they are the same one. The order is the same
/// for all pairs until the next boot and means nothing else.
///
/// # Errors
/// [`ProcError::NotSupported`] without CONFIG_KCMP, [`ProcError::Gone`], [`ProcError::Denied`] without ptrace rights
/// on both.
pub fn kcmp_vm(one: Pid, other: Pid) -> Result<Ordering, ProcError> {
    const KCMP_VM: i32 = 1;
    // SAFETY: the call takes integers only.
    let result = unsafe { libc::syscall(libc::SYS_kcmp, one.0, other.0, KCMP_VM, 0, 0) };
    match sys::check(result) {
        Ok(0) => Ok(Ordering::Equal),
        Ok(1) => Ok(Ordering::Less),
        Ok(2) => Ok(Ordering::Greater),
        Ok(_) => Err(ProcError::NotSupported { interface: "order of address spaces" }),
        Err(error) if sys::errno(&error) == libc::ENOSYS => Err(ProcError::NotSupported { interface: "kcmp" }),
        Err(error) => Err(ProcError::of(one, "mm", error)),
    }
}

/// The processes, those of one address space together, in the order of the first of each. Processes that cannot be compared
/// (no kcmp, no right to, gone) are alone.
#[must_use]
pub fn by_address_space(pids: &[Pid]) -> Vec<Vec<Pid>> {
    let mut spaces: Vec<Vec<Pid>> = Vec::new();
    // Places in `spaces`, in the kernel's order of address spaces.
    let mut order: Vec<usize> = Vec::new();
    for pid in pids {
        match place_of(&order, &spaces, *pid) {
            Ok(Ok(same)) => spaces[order[same]].push(*pid),
            Ok(Err(place)) => {
                order.insert(place, spaces.len());
                spaces.push(vec![*pid]);
            }
            Err(_) => spaces.push(vec![*pid]),
        }
    }
    spaces
}

fn place_of(order: &[usize], spaces: &[Vec<Pid>], pid: Pid) -> Result<Result<usize, usize>, ProcError> {
    let (mut low, mut high) = (0, order.len());
    while low < high {
        let middle = low.midpoint(high);
        match kcmp_vm(spaces[order[middle]][0], pid)? {
            Ordering::Equal => return Ok(Ok(middle)),
            Ordering::Less => low = middle + 1,
            Ordering::Greater => high = middle,
        }
    }
    Ok(Err(low))
}

/// Says whether this process takes up processes whose parent ends below it (PR_SET_CHILD_SUBREAPER).
///
/// # Errors
/// What prctl(2) says.
pub fn set_child_subreaper(on: bool) -> io::Result<()> {
    let on = libc::c_ulong::from(on);
    // SAFETY: the call takes integers only.
    sys::check(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, on, 0, 0, 0) }.into()).map(|_| ())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use std::process::Command;

    #[test]
    fn a_glibc_threads_robust_list_lies_in_its_memory() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = Pid(child.id().cast_signed());
        // Until the exec is through, the child has no list of its own.
        let head = (0..200).find_map(|_| {
            std::thread::sleep(std::time::Duration::from_millis(5));
            robust_list(pid).unwrap()
        });
        let maps = crate::maps::read(pid).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let head = head.unwrap();
        assert!(maps.iter().any(|vma| vma.range.contains(head) && vma.write), "{head}");
        assert!(robust_list(pid).unwrap_err().is_gone());
    }

    #[test]
    fn address_spaces_are_told_apart() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = Pid(child.id().cast_signed());
        let (own, other) = (kcmp_vm(Pid::this(), Pid::this()), kcmp_vm(Pid::this(), pid));
        let together = by_address_space(&[Pid::this(), pid, Pid::this()]);
        child.kill().unwrap();
        child.wait().unwrap();
        if let Err(ProcError::NotSupported { interface }) = own {
            println!("skipped: no {interface}");
            return;
        }
        assert_eq!(own.unwrap(), Ordering::Equal);
        assert_ne!(other.unwrap(), Ordering::Equal);
        assert_eq!(together, [vec![Pid::this(), Pid::this()], vec![pid]]);
        assert!(kcmp_vm(Pid::this(), pid).unwrap_err().is_gone());
    }
}
