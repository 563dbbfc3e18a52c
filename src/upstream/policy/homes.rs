//! Where the next turn of a conversation may be looked for by any router: two servers by the hash of its
//! beginning.
//!
//! Routers that share nothing know what they have sent themselves only. If they all choose among the same two
//! servers for a beginning, they fill the same two caches. Which of the two is chosen is for
//! [`cache_aware`](super::cache_aware).

use super::Choice;
use super::consistent_hash::weight;

/// How many servers a beginning has. With one, its load could not be shared.
pub(super) const HOMES: usize = 2;

/// The servers with the highest rank for a key, in the order of rendezvous hashing: the same in every router
/// with the same servers. Twice the same one if there is only one.
pub(super) fn homes_of(choice: &Choice<'_>, key: u64) -> [usize; HOMES] {
    let (mut first, mut second) = ((0, 0), None);
    for index in 0..choice.servers().len() {
        let ranked = (weight(key, choice.url_hash(index)), index);
        if index == 0 || ranked > first {
            second = (index > 0).then_some(first);
            first = ranked;
        } else {
            second = second.max(Some(ranked));
        }
    }
    [first.1, second.unwrap_or(first).1]
}
