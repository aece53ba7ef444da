//! A16: uprobes of tracers on libc, put there by perf, bpftrace and the like. The kernel replaces the first byte of an
//! instruction by a trap, and executes what the file has there: not the jump to the gate that is there now.

use std::os::unix::process::CommandExt as _;

use crate::stand::Stand;
use crate::victim::{Region, Victim, hear, merge_now, merged_pair, tell};

pub(crate) const VICTIMS: &[Victim] = &[("probed", probed), ("probed_before", probed_before)];

const PAGES: usize = 64;
const LIBC: &std::ffi::CStr = c"/proc/self/root/lib/x86_64-linux-gnu/libc.so.6";

/// Where a function of libc lies in its file: where its code begins there is where it is loaded, as far as libc goes.
fn offset_of(name: &std::ffi::CStr) -> usize {
    // SAFETY: looks a name up.
    let address = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    // SAFETY: the structure is plain data that dladdr fills.
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: looks up what lies there.
    assert_ne!(unsafe { libc::dladdr(address, &raw mut info) }, 0);
    address as usize - info.dli_fbase as usize
}

/// Puts a uprobe there, in this process and what it executes. It counts, and nobody looks. Returns its descriptor.
fn probe(offset: usize) -> Option<i32> {
    let kind = std::fs::read_to_string("/sys/bus/event_source/devices/uprobe/type").ok()?;
    // struct perf_event_attr, 128 bytes: type and size, then by 8 bytes; config1 is the path, config2 the offset.
    let mut attributes = [0_u64; 16];
    attributes[0] = kind.trim().parse::<u64>().ok()? | 128 << 32;
    attributes[7] = LIBC.as_ptr() as u64;
    attributes[8] = offset as u64;
    // SAFETY: the kernel reads the attributes and the path.
    let fd = unsafe { libc::syscall(libc::SYS_perf_event_open, attributes.as_ptr(), 0, -1, -1, 0) };
    i32::try_from(fd).ok().filter(|fd| *fd >= 0)
}

/// Merged memory, and then a tracer comes.
fn probed() {
    let (one, two) = merged_pair(PAGES, 700);
    let offset = offset_of(c"madvise");
    if probe(offset).is_none() {
        tell("skipped: uprobes");
        return;
    }
    let file = std::fs::read("/lib/x86_64-linux-gnu/libc.so.6").expect("libc can be read");
    assert_eq!(file[offset..offset + 5], [0xb8, 28, 0, 0, 0], "mov eax, 28 is not where it is looked for");
    assert_eq!(one.advise(libc::MADV_DONTNEED), 0);
    one.check_zero();
    two.check_from(700);
    tell("right");
}

/// A uprobe in a page of libc from which calls lead to the gate, but on no such call: the copy would have the trap.
fn probed_before() {
    let (one, two) = (Region::map(PAGES), Region::map(PAGES));
    one.fill_from(800);
    two.fill_from(800);
    one.mergeable();
    two.mergeable();
    merge_now();
    let mut there = [0_u8; PAGES];
    // SAFETY: the kernel writes a byte for each page.
    assert_eq!(unsafe { libc::mincore(one.pointer(0), one.len(), there.as_mut_ptr()) }, 0);
    one.check_from(800);
    assert_eq!(one.advise(libc::MADV_DONTNEED), 0);
    one.check_zero();
    tell("right");
    hear();
}

/// A16: a tracer's uprobe on madvise does not lead calls past the gate.
///
/// Seen to fail: the call was made past the gate, and DONTNEED showed the store's pages.
#[test]
fn a16_uprobes_do_not_lead_past_the_gate() {
    let stand = Stand::on_request();
    let output = stand.run("probed");
    assert!(output.contains("right") || output.contains("skipped:"), "{output}");
    stand.assert_merged(PAGES as u64);
}

/// A16: where a tracer was before, nothing is patched, and its trap stays one that the kernel knows.
///
/// Seen to fail: the program ended with SIGTRAP when it called what was traced.
#[test]
fn a16_who_is_traced_from_the_start_is_left_alone() {
    let stand = Stand::on_request();
    let offset = offset_of(c"mincore");
    let mut command = stand.command("probed_before");
    // SAFETY: makes a system call, and reads a file.
    unsafe {
        command.pre_exec(move || probe(offset).map(|_| ()).ok_or_else(|| std::io::ErrorKind::Unsupported.into()))
    };
    let mut running = stand.start_command(command);
    running.expect("right");
    assert_eq!(stand.summary().processes_ever, 0, "it was patched");
    running.say("end");
    running.succeed();
}
