//! What comes under management in members that have handed nothing over.

use std::sync::Arc;

use abi::wire::Message;

use super::Broker;
use crate::order::Queue;
use crate::scope::{Judge, chosen};
use crate::settings::Scope;

impl Broker {
    /// Who says that a program's gate is complete; `None` where only what was handed over is managed.
    pub(super) fn judge(&self) -> Option<Arc<dyn Judge>> {
        match &self.settings.scope {
            Scope::Marked => None,
            Scope::All(judge) => Some(Arc::clone(judge)),
        }
    }

    /// Has helpers put under management what is eligible by now. A helper that is at a plan is asked the next time, since
    /// the program waits while its helper works on both.
    pub(super) fn choose(&mut self) {
        if self.judge().is_none() {
            self.members.iter_mut().for_each(|member| member.view.mapped = Vec::new());
            return;
        }
        for member in &mut self.members {
            let mapped = std::mem::take(&mut member.view.mapped);
            let idle = self.queues.get(&member.index).is_none_or(Queue::is_idle);
            if !idle || member.unfit.is_some() || member.is_stopped() {
                continue;
            }
            for range in chosen(member, &mapped) {
                member.tell(Message::Adopt { start: range.start().get(), end: range.end().get() }, None);
            }
        }
    }
}
