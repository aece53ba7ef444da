//! /proc/kpageflags: what the kernel thinks of page frames. Readable by root only.
//!
//! A frame may be given to somebody else between the look at a pagemap and this one; whoever decides by its flags looks
//! at the pagemap again afterwards, or can live with being wrong about a page for a moment.

use std::fs::File;
use std::os::fd::OwnedFd;

use bitflags::bitflags;

use crate::procfs::ProcError;

const PATH: &str = "/proc/kpageflags";

bitflags! {
    /// Flags of a page frame (include/uapi/linux/kernel-page-flags.h), those that are needed here.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    #[repr(transparent)]
    pub struct FrameFlags: u64 {
        /// Anonymous memory.
        const ANON = 1 << 12;
        /// The first page of a large folio.
        const COMPOUND_HEAD = 1 << 15;
        /// Another page of a large folio.
        const COMPOUND_TAIL = 1 << 16;
        /// Nobody can mlock it away: it is on no LRU list.
        const UNEVICTABLE = 1 << 18;
        /// Merged by KSM.
        const KSM = 1 << 21;
        /// The zero page, or the huge one.
        const ZERO_PAGE = 1 << 24;
        const _ = !0;
    }
}

/// An open kpageflags.
#[derive(Debug)]
pub struct FrameFlagsFile {
    fd: OwnedFd,
    words: Vec<u64>,
}

/// Frames between two that are asked for whose words are read along rather than with another call.
const GAP: u64 = 64;
/// The most words that one call reads.
const AT_ONCE: u64 = 4096;

impl FrameFlagsFile {
    /// Opens it.
    ///
    /// # Errors
    /// [`ProcError::Read`] with EACCES for other users than root.
    pub fn open() -> Result<Self, ProcError> {
        let file = File::open(PATH).map_err(|source| ProcError::Read { path: PATH.to_owned(), source })?;
        Ok(Self { fd: file.into(), words: Vec::new() })
    }

    /// Shows `visit` the flags of each frame. `frames` are ascending; those behind the end of memory have no flags.
    ///
    /// # Errors
    /// [`ProcError::Read`].
    pub fn visit(&mut self, frames: &[u64], mut visit: impl FnMut(u64, FrameFlags)) -> Result<(), ProcError> {
        debug_assert!(frames.is_sorted(), "frames ascend");
        let mut rest = frames;
        while let Some(&first) = rest.first() {
            let near = |pair: &[u64]| pair[1] - pair[0] <= GAP && pair[1] - first < AT_ONCE;
            let count = 1 + rest.windows(2).take_while(|pair| near(pair)).count();
            let (now, later) = rest.split_at(count);
            let read = self.read(first, now[count - 1] - first + 1)?;
            for &frame in now {
                let word = usize::try_from(frame - first).ok().and_then(|at| self.words[..read].get(at));
                visit(frame, FrameFlags::from_bits_retain(word.copied().unwrap_or(0)));
            }
            rest = later;
        }
        Ok(())
    }

    /// Reads the words of `count` frames from `first` on; how many there were.
    fn read(&mut self, first: u64, count: u64) -> Result<usize, ProcError> {
        self.words.clear();
        self.words.resize(usize::try_from(count).expect("no more than AT_ONCE"), 0);
        let size = size_of::<u64>();
        let mut done = 0;
        while done < self.words.len() {
            let mut bytes = vec![0; (self.words.len() - done) * size];
            let read = match rustix::io::pread(&self.fd, &mut bytes, (first + done as u64) * size as u64) {
                Ok(read) => read / size,
                Err(rustix::io::Errno::INTR) => continue,
                Err(source) => return Err(ProcError::Read { path: PATH.to_owned(), source: source.into() }),
            };
            if read == 0 {
                break;
            }
            for (word, bytes) in self.words[done..].iter_mut().zip(bytes.as_chunks::<8>().0).take(read) {
                *word = u64::from_ne_bytes(*bytes);
            }
            done += read;
        }
        Ok(done)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::test_memory::Anonymous;
    use crate::{PageCount, Pagemap, Pid};

    /// The highest number that pagemap could show.
    const NO_FRAME: u64 = (1 << 55) - 1;

    #[test]
    fn our_own_pages_are_anonymous_and_no_ksm_pages() {
        let Ok(mut flags) = FrameFlagsFile::open() else { return println!("skipped: root") };
        let memory = Anonymous::new(PageCount(300));
        memory.fill(5);
        let pagemap = Pagemap::open(Pid::this()).unwrap();
        let mut frames: Vec<u64> =
            memory.range().page_addresses().filter_map(|at| pagemap.entry(at).unwrap().pfn()).collect();
        if frames.is_empty() {
            return println!("skipped: page frame numbers (CAP_SYS_ADMIN)");
        }
        frames.sort_unstable();
        frames.push(NO_FRAME);
        let mut seen = Vec::new();
        flags
            .visit(&frames, |frame, flags| {
                seen.push(frame);
                assert_eq!(flags.contains(FrameFlags::ANON), frame != NO_FRAME);
                assert!(!flags.contains(FrameFlags::KSM));
            })
            .unwrap();
        assert_eq!(seen, frames);
    }
}
