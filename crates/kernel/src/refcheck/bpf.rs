//! Exact reference counts of page frames, read by a BPF program.
//!
//! A program of the type SYSCALL runs only when asked to and reads eight bytes at each of up to [`BATCH`] kernel
//! addresses: 0.14 us a page, and no other CPU notices. The layout of `struct page` comes from the kernel's type
//! information. Where the array of all `struct page` begins (it is randomised) is found with the same program: the page
//! cache of a memory file of our own points to its page's structure, whose frame number pagemap tells.
//!
//! What a count means: each mapping holds one reference, the swap cache one, the page cache one, a batch of pages that
//! are about to join an LRU list one (a fresh page shows 2 until its batch of 31 drains, a safe false alarm). Pages
//! inside a large folio count in their first page only; the others read 0.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::mm::{MapFlags, ProtFlags};
use rustix::pipe::{IoSliceRaw, SpliceFlags};
use thiserror::Error;

use super::btf::{Btf, BtfError};
use crate::memfd;
use crate::pagemap::{Pagemap, PagemapEntry, PagemapError};
use crate::shared::SharedLayout;
use crate::status;
use crate::sys;
use crate::units::{Bytes, PageCount, Pid, Vaddr, page_size};

/// The most counts that are read in one call.
pub const BATCH: usize = 512;

/// Why exact reference counts cannot be read here.
#[derive(Debug, Error)]
#[error("exact reference counts cannot be read: {reason}")]
pub struct Unavailable {
    /// What failed.
    pub reason: String,
    /// What would make it work, as an instruction.
    pub grant: String,
}

/// What can go wrong while counts are read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BpfError {
    /// The program did not run.
    #[error("cannot run the program that reads reference counts")]
    Run {
        /// What the kernel said.
        source: io::Error,
    },
    /// More than [`BATCH`] pages, or lists of different lengths.
    #[error("cannot read {pfns} reference counts into {room} places, {BATCH} at most")]
    Length {
        /// Pages asked about.
        pfns: usize,
        /// Places for the answer.
        room: usize,
    },
    /// The frame numbers could not be read.
    #[error("cannot find the frames of the pages")]
    Pagemap(#[from] PagemapError),
}

/// What program and caller share. All words are atomics, because the kernel writes them behind Rust's back.
#[repr(C)]
struct Area {
    count: AtomicU64,
    task: AtomicU64,
    entry: [Entry; BATCH],
}

#[repr(C)]
struct Entry {
    address: AtomicU64,
    value: AtomicU64,
}

// SAFETY: a repr(C) structure of atomics of integers.
unsafe impl SharedLayout for Area {}

/// Reads reference counts. Each thread that reads has its own.
#[derive(Debug)]
pub struct BpfCheck {
    reader: Reader,
    vmemmap: u64,
    struct_page: u64,
    refcount: u64,
}

impl BpfCheck {
    /// Loads the program, finds the array of `struct page` and tests itself: a page of our own counts 1, and 2 while
    /// it lies in a pipe.
    ///
    /// # Errors
    /// [`Unavailable`], with the missing capability where it is one.
    pub fn new() -> Result<Self, Unavailable> {
        capable()?;
        let layout = Layout::of_running_kernel()?;
        let reader = Reader::load()?;
        let vmemmap = find_vmemmap(&reader, &layout)?;
        let mut check = Self { reader, vmemmap, struct_page: layout.struct_page, refcount: layout.refcount };
        check.self_test()?;
        Ok(check)
    }

    /// Reads the reference count of each frame; 0 where it cannot be read or is counted in another page.
    ///
    /// # Errors
    /// [`BpfError::Length`], [`BpfError::Run`].
    pub fn refs(&mut self, pfns: &[u64], out: &mut [u32]) -> Result<(), BpfError> {
        if pfns.len() > BATCH || pfns.len() != out.len() {
            return Err(BpfError::Length { pfns: pfns.len(), room: out.len() });
        }
        let area = self.reader.area();
        // The counter is four bytes; the program reads the eight aligned ones around it.
        let shift = self.refcount % 8 * 8;
        for (entry, pfn) in area.entry.iter().zip(pfns) {
            let page = self.vmemmap.wrapping_add(pfn.wrapping_mul(self.struct_page));
            entry.address.store(page.wrapping_add(self.refcount & !7), Ordering::Relaxed);
        }
        self.reader.run(pfns.len()).map_err(|source| BpfError::Run { source })?;
        for (entry, count) in area.entry.iter().zip(out.iter_mut()) {
            *count = (entry.value.load(Ordering::Relaxed) >> shift & u64::from(u32::MAX)) as u32;
        }
        Ok(())
    }

