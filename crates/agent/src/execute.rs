//! Programs that cannot load the agent are executed without its name.
//!
//! `LD_PRELOAD` goes on from program to program. Where the agent's file is not there (a chroot, another mount name space)
//! or cannot be loaded (a 32-bit program, one of another processor that an emulator runs) the loader says so on the
//! program's stderr, one with AddressSanitizer does not start, and one of musl has nothing of it; and the program did not
//! ask for any of this. So before a program is executed the gate looks whether the agent can be loaded into it; if it
//! cannot, the program gets its environment without the agent's two variables, and whatever else is in LD_PRELOAD stays. It
//! runs as if nothing had been there, and is not managed, nor is what it executes.
//!
//! What must not happen:
//!
//! * *The program notices.* Closing a file drops the record locks that the process holds on it (fcntl(2)), however the
//!   descriptor came to be: so the program's file is opened by a process of its own, see [`crate::apart`].
//! * *A filter kills it.* A program that has restricted its calls is left alone, whatever its loader says.
//! * *Its stack is too small.* This runs on posix_spawn's stack and in signal handlers too: frames are kept short, and no
//!   memory is mapped, which a vfork child would leave behind in its parent.
//! * *Another answer.* Every string is read by the kernel; the answer to a bad address is the program's to hear.
//!
//! Whenever something is not understood the call is made as it was meant: the loader may complain then.

use crate::calls::Registers;
use crate::link::close;
use crate::program::{is_regular, takes_agent};
use crate::state::STATE;
use crate::sys::{self, AT_FDCWD, O_CLOEXEC, PAGE, failed, nr, sys};

/// Variables of an environment that is changed; a longer one goes on as it is.
const VARIABLES: usize = 768;
/// Most have fewer, and need less of the stack.
const FEW: usize = 96;
/// Variables that are looked at together.
const BATCH: usize = 16;
/// Bytes of LD_PRELOAD.
const TEXT: usize = 512;
const PRELOAD: &[u8; 11] = b"LD_PRELOAD=";
const AGENT: &[u8; 15] = b"PAGEFOLD_AGENT=";
/// The end of the agent's path, behind a folder of [`FOLDER`] and 16 hex digits: see `broker/src/image.rs`.
const FILE: &[u8] = b"/agent.so";
const FOLDER: &[u8] = b"/pagefold-";
const DIGITS: usize = 16;

const ST_NOEXEC: u64 = 8;

/// The gated call: execve or execveat. Apart from the other calls, whose frames its buffers would be in.
#[inline(never)]
pub(crate) fn execute(call: &Registers) -> i64 {
    let (folder, path, variables, flags) = if call.rax == nr::EXECVE {
        (AT_FDCWD, call.rdi, call.rdx, 0)
    } else {
        (call.rdi, call.rsi, call.r10, call.r8)
    };
    // What is not there is asked for often: along PATH.
    if STATE.has_filters() || !is_regular(folder, path, flags) {
        return call.raw();
    }
    let mut text = [0_u8; TEXT];
    let Some((preload, len)) = find_preload(variables, &mut text) else { return call.raw() };
    let Some(agent) = agent_in(&text[..len]) else { return call.raw() };
    if is_there(&mut text, agent) && takes_agent(folder, path, flags) {
        return call.raw();
    }
    take_out(&mut text, len, agent);
    let few = execute_without::<FEW>(call, variables, preload, &text);
    few.or_else(|| execute_without::<VARIABLES>(call, variables, preload, &text)).unwrap_or_else(|| call.raw())
}

/// The call with an environment that lacks the agent's variables, and has another LD_PRELOAD if anything is left of it.
/// `None` if there is no room for it.
#[inline(never)]
fn execute_without<const ROOM: usize>(
    call: &Registers,
    variables: u64,
    preload: u64,
    text: &[u8; TEXT],
) -> Option<i64> {
    let mut list = [0_u64; ROOM];
    let mut kept = 0;
    let mut whole = true;
    for_variables(variables, |variable, start| {
        let new = match variable == preload {
            true if text[PRELOAD.len()] == 0 => return true,
            true => text.as_ptr() as u64,
            false if start == AGENT => return true,
            false => variable,
        };
        // The last place is for the end.
        whole = kept + 1 < ROOM;
        if whole {
            list[kept] = new;
            kept += 1;
        }
        whole
    })?;
    if !whole {
        return None;
    }
    let list = list.as_ptr() as u64;
    let call = if call.rax == nr::EXECVE { Registers { rdx: list, ..*call } } else { Registers { r10: list, ..*call } };
    Some(call.raw())
}

