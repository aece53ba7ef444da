//! The flag words of a userfaultfd (include/uapi/linux/userfaultfd.h).

use bitflags::bitflags;

bitflags! {
    /// How a descriptor is made.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct CreateFlags: u32 {
        /// Only faults from user mode wait; those from system calls fail with EFAULT. Needs no privilege, is good for
        /// tracking writes, and must not be used to freeze pages of a running program.
        const USER_MODE_ONLY = 1;
    }
}

bitflags! {
    /// UFFD_FEATURE_*.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct UffdFeatures: u64 {
        /// Faults carry the write-protect flag.
        const PAGEFAULT_FLAG_WP = 1;
        /// Forks are reported, with a descriptor for the child. Needs CAP_SYS_PTRACE in whoever calls [`Uffd::api`].
        const EVENT_FORK = 1 << 1;
        /// mremap is reported.
        const EVENT_REMAP = 1 << 2;
        /// MADV_DONTNEED and its like are reported.
        const EVENT_REMOVE = 1 << 3;
        /// MISSING on hugetlb.
        const MISSING_HUGETLBFS = 1 << 4;
        /// MISSING on shmem.
        const MISSING_SHMEM = 1 << 5;
        /// munmap is reported.
        const EVENT_UNMAP = 1 << 6;
        /// SIGBUS instead of an event.
        const SIGBUS = 1 << 7;
        /// Faults carry a thread id.
        const THREAD_ID = 1 << 8;
        /// MINOR on hugetlb.
        const MINOR_HUGETLBFS = 1 << 9;
        /// MINOR on shmem.
        const MINOR_SHMEM = 1 << 10;
        /// Faults carry the exact address.
        const EXACT_ADDRESS = 1 << 11;
        /// WP on hugetlb and shmem.
        const WP_HUGETLBFS_SHMEM = 1 << 12;
        /// WP of pages that are not there.
        const WP_UNPOPULATED = 1 << 13;
        /// UFFDIO_POISON.
        const POISON = 1 << 14;
        /// Write protection that the kernel lifts by itself; what PAGEMAP_SCAN tracks writes with (Linux 6.7).
        const WP_ASYNC = 1 << 15;
        /// UFFDIO_MOVE (Linux 6.8).
        const MOVE = 1 << 16;
        const _ = !0;
    }
}

bitflags! {
    /// What a registered range waits for.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Mode: u64 {
        /// Pages that are not there.
        const MISSING = 1;
        /// Writes to protected pages.
        const WP = 2;
        /// Pages that are in the page cache but not mapped.
        const MINOR = 4;
    }
}

bitflags! {
    /// How [`Uffd::copy_with`] puts pages in.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct CopyMode: u64 {
        /// Do not wake who waits on the pages.
        const DONTWAKE = 1;
        /// Write-protect the pages.
        const WP = 2;
    }
}

bitflags! {
    /// Why a thread waits, in [`Event::Pagefault`].
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct FaultFlags: u64 {
        /// A write.
        const WRITE = 1;
        /// To a protected page.
        const WP = 2;
        /// To a page that is in the page cache.
        const MINOR = 4;
        const _ = !0;
    }
}
