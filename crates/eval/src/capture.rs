//! Captures: a snapshot in a file, to be evaluated elsewhere or later, or by other settings of ksmd.
//!
//! A Parquet file of one table with a row for each look and page, in the order in which ksmd would meet them:
//!
//! | column | |
//! |---|---|
//! | `look` | 0 for the first |
//! | `mapping` | place in the list of mappings |
//! | `page` | page number in its address space |
//! | `flags` | 1 part of a huge page, 2 mapped by others too and not told apart |
//! | `content` | 64 bits that select the content; 0 none, 1 zeros |
//! | `mark` | what it is like, and more bits of the hash; of the first look |
//!
//! The file's metadata says what the pages belong to (`pagefold.processes`, `pagefold.mappings`), when the looks were
//! (`pagefold.looks`), and the page size. Contents are hashes under a secret that is drawn for each snapshot and not
//! kept: what is equal can be seen, what it is cannot, and two captures have nothing in common.

use std::cell::Cell;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

use kernel::{Range, Vaddr, page_size};
use page::PageNumber;
use page::census::{Census, Content, Findings};
use page::ksmd;
use parquet::basic::Compression;
use parquet::column::reader::ColumnReader;
use parquet::data_type::{Int32Type, Int64Type};
use parquet::errors::ParquetError;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;
use parquet::file::reader::{FileReader as _, SerializedFileReader};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::read::Seen;
use crate::record::Record;
use crate::snapshot::Snapshot;
use crate::targets::{Process, Skipped};
use crate::vma::{REFUSALS, VmaKind};
use crate::walk::{Known, Mapping, Span, Walk};

const SCHEMA: &str = "message pages {
    REQUIRED INT32 look;
    REQUIRED INT32 mapping;
    REQUIRED INT64 page;
    REQUIRED INT32 flags;
    REQUIRED INT64 content;
    REQUIRED INT32 mark;
}";
/// Rows of a row group.
const GROUP: usize = 1 << 20;
const HUGE: i32 = 1;
const SHARED: i32 = 2;
const VERSION: u32 = 1;

