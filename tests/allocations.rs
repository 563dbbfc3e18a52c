//! Allocations for a plain request of 300 bytes and for one token of a stream. The peers allocate nothing, so
//! the whole process is counted.

#[path = "kit/lockstep.rs"]
mod lockstep;

use std::alloc::System;
use std::time::Duration;

use lockstep::LockStep;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Measured: 22.2 without optimisation, as tests are built. Includes both legs, and the future that makes the
/// response, which is freed when that starts.
const MAX_PER_REQUEST: f64 = 23.0;
/// Measured: 1.0, for the bytes. One more allocation per frame would make it 2.
const MAX_PER_TOKEN: f64 = 1.2;

/// Added by limits, keys and origins, all of them on. Measured: 0.
const MAX_FOR_LIMITS: f64 = 0.5;

/// Added by the policies that look at prompts. Measured: 0.
const MAX_FOR_PROMPTS: f64 = 0.1;

/// The same with hyper for HTTP/1.1 on both sides. Measured: 103.2 and 2.0.
const MAX_PER_REQUEST_ON_HYPER: f64 = 106.0;
const MAX_PER_TOKEN_ON_HYPER: f64 = 2.2;

/// Longer than the router needs for a step.
const PAUSE: Duration = Duration::from_micros(200);
const REQUESTS: usize = 200;
const STREAMS: usize = 10;

/// Allocations and reallocations of all threads.
fn allocations(act: impl FnOnce()) -> f64 {
    let region = Region::new(ALLOCATOR);
    act();
    let change = region.change();
    (change.allocations + change.reallocations) as f64
}

/// Of a plain request, and of each token of a stream.
fn per_request_and_token(mut peers: LockStep) -> (f64, f64) {
    // Allocated once: connections, buffers and timers.
    (0..50).for_each(|_| peers.plain());
    peers.stream(8);
    let per_request = allocations(|| (0..REQUESTS).for_each(|_| peers.plain())) / REQUESTS as f64;
    let mut of_streams = |tokens| allocations(|| (0..STREAMS).for_each(|_| peers.stream(tokens)));
    (per_request, (of_streams(128) - of_streams(64)) / (STREAMS * 64) as f64)
}

/// The only test of this file: the allocations of a concurrent one would be counted too.
#[test]
fn allocations_per_request_and_per_token_are_bounded() {
    let (per_request, per_token) = per_request_and_token(LockStep::start(PAUSE));
    println!("allocations: {per_request:.2} a request, {per_token:.2} a token");
    assert!(per_request <= MAX_PER_REQUEST, "{per_request} allocations a request");
    assert!(per_token <= MAX_PER_TOKEN, "{per_token} allocations a token");
    let (on_hyper, token_on_hyper) = per_request_and_token(LockStep::start_with_hyper(PAUSE));
    println!("allocations on hyper: {on_hyper:.2} a request, {token_on_hyper:.2} a token");
    assert!(on_hyper <= MAX_PER_REQUEST_ON_HYPER, "{on_hyper} allocations a request on hyper");
    assert!(token_on_hyper <= MAX_PER_TOKEN_ON_HYPER, "{token_on_hyper} allocations a token on hyper");
    let mut with_limits = LockStep::start_with_limits(PAUSE);
    (0..50).for_each(|_| with_limits.plain());
    let for_limits =
        allocations(|| (0..REQUESTS).for_each(|_| with_limits.plain())) / REQUESTS as f64 - per_request;
    println!("allocations: {for_limits:.2} for limits, keys and origins");
    assert!(for_limits <= MAX_FOR_LIMITS, "{for_limits} allocations for limits, keys and origins");
    // Long requests, because a short one has no block of a prompt to be noted.
    let of_long = |mut peers: LockStep| {
        peers.lengthen();
        (0..50).for_each(|_| peers.plain());
        allocations(|| (0..REQUESTS).for_each(|_| peers.plain())) / REQUESTS as f64
    };
    let without = of_long(LockStep::start(PAUSE));
    let for_prompts = of_long(LockStep::start_with_cache_aware(PAUSE)) - without;
    println!("allocations: {without:.2} a long request, {for_prompts:.2} for its prompt");
    assert!(for_prompts <= MAX_FOR_PROMPTS, "{for_prompts} allocations for the prompt");
    // Fewer would mean that counting is broken.
    assert!(per_request > 5.0 && per_token > 0.5, "{per_request} a request, {per_token} a token");
}
