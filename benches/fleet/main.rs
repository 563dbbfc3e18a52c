//! The router's own policies against a model of a fleet, without sockets: the table of `docs/ROUTING.md`.
//!
//! ```sh
//! cargo bench --features internals --bench fleet -- --times 1.0 --times 1.4
//! ```

mod own_router;

use std::io;

use clap::{Args as _, Command, FromArgMatches as _};
use loadtest::fleet::Experiment;

fn main() -> io::Result<()> {
    // Cargo adds a flag of its own.
    let arguments = std::env::args().filter(|argument| argument != "--bench");
    let matches = Experiment::augment_args(Command::new("fleet")).get_matches_from(arguments);
    let experiment = Experiment::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    experiment.run(own_router::candidates())?;
    Ok(())
}