/// What can go wrong with a capture.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CaptureError {
    /// The file cannot be opened or written.
    #[error("cannot open {path}")]
    Open {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// It is no Parquet file, or only a part of one.
    #[error("{path} is not a whole Parquet file")]
    Parquet {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        source: ParquetError,
    },
    /// A Parquet file, but not one of ours, or a damaged one.
    #[error("{path} is not a capture of pagefold: {what}")]
    Content {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The file cannot be written.
    #[error("cannot write {path}")]
    Write {
        /// Which.
        path: PathBuf,
        /// What went wrong.
        source: ParquetError,
    },
    /// Something that is not to be replaced.
    #[error("cannot write {path}: it is not a regular file")]
    NotAFile {
        /// Which.
        path: PathBuf,
    },
    /// The snapshot has kept no contents, or only of a sample.
    #[error("a capture needs all pages, not a sample")]
    NotRecorded,
}

/// What the metadata says, beside the rows.
#[derive(Serialize, Deserialize)]
struct Header {
    version: u32,
    page_size: u64,
    pages: u64,
    /// Seconds since the first look.
    looks: Vec<f64>,
    frames_seen: bool,
    processes: Vec<OfProcess>,
    mappings: Vec<OfMapping>,
    skipped: Vec<(i32, String, String)>,
}

#[derive(Serialize, Deserialize)]
struct OfProcess {
    pid: i32,
    comm: String,
    command: String,
    uid: u32,
    cgroup: String,
    shares_memory_with: Vec<i32>,
    known: [u64; 5],
}

#[derive(Serialize, Deserialize)]
struct OfMapping {
    process: u32,
    start: u64,
    end: u64,
    kind: VmaKind,
    name: String,
    permissions: String,
    ksm_refuses: Option<String>,
    store_refuses: Option<String>,
    mergeable: bool,
}

/// Columns of a row group.
#[derive(Default)]
struct Rows {
    look: Vec<i32>,
    mapping: Vec<i32>,
    page: Vec<i64>,
    flags: Vec<i32>,
    content: Vec<i64>,
    mark: Vec<i32>,
}

impl Snapshot {
    /// Writes the snapshot, which must have been taken with [`Options::record`](crate::Options::record). What is at
    /// `path` is replaced once all is written.
    ///
    /// # Errors
    /// [`CaptureError`].
    pub fn write(&self, path: &Path) -> Result<(), CaptureError> {
        let record = self.record.as_ref().ok_or(CaptureError::NotRecorded)?;
        let open = |source| CaptureError::Open { path: path.to_owned(), source };
        if std::fs::symlink_metadata(path).is_ok_and(|found| !found.is_file()) {
            return Err(CaptureError::NotAFile { path: path.to_owned() });
        }
        let beside = beside(path);
        // Not over what somebody has put there, nor through a link.
        let file = File::options().write(true).create_new(true).open(&beside).map_err(open)?;
        let written = self.write_rows(record, file);
        let written = written.map_err(|source| CaptureError::Write { path: path.to_owned(), source });
        let renamed = written.and_then(|()| std::fs::rename(&beside, path).map_err(open));
        if renamed.is_err() {
            // Half a capture is none.
            let _ = std::fs::remove_file(&beside);
        }
        renamed
    }

    fn write_rows(&self, record: &Record, file: File) -> Result<(), ParquetError> {
        let header =
            serde_json::to_string(&self.header(record)).map_err(|error| ParquetError::External(error.into()))?;
        let properties = WriterProperties::builder()
            .set_compression(Compression::SNAPPY)
            .set_key_value_metadata(Some(vec![KeyValue::new("pagefold".to_owned(), header)]))
            .build();
        let schema = Arc::new(parse_message_type(SCHEMA)?);
        let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties))?;
        for (number, look) in (0_i32..).zip(&record.looks) {
            let mut rows = Rows::default();
            for span in &self.walk.spans {
                let flags = i32::from(span.huge) * HUGE + i32::from(span.shared) * SHARED;
                for (page, at) in (span.first..).zip(span.range().iter()) {
                    rows.look.push(number);
                    rows.mapping.push(span.mapping.cast_signed());
                    rows.page.push(at.0.cast_signed());
                    rows.flags.push(flags);
                    rows.content.push(look[page as usize].cast_signed());
                    rows.mark.push(if number == 0 { record.marks[page as usize].into() } else { 0 });
                    if rows.look.len() == GROUP {
                        rows.write(&mut writer)?;
                    }
                }
            }
            rows.write(&mut writer)?;
        }
        writer.close()?;
        Ok(())
    }

    fn header(&self, record: &Record) -> Header {
        let process = |(process, known): (&Process, &Known)| OfProcess {
            pid: process.pid,
            comm: process.comm.clone(),
            command: process.command.clone(),
            uid: process.uid,
            cgroup: process.cgroup.clone(),
            shares_memory_with: process.shares_memory_with.clone(),
            known: [known.by_fork, known.by_ksm, known.by_partition, known.swapped, known.shared_memory],
        };
        let mapping = |mapping: &Mapping| OfMapping {
            process: mapping.process,
            start: mapping.range.start().get(),
            end: mapping.range.end().get(),
            kind: mapping.kind,
            name: mapping.name.clone(),
            permissions: String::from_utf8_lossy(&mapping.permissions).into_owned(),
            ksm_refuses: mapping.ksm_refuses.map(str::to_owned),
            store_refuses: mapping.store_refuses.map(str::to_owned),
            mergeable: mapping.mergeable,
        };
        Header {
            version: VERSION,
            page_size: page_size(),
            pages: self.walk.pages,
            looks: record.at.iter().map(Duration::as_secs_f64).collect(),
            frames_seen: self.frames_seen,
            processes: self.processes.iter().zip(&self.walk.known).map(process).collect(),
            mappings: self.walk.mappings.iter().map(mapping).collect(),
            skipped: self.skipped.iter().map(|one| (one.pid, one.comm.clone(), one.reason.clone())).collect(),
        }
    }

    /// Reads what [`Snapshot::write`] wrote.
    ///
    /// # Errors
    /// [`CaptureError`].
    pub fn read(path: &Path, threads: usize) -> Result<Self, CaptureError> {
        let begun = Instant::now();
        let file = File::open(path).map_err(|source| CaptureError::Open { path: path.to_owned(), source })?;
        let parquet = |source| CaptureError::Parquet { path: path.to_owned(), source };
        let content = |what: String| CaptureError::Content { path: path.to_owned(), what };
        let reader = SerializedFileReader::new(file).map_err(parquet)?;
        let metadata = reader.metadata().file_metadata();
        let header = metadata.key_value_metadata().into_iter().flatten().find(|pair| pair.key == "pagefold");
        let header =
            header.and_then(|pair| pair.value.as_deref()).ok_or_else(|| content("it has no header".to_owned()))?;
        let header: Header = serde_json::from_str(header).map_err(|error| content(error.to_string()))?;
        if header.version != VERSION {
            return Err(content(format!("version {} is not known here", header.version)));
        }
        let read = without_panic(|| {
            (0..reader.num_row_groups()).map(|group| Rows::read(&*reader.get_row_group(group)?)).collect()
        });
        let damaged = || ParquetError::General("it is damaged".to_owned());
        let rows: Vec<Rows> = read.ok_or_else(damaged).and_then(|rows| rows).map_err(parquet)?;
        rebuild(header, &rows, threads, begun).map_err(content)
    }
}

