//! Learns from servers what was not told of them: bootstrap port, role, ranks.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use hyper::Method;
use hyper::StatusCode;
use serde_json::value::RawValue;

use super::probes::ProbeClient;
use super::query::{ServerQuery, query};
use crate::upstream::{Backend, Description, Role};

/// Where a server describes itself, now and before SGLang 0.5.6.
const PATHS: [&str; 2] = ["/server_info", "/get_server_info"];
/// Most probes that go by before a server is asked again that did not describe itself.
const LONGEST_PAUSE: u32 = 63;

/// When one server is asked.
#[derive(Default)]
pub(super) struct DescriptionCache {
    is_done: bool,
    /// Probes that go by.
    pause: u32,
    left: u32,
}

impl DescriptionCache {
    /// A probe has failed: when the server is back it may be another.
    pub(super) fn forget(&mut self) {
        *self = Self::default();
    }

    /// A probe was answered well. Returns what the server says of itself, if it is time to ask.
    pub(super) async fn learn(
        &mut self,
        server: &Arc<Backend>,
        asker: &ProbeClient,
        timeout: Duration,
    ) -> Option<Description> {
        if self.is_done {
            return None;
        }
        if self.left > 0 {
            self.left -= 1;
            return None;
        }
        let said = describe(server, asker, timeout).await;
        self.is_done = said.is_some();
        self.pause = (self.pause * 2 + 1).min(LONGEST_PAUSE);
        self.left = self.pause;
        said
    }
}

async fn describe(server: &Arc<Backend>, asker: &ProbeClient, timeout: Duration) -> Option<Description> {
    for path in PATHS {
        let question = ServerQuery {
            method: Method::GET,
            target: path.into(),
            fields: asker.access.own_fields(),
            body: bytes::Bytes::new(),
            timeout,
        };
        let (head, body) = query(&asker.pools, Arc::clone(server), question).await.outcome.ok()?;
        match head.status {
            StatusCode::NOT_FOUND => continue,
            status if status.is_success() => return read(&body),
            _ => return None,
        }
    }
    None
}

/// RawHeaders that are missing or strange are not known. `None`: this is not a description.
fn read(body: &[u8]) -> Option<Description> {
    let fields: HashMap<Cow<'_, str>, &RawValue> = serde_json::from_slice(body).ok()?;
    let number = |name| serde_json::from_str::<u64>(fields.get(name)?.get()).ok();
    let role = match fields.get("disaggregation_mode").map(|mode| mode.get()) {
        Some(r#""prefill""#) => Some(Role::Prefill),
        Some(r#""decode""#) => Some(Role::Decode),
        _ => None,
    };
    let bootstrap_port = number("disaggregation_bootstrap_port").and_then(|port| u16::try_from(port).ok());
    Some(Description {
        role,
        bootstrap_port: bootstrap_port.filter(|port| *port > 0),
        dp_size: number("dp_size"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_or_strange_is_not_known() {
        let said = |text: &str| read(text.as_bytes());
        let full =
            r#"{"disaggregation_mode":"prefill","disaggregation_bootstrap_port":8998,"dp_size":4,"x":[{}]}"#;
        let expected =
            Description { role: Some(Role::Prefill), bootstrap_port: Some(8998), dp_size: Some(4) };
        assert_eq!(said(full), Some(expected));
        for strange in [
            "{}",
            r#"{"disaggregation_mode":"null","disaggregation_bootstrap_port":null,"dp_size":"4"}"#,
            r#"{"disaggregation_mode":7,"disaggregation_bootstrap_port":65536,"dp_size":-1}"#,
            r#"{"disaggregation_bootstrap_port":0,"dp_size":1.5}"#,
        ] {
            assert_eq!(said(strange), Some(Description::default()), "{strange}");
        }
        for other in ["", "[]", "OK", "{\"a\":"] {
            assert_eq!(said(other), None, "{other}");
        }
    }
}
