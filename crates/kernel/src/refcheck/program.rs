//! The BPF program that reads kernel memory, and how it is loaded and run: bpf(2) without a library.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use super::bpf::{BATCH, Unavailable};
use crate::own_memory::OwnMapping;
use crate::shared::SharedLayout;
use crate::sys;

/// What program and caller share. All words are atomics, because the kernel writes them behind Rust's back.
#[repr(C)]
pub(super) struct Area {
    count: AtomicU64,
    task: AtomicU64,
    pub(super) entry: [Entry; BATCH],
}

#[repr(C)]
pub(super) struct Entry {
    pub(super) address: AtomicU64,
    pub(super) value: AtomicU64,
}

// SAFETY: a repr(C) structure of atomics of integers.
unsafe impl SharedLayout for Area {}

/// What it takes to be allowed what was refused.
pub(super) fn refused(what: &str, error: &io::Error) -> Unavailable {
    Unavailable {
        reason: format!("{what}: {error}"),
        grant: match sys::errno(error) {
            libc::EPERM => "CAP_BPF and CAP_PERFMON in the first user namespace, and no lockdown".to_owned(),
            libc::ENOSYS => "a kernel with CONFIG_BPF_SYSCALL".to_owned(),
            _ => "a kernel from 5.14 on".to_owned(),
        },
    }
}

/// The loaded program and its memory.
#[derive(Debug)]
pub(super) struct Reader {
    program: OwnedFd,
    mapping: OwnMapping,
}

impl Reader {
    pub(super) fn load() -> Result<Self, Unavailable> {
        let map = create_map().map_err(|error| refused("a BPF map is refused", &error))?;
        let program = load_program(&program(map.as_raw_fd()), b"pagefold_refs\0\0")
            .map_err(|error| refused("a BPF program is refused", &error))?;
        let mapping = OwnMapping::shared(&map, size_of::<Area>())
            .map_err(|error| refused("a BPF map cannot be mapped", &error))?;
        Ok(Self { program, mapping })
    }

    pub(super) fn area(&self) -> &Area {
        // SAFETY: the mapping is page-aligned, as long as an Area, lives as long as `self`, and all of it is atomics
        // for which any bits are valid.
        unsafe { &*self.mapping.pointer().cast::<Area>() }
    }

    /// Runs the program on the first `count` entries.
    pub(super) fn run(&self, count: usize) -> io::Result<()> {
        self.area().count.store(count as u64, Ordering::Release);
        let mut attributes = Attributes::default();
        attributes.word32(0, self.program.as_raw_fd().cast_unsigned());
        bpf(BPF_PROG_TEST_RUN, &mut attributes)?;
        std::sync::atomic::fence(Ordering::Acquire);
        Ok(())
    }

    /// Eight bytes of kernel memory, 0 where there is none.
    pub(super) fn read(&self, address: u64) -> io::Result<u64> {
        self.area().entry[0].address.store(address, Ordering::Relaxed);
        self.run(1)?;
        Ok(self.area().entry[0].value.load(Ordering::Relaxed))
    }

    /// The address of the calling thread's `task_struct`.
    pub(super) fn task(&self) -> io::Result<u64> {
        self.run(0)?;
        Ok(self.area().task.load(Ordering::Relaxed))
    }
}

const BPF_MAP_CREATE: i32 = 0;
const BPF_PROG_LOAD: i32 = 5;
pub(super) const BPF_PROG_TEST_RUN: i32 = 10;
const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_F_MMAPABLE: u32 = 1 << 10;
const BPF_PROG_TYPE_SYSCALL: u32 = 31;
const BPF_F_SLEEPABLE: u32 = 1 << 4;
const BPF_PSEUDO_MAP_VALUE: u8 = 2;
pub(super) const HELPER_GET_CURRENT_TASK: i32 = 35;
pub(super) const HELPER_PROBE_READ_KERNEL: i32 = 113;

/// `union bpf_attr`, written field by field at the offsets of include/uapi/linux/bpf.h.
#[repr(C, align(8))]
pub(super) struct Attributes([u8; 128]);

impl Default for Attributes {
    fn default() -> Self {
        Self([0; 128])
    }
}

