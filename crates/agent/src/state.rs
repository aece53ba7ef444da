//! The agent's state in this process, and its way in for the image and the library.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

use abi::control::{Control, policies, stop};
use abi::told::helper;
use abi::wire::Token;

use crate::gate::Reader;
use crate::sys;
use crate::table::{Locked, Table};
use crate::{adoption, alone, child, patch, scope, spawn, told};

/// Longest address of the broker's socket.
pub(crate) const ADDRESS_MAX: usize = 108;

/// How the agent finds its way: everything that must be known before the first call.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Bytes of the broker's socket address, as in `sun_path` (a leading zero byte for an abstract name).
    pub address: [u8; ADDRESS_MAX],
    /// How many of them.
    pub address_len: usize,
    /// What proves to the broker that this process was given the partition.
    pub token: Token,
    /// True if the program itself has not begun: it has made no call that the gate did not see.
    pub alone: bool,
    /// The broker chooses what is managed, in a program that has handed nothing over: see `scope.rs`.
    pub all: bool,
}

/// What came of [`start`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Start {
    /// The gate stands.
    Ready = 0,
    /// No list of sites fits this libc and loader.
    UnknownLibc = 1,
    /// The sites could not be patched.
    PatchFailed = 2,
    /// The kernel lacks something that the gate cannot do without.
    KernelLacks = 3,
    /// It stands already.
    Twice = 4,
}

/// Why no helper may be started.
pub(crate) mod unwilling {
    /// Something is against it in this process; a child may find it otherwise.
    pub(crate) const HERE: u32 = 1;
    /// The broker does not manage this program: a child has the same code.
    pub(crate) const FOR_GOOD: u32 = 2;
}

/// Everything static. Private memory: a fork copies it. The table comes last, and in it the rows: what of them is never used
/// costs no memory.
#[repr(C)]
pub(crate) struct State {
    /// Not 0 once the gate stands.
    pub(crate) active: AtomicU32,
    /// Address of the page that tells a copied address space from the original.
    pub(crate) sentinel: AtomicU64,
    /// Address of the control area, 0 while there is no helper.
    control: AtomicU64,
    /// Process id of the helper, 0 while there is none.
    pub(crate) helper: AtomicU32,
    /// 0: a helper may be started; otherwise one of [`unwilling`].
    pub(crate) unwilling: AtomicU32,
    /// Filters on system calls that were there at the start.
    pub(crate) filters: AtomicU64,
    /// Not 0 once the program has restricted its own calls: from then on any call that it would not make itself may be
    /// its last.
    pub(crate) restricted: AtomicU32,
    /// Not 0 once the gate makes no calls of its own any more: the program forbids itself some of them. Nothing is merged.
    pub(crate) gone: AtomicU32,
    /// What is known of NUMA policies of the program's memory, see [`policies`].
    pub(crate) policies: AtomicU32,
    /// [`stop`] bits raised before there was a control area.
    pub(crate) early_stop: AtomicU32,
    /// Address of the main thread's clear_child_tid word, 0 if unknown.
    pub(crate) tid_word: AtomicU64,
    pub(crate) address: [AtomicU64; ADDRESS_MAX / 8 + 1],
    pub(crate) address_len: AtomicU32,
    pub(crate) token: [AtomicU64; 2],
    /// Not 0 if the broker chooses what is managed.
    pub(crate) all: AtomicU32,
    pub(crate) table: Table,
}

pub(crate) static STATE: State = State {
    active: AtomicU32::new(0),
    sentinel: AtomicU64::new(0),
    control: AtomicU64::new(0),
    helper: AtomicU32::new(0),
    unwilling: AtomicU32::new(0),
    filters: AtomicU64::new(0),
    restricted: AtomicU32::new(0),
    gone: AtomicU32::new(0),
    policies: AtomicU32::new(policies::NONE),
    early_stop: AtomicU32::new(0),
    tid_word: AtomicU64::new(0),
    address: [const { AtomicU64::new(0) }; ADDRESS_MAX / 8 + 1],
    address_len: AtomicU32::new(0),
    token: [const { AtomicU64::new(0) }; 2],
    all: AtomicU32::new(0),
    table: Table::new(),
};

