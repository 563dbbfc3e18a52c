//! How often the router allocates: for a plain request of 300 bytes, and for one
//! token of a stream. Its peers allocate nothing, so all of the process is counted.

#[path = "kit/lockstep.rs"]
mod lockstep;

use std::alloc::System;
use std::time::Duration;

use lockstep::LockStep;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Measured: 21.2 without optimisation, as tests are built. Both legs are in it.
const MOST_OF_A_REQUEST: f64 = 22.0;
/// Measured: 1.0, the bytes. One more for each frame makes it 2.
const MOST_OF_A_TOKEN: f64 = 1.2;

/// What limits, keys and origins add, if all are on. Measured: none.
const MOST_OF_GUARDS: f64 = 0.5;

/// Longer than the router needs for a turn.
const PAUSE: Duration = Duration::from_micros(200);
const REQUESTS: usize = 200;
const STREAMS: usize = 10;

/// Allocations of all threads, grown ones included.
fn allocations(act: impl FnOnce()) -> f64 {
    let region = Region::new(ALLOCATOR);
    act();
    let change = region.change();
    (change.allocations + change.reallocations) as f64
}

/// One test: another one beside it would be counted too.
#[test]
fn a_request_and_a_token_take_few_allocations() {
    let mut peers = LockStep::start(PAUSE);
    // What is allocated once: connections, buffers, and timers.
    (0..50).for_each(|_| peers.plain());
    peers.stream(8);

    let of_a_request = allocations(|| (0..REQUESTS).for_each(|_| peers.plain())) / REQUESTS as f64;
    let mut of_streams = |tokens| allocations(|| (0..STREAMS).for_each(|_| peers.stream(tokens)));
    let of_a_token = (of_streams(128) - of_streams(64)) / (STREAMS * 64) as f64;
    println!("allocations: {of_a_request:.2} a request, {of_a_token:.2} a token");
    assert!(of_a_request <= MOST_OF_A_REQUEST, "{of_a_request} allocations a request");
    assert!(of_a_token <= MOST_OF_A_TOKEN, "{of_a_token} allocations a token");
    let mut guarded = LockStep::start_guarded(PAUSE);
    (0..50).for_each(|_| guarded.plain());
    let of_guards =
        allocations(|| (0..REQUESTS).for_each(|_| guarded.plain())) / REQUESTS as f64 - of_a_request;
    println!("allocations: {of_guards:.2} for limits, keys and origins");
    assert!(of_guards <= MOST_OF_GUARDS, "{of_guards} allocations for limits, keys and origins");
    // Less than this is a count that has gone wrong.
    assert!(of_a_request > 5.0 && of_a_token > 0.5, "{of_a_request} a request, {of_a_token} a token");
}
