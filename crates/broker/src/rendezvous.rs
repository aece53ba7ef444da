//! Where helpers and library callers find the broker.

use kernel::seqpacket::SeqpacketListener;

use crate::error::BrokerError;

pub use abi::wire::Token;

/// An abstract socket with a name nobody else has, and the secret that makes a member.
#[derive(Debug)]
pub struct Rendezvous {
    name: String,
    token: Token,
    pub(crate) listener: SeqpacketListener,
}

impl Rendezvous {
    /// Draws a name and a secret and listens.
    ///
    /// # Errors
    /// [`BrokerError::Secret`], [`BrokerError::Listen`].
    pub fn open() -> Result<Self, BrokerError> {
        let mut random = [0_u8; 32];
        let mut done = 0;
        while done < random.len() {
            done += rustix::rand::getrandom(&mut random[done..], rustix::rand::GetRandomFlags::empty())
                .map_err(|errno| BrokerError::Secret(errno.into()))?;
        }
        let (words, _) = random.as_chunks::<8>();
        let [a, b, c, d] = [0, 1, 2, 3].map(|index| u64::from_le_bytes(words[index]));
        let name = format!("pagefold-{a:016x}{b:016x}");
        let listener = SeqpacketListener::bind_abstract(name.as_bytes())?;
        Ok(Self { name, token: Token(c, d), listener })
    }

    /// The socket's abstract name, without the leading zero byte.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The secret.
    #[must_use]
    pub fn token(&self) -> Token {
        self.token
    }

    /// The value of the environment variable `PAGEFOLD_AGENT` that leads an agent here.
    #[must_use]
    pub fn variable(&self, sites: &str) -> String {
        format!("{}:{:016x}{:016x}:{sites}", self.name, self.token.0, self.token.1)
    }
}
