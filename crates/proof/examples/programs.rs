//! Verdicts on programs as a table for docs/programs.md.
//!
//! `cargo run --release -p pagefold-proof --example programs -- [--trust FILE] PROGRAM[,MODULE...]...`
//!
//! A program's line counts the files that its loader brings in, and those that the modules after it do.
//!
//! `... --example programs -- --files FOLDER...` judges every ELF file below some folders by itself instead.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::time::Instant;

use pagefold_proof::{Cache, Facts, Lists, Prover, Report, Trust, Verdict, judge};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut words = std::env::args().skip(1).peekable();
    let mut lists = Lists::default();
    if words.next_if(|word| word == "--trust").is_some() {
        lists = Lists::with(Trust::read(Path::new(&words.next().ok_or("--trust needs a file")?))?);
    }
    if words.next_if(|word| word == "--files").is_some() {
        return files(words, &lists);
    }
    // Modules have most of what they need in common.
    let folder = tempfile::tempdir()?;
    let cache = Cache::below(folder.path())?;
    println!("| program | files | code, MB | verdict | what spoils it, or is known | ms |");
    println!("|---|---|---|---|---|---|");
    for word in words {
        let begun = Instant::now();
        let mut reports = Vec::new();
        for path in word.split(',') {
            let mut silent = |_: pagefold_proof::Progress<'_>| {};
            reports.push(Prover::new(&lists, Some(&cache), &mut silent).judge_file(Path::new(path))?);
        }
        let program = word.split(',').next().unwrap_or_default();
        let label = match reports.len() {
            1 => program.to_owned(),
            many => format!("{program} and {} modules", many - 1),
        };
        line(&label, &reports, begun.elapsed().as_millis());
    }
    Ok(())
}

fn files(folders: impl Iterator<Item = String>, lists: &Lists) -> Result<(), Box<dyn std::error::Error>> {
    let begun = Instant::now();
    let (mut counts, mut bytes) = (BTreeMap::<Verdict, usize>::new(), 0);
    let mut folders: Vec<_> = folders.map(std::path::PathBuf::from).collect();
    while let Some(path) = folders.pop() {
        if path.is_symlink() {
            continue;
        }
        if path.is_dir() {
            folders.extend(std::fs::read_dir(&path)?.filter_map(|entry| Some(entry.ok()?.path())));
            continue;
        }
        let Ok(file) = File::open(&path) else { continue };
        let facts = Facts::of(&file);
        if !facts.is_image {
            continue;
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let judged = judge(&facts, &name, &name, lists);
        *counts.entry(judged.verdict).or_default() += 1;
        bytes += facts.code_bytes;
        if judged.verdict > Verdict::Clean {
            let reason = judged.reasons.first().map_or("", String::as_str);
            println!("{:9} {} ({}): {reason}", judged.verdict.word(), path.display(), judged.reasons.len());
        }
    }
    println!("{counts:?}, {bytes} bytes of code in {:.2?}", begun.elapsed());
    Ok(())
}

fn line(program: &str, reports: &[Report], milliseconds: u128) {
    let mut objects: Vec<_> = reports.iter().flat_map(|report| &report.objects).collect();
    objects.sort_by(|one, other| one.path.cmp(&other.path));
    objects.dedup_by(|one, other| one.path == other.path);
    // A module may need what the program has opened before it.
    let there: Vec<_> =
        objects.iter().filter(|object| object.code_bytes > 0).filter_map(|it| it.path.file_name()).collect();
    let found = |path: &Path| path.is_relative() && there.contains(&path.as_os_str());
    let mut objects = objects.clone();
    objects.retain(|object| !found(&object.path));
    let worst = objects.iter().map(|object| object.judgement.verdict).max().unwrap_or_default();
    let bytes: u64 = objects.iter().map(|object| object.code_bytes).sum();
    let notable = objects.iter().filter(|object| object.judgement.verdict > Verdict::Clean);
    let name = |path: &Path| path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    let mut spoilers: Vec<String> = notable
        .map(|object| {
            let judged = &object.judgement;
            let reason =
                judged.reasons.first().map(|reason| reason.split_once(": ").map_or(reason.as_str(), |it| it.0));
            format!("{} {}: {}", name(&object.path), judged.verdict.word(), reason.unwrap_or_default())
        })
        .collect();
    spoilers.extend(objects.iter().filter_map(|object| {
        object.engine.as_ref().map(|engine| {
            let trusted = if engine.why.is_some() { "listed" } else { "not listed" };
            format!("{} is a JIT engine, {trusted}", name(&object.path))
        })
    }));
    #[expect(clippy::cast_precision_loss, reason = "megabytes for people")]
    let megabytes = bytes as f64 / 1e6;
    let word = worst.word();
    println!("| {program} | {} | {megabytes:.1} | {word} | {} | {milliseconds} |", objects.len(), spoilers.join("; "));
}
