//! The names of the causes.

use serde::{Deserialize, Serialize};

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $word:literal,)*) => {
        /// What stands in the way. The words are a contract: they do not change once a release had them.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[non_exhaustive]
        pub enum Code {
            $($(#[$doc])* #[serde(rename = $word)] $name,)*
        }

        impl Code {
            /// All of them, those of the host first.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// Its word, as JSON has it.
            #[must_use]
            pub const fn word(self) -> &'static str {
                match self {
                    $(Self::$name => $word,)*
                }
            }
        }
    };
}

codes! {
    /// The host: there is no KSM.
    KsmMissing = "ksm-missing",
    /// `run` is 0.
    KsmOff = "ksm-off",
    /// `run` is 2.
    KsmUnmerging = "ksm-unmerging",
    /// The settings are on a file system that is mounted read-only.
    ReadOnly = "read-only",
    /// This user may not change the settings.
    NotWritable = "not-writable",
    /// `pages_to_scan` is 0.
    ScanNothing = "scan-nothing",
    /// ksmd is slow: the settings are the kernel's first ones, or a pass takes long.
    ScanRate = "scan-rate",
    /// KSM is on, and ksmd looked at no page while we watched.
    NotScanning = "not-scanning",
    /// The advisor sets `pages_to_scan`.
    Advisor = "advisor",
    /// No process has mergeable memory.
    NothingMarked = "nothing-marked",
    /// Which processes have mergeable memory cannot be seen.
    MarksUnseen = "marks-unseen",
    /// ksmd has not been through all memory twice.
    TooEarly = "too-early",
    /// Passes take longer than processes live.
    PassTooLong = "pass-too-long",
    /// Nothing that was compared is equal, on the host or in a process.
    NothingEqual = "nothing-equal",
    /// Little of what was compared is equal, on the host or in a process.
    FewEqual = "few-equal",
    /// Most pages change from one look to the next.
    Changing = "changing",
    /// Smart scan passes over most pages.
    SmartScan = "smart-scan",
    /// Contents with more users than one copy may have.
    MaxPageSharing = "max-page-sharing",
    /// Pages of different memory nodes are kept apart.
    NodesApart = "nodes-apart",
    /// Processes of one program have different layouts.
    Layout = "layout",
    /// The records of pages take more than merging saves, on the host or for a process.
    NoProfit = "no-profit",
    /// A process: it has ended.
    Gone = "gone",
    /// It has ended and its parent has not asked for its status.
    Zombie = "zombie",
    /// A thread of the kernel.
    KernelThread = "kernel-thread",
    /// This user may not look at it.
    NotPermitted = "not-permitted",
    /// None of its memory is mergeable.
    NotMarked = "not-marked",
    /// None of its memory is mergeable, but its parent's is.
    MarkLost = "mark-lost",
    /// pagefold's page store merges it, and keeps kernel KSM out.
    InPartition = "in-partition",
    /// Much of its memory is not mergeable.
    PartlyMarked = "partly-marked",
    /// Its mergeable mappings hold no pages of their own.
    NothingThere = "nothing-there",
    /// Its stack is not mergeable, though the process is.
    StackUnmarked = "stack-unmarked",
    /// Shared memory.
    SharedMemory = "shared-memory",
    /// Shared memory of a memory file.
    SharedMemfd = "shared-memfd",
    /// Huge pages of a pool.
    Hugetlb = "hugetlb",
    /// A filter of system calls.
    Seccomp = "seccomp",
    /// Pinned pages.
    Pinned = "pinned",
    /// Descriptors through which pages could be pinned.
    MayPin = "may-pin",
    /// Transparent huge pages.
    HugePages = "huge-pages",
    /// Swapped out.
    SwappedOut = "swapped-out",
    /// Near the limit of a memory group.
    MemoryLimit = "memory-limit",
    /// ksmd has not come to most of its pages.
    NotReached = "not-reached",
    /// A 32-bit program.
    ThirtyTwoBit = "32-bit",
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn words_are_kebab_case_and_what_json_has() {
        let mut words: Vec<&str> = Code::ALL.iter().map(|code| code.word()).collect();
        for code in Code::ALL {
            assert_eq!(serde_json::to_value(code).unwrap(), code.word());
            assert!(code.word().bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'));
        }
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), Code::ALL.len());
    }
}
