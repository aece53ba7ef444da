//! Programs that cannot load the agent are executed without its name.
//!
//! `LD_PRELOAD` goes on from program to program. Where the agent's file is not there (a chroot, another mount name space)
//! or cannot be loaded (a 32-bit program, one of another processor that an emulator runs) the loader says so on the
//! program's stderr, and the program did not ask for any of this. So before a program is executed the gate looks whether
//! the agent can be loaded into it; if it cannot, the program gets its environment without the agent's two variables, and
//! whatever else is in LD_PRELOAD stays. It runs as if nothing had been there, and is not managed, nor is what it executes.
//!
//! This runs between vfork and exec too, on a stack that may be posix_spawn's: nothing is written but that stack, no
//! memory is mapped, every string is read by the kernel, since its answer to a bad address is the program's to hear.
//! Whenever something is not understood the call is made as it was meant.
//!
//! Not seen: a program that is there and readable when it is looked at, and another one when it is executed.

use crate::calls::Registers;
use crate::link::close;
use crate::sys::{self, AT_FDCWD, O_CLOEXEC, PAGE, failed, nr, sys};

/// Variables that are looked through; a longer environment goes on as it is.
const VARIABLES: usize = 768;
/// Bytes of LD_PRELOAD.
const TEXT: usize = 512;
const PRELOAD: &[u8] = b"LD_PRELOAD=";
const AGENT: &[u8] = b"PAGEFOLD_AGENT=";
/// The end of the agent's path, behind a folder of [`FOLDER`] and 16 hex digits: see `broker/src/image.rs`.
const FILE: &[u8] = b"/agent.so";
const FOLDER: &[u8] = b"/pagefold-";
const DIGITS: usize = 16;

const O_NONBLOCK: u64 = 0o4000;
const O_NOCTTY: u64 = 0o400;
const R_OK: u64 = 4;
const AT_EMPTY_PATH: u64 = 0x1000;
const ST_NOEXEC: u64 = 8;
const S_IFMT: u32 = 0o170_000;
const S_IFREG: u32 = 0o100_000;
/// Class and machine that the agent is built for, in an ELF header.
const CLASS_64: u8 = 2;
const X86_64: [u8; 2] = [62, 0];
const HEAD: usize = 256;

/// The gated call: execve or execveat.
pub(crate) fn execute(call: &Registers) -> i64 {
    let (folder, path, variables, flags) = if call.rax == nr::EXECVE {
        (AT_FDCWD, call.rdi, call.rdx, 0)
    } else {
        (call.rdi, call.rsi, call.r10, call.r8)
    };
    let mut text = [0_u8; TEXT];
    let Some((preload, len)) = find_preload(variables, &mut text) else { return call.raw() };
    let Some(agent) = agent_in(&text[..len]) else { return call.raw() };
    if is_there(&mut text, agent) && takes_agent(folder, path, flags) {
        return call.raw();
    }
    take_out(&mut text, len, agent);
    execute_without(call, variables, preload, &text).unwrap_or_else(|| call.raw())
}

/// The call with an environment that lacks the agent's variables, and has another LD_PRELOAD if anything is left of it.
/// A frame of its own: a signal handler's stack may be small, and most programs take the agent. `None` if the environment
/// is too large.
#[inline(never)]
fn execute_without(call: &Registers, variables: u64, preload: u64, text: &[u8; TEXT]) -> Option<i64> {
    let pid = sys::getpid();
    let mut list = [0_u64; VARIABLES + 1];
    let (mut at, mut kept) = (variables, 0);
    loop {
        let mut variable = word(pid, at)?;
        at += 8;
        if variable == preload {
            if text[PRELOAD.len()] == 0 {
                continue;
            }
            variable = text.as_ptr() as u64;
        } else if variable != 0 && starts_with(pid, variable, AGENT) {
            continue;
        }
        // The last place is for the end.
        *list.get_mut(kept)? = variable;
        if variable == 0 {
            break;
        }
        kept += 1;
    }
    let list = list.as_ptr() as u64;
    let call = if call.rax == nr::EXECVE { Registers { rdx: list, ..*call } } else { Registers { r10: list, ..*call } };
    Some(call.raw())
}

/// The address of LD_PRELOAD in an environment; it is copied to `text`, with its length. The first one counts.
fn find_preload(variables: u64, text: &mut [u8; TEXT]) -> Option<(u64, usize)> {
    let pid = sys::getpid();
    for index in 0..VARIABLES as u64 {
        let variable = word(pid, variables.checked_add(8 * index)?).filter(|variable| *variable != 0)?;
        if starts_with(pid, variable, PRELOAD) {
            return read_string(pid, variable, text).map(|len| (variable, len));
        }
    }
    None
}

