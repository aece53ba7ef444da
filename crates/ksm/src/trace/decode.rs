//! Records of events, by their fields' names.

use std::collections::HashMap;

use kernel::tracefs::{Field, Format, Instance, TraceError};

/// Where an address space lies in the kernel: its name in events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Mm(pub(super) u64);

/// How a page was merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum How {
    /// With a page that is merged already, or that has just become the first.
    Joined,
    /// It became the page that others join.
    Promoted,
    /// It became the zero page.
    Zero,
}

/// One event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// A pass begins.
    Start { rmap_entries: u64 },
    /// A pass ends.
    Stop,
    /// ksmd scans this address space from now on.
    Enter { mm: Mm },
    /// It is no longer scanned.
    Exit { mm: Mm },
    /// A page was merged, or not: 0 or the kernel's error.
    Merge { mm: Mm, how: How, error: i64 },
    /// The record of a merged page was dropped that nobody uses any more.
    RemovePage,
    /// The record of a page address was dropped with it.
    RemoveItem,
    /// The advisor has set the rate.
    Advisor { seconds: i64, pages_to_scan: u64, cpu_percent: u64 },
    /// A thread has locked an address space.
    Locked { mm: Mm, thread: i64 },
    /// Our own mark.
    Mark { text: String, thread: i64 },
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Start,
    Stop,
    Enter,
    Exit,
    MergeZero,
    Merge,
    RemovePage,
    RemoveItem,
    Advisor,
    Locked,
    Mark,
}

/// The event that tells which address space a thread locks.
pub(super) const LOCK: &str = "mmap_lock/mmap_lock_acquire_returned";

const EVENTS: [(&str, Kind, bool); 11] = [
    ("ksm/ksm_start_scan", Kind::Start, true),
    ("ksm/ksm_stop_scan", Kind::Stop, true),
    ("ksm/ksm_enter", Kind::Enter, true),
    ("ksm/ksm_exit", Kind::Exit, true),
    ("ksm/ksm_merge_one_page", Kind::MergeZero, true),
    ("ksm/ksm_merge_with_ksm_page", Kind::Merge, true),
    ("ksm/ksm_remove_ksm_page", Kind::RemovePage, true),
    ("ksm/ksm_remove_rmap_item", Kind::RemoveItem, true),
    ("ksm/ksm_advisor", Kind::Advisor, false),
    (LOCK, Kind::Locked, false),
    ("ftrace/print", Kind::Mark, true),
];

/// Knows how this kernel writes the events.
#[derive(Debug)]
pub(super) struct Decoder {
    known: HashMap<u16, (Kind, Format)>,
}

impl Decoder {
    /// Reads the formats.
    pub(super) fn new(instance: &Instance) -> Result<Self, TraceError> {
        let mut known = HashMap::new();
        for (name, kind, needed) in EVENTS {
            match instance.format(name) {
                Ok(format) => {
                    known.insert(format.id, (kind, format));
                }
                Err(error) if !needed && error.is_missing() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Self { known })
    }

    /// `None` for an event that is not one of these.
    pub(super) fn decode(&self, record: &[u8]) -> Option<Event> {
        let id = u16::from_ne_bytes(record.get(..2)?.try_into().ok()?);
        let (kind, format) = self.known.get(&id)?;
        let field = |name: &str| format.field(name);
        let number = |name: &str| field(name)?.unsigned(record);
        let signed = |name: &str| field(name)?.signed(record);
        let mm = || number("mm").map(Mm);
        Some(match kind {
            Kind::Start => Event::Start { rmap_entries: number("rmap_entries")? },
            Kind::Stop => Event::Stop,
            Kind::Enter => Event::Enter { mm: mm()? },
            Kind::Exit => Event::Exit { mm: mm()? },
            Kind::MergeZero => Event::Merge { mm: mm()?, how: How::Zero, error: signed("err")? },
            Kind::Merge => {
                // Without a page to join it is to become one itself.
                let how = if number("ksm_page")? == 0 { How::Promoted } else { How::Joined };
                Event::Merge { mm: mm()?, how, error: signed("err")? }
            }
            Kind::RemovePage => Event::RemovePage,
            Kind::RemoveItem => Event::RemoveItem,
            Kind::Advisor => Event::Advisor {
                seconds: signed("scan_time")?,
                pages_to_scan: number("pages_to_scan")?,
                cpu_percent: number("cpu_percent")?,
            },
            Kind::Locked => Event::Locked { mm: mm()?, thread: signed("common_pid")? },
            Kind::Mark => Event::Mark { text: text(field("buf")?, record)?, thread: signed("common_pid")? },
        })
    }
}

/// The rest of a record as text.
fn text(field: Field, record: &[u8]) -> Option<String> {
    let bytes = record.get(field.offset..)?;
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    Some(String::from_utf8_lossy(&bytes[..end]).trim_end().to_owned())
}