    /// Reads the reference count of each page from `start` on; 0 for a page that is not there.
    ///
    /// # Errors
    /// [`BpfError`].
    pub fn refs_at(&mut self, pagemap: &Pagemap, start: Vaddr, out: &mut [u32]) -> Result<(), BpfError> {
        let mut entries = [PagemapEntry(0); BATCH];
        let mut pfns = [0_u64; BATCH];
        for (chunk, part) in out.chunks_mut(BATCH).enumerate() {
            let from = start + PageCount((chunk * BATCH) as u64);
            let entries = &mut entries[..part.len()];
            entries.fill(PagemapEntry(0));
            pagemap.entries(from, entries)?;
            for (pfn, entry) in pfns.iter_mut().zip(entries.iter()) {
                *pfn = entry.pfn().unwrap_or(0);
            }
            self.refs(&pfns[..part.len()], part)?;
            for (count, entry) in part.iter_mut().zip(entries.iter()) {
                if entry.pfn().is_none() {
                    *count = 0;
                }
            }
        }
        Ok(())
    }

    fn self_test(&mut self) -> Result<(), Unavailable> {
        let failed = |what: String| Unavailable {
            reason: format!("the self-test failed: {what}"),
            grant: "report this kernel's version; until then use --check collapse or vouch".to_owned(),
        };
        let run = |error: BpfError| failed(error.to_string());
        let pagemap = Pagemap::open(Pid::this()).map_err(|error| failed(error.to_string()))?;
        let pages = PageCount(128);
        let memory = OwnMapping::anonymous(pages).map_err(|error| failed(error.to_string()))?;
        let mut counts = [0_u32; 128];
        // A page that is still on its way to an LRU list counts 2; touching as many again lets the list drain.
        let mut free = None;
        for round in 0..20 {
            memory.touch(round);
            self.refs_at(&pagemap, memory.start(), &mut counts).map_err(run)?;
            free = counts.iter().position(|count| *count == 1);
            if free.is_some() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let Some(free) = free else {
            return Err(failed(format!("no page of our own counts 1, but {:?}", &counts[..4])));
        };
        let page = memory.start() + PageCount(free as u64);
        let (_reader, writer) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|error| failed(error.to_string()))?;
        let slice = [IoSliceRaw::from_slice(memory.page(free))];
        // SAFETY: the page is our own mapping's and outlives the pipe.
        unsafe { rustix::pipe::vmsplice(&writer, &slice, SpliceFlags::empty()) }
            .map_err(|error| failed(error.to_string()))?;
        let mut held = [0_u32];
        self.refs_at(&pagemap, page, &mut held).map_err(run)?;
        if held[0] != 2 {
            return Err(failed(format!("a page held by a pipe counts {} instead of 2", held[0])));
        }
        drop((_reader, writer));
        self.refs_at(&pagemap, page, &mut held).map_err(run)?;
        if held[0] != 1 {
            return Err(failed(format!("a page let go by a pipe counts {} instead of 1", held[0])));
        }
        Ok(())
    }
}

/// Says which capability is missing before the kernel says only EPERM.
fn capable() -> Result<(), Unavailable> {
    const CAP_SYS_ADMIN: u64 = 1 << 21;
    let capabilities = status::read(Pid::this()).map(|status| status.cap_eff).unwrap_or(u64::MAX);
    if capabilities & CAP_SYS_ADMIN == 0 {
        return Err(Unavailable {
            reason: "page frame numbers need CAP_SYS_ADMIN, the program CAP_BPF and CAP_PERFMON".to_owned(),
            grant: "run as root, or grant CAP_SYS_ADMIN (it includes the other two)".to_owned(),
        });
    }
    Ok(())
}