fn word(pid: u32, address: u64) -> Option<u64> {
    let mut word = [0_u8; 8];
    sys::read_own(pid, address, &mut word).then(|| u64::from_le_bytes(word))
}

/// What ends before it is as long is not what it is compared with; nor does it matter then that more was read.
fn starts_with(pid: u32, string: u64, start: &[u8]) -> bool {
    let mut read = [0_u8; AGENT.len()];
    let read = &mut read[..start.len()];
    sys::read_own(pid, string, read) && read == start
}

/// True if the agent's file can be loaded from here.
fn is_there(text: &mut [u8; TEXT], (start, end): (usize, usize)) -> bool {
    let behind = core::mem::replace(&mut text[end], 0);
    let path = (&raw const text[start]) as u64;
    // struct statfs: the flags are its eleventh word.
    let mut about = [0_u64; 15];
    // SAFETY: the kernel reads the path, which ends with a zero byte now, and writes a struct statfs of 120 bytes.
    let there = unsafe {
        sys!(nr::FACCESSAT, AT_FDCWD, path, R_OK) == 0 && sys!(nr::STATFS, path, about.as_mut_ptr() as u64) == 0
    };
    text[end] = behind;
    there && about[10] & ST_NOEXEC == 0
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

/// True unless the program, or the interpreter of a script, is one whose loader cannot load the agent.
fn takes_agent(folder: u64, path: u64, flags: u64) -> bool {
    let mut head = [0_u8; HEAD];
    let len = read_head(folder, path, flags, &mut head);
    let Some(line) = head[..len].strip_prefix(b"#!") else { return fits(&head[..len]) };
    let line = line.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let blank = |byte: &u8| matches!(byte, b' ' | b'\t');
    let Some(start) = line.iter().position(|byte| !blank(byte)) else { return true };
    let name = line[start..].split(blank).next().unwrap_or_default();
    let (mut interpreter, mut head) = ([0_u8; HEAD], [0_u8; HEAD]);
    interpreter[..name.len()].copy_from_slice(name);
    let len = read_head(AT_FDCWD, interpreter.as_ptr() as u64, 0, &mut head);
    fits(&head[..len])
}

/// What is no ELF file fails by itself, or is something that only the kernel knows.
fn fits(head: &[u8]) -> bool {
    !head.starts_with(b"\x7fELF") || head.get(4) == Some(&CLASS_64) && head.get(18..20) == Some(&X86_64[..])
}

/// The first bytes of a regular file; none of one that cannot be read, such as a program that may only be executed.
fn read_head(folder: u64, path: u64, flags: u64, into: &mut [u8; HEAD]) -> usize {
    let mut stat = [0_u64; 18];
    // SAFETY: the kernel reads the path and writes a struct stat of 144 bytes.
    let known = unsafe { sys!(nr::NEWFSTATAT, folder, path, stat.as_mut_ptr() as u64, flags) } == 0;
    // The mode is the first half of the fourth word. What a device does when it is opened is not to happen here.
    if !known || stat[3] as u32 & S_IFMT != S_IFREG {
        return 0;
    }
    // SAFETY: the kernel reads the path.
    let fd = unsafe { sys!(nr::OPENAT, folder, path, O_CLOEXEC | O_NONBLOCK | O_NOCTTY) };
    // An empty path: the program's own descriptor is the file.
    let own = failed(fd) && flags & AT_EMPTY_PATH != 0;
    let file = if own { folder } else { fd as u64 };
    // SAFETY: the kernel writes into the buffer; a negative number is no descriptor.
    let got = unsafe { sys!(nr::PREAD64, file, into.as_mut_ptr() as u64, into.len() as u64, 0) };
    if !failed(fd) {
        close(fd as i32);
    }
    usize::try_from(got).unwrap_or(0)
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
        let strings = ["A=b\0".into(), std::format!("LD_PRELOAD={value}\0"), "PAGEFOLD_AGENT=x:y\0".into()];
        let strings: [String; 3] = strings;
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
        for variables in [0, 8, [1_u64; 2 * VARIABLES].as_ptr() as u64] {
            assert!(find_preload(variables, &mut text).is_none());
        }
    }

    #[test]
    fn headers_of_other_machines_do_not_fit() {
        let mut head = [0_u8; 64];
        head[..5].copy_from_slice(b"\x7fELF\x02");
        head[18] = 62;
        assert!(fits(&head) && fits(b"") && fits(b"text"));
        head[4] = 1;
        assert!(!fits(&head));
        head[4] = 2;
        head[18] = 183;
        assert!(!fits(&head) && !fits(&head[..10]));
    }
}