/// Calls `each` with every variable of an environment and its first bytes (zeros if they cannot be read), until it says
/// no. `None` if the environment cannot be read.
fn for_variables(variables: u64, mut each: impl FnMut(u64, &[u8; AGENT.len()]) -> bool) -> Option<()> {
    let pid = sys::getpid();
    let mut at = variables;
    loop {
        let mut words = [[0_u8; 8]; BATCH];
        // Up to the next page, which may not be there; a word that lies across is read as one.
        let here = ((PAGE - at % PAGE) / 8).clamp(1, BATCH as u64) as usize;
        if !sys::read_own(pid, at, words[..here].as_flattened_mut()) {
            return None;
        }
        let words = words.map(u64::from_le_bytes);
        let end = words[..here].iter().position(|word| *word == 0);
        let count = end.unwrap_or(here);
        let mut starts = [[0_u8; AGENT.len()]; BATCH];
        read_starts(pid, &words[..count], &mut starts);
        for (variable, start) in words[..count].iter().zip(&starts) {
            if !each(*variable, start) {
                return Some(());
            }
        }
        if end.is_some() {
            return Some(());
        }
        at = at.checked_add(8 * here as u64)?;
    }
}

/// Reads the first bytes of some strings. What ends right before memory that is not there is shorter than what is looked
/// for, and stays zeros.
fn read_starts(pid: u32, strings: &[u64], into: &mut [[u8; AGENT.len()]; BATCH]) {
    let mut done = 0;
    while done < strings.len() {
        let mut remote = [[0, AGENT.len() as u64]; BATCH];
        for (remote, string) in remote.iter_mut().zip(&strings[done..]) {
            remote[0] = *string;
        }
        let count = strings.len() - done;
        let room = into[done..strings.len()].as_flattened_mut();
        let read = sys::read_pieces(pid, room, &remote[..count]) / AGENT.len();
        if read < count
            && let Some(partly) = into.get_mut(done + read)
        {
            *partly = [0; AGENT.len()];
        }
        done += read + 1;
    }
}

/// The address of LD_PRELOAD in an environment; it is copied to `text`, with its length. The last one counts.
fn find_preload(variables: u64, text: &mut [u8; TEXT]) -> Option<(u64, usize)> {
    let mut found = None;
    for_variables(variables, |variable, start| {
        if start.starts_with(PRELOAD) {
            found = Some(variable);
        }
        true
    })?;
    let found = found?;
    read_string(sys::getpid(), found, text).map(|len| (found, len))
}

/// True if the agent's file can be loaded from here.
fn is_there(text: &mut [u8; TEXT], (start, end): (usize, usize)) -> bool {
    let behind = core::mem::replace(&mut text[end], 0);
    // Nobody has locks on it.
    // SAFETY: the kernel reads the path, which ends with a zero byte now.
    let fd = unsafe { sys!(nr::OPENAT, AT_FDCWD, (&raw const text[start]) as u64, O_CLOEXEC) };
    text[end] = behind;
    if failed(fd) {
        return false;
    }
    // struct statfs: the flags are its eleventh word.
    let mut about = [0_u64; 15];
    // SAFETY: the kernel writes a struct statfs of 120 bytes.
    let known = unsafe { sys!(nr::FSTATFS, fd as u64, about.as_mut_ptr() as u64) } == 0;
    close(fd as i32);
    known && about[10] & ST_NOEXEC == 0
}

/// Takes the agent out of LD_PRELOAD, with a separator.
fn take_out(text: &mut [u8; TEXT], len: usize, (start, end): (usize, usize)) {
    let last = end == len;
    let (before, after) = if last { (start - usize::from(start > PRELOAD.len()), end) } else { (start, end + 1) };
    text.copy_within(after..len, before);
    text[before + len - after] = 0;
}

/// Where the agent's path is in LD_PRELOAD. Spaces and colons divide it.
fn agent_in(text: &[u8]) -> Option<(usize, usize)> {
    let divides = |byte: &u8| matches!(byte, b' ' | b':');
    let mut start = PRELOAD.len();
    while start <= text.len() {
        let end = text[start..].iter().position(divides).map_or(text.len(), |len| start + len);
        let folder = text[start..end].strip_suffix(FILE);
        let named = folder.and_then(|folder| folder.len().checked_sub(FOLDER.len() + DIGITS).map(|at| &folder[at..]));
        if named.and_then(|name| name.strip_prefix(FOLDER)).is_some_and(|hex| hex.iter().all(u8::is_ascii_hexdigit)) {
            return Some((start, end));
        }
        start = end + 1;
    }
    None
}

