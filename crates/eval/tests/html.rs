//! The page, as a browser reads it.
#![allow(clippy::unwrap_used, reason = "tests")]

mod browser;
mod children;

use std::net::TcpListener;
use std::time::Duration;

use browser::{Browser, count};
use children::{Mode, hold, place};
use pagefold_eval::{Additions, NearCause, Options, Pace, Report, Selection, Series, Skipped, evaluate};

#[test]
#[ignore = "what the other tests start"]
fn child() {
    children::child_main();
}

/// Three processes that share contents; one rewrites half of its pages.
fn report(watch: Option<Duration>) -> Report {
    let contents: Vec<u32> = (0..600).map(|at| if at < 40 { 0 } else { 1 + at % 97 }).collect();
    let (one, two) = (hold(&contents, Mode::Rest), hold(&contents[..300], Mode::Rewrite));
    let three = hold(&(2000..2200).collect::<Vec<_>>(), Mode::Rest);
    let options = Options {
        selection: Selection { pids: vec![one.pid(), two.pid(), three.pid()], ..Selection::default() },
        ranges: vec![place(600)],
        pace: Pace { threads: 2, limit: None },
        watch,
        ..Options::default()
    };
    evaluate(&options, &|_| {}).unwrap()
}

/// Gives everything that a process can choose a name that tries to get out of its place, and to fetch from `port`.
fn poison(report: &mut Report, port: u16) {
    let image = format!("<img src=http://127.0.0.1:{port}/x><script>fetch('http://127.0.0.1:{port}/y')</script>");
    let evil = format!("</title></svg></code>\"'>{image}<a onclick=\"x\nEVIL\u{202e}\x1b");
    let first = report.processes[0].clone();
    report.processes[0].process.comm = "<b>EVIL".to_owned();
    for process in &mut report.processes {
        process.process.command = format!("{evil} {}", "very-long-word".repeat(20));
        process.process.cgroup.clone_from(&evil);
        process.earning_vmas.iter_mut().for_each(|vma| vma.name.clone_from(&evil));
    }
    report.processes.push(first);
    report.vmas.iter_mut().for_each(|vma| vma.name.clone_from(&evil));
    report.groups.names.iter_mut().for_each(|name| name.clone_from(&evil));
    report.skipped.push(Skipped { pid: 4711, comm: evil.clone(), reason: evil });
}

fn additions<'a>(series: &'a [Series], near: &'a [NearCause]) -> Additions<'a> {
    Additions { about: Some("host: pagefold eval <all>"), predicted: Some(series), near: Some(near) }
}

fn series() -> Vec<Series> {
    let line = |name: &str, speed: f64| Series {
        name: name.to_owned(),
        points: (0..100)
            .map(|at| (f64::from(at) * 3.0, (1e8 * (1.0 - (-speed * f64::from(at)).exp())) as u64))
            .collect(),
    };
    vec![line("pages_to_scan 100 <default>", 0.02), line("pages_to_scan 4000", 0.2), line("advisor", 0.06)]
}

fn near() -> Vec<NearCause> {
    vec![NearCause {
        cause: "address-space layout".to_owned(),
        pages: 12_345,
        bytes: 12_345 * 4096,
        remedy: "run --layout shared".to_owned(),
    }]
}

