//! What a survivor does in place of a batch that was killed: the broker or the guardian, from outside, with its
//! duplicate of the userfaultfd. It may be killed in turn; the next one begins anew.

use abi::BATCH_MAX;

use super::{Recording, Table, VACANT};

impl Recording {
    /// Gives back what the journal says, then opens the gate. The scratch area stays as it is: nobody outside can empty
    /// it. All slots are looked at, as the journal's count may be behind or ahead.
    ///
    /// Content is copied (UFFDIO_COPY works from outside, UFFDIO_MOVE does not): what somebody writes through a
    /// reference *after* that is lost. That is a limit of recovery, and so those write before it here.
    pub(crate) fn recover(&mut self) {
        self.last_words();
        if let Some(kind) = self.journal.kind {
            for slot in 0..BATCH_MAX {
                self.tick();
                let source = self.journal.source[slot];
                let frozen = self.scratch[kind as usize][slot];
                let readable = frozen.table != Table::Nothing && (frozen.readable || !self.strict);
                let Some(page) = self.pages.get(&source) else { continue };
                // ENOENT where nothing is registered, EEXIST where something is: the page has been replaced then, or
                // given back.
                if readable && page.registered.is_some() && page.table == Table::Nothing {
                    let frame = self.new_frame(self.scratch_content(kind, slot));
                    self.pages.get_mut(&source).expect("just seen").table = Table::Frame(frame);
                    self.wake_waiters(source, source + 1);
                }
            }
            let (start, end) = self.journal.window;
            let window: Vec<u64> = self.pages.range(start..end).map(|(address, _)| *address).collect();
            for address in window {
                self.tick();
                if let Some(page) = self.pages.get_mut(&address) {
                    page.registered = None;
                }
            }
            self.tick();
            self.wake_waiters(start, end);
            self.tick();
            self.journal.kind = None;
        }
        self.tick();
        self.gate_closed = false;
        self.let_in();
    }

    /// What a new plan is made from: the layout as it is now. A new helper has scratch areas of its own.
    pub(crate) fn plan_anew(&mut self) {
        self.scratch = [[VACANT; BATCH_MAX]; 2];
        self.planned_epoch = self.epoch;
        self.faults = super::Faults::default();
        self.calls = super::Calls::default();
        self.kills.clear();
        self.schedule.clear();
        self.acted = 0;
    }
}
