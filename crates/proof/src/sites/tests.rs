//! Traps for the search, as bytes.

use super::*;

const BASE: u64 = 0x1000;

/// One section with functions of these lengths, one behind the other; what is left over has no symbol.
fn find(functions: &[&[u8]]) -> ObjectSites {
    find_with(functions, None)
}

fn find_with(functions: &[&[u8]], ioctl: Option<Range<u64>>) -> ObjectSites {
    let bytes = functions.concat();
    let mut known = Vec::new();
    let mut at = BASE;
    for function in functions {
        known.push((at, at + function.len() as u64));
        at += function.len() as u64;
    }
    let code = [Code { address: BASE, file_offset: 0x400, bytes: &bytes }];
    let starts = Starts::of_functions(&known);
    let mut found = ObjectSites::default();
    search(&code[0], &starts, ioctl.as_ref(), &mut found);
    refuse_entered(&mut found, &code, &starts);
    found
}

/// `mov eax, number; syscall`
fn call(number: u8) -> Vec<u8> {
    vec![0xb8, number, 0, 0, 0, 0x0f, 0x05]
}

const RET: u8 = 0xc3;

fn whys(found: &ObjectSites) -> Vec<&Why> {
    found.refused.iter().map(|refused| &refused.why).collect()
}

#[test]
fn a_contiguous_site_is_found_with_its_bytes() {
    let found = find(&[&[&[0x90][..], &call(9), &[RET]].concat()]);
    assert_eq!(
        found.sites,
        [Site { vaddr: BASE + 1, kind: SiteKind::Number(9), bytes: [0xb8, 9, 0, 0, 0, 0x0f, 0x05] }]
    );
    assert!(found.refused.is_empty() && found.unknown.is_empty(), "{found:?}");
}

#[test]
fn calls_that_change_no_mapping_are_left_out() {
    for number in [0, 1, 39, 58, 60, 202] {
        assert_eq!(find(&[&[call(number), vec![RET]].concat()]), ObjectSites::default(), "number {number}");
    }
}

#[test]
fn a_site_that_executes_is_patched_where_it_can_be_and_left_out_elsewhere() {
    let exec = call(59);
    let found = find(&[&[exec.clone(), vec![RET]].concat()]);
    assert_eq!((found.sites.len(), found.refused.len()), (1, 0), "{found:?}");
    // The number is set earlier; a symbol within it.
    for functions in [
        vec![[&[0xb8, 59, 0, 0, 0, 0x90][..], &[0x0f, 0x05, RET]].concat()],
        vec![exec[..2].to_vec(), [&exec[2..], &[RET]].concat()],
    ] {
        let functions: Vec<&[u8]> = functions.iter().map(Vec::as_slice).collect();
        assert_eq!(find(&functions), ObjectSites::default());
    }
    // A jump over it: with which number is not known.
    assert_eq!(find(&[&[&[0x74, 5][..], &exec, &[RET]].concat()]).unknown.len(), 1);
}

#[test]
fn a_byte_pair_inside_an_immediate_is_no_site() {
    // mov ecx, 0x0000050f; mov eax, 0x050f0009; ret: each holds 0f 05, the second right behind a 9.
    let found = find(&[&[0xb9, 0x0f, 0x05, 0, 0, 0xb8, 9, 0, 0x0f, 0x05, RET]]);
    assert_eq!(found, ObjectSites::default());
}

#[test]
fn an_immediate_that_ends_like_a_number_load_is_no_site() {
    // movabs rcx, 0x00000009b8....: the five bytes before the syscall look like `mov eax, 9`, and are its tail.
    let found = find(&[&[0x48, 0xb9, 0, 0, 0, 0xb8, 9, 0, 0, 0, 0x0f, 0x05, RET]]);
    assert!(found.sites.is_empty(), "{found:?}");
    assert_eq!(found.unknown.len(), 1, "what is in eax comes from the caller: {found:?}");
}

#[test]
fn a_number_set_earlier_is_refused() {
    // mov eax, 9; xor edi, edi; syscall
    let found = find(&[&[0xb8, 9, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05, RET]]);
    assert_eq!(whys(&found), [&Why::NotContiguous { numbers: vec![9] }]);
    assert_eq!((found.refused[0].vaddr, found.refused[0].file_offset), (BASE + 7, 0x407));
    // The same with a number that nobody asks for.
    let found = find(&[&[0xb8, 202, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05, RET]]);
    assert_eq!(found, ObjectSites::default());
}

#[test]
fn numbers_are_followed_through_copies_jumps_and_pushes() {
    // push 11; pop rdx; jmp +1; ret; mov eax, edx; syscall
    let found = find(&[&[0x6a, 11, 0x5a, 0xeb, 1, RET, 0x89, 0xd0, 0x0f, 0x05, RET]]);
    assert_eq!(whys(&found), [&Why::NotContiguous { numbers: vec![11] }]);
}

#[test]
fn a_jump_over_the_number_is_refused() {
    // mov eax, 202; test edi, edi; jz to the syscall of `mov eax, 9; syscall`
    let near = [&[0xb8, 202, 0, 0, 0, 0x85, 0xff, 0x74, 5][..], &call(9), &[RET]].concat();
    assert_eq!(whys(&find(&[&near])), [&Why::Entered { target: BASE + 14 }]);
}

