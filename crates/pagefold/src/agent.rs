//! The agent in this process: loaded at the first merge, once, for one partition at a time.

use std::sync::{Mutex, PoisonError};

use broker::BrokerError;
use kernel::{AgentImage, AgentImageError, Range, StartFailure};

use crate::descriptor::Card;
use crate::error::Error;

/// The agent and the partition that it was set up for.
struct Loaded {
    image: AgentImage,
    card: Card,
    /// What was handed over and not taken back. The agent knows too what was unmapped meanwhile.
    ranges: Vec<Range>,
}

static LOADED: Mutex<Option<Loaded>> = Mutex::new(None);

/// The agent, set up for a partition; loads it if it is not there.
pub(crate) fn for_partition(card: &Card) -> Result<AgentImage, Error> {
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(loaded) = &mut *loaded {
        if loaded.card != *card {
            // It takes a new partition once nothing of the old one is left.
            match loaded.image.start(&card.name, [card.token.0, card.token.1], &[]) {
                Ok(()) => {
                    loaded.card = card.clone();
                    loaded.ranges.clear();
                }
                Err(AgentImageError::Start(StartFailure::Twice)) => return Err(Error::OtherPartition),
                Err(error) => return Err(error.into()),
            }
        }
        return Ok(loaded.image);
    }
    let sites = broker::host_sites().map_err(|error| match error {
        BrokerError::Sites { reason } => Error::UnknownLibc { reason },
        other => Error::Serve(other),
    })?;
    let image = load()?;
    image.start(&card.name, [card.token.0, card.token.1], &sites)?;
    *loaded = Some(Loaded { image, card: card.clone(), ranges: Vec::new() });
    Ok(image)
}

/// The agent if it is set up for this partition, and what was handed over.
pub(crate) fn present(card: &Card) -> Option<(AgentImage, Vec<Range>)> {
    let loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    loaded.as_ref().filter(|loaded| loaded.card == *card).map(|loaded| (loaded.image, loaded.ranges.clone()))
}

/// A range is under the agent's management, for this partition.
pub(crate) fn handed_over(card: &Card, range: Range) {
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(loaded) = loaded.as_mut().filter(|loaded| loaded.card == *card)
        && !loaded.ranges.iter().any(|known| known.contains_range(&range))
    {
        loaded.ranges.push(range);
    }
}

/// A range was taken back.
pub(crate) fn taken_back(range: Range) {
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(loaded) = &mut *loaded {
        loaded.ranges.retain(|known| !range.contains_range(known));
    }
}

#[allow(unsafe_code, reason = "the loader executes what it loads")]
fn load() -> Result<AgentImage, Error> {
    // SAFETY: the image that was built together with this code and is carried inside it.
    Ok(unsafe { AgentImage::load(broker::image_bytes()) }?)
}
