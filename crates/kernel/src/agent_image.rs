//! The agent's shared object in this process: loading it from memory and calling it.
//!
//! A process can have the agent once: its gate is patched into the one libc that is there. What the functions do is
//! written down in `agent/image`; none of them changes what a program can see of its memory.

use std::ffi::{CStr, CString, c_void};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use thiserror::Error;

use crate::memfd::{self, MemfdError};
use crate::units::Range;
use crate::{Pid, maps};

/// The name of the memory file that an image is loaded from, as /proc/PID/maps shows it.
const NAME: &str = "pagefold-agent";

/// What can go wrong on the way in.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AgentImageError {
    /// The process has an agent already that somebody else loaded.
    #[error("this process has an agent already ({by}), and a process can have only one")]
    Present {
        /// Who brought it.
        by: &'static str,
    },
    /// No executable memory file can be made.
    #[error("cannot make a memory file that code may be loaded from")]
    Create {
        /// What the kernel said: EACCES under `vm.memfd_noexec=2`.
        source: io::Error,
    },
    /// It could not be filled.
    #[error("cannot write the agent's image")]
    Write(#[from] MemfdError),
    /// The loader refused.
    #[error("cannot load the agent's image: {reason}")]
    Load {
        /// What the loader said.
        reason: String,
    },
    /// It is there, but its gate could not be set up.
    #[error("the agent's gate cannot be set up: {0:?}")]
    Start(StartFailure),
}

/// Why the gate could not be set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StartFailure {
    /// The libc or the loader of this process is not the one that the sites were found in.
    UnknownLibc,
    /// The sites could not be patched.
    PatchFailed,
    /// The kernel lacks MADV_WIPEONFORK.
    KernelLacks,
    /// It stands already.
    Twice,
    /// A number that this build does not know.
    Other(u32),
}

/// What came of handing a range over (`agent::Adopted`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Adoption {
    /// All of it is managed.
    Whole,
    /// What is mapped of it is managed.
    Holes,
    /// The table of ranges is full, or memory.
    Full,
    /// There is no helper.
    NoHelper,
}

type StartFn = unsafe extern "C" fn(*const u8, usize, *const [u64; 2], *const u8, usize) -> u32;
type RangeFn = unsafe extern "C" fn(u64, u64) -> u32;
type PlaceFn = unsafe extern "C" fn(u64, u64, u32, i32, u64) -> u32;
type StatusFn = unsafe extern "C" fn() -> u64;

/// The agent in this process. It is never unloaded: code of libc jumps to it.
#[derive(Clone, Copy, Debug)]
pub struct AgentImage {
    start: StartFn,
    adopt: RangeFn,
    disown: RangeFn,
    manage: RangeFn,
    place: PlaceFn,
    status: StatusFn,
}

