//! Segments in the hands of members: processes of their own, of another user where the tests run as root.
#![allow(clippy::unwrap_used, reason = "tests")]

mod isolation;
mod lifetime;
mod member;
