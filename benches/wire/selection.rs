//! The selection of a pair, all backends being healthy.

use divan::Bencher;
use mini_lb::{MiniLbConfig, MiniLoadBalancer, Policy, Random, RoundRobin};

/// Backends of each role: a small fleet and a very large one.
const BACKENDS: [usize; 2] = [4, 1_000];

fn measure<P: Policy>(bencher: Bencher<'_, '_>, backends: usize, policy: impl Fn() -> P) {
    let url = |role: &str, number| format!("http://{role}-{number}:30000");
    let prefill = (0..backends).map(|number| (url("prefill", number), Some(8998))).collect();
    let decode = (0..backends).map(|number| url("decode", number)).collect();
    let config = MiniLbConfig::new("127.0.0.1", 30_000, prefill, decode, 60).policy(policy);
    let router = MiniLoadBalancer::new(config).expect("a valid configuration");
    bencher.bench_local(|| router.select_pair());
}

#[divan::bench(args = BACKENDS)]
fn select_pair_random(bencher: Bencher<'_, '_>, backends: usize) {
    measure(bencher, backends, || Random);
}

#[divan::bench(args = BACKENDS)]
fn select_pair_round_robin(bencher: Bencher<'_, '_>, backends: usize) {
    measure(bencher, backends, RoundRobin::default);
}
