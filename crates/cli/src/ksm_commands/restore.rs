//! `pagefold ksm restore`: what was there before the first `ksm set`.

use std::process::ExitCode;

use ksm::set::restore_at;
use ksm::{KsmSysfs, StatePath};

use super::set::{code, not_here, tell};
use crate::args::ksm_set::RestoreArgs;

pub(crate) fn restore(args: &RestoreArgs) -> anyhow::Result<ExitCode> {
    let done = match restore_at(&StatePath::for_this_user(), &KsmSysfs::host(), args.force) {
        Ok(done) => done,
        Err(error) => return not_here(error),
    };
    tell(&done, args.json)?;
    Ok(code(&done))
}
