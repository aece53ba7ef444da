//! One address-space layout for the members of a partition.
//!
//! Equal programs with different layouts hold different pointers and therefore few equal pages. The shared layout turns
//! address-space randomisation off (`ADDR_NO_RANDOMIZE`) and puts a random amount of the partition's own in its place:
//! the kernel leaves a gap under the stack as wide as the soft `RLIMIT_STACK` at exec, so that limit moves `mmap_base`,
//! and with it libraries, thread stacks and mappings. Executable, heap and stack then lie where they lie on every host.
//!
//! glibc takes the same limit, a moment later, as the default size of thread stacks, and `ulimit -s` shows it. See
//! [`StackLimit`] for what is done about that.
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use kernel::exec_stop::{self, ExecStop};
use kernel::launch::{Launch, LaunchError, Launched};
use kernel::sched::{Limit, Resource, limit, set_limit};
use kernel::{Bytes, Pid, page_size};

/// How the address space of a started program is laid out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layout {
    /// As the kernel does it: at random for each process.
    #[default]
    Default,
    /// Without randomness, `mmap_base` moved by the soft stack limit.
    Shared {
        /// Soft `RLIMIT_STACK` at exec.
        stack_soft: Bytes,
    },
}

/// What becomes of the soft stack limit once the kernel has laid out the address space with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StackLimit {
    /// The launcher stops the program between the exec and its first instruction and sets the limit back: neither glibc
    /// nor the program ever sees the other one, and this holds for static programs too. What the program itself
    /// executes later has the shared layout with the user's own limit, the same on every host: such programs are to be
    /// started through the launcher, or by an agent that raises the limit again at exec.
    #[default]
    PutBack,
    /// It stays, for the program and all that it executes: every one has the partition's own `mmap_base`, `ulimit -s`
    /// shows the amount, and glibc reserves that much address space (no memory) for each thread's stack.
    Kept,
}

/// The environment variable that tells an agent the user's own soft limit, in bytes or `unlimited`.
pub const STACK_SOFT_VARIABLE: &str = "PAGEFOLD_STACK_SOFT";

/// Below this the kernel's gap does not shrink (`SZ_128M` in `arch/x86/mm/mmap.c`), so smaller limits move nothing.
const SMALLEST_GAP: u64 = 128 << 20;
/// Width of the random part. Small enough that a thread stack of that size is harmless where it must stay.
const RANGE: u64 = 1 << 30;
/// What stands for an unlimited stack: room for any real one, far below the five sixths of the address space at which
/// the kernel caps the gap.
const UNLIMITED: u64 = 64 << 30;

/// A shared layout could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// A hard `RLIMIT_STACK` below the smallest gap leaves no room to move anything.
    #[error(
        "the hard stack limit of {hard} bytes leaves no room for a layout of the partition's own ({SMALLEST_GAP} bytes)"
    )]
    HardLimit {
        /// The limit in bytes.
        hard: u64,
    },
    /// The layout of the partition that this process is in needs a wider gap than the hard `RLIMIT_STACK` allows here.
    #[error("the hard stack limit of {hard} bytes is below the {needed} bytes of the partition's layout")]
    Inherited {
        /// The limit in bytes.
        hard: u64,
        /// The soft limit that makes the layout.
        needed: u64,
    },
    /// No random numbers.
    #[error("cannot read /dev/urandom")]
    Random(#[source] io::Error),
}

impl Layout {
    /// Draws a layout for a partition. The gap is never narrower than this process's own limit asks for: a program that
    /// may use 16 GiB of stack still can.
    ///
    /// # Errors
    /// [`LayoutError`].
    pub fn draw() -> Result<Self, LayoutError> {
        let Limit { soft, hard } = own_limit();
        let mut random = [0; 8];
        File::open("/dev/urandom")
            .and_then(|mut source| source.read_exact(&mut random))
            .map_err(LayoutError::Random)?;
        Self::from_random(soft, hard, u64::from_ne_bytes(random))
    }

    fn from_random(soft: Option<u64>, hard: Option<u64>, random: u64) -> Result<Self, LayoutError> {
        let page = page_size();
        let least = soft.unwrap_or(UNLIMITED).max(SMALLEST_GAP).next_multiple_of(page);
        let most = hard.unwrap_or(u64::MAX).min(least - SMALLEST_GAP + RANGE);
        let Some(steps) = most.checked_sub(least).map(|room| room / page).filter(|&steps| steps > 0) else {
            return Err(LayoutError::HardLimit { hard: hard.unwrap_or(u64::MAX) });
        };
        Ok(Self::Shared { stack_soft: Bytes(least + random % (steps + 1) * page) })
    }

    /// The layout of this process's partition: the one that a launcher above left in the environment variable
    /// `PAGEFOLD_LAYOUT_STACK`, so that members that start members give them their own; else a new one.
    ///
    /// # Errors
    /// [`LayoutError`].
    pub fn of_partition() -> Result<Self, LayoutError> {
        let inherited = std::env::var(LAYOUT_VARIABLE).ok().and_then(|bytes| bytes.parse().ok());
        inherited.map_or_else(Self::draw, |needed| Self::within(needed, own_limit().hard))
    }

    /// A member may have lowered its hard limit since the layout was drawn.
    fn within(needed: u64, hard: Option<u64>) -> Result<Self, LayoutError> {
        match hard {
            Some(hard) if hard < needed => Err(LayoutError::Inherited { hard, needed }),
            _ => Ok(Self::Shared { stack_soft: Bytes(needed) }),
        }
    }