impl AgentImage {
    /// Loads the image, unless the process has an agent.
    ///
    /// # Errors
    /// [`AgentImageError`].
    ///
    /// # Safety
    /// `image` must be the agent's image of this very build: it is executed, and its functions have the types above.
    pub unsafe fn load(image: &[u8]) -> Result<Self, AgentImageError> {
        if let Some(by) = present() {
            return Err(AgentImageError::Present { by });
        }
        let file = executable_file(image)?;
        let path = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd())).expect("digits hold no zero");
        // SAFETY: the caller vouches for the image; its constructor does nothing without its environment variable,
        // for which `present` has looked.
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if handle.is_null() {
            return Err(AgentImageError::Load { reason: last_error() });
        }
        let symbol = |name: &CStr| {
            // SAFETY: the handle is that of a loaded object, and the name is a string.
            let address = unsafe { libc::dlsym(handle, name.as_ptr()) };
            if address.is_null() { Err(AgentImageError::Load { reason: last_error() }) } else { Ok(address) }
        };
        let start = symbol(c"pagefold_agent_start")?;
        let adopt = symbol(c"pagefold_agent_adopt")?;
        let disown = symbol(c"pagefold_agent_disown")?;
        let manage = symbol(c"pagefold_agent_manage")?;
        let place = symbol(c"pagefold_agent_place")?;
        let status = symbol(c"pagefold_agent_status")?;
        // SAFETY: the image exports these functions with these types, for which the caller vouches.
        Ok(unsafe {
            Self {
                start: std::mem::transmute::<*mut c_void, StartFn>(start),
                adopt: std::mem::transmute::<*mut c_void, RangeFn>(adopt),
                disown: std::mem::transmute::<*mut c_void, RangeFn>(disown),
                manage: std::mem::transmute::<*mut c_void, RangeFn>(manage),
                place: std::mem::transmute::<*mut c_void, PlaceFn>(place),
                status: std::mem::transmute::<*mut c_void, StatusFn>(status),
            }
        })
    }

    /// Sets the gate up, for a broker at an abstract socket name with a partition's secret; `sites` is the table of
    /// system-call sites.
    ///
    /// # Errors
    /// [`AgentImageError::Start`].
    pub fn start(&self, name: &str, token: [u64; 2], sites: &[u8]) -> Result<(), AgentImageError> {
        let mut address = vec![0];
        address.extend_from_slice(name.as_bytes());
        // SAFETY: pointers and lengths of slices that live until the call returns.
        let result =
            unsafe { (self.start)(address.as_ptr(), address.len(), &raw const token, sites.as_ptr(), sites.len()) };
        let failure = match result {
            0 => return Ok(()),
            1 => StartFailure::UnknownLibc,
            2 => StartFailure::PatchFailed,
            3 => StartFailure::KernelLacks,
            4 => StartFailure::Twice,
            other => StartFailure::Other(other),
        };
        Err(AgentImageError::Start(failure))
    }

    /// Puts what is mapped of a range under management, with a helper.
    #[must_use]
    pub fn adopt(&self, range: Range) -> Adoption {
        // SAFETY: the function takes any two numbers and changes no memory of the program.
        match unsafe { (self.adopt)(range.start().get(), range.end().get()) } {
            1 => Adoption::Whole,
            2 => Adoption::Full,
            3 => Adoption::Holes,
            _ => Adoption::NoHelper,
        }
    }

    /// Gives a range its own pages back and takes it out of management. `false` if that could not be done.
    #[must_use]
    pub fn disown(&self, range: Range) -> bool {
        // SAFETY: as above; the content of the range stays what it is.
        unsafe { (self.disown)(range.start().get(), range.end().get()) != 0 }
    }

    /// Puts a range under management without a helper. `false` if that could not be done.
    #[must_use]
    pub fn manage(&self, range: Range) -> bool {
        // SAFETY: the function takes any two numbers and changes no memory of the program.
        unsafe { (self.manage)(range.start().get(), range.end().get()) != 0 }
    }

    /// Maps pages of a segment from page `first` on in the place of a managed range with the same content, or with no
    /// segment gives back the memory of pages that hold zeros. `keep` are protection and properties of the range
    /// (`abi::mark::Keep`). `false` if nothing was changed.
    ///
    /// # Safety
    /// The range holds the same bytes as the segment's pages (or zeros), the segment never changes, and until this
    /// returns nobody writes the range or changes its mapping.
    #[must_use]
    pub unsafe fn place(&self, range: Range, keep: u8, segment: Option<BorrowedFd<'_>>, first: u64) -> bool {
        let fd = segment.map_or(-1, |segment| segment.as_raw_fd());
        // SAFETY: the caller's promise.
        unsafe { (self.place)(range.start().get(), range.end().get(), keep.into(), fd, first) != 0 }
    }

    /// Makes every page of a range this process's own copy, in place; what is mapped and marked stays. For ranges
    /// that nobody can freeze.
    ///
    /// # Errors
    /// What the kernel said; EINVAL before 5.14.
    pub fn copy_in_place(&self, range: Range) -> io::Result<()> {
        let start = std::ptr::with_exposed_provenance_mut(range.start().get() as usize);
        // SAFETY: the kernel does what a write of each page would do, without writing anything.
        let result = unsafe { libc::madvise(start, range.len().get() as usize, libc::MADV_POPULATE_WRITE) };
        crate::sys::check(result.into()).map(|_| ())
    }

    /// Bits for the reasons why nothing is merged any more (`abi::control::stop`), and the helper, 0 if there is none.
    #[must_use]
    pub fn status(&self) -> (u32, Pid) {
        // SAFETY: the function takes nothing and reads the agent's own state.
        let word = unsafe { (self.status)() };
        ((word >> 32) as u32, Pid((word as u32).cast_signed()))
    }
}

/// Who has brought an agent into this process, if there is one.
fn present() -> Option<&'static str> {
    let run = "pagefold run";
    // SAFETY: looks a name up among what is loaded.
    if !unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"pagefold_agent_start".as_ptr()) }.is_null() {
        return Some(run);
    }
    // The image's constructor would take the variable for its own.
    if std::env::var_os("PAGEFOLD_AGENT").is_some() {
        return Some(run);
    }
    let loaded = maps::read(Pid::this()).unwrap_or_default();
    let ours = |vma: &maps::Vma| vma.exec && vma.name.as_encoded_bytes().starts_with(b"/memfd:pagefold-agent");
    loaded.iter().any(ours).then_some("another copy of the library")
}

fn executable_file(image: &[u8]) -> Result<OwnedFd, AgentImageError> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = match rustix::fs::memfd_create(NAME, flags | MemfdFlags::EXEC) {
        // Before 6.3 every memory file is executable.
        Err(Errno::INVAL) => rustix::fs::memfd_create(NAME, flags),
        result => result,
    };
    let file = file.map_err(|source| AgentImageError::Create { source: source.into() })?;
    memfd::pwrite(file.as_fd(), 0, image)?;
    memfd::seal(file.as_fd())?;
    Ok(file)
}

fn last_error() -> String {
    // SAFETY: returns a string of the loader's or null.
    let text = unsafe { libc::dlerror() };
    if text.is_null() {
        return "the loader does not say why".to_owned();
    }
    // SAFETY: a string that a zero byte ends, valid until the thread's next call of the loader.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}
