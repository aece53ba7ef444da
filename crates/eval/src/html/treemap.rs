//! Who holds the memory: a rectangle for each process, as large as what was read of it and as dark as the share that
//! merging saves, inside a rectangle for its group.

use std::collections::BTreeMap;

use streemap::Rect;

use super::words::{Px, bytes, count, name, percent, share, shortened};
use crate::report::Report;

/// Size of the drawing.
const WIDTH: f64 = 1000.0;
const HEIGHT: f64 = 480.0;
/// Height of a group's name.
const HEADING: f64 = 18.0;
/// Width of a letter of the font, a little more than it has.
const LETTER: f64 = 7.2;
/// Processes with a rectangle of their own.
const SHOWN: usize = 200;

/// The shares where a darker step begins.
const STEPS: [f64; 5] = [0.01, 0.1, 0.25, 0.5, 0.75];

/// The drawing.
pub(super) struct Treemap {
    pub(super) width: f64,
    pub(super) height: f64,
    pub(super) groups: Vec<Group>,
}

/// A group's rectangle.
pub(super) struct Group {
    pub(super) name: String,
    pub(super) place: Place,
    /// What is written over it, where there is room.
    pub(super) heading: Option<Line>,
    pub(super) tiles: Vec<Tile>,
}

/// A process's rectangle.
pub(super) struct Tile {
    pub(super) title: String,
    pub(super) lines: Vec<Line>,
    pub(super) place: Place,
    pub(super) step: usize,
}

/// A line of text in a rectangle.
pub(super) struct Line {
    pub(super) text: String,
    pub(super) x: Px,
    pub(super) y: Px,
}

/// Where a rectangle lies.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) x: Px,
    pub(super) y: Px,
    pub(super) width: Px,
    pub(super) height: Px,
}

impl From<Rect<f64>> for Place {
    fn from(rect: Rect<f64>) -> Self {
        Self { x: Px(rect.x), y: Px(rect.y), width: Px(rect.w.max(0.0)), height: Px(rect.h.max(0.0)) }
    }
}

/// One process, or all that have no rectangle of their own.
struct Owner {
    label: String,
    title: String,
    pages: u64,
    saved: u64,
}

/// What the steps stand for.
pub(super) fn legend() -> Vec<String> {
    let percent = |share: f64| (share * 100.0).round();
    let first = format!("less than {} %", percent(STEPS[0]));
    let others = STEPS.iter().map(|from| format!("from {} %", percent(*from)));
    std::iter::once(first).chain(others).collect()
}

/// The step of a share.
fn step(share: f64) -> usize {
    STEPS.iter().filter(|from| share >= **from).count()
}

/// Draws it; `None` where nothing was read.
pub(super) fn treemap(report: &Report) -> Option<Treemap> {
    let mut groups: Vec<(String, Vec<Owner>)> = owners(report).into_iter().collect();
    let pages = |owners: &[Owner]| owners.iter().map(|owner| owner.pages).sum::<u64>();
    groups.sort_by_key(|(_, owners)| std::cmp::Reverse(pages(owners)));
    let mut placed: Vec<_> =
        groups.into_iter().map(|(name, owners)| (name, owners, Rect::from_size(0.0, 0.0))).collect();
    if placed.is_empty() {
        return None;
    }
    let all = Rect { x: 0.0, y: 0.0, w: WIDTH, h: HEIGHT };
    streemap::squarify(all, &mut placed, |(_, owners, _)| pages(owners) as f64, |(_, _, place), rect| *place = rect);
    let groups = placed.into_iter().map(|(name, owners, rect)| group(name, owners, rect, report.page_size)).collect();
    Some(Treemap { width: WIDTH, height: HEIGHT, groups })
}

/// All owners with pages, by group.
fn owners(report: &Report) -> BTreeMap<String, Vec<Owner>> {
    let size = report.page_size;
    let mut processes: Vec<_> =
        report.processes.iter().filter(|process| process.owned.counters.pages_scanned > 0).collect();
    processes.sort_by_key(|process| std::cmp::Reverse(process.owned.counters.pages_scanned));
    let rest = processes.split_off(processes.len().min(SHOWN));
    let mut groups: BTreeMap<String, Vec<Owner>> = BTreeMap::new();
    let (mut pages, mut saved) = (0, 0);
    for process in &processes {
        let (owned, process) = (&process.owned, &process.process);
        pages += owned.counters.pages_scanned;
        let owner = Owner {
            label: format!("{} {}", name(&process.comm), process.pid),
            title: format!("{} {}\n{}", process.pid, name(&process.comm), name(&process.command)),
            pages: owned.counters.pages_scanned,
            saved: owned.bytes_saved_share_stable.unwrap_or(owned.bytes_saved_share),
        };
        groups.entry(name(&report.groups.by.group_of(process))).or_default().push(owner);
    }
    rest.iter().for_each(|process| {
        saved += process.owned.bytes_saved_share_stable.unwrap_or(process.owned.bytes_saved_share);
    });
    // The list of processes has the first thousand; what the others hold is known all the same.
    let pages = report.totals.counters.pages_scanned.saturating_sub(pages);
    if pages > 0 {
        let title = format!("All smaller processes ({} of them in this report)", count(rest.len() as u64));
        let owner = Owner { label: "others".to_owned(), title, pages, saved: saved.min(pages * size) };
        groups.entry("others".to_owned()).or_default().push(owner);
    }
    groups
}

