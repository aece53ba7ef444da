//! A member that does what it can to harm the broker and the other members.

use crate::stage::Image;

pub(crate) const TESTS: [(&str, fn(&Image)); 0] = [];

pub(crate) fn enemy(_arguments: &[String]) {}
