//! Exact reference counts of a process's own pages, for one that may ask for nothing else.
//!
//! A program of the type SYSCALL that whoever holds its descriptor can run, without a privilege (Linux 5.19 on). It
//! walks the page table of the process that runs it, at one of two places that were fixed when it was loaded, and tells
//! how many references each of the [`COUNTS`] pages from there on has. So it can be given to a process whose memory is
//! not to be trusted: whatever is done with it, it tells a process about its own pages.
//!
//! Asking another process for the counts costs two changes of threads for each batch, with pages frozen meanwhile; this
//! costs some microseconds.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use super::bpf::{BpfCheck, Unavailable};
use super::btf::{Btf, BtfError};
use super::program::{
    Attributes, BPF_PROG_TEST_RUN, HELPER_GET_CURRENT_TASK, HELPER_PROBE_READ_KERNEL, Instruction, bpf, instruction,
    load_program, refused,
};
use crate::own_memory::OwnMapping;
use crate::units::{PageCount, Vaddr, page_size};

/// Pages that one run of the program tells about.
pub const COUNTS: usize = 64;
const GIB: u64 = 1 << 30;
/// What the program is given and gives back: which of the two places (0 or 1), then a count for each page, 0 for one
/// that is not there or is counted in another page.
pub type Counts = [u64; 1 + COUNTS];

/// Where things are in the running kernel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Places {
    /// Where the array of `struct page` begins.
    pub(super) vmemmap: u64,
    pub(super) struct_page: u64,
    pub(super) refcount: u64,
    /// Where all physical memory is mapped.
    direct_map: u64,
    task_mm: u64,
    mm_pgd: u64,
}

/// The loaded program.
#[derive(Debug)]
pub struct OwnCounts {
    program: OwnedFd,
}

impl OwnCounts {
    /// Loads a program for the [`COUNTS`] pages from each of two addresses on. They must not cross a multiple of 2 MiB.
    ///
    /// The first time in a process, the program is tested with a page of our own that a pipe holds and lets go.
    ///
    /// # Errors
    /// [`Unavailable`]: then a [`BpfCheck`] has to be asked.
    pub fn load(check: &BpfCheck, at: [Vaddr; 2]) -> Result<Self, Unavailable> {
        static TESTED: OnceLock<Result<Places, String>> = OnceLock::new();
        let places = TESTED.get_or_init(|| {
            let places = Places::find(check)?;
            self_test(&places)?;
            Ok(places)
        });
        let places = places.as_ref().map_err(|reason| Unavailable {
            reason: reason.clone(),
            grant: "x86-64 and a kernel with CONFIG_DEBUG_INFO_BTF".to_owned(),
        })?;
        Self::for_places(places, at).map_err(|error| refused("a BPF program is refused", &error))
    }

    fn for_places(places: &Places, at: [Vaddr; 2]) -> io::Result<Self> {
        const HUGE: u64 = 2 << 20;
        let inside = |at: &Vaddr| at.get() % HUGE + COUNTS as u64 * page_size() <= HUGE && at.is_page_aligned();
        // Above that an address is none of a process, and its sum with others is none of the kernel's.
        if !at.iter().all(|at| inside(at) && at.get() < 1 << 47) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let program = program(places, [at[0].get(), at[1].get()]);
        Ok(Self { program: load_program(&program, b"pagefold_own\0\0\0")? })
    }

    /// Runs the program in this process.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn run(&self, counts: &mut Counts) -> io::Result<()> {
        let mut attributes = Attributes::default();
        attributes.word32(0, self.program.as_raw_fd().cast_unsigned());
        // ctx_size_in and ctx_in.
        attributes.word32(40, size_of::<Counts>() as u32);
        attributes.word64(48, counts.as_mut_ptr().expose_provenance() as u64);
        // The kernel reads and writes the counts, which are plain words and the caller's alone.
        bpf(BPF_PROG_TEST_RUN, &mut attributes).map(|_| ())
    }
}

impl AsFd for OwnCounts {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.program.as_fd()
    }
}

