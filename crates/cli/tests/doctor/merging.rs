//! Causes that show once ksmd is at work.

use std::time::Duration;

use crate::stand::{Host, Said, Stage};

/// As fast as it goes, from the beginning.
const FAST: [(&str, u64); 4] = [("pages_to_scan", 20_000), ("sleep_millisecs", 5), ("smart_scan", 0), ("run", 1)];

fn fast() -> Option<Host> {
    let host = Host::lock()?;
    host.fresh();
    host.write("advisor_mode", "none");
    Some(host)
}

#[test]
fn nothing_is_equal() {
    let Some(host) = fast() else { return };
    let stage = Stage::new("a = area(1024); unique(a); mergeable(a); stay()");
    host.set(&FAST);
    host.passes(6);
    let said = Said::of(&[stage.pid()]);
    // The page that ksmd is at right now is in no tree (mm/ksm.c, cmp_and_merge_page), so the host's figure may lack it.
    said.host("blocks", "nothing-equal", "pages of all processes several times and merged none");
    said.process("blocks", "nothing-equal", stage.pid(), "1024 pages of it");
    said.no("few-equal");
    said.no("changing");
}

#[test]
fn little_is_equal_and_costs_more_than_it_saves() {
    let Some(host) = fast() else { return };
    let stage = Stage::new("a = area(2048); unique(a); b = area(10); fill(b); mergeable(a); mergeable(b); stay()");
    host.set(&FAST);
    host.passes(6);
    let said = Said::of(&[stage.pid()]);
    said.host("hampers", "few-equal", "9 are merged (0 %)");
    said.process("hampers", "few-equal", stage.pid(), "of 2058 pages of it that ksmd has been over, 10 are merged");
    said.host("note", "no-profit", "64 bytes for each page");
    said.process("note", "no-profit", stage.pid(), "more than merging them saves");
    said.no("nothing-equal");
}

#[test]
fn much_is_equal() {
    let Some(host) = fast() else { return };
    let stage = Stage::new("a = area(4096); fill(a); mergeable(a); stay()");
    host.set(&FAST);
    host.passes(6);
    let said = Said::of(&[stage.pid()]);
    for code in ["nothing-equal", "few-equal", "no-profit", "changing", "not-reached", "too-early", "not-scanning"] {
        said.no(code);
    }
}

#[test]
fn contents_that_change() {
    let Some(host) = fast() else { return };
    let _stage = Stage::new(
        "a = area(256); mergeable(a); unique(a); print('here', flush=True)\n\
         n = 0\nwhile True:\n n += 1\n fill(a, n.to_bytes(8, 'little') + os.urandom(8))\n",
    );
    host.set(&FAST);
    host.passes(10);
    Said::of_the_host().host("hampers", "changing", "change from one look to the next");
}

#[test]
fn smart_scan_passes_over_what_found_no_equal() {
    let Some(host) = fast() else { return };
    let _stage = Stage::new("a = area(1024); unique(a); mergeable(a); stay()");
    host.set(&FAST);
    host.set(&[("smart_scan", 1)]);
    host.passes(40);
    let said = Said::of_the_host();
    // Eight of nine.
    said.host("hampers", "smart-scan", "passes over 8");
    said.no("changing");
    host.set(&[("smart_scan", 0)]);
    Said::of_the_host().no("smart-scan");
}

#[test]
fn contents_with_many_users() {
    let Some(host) = fast() else { return };
    let stage = Stage::new("a = area(200); fill(a); mergeable(a); stay()");
    host.set(&[("max_page_sharing", 2)]);
    host.set(&FAST);
    host.passes(6);
    let said = Said::of_the_host();
    said.host("hampers", "max-page-sharing", "1 content has more users than one page may have (max_page_sharing is 2)");
    said.host("hampers", "max-page-sharing", "99 more copies are kept");
    drop(stage);
}

#[test]
fn ksmd_that_sleeps_or_is_slow() {
    let Some(host) = fast() else { return };
    let stage = Stage::new("a = area(4096); fill(a); mergeable(a); stay()");
    host.set(&[("pages_to_scan", 10), ("sleep_millisecs", 60_000), ("run", 1)]);
    std::thread::sleep(Duration::from_millis(500));
    let said = Said::of(&[stage.pid()]);
    said.host("hampers", "not-scanning", "it sleeps for 60000 ms after each batch");
    said.host("hampers", "too-early", "0 passes");
    said.process("hampers", "not-reached", stage.pid(), "of its 4096 mergeable pages");
    // 4096 pages at 100 in a second.
    host.set(&[("sleep_millisecs", 100)]);
    let said = Said::of_the_host();
    said.host("hampers", "pass-too-long", "1 of 1 marked processes are younger");
    said.no("not-scanning");
}
