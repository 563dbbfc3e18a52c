//! Asks servers for what the configuration does not say: ports, role and data-parallel
//! ranks, from `/server_info`.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::StatusCode;
use serde_json::value::RawValue;

use super::probes::ProbeClient;
use crate::error::Error;
use crate::http1::ResponseHead;
use crate::upstream::{Backend, Description, Role};

/// Where a server describes itself: in current versions, and before SGLang 0.5.6.
const PATHS: [&str; 2] = ["/server_info", "/get_server_info"];
/// Most probes between two attempts at a server that does not describe itself: at the default interval of 1
/// s, one attempt in about 8 minutes.
const MAX_BACKOFF: u32 = 511;

/// Decides when a server is asked for its description: once, and again after it was down.
#[derive(Default)]
pub(super) struct DescriptionCache {
    is_known: bool,
    /// Successful probes between two attempts; doubled by each failed attempt.
    backoff: u32,
    /// Successful probes until the next attempt.
    remaining: u32,
}

impl DescriptionCache {
    /// Forgets the description after a failed probe: the server may come back with other options.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// To be called after a successful probe. Returns the server's description, if it is due and the server
    /// has one.
    pub(super) async fn refresh(
        &mut self,
        server: &Arc<Backend>,
        client: &ProbeClient,
        timeout: Duration,
    ) -> Option<Description> {
        if self.is_known {
            return None;
        }
        if self.remaining > 0 {
            self.remaining -= 1;
            return None;
        }
        let description = fetch(server, client, timeout).await;
        self.is_known = description.is_some();
        // 1, 3, 7, ... 511: a server that has no description costs little, and one that is slow to offer it
        // is asked again soon.
        self.backoff = (self.backoff * 2 + 1).min(MAX_BACKOFF);
        self.remaining = self.backoff;
        description
    }
}

async fn fetch(server: &Arc<Backend>, client: &ProbeClient, timeout: Duration) -> Option<Description> {
    let (_, head, body) = ask(server, client, timeout).await.ok()?;
    // Otherwise 401 without --worker-api-key, or 503 while the model loads.
    head.status.is_success().then(|| parse(&body)).flatten()
}

/// Asks a server for its description. Returns the endpoint that it was asked at last, and its answer there.
pub(super) async fn ask(
    server: &Arc<Backend>,
    client: &ProbeClient,
    timeout: Duration,
) -> Result<(&'static str, ResponseHead, Bytes), Error> {
    let [path, older] = PATHS;
    let (head, body) = client.get(server, path, timeout).await.result?;
    if head.status != StatusCode::NOT_FOUND {
        return Ok((path, head, body));
    }
    // The endpoint has another name in this version.
    let (head, body) = client.get(server, older, timeout).await.result?;
    Ok((older, head, body))
}

/// Parses a description. Fields that are missing or of another type are unknown, as versions differ. `None`:
/// the body is not a JSON object.
pub(super) fn parse(body: &[u8]) -> Option<Description> {
    let fields: HashMap<Cow<'_, str>, &RawValue> = serde_json::from_slice(body).ok()?;
    let number = |name| serde_json::from_str::<u64>(fields.get(name)?.get()).ok();
    // Compared as JSON text: any other value, such as "null" for a server without disaggregation, is no role.
    let role = match fields.get("disaggregation_mode").map(|mode| mode.get()) {
        Some(r#""prefill""#) => Some(Role::Prefill),
        Some(r#""decode""#) => Some(Role::Decode),
        _ => None,
    };
    let port = |name| number(name).and_then(|port| u16::try_from(port).ok()).filter(|port| *port > 0);
    let language_only = fields.get("language_only").and_then(|value| value.get().parse().ok());
    // Without its radix cache a server computes every prompt from the start.
    let keeps_nothing = fields.get("disable_radix_cache").is_some_and(|value| value.get() == "true");
    let cache_tokens = if keeps_nothing { Some(0) } else { number("max_total_num_tokens") };
    // Older versions do not say it, and prefill servers then follow the room in any case.
    let method = fields.get("load_balance_method").map(|method| method.get());
    let follows_bootstrap_room =
        method.map(|method| [r#""follow_bootstrap_room""#, r#""auto""#].contains(&method));
    Some(Description {
        cache_tokens,
        follows_bootstrap_room,
        role,
        bootstrap_port: port("disaggregation_bootstrap_port"),
        language_only,
        encoder_bootstrap_port: port("encoder_bootstrap_port"),
        dp_size: number("dp_size"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_and_invalid_fields_are_unknown() {
        let parsed = |text: &str| parse(text.as_bytes());
        let full = r#"{"disaggregation_mode":"prefill","disaggregation_bootstrap_port":8998,"dp_size":4,"x":[{}],"max_total_num_tokens":9,"load_balance_method":"follow_bootstrap_room","language_only":true,"encoder_bootstrap_port":8997}"#;
        let expected = Description {
            role: Some(Role::Prefill),
            bootstrap_port: Some(8998),
            language_only: Some(true),
            encoder_bootstrap_port: Some(8997),
            dp_size: Some(4),
            follows_bootstrap_room: Some(true),
            cache_tokens: Some(9),
        };
        assert_eq!(parsed(full), Some(expected));
        for invalid in [
            "{}",
            r#"{"disaggregation_mode":"null","disaggregation_bootstrap_port":null,"dp_size":"4"}"#,
            r#"{"disaggregation_mode":7,"disaggregation_bootstrap_port":65536,"dp_size":-1}"#,
            r#"{"disaggregation_bootstrap_port":0,"dp_size":1.5,"language_only":"true"}"#,
        ] {
            assert_eq!(parsed(invalid), Some(Description::default()), "{invalid}");
        }
        let method =
            |name| parsed(&format!(r#"{{"load_balance_method":"{name}"}}"#)).unwrap().follows_bootstrap_room;
        assert_eq!(
            ["round_robin", "total_tokens", "auto"].map(method),
            [Some(false), Some(false), Some(true)]
        );
        let without_cache = r#"{"disable_radix_cache":true,"max_total_num_tokens":9}"#;
        assert_eq!(parsed(without_cache).unwrap().cache_tokens, Some(0));
        for other in ["", "[]", "OK", "{\"a\":"] {
            assert_eq!(parsed(other), None, "{other}");
        }
    }
}
