//! f11: every call on mappings, on plain memory and on merged memory: result, error and content must be the same.

use crate::victim::Victim;

pub(crate) const VICTIMS: &[Victim] = &[];