fn group(name: String, mut owners: Vec<Owner>, rect: Rect<f64>, page_size: u64) -> Group {
    owners.sort_by_key(|owner| std::cmp::Reverse(owner.pages));
    let mut inside = Rect { x: rect.x + 1.0, y: rect.y + 1.0, w: rect.w - 2.0, h: rect.h - 2.0 };
    let mut heading = None;
    if owners.len() > 1 && inside.h > 2.5 * HEADING && inside.w > 6.0 * LETTER {
        let text = shortened(&format!("{name}, {} processes", owners.len()), letters(inside.w));
        heading = Some(Line { text, x: Px(rect.x + 5.0), y: Px(rect.y + 14.0) });
        inside.y += HEADING;
        inside.h -= HEADING;
    }
    let mut placed: Vec<_> = owners.into_iter().map(|owner| (owner, Rect::from_size(0.0, 0.0))).collect();
    if inside.w > 0.0 && inside.h > 0.0 {
        streemap::squarify(inside, &mut placed, |(owner, _)| owner.pages as f64, |(_, place), rect| *place = rect);
    }
    let tiles = placed.into_iter().map(|(owner, rect)| tile(&owner, rect, page_size)).collect();
    Group { name, place: rect.into(), heading, tiles }
}

fn tile(owner: &Owner, rect: Rect<f64>, page_size: u64) -> Tile {
    let read = owner.pages * page_size;
    let part = percent(owner.saved, read);
    let title = format!("{}\nread {}, merging saves {} ({part})", owner.title, bytes(read), bytes(owner.saved));
    let mut lines = Vec::new();
    let words = [owner.label.clone(), bytes(read), format!("saves {part}")];
    for (at, word) in words.into_iter().enumerate() {
        let y = 15.0 * (at + 1) as f64;
        // A name may be cut, a figure not.
        let fits = if at == 0 { letters(rect.w) >= 4 } else { letters(rect.w) >= word.chars().count() };
        if y + 5.0 > rect.h || !fits {
            break;
        }
        lines.push(Line { text: shortened(&word, letters(rect.w)), x: Px(rect.x + 5.0), y: Px(rect.y + y) });
    }
    Tile { title, lines, place: rect.into(), step: step(share(owner.saved, read)) }
}

/// How many letters there is room for.
fn letters(width: f64) -> usize {
    ((width - 9.0).max(0.0) / LETTER) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owners(pages: &[u64]) -> Vec<Owner> {
        let owner = |pages: &u64| Owner { label: "name 1".into(), title: "1 name".into(), pages: *pages, saved: 0 };
        pages.iter().map(owner).collect()
    }

    #[test]
    fn rectangles_are_as_large_as_what_they_stand_for() {
        let cases: [&[u64]; 5] = [&[1], &[3, 3], &[100, 1, 1], &[1 << 40, 7, 5, 5, 2], &[6, 6, 4, 3, 2, 2, 1]];
        for pages in cases {
            let rect = Rect { x: 10.0, y: 20.0, w: 400.0, h: 300.0 };
            let found = group("g".into(), owners(pages), rect, 4096);
            let heading = if found.heading.is_some() { HEADING } else { 0.0 };
            let area = (rect.w - 2.0) * (rect.h - 2.0 - heading);
            let all = pages.iter().sum::<u64>() as f64;
            assert_eq!(found.tiles.len(), pages.len());
            for (tile, pages) in found.tiles.iter().zip(pages) {
                let place = tile.place;
                let expected = area * *pages as f64 / all;
                assert!((place.width.0 * place.height.0 - expected).abs() < 0.01, "{pages} of {all}: {place:?}");
                assert!(place.x.0 >= 11.0 && place.x.0 + place.width.0 <= 409.01, "{place:?}");
                assert!(place.y.0 >= 21.0 + heading && place.y.0 + place.height.0 <= 319.01, "{place:?}");
            }
        }
    }

    #[test]
    fn words_are_left_out_where_there_is_no_room() {
        let owner = &owners(&[1000])[0];
        let lines = |w: f64, h: f64| tile(owner, Rect { x: 0.0, y: 0.0, w, h }, 4096).lines.len();
        assert_eq!((lines(200.0, 100.0), lines(200.0, 40.0), lines(200.0, 21.0)), (3, 2, 1));
        assert_eq!((lines(200.0, 12.0), lines(30.0, 100.0)), (0, 0));
        assert_eq!(lines(50.0, 100.0), 1, "a name is cut, a figure is not");
        assert_eq!((step(0.0), step(0.01), step(0.5), step(1.0)), (0, 1, 4, 5));
    }
}
