//! Whether there is memory for un-merging: each page needs a frame of its own again.
//!
//! The commit limit does not matter here: KSM gives frames back, and the kernel has counted the address space against
//! that limit all the while.
use std::path::PathBuf;

use kernel::{Bytes, Pid, ProcError, cgroup_memory, status};

/// Memory would run out: of the machine, or of a control group.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, serde::Serialize)]
#[error("{} KiB are needed, and {} would leave too little of {} KiB", needed_bytes / 1024, limit.display(), room_bytes / 1024)]
pub struct Short {
    /// What limits: a file of a control group, or `MemAvailable` of /proc/meminfo.
    pub limit: PathBuf,
    /// Bytes that un-merging takes.
    pub needed_bytes: u64,
    /// Bytes that could be had.
    pub room_bytes: u64,
}

/// Of the machine's memory, what must stay available: a fiftieth.
const HOST_SHARE: u64 = 50;
/// Of a control group's limit, what must stay free: a 32nd. What the kernel needs for itself is charged there too.
const GROUP_SHARE: u64 = 32;

/// Whether the machine has memory for `needed` bytes.
pub(crate) fn on_host(needed: Bytes) -> Result<Result<(), Short>, ProcError> {
    let info = status::meminfo()?;
    let room = info.mem_available.saturating_sub(Bytes(info.mem_total.get() / HOST_SHARE));
    let short = || Short {
        limit: PathBuf::from("MemAvailable"),
        needed_bytes: needed.get(),
        room_bytes: info.mem_available.get(),
    };
    Ok(if needed > room { Err(short()) } else { Ok(()) })
}

/// Whether the machine and the groups of a process, which is charged for its copies, have memory for `needed` bytes.
pub(crate) fn for_process(pid: Pid, needed: Bytes) -> Result<Result<(), Short>, ProcError> {
    if let Err(short) = on_host(needed)? {
        return Ok(Err(short));
    }
    let Some(found) = cgroup_memory::least_room(pid)? else { return Ok(Ok(())) };
    let room = found.room.saturating_sub(Bytes(found.limit.limit.get() / GROUP_SHARE));
    let short = || Short { limit: found.limit.file.clone(), needed_bytes: needed.get(), room_bytes: found.room.get() };
    Ok(if needed > room { Err(short()) } else { Ok(()) })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn more_than_the_machine_has_is_refused_with_figures() {
        let all = status::meminfo().unwrap().mem_total;
        let short = for_process(Pid::this(), all).unwrap().unwrap_err();
        assert_eq!(short.needed_bytes, all.get());
        assert!(short.to_string().contains(&format!("{} KiB are needed", all.get() / 1024)), "{short}");
        assert_eq!(for_process(Pid::this(), Bytes::from_mib(1)).unwrap(), Ok(()));
        assert_eq!(for_process(Pid::this(), Bytes(0)).unwrap(), Ok(()));
    }
}
