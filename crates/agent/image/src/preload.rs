//! The constructor.

use agent::{Config, Token};

const VARIABLE: &[u8] = b"PAGEFOLD_AGENT=";
const PRELOAD: &[u8] = b"LD_PRELOAD=";
/// Begins the names of what valgrind preloads.
const VALGRIND: &[u8] = b"vgpreload_";

#[unsafe(link_section = ".init_array")]
#[used]
static CONSTRUCTOR: extern "C" fn(i32, *const *const u8, *const *const u8) = construct;

extern "C" fn construct(count: i32, arguments: *const *const u8, environment: *const *const u8) {
    // Before the environment is looked at, which may be no address at all.
    if !agent::are_passed(count, arguments as u64, environment as u64) {
        return;
    }
    let Some(value) = variable(environment, VARIABLE) else { return };
    // Valgrind runs no code of the processor's: nothing of the gate would hold in there, and it would blame the program.
    let preload = variable(environment, PRELOAD).unwrap_or_default();
    if preload.windows(VALGRIND.len()).any(|part| part == VALGRIND) {
        return;
    }
    let Some(colon) = value.iter().position(|byte| *byte == b':') else { return };
    let (name, rest) = (&value[..colon], &value[colon + 1..]);
    let (Some(token), Some(b':')) = (rest.get(..32), rest.get(32)) else { return };
    let Some(token) = secret(token) else { return };
    let path = &rest[33..];
    let (path, all) = path.strip_prefix(b"all:").map_or((path, false), |path| (path, true));
    let mut config = Config { address: [0; 108], address_len: 0, token, alone: true, all };
    if name.len() + 1 > config.address.len() {
        return;
    }
    // An abstract name begins with a zero byte.
    config.address[1..=name.len()].copy_from_slice(name);
    config.address_len = name.len() + 1;
    agent::start_from_file(&config, path);
}

/// The value of a variable in the environment that the loader passes, which is the program's initial one.
fn variable(environment: *const *const u8, name: &[u8]) -> Option<&'static [u8]> {
    for index in 0.. {
        // SAFETY: the environment is an array of strings that a null pointer ends.
        let entry = unsafe { *environment.add(index) };
        if entry.is_null() {
            break;
        }
        // SAFETY: an entry is a string that a zero byte ends.
        let entry = unsafe { core::ffi::CStr::from_ptr(entry.cast()) }.to_bytes();
        if let Some(value) = entry.strip_prefix(name) {
            return Some(value);
        }
    }
    None
}

/// Two words of 16 hex digits.
fn secret(digits: &[u8]) -> Option<Token> {
    let mut words = [0_u64; 2];
    for (index, digit) in digits.iter().enumerate() {
        let value = (*digit as char).to_digit(16)?;
        words[index / 16] = words[index / 16] << 4 | u64::from(value);
    }
    Some(Token(words[0], words[1]))
}
