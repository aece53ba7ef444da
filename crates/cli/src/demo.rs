//! `pagefold demo`: both parts.

use std::process::ExitCode;

use serde::Serialize;

use crate::args::{DemoArgs, DemoPart};
use crate::demo_ksm::{PartB, PartBOptions, part_b};
use crate::demo_store::{PartA, part_a};
use crate::say;

/// What `--json` prints; the store's saving at the top.
#[derive(Serialize)]
struct Document {
    /// `None` if the store part did not run.
    bytes_saved: Option<u64>,
    /// Of all parts that ran; `None` if none did.
    digests_equal: Option<bool>,
    store: Option<PartA>,
    ksm: Option<PartB>,
}

/// Runs the parts and prints what was seen: in words each part when it is done, so that one that fails takes nothing away.
pub(crate) fn demo(args: &DemoArgs) -> anyhow::Result<ExitCode> {
    let wants = |part: DemoPart| args.part.is_none_or(|only| only == part);
    let store = if wants(DemoPart::Store) { Some(part_a(args)?) } else { None };
    if !args.json
        && let Some(part) = &store
    {
        say::answer(&part.table().to_string())?;
    }
    let mut failure = None;
    let ksm = if wants(DemoPart::Ksm) {
        part_b(PartBOptions { workers: usize::from(args.workers), quiet: args.json })
            .map_err(|error| failure = Some(error))
            .ok()
    } else {
        None
    };
    // Nothing is proven by workers that were lost.
    let of_ksm = if failure.is_some() { Some(false) } else { ksm.as_ref().and_then(PartB::digests_equal) };
    let found = [store.as_ref().map(|part| part.digests_equal), of_ksm];
    let digests_equal = found.into_iter().flatten().reduce(|one, other| one && other);
    let document = Document { bytes_saved: store.as_ref().map(|part| part.bytes_saved), digests_equal, store, ksm };
    if args.json {
        say::answer(&format!("{}\n", serde_json::to_string_pretty(&document)?))?;
    } else if let Some(part) = &document.ksm {
        say::answer(&format!("{part}\n"))?;
    }
    match failure {
        Some(error) => Err(error.context("the ksm part failed")),
        None if digests_equal == Some(false) => Ok(ExitCode::from(1)),
        None => Ok(ExitCode::SUCCESS),
    }
}
