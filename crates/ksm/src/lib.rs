//! Placeholder of the room while its first piece is written.
