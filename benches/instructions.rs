//! A fixed number of exchanges through a router in this process. `.ci/gate` runs it under callgrind, which
//! counts the instructions; by itself it measures nothing.
//!
//! Arguments: the number of plain requests, the number of streams of 64 tokens, and `guarded` to enable
//! limits and API keys, or `cache_aware` for the policies that look at prompts; `long` makes requests of 8.5
//! KB. A few of both go first, so that what happens once per process is the same in every run.

#[path = "../tests/kit/lockstep.rs"]
mod lockstep;

use std::time::Duration;

use lockstep::LockStep;

/// The program's allocator, whose instructions count.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const TOKENS: usize = 64;
/// Longer than the router needs for a turn, although callgrind slows it down fifty-fold.
const PAUSE: Duration = Duration::from_millis(2);

fn main() {
    let counts: Vec<usize> = std::env::args().skip(1).filter_map(|count| count.parse().ok()).collect();
    let [requests, streams] = counts[..] else {
        println!("instructions: run by .ci/gate");
        return;
    };
    let is_given = |word: &str| std::env::args().any(|arg| arg == word);
    let start = match () {
        () if is_given("guarded") => LockStep::start_with_limits,
        () if is_given("cache_aware") => LockStep::start_with_cache_aware,
        () if is_given("hyper") => LockStep::start_with_hyper,
        () => LockStep::start,
    };
    let mut peers = start(PAUSE);
    if is_given("long") {
        peers.lengthen();
    }
    exchange(&mut peers, 20, 5);
    exchange(&mut peers, requests, streams);
}

fn exchange(peers: &mut LockStep, requests: usize, streams: usize) {
    (0..requests).for_each(|_| peers.plain());
    (0..streams).for_each(|_| peers.stream(TOKENS));
}