thread_local! {
    /// Panics of this thread are caught and told in other words.
    static CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// The reader of Parquet files takes some damaged ones for its own mistakes, and panics. `None` then, and nothing on
/// stderr.
fn without_panic<T>(read: impl FnOnce() -> T) -> Option<T> {
    static SILENT: Once = Once::new();
    SILENT.call_once(|| {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !CAUGHT.get() {
                hook(panic);
            }
        }));
    });
    let before = CAUGHT.replace(true);
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(read));
    CAUGHT.set(before);
    result.ok()
}

/// A name next to `path`, on the same file system.
fn beside(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.part", std::process::id()));
    path.with_file_name(name)
}

impl Rows {
    /// Writes a row group and begins anew.
    fn write<W: Write + Send>(&mut self, writer: &mut SerializedFileWriter<W>) -> Result<(), ParquetError> {
        if self.look.is_empty() {
            return Ok(());
        }
        let rows = std::mem::take(self);
        let mut group = writer.next_row_group()?;
        for at in 0.. {
            let Some(mut column) = group.next_column()? else { break };
            match at {
                0 => column.typed::<Int32Type>().write_batch(&rows.look, None, None)?,
                1 => column.typed::<Int32Type>().write_batch(&rows.mapping, None, None)?,
                2 => column.typed::<Int64Type>().write_batch(&rows.page, None, None)?,
                3 => column.typed::<Int32Type>().write_batch(&rows.flags, None, None)?,
                4 => column.typed::<Int64Type>().write_batch(&rows.content, None, None)?,
                _ => column.typed::<Int32Type>().write_batch(&rows.mark, None, None)?,
            };
            column.close()?;
        }
        group.close()?;
        Ok(())
    }

    fn read(group: &dyn parquet::file::reader::RowGroupReader) -> Result<Self, ParquetError> {
        let rows = usize::try_from(group.metadata().num_rows()).unwrap_or(0);
        let small = |at| match group.get_column_reader(at)? {
            ColumnReader::Int32ColumnReader(mut column) => {
                let mut values = Vec::new();
                column.read_records(rows, None, None, &mut values)?;
                Ok(values)
            }
            _ => Err(ParquetError::General(format!("column {at} is of another type"))),
        };
        let large = |at| match group.get_column_reader(at)? {
            ColumnReader::Int64ColumnReader(mut column) => {
                let mut values = Vec::new();
                column.read_records(rows, None, None, &mut values)?;
                Ok(values)
            }
            _ => Err(ParquetError::General(format!("column {at} is of another type"))),
        };
        if group.num_columns() != 6 {
            return Err(ParquetError::General("it has other columns".to_owned()));
        }
        let read = Self {
            look: small(0)?,
            mapping: small(1)?,
            page: large(2)?,
            flags: small(3)?,
            content: large(4)?,
            mark: small(5)?,
        };
        let lengths = [read.mapping.len(), read.page.len(), read.flags.len(), read.content.len(), read.mark.len()];
        if lengths.iter().any(|length| *length != read.look.len()) {
            return Err(ParquetError::General("its columns have different lengths".to_owned()));
        }
        Ok(read)
    }
}

