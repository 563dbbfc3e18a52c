//! The choice of a pair, all servers being well.

use divan::Bencher;
use mini_lb::{MiniLbConfig, MiniLoadBalancer, Policy, Random, RoundRobin};

/// Servers of each role.
const SERVERS: [usize; 2] = [4, 1_000];

fn measure<P: Policy>(bencher: Bencher<'_, '_>, servers: usize, policy: impl Fn() -> P) {
    let url = |role: &str, number| format!("http://{role}-{number}:30000");
    let prefill = (0..servers).map(|number| (url("prefill", number), Some(8998))).collect();
    let decode = (0..servers).map(|number| url("decode", number)).collect();
    let config = MiniLbConfig::new("127.0.0.1", 30_000, prefill, decode, 60).policy(policy);
    let router = MiniLoadBalancer::new(config).expect("a good configuration");
    bencher.bench_local(|| router.select_pair());
}

#[divan::bench(args = SERVERS)]
fn pick_pair_random(bencher: Bencher<'_, '_>, servers: usize) {
    measure(bencher, servers, || Random);
}

#[divan::bench(args = SERVERS)]
fn pick_pair_round_robin(bencher: Bencher<'_, '_>, servers: usize) {
    measure(bencher, servers, RoundRobin::default);
}
