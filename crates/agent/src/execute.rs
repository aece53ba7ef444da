//! Programs that cannot load the agent are executed without its name.
//!
//! `LD_PRELOAD` goes on from program to program. Where the agent's file is not there (a chroot, another mount name space)
//! or cannot be loaded (a 32-bit program, one of another processor that an emulator runs) the loader says so on the
//! program's stderr, and the program did not ask for any of this. So before a program is executed the gate looks whether
//! the agent can be loaded into it; if it cannot, the program gets its environment without the agent's two variables, and
//! whatever else is in LD_PRELOAD stays. It runs as if nothing had been there, and is not managed, nor is what it executes.
//!
//! What must not happen:
//!
//! * *The program notices.* Closing a file drops the record locks that the process holds on it (fcntl(2)), however the
//!   descriptor came to be: so the program's file is opened by a process of its own, see [`read_apart`].
//! * *A filter kills it.* A program that has restricted its calls is left alone, whatever its loader says.
//! * *Its stack is too small.* This runs on posix_spawn's stack and in signal handlers too: frames are kept short, and no
//!   memory is mapped, which a vfork child would leave behind in its parent.
//! * *Another answer.* Every string is read by the kernel; the answer to a bad address is the program's to hear.
//!
//! Whenever something is not understood the call is made as it was meant: the loader may complain then.

use core::arch::global_asm;

use crate::calls::Registers;
use crate::link::close;
use crate::spawn::children_stay_here;
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

const AT_EMPTY_PATH: u64 = 0x1000;
const ST_NOEXEC: u64 = 8;
const S_IFMT: u32 = 0o170_000;
const S_IFREG: u32 = 0o100_000;
/// Class and machine that the agent is built for, in an ELF header.
const CLASS_64: u8 = 2;
const X86_64: [u8; 2] = [62, 0];
/// Bytes of a file that are looked at.
const HEAD: usize = 128;
/// Scripts whose interpreter is a script: the kernel goes no further either.
const SCRIPTS: u32 = 5;

global_asm!(
    // rdi: folder, rsi: path, rdx: buffer, rcx: its length. Returns the bytes read, or a negative error number.
    //
    // A process that shares the memory and not the descriptors opens, reads and ends. It touches no stack but the one
    // word that its result goes to, so it needs none of its own; the caller waits until it has ended (CLONE_VFORK).
    ".globl pagefold_read_apart",
    ".hidden pagefold_read_apart",
    "pagefold_read_apart:",
    "push rbx",
    "push r12",
    "push r13",
    "push r14",
    "mov r12, rdi",
    "mov r13, rsi",
    "mov r14, rdx",
    "mov rbx, rcx",
    "push 0",
    "mov eax, 56",     // clone
    "mov edi, 0x4100", // CLONE_VM|CLONE_VFORK, no signal at its end
    "xor esi, esi",
    "xor edx, edx",
    "xor r10d, r10d",
    "xor r8d, r8d",
    "syscall",
    "test rax, rax",
    "js 4f",
    "jnz 3f",
    "mov rdi, r12",
    "mov rsi, r13",
    "mov edx, 0x80900", // O_CLOEXEC|O_NONBLOCK|O_NOCTTY
    "xor r10d, r10d",
    "mov eax, 257", // openat
    "syscall",
    "test rax, rax",
    "js 2f",
    "mov rdi, rax",
    "mov rsi, r14",
    "mov rdx, rbx",
    "xor r10d, r10d",
    "mov eax, 17", // pread64
    "syscall",
    "2:",
    "mov [rsp], rax",
    "mov eax, 60", // exit
    "xor edi, edi",
    "syscall",
    "ud2",
    "3:",
    "mov rdi, rax",
    "xor esi, esi",
    "mov edx, 0x40000000", // __WALL
    "xor r10d, r10d",
    "mov eax, 61", // wait4
    "syscall",
    "pop rax",
    "jmp 5f",
    "4:",
    "add rsp, 8",
    "5:",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbx",
    "ret",
);