/// Puts a snapshot together, and says what does not fit.
fn rebuild(header: Header, groups: &[Rows], threads: usize, begun: Instant) -> Result<Snapshot, String> {
    let pages = usize::try_from(header.pages).ok().filter(|pages| u32::try_from(*pages).is_ok());
    let pages = pages.ok_or("it has too many pages")?;
    let looks = header.looks.len();
    let rows: usize = groups.iter().map(|rows| rows.look.len()).sum();
    if looks == 0 || pages.checked_mul(looks) != Some(rows) {
        return Err(format!("it has {rows} rows for {pages} pages and {looks} looks"));
    }
    if header.page_size != page_size() {
        return Err(format!("its pages have {} bytes, ours {}", header.page_size, page_size()));
    }
    let mut walk = Walk::default();
    for mapping in &header.mappings {
        if mapping.process as usize >= header.processes.len() {
            return Err("a mapping belongs to no process".to_owned());
        }
        let range = Range::new(Vaddr(mapping.start), Vaddr(mapping.end)).map_err(|error| error.to_string())?;
        walk.mappings.push(Mapping {
            process: mapping.process,
            range,
            kind: mapping.kind,
            name: mapping.name.clone(),
            permissions: mapping.permissions.as_bytes().try_into().unwrap_or(*b"----"),
            ksm_refuses: refusal(mapping.ksm_refuses.as_deref()),
            store_refuses: refusal(mapping.store_refuses.as_deref()),
            mergeable: mapping.mergeable,
        });
    }
    let mut census = Census::new(pages);
    let mut record = Record::default();
    let mut row = 0;
    let mut findings = Findings::new(0, pages);
    for group in groups {
        for at in 0..group.look.len() {
            let (look, page) = (row / pages, row % pages);
            if page == 0 {
                let time = header.looks[look];
                let time = Duration::try_from_secs_f64(time).map_err(|error| error.to_string())?;
                record.begin(time, pages);
                findings = Findings::new(0, pages);
            }
            let mapping = group.mapping[at].cast_unsigned();
            if group.look[at] != i32::try_from(look).unwrap_or(-1) || mapping as usize >= walk.mappings.len() {
                return Err(format!("row {row} is out of place"));
            }
            if look == 0 {
                let number = PageNumber(group.page[at].cast_unsigned());
                add_page(&mut walk, number, mapping, group.flags[at])?;
                record.marks[page] = u8::try_from(group.mark[at]).map_err(|error| error.to_string())?;
            }
            let bits = group.content[at].cast_unsigned();
            record.looks[look][page] = bits;
            if bits != ksmd::Content::ABSENT.to_bits() {
                let mark = record.marks[page];
                let content = if bits == ksmd::Content::ZERO.to_bits() {
                    Some(Content::ZERO)
                } else {
                    // Later looks have no mark: what was read as data then is compared by its hash. The mark of a page that
                    // was zeros at first says nothing about what it held later.
                    let marked = Content::from_parts(bits, mark).filter(|content| *content != Content::ZERO);
                    marked.or_else(|| Content::from_parts(bits, OTHER))
                };
                findings.put(page, content.ok_or_else(|| format!("row {row} has no class"))?);
            }
            row += 1;
            if page + 1 == pages {
                if look == 0 { census.take_in(&findings) } else { census.look_again(&findings) }
            }
        }
    }
    walk.known = header.processes.iter().map(|process| known(process.known)).collect();
    walk.pages = pages as u64;
    let processes = header.processes.into_iter().map(process).collect();
    let skipped = header.skipped.into_iter().map(|(pid, comm, reason)| Skipped { pid, comm, reason }).collect();
    let waited = header.looks.last().filter(|_| looks > 1);
    let waited = waited.map(|time| Duration::try_from_secs_f64(*time).unwrap_or_default());
    Ok(Snapshot {
        processes,
        skipped,
        walk,
        index_bytes: census.bytes(),
        groups: census.group(threads),
        seen: Seen { pages: pages as u64, ..Seen::default() },
        reading: begun.elapsed(),
        begun,
        slept: Duration::ZERO,
        waited,
        frames_seen: header.frames_seen,
        record: Some(record),
        files: None,
        live: false,
    })
}

/// The mark of a page that was read when its class was not kept.
const OTHER: u8 = page::census::ContentClass::Other as u8;

fn add_page(walk: &mut Walk, at: PageNumber, mapping: u32, flags: i32) -> Result<(), String> {
    let (huge, shared) = (flags & HUGE != 0, flags & SHARED != 0);
    let range = walk.mappings[mapping as usize].range;
    if at.0 < range.start().page_index() || at.0 >= range.end().page_index() {
        return Err("a page lies outside its mapping".to_owned());
    }
    if let Some(last) = walk.spans.last_mut() {
        if last.mapping > mapping {
            return Err("mappings are not in order".to_owned());
        }
        if last.mapping == mapping && (last.huge, last.shared) == (huge, shared) && last.range().end == at {
            last.pages += 1;
            walk.pages += 1;
            return Ok(());
        }
    }
    let first = u32::try_from(walk.pages).map_err(|error| error.to_string())?;
    walk.spans.push(Span { first, pages: 1, start: at, mapping, huge, shared, gently: false });
    walk.pages += 1;
    Ok(())
}

fn known([by_fork, by_ksm, by_partition, swapped, shared_memory]: [u64; 5]) -> Known {
    Known { by_fork, by_ksm, by_partition, swapped, shared_memory }
}

fn process(of: OfProcess) -> Process {
    Process {
        pid: of.pid,
        start_time: 0,
        comm: of.comm,
        command: of.command,
        uid: of.uid,
        cgroup: of.cgroup,
        shares_memory_with: of.shares_memory_with,
    }
}

/// The word that this build has for it. A word that it does not have is a refusal all the same.
fn refusal(word: Option<&str>) -> Option<&'static str> {
    word.map(|word| REFUSALS.into_iter().find(|known| *known == word).unwrap_or("other"))
}
