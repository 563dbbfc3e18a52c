//! Ports for programs that are told which to listen on.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::TcpListener;

/// Below the ports that Linux gives to connections and to listeners on port 0 (32,768 and up): another test's
/// connection would now and then take such a one before the program binds it. Below the router's defaults
/// (29,000 and 30,000), too.
const FIRST: u16 = 10_000;
const COUNT: u16 = 18_000;

/// A port on 127.0.0.1 that nobody listens on. At random, as tests run at the same time.
pub fn free_port() -> u16 {
    for _ in 0..COUNT {
        let random = RandomState::new().build_hasher().finish();
        let port = FIRST + (random % u64::from(COUNT)) as u16;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("the ports from {FIRST} on are in use");
}
