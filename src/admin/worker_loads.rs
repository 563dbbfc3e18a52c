//! The response of `/get_loads`, as `sglang_router` has it: one number of tokens for each server. What
//! servers say in full is in [`loads`](super::loads).

use hyper::StatusCode;
use serde_json::{Value, json};

use super::query::QueryResponse;
use crate::error::{OwnResponse, json_response};

/// The load of a server that did not tell it, as in `sglang_router`.
const UNKNOWN: i64 = -1;

/// The load of each server, in the order of the configuration. Always 200: a server that fails has -1.
pub(super) fn summed(responses: &[QueryResponse]) -> OwnResponse {
    let workers: Vec<_> = responses
        .iter()
        .map(|response| {
            let told = response.result.as_ref().ok().filter(|(head, _)| head.status.is_success());
            let load = told.and_then(|(_, body)| total(body)).unwrap_or(UNKNOWN);
            json!({ "worker": response.server.url(), "load": load })
        })
        .collect();
    json_response(StatusCode::OK, json!({ "workers": workers }).to_string())
}

/// The tokens of all ranks, of requests that run and of those that wait.
fn total(body: &[u8]) -> Option<i64> {
    let told: Value = serde_json::from_slice(body).ok()?;
    let ranks = told.get("loads")?.as_array()?;
    ranks.iter().try_fold(0_i64, |sum, rank| sum.checked_add(rank.get("num_total_tokens")?.as_i64()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_summed_over_ranks_or_unknown() {
        assert_eq!(total(br#"{"loads":[{"num_total_tokens":3,"a":1},{"num_total_tokens":4}]}"#), Some(7));
        for body in
            ["", "[]", r#"{"loads":[{}]}"#, r#"{"loads":[{"num_total_tokens":"3"}]}"#, r#"{"loads":7}"#]
        {
            assert_eq!(total(body.as_bytes()), None, "{body}");
        }
        let most =
            format!(r#"{{"loads":[{{"num_total_tokens":{0}}},{{"num_total_tokens":{0}}}]}}"#, i64::MAX);
        assert_eq!(total(most.as_bytes()), None);
    }
}