unsafe extern "C" {
    fn pagefold_read_apart(folder: u64, path: u64, into: *mut u8, len: u64) -> i64;
}

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

/// True unless the program, or the interpreter of a script, is one whose loader cannot load the agent.
fn takes_agent(folder: u64, path: u64, flags: u64) -> bool {
    if !children_stay_here() {
        return true;
    }
    let mut head = [0_u8; HEAD];
    let mut len = read_head(folder, path, flags, &mut head);
    for _ in 0..SCRIPTS {
        let Some(line) = head[..len].strip_prefix(b"#!") else { return fits(&head[..len]) };
        // A name that is cut off is another one.
        let Some(end) = line.iter().position(|byte| *byte == b'\n') else { return true };
        let blank = |byte: &u8| matches!(byte, b' ' | b'\t');
        let Some(start) = line[..end].iter().position(|byte| !blank(byte)) else { return true };
        let name = line[start..end].split(blank).next().unwrap_or_default();
        let mut interpreter = [0_u8; HEAD];
        interpreter[..name.len()].copy_from_slice(name);
        let path = interpreter.as_ptr() as u64;
        len = if is_regular(AT_FDCWD, path, 0) { read_head(AT_FDCWD, path, 0, &mut head) } else { 0 };
    }
    true
}

/// What is no ELF file fails by itself, or is something that only the kernel knows.
fn fits(head: &[u8]) -> bool {
    !head.starts_with(b"\x7fELF") || head.get(4) == Some(&CLASS_64) && head.get(18..20) == Some(&X86_64[..])
}

/// What a device or a pipe does when it is opened is not to happen here.
fn is_regular(folder: u64, path: u64, flags: u64) -> bool {
    let mut stat = [0_u64; 18];
    // SAFETY: the kernel reads the path and writes a struct stat of 144 bytes.
    let known = unsafe { sys!(nr::NEWFSTATAT, folder, path, stat.as_mut_ptr() as u64, flags) } == 0;
    // The mode is the first half of the fourth word.
    known && stat[3] as u32 & S_IFMT == S_IFREG
}

/// The first bytes of a regular file; none of one that cannot be read, such as a program that may only be executed.
fn read_head(folder: u64, path: u64, flags: u64, into: &mut [u8; HEAD]) -> usize {
    let mut got = -1;
    if flags & AT_EMPTY_PATH != 0 {
        // Perhaps the program's own descriptor is the file. Then the path is empty; otherwise this is a folder, or nothing.
        // SAFETY: the kernel writes into the buffer.
        got = unsafe { sys!(nr::PREAD64, folder, into.as_mut_ptr() as u64, into.len() as u64, 0) };
    }
    if failed(got) {
        let mask = sys::block_signals();
        // SAFETY: the kernel reads the path and writes into the buffer.
        got = unsafe { pagefold_read_apart(folder, path, into.as_mut_ptr(), into.len() as u64) };
        sys::restore_signals(mask);
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
    fn a_file_is_read_by_another_process() {
        let mut head = [0; HEAD];
        let read = |path: &core::ffi::CStr, head: &mut _| read_head(AT_FDCWD, path.as_ptr() as u64, 0, head);
        assert_eq!(read(c"/proc/self/exe", &mut head), HEAD);
        assert!(head.starts_with(b"\x7fELF\x02"));
        assert_eq!(read(c"/no/such/file", &mut head), 0);
        assert_eq!(read(c"/dev", &mut head), 0);
        // Nobody is left of this thread's children: WNOHANG, __WALL, __WNOTHREAD. Other tests have theirs.
        // SAFETY: no status is asked for.
        assert_eq!(unsafe { sys!(nr::WAIT4, u64::MAX, 0, 0x6000_0001_u64, 0) }, -sys::errno::ECHILD);
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
