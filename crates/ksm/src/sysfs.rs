//! KSM's directory in sysfs.
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use crate::error::KsmError;
use crate::knob::{AdvisorMode, Knob, Values};

/// `/sys/kernel/mm/ksm`, or where it is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KsmSysfs {
    path: PathBuf,
}

impl KsmSysfs {
    /// The directory of the running kernel.
    ///
    /// # Errors
    /// [`KsmError::Missing`] where the kernel has no KSM or sysfs is not mounted.
    pub fn open() -> Result<Self, KsmError> {
        Self::at(Path::new("/sys/kernel/mm/ksm"))
    }

    /// The directory under another path.
    ///
    /// # Errors
    /// [`KsmError::Missing`] if there is no `run` in it.
    pub fn at(path: &Path) -> Result<Self, KsmError> {
        if path.join("run").exists() {
            Ok(Self { path: path.to_owned() })
        } else {
            Err(KsmError::Missing { path: path.to_owned() })
        }
    }

    /// Where the directory is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the settings can be written, without writing.
    ///
    /// # Errors
    /// [`KsmError::ReadOnly`] for the file that cannot be opened.
    pub fn check_writable(&self) -> Result<(), KsmError> {
        let path = self.path.join(Knob::Run.file_name());
        fs::OpenOptions::new().write(true).open(&path).map(drop).map_err(|source| KsmError::ReadOnly { path, source })
    }

    /// A number in one of the files; `None` if this kernel does not have the file.
    pub(crate) fn number(&self, name: &str) -> Result<Option<i64>, KsmError> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        match text.trim().parse() {
            Ok(number) => Ok(Some(number)),
            Err(bad) => Err(KsmError::Read {
                path: self.path.join(name),
                source: io::Error::new(io::ErrorKind::InvalidData, bad),
            }),
        }
    }

    fn text(&self, name: &str) -> Result<Option<String>, KsmError> {
        let path = self.path.join(name);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(missing) if missing.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(KsmError::Read { path, source }),
        }
    }

    pub(crate) fn get(&self, knob: Knob) -> Result<Option<u64>, KsmError> {
        if knob == Knob::AdvisorMode {
            // `[none] scan-time`: the chosen word stands in brackets.
            return Ok(self.text(knob.file_name())?.map(|text| u64::from(text.contains("[scan-time]"))));
        }
        Ok(self.number(knob.file_name())?.map(i64::unsigned_abs))
    }

    pub(crate) fn values(&self) -> Result<Values, KsmError> {
        let mut values = Values::default();
        for knob in Knob::ALL {
            if let Some(value) = self.get(knob)? {
                values.set(knob, value);
            }
        }
        Ok(values)
    }

    /// Writes one knob. Waits for ksmd's current batch where the kernel does.
    pub(crate) fn set(&self, knob: Knob, value: u64) -> io::Result<()> {
        debug_assert!(knob != Knob::Run || value < 2, "unmerging the host is never ours to ask");
        let text = match knob {
            Knob::AdvisorMode if value == u64::from(AdvisorMode::ScanTime) => AdvisorMode::ScanTime.word().to_owned(),
            Knob::AdvisorMode => AdvisorMode::None.word().to_owned(),
            _ => value.to_string(),
        };
        let mut file = fs::OpenOptions::new().write(true).open(self.path.join(knob.file_name()))?;
        file.write_all(text.as_bytes())
    }
}