impl Places {
    fn find(check: &BpfCheck) -> Result<Self, String> {
        if !cfg!(target_arch = "x86_64") || page_size() != 4096 {
            return Err("page tables are known on x86-64 only".to_owned());
        }
        let offsets = || -> Result<[u64; 3], BtfError> {
            let btf = Btf::vmlinux()?;
            let table_mm = btf.offset_of("ptdesc", "pt_mm")?;
            Ok([btf.offset_of("task_struct", "mm")?, btf.offset_of("mm_struct", "pgd")?, table_mm])
        };
        let [task_mm, mm_pgd, table_mm] = offsets().map_err(|error| error.to_string())?;
        let (vmemmap, struct_page, refcount) = check.layout();
        let read = |address: u64| check.read_kernel(address).map_err(|error| error.to_string());
        let mm = read(check.task().map_err(|error| error.to_string())?.wrapping_add(task_mm))?;
        let pgd = read(mm.wrapping_add(mm_pgd))?;
        if mm >> 63 == 0 || pgd >> 63 == 0 || !pgd.is_multiple_of(page_size()) {
            return Err(format!("the page table is not at {pgd:x}"));
        }
        // Physical memory is mapped as a whole, beginning at a multiple of 1 GiB. So the table's frame is known but for
        // its upper bits, and the right one's description points to the address space.
        let first = pgd % GIB / page_size();
        let frames = highest_frame().ok_or("/proc/zoneinfo does not tell where memory ends")?;
        let mut found = None;
        for frame in (first..frames).step_by((GIB / page_size()) as usize) {
            let described = vmemmap.wrapping_add(frame.wrapping_mul(struct_page));
            if read(described.wrapping_add(table_mm))? == mm {
                if found.is_some() {
                    return Err("two page tables claim to be ours".to_owned());
                }
                found = Some(pgd.wrapping_sub(frame * page_size()));
            }
        }
        let direct_map = found.ok_or("the frame of the page table was not found")?;
        Ok(Self { vmemmap, struct_page, refcount, direct_map, task_mm, mm_pgd })
    }

    /// Which bits of an address are the index at each level above the last.
    fn shifts(&self) -> &'static [i32] {
        // With five levels the kernel's half begins further down.
        if self.direct_map >> 47 == 0x1_ffff { &[39, 30, 21] } else { &[48, 39, 30, 21] }
    }
}

/// The frame behind the last one of all zones.
fn highest_frame() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/zoneinfo").ok()?;
    let number = |line: &str, name: &str| line.trim().strip_prefix(name)?.trim().parse::<u64>().ok();
    let (mut spanned, mut highest) = (0, None);
    for line in text.lines() {
        if let Some(frames) = number(line, "spanned") {
            spanned = frames;
        } else if let Some(first) = number(line, "start_pfn:") {
            highest = highest.max(Some(first + spanned));
        }
    }
    highest
}

