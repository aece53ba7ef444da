//! /proc/PID/numa_maps: which mappings have a NUMA policy of their own.
//!
//! It walks all page tables, and so costs as much as smaps: 110 ms for each GiB of small pages.

use crate::procfs::{self, ProcError};
use crate::smaps::VmaUse;
use crate::units::Pid;

/// Notes which of a process's mappings have a policy (mbind). One that was made since counts as what lies before it.
///
/// # Errors
/// [`ProcError`]; above all from a kernel without CONFIG_NUMA.
pub fn mark(pid: Pid, vmas: &mut [VmaUse]) -> Result<(), ProcError> {
    let mut buffer = Vec::new();
    procfs::read_into(pid, "numa_maps", &mut buffer)?;
    let policies = parse(&buffer).ok_or_else(|| ProcError::Parse {
        path: format!("/proc/{pid}/numa_maps"),
        line: procfs::lines(&buffer).next().map(procfs::text).unwrap_or_default(),
    })?;
    for vma in vmas {
        let behind = policies.partition_point(|(start, _)| *start <= vma.vma.range.start().get());
        vma.policy = behind.checked_sub(1).is_some_and(|before| policies[before].1);
    }
    Ok(())
}

/// Where each mapping begins, and whether it has a policy.
///
/// Of a mapping without one the kernel shows that of the whole process, as `numactl` sets it: it is what the first thread's
/// stack has, which nobody gives a policy.
fn parse(bytes: &[u8]) -> Option<Vec<(u64, bool)>> {
    let mut lines = Vec::new();
    let mut of_all: &[u8] = b"default";
    for line in procfs::lines(bytes) {
        let mut words = procfs::words(line);
        let start = procfs::hexadecimal(words.next()?)?;
        let policy = words.next()?;
        if words.any(|word| word == b"stack") {
            of_all = policy;
        }
        lines.push((start, policy));
    }
    Some(lines.into_iter().map(|(start, policy)| (start, policy != of_all)).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::{OwnedMemory, PageCount, smaps};

    #[test]
    fn the_policy_of_the_process_is_no_mappings_own() {
        let text =
            b"7f0000000000 interleave:0-1 anon=1 N0=1\n7f0000400000 bind:0 anon=1\n7ffd00000000 interleave:0-1 stack\n";
        let parsed = parse(text).unwrap();
        assert_eq!(parsed, [(0x7f00_0000_0000, false), (0x7f00_0040_0000, true), (0x7ffd_0000_0000, false)]);
        assert_eq!(parse(b"nonsense default\n"), None);
    }

    #[test]
    fn a_mapping_with_a_policy_is_told() {
        let memory = OwnedMemory::anonymous(PageCount(8)).unwrap();
        let (start, len) = (memory.range().start().get(), memory.range().len().get());
        let mask = 1_u64;
        // SAFETY: binds memory of this test's own to the first node, which every machine has.
        let bound = unsafe { libc::syscall(libc::SYS_mbind, start, len, 2, &raw const mask, 65, 0) };
        if bound != 0 {
            return println!("skipped: CONFIG_NUMA");
        }
        let mut vmas = smaps::read(Pid::this()).unwrap();
        mark(Pid::this(), &mut vmas).unwrap();
        let told: Vec<_> = vmas.iter().filter(|vma| vma.policy).map(|vma| vma.vma.range).collect();
        assert_eq!(told, [memory.range()]);
    }
}
