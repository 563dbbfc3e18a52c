//! By which ids servers know the copies of a request.
//!
//! Two copies may run on one server, which refuses a second request with the same id. A regular server
//! ignores the client's id if it is asked for several samples. Here a copy's id begins with it, by which
//! `/abort_request` with the client's own finds all copies.

use super::super::abort::new_rid;
use super::super::request::ReadRequest;
use crate::upstream::OWN_RID;

/// The ids of the copies: `None` for each if neither the client nor the router needs one.
pub(super) fn rids_of_copies(request: &ReadRequest) -> Vec<Option<String>> {
    let has_rid = request.shape.has_rid;
    let needs_rid = has_rid || request.limits.abort_on_disconnect;
    // Of a list, each is the id of one prompt of the batch; servers take one for all of them, too.
    let client = match &request.own().rids[..] {
        [one] if has_rid => Some(&one[..]),
        _ => None,
    };
    let rid = || needs_rid.then(|| rid_of_copy(client, &own_rid()));
    (0..request.samples()).map(|_| rid()).collect()
}

/// Without a number, which could be the beginning of another one's, and then abort that, too.
fn rid_of_copy(client: Option<&str>, own: &str) -> String {
    client.map_or_else(|| own.to_owned(), |client| format!("{client}-{own}"))
}

fn own_rid() -> String {
    // The client's cannot stay, also where the kernel has no random numbers.
    new_rid().unwrap_or_else(|| format!("{OWN_RID}{:032x}", fastrand::u128(..)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_copies_begin_with_the_clients_and_none_is_the_prefix_of_another() {
        let rids: Vec<_> = (0..20).map(|_| rid_of_copy(Some("r"), &own_rid())).collect();
        for (at, rid) in rids.iter().enumerate() {
            assert!(rid.starts_with("r-minilb-"), "{rid}");
            assert!(
                rids.iter().enumerate().all(|(other, longer)| other == at || !longer.starts_with(&**rid))
            );
        }
    }
}
