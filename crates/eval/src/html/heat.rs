//! Who shares with whom: a table whose cells are the darker the more contents both hold.

use std::collections::HashMap;

use super::words::{count, name, short_count, shortened};
use crate::report::Report;

/// Longest name in front of a row.
const NAME: usize = 40;

/// The table.
pub(super) struct Heat {
    pub(super) title: &'static str,
    pub(super) diagonal: &'static str,
    pub(super) rows: Vec<Row>,
}

/// A row, and the column of the same owner.
pub(super) struct Row {
    pub(super) number: usize,
    pub(super) name: String,
    pub(super) full_name: String,
    pub(super) cells: Vec<Cell>,
}

/// Two owners.
pub(super) struct Cell {
    pub(super) step: usize,
    pub(super) text: String,
    pub(super) title: String,
}

/// The groups; `None` where no two pages are equal.
pub(super) fn groups(report: &Report) -> Option<Heat> {
    let names: Vec<String> = report.groups.names.iter().map(|word| name(word)).collect();
    heat("Groups", "contents that several processes of the group hold", &names, &report.groups.pages)
}

/// The processes that save most; `None` where no two pages are equal.
pub(super) fn processes(report: &Report) -> Option<Heat> {
    let known: HashMap<i32, &str> =
        report.processes.iter().map(|process| (process.process.pid, process.process.comm.as_str())).collect();
    let named = |pid: &i32| format!("{pid} {}", name(known.get(pid).copied().unwrap_or_default()));
    let names: Vec<String> = report.sharing.pids.iter().map(named).collect();
    heat("Processes", "copies within the process", &names, &report.sharing.pages)
}

fn heat(title: &'static str, diagonal: &'static str, names: &[String], pages: &[Vec<u64>]) -> Option<Heat> {
    let most = pages.iter().flatten().copied().max().unwrap_or(0);
    if most == 0 {
        return None;
    }
    // Each step is a power of the same number: one pair that shares much does not make all others pale.
    let step = |pages: u64| match pages {
        0 => 0,
        pages => (((pages as f64).ln_1p() / (most as f64).ln_1p() * 5.0).ceil() as usize).clamp(1, 5),
    };
    let cell = |at: usize, other: usize, pages: u64| {
        let (one, text) = (&names[at], if pages == 0 { String::new() } else { short_count(pages) });
        let who = if at == other { format!("{one}, among themselves") } else { format!("{one} and {}", names[other]) };
        Cell { step: step(pages), text, title: format!("{who}: {} contents", count(pages)) }
    };
    let row = |(at, (one, row)): (usize, (&String, &Vec<u64>))| Row {
        number: at + 1,
        name: shortened(one, NAME),
        full_name: one.clone(),
        cells: row.iter().take(names.len()).enumerate().map(|(other, pages)| cell(at, other, *pages)).collect(),
    };
    let rows = names.iter().zip(pages).enumerate().map(row).collect();
    Some(Heat { title, diagonal, rows })
}
