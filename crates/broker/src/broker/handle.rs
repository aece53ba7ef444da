//! A running broker, as other threads see it.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use kernel::Pid;

use crate::account::Summary;
use crate::error::BrokerError;
use crate::rendezvous::Token;
use crate::wishes::{Asked, Wish, Wished};

/// A running broker, for other threads.
#[derive(Debug)]
pub struct BrokerHandle {
    pub(super) asked: Sender<Asked>,
    pub(super) wake: Arc<OwnedFd>,
    pub(super) thread: Option<JoinHandle<()>>,
    pub(super) name: String,
    pub(super) token: Token,
    /// The process whose broker it is: a forked child has a copy of this value and no broker.
    pub(super) owner: Pid,
}

impl BrokerHandle {
    /// Asks for something and waits for the answer.
    ///
    /// # Errors
    /// [`BrokerError::Ended`].
    pub fn ask(&self, wish: Wish) -> Result<Wished, BrokerError> {
        if self.owner != Pid::this() {
            return Err(BrokerError::Ended);
        }
        let (answer, answered) = channel();
        self.asked.send(Asked { wish, answer }).map_err(|_gone| BrokerError::Ended)?;
        let _ = rustix::io::write(&*self.wake, &1_u64.to_ne_bytes());
        answered.recv().map_err(|_gone| BrokerError::Ended)
    }

    /// The state now.
    ///
    /// # Errors
    /// [`BrokerError::Ended`].
    pub fn summary(&self) -> Result<Summary, BrokerError> {
        match self.ask(Wish::Summary)? {
            Wished::Summary(summary) => Ok(*summary),
            _ => Err(BrokerError::Ended),
        }
    }

    /// True in the process that started the broker, false in its forked children.
    #[must_use]
    pub fn is_own(&self) -> bool {
        self.owner == Pid::this()
    }

    /// The abstract name of the socket that helpers connect to.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The partition's secret.
    #[must_use]
    pub fn token(&self) -> Token {
        self.token
    }
}

impl Drop for BrokerHandle {
    fn drop(&mut self) {
        let _ = self.ask(Wish::Stop);
        match self.thread.take() {
            Some(thread) if self.owner == Pid::this() => {
                let _ = thread.join();
            }
            // Not a thread of this process.
            other => std::mem::forget(other),
        }
    }
}