/// The offsets that are needed, from the kernel's type information.
struct Layout {
    struct_page: u64,
    refcount: u64,
    task_files: u64,
    files_fdt: u64,
    fdt_fd: u64,
    file_mapping: u64,
    mapping_head: u64,
}

impl Layout {
    fn of_running_kernel() -> Result<Self, Unavailable> {
        Self::read().map_err(|error| Unavailable {
            reason: match &error {
                BtfError::Read(source) => format!("{error}: {source}"),
                _ => error.to_string(),
            },
            grant: "a kernel with CONFIG_DEBUG_INFO_BTF".to_owned(),
        })
    }

    fn read() -> Result<Self, BtfError> {
        let btf = Btf::vmlinux()?;
        Ok(Self {
            struct_page: btf.size_of("page")?,
            refcount: btf.offset_of("page", "_refcount")?,
            task_files: btf.offset_of("task_struct", "files")?,
            files_fdt: btf.offset_of("files_struct", "fdt")?,
            fdt_fd: btf.offset_of("fdtable", "fd")?,
            file_mapping: btf.offset_of("file", "f_mapping")?,
            mapping_head: btf.offset_of("address_space", "i_pages")? + btf.offset_of("xarray", "xa_head")?,
        })
    }
}

/// Finds where the array of `struct page` begins: the page cache of a file of one page is a pointer to that page.
fn find_vmemmap(reader: &Reader, layout: &Layout) -> Result<u64, Unavailable> {
    let failed = |what: String| Unavailable {
        reason: format!("the array of pages was not found: {what}"),
        grant: "a kernel with SPARSEMEM_VMEMMAP that is not locked down for confidentiality".to_owned(),
    };
    let pagemap = Pagemap::open(Pid::this()).map_err(|error| failed(error.to_string()))?;
    let mut found = None;
    // Several files, so that a structure that only looks right is found out.
    for _ in 0..4 {
        let file = memfd::create("pagefold-probe", Bytes(page_size())).map_err(|error| failed(error.to_string()))?;
        let memory = OwnMapping::shared(&file).map_err(|error| failed(error.to_string()))?;
        memory.touch(1);
        let entry = pagemap.entry(memory.start()).map_err(|error| failed(error.to_string()))?;
        let pfn = entry.pfn().ok_or_else(|| failed("no frame numbers in pagemap".to_owned()))?;
        let read = |address: u64| match reader.read(address) {
            Ok(0) => Err(failed(format!("nothing to read at {address:x}"))),
            Ok(value) => Ok(value),
            Err(error) => Err(failed(error.to_string())),
        };
        let task = reader.task().map_err(|error| failed(error.to_string()))?;
        let files = read(task.wrapping_add(layout.task_files))?;
        let table = read(files.wrapping_add(layout.files_fdt))?;
        let slots = read(table.wrapping_add(layout.fdt_fd))?;
        let file = read(slots.wrapping_add(file.as_raw_fd().unsigned_abs() as u64 * 8))?;
        let mapping = read(file.wrapping_add(layout.file_mapping))?;
        let page = read(mapping.wrapping_add(layout.mapping_head))?;
        let base = page.wrapping_sub(pfn.wrapping_mul(layout.struct_page));
        // Kernel addresses have the top bit; entries that are no pointers to a page have one of the lowest two.
        if page & 3 != 0 || page >> 63 == 0 || found.is_some_and(|found| found != base) {
            return Err(failed(format!("frame {pfn:x} is not described at {page:x}")));
        }
        found = Some(base);
    }
    found.ok_or_else(|| failed("nothing was tried".to_owned()))
}

/// The loaded program and its memory.
#[derive(Debug)]
struct Reader {
    program: OwnedFd,
    mapping: OwnMapping,
}

impl Reader {
    fn load() -> Result<Self, Unavailable> {
        let refused = |what: &str, error: &io::Error| Unavailable {
            reason: format!("{what}: {error}"),
            grant: match sys::errno(error) {
                libc::EPERM => "CAP_BPF and CAP_PERFMON in the first user namespace, and no lockdown".to_owned(),
                libc::ENOSYS => "a kernel with CONFIG_BPF_SYSCALL".to_owned(),
                _ => "a kernel from 5.14 on".to_owned(),
            },
        };
        let map = create_map().map_err(|error| refused("a BPF map is refused", &error))?;
        let program = load_program(&map).map_err(|error| refused("a BPF program is refused", &error))?;
        let mapping = OwnMapping::shared_of(&map, size_of::<Area>())
            .map_err(|error| refused("a BPF map cannot be mapped", &error))?;
        Ok(Self { program, mapping })
    }

