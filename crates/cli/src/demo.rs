//! `pagefold demo`: its parts.

use std::process::ExitCode;

use serde::Serialize;

use crate::args::{DemoArgs, DemoPart};
use crate::demo_ksm::{PartB, PartBOptions, part_b};
use crate::demo_store::{PartA, part_a};
use crate::demo_whole::{PartC, part_c};
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
    whole: Option<PartC>,
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
    let workers = usize::from(args.workers);
    let mut failure = None;
    let ksm = if wants(DemoPart::Ksm) {
        part_b(PartBOptions { workers, quiet: args.json })
            .map_err(|error| failure = Some(error.context("the ksm part failed")))
            .ok()
    } else {
        None
    };
    if !args.json
        && let Some(part) = &ksm
    {
        say::answer(&format!("{part}\n"))?;
    }
    let whole = if wants(DemoPart::Whole) {
        part_c(workers, args.json).map_err(|error| failure = Some(error.context("the whole part failed"))).ok()
    } else {
        None
    };
    if !args.json
        && let Some(part) = &whole
    {
        say::answer(&format!("{part}\n"))?;
    }
    // Nothing is proven by workers that were lost.
    let lost = failure.is_some().then_some(false);
    let of_ksm = ksm.as_ref().and_then(PartB::digests_equal);
    let of_whole = whole.as_ref().and_then(PartC::digests_equal);
    let found = [store.as_ref().map(|part| part.digests_equal), of_ksm, of_whole, lost];
    let digests_equal = found.into_iter().flatten().reduce(|one, other| one && other);
    if args.json {
        let bytes_saved = store.as_ref().map(|part| part.bytes_saved);
        let document = Document { bytes_saved, digests_equal, store, ksm, whole };
        say::answer(&format!("{}\n", serde_json::to_string_pretty(&document)?))?;
    }
    match failure {
        Some(error) => Err(error),
        None if digests_equal == Some(false) => Ok(ExitCode::from(1)),
        None => Ok(ExitCode::SUCCESS),
    }
}