/// Everything that there is to show is there, nothing is fetched, nothing runs, the browser has nothing to complain of.
///
/// Seen to fail: with `|safe` behind a command line the policy's complaints; without the policy as well, a connection.
#[test]
fn a_browser_shows_all_of_it_and_fetches_nothing() {
    let Some(browser) = Browser::find() else { return };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let mut report = report(Some(Duration::from_millis(500)));
    poison(&mut report, listener.local_addr().unwrap().port());
    let (series, near) = (series(), near());
    let shown = browser.show("all", &report.html(additions(&series, &near)));
    assert_eq!(shown.console, "", "the browser complains");
    assert!(listener.accept().is_err(), "the page has fetched something");

    let dom = &shown.dom;
    assert!(["<img", "<script", "<b>", "<a onclick", "\u{202e}"].iter().all(|word| !dom.contains(word)), "{dom}");
    assert_eq!((count(dom, "<h1"), count(dom, "<main")), (1, 1));
    for (id, title) in [
        ("figures", "Figures"),
        ("owners", "Who holds it"),
        ("savings", "What merging saves"),
        ("scopes", "How far apart duplicates are"),
        ("sharing", "Who shares with whom"),
        ("predicted", "Savings over time, predicted"),
        ("near", "Pages that almost equal others"),
        ("processes", "Processes"),
        ("mappings", "Mappings"),
        ("skipped", "Not looked at"),
        ("reading", "How it was read"),
    ] {
        assert!(dom.contains(&format!("<h2 id=\"{id}-title\">{title}</h2>")), "{title}: {dom}");
        assert_eq!(count(dom, &format!("href=\"#{id}\"")).min(1), 1, "{title} is in the list of contents");
    }
    // None for others: all processes are there.
    let owners = section(dom, "owners");
    assert_eq!(count(owners, "<rect class=\"tile"), report.processes.len());
    assert_eq!(count(section(dom, "predicted"), "<polyline"), 3);
    assert!(section(dom, "near").contains("<td class=\"number\">12,345</td>"), "{dom}");
    let pages = report.totals.counters.pages_scanned;
    assert_eq!(pages, 1100);
    assert!(section(dom, "figures").contains(">1,100</td>"), "{dom}");
    let volatile = report.totals.volatile.unwrap();
    assert!(volatile.pages_scanned > 0, "{volatile:?}");
    assert!(section(dom, "figures").contains(&format!(">{}</td>", volatile.pages_scanned)), "{dom}");
    assert!(dom.contains("EVIL"), "what is hostile is shown all the same");
    let images = count(dom, "<svg");
    assert_eq!(count(dom, "role=\"img\"") + count(dom, "aria-hidden=\"true\""), images, "drawings say what they are");
    assert!(count(dom, "<title") > images - 3);
}

/// Without a second look, a model and near duplicates their columns and sections are not there.
#[test]
fn what_is_not_known_is_left_out() {
    let mut report = report(None);
    let page = report.html(Additions::default());
    for word in ["volatile pages", "id=\"predicted\"", "#predicted", "id=\"near\"", "id=\"skipped\"", "An estimate"] {
        assert!(!page.contains(word), "{word}");
    }
    assert!(page.contains("<title>What merging would save</title>"));
    // Nothing at all was read, nobody is left.
    report.totals.counters = Default::default();
    report.processes.clear();
    report.vmas.clear();
    report.groups.pages.clear();
    report.sharing.pages.clear();
    let page = report.html(Additions { predicted: Some(&[]), near: Some(&[]), ..Additions::default() });
    assert!(page.contains("Nothing was read.") && page.contains("No two pages are equal"), "{page}");
    assert!(!page.contains("NaN") && !page.contains("inf"), "{page}");
}

/// A host's worth: the page has the first of each, says how many more there are, and stays small.
#[test]
fn a_thousand_processes_fit() {
    let mut report = report(None);
    let first = report.processes[0].clone();
    report.processes = (0..1000)
        .map(|at| {
            let mut process = first.clone();
            process.process.pid = at;
            process.process.comm = format!("command-{}", at % 40);
            process
        })
        .collect();
    report.totals.counters.pages_scanned = first.owned.counters.pages_scanned * 1100;
    report.vmas = vec![report.vmas[0].clone(); 1000];
    let page = report.html(Additions::default());
    assert_eq!(count(&page, "<g class=\"owner\">"), 201, "200, and one for the others");
    assert!(page.contains("900 more processes are not shown"), "{}", &page[..2000]);
    assert!(page.contains("900 more mappings are not shown"));
    assert!(page.len() < 400_000, "{} bytes", page.len());
}

/// A section of the page.
fn section<'a>(dom: &'a str, id: &str) -> &'a str {
    let from = dom.find(&format!("<section id=\"{id}\"")).unwrap();
    let to = dom[from..].find("</section>").unwrap();
    &dom[from..from + to]
}
