//! What ksmd does, from the kernel's own tracepoints (Linux 6.4).
//!
//! The events name an address space by where its structure lies in the kernel. Text output hashes that, the raw records
//! read here do not, so that processes can be found for them; they are shown to nobody.

mod decode;
mod names;
mod report;
mod tally;

use std::fs::File;
use std::time::{Duration, Instant};

use kernel::tracefs::{Instance, Pipe, Record, TraceError, Tracefs};
use kernel::{Bytes, sched};

use decode::Decoder;
use names::Names;
use tally::Tally;

pub use report::{Advised, Bucket, Failures, Merges, Passes, ProcessTrace, Second, TraceReport};

/// A trace under way. It must be read ([`Tracer::tick`]) several times a second.
///
/// Cost: one record of some 60 bytes for each merge, written by ksmd (below a microsecond), and the buffers. While
/// processes are named, every lock of an address space on the host is compared with this process's number: for the
/// milliseconds that it takes, at the start and when unknown ones appear, at most once a second.
#[derive(Debug)]
pub struct Tracer {
    // Dropped before the instance, which an open file would keep.
    pipes: Vec<Pipe>,
    marker: File,
    instance: Instance,
    decoder: Decoder,
    names: Names,
    tally: Tally,
    begun: Instant,
    named: Instant,
    events: u64,
    buffer: Bytes,
    cpu_before: Duration,
    removed: Vec<String>,
}

/// Memory for the records of one CPU, and of all: ksmd at its fastest writes 20 MB a second.
const BUFFER: Bytes = Bytes::from_mib(4);
const BUFFERS: Bytes = Bytes::from_mib(64);
/// Processes are looked for no more often than this.
const NAMING: Duration = Duration::from_secs(1);

impl Tracer {
    /// Begins. Instances of traces that were killed are removed.
    ///
    /// # Errors
    /// [`TraceError::NoTracefs`], [`TraceError::Instance`] without the rights; others if this kernel has no such events.
    pub fn start() -> Result<Self, TraceError> {
        let tracefs = Tracefs::open()?;
        // What is left behind is no reason not to begin.
        let removed = tracefs.remove_dead().unwrap_or_default();
        let instance = Instance::create(tracefs)?;
        let decoder = Decoder::new(&instance)?;
        let pipes = instance.pipes()?;
        let cpus = pipes.len().max(1) as u64;
        let each = Bytes((BUFFERS.get() / cpus).clamp(64 << 10, BUFFER.get()));
        // The default clock is each CPU's own, and ksmd moves between them.
        instance.write("trace_clock", "mono")?;
        instance.set_buffer(each)?;
        let now = Instant::now();
        let mut tracer = Self {
            pipes,
            marker: instance.marker()?,
            instance,
            decoder,
            names: Names::default(),
            tally: Tally::default(),
            begun: now,
            named: now,
            events: 0,
            buffer: Bytes(each.get() * cpus),
            cpu_before: sched::usage(sched::Whose::Own).cpu(),
            removed,
        };
        tracer.names.hello(&mut tracer.marker)?;
        tracer.drain()?;
        tracer.learn()?;
        tracer.begun = Instant::now();
        tracer.tally.begin();
        tracer.instance.write("events/ksm/enable", "1")?;
        Ok(tracer)
    }

    /// Instances of traces that had been killed, removed at the start.
    #[must_use]
    pub fn removed(&self) -> &[String] {
        &self.removed
    }

    /// Takes in what has happened. To be called every 100 ms or so.
    ///
    /// # Errors
    /// [`TraceError`].
    pub fn tick(&mut self) -> Result<(), TraceError> {
        self.drain()?;
        if self.named.elapsed() >= NAMING && self.tally.has_nameless() {
            self.learn()?;
        }
        Ok(())
    }

    /// How it stands, and what happened in each second that is over since this was last asked.
    ///
    /// # Errors
    /// [`TraceError::Read`].
    pub fn report(&mut self) -> Result<TraceReport, TraceError> {
        let cpu = sched::usage(sched::Whose::Own).cpu().saturating_sub(self.cpu_before);
        let mut report = self.tally.report(&self.names);
        report.seconds = self.begun.elapsed().as_secs_f64();
        report.events = self.events;
        report.lost_events = self.instance.lost()?;
        report.buffer_bytes = self.buffer.get();
        report.cpu_seconds = cpu.as_secs_f64();
        Ok(report)
    }

    /// What happened in the last whole second.
    #[must_use]
    pub fn last_second(&self) -> Option<Second> {
        self.tally.last_second()
    }

    /// Ends: takes in what is left and removes the instance.
    ///
    /// # Errors
    /// [`TraceError`].
    pub fn finish(mut self) -> Result<TraceReport, TraceError> {
        self.instance.write("events/ksm/enable", "0")?;
        self.drain()?;
        if self.tally.has_nameless() {
            self.learn()?;
        }
        self.report()
    }

    fn drain(&mut self) -> Result<(), TraceError> {
        let mut records: Vec<Record> = Vec::new();
        for pipe in &mut self.pipes {
            let path = || "trace_pipe_raw".to_owned();
            pipe.drain(&mut records).map_err(|source| TraceError::Read { path: path(), source })?;
        }
        records.sort_by_key(|record| record.time);
        for record in &records {
            if let Some(event) = self.decoder.decode(&record.bytes) {
                self.names.take(&event);
                self.events += u64::from(self.tally.take(record.time, &event, &mut self.names));
            }
        }
        Ok(())
    }

    /// Finds out whose address spaces the kernel's addresses are.
    fn learn(&mut self) -> Result<(), TraceError> {
        self.named = Instant::now();
        self.tally.asked();
        self.names.ask(&self.instance, &mut self.marker)?;
        self.drain()
    }
}
