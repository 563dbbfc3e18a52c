//! The selection of a pair, all backends being healthy.

use std::cell::Cell;

use bytes::Bytes;
use divan::Bencher;
use mini_lb::internals::{inspect, select_pair};
use mini_lb::{
    CacheAware, ConsistentHash, LeastLoad, MiniLbConfig, MiniLoadBalancer, Policy, PowerOfTwo, Prompt,
    Random, RoundRobin,
};

/// Backends of each role: from a small fleet to a very large one.
const BACKENDS: [usize; 4] = [4, 16, 128, 1_000];

/// Blocks of 2 KiB in a prompt: 12,000 tokens, the mean of the Mooncake conversation trace.
const BLOCKS: usize = 24;
/// Prompts that take turns: the notes of all of them do not fit into a CPU's first cache.
const PROMPTS: usize = 64;

fn router<P: Policy>(backends: usize, policy: impl Fn() -> P) -> MiniLoadBalancer {
    let url = |role: &str, number| format!("http://{role}-{number}:30000");
    let prefill = (0..backends).map(|number| (url("prefill", number), Some(8998))).collect();
    let decode = (0..backends).map(|number| url("decode", number)).collect();
    let config = MiniLbConfig::new("127.0.0.1", 30_000, prefill, decode, 60).policy(policy);
    MiniLoadBalancer::new(config).expect("a valid configuration")
}

fn prompt(number: usize, blocks: usize) -> Prompt {
    let text: String = (0..blocks * 256).map(|word| format!("{:07} ", number * 1_000_003 + word)).collect();
    inspect(&[Bytes::from(format!(r#"{{"text":"{text}"}}"#))], false, true).expect("a prompt")
}

fn measure<P: Policy>(bencher: Bencher<'_, '_>, backends: usize, blocks: usize, policy: impl Fn() -> P) {
    let router = router(backends, policy);
    let prompts: Vec<_> = (0..PROMPTS).map(|number| prompt(number, blocks)).collect();
    let turn = Cell::new(0);
    bencher.bench_local(|| {
        turn.set((turn.get() + 1) % PROMPTS);
        select_pair(&router, &prompts[turn.get()])
    });
}

#[divan::bench(args = BACKENDS)]
fn select_pair_random(bencher: Bencher<'_, '_>, backends: usize) {
    measure(bencher, backends, 0, || Random);
}

#[divan::bench(args = BACKENDS)]
fn select_pair_round_robin(bencher: Bencher<'_, '_>, backends: usize) {
    measure(bencher, backends, 0, RoundRobin::default);
}

#[divan::bench(args = BACKENDS)]
fn select_pair_power_of_two(bencher: Bencher<'_, '_>, backends: usize) {
    measure(bencher, backends, 0, || PowerOfTwo);
}

#[divan::bench(args = BACKENDS)]
fn select_pair_least_load(bencher: Bencher<'_, '_>, backends: usize) {
    measure(bencher, backends, 0, || LeastLoad);
}

#[divan::bench(args = BACKENDS)]
fn select_pair_consistent_hash(bencher: Bencher<'_, '_>, backends: usize) {
    measure(bencher, backends, 1, || ConsistentHash);
}

/// A prompt that is shorter than a block.
#[divan::bench(args = BACKENDS)]
fn select_pair_cache_aware_short(bencher: Bencher<'_, '_>, backends: usize) {
    measure(bencher, backends, 0, CacheAware::new);
}

#[divan::bench(args = BACKENDS)]
fn select_pair_cache_aware(bencher: Bencher<'_, '_>, backends: usize) {
    measure(bencher, backends, BLOCKS, CacheAware::new);
}
