//! The shared object that is loaded into programs: by the loader (LD_PRELOAD under `pagefold run`) or by a library
//! caller (dlopen).
//!
//! Loaded by the loader, its constructor runs before every other one (`-z initfirst`), while the process has one
//! thread, and finds its way in the environment: `PAGEFOLD_AGENT=SOCKET:TOKEN:SITES`, the broker's abstract socket
//! name, the partition's secret (32 hex digits) and the path of the table of system-call sites, with `all:` before it if
//! the broker chooses what is managed. Without the variable it does nothing. Loaded by a library caller, it waits for
//! [`pagefold_agent_start`].

#![no_std]

mod memory;
mod preload;

use agent::{Config, Keep, Start, Token};

/// Sets the gate up in a running program. `address` is the broker's socket address as in `sun_path`,
/// `token` the partition's secret, `sites` the table of system-call sites.
/// Returns a number of [`agent::Start`].
///
/// # Safety
/// All pointers must be readable for their lengths.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pagefold_agent_start(
    address: *const u8,
    address_len: usize,
    token: *const [u64; 2],
    sites: *const u8,
    sites_len: usize,
) -> u32 {
    // SAFETY: the caller's promise.
    let (name, sites, token) = unsafe {
        (core::slice::from_raw_parts(address, address_len), core::slice::from_raw_parts(sites, sites_len), *token)
    };
    let mut config = Config {
        address: [0; 108],
        address_len: address_len.min(108),
        token: Token(token[0], token[1]),
        alone: false,
        all: false,
    };
    config.address[..config.address_len].copy_from_slice(&name[..config.address_len]);
    agent::start(&config, sites) as u32
}

/// Puts what is mapped of a range under management. Returns a number of [`agent::Adopted`].
#[unsafe(no_mangle)]
pub extern "C" fn pagefold_agent_adopt(start: u64, end: u64) -> u32 {
    agent::adopt_once(start, end) as u32
}

/// Puts a range under management without a helper. Returns 0 if that could not be done.
#[unsafe(no_mangle)]
pub extern "C" fn pagefold_agent_manage(start: u64, end: u64) -> u32 {
    agent::manage(start, end).into()
}

/// Maps pages of a segment in the place of a managed range with the same content; see [`agent::place`]. Returns 0 if
/// that could not be done.
///
/// # Safety
/// As for [`agent::place`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pagefold_agent_place(start: u64, end: u64, keep: u32, fd: i32, first: u64) -> u32 {
    // SAFETY: the caller's promise.
    unsafe { agent::place(start, end, Keep::from_bits(keep as u8), fd, first) }.into()
}

/// Gives a range its own pages back and takes it out of management. Returns 0 if that could not be done.
#[unsafe(no_mangle)]
pub extern "C" fn pagefold_agent_disown(start: u64, end: u64) -> u32 {
    agent::disown(start, end).into()
}

/// The reasons why nothing is merged any more (upper half) and the helper's process id (lower half).
#[unsafe(no_mangle)]
pub extern "C" fn pagefold_agent_status() -> u64 {
    let (stop, helper) = agent::status();
    u64::from(stop) << 32 | u64::from(helper)
}

/// For tests: stops the helper right before step `at` of plans of a kind.
#[cfg(feature = "faults")]
#[unsafe(no_mangle)]
pub extern "C" fn pagefold_fault_choose(kind: u32, at: u64) {
    agent::faults::choose(kind, at);
}

/// For tests: steps so far.
#[cfg(feature = "faults")]
#[unsafe(no_mangle)]
pub extern "C" fn pagefold_fault_steps() -> u64 {
    agent::faults::steps()
}

/// pthread_mutexattr_setprotocol, in the program's name space before libc's own: a process that makes mutexes with
/// priority inheritance must not be merged, since the kernel's operations on them fail on a frozen page. Otherwise as
/// libc's: the protocol lies in bits 28 and 29 of the attribute's one word.
///
/// # Safety
/// As for the function that it stands for.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pthread_mutexattr_setprotocol(attributes: *mut i32, protocol: i32) -> i32 {
    const INHERIT: i32 = 1;
    const PROTECT: i32 = 2;
    const EINVAL: i32 = 22;
    const SHIFT: i32 = 28;
    if !(0..=PROTECT).contains(&protocol) {
        return EINVAL;
    }
    if protocol == INHERIT {
        agent::uses_priority_inheritance();
    }
    // SAFETY: the caller passes an initialised attribute, as libc demands.
    unsafe { *attributes = *attributes & !(3 << SHIFT) | protocol << SHIFT };
    0
}

const _: () = assert!(Start::Ready as u32 == 0);

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // Nothing in the agent can panic by intention. In the helper this ends the helper, from which the broker recovers.
    // SAFETY: raises an illegal instruction.
    unsafe { core::arch::asm!("ud2", options(noreturn)) }
}
