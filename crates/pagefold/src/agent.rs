//! The agent in this process: loaded at the first merge, once, for one partition.

use std::sync::{Mutex, PoisonError};

use broker::BrokerError;
use kernel::AgentImage;

use crate::descriptor::Card;
use crate::error::Error;

/// The agent and the partition that it was set up for.
struct Loaded {
    image: AgentImage,
    card: Card,
}

static LOADED: Mutex<Option<Loaded>> = Mutex::new(None);

/// The agent, set up for a partition; loads it if it is not there.
pub(crate) fn for_partition(card: &Card) -> Result<AgentImage, Error> {
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(loaded) = &*loaded {
        return if loaded.card == *card { Ok(loaded.image) } else { Err(Error::OtherPartition) };
    }
    let sites = broker::host_sites().map_err(|error| match error {
        BrokerError::Sites { reason } => Error::UnknownLibc { reason },
        other => Error::Serve(other),
    })?;
    let image = load()?;
    image.start(&card.name, [card.token.0, card.token.1], &sites)?;
    *loaded = Some(Loaded { image, card: card.clone() });
    Ok(image)
}

#[allow(unsafe_code, reason = "the loader executes what it loads")]
fn load() -> Result<AgentImage, Error> {
    // SAFETY: the image that was built together with this code and is carried inside it.
    Ok(unsafe { AgentImage::load(broker::image_bytes()) }?)
}