impl State {
    /// The control area, if there is a helper or was one.
    pub(crate) fn control(&self) -> Option<&'static Control> {
        let address = self.control.load(SeqCst);
        // SAFETY: the area was mapped by the helper for as long as this address space lives, and holds only atomics.
        (address != 0).then(|| unsafe { &*(address as *const Control) })
    }

    /// True if calls go through filters, the program's own or those of where it runs.
    pub(crate) fn has_filters(&self) -> bool {
        self.restricted.load(SeqCst) != 0 || self.filters.load(SeqCst) != 0
    }

    /// Notes what came of a call by which a program restricts itself. Most of them fail: libraries ask in this way what the
    /// kernel has.
    pub(crate) fn restricts(&self, result: i64) -> i64 {
        if !sys::failed(result) {
            self.restricted.store(1, SeqCst);
        }
        result
    }

    /// True if the gate makes no call but the program's own.
    pub(crate) fn is_gone(&self) -> bool {
        self.gone.load(SeqCst) != 0
    }

    /// Announces the control area.
    pub(crate) fn set_control(&self, address: u64) {
        self.control.store(address, SeqCst);
    }

    /// In a copy made by fork: the helper and its control area are the parent's.
    pub(crate) fn forget_helper(&self) {
        self.control.store(0, SeqCst);
        self.helper.store(0, SeqCst);
        let _ = self.unwilling.compare_exchange(unwilling::HERE, 0, SeqCst, SeqCst);
        adoption::forget();
        told::no_helper(helper::MAY_COME);
        scope::begin_anew();
        alone::is_copied();
        self.table.reset_lock();
    }

    /// Says that nothing may be merged in this process any more.
    pub(crate) fn stop(&self, reason: u32) {
        self.early_stop.fetch_or(reason, SeqCst);
        if let Some(control) = self.control() {
            control.stop.fetch_or(reason, SeqCst);
        }
    }

    /// Goes into the gate, if there is a helper that could be inside, and takes the table's lock.
    ///
    /// A helper is started by whoever holds that lock. Who has come for the gate of the one before, or for none, and then
    /// waited for the lock, would be outside of the gate that counts: he comes anew.
    pub(crate) fn enter(&self) -> (Option<Reader<'static>>, Locked<'_>) {
        loop {
            let control = self.control();
            let reader = control.map(Reader::enter);
            let locked = self.table.lock();
            if control.map(core::ptr::from_ref) == self.control().map(core::ptr::from_ref) {
                return (reader, locked);
            }
        }
    }

    /// True if nothing is managed, and nothing can come under management while a call is made.
    pub(crate) fn manages_nothing(&self) -> bool {
        self.table.is_empty() && self.all.load(SeqCst) == 0
    }

    /// Counts the changes of managed ranges' mappings and properties. 0 while there is no helper.
    pub(crate) fn layout_epoch(&self) -> u32 {
        self.control().map_or(0, |control| control.layout_epoch.load(SeqCst))
    }

    /// Says that a managed range's mapping or properties are about to change.
    pub(crate) fn layout_changes(&self) {
        if let Some(control) = self.control() {
            control.layout_epoch.fetch_add(1, SeqCst);
        }
    }
}

/// Sets the gate up: patches the sites of `sites` (as `proof` encodes them). To be called before the program
/// hands anything over, and again only while it hands nothing over and has no helper.
#[must_use]
pub fn start(config: &Config, sites: &[u8]) -> Start {
    start_with(config, sites, None)
}

/// As [`start`]. `file`: where the table stands, with the changed pages behind it.
fn start_with(config: &Config, sites: &[u8], file: Option<i32>) -> Start {
    child::notice();
    if STATE.active.load(SeqCst) != 0 {
        // A program that has left one partition may go into another. Ranges of the old one must not come along.
        if !STATE.table.is_empty() || spawn::helper_lives() {
            return Start::Twice;
        }
        aim(config);
        return Start::Ready;
    }
    aim(config);
    if !child::set_up() {
        return Start::KernelLacks;
    }
    spawn::learn_tid_word();
    spawn::learn_filters();
    adoption::learn();
    scope::begin_anew();
    if !config.alone {
        STATE.policies.store(policies::UNHEARD, SeqCst);
    }
    let outcome = patch::patch_all(sites, file);
    if outcome == Start::Ready {
        STATE.all.store(u32::from(config.all), SeqCst);
        STATE.active.store(1, SeqCst);
    }
    outcome
}

/// Remembers where the broker is.
fn aim(config: &Config) {
    for (index, chunk) in config.address.chunks(8).enumerate() {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        STATE.address[index].store(u64::from_le_bytes(word), SeqCst);
    }
    STATE.address_len.store(config.address_len.min(ADDRESS_MAX) as u32, SeqCst);
    STATE.token[0].store(config.token.0, SeqCst);
    STATE.token[1].store(config.token.1, SeqCst);
    STATE.unwilling.store(0, SeqCst);
}

/// [`stop`] bits in force, and the helper's process id.
#[must_use]
pub fn status() -> (u32, u32) {
    child::notice();
    let bits = STATE.control().map_or(0, |control| control.stop.load(SeqCst));
    (bits | STATE.early_stop.load(SeqCst) & !stop::LEAVING, STATE.helper.load(SeqCst))
}

const _: () = assert!(size_of::<Control>().is_multiple_of(8));
// Every slot of the gate starts free in a fresh memfd, which reads as zeros.
const _: () = assert!(align_of::<Control>() <= sys::PAGE as usize);

/// As [`start`], with the table of sites in a file. `path` is the rest of an environment string, so a zero byte follows
/// it.
pub fn start_from_file(config: &Config, path: &'static [u8]) {
    const LARGEST: u64 = 1 << 20;
    // SAFETY: the string goes on to its zero byte, which is not part of the slice.
    let path = unsafe { core::ffi::CStr::from_ptr(path.as_ptr().cast()) };
    told::no_table();
    let Some(fd) = crate::link::open(path) else { return };
    let mut stat = [0_u64; 18];
    // SAFETY: the kernel writes a struct stat of 144 bytes.
    let size = if unsafe { sys::sys!(sys::nr::FSTAT, fd as u64, stat.as_mut_ptr() as u64) } == 0 { stat[6] } else { 0 };
    if size > 0 && size <= LARGEST {
        // SAFETY: a free place of the kernel's choice.
        if let Ok(table) = unsafe { sys::mmap(0, size, sys::PROT_READ, sys::MAP_PRIVATE, fd, 0) } {
            // SAFETY: mapped readable for this length; the launcher does not change the file.
            let sites = unsafe { core::slice::from_raw_parts(table as *const u8, size as usize) };
            told::started(start_with(config, sites, Some(fd)), sites);
            // SAFETY: mapped above, not used any more.
            unsafe { sys::sys!(sys::nr::MUNMAP, table, size) };
        }
    }
    crate::link::close(fd);
}

/// The program makes mutexes with priority inheritance: nothing may be merged in it any more.
pub fn uses_priority_inheritance() {
    child::notice();
    STATE.stop(stop::PI_FUTEX);
}
