//! Policies that look at load alone: the least of all servers, or of two.

use std::sync::Arc;

use super::{Choice, Policy, Selection, SelectionReason};
use crate::upstream::{Backend, Role};

/// What a server of a role has to do, to be compared. A prefill server computes one prompt after the other,
/// so the bytes before a request are its wait. A decode or a plain server runs all its requests at once, and
/// each slows the others down.
pub(super) fn load_of(choice: &Choice<'_>, index: usize) -> (usize, u64) {
    match choice.role() {
        Role::Prefill => (0, choice.weighted_work(index, choice.prompt_bytes())),
        Role::Decode | Role::Regular => (choice.requests(index), choice.work(index)),
    }
}

/// Selects the server with the least load: of prefill servers, the one with the fewest bytes of prompt to
/// compute; of decode and of plain servers, the one with the fewest requests, then the fewest bytes.
#[derive(Debug, Clone, Copy, Default)]
pub struct LeastLoad;

impl Policy for LeastLoad {
    fn pick<'a>(&self, choice: &Choice<'a>) -> &'a Arc<Backend> {
        &choice.servers()[least_loaded(choice)]
    }

    fn choose<'a>(&self, choice: &Choice<'a>) -> Selection<'a> {
        choice.select(least_loaded(choice)).because(SelectionReason::Load)
    }

    fn name(&self) -> &'static str {
        "least_load"
    }
}

/// The index of the server with the least load.
pub(super) fn least_loaded(choice: &Choice<'_>) -> usize {
    // Apart, so that each loop compares single numbers.
    match choice.role() {
        Role::Prefill => choice.first_through(choice.prompt_bytes()),
        Role::Decode | Role::Regular => choice.least_by(|_, load| load.by_requests()),
    }
}

/// The index of the server with less load of two random ones.
fn less_loaded_of_two(choice: &Choice<'_>) -> usize {
    let count = choice.servers().len();
    let first = fastrand::usize(..count);
    if count == 1 {
        return first;
    }
    // Another one: each of the others is as likely.
    let second = (first + fastrand::usize(1..count)) % count;
    let is_less = load_of(choice, second) < load_of(choice, first);
    if is_less { second } else { first }
}

/// Selects the server with less load of two random ones, as [`LeastLoad`] measures it.
#[derive(Debug, Clone, Copy, Default)]
pub struct PowerOfTwo;

impl Policy for PowerOfTwo {
    fn pick<'a>(&self, choice: &Choice<'a>) -> &'a Arc<Backend> {
        self.choose(choice).server()
    }

    fn choose<'a>(&self, choice: &Choice<'a>) -> Selection<'a> {
        choice.select(less_loaded_of_two(choice)).because(SelectionReason::Load)
    }

    fn name(&self) -> &'static str {
        "power_of_two"
    }
}