/// For each of the pages from the chosen address on: the entry of the page table, from there the frame, from there the
/// reference count. Without loops, since the verifier wants fixed offsets for what is given back.
fn program(places: &Places, at: [u64; 2]) -> Vec<Instruction> {
    const LOAD_64: u8 = 0x18;
    const LOAD: u8 = 0x79;
    const LOAD_32: u8 = 0x61;
    const STORE: u8 = 0x7b;
    const STORE_IMMEDIATE: u8 = 0x7a;
    const MOVE: u8 = 0xbf;
    const MOVE_IMMEDIATE: u8 = 0xb7;
    const ADD: u8 = 0x0f;
    const ADD_IMMEDIATE: u8 = 0x07;
    const AND_IMMEDIATE: u8 = 0x57;
    const MULTIPLY_IMMEDIATE: u8 = 0x27;
    const SHIFT_LEFT: u8 = 0x67;
    const SHIFT_RIGHT: u8 = 0x77;
    const JUMP: u8 = 0x05;
    const JUMP_SET: u8 = 0x45;
    const JUMP_EQUAL: u8 = 0x15;
    const CALL: u8 = 0x85;
    const EXIT: u8 = 0x95;
    /// Of an entry of a page table: it is there; it is a large page itself.
    const PRESENT: i32 = 1;
    const LARGE: i32 = 1 << 7;
    let i = instruction;
    let load_64 =
        |register: u8, value: u64| [i(LOAD_64, register, 0, 0, value as i32), i(0, 0, 0, 0, (value >> 32) as i32)];
    // Reads so many bytes at r3 into the word below the frame pointer.
    let read = |bytes: i32| {
        [
            i(MOVE, 1, 10, 0, 0),
            i(ADD_IMMEDIATE, 1, 0, 0, -8),
            i(MOVE_IMMEDIATE, 2, 0, 0, bytes),
            i(CALL, 0, 0, 0, HELPER_PROBE_READ_KERNEL),
        ]
    };
    // r8 = the frame number in the entry r8.
    let frame = [i(SHIFT_LEFT, 8, 0, 0, 12), i(SHIFT_RIGHT, 8, 0, 0, 24)];
    let leave = [i(MOVE_IMMEDIATE, 0, 0, 0, 0), i(EXIT, 0, 0, 0, 0)];
    let count_at = |page: i32| (8 + page * 8) as i16;
    let mut code = vec![
        i(MOVE, 6, 1, 0, 0), // r6 = the counts
        i(STORE_IMMEDIATE, 10, 0, -8, 0),
        i(MOVE_IMMEDIATE, 9, 0, 0, 0),
    ];
    // Whatever is not found counts 0.
    code.extend((0..COUNTS as i32).map(|page| i(STORE, 6, 9, count_at(page), 0)));
    code.extend([
        i(CALL, 0, 0, 0, HELPER_GET_CURRENT_TASK),
        i(MOVE, 3, 0, 0, 0),
        i(ADD_IMMEDIATE, 3, 0, 0, places.task_mm as i32),
    ]);
    code.extend(read(8));
    code.extend([i(LOAD, 3, 10, -8, 0), i(ADD_IMMEDIATE, 3, 0, 0, places.mm_pgd as i32)]);
    code.extend(read(8));
    code.push(i(LOAD, 8, 10, -8, 0)); // r8 = the table
    code.extend(load_64(7, at[0])); // r7 = the address
    code.extend([i(LOAD, 9, 6, 0, 0), i(JUMP_EQUAL, 9, 0, 2, 0)]);
    code.extend(load_64(7, at[1]));
    for shift in places.shifts() {
        code.extend([
            i(MOVE, 3, 7, 0, 0),
            i(SHIFT_RIGHT, 3, 0, 0, *shift),
            i(AND_IMMEDIATE, 3, 0, 0, 511),
            i(SHIFT_LEFT, 3, 0, 0, 3),
            i(ADD, 3, 8, 0, 0),
        ]);
        code.extend(read(8));
        code.extend([i(LOAD, 8, 10, -8, 0), i(JUMP_SET, 8, 0, 2, PRESENT)]);
        code.extend(leave);
        if *shift <= 30 {
            code.extend([i(JUMP_SET, 8, 0, 1, LARGE), i(JUMP, 0, 0, 2, 0)]);
            code.extend(leave);
        }
        code.extend(frame);
        code.push(i(SHIFT_LEFT, 8, 0, 0, 12));
        code.extend(load_64(3, places.direct_map));
        code.push(i(ADD, 8, 3, 0, 0));
    }
    code.extend([
        i(SHIFT_RIGHT, 7, 0, 0, 12),
        i(AND_IMMEDIATE, 7, 0, 0, 511),
        i(SHIFT_LEFT, 7, 0, 0, 3),
        i(ADD, 7, 8, 0, 0), // r7 = where the first entry is
    ]);
    for page in 0..COUNTS as i32 {
        code.extend([i(MOVE, 3, 7, 0, 0), i(ADD_IMMEDIATE, 3, 0, 0, page * 8)]);
        code.extend(read(8));
        let mut count = frame.to_vec();
        count.push(i(MULTIPLY_IMMEDIATE, 8, 0, 0, places.struct_page as i32));
        count.extend(load_64(3, places.vmemmap.wrapping_add(places.refcount)));
        count.push(i(ADD, 3, 8, 0, 0));
        count.extend(read(4));
        count.extend([i(LOAD_32, 9, 10, -8, 0), i(STORE, 6, 9, count_at(page), 0)]);
        code.extend([i(LOAD, 8, 10, -8, 0), i(JUMP_SET, 8, 0, 1, PRESENT), i(JUMP, 0, 0, count.len() as i16, 0)]);
        code.extend(count);
    }
    code.extend(leave);
    code
}

