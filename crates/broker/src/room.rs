//! Whether there is address space left. An allocation that fails ends this process and leaves its members to the
//! guardian, so nobody is taken in whom there may be no room for.

use std::thread::Builder;

use kernel::Bytes;
use kernel::address_space::left;

use crate::error::BrokerError;

/// What a broker takes before it has members, with its threads.
const BROKER: u64 = 24 << 20;
/// What a member takes: two threads' stacks, its control area, programs and buffers.
const MEMBER: u64 = 2 << 20;
/// Stack of such a thread.
const STACK: usize = 256 << 10;
/// What is kept for whatever those who are members already hand over later: a thousandth of it, and tables that grow.
const RESERVE: u64 = 32 << 20;

/// A thread with a small stack: there are some for each member, and hundreds of members may come at once.
pub(crate) fn thread() -> Builder {
    Builder::new().stack_size(STACK)
}

/// That a broker can be started and take members in.
///
/// # Errors
/// [`BrokerError::AddressSpace`].
pub fn enough_for_a_broker() -> Result<(), BrokerError> {
    match left() {
        Ok(Some(left)) if left.get() < BROKER + RESERVE + MEMBER => Err(BrokerError::AddressSpace { left }),
        _ => Ok(()),
    }
}

/// True if so many who introduce themselves at this moment can be taken in.
pub(crate) fn is_enough_for(members: usize) -> bool {
    let taken = RESERVE + MEMBER.saturating_mul(members as u64);
    left().is_ok_and(|left| left.is_none_or(|left| left > Bytes(taken)))
}