/// Reads a string; `None` if it cannot be read, or is too long to be kept with its end.
fn read_string(pid: u32, address: u64, into: &mut [u8; TEXT]) -> Option<usize> {
    let mut len = 0;
    while len < TEXT {
        let at = address.checked_add(len as u64)?;
        // Up to the next page, which may not be there.
        let part = (TEXT - len).min((PAGE - at % PAGE) as usize);
        let room = into.get_mut(len..len + part)?;
        if !sys::read_own(pid, at, room) {
            return None;
        }
        if let Some(end) = room.iter().position(|byte| *byte == 0) {
            return Some(len + end);
        }
        len += part;
    }
    None
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    extern crate std;

    use std::string::String;

    use super::*;

    const IMAGE: &str = "/run/pagefold-0123456789abcdef/agent.so";

    /// What is left of a value of LD_PRELOAD; `None` if the agent is not found in it.
    fn left_of(value: &str) -> Option<String> {
        let strings: [String; 3] =
            ["A=b\0".into(), std::format!("LD_PRELOAD={value}\0"), "PAGEFOLD_AGENT=x:y\0".into()];
        let [other, preload, agent] = strings.each_ref().map(|text| text.as_ptr() as u64);
        let variables = [other, agent, preload, 0];
        let mut text = [0; TEXT];
        let (found, len) = find_preload(variables.as_ptr() as u64, &mut text)?;
        assert_eq!(found, preload);
        let agent = agent_in(&text[..len])?;
        take_out(&mut text, len, agent);
        Some(core::ffi::CStr::from_bytes_until_nul(&text).unwrap().to_str().unwrap().into())
    }

    #[test]
    fn the_agent_is_taken_out_and_the_rest_stays() {
        assert_eq!(left_of(IMAGE).unwrap(), "LD_PRELOAD=");
        assert_eq!(left_of(&std::format!("{IMAGE}:liba.so")).unwrap(), "LD_PRELOAD=liba.so");
        assert_eq!(left_of(&std::format!("liba.so:{IMAGE}")).unwrap(), "LD_PRELOAD=liba.so");
        assert_eq!(left_of(&std::format!("liba.so {IMAGE}:/b.so c.so")).unwrap(), "LD_PRELOAD=liba.so /b.so c.so");
    }

    #[test]
    fn what_is_not_the_agents_is_left_alone() {
        for value in
            ["", ":", "liba.so", "/tmp/agent.so", "/run/pagefold-0123456789abcdeX/agent.so", "pagefold-/agent.so"]
        {
            assert_eq!(left_of(value), None, "{value}");
        }
        assert_eq!(left_of(&std::format!("{}{IMAGE}", "a:".repeat(TEXT / 2))), None, "too long");
        let mut text = [0; TEXT];
        for variables in [0, 8, u64::MAX, u64::MAX - 7] {
            assert!(find_preload(variables, &mut text).is_none());
        }
    }

    #[test]
    fn strings_that_end_where_memory_ends_are_read() {
        // SAFETY: a free place of the kernel's choice; its second page is given back.
        let page = unsafe { sys::mmap(0, 2 * PAGE, 3, sys::MAP_PRIVATE | sys::MAP_ANONYMOUS, -1, 0).unwrap() };
        // SAFETY: mapped above.
        unsafe { sys!(nr::MUNMAP, page + PAGE, PAGE) };
        let put = |at: u64, text: &[u8]| {
            // SAFETY: inside the page.
            unsafe { core::ptr::copy_nonoverlapping(text.as_ptr(), at as *mut u8, text.len()) };
            at
        };
        let short = put(page + PAGE - 4, b"A=b\0");
        let preload = std::format!("LD_PRELOAD={IMAGE}\0");
        let preload = put(page + PAGE - 100, preload.as_bytes());
        let agent = put(page + 1000, b"PAGEFOLD_AGENT=1\0");
        let list: std::vec::Vec<u64> = core::iter::repeat_n(short, 40).chain([8, preload, agent, short, 0]).collect();
        let mut seen = std::vec::Vec::new();
        for_variables(list.as_ptr() as u64, |variable, start| {
            seen.push(variable);
            assert_eq!((start == AGENT, start.starts_with(PRELOAD)), (variable == agent, variable == preload));
            true
        })
        .unwrap();
        assert_eq!(seen, list[..list.len() - 1]);
        assert!(for_variables(page + PAGE - 8, |_, _| true).is_none(), "no end");
    }
}
