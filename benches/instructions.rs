//! A fixed number of exchanges through a router in this process, to be run under
//! callgrind by `.ci/gate`, which counts their instructions.
//!
//! Arguments: how many plain requests, how many streams of 64 tokens, and `guarded` if
//! limits and keys are to be on. Some of both come before them, so that what happens
//! once is the same in every run. By itself it measures nothing.

#[path = "../tests/kit/lockstep.rs"]
mod lockstep;

use std::time::Duration;

use lockstep::LockStep;

/// The allocator of the program, which is a part of what is counted.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const TOKENS: usize = 64;
/// Longer than the router needs for a turn, although callgrind makes it fifty times as slow.
const PAUSE: Duration = Duration::from_millis(2);

fn main() {
    let counts: Vec<usize> = std::env::args().skip(1).filter_map(|count| count.parse().ok()).collect();
    let [requests, streams] = counts[..] else {
        println!("instructions: run by .ci/gate");
        return;
    };
    let is_guarded = std::env::args().any(|arg| arg == "guarded");
    let mut peers = if is_guarded { LockStep::start_guarded(PAUSE) } else { LockStep::start(PAUSE) };
    exchange(&mut peers, 20, 5);
    exchange(&mut peers, requests, streams);
}

fn exchange(peers: &mut LockStep, requests: usize, streams: usize) {
    (0..requests).for_each(|_| peers.plain());
    (0..streams).for_each(|_| peers.stream(TOKENS));
}