    fn area(&self) -> &Area {
        // SAFETY: the mapping is page-aligned, as long as an Area, lives as long as `self`, and all of it is atomics
        // for which any bits are valid.
        unsafe { &*self.mapping.pointer.cast::<Area>() }
    }

    /// Runs the program on the first `count` entries.
    fn run(&self, count: usize) -> io::Result<()> {
        self.area().count.store(count as u64, Ordering::Release);
        let mut attributes = Attributes::default();
        attributes.word32(0, self.program.as_raw_fd().cast_unsigned());
        bpf(BPF_PROG_TEST_RUN, &mut attributes)?;
        std::sync::atomic::fence(Ordering::Acquire);
        Ok(())
    }

    /// Eight bytes of kernel memory, 0 where there is none.
    fn read(&self, address: u64) -> io::Result<u64> {
        self.area().entry[0].address.store(address, Ordering::Relaxed);
        self.run(1)?;
        Ok(self.area().entry[0].value.load(Ordering::Relaxed))
    }

    /// The address of the calling thread's `task_struct`.
    fn task(&self) -> io::Result<u64> {
        self.run(0)?;
        Ok(self.area().task.load(Ordering::Relaxed))
    }
}

const BPF_MAP_CREATE: i32 = 0;
const BPF_PROG_LOAD: i32 = 5;
const BPF_PROG_TEST_RUN: i32 = 10;
const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_F_MMAPABLE: u32 = 1 << 10;
const BPF_PROG_TYPE_SYSCALL: u32 = 31;
const BPF_F_SLEEPABLE: u32 = 1 << 4;
const BPF_PSEUDO_MAP_VALUE: u8 = 2;
const HELPER_GET_CURRENT_TASK: i32 = 35;
const HELPER_PROBE_READ_KERNEL: i32 = 113;

/// `union bpf_attr`, written field by field at the offsets of include/uapi/linux/bpf.h.
#[repr(C, align(8))]
struct Attributes([u8; 128]);

impl Default for Attributes {
    fn default() -> Self {
        Self([0; 128])
    }
}

