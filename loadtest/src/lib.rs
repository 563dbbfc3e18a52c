//! Stand-ins for SGLang servers, and load to put on a router.

pub mod sim;
