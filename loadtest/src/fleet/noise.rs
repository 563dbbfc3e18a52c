//! Random numbers that depend on the seed and the request only, so that all policies meet the same ones.

use fastrand::Rng;

/// The standard normal distribution (Box and Muller).
pub(super) fn normal(rng: &mut Rng) -> f64 {
    (-2.0 * (1.0 - rng.f64()).ln()).sqrt() * (std::f64::consts::TAU * rng.f64()).cos()
}

/// A factor around 1 with `sigma`, of the request or the text with this number. `what` tells apart factors of
/// different kinds.
pub(super) fn factor(seed: u64, what: u64, number: u64, sigma: f64) -> f64 {
    let mixed = (seed ^ what.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number;
    (sigma * normal(&mut Rng::with_seed(mixed))).exp()
}
