//! Kernel structures and ioctl numbers that only this crate needs (include/uapi/linux); those that the agent shares
//! are in `abi::uapi`.

pub(crate) use abi::uapi::*;

const fn ioc(direction: u32, kind: u8, number: u32, size: usize) -> u32 {
    direction << 30 | (size as u32) << 16 | (kind as u32) << 8 | number
}
const NONE: u32 = 0;
const READ_WRITE: u32 = 3;

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PmScanArg {
    pub(crate) size: u64,
    pub(crate) flags: u64,
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) walk_end: u64,
    pub(crate) vec: u64,
    pub(crate) vec_len: u64,
    pub(crate) max_pages: u64,
    pub(crate) category_inverted: u64,
    pub(crate) category_mask: u64,
    pub(crate) category_anyof_mask: u64,
    pub(crate) return_mask: u64,
}
pub(crate) const PM_SCAN_WP_MATCHING: u64 = 1;
pub(crate) const PM_SCAN_CHECK_WPASYNC: u64 = 2;
pub(crate) const PAGEMAP_SCAN: u32 = ioc(READ_WRITE, b'f', 16, size_of::<PmScanArg>());
const _: () = assert!(size_of::<PmScanArg>() == 96);
const _: () = assert!(PAGEMAP_SCAN == 0xc060_6610);

/// `struct uffdio_writeprotect`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct UffdioWriteprotect {
    pub(crate) range: UffdioRange,
    pub(crate) mode: u64,
}
pub(crate) const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1;
pub(crate) const UFFDIO_WRITEPROTECT: u32 = ioc(READ_WRITE, 0xaa, 0x06, size_of::<UffdioWriteprotect>());
const _: () = assert!(UFFDIO_WRITEPROTECT == 0xc018_aa06);

/// `struct uffdio_zeropage`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct UffdioZeropage {
    pub(crate) range: UffdioRange,
    pub(crate) mode: u64,
    pub(crate) zeropage: i64,
}
pub(crate) const UFFDIO_ZEROPAGE: u32 = ioc(READ_WRITE, 0xaa, 0x04, size_of::<UffdioZeropage>());
const _: () = assert!(UFFDIO_ZEROPAGE == 0xc020_aa04);

const _: () = assert!(USERFAULTFD_IOC_NEW == ioc(NONE, 0xaa, 0, 0));

/// `struct uffd_msg`: the event, and three words whose meaning depends on it.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct UffdMsg {
    pub(crate) event: u8,
    pub(crate) reserved: [u8; 7],
    pub(crate) arg: [u64; 3],
}
pub(crate) const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
pub(crate) const UFFD_EVENT_FORK: u8 = 0x13;
pub(crate) const UFFD_EVENT_REMAP: u8 = 0x14;
pub(crate) const UFFD_EVENT_REMOVE: u8 = 0x15;
pub(crate) const UFFD_EVENT_UNMAP: u8 = 0x16;
const _: () = assert!(size_of::<UffdMsg>() == 32);

/// The vec entry of PAGEMAP_SCAN, `struct page_region`, is `pagemap::Region` itself; this is its size.
pub(crate) const PAGE_REGION_SIZE: usize = 24;

/// PROCMAP_QUERY: if no mapping holds the address, the next one behind it.
pub(crate) const PROCMAP_QUERY_COVERING_OR_NEXT_VMA: u64 = 0x10;
