//! Each verdict, from facts made by hand.
#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::trust::Trust;

const ID: &str = "00112233445566778899aabbccddeeff00112233";

fn site(numbers: &[u32]) -> CallSite {
    CallSite {
        address: 0x2010,
        offset: 0x1010,
        place: "inner+0x4".to_owned(),
        entry: Entry::Syscall,
        numbers: numbers.to_vec(),
        requests: vec![],
        ambiguous: false,
    }
}

fn facts(soname: &str, sites: &[CallSite]) -> Facts {
    Facts {
        build_id: Some(ID.to_owned()),
        soname: Some(soname.to_owned()),
        code_bytes: 1,
        sites: sites.to_vec(),
        ..Facts::default()
    }
}

fn of(facts: &Facts) -> Judgement {
    judge(facts, "x.so", "prog", &Lists::default())
}

#[test]
fn no_way_into_the_kernel_is_clean() {
    assert_eq!(of(&facts("x.so.1", &[])), Judgement::default());
}

#[test]
fn harmless_numbers_are_benign_and_named() {
    let judged = of(&facts("x.so.1", &[site(&[202, 1]), site(&[332])]));
    assert_eq!(judged.verdict, Verdict::Benign);
    assert_eq!(judged.reasons, ["makes only harmless calls by itself: futex, statx, write"]);
}

#[test]
fn a_mapping_call_is_dangerous_and_its_place_is_named() {
    let judged = of(&facts("x.so.1", &[site(&[1]), site(&[1, 9])]));
    assert_eq!(judged.verdict, Verdict::Dangerous);
    assert_eq!(judged.reasons, ["mmap, which the gate does not see, at offset 0x1010 in inner+0x4"]);
    assert_eq!(judged.trust_line.unwrap(), format!("code {ID} x.so.1"));
}

#[test]
fn what_nobody_has_looked_at_is_unknown() {
    let unlisted = site(&[101]);
    let unresolved = site(&[]);
    let ambiguous = CallSite { ambiguous: true, ..site(&[1]) };
    let old = CallSite { entry: Entry::Int80, ..site(&[1]) };
    for (site, words) in [
        (unlisted, "ptrace, which is not on the list"),
        (unresolved, "does not tell"),
        (ambiguous, "may be a system call or data, perhaps write"),
        (old, "int 0x80"),
    ] {
        let judged = of(&facts("x.so.1", &[site]));
        assert_eq!(judged.verdict, Verdict::Unknown);
        assert!(judged.reasons[0].contains(words), "{judged:?}");
    }
}

#[test]
fn ioctl_is_judged_by_what_it_asks_for() {
    let asked = |requests: &[u32]| of(&facts("x", &[CallSite { requests: requests.to_vec(), ..site(&[16]) }])).verdict;
    assert_eq!(asked(&[0x5421]), Verdict::Benign);
    // UFFDIO_API
    assert_eq!(asked(&[0x5421, 0xc018_aa3f]), Verdict::Unknown);
    assert_eq!(asked(&[]), Verdict::Unknown);
}

#[test]
fn a_known_library_may_make_its_calls_in_its_programs_and_no_others() {
    let lists = Lists::default();
    let rings = facts("liburing.so.2", &[site(&[9]), site(&[426])]);
    assert_eq!(judge(&rings, "liburing.so.2.3", "qemu-system-x86_64", &lists).verdict, Verdict::Known);
    let elsewhere = judge(&rings, "liburing.so.2.3", "postgres", &lists);
    assert_eq!(elsewhere.verdict, Verdict::Dangerous);
    assert!(elsewhere.reasons[0].starts_with("liburing is allowed in qemu-system-*, mariadbd alone"), "{elsewhere:?}");
    // An update that clones.
    let more = facts("liburing.so.2", &[site(&[9]), site(&[56])]);
    assert_eq!(judge(&more, "liburing.so.2.9", "qemu-system-x86_64", &lists).verdict, Verdict::Dangerous);
}

#[test]
fn a_refused_library_is_refused_whatever_was_found() {
    assert_eq!(of(&facts("libtcmalloc.so.4", &[])).verdict, Verdict::Dangerous);
    assert_eq!(of(&facts("libtcmalloc_minimal.so.4", &[])).verdict, Verdict::Clean);
}

#[test]
fn what_the_operator_trusts_is_known() {
    let trust = Trust::parse(&format!("code {ID} x.so.1\n")).unwrap();
    let judged = judge(&facts("x.so.1", &[site(&[9])]), "x.so", "prog", &Lists::with(trust));
    assert_eq!((judged.verdict, judged.trust_line), (Verdict::Known, None));
}

#[test]
fn a_libc_that_cannot_be_patched_is_not_trusted_by_a_line() {
    let trust = Trust::parse(&format!("code {ID} libc.so.6\n")).unwrap();
    let mut libc = facts("libc.so.6", &[]);
    libc.gate = Some(vec!["unknown libc: no site of mremap".to_owned()]);
    assert_eq!(judge(&libc, "libc.so.6", "prog", &Lists::with(trust)).verdict, Verdict::Unknown);
    libc.gate = Some(vec![]);
    assert_eq!(of(&libc).verdict, Verdict::Clean);
}

#[test]
fn what_spoils_a_file_beside_its_sites_counts() {
    let spoilt = Facts { spoilt: vec!["asks for an executable stack".to_owned()], ..facts("x", &[site(&[1])]) };
    assert_eq!(of(&spoilt).verdict, Verdict::Unknown);
    let many = Facts { more_sites: 3, ..facts("x", &[site(&[1])]) };
    assert_eq!(of(&many).verdict, Verdict::Unknown);
}
