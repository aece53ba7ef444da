//! The command line of one guest.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::kernel::Kernel;

/// One guest to be started.
#[derive(Clone, Debug)]
pub struct GuestOptions {
    /// Names the guest's files; unique in its folder.
    pub name: String,
    /// What it boots.
    pub kernel: Kernel,
    /// Its first file system.
    pub initramfs: PathBuf,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Virtual processors.
    pub cpus: u32,
    /// QEMU's cache of translated code in MiB. It is private memory, and fills.
    pub translation_mib: u32,
    /// A raw image for `/dev/vda`, opened past the host's page cache.
    pub disk: Option<PathBuf>,
    /// Give it a balloon and a QMP socket.
    pub qmp: bool,
    /// More words for the kernel: `check.mib=N` and `check.pause=S` for a checking guest.
    pub append: String,
    /// More arguments for QEMU.
    pub arguments: Vec<OsString>,
}

impl GuestOptions {
    /// A guest of 256 MiB and one processor that checks 96 MiB of files.
    #[must_use]
    pub fn new(name: &str, kernel: &Kernel, initramfs: &Path) -> Self {
        Self {
            name: name.to_owned(),
            kernel: kernel.clone(),
            initramfs: initramfs.to_owned(),
            memory_mib: 256,
            cpus: 1,
            translation_mib: 32,
            disk: None,
            qmp: true,
            append: String::new(),
            arguments: Vec::new(),
        }
    }

    /// A file of this guest.
    pub(crate) fn file(&self, folder: &Path, kind: &str) -> PathBuf {
        folder.join(format!("{}.{kind}", self.name))
    }

    /// The command that starts it. The second serial port is a socket that anybody may connect to, and all that the
    /// guest says there is kept in a file, connected or not.
    #[must_use]
    pub fn command(&self, folder: &Path) -> Vec<OsString> {
        let file = |kind: &str| self.file(folder, kind).to_string_lossy().into_owned();
        let mut command = vec![OsString::from("qemu-system-x86_64")];
        let mut add = |words: &[&str]| command.extend(words.iter().map(OsString::from));
        add(&["-accel", &format!("tcg,tb-size={}", self.translation_mib), "-cpu", "max"]);
        add(&["-m", &self.memory_mib.to_string(), "-smp", &self.cpus.to_string()]);
        add(&["-nographic", "-nodefaults", "-no-user-config", "-no-reboot"]);
        add(&["-kernel", &self.kernel.image.to_string_lossy(), "-initrd", &self.initramfs.to_string_lossy()]);
        // Where the host is busy, the emulated timer may not tick while the guest's kernel counts its ticks for a moment.
        add(&["-append", &format!("console=ttyS0 panic=-1 no_timer_check {}", self.append)]);
        add(&["-pidfile", &file("pid")]);
        add(&["-serial", &format!("file:{}", file("console"))]);
        let socket = format!("socket,id=job,path={},server=on,wait=off,logfile={}", file("socket"), file("log"));
        add(&["-chardev", &socket, "-serial", "chardev:job"]);
        if self.qmp {
            add(&["-qmp", &format!("unix:{},server=on,wait=off", file("qmp"))]);
            add(&["-device", "virtio-balloon-pci"]);
        }
        if let Some(disk) = &self.disk {
            add(&["-drive", &format!("file={},if=none,id=disk,format=raw,cache=none", disk.display())]);
            add(&["-device", "virtio-blk-pci,drive=disk"]);
        }
        command.extend(self.arguments.iter().cloned());
        command
    }
}
