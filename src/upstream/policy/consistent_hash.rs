//! The policy that keeps a conversation on its server without remembering anything.

use std::sync::Arc;

use super::least_load::least_loaded;
use super::{Choice, Needs, Policy, Selection, SelectionReason};
use crate::upstream::{Backend, Role};

/// How much more than the mean a server may have before a key goes on to its next server: 5/4 of it, as in
/// "Consistent Hashing with Bounded Loads" (Mirrokni et al., 2017).
const BOUND: (u64, u64) = (5, 4);

/// Selects a server by a key of the request: a header, the name of a conversation in the body, or else the
/// prompt's first 4 KiB. The same key goes to the same server, in every router with the same servers, unless
/// that has more than 5/4 of the mean load: then to the next one in an order that is the key's own.
///
/// The order is that of rendezvous hashing: a server that is added or removed moves its own keys only.
#[derive(Debug, Clone, Copy, Default)]
pub struct ConsistentHash;

impl Policy for ConsistentHash {
    fn pick<'a>(&self, choice: &Choice<'a>) -> &'a Arc<Backend> {
        self.choose(choice).server()
    }

    fn choose<'a>(&self, choice: &Choice<'a>) -> Selection<'a> {
        let key = choice.key().or_else(|| Some(choice.prompt()?.prefix()));
        let (index, reason) = match key {
            Some(key) => first_below_bound(choice, key),
            None => (least_loaded(choice), SelectionReason::Load),
        };
        choice.select(index).because(reason)
    }

    fn name(&self) -> &'static str {
        "consistent_hash"
    }

    fn needs(&self, _: Role) -> Needs {
        Needs { key: true, ..Needs::default() }
    }
}

/// The first server in the key's order that is not full.
fn first_below_bound(choice: &Choice<'_>, key: u64) -> (usize, SelectionReason) {
    // What is counted on each server, and what this request adds.
    match choice.role() {
        Role::Prefill => first_below(choice, key, choice.prompt_bytes().max(1), |index| choice.work(index)),
        Role::Decode | Role::Regular => first_below(choice, key, 1, |index| choice.requests(index) as u64),
    }
}

fn first_below(
    choice: &Choice<'_>,
    key: u64,
    own: u64,
    load: impl Fn(usize) -> u64,
) -> (usize, SelectionReason) {
    let count = choice.servers().len();
    let sum: u64 = (0..count).map(&load).sum();
    // With this request, so that an idle fleet has room on every server.
    let most = (sum + own).saturating_mul(BOUND.0) / (count as u64 * BOUND.1);
    let (mut best, mut first, mut best_full) = (None, 0, None);
    for index in 0..count {
        let weight = weight(key, choice.url_hash(index));
        // A load is looked at only where it can decide: of a thousand servers at about seven.
        if best.is_some_and(|best| weight <= best) {
            continue;
        }
        if load(index) <= most {
            (best, first) = (Some(weight), index);
        } else {
            best_full = best_full.max(Some(weight));
        }
    }
    let reason = if best_full > best { SelectionReason::KeyOverflow } else { SelectionReason::Key };
    // A server at the mean or below it exists at every moment. If the loads have changed since the sum so
    // that none was seen, it is the first one.
    (first, reason)
}

/// A server's rank for a key: each pair of them has its own.
pub(super) fn weight(key: u64, server: u64) -> u64 {
    let product = u128::from(key ^ 0x9e37_79b9_7f4a_7c15) * u128::from(server | 1);
    // One half alone would rank by the high or the low bits of both.
    product as u64 ^ (product >> 64) as u64
}