impl Attributes {
    pub(super) fn word32(&mut self, at: usize, value: u32) {
        self.0[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    }
    pub(super) fn word64(&mut self, at: usize, value: u64) {
        self.0[at..at + 8].copy_from_slice(&value.to_ne_bytes());
    }
}

/// bpf(2); the caller keeps alive what addresses in the attributes point to. Behind one of them the kernel writes: a run
/// gives its context (`ctx_in`) back where it was taken from.
pub(super) fn bpf(command: i32, attributes: &mut Attributes) -> io::Result<i64> {
    let (pointer, length) = (attributes.0.as_mut_ptr(), attributes.0.len());
    // SAFETY: the attributes may be read and written for their length; what their addresses point to is the caller's, and
    // a context is taken by `OwnCounts::run` only, from plain words that it may write.
    sys::check(unsafe { libc::syscall(libc::SYS_bpf, command, pointer, length) })
}

fn owned(fd: i64) -> OwnedFd {
    let fd = i32::try_from(fd).expect("a descriptor is a small number");
    // SAFETY: the kernel has just returned this descriptor to us alone.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn create_map() -> io::Result<OwnedFd> {
    let mut attributes = Attributes::default();
    attributes.word32(0, BPF_MAP_TYPE_ARRAY);
    attributes.word32(4, 4);
    attributes.word32(8, size_of::<Area>() as u32);
    attributes.word32(12, 1);
    attributes.word32(16, BPF_F_MMAPABLE);
    bpf(BPF_MAP_CREATE, &mut attributes).map(owned)
}

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

pub(super) const fn instruction(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers: source << 4 | destination, offset, immediate }
}

/// For each of the first `count` entries: eight bytes at `address` into `value`. And `task`.
fn program(map: i32) -> [Instruction; 20] {
    const LOAD_64: u8 = 0x18;
    const LOAD: u8 = 0x79;
    const STORE: u8 = 0x7b;
    const MOVE: u8 = 0xbf;
    const MOVE_IMMEDIATE: u8 = 0xb7;
    const ADD: u8 = 0x0f;
    const ADD_IMMEDIATE: u8 = 0x07;
    const SHIFT_LEFT: u8 = 0x67;
    const JUMP: u8 = 0x05;
    const JUMP_GE: u8 = 0x3d;
    const JUMP_GE_IMMEDIATE: u8 = 0x35;
    const CALL: u8 = 0x85;
    const EXIT: u8 = 0x95;
    let i = instruction;
    [
        i(LOAD_64, 6, BPF_PSEUDO_MAP_VALUE, 0, map), // r6 = the area
        i(0, 0, 0, 0, 0),
        i(CALL, 0, 0, 0, HELPER_GET_CURRENT_TASK),
        i(STORE, 6, 0, 8, 0),                         // area.task = r0
        i(LOAD, 8, 6, 0, 0),                          // r8 = area.count
        i(MOVE_IMMEDIATE, 7, 0, 0, 0),                // r7 = 0
        i(JUMP_GE_IMMEDIATE, 7, 0, 11, BATCH as i32), // loop: the verifier wants a bound that it can see
        i(JUMP_GE, 7, 8, 10, 0),
        i(MOVE, 9, 7, 0, 0), // r9 = &area.entry[r7]
        i(SHIFT_LEFT, 9, 0, 0, 4),
        i(ADD, 9, 6, 0, 0),
        i(LOAD, 3, 9, 16, 0), // r3 = address
        i(MOVE, 1, 9, 0, 0),  // r1 = &value
        i(ADD_IMMEDIATE, 1, 0, 0, 24),
        i(MOVE_IMMEDIATE, 2, 0, 0, 8), // r2 = 8
        i(CALL, 0, 0, 0, HELPER_PROBE_READ_KERNEL),
        i(ADD_IMMEDIATE, 7, 0, 0, 1),
        i(JUMP, 0, 0, -12, 0),
        i(MOVE_IMMEDIATE, 0, 0, 0, 0),
        i(EXIT, 0, 0, 0, 0),
    ]
}
const _: () = assert!(std::mem::offset_of!(Area, entry) == 16 && size_of::<Entry>() == 16);
const _: () = assert!(size_of::<Instruction>() == 8);

pub(super) fn load_program(program: &[Instruction], name: &[u8; 15]) -> io::Result<OwnedFd> {
    // A licence that the kernel counts as compatible is needed for probe_read_kernel.
    let license = c"Dual MIT/GPL";
    let mut attributes = Attributes::default();
    attributes.word32(0, BPF_PROG_TYPE_SYSCALL);
    attributes.word32(4, program.len() as u32);
    attributes.word64(8, program.as_ptr().expose_provenance() as u64);
    attributes.word64(16, license.as_ptr().expose_provenance() as u64);
    // log_level, log_size and log_buf (24 to 40) and kern_version (40) stay 0.
    attributes.word32(44, BPF_F_SLEEPABLE);
    attributes.0[48..63].copy_from_slice(name);
    bpf(BPF_PROG_LOAD, &mut attributes).map(owned)
}
