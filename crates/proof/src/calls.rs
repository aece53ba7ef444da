//! Names of calls, and which of them must not happen behind the gate's back.

use crate::{harmless, numbers};

/// What can change mappings or copy the address space and is not gated in libc: libc has no site of it, or its own use
/// is known to be harmless.
const ELSEWHERE: &[(u32, &str)] = &[
    (58, "vfork"),
    (206, "io_setup"),
    (207, "io_destroy"),
    (237, "mbind"),
    (256, "migrate_pages"),
    (279, "move_pages"),
    (426, "io_uring_enter"),
    (427, "io_uring_register"),
    (450, "set_mempolicy_home_node"),
];

/// Names for what is on neither list.
const OTHERS: &[(u32, &str)] = &[
    (101, "ptrace"),
    (135, "personality"),
    (154, "modify_ldt"),
    (158, "arch_prctl"),
    (160, "setrlimit"),
    (208, "io_getevents"),
    (209, "io_submit"),
    (210, "io_cancel"),
    (218, "set_tid_address"),
    (238, "set_mempolicy"),
    (239, "get_mempolicy"),
    (272, "unshare"),
    (273, "set_robust_list"),
    (274, "get_robust_list"),
    (275, "splice"),
    (278, "vmsplice"),
    (302, "prlimit64"),
    (308, "setns"),
    (310, "process_vm_readv"),
    (311, "process_vm_writev"),
    (317, "seccomp"),
    (321, "bpf"),
    (330, "pkey_alloc"),
    (331, "pkey_free"),
    (333, "io_pgetevents"),
    (334, "rseq"),
];

/// Can a call with this number change mappings, made by code that is not libc?
pub(crate) fn is_dangerous(number: u32) -> bool {
    numbers::changes_mappings(number) || ELSEWHERE.iter().any(|call| call.0 == number)
}

/// What people call it.
#[must_use]
pub fn call_name(number: u32) -> String {
    let known = ELSEWHERE.iter().chain(OTHERS).find(|call| call.0 == number).map(|call| call.1);
    let name = numbers::name(number).or_else(|| harmless::name(number)).or(known);
    name.map_or_else(|| format!("call {number}"), str::to_owned)
}

/// The number of a name; `None` if the name is on no list.
pub(crate) fn number_of(name: &str) -> Option<u32> {
    (0..512).find(|number| call_name(*number) == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_leads_back_to_its_number() {
        for number in (0..512).filter(|number| !call_name(*number).starts_with("call ")) {
            assert_eq!(number_of(&call_name(number)), Some(number));
        }
        assert!(is_dangerous(9) && is_dangerous(56) && is_dangerous(0x4000_0001) && !is_dangerous(202));
    }
}
