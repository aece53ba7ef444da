//! Who comes to the broker's socket: helpers that introduce themselves, and library callers.

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use abi::wire::Message;
use kernel::{Pid, Pidfd, PidfdError};

use super::Broker;
use crate::member::{Host, Member, Refused, first_packet, introduce};
use crate::order::Queue;
use crate::reception::{is_greeting, receive_caller};
use crate::room::{is_enough_for, thread};

/// For how long a process may be without memory before it is seen to have ended.
const ENDING: Duration = Duration::from_secs(1);
/// Refused helpers that are remembered, with their reasons.
const REFUSED_MAX: usize = 256;

/// What came of an introduction, and the program that the helper said it serves.
pub(super) type Introduced = (Option<Pid>, Result<Member, Refused>);

impl Broker {
    /// Both are served in threads of their own: one that stalls holds nobody up.
    pub(super) fn accept(&mut self) {
        while let Ok(Some(link)) = self.rendezvous.listener.accept() {
            let Some(visit) = self.desk.admit() else { continue };
            let (token, uid, index) = (self.rendezvous.token(), self.settings.uid, self.next_index);
            self.next_index += 1;
            let device = self.device.as_ref().and_then(|device| device.try_clone().ok());
            let (exact, priority) = (self.check.is_some(), self.settings.priority);
            let judge = self.judge();
            let judged = judge.is_some();
            let (introducer, desk) = (self.introducer.clone(), self.desk.clone());
            let run = move || {
                let _visit = visit;
                let Ok(first) = first_packet(&link) else { return };
                if is_greeting(&first.bytes) {
                    receive_caller(&link, &first.bytes, &desk);
                    return;
                }
                let said = match Message::decode(&first.bytes) {
                    Some(
                        Message::Hello { member, token: secret, .. } | Message::Declined { member, token: secret },
                    ) if secret == token => Some(Pid(member.cast_signed())),
                    _ => None,
                };
                let host = Host { token, uid, device: device.as_ref(), exact, priority, judge, index };
                let introduced = match is_enough_for(desk.visitors.load(SeqCst)) {
                    true => introduce(link, first, host),
                    false => Err(Refused::AddressSpace),
                };
                if judged {
                    // All code of a program was read.
                    kernel::address_space::trim();
                }
                // A program that ends while its helper introduces itself is no refusal, whatever failed because of it. Nor
                // is one that executes something: the next one has a helper of its own.
                let ended = match &introduced {
                    Err(Refused::MemoryGone) => true,
                    Err(Refused::Ended | Refused::NotInMember | Refused::Broken | Refused::Kernel(_)) => {
                        said.is_some_and(ends)
                    }
                    _ => false,
                };
                if ended {
                    return;
                }
                let _ = introducer.send((said, introduced));
                let _ = rustix::io::write(&*desk.wake, &1_u64.to_ne_bytes());
            };
            let _ = thread().name("pf-visitor".to_owned()).spawn(run);
        }
        while let Ok((said, introduced)) = self.introduced.try_recv() {
            match introduced {
                Ok(member) => self.take_in(member),
                Err(refused) => self.remember_refusal(said, &refused),
            }
        }
    }

    fn take_in(&mut self, member: Member) {
        self.refused.remove(&member.pid);
        self.left.remove(&member.pid);
        self.members_ever += 1;
        self.roll.take_in(member.index, member.pid);
        if let Some(guardian) = &mut self.guardian {
            guardian.add(&member);
        }
        self.queues.insert(member.index, Queue::default());
        self.members.push(member);
    }

    fn remember_refusal(&mut self, said: Option<Pid>, refused: &Refused) {
        if let Some(pid) = said {
            // For whoever asks for this process next; a crowd of them is not kept.
            if self.refused.len() >= REFUSED_MAX {
                self.refused.clear();
            }
            self.refused.insert(pid, (refused.kind(), refused.to_string()));
        }
        let reason = refused.to_string();
        match self.reasons.iter().position(|(known, _)| *known == reason) {
            Some(index) => self.reasons[index].1 += 1,
            None if self.reasons.len() < REFUSED_MAX => self.reasons.push((reason, 1)),
            None => {}
        }
    }
}

/// True for a process that has ended, or is about to: its memory goes first.
fn ends(pid: Pid) -> bool {
    match Pidfd::open(pid) {
        Ok(process) => process.wait_exited(ENDING).unwrap_or(false),
        Err(error) => matches!(error, PidfdError::Gone),
    }
}
