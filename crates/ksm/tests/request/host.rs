//! KSM's settings belong to the whole host: one test at a time, and put back whatever happens.

use std::fs::File;
use std::ops::ControlFlow;
use std::time::Duration;

use kernel::Pid;
use pagefold_ksm::request::{Report, Request, merge};
use pagefold_ksm::{Knob, KsmSysfs, StatePath, check_writable, host_lock};

pub(crate) struct Host {
    _lock: File,
    before: Vec<(Knob, String)>,
    pub(crate) sysfs: KsmSysfs,
    temp: tempfile::TempDir,
}

impl Host {
    pub(crate) fn lock() -> Option<Self> {
        let sysfs = KsmSysfs::host();
        if let Err(missing) = check_writable(&sysfs) {
            println!("skipped: {missing}");
            return None;
        }
        let lock = host_lock().unwrap();
        Some(Self { _lock: lock, before: settings(), sysfs, temp: tempfile::tempdir().unwrap() })
    }

    pub(crate) fn state(&self) -> StatePath {
        StatePath::at(self.temp.path().join("lease.json"))
    }

    pub(crate) fn merge(&self, request: &Request) -> Report {
        merge(request, &self.sysfs, &self.state(), &mut |_| ControlFlow::Continue(())).unwrap()
    }

    pub(crate) fn is_as_before(&self) -> bool {
        settings() == self.before
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for (knob, value) in &self.before {
            let _ = self.sysfs.write(knob.file_name(), value);
        }
    }
}

fn settings() -> Vec<(Knob, String)> {
    let sysfs = KsmSysfs::host();
    Knob::ALL.into_iter().filter_map(|knob| Some((knob, sysfs.knob(knob.file_name()).unwrap()?))).collect()
}

/// All of some processes, waited for.
pub(crate) fn all(processes: impl IntoIterator<Item = Pid>) -> Request {
    let wait = Some(Duration::from_secs(100));
    Request { processes: processes.into_iter().collect(), wait, ..Request::default() }
}