/// A page of our own counts 1, and 2 while it lies in a pipe.
fn self_test(places: &Places) -> Result<(), String> {
    const HUGE: u64 = 2 << 20;
    let told = |error: &dyn std::error::Error| error.to_string();
    let memory = OwnMapping::anonymous(PageCount(1024)).map_err(|error| told(&error))?;
    let start = Vaddr(memory.start().get().next_multiple_of(HUGE));
    let first = ((start.get() - memory.start().get()) / page_size()) as usize;
    // The second place is the last one before the next table.
    let last = Vaddr(start.get() + HUGE - COUNTS as u64 * page_size());
    let own = OwnCounts::for_places(places, [start, last]).map_err(|error| told(&error))?;
    for (place, first) in [(0, first), (1, first + 512 - COUNTS)] {
        let mut counts: Counts = [7; 1 + COUNTS];
        counts[0] = place;
        let ask = |counts: &mut Counts| own.run(counts).map_err(|error| told(&error));
        ask(&mut counts)?;
        if place == 0 && counts[1..] != [0; COUNTS] {
            return Err(format!("the self-test failed: pages that are not there count {:?}", &counts[1..9]));
        }
        for page in first..first + COUNTS - 1 {
            memory.touch_page(page, 1);
        }
        let _ = crate::lru::drain_batches();
        ask(&mut counts)?;
        if counts[1..COUNTS] != [1; COUNTS - 1] || counts[COUNTS] != 0 {
            return Err(format!("the self-test failed: pages of our own count {:?}", &counts[1..]));
        }
        let held = memory.hold(first + 5).map_err(|error| told(&error))?;
        ask(&mut counts)?;
        if counts[5..8] != [1, 2, 1] {
            return Err(format!("the self-test failed: a page held by a pipe counts {:?}", &counts[5..8]));
        }
        drop(held);
        ask(&mut counts)?;
        if counts[5..8] != [1, 1, 1] {
            return Err(format!("the self-test failed: a page let go by a pipe counts {:?}", &counts[5..8]));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::refcheck::bpf::tests::check;
    use crate::test_memory::Anonymous;

    #[test]
    fn the_self_test_notices_what_is_wrong() {
        let Some(check) = check() else { return };
        let right = Places::find(&check).unwrap();
        self_test(&right).unwrap();
        let wrong = [
            Places { refcount: right.refcount + 4, ..right },
            Places { vmemmap: right.vmemmap + right.struct_page, ..right },
            Places { struct_page: right.struct_page * 2, ..right },
            Places { direct_map: right.direct_map + (1 << 30), ..right },
            Places { mm_pgd: right.mm_pgd + 8, ..right },
        ];
        for places in wrong {
            let error = self_test(&places).unwrap_err();
            assert!(error.contains("self-test failed"), "{places:x?}: {error}");
        }
    }

    #[test]
    fn whoever_has_the_descriptor_may_count_its_own_pages_and_nothing_else() {
        let Some(check) = check() else { return };
        let memory = Anonymous::new(PageCount(1024));
        memory.advise(rustix::mm::Advice::LinuxNoHugepage);
        memory.fill(3);
        let start = Vaddr(memory.range().start().get().next_multiple_of(2 << 20));
        let own = OwnCounts::load(&check, [start, start]).unwrap();
        assert!(OwnCounts::load(&check, [start, start + PageCount(449)]).is_err(), "into the next table");
        crate::lru::drain_batches().unwrap();
        let mut counts: Counts = [9; 1 + COUNTS];
        // Children that other tests have just forked hold the pages too, for as long as they live.
        for _ in 0..100 {
            own.run(&mut counts).unwrap();
            if counts[1..] == [1; COUNTS] {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        assert_eq!(counts[1..], [1; COUNTS]);
        // A child without a privilege: the pages that it shares with its parent, then one of its own.
        let tell = io::pipe().unwrap();
        // SAFETY: the child makes system calls only.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: gives up every privilege; ends the child.
            unsafe {
                libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534);
                memory.write(start.get() - memory.range().start().get(), 4);
                let mut counts: Counts = [9; 1 + COUNTS];
                let ran = own.run(&mut counts).is_ok();
                let report = [u8::from(ran), counts[1] as u8, counts[2] as u8];
                libc::write(tell.1.as_raw_fd(), report.as_ptr().cast(), report.len());
                libc::_exit(0);
            }
        }
        let mut report = [0; 3];
        io::Read::read_exact(&mut &tell.0, &mut report).unwrap();
        // SAFETY: waits for the child made above.
        unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
        assert_eq!(report[0], 1, "it runs");
        // The copy just made may wait in a batch of its CPU.
        assert!((1..=2).contains(&report[1]) && report[2] >= 2, "{report:?}");
    }
}
