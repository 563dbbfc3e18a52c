//! Asks prefill and plain servers how many tokens wait on them (`--load-poll-secs`), of which this router may
//! not know: those of other routers, and of clients that have none.
//!
//! One task with the server's probes, and a new connection for each poll. What follows for the choice of a
//! server is for `upstream`, and whether the server is healthy for [`probes`](super::probes): a poll that
//! fails is no health signal.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use hyper::StatusCode;
use serde_json::value::RawValue;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::warn;

use super::probes::ProbeClient;
use crate::upstream::{Backend, HealthOptions, Role};

/// Not `/get_load`, which SGLang has no more since 0.5.21, and which counted tokens in the cache, too.
const PATH: &str = "/v1/loads";
/// For how many intervals what a server has told counts. An older number is none.
const LIFETIME: u32 = 3;
/// Most polls between two attempts at a server that has no such route: at an interval of 1 s, one attempt in
/// about 8 minutes.
const MAX_BACKOFF: u32 = 511;

/// Whether a server is polled.
pub(super) fn is_polled(server: &Backend, options: &HealthOptions) -> bool {
    server.role() != Role::Decode && !options.load_poll_interval.is_zero()
}

/// Polls a server for as long as it is polled itself. When this is dropped, nothing is known of others' work.
pub(super) async fn poll_load(server: &Arc<Backend>, client: &ProbeClient, options: &HealthOptions) {
    if !is_polled(server, options) {
        return;
    }
    let mut poll = LoadPoll {
        server,
        client,
        timeout: options.timeout,
        lifetime: options.load_poll_interval.saturating_mul(LIFETIME),
        told_at: None,
        backoff: 0,
        skipped: 0,
        has_logged: false,
    };
    let mut ticks = interval(options.load_poll_interval);
    // A server that answers late is not asked twice at once.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        poll.tick().await;
    }
}

struct LoadPoll<'a> {
    server: &'a Arc<Backend>,
    client: &'a ProbeClient,
    timeout: Duration,
    lifetime: Duration,
    /// When the server has told the number that counts now.
    told_at: Option<Instant>,
    /// Polls between two attempts at a server without the route; doubled by each 404.
    backoff: u32,
    /// Polls until the next attempt.
    skipped: u32,
    /// That it tells nothing, once.
    has_logged: bool,
}

impl LoadPoll<'_> {
    async fn tick(&mut self) {
        self.forget_old();
        if !self.server.is_healthy() {
            // It gets no requests, and may come back in another version.
            (self.backoff, self.skipped) = (0, 0);
            return;
        }
        if self.skipped > 0 {
            self.skipped -= 1;
            return;
        }
        // The larger one of before and after: what ends while the server answers is not others' work.
        let before = self.server.work();
        match self.ask().await {
            Ok(tokens) => {
                self.server.record_waiting_tokens(tokens, before.max(self.server.work()));
                (self.told_at, self.backoff) = (Some(Instant::now()), 0);
            }
            Err(reason) => {
                self.forget_old();
                self.log(&reason);
            }
        }
    }

    /// The tokens that wait, or why they are not known.
    async fn ask(&mut self) -> Result<u64, String> {
        // Until what is known is too old, so that it is never used for longer.
        let left = self.told_at.map_or(self.lifetime, |told| self.lifetime.saturating_sub(told.elapsed()));
        let response = self.client.get(self.server, PATH, left.min(self.timeout)).await;
        let (head, body) = response.result.map_err(|error| error.to_string())?;
        match head.status {
            StatusCode::NOT_FOUND => {
                // 1, 3, 7, ... 511, as for descriptions.
                self.backoff = (self.backoff * 2 + 1).min(MAX_BACKOFF);
                self.skipped = self.backoff;
                Err("it has no such route (404)".to_owned())
            }
            status if status.is_success() => {
                waiting_tokens(&body).ok_or_else(|| "it does not say num_waiting_uncached_tokens".to_owned())
            }
            status => Err(format!("it returned {}", status.as_u16())),
        }
    }

    fn forget_old(&mut self) {
        if self.told_at.is_some_and(|told| told.elapsed() >= self.lifetime) {
            self.told_at = None;
            self.server.forget_foreign_work();
        }
    }

    /// Once for a server: it may not tell its load for as long as it lives.
    fn log(&mut self, reason: &str) {
        if !std::mem::replace(&mut self.has_logged, true) {
            let url = self.server.url();
            warn!(
                "prefill server {url} does not tell its load with GET {PATH}: {reason}; others' work counts as none"
            );
        }
    }
}

/// The task is aborted when the server is removed, and when the options change.
impl Drop for LoadPoll<'_> {
    fn drop(&mut self) {
        self.server.forget_foreign_work();
    }
}

/// The tokens of prompts that wait and are not in the cache, of all ranks. `None` if one does not say it.
fn waiting_tokens(body: &[u8]) -> Option<u64> {
    type Fields<'a> = HashMap<Cow<'a, str>, &'a RawValue>;
    let fields: Fields<'_> = serde_json::from_slice(body).ok()?;
    let ranks: Vec<Fields<'_>> = serde_json::from_str(fields.get("loads")?.get()).ok()?;
    if ranks.is_empty() {
        return None;
    }
    ranks.iter().try_fold(0_u64, |sum, rank| {
        let tokens: u64 = serde_json::from_str(rank.get("num_waiting_uncached_tokens")?.get()).ok()?;
        Some(sum.saturating_add(tokens))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_tokens_are_summed_over_all_ranks() {
        let one = r#"{"loads":[{"dp_rank":0,"num_waiting_uncached_tokens":7,"x":null}],"version":"0.5.23"}"#;
        assert_eq!(waiting_tokens(one.as_bytes()), Some(7));
        let two = r#"{"loads":[{"num_waiting_uncached_tokens":7},{"num_waiting_uncached_tokens":5}]}"#;
        assert_eq!(waiting_tokens(two.as_bytes()), Some(12));
        let most = r#"{"loads":[{"num_waiting_uncached_tokens":18446744073709551615},{"num_waiting_uncached_tokens":5}]}"#;
        assert_eq!(waiting_tokens(most.as_bytes()), Some(u64::MAX));
    }

    #[test]
    fn a_body_that_does_not_say_it_of_each_rank_says_nothing() {
        for body in [
            "",
            "[]",
            "{}",
            r#"{"loads":[]}"#,
            r#"{"loads":{}}"#,
            r#"{"loads":[{"num_waiting_reqs":7}]}"#,
            r#"{"loads":[{"num_waiting_uncached_tokens":7},{}]}"#,
            r#"{"loads":[{"num_waiting_uncached_tokens":-1}]}"#,
            r#"{"loads":[{"num_waiting_uncached_tokens":1.5}]}"#,
            r#"{"loads":[{"num_waiting_uncached_tokens":"7"}]}"#,
            r#"{"loads":[{"num_waiting_uncached_tokens":7}"#,
        ] {
            assert_eq!(waiting_tokens(body.as_bytes()), None, "{body}");
        }
    }
}
