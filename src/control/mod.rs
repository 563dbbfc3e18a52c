//! Everything that is not a user's generation request: questions about the
//! servers, and orders to all of them.

mod ask;
mod endpoints;

pub(crate) use endpoints::{Control, Endpoint, allows};