#[test]
fn a_jump_from_another_function_into_a_site_is_refused() {
    let site = [call(9), vec![RET]].concat();
    for (inside, displacement) in [(5_u8, -8_i32), (1, -12), (6, -7)] {
        // jmp rel32, eight bytes behind the site's first
        let jump = [&[0xe9][..], &displacement.to_le_bytes()].concat();
        let found = find(&[&site, &jump]);
        assert_eq!(whys(&found), [&Why::Entered { target: BASE + u64::from(inside) }], "{found:?}");
        assert!(found.sites.is_empty());
    }
    // jb rel8 to the syscall
    let found = find(&[&site, &[0x72, 0xfb, RET]]);
    assert_eq!(whys(&found), [&Why::Entered { target: BASE + 5 }]);
    // To its start, and behind it: as usual.
    for target in [-13_i32, -6] {
        let jump = [&[0xe9][..], &target.to_le_bytes()].concat();
        assert_eq!(find(&[&site, &jump]).sites.len(), 1);
    }
}

#[test]
fn displacement_bytes_of_no_branch_are_ignored() {
    let site = [call(9), vec![RET]].concat();
    // mov ecx, -8: as a jump it would lead to the syscall.
    let found = find(&[&site, &[&[0xb9][..], &(-8_i32).to_le_bytes(), &[RET]].concat()]);
    assert_eq!(found.sites.len(), 1, "{found:?}");
}

#[test]
fn a_function_that_starts_inside_a_site_is_refused() {
    let found = find(&[&[0xb8, 9, 0, 0, 0], &[0x0f, 0x05, RET]]);
    assert!(found.sites.is_empty(), "{found:?}");
    assert_eq!(whys(&found), [&Why::Entered { target: BASE + 1 }]);
}

#[test]
fn the_general_door_is_found_and_other_unknown_numbers_are_reported() {
    // mov rax, rdi; mov r9, [rsp+8]; syscall
    let door = [0x48, 0x89, 0xf8, 0x4c, 0x8b, 0x4c, 0x24, 0x08, 0x0f, 0x05, RET];
    let found = find(&[&door]);
    assert_eq!(found.sites.len(), 1);
    assert_eq!((found.sites[0].kind, found.sites[0].vaddr), (SiteKind::Generic, BASE + 3));
    // mov rax, rdi; syscall
    let found = find(&[&[0x48, 0x89, 0xf8, 0x0f, 0x05, RET]]);
    assert!(found.sites.is_empty() && found.refused.is_empty(), "{found:?}");
    assert_eq!(found.unknown, [Location { file_offset: 0x403, vaddr: BASE + 3 }]);
}

#[test]
fn old_ways_into_the_kernel_are_refused() {
    for entry in [[0xcd, 0x80], [0x0f, 0x34]] {
        let found = find(&[&[&[0xb8, 90, 0, 0, 0][..], &entry, &[RET]].concat()]);
        assert_eq!(whys(&found), [&Why::LegacyEntry]);
    }
}

#[test]
fn what_does_not_decode_is_refused() {
    // An invalid opcode in 64-bit code before the pair: the stream says nothing about what follows.
    let found = find(&[&[&[0x06][..], &call(9), &[RET]].concat()]);
    assert!(found.sites.is_empty(), "{found:?}");
    assert_eq!(whys(&found), [&Why::Ambiguous]);
}

#[test]
fn a_numbers_low_half_counts_and_x32_is_never_trusted() {
    // mov rax, 9 (sign-extended, seven bytes); syscall
    let found = find(&[&[0x48, 0xc7, 0xc0, 9, 0, 0, 0, 0x0f, 0x05, RET]]);
    assert_eq!(whys(&found), [&Why::NotContiguous { numbers: vec![9] }]);
    let found = find(&[&[0xb8, 0, 0, 0, 0x40, 0x0f, 0x05, RET]]);
    assert_eq!(found.sites[0].kind, SiteKind::Number(0x4000_0000));
}

#[test]
fn an_ioctl_of_libcs_own_is_left_alone() {
    // mov r9d, 16; mov eax, r9d; syscall: as glibc's tcsetattr does.
    let own = [0x41, 0xb9, 16, 0, 0, 0, 0x44, 0x89, 0xc8, 0x0f, 0x05, RET];
    let door = [call(16), vec![RET]].concat();
    let exported = BASE + own.len() as u64..BASE + (own.len() + door.len()) as u64;
    let found = find_with(&[&own, &door], Some(exported));
    assert_eq!(found.own_ioctls, [Location { file_offset: 0x409, vaddr: BASE + 9 }]);
    assert_eq!(found.sites.len(), 1);
    assert!(found.refused.is_empty(), "{found:?}");
    // Nobody knows whose choice it is where there is no such function.
    assert_eq!(whys(&find(&[&own])), [&Why::NotContiguous { numbers: vec![16] }]);
}

#[test]
fn a_number_that_is_computed_is_unknown() {
    // mov eax, 9; add eax, ecx; syscall, and the same with a call in place of the addition.
    for change in [&[0x01, 0xc8][..], &[0xe8, 0, 0, 0, 0]] {
        let found = find(&[&[&[0xb8, 9, 0, 0, 0][..], change, &[0x0f, 0x05, RET]].concat()]);
        assert!(found.sites.is_empty() && found.refused.is_empty(), "{found:?}");
        assert_eq!(found.unknown.len(), 1);
    }
}
