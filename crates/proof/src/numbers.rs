//! x86-64 system calls that the gate has to see, by number.

/// Numbers and names, ascending: calls that change mappings or what they promise, copy the address space, or hand out
/// a descriptor through which either can be done (`ioctl` on a userfaultfd, io_uring); and `prctl`, which makes a
/// process one that adopts others.
///
/// `vfork` is missing on purpose: it returns twice on one stack, and its child changes no mapping before it execs.
/// `mbind` and `set_mempolicy_home_node` move pages but leave the mapping, and glibc has no site of its own for them: libnuma
/// makes them by `syscall()`, where the gate sees them. A program that makes them by itself loses a policy and no memory.
const GATED: &[(u32, &str)] = &[
    (9, "mmap"),
    (10, "mprotect"),
    (11, "munmap"),
    (12, "brk"),
    (IOCTL, "ioctl"),
    (25, "mremap"),
    (28, "madvise"),
    (30, "shmat"),
    (56, "clone"),
    (57, "fork"),
    (67, "shmdt"),
    (149, "mlock"),
    (150, "munlock"),
    (151, "mlockall"),
    (152, "munlockall"),
    (PRCTL, "prctl"),
    (216, "remap_file_pages"),
    (323, "userfaultfd"),
    (325, "mlock2"),
    (329, "pkey_mprotect"),
    (425, "io_uring_setup"),
    (435, "clone3"),
    (440, "process_madvise"),
    (453, "map_shadow_stack"),
    (462, "mseal"),
];

/// Calls that the gate looks at where their sites can be patched, and does without where they cannot: what is executed
/// may be unable to load the agent, and would complain.
const EXECUTE: &[(u32, &str)] = &[(59, "execve"), (322, "execveat")];

/// Does a call with this number execute another program?
pub(crate) fn executes(number: u32) -> bool {
    find(EXECUTE, number).is_some()
}

/// Does the gate look at calls with this number?
#[must_use]
pub fn takes_the_gate(number: u32) -> bool {
    changes_mappings(number) || executes(number)
}

fn find(list: &[(u32, &'static str)], number: u32) -> Option<&'static str> {
    list.iter().find(|(listed, _)| *listed == number).map(|(_, name)| *name)
}

/// The call behind which userfaultfd and a thousand drivers hide.
pub(crate) const IOCTL: u32 = 16;

/// The call behind which unrelated settings of a process hide.
pub(crate) const PRCTL: u32 = 157;

/// Bit 30 selects the x32 table: other numbers, and no way to tell from here what they do.
const X32: u32 = 0x4000_0000;

/// Can a call with this number change mappings, or open a way to do so behind the gate's back?
#[must_use]
pub fn changes_mappings(number: u32) -> bool {
    number & X32 != 0 || find(GATED, number).is_some()
}

/// The kernel's name of a number for which [`takes_the_gate`] is true.
#[must_use]
pub fn name(number: u32) -> Option<&'static str> {
    find(GATED, number).or_else(|| find(EXECUTE, number))
}
