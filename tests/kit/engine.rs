//! The HTTP/1.1 engine that the router under test runs on: `native`, or `hyper` in `tests/on_hyper.rs`.
//! Nothing else in the tests names an engine.

use std::io::{self, Write};

use mini_lb::{Http1Engine, MiniLbConfig};

/// Whether these tests were compiled as a part of `tests/on_hyper.rs`.
fn is_hyper() -> bool {
    env!("CARGO_CRATE_NAME") == "on_hyper"
}

/// Sets the engine of a router that runs in the test's own process.
pub fn configure(config: MiniLbConfig) -> MiniLbConfig {
    if is_hyper() { config.http1_engine(Http1Engine::Hyper) } else { config }
}

/// The arguments that set the engine of the built program.
pub fn args() -> &'static [&'static str] {
    if is_hyper() { &["--http1-engine", "hyper"] } else { &[] }
}

/// Returns true, with a note, if the router runs on hyper. For a test of behaviour that hyper does not offer;
/// `why` is also in the list of differences in `docs/`.
pub fn skip_on_hyper(why: &str) -> bool {
    if is_hyper() {
        // Not `eprintln!`, which is not shown for a test that passes.
        let _ = writeln!(io::stderr(), "not tested on hyper: {why}");
    }
    is_hyper()
}
