//! The router's own policies against a model of a fleet, without sockets: the table of `docs/ROUTING.md`.
//!
//! ```sh
//! cargo bench --features internals --bench fleet -- --times 1.0 --times 1.4
//! ```
//!
//! By name there are also `mini-lb:cache_aware:unknown`, `:half` and `:double`, whose servers do not tell the
//! size of their caches, or one that is not so, and those with `:silent` behind it, whose servers do not say
//! how much of a prompt was cached; and `mini-lb:cache_aware:1`, `:2`, `:4` and `:8` are as many routers that
//! share nothing, with `:polls` behind it those that ask servers for their load. In
//! `mini-lb:cache_aware:ranks`, and for `least_load` and `consistent_hash`, four prefill servers are the
//! data-parallel ranks of one, and with `:ranks-ignored` the router does not know of them.

mod own_router;

use std::io;

use clap::{Args as _, Command, FromArgMatches as _};
use loadtest::fleet::Experiment;

fn main() -> io::Result<()> {
    // Cargo adds a flag of its own.
    let arguments = std::env::args().filter(|argument| argument != "--bench");
    let matches = Experiment::augment_args(Command::new("fleet")).get_matches_from(arguments);
    let experiment = Experiment::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let mut candidates = own_router::candidates();
    // Only by name: they would double the time of a run.
    let others = own_router::misinformed().into_iter();
    let others = others.chain(own_router::several()).chain(own_router::with_ranks());
    candidates.extend(others.filter(|candidate| experiment.policy.contains(&candidate.name)));
    experiment.run(candidates)?;
    Ok(())
}
