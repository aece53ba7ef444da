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
use std::os::fd::AsRawFd;
use std::sync::OnceLock;
use std::sync::atomic::Ordering;

use thiserror::Error;

use super::btf::{Btf, BtfError};
use super::program::Reader;
use crate::memfd;
use crate::own_memory::OwnMapping;
use crate::pagemap::{Pagemap, PagemapEntry, PagemapError};
use crate::status;
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
        /// Where the running kernel keeps its counts: the same for as long as this process lives, and megabytes of
        /// type information to find out.
        static FOUND: OnceLock<(u64, u64, u64)> = OnceLock::new();
        capable()?;
        let reader = Reader::load()?;
        let (vmemmap, struct_page, refcount) = match FOUND.get() {
            Some(found) => *found,
            None => {
                let layout = Layout::of_running_kernel()?;
                (find_vmemmap(&reader, &layout)?, layout.struct_page, layout.refcount)
            }
        };
        let mut check = Self { reader, vmemmap, struct_page, refcount };
        check.self_test()?;
        // Only what has passed its test is used again, and each check is tested.
        let _ = FOUND.set((vmemmap, struct_page, refcount));
        Ok(check)
    }

    /// Where the array of `struct page` begins, how long one is, and where in it the count is.
    pub(super) fn layout(&self) -> (u64, u64, u64) {
        (self.vmemmap, self.struct_page, self.refcount)
    }

    /// Where the calling thread is described.
    pub(super) fn task(&self) -> io::Result<u64> {
        self.reader.task()
    }

    /// Eight bytes of kernel memory.
    pub(super) fn read_kernel(&self, address: u64) -> io::Result<u64> {
        self.reader.read(address)
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
        let pipe = memory.hold(free).map_err(|error| failed(error.to_string()))?;
        let mut held = [0_u32];
        self.refs_at(&pagemap, page, &mut held).map_err(run)?;
        if held[0] != 2 {
            return Err(failed(format!("a page held by a pipe counts {} instead of 2", held[0])));
        }
        drop(pipe);
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
        let memory = OwnMapping::shared(&file, page_size() as usize).map_err(|error| failed(error.to_string()))?;
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

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::test_memory::Anonymous;

    /// A check, for every test that needs one. As root there must be one.
    pub(crate) fn check() -> Option<BpfCheck> {
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
    fn the_self_test_notices_a_wrong_layout() {
        let Some(mut check) = check() else { return };
        assert!(check.self_test().is_ok());
        for wrong in [check.refcount ^ 4, 0, 8] {
            let right = std::mem::replace(&mut check.refcount, wrong);
            let error = check.self_test().unwrap_err();
            assert!(error.reason.contains("self-test failed"), "{error}");
            check.refcount = right;
        }
        check.vmemmap += check.struct_page;
        assert!(check.self_test().is_err());
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