impl Attributes {
    fn word32(&mut self, at: usize, value: u32) {
        self.0[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    }
    fn word64(&mut self, at: usize, value: u64) {
        self.0[at..at + 8].copy_from_slice(&value.to_ne_bytes());
    }
}

/// bpf(2); the caller keeps alive what addresses in the attributes point to.
fn bpf(command: i32, attributes: &mut Attributes) -> io::Result<i64> {
    let (pointer, length) = (attributes.0.as_mut_ptr(), attributes.0.len());
    // SAFETY: the attributes may be read and written for their length; of the three commands used here none writes
    // behind an address in them.
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
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

fn instruction(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Instruction {
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

fn load_program(map: &OwnedFd) -> io::Result<OwnedFd> {
    let program = program(map.as_raw_fd());
    // A licence that the kernel counts as compatible is needed for probe_read_kernel.
    let license = c"Dual MIT/GPL";
    let mut attributes = Attributes::default();
    attributes.word32(0, BPF_PROG_TYPE_SYSCALL);
    attributes.word32(4, program.len() as u32);
    attributes.word64(8, program.as_ptr().expose_provenance() as u64);
    attributes.word64(16, license.as_ptr().expose_provenance() as u64);
    // log_level, log_size and log_buf (24 to 40) and kern_version (40) stay 0.
    attributes.word32(44, BPF_F_SLEEPABLE);
    attributes.0[48..63].copy_from_slice(b"pagefold_refs\0\0");
    bpf(BPF_PROG_LOAD, &mut attributes).map(owned)
}

/// A mapping of our own, unmapped when it goes.
#[derive(Debug)]
struct OwnMapping {
    pointer: *mut u8,
    length: usize,
}

// SAFETY: the mapping belongs to the value alone.
unsafe impl Send for OwnMapping {}

impl OwnMapping {
    fn anonymous(pages: PageCount) -> io::Result<Self> {
        let length = pages.bytes().0 as usize;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the address, so no existing memory is touched.
        let pointer = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), length, prot, MapFlags::PRIVATE) }?;
        let mapping = Self { pointer: pointer.cast(), length };
        // A large folio counts in its first page, which would be of no use to the self-test. Where the kernel has no
        // huge pages the advice is refused, and not needed.
        // SAFETY: the range is our own mapping.
        let _ = unsafe { rustix::mm::madvise(pointer, length, rustix::mm::Advice::LinuxNoHugepage) };
        Ok(mapping)
    }

    fn shared(file: &OwnedFd) -> io::Result<Self> {
        Self::shared_of(file, page_size() as usize)
    }

    fn shared_of(file: &OwnedFd, length: usize) -> io::Result<Self> {
        let length = length.next_multiple_of(page_size() as usize);
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: the kernel chooses the address, so no existing memory is touched.
        let pointer = unsafe { rustix::mm::mmap(std::ptr::null_mut(), length, prot, flags, file.as_fd(), 0) }?;
        Ok(Self { pointer: pointer.cast(), length })
    }

    fn start(&self) -> Vaddr {
        Vaddr(self.pointer.expose_provenance() as u64)
    }

    /// Writes the first byte of every page, so that all are there.
    fn touch(&self, value: u8) {
        for offset in (0..self.length).step_by(page_size() as usize) {
            // SAFETY: the offset lies in our own mapping, into which nobody holds references.
            unsafe { self.pointer.add(offset).write_volatile(value) };
        }
    }

    fn page(&self, index: usize) -> &[u8] {
        let size = page_size() as usize;
        assert!((index + 1) * size <= self.length);
        // SAFETY: the page lies in our own mapping and is not written while the slice is alive.
        unsafe { std::slice::from_raw_parts(self.pointer.add(index * size), size) }
    }
}

impl Drop for OwnMapping {
    fn drop(&mut self) {
        // SAFETY: this is our own mapping, and no reference into it outlives `self`.
        let unmapped = unsafe { rustix::mm::munmap(self.pointer.cast(), self.length) };
        debug_assert!(unmapped.is_ok(), "a mapping of our own can be unmapped");
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::test_memory::Anonymous;

    fn check() -> Option<BpfCheck> {
        match BpfCheck::new() {
            Ok(check) => Some(check),
            Err(error) => {
                assert!(!rustix::process::geteuid().is_root(), "{error}; {}", error.grant);
                println!("skipped: {error}; {}", error.grant);
                None
            }
        }
    }

    #[test]
    fn pages_that_nobody_holds_count_1() {
        let Some(mut check) = check() else { return };
        let memory = Anonymous::new(PageCount(256));
        memory.advise(rustix::mm::Advice::LinuxNoHugepage);
        memory.fill(3);
        let pagemap = Pagemap::open(Pid::this()).unwrap();
        let mut counts = vec![0; 256];
        check.refs_at(&pagemap, memory.range().start(), &mut counts).unwrap();
        let single = counts.iter().filter(|count| **count == 1).count();
        assert!(single >= 128, "{single} of 256 pages count 1: {counts:?}");
        assert!(counts.iter().all(|count| *count == 1 || *count == 2), "{counts:?}");
        let unmapped = Anonymous::new(PageCount(4));
        let mut none = [9; 4];
        check.refs_at(&pagemap, unmapped.range().start(), &mut none).unwrap();
        assert_eq!(none, [0; 4]);
    }

    #[test]
    fn frames_that_do_not_exist_count_0() {
        let Some(mut check) = check() else { return };
        let mut counts = [7; 2];
        check.refs(&[1 << 40, u64::MAX / 128], &mut counts).unwrap();
        assert_eq!(counts, [0, 0]);
        assert!(matches!(check.refs(&[0; 513], &mut [0; 513]), Err(BpfError::Length { .. })));
        assert!(matches!(check.refs(&[0; 2], &mut [0; 1]), Err(BpfError::Length { .. })));
    }
}
