//! What the policies make of a modelled fleet: never worse than simpler ones, and close to an oracle.
//!
//! Only with the feature `internals`: it is the policies' own code, without sockets.

#[path = "../benches/fleet/own_router.rs"]
mod own_router;

#[test]
fn placeholder() {}