    /// Starts a command with this layout.
    ///
    /// # Errors
    /// [`LaunchError`]. That the layout could not be had is no error: the command runs, and the answer says so.
    pub fn spawn(self, mut launch: Launch, stack: StackLimit) -> Result<(Launched, Applied), LaunchError> {
        let Self::Shared { stack_soft } = self else {
            return launch.spawn().map(|launched| (launched, Applied::Default));
        };
        if resolve(launch.command()).is_some_and(|program| raises_privileges(&program)) {
            return launch.spawn().map(|launched| (launched, Applied::Privileged));
        }
        let own = own_limit();
        let user_soft = own.soft.map_or_else(|| "unlimited".to_owned(), |bytes| bytes.to_string());
        launch.command().env(STACK_SOFT_VARIABLE, user_soft).env(LAYOUT_VARIABLE, stack_soft.to_string());
        launch.no_randomization(true).soft_stack_limit(stack_soft);
        match stack {
            StackLimit::Kept => launch.spawn().map(|launched| (launched, Applied::Shared)),
            StackLimit::PutBack => {
                let mut put_back = false;
                let (launched, stop) = exec_stop::spawn_with(launch, |pid| {
                    put_back = set_limit(pid, Resource::Stack, own).is_ok();
                })?;
                let applied = match stop {
                    ExecStop::NotTraced(error) => Applied::SharedWithRaisedLimit(error),
                    // One that ended in its exec has no limit to care about.
                    ExecStop::Done | ExecStop::Ended => Applied::Shared,
                };
                Ok((launched, applied))
            }
        }
    }
}

/// What a started command got.
#[derive(Debug)]
pub enum Applied {
    /// The kernel's own layout, as asked.
    Default,
    /// The shared layout, and the stack limit as asked.
    Shared,
    /// The shared layout, but the raised stack limit stays, since the command could not be stopped at its exec.
    SharedWithRaisedLimit(io::Error),
    /// The kernel's own layout: the program gains privileges at exec, for which the kernel undoes the shared one, and
    /// which it would lose by being stopped.
    Privileged,
}

fn own_limit() -> Limit {
    // Reading one's own limit fails only for bad arguments.
    limit(Pid::this(), Resource::Stack).unwrap_or(Limit { soft: None, hard: None })
}

/// The file that a command will execute.
fn resolve(command: &std::process::Command) -> Option<PathBuf> {
    let program = Path::new(command.get_program());
    if program.as_os_str().as_encoded_bytes().contains(&b'/') {
        return Some(program.to_owned());
    }
    let changed = command.get_envs().find(|(name, _)| *name == OsStr::new("PATH")).and_then(|(_, value)| value);
    let path = changed.map(ToOwned::to_owned).or_else(|| std::env::var_os("PATH"))?;
    std::env::split_paths(&path)
        .map(|directory| directory.join(program))
        .find(|file| file.metadata().is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0))
}

/// Setuid, setgid, or file capabilities.
fn raises_privileges(program: &Path) -> bool {
    let mode = program.metadata().map_or(0, |found| found.permissions().mode());
    let mut nothing = [0_u8; 0];
    // With no room for the value the call tells its length.
    mode & 0o6000 != 0 || rustix::fs::getxattr(program, "security.capability", &mut nothing).is_ok()
}

/// See [`Layout::of_partition`].
pub const LAYOUT_VARIABLE: &str = "PAGEFOLD_LAYOUT_STACK";

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    const MIB: u64 = 1 << 20;

    fn amount(soft: Option<u64>, hard: Option<u64>, random: u64) -> u64 {
        match Layout::from_random(soft, hard, random).unwrap() {
            Layout::Shared { stack_soft } => stack_soft.get(),
            Layout::Default => panic!("not drawn"),
        }
    }

    #[test]
    fn the_amount_stays_between_the_gap_and_a_gibibyte_in_page_steps() {
        let page = page_size();
        for random in [0, 1, 12_345, u64::MAX / 3, u64::MAX] {
            let drawn = amount(Some(8 * MIB), None, random);
            assert!((128 * MIB..=1024 * MIB).contains(&drawn), "{drawn}");
            assert_eq!(drawn % page, 0);
            assert!(amount(Some(8 * MIB), Some(256 * MIB), random) <= 256 * MIB);
            // A wider stack keeps its room.
            assert!(amount(Some(2048 * MIB), None, random) >= 2048 * MIB);
            assert!(amount(None, None, random) >= 64 << 30);
        }
        assert_ne!(amount(Some(8 * MIB), None, 1), amount(Some(8 * MIB), None, 2));
        assert_eq!(amount(Some(8 * MIB), None, 229_376), 1024 * MIB);
    }

    #[test]
    fn a_low_hard_limit_is_said() {
        assert!(matches!(Layout::from_random(Some(8 * MIB), Some(8 * MIB), 0), Err(LayoutError::HardLimit { .. })));
        assert!(matches!(Layout::within(200 * MIB, Some(8 * MIB)), Err(LayoutError::Inherited { .. })));
        assert_eq!(Layout::within(200 * MIB, Some(200 * MIB)).unwrap(), Layout::within(200 * MIB, None).unwrap());
    }

    #[test]
    fn programs_that_raise_privileges_are_known() {
        assert!(!raises_privileges(Path::new("/bin/sh")));
        assert_eq!(resolve(&std::process::Command::new("sh")).unwrap().file_name().unwrap(), "sh");
        let temp = tempfile::tempdir().unwrap();
        let program = temp.path().join("program");
        std::fs::copy("/bin/true", &program).unwrap();
        assert!(!raises_privileges(&program));
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o4755)).unwrap();
        assert!(raises_privileges(&program));
    }
}
