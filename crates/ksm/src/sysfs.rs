//! KSM's files as knobs: numbers in place of words, in the kernel's directory.
use std::fs::OpenOptions;

use kernel::ksm_sysfs::{self, KsmSysfs};

use crate::error::KsmError;
use crate::knob::{AdvisorMode, Knob, Values};

/// Whether the settings are there and can be written, without writing.
///
/// # Errors
/// [`KsmError::Missing`], [`KsmError::ReadOnly`].
pub fn check_writable(sysfs: &KsmSysfs) -> Result<(), KsmError> {
    if !sysfs.exists() {
        return Err(KsmError::Missing { path: sysfs.root().to_owned() });
    }
    let path = sysfs.root().join(Knob::Run.file_name());
    OpenOptions::new().write(true).open(&path).map(drop).map_err(|source| KsmError::ReadOnly { path, source })
}

/// The value of one knob, `None` if this kernel does not have it.
pub(crate) fn get(sysfs: &KsmSysfs, knob: Knob) -> Result<Option<u64>, KsmError> {
    if knob == Knob::AdvisorMode {
        let word = sysfs.knob(knob.file_name())?;
        return Ok(word.map(|word| u64::from(word == AdvisorMode::ScanTime.word())));
    }
    Ok(sysfs.number(knob.file_name())?.map(i64::unsigned_abs))
}

/// All knobs that this kernel has.
pub(crate) fn values(sysfs: &KsmSysfs) -> Result<Values, KsmError> {
    let mut values = Values::default();
    for knob in Knob::ALL {
        if let Some(value) = get(sysfs, knob)? {
            values.set(knob, value);
        }
    }
    Ok(values)
}

/// Writes one knob. Waits for ksmd's current batch where the kernel does.
pub(crate) fn set(sysfs: &KsmSysfs, knob: Knob, value: u64) -> Result<(), ksm_sysfs::KsmError> {
    debug_assert!(knob != Knob::Run || value < 2, "unmerging the host is never ours to ask");
    match knob {
        Knob::AdvisorMode if value == u64::from(AdvisorMode::ScanTime) => {
            sysfs.write(knob.file_name(), AdvisorMode::ScanTime.word())
        }
        Knob::AdvisorMode => sysfs.write(knob.file_name(), AdvisorMode::None.word()),
        _ => sysfs.write(knob.file_name(), &value.to_string()),
    }
}
