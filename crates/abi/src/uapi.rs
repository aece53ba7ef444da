//! Kernel structures and ioctl numbers that crates without std pass to the kernel (include/uapi/linux).

/// Composes an ioctl number as `_IOC` does: direction, type, number, size.
const fn ioc(direction: u32, kind: u32, number: u32, size: usize) -> u32 {
    direction << 30 | (size as u32) << 16 | kind << 8 | number
}
const WRITE: u32 = 1;
const READ: u32 = 2;

/// `struct uffdio_api`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct UffdioApi {
    /// Protocol version, `UFFD_API`.
    pub api: u64,
    /// Features asked for, then granted.
    pub features: u64,
    /// Ioctls that are there.
    pub ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct UffdioRange {
    /// First byte.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct UffdioRegister {
    /// What to register.
    pub range: UffdioRange,
    /// MISSING, WP, MINOR.
    pub mode: u64,
    /// Ioctls that can be used on it.
    pub ioctls: u64,
}

/// `struct uffdio_copy`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct UffdioCopy {
    /// Destination, in the address space of the descriptor.
    pub dst: u64,
    /// Source, in the address space of the caller.
    pub src: u64,
    /// Length in bytes.
    pub len: u64,
    /// Mode bits.
    pub mode: u64,
    /// Bytes copied, or a negative error number.
    pub copy: i64,
}

/// `struct uffdio_move`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct UffdioMove {
    /// Destination.
    pub dst: u64,
    /// Source.
    pub src: u64,
    /// Length in bytes.
    pub len: u64,
    /// Mode bits.
    pub mode: u64,
    /// Bytes moved, or a negative error number.
    pub moved: i64,
}

/// `struct procmap_query`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ProcmapQuery {
    /// Size of this structure.
    pub size: u64,
    /// Query flags.
    pub query_flags: u64,
    /// Address asked for.
    pub query_addr: u64,
    /// The mapping's first byte.
    pub vma_start: u64,
    /// The byte behind the mapping.
    pub vma_end: u64,
    /// READABLE 1, WRITABLE 2, EXECUTABLE 4, SHARED 8.
    pub vma_flags: u64,
    /// Page size of the mapping.
    pub vma_page_size: u64,
    /// Offset in the file.
    pub vma_offset: u64,
    /// Inode number, 0 for anonymous memory.
    pub inode: u64,
    /// Device of the inode.
    pub dev_major: u32,
    /// Device of the inode.
    pub dev_minor: u32,
    /// Room for the name.
    pub vma_name_size: u32,
    /// Room for the build-id.
    pub build_id_size: u32,
    /// Where to put the name.
    pub vma_name_addr: u64,
    /// Where to put the build-id.
    pub build_id_addr: u64,
}

/// Version of the userfaultfd protocol.
pub const UFFD_API: u64 = 0xaa;
/// Wait for pages that are not there.
pub const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;
/// Track or trap writes.
pub const UFFDIO_REGISTER_MODE_WP: u64 = 2;
/// Wait for pages that are in the page cache but not mapped.
pub const UFFDIO_REGISTER_MODE_MINOR: u64 = 4;
/// Let UFFDIO_MOVE leave out holes in the source.
pub const UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES: u64 = 2;

/// UFFDIO_API.
pub const UFFDIO_API: u32 = ioc(READ | WRITE, 0xaa, 0x3f, size_of::<UffdioApi>());
/// UFFDIO_REGISTER.
pub const UFFDIO_REGISTER: u32 = ioc(READ | WRITE, 0xaa, 0x00, size_of::<UffdioRegister>());
/// UFFDIO_UNREGISTER.
pub const UFFDIO_UNREGISTER: u32 = ioc(READ, 0xaa, 0x01, size_of::<UffdioRange>());
/// UFFDIO_WAKE.
pub const UFFDIO_WAKE: u32 = ioc(READ, 0xaa, 0x02, size_of::<UffdioRange>());
/// UFFDIO_COPY.
pub const UFFDIO_COPY: u32 = ioc(READ | WRITE, 0xaa, 0x03, size_of::<UffdioCopy>());
/// UFFDIO_MOVE.
pub const UFFDIO_MOVE: u32 = ioc(READ | WRITE, 0xaa, 0x05, size_of::<UffdioMove>());
/// USERFAULTFD_IOC_NEW on /dev/userfaultfd.
pub const USERFAULTFD_IOC_NEW: u32 = ioc(0, 0xaa, 0x00, 0);
/// Flag of PROCMAP_QUERY: the mapping at the address, or the next one above.
pub const PROCMAP_QUERY_COVERING_OR_NEXT_VMA: u64 = 0x10;
/// PROCMAP_QUERY on /proc/PID/maps.
pub const PROCMAP_QUERY: u32 = ioc(READ | WRITE, b'f' as u32, 17, size_of::<ProcmapQuery>());

// The numbers as the kernel's headers give them on x86-64 and aarch64.
const _: () = assert!(UFFDIO_API == 0xc018_aa3f);
const _: () = assert!(UFFDIO_REGISTER == 0xc020_aa00);
const _: () = assert!(UFFDIO_UNREGISTER == 0x8010_aa01);
const _: () = assert!(UFFDIO_WAKE == 0x8010_aa02);
const _: () = assert!(UFFDIO_COPY == 0xc028_aa03);
const _: () = assert!(UFFDIO_MOVE == 0xc028_aa05);
const _: () = assert!(USERFAULTFD_IOC_NEW == 0xaa00);
const _: () = assert!(size_of::<ProcmapQuery>() == 104);
