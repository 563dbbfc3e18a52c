//! `/pd_role_switch`: a server changes its role while the others go on, in the flow
//! of Python's mini_lb.
//!
//! SGLang (0.5.21 and later, with `--enable-pd-role-switch`) switches only when it
//! is idle, refuses with "not idle" before that, and says whether it may go on in
//! its old role.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::{Method, StatusCode};
use serde_json::{Map, Value, json};
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use super::query::{ServerQuery, query};
use super::workers::{WorkersApi, address, bad, bootstrap_host, drained, object, port, role};
use crate::error::{Error, OwnResponse, json_response};
use crate::http1::RawHeaders;
use crate::upstream::{Backend, Role};

/// How long open requests may take by default, as in mini_lb.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(300);
/// Longest `drain_timeout_secs`.
const MAX_DRAIN_TIMEOUT: u64 = 3_600;
/// From one question to the next while the server is not idle, as in mini_lb.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// What is passed on to the server besides its new role.
const PASSED_ON: [&str; 2] = ["decode_cuda_graph_bs", "decode_cuda_graph_memory_gb"];

/// What an operator wants.
struct SwitchRequest {
    server: Arc<Backend>,
    role: Role,
    bootstrap_host: Option<String>,
    bootstrap_port: Option<u16>,
    /// Whether the server gets no requests until it has switched.
    drain: bool,
    drain_timeout: Duration,
    /// For the server.
    body: Bytes,
    fields: RawHeaders,
}

/// What the server said.
struct SwitchReply {
    status: StatusCode,
    body: Bytes,
    fields: Map<String, Value>,
}

impl SwitchReply {
    fn says(&self, name: &str) -> bool {
        self.fields.get(name).and_then(Value::as_bool) == Some(true)
    }

    fn is_success(&self) -> bool {
        self.status == StatusCode::OK && self.says("success")
    }

    fn is_not_idle(&self) -> bool {
        let message = self.fields.get("message").and_then(Value::as_str);
        message.is_some_and(|message| message.to_ascii_lowercase().contains("not idle"))
    }
}

impl WorkersApi {
    pub(super) async fn switch_role(
        self: &Arc<Self>,
        fields: RawHeaders,
        body: &[u8],
    ) -> Result<OwnResponse, Error> {
        let order = self.order(fields, body)?;
        if order.server.role() == order.role {
            let role = order.role.as_str();
            let message = "already in target role";
            let body = json!({ "success": true, "message": message, "old_role": role, "new_role": role });
            return Ok(json_response(StatusCode::OK, body.to_string()));
        }
        // In a task of its own, as a client that leaves must not leave the server between two roles.
        let workers = Arc::clone(self);
        let switched = tokio::spawn(async move { workers.switch(order).await });
        switched.await.unwrap_or(Err(Error::Internal))
    }

    fn order(&self, given: RawHeaders, body: &[u8]) -> Result<SwitchRequest, Error> {
        let fields = object(body)?;
        let new_role = role(&fields, "new_role")?;
        let flag = |value: &Value| value.as_bool().ok_or_else(|| bad("drain must be true or false"));
        let seconds = |value: &Value| {
            let seconds = value.as_u64().filter(|seconds| *seconds <= MAX_DRAIN_TIMEOUT);
            let wrong = || bad(format!("drain_timeout_secs must be between 0 and {MAX_DRAIN_TIMEOUT}"));
            seconds.map(Duration::from_secs).ok_or_else(wrong)
        };
        let mut passed_on = json!({ "new_role": new_role.as_str() });
        for name in PASSED_ON {
            if let Some(value) = fields.get(name).filter(|value| !value.is_null()) {
                passed_on[name] = value.clone();
            }
        }
        Ok(SwitchRequest {
            server: self.find_at(&address(&fields, "worker_url")?)?,
            role: new_role,
            bootstrap_host: bootstrap_host(&fields)?,
            bootstrap_port: port(&fields)?,
            drain: fields.get("drain").map(flag).transpose()?.unwrap_or(true),
            drain_timeout: fields.get("drain_timeout_secs").map_or(Ok(DRAIN_TIMEOUT), seconds)?,
            body: passed_on.to_string().into(),
            fields: given,
        })
    }

    async fn switch(&self, order: SwitchRequest) -> Result<OwnResponse, Error> {
        let (old, new, url) = (order.server.role(), order.role, order.server.url());
        let switch = self.members.begin_switch(&order.server).map_err(Error::NotChanged)?;
        if order.drain {
            info!("{old} server {url} gets no more requests: its role is to be {new}");
            switch.take_out();
        }
        match self.ask_to_switch(&order).await {
            Ok(word) if word.is_success() => {
                switch.become_as(new, order.bootstrap_host, order.bootstrap_port);
                info!("{url} is a {new} server now");
                Ok(json_response(StatusCode::OK, word.body))
            }
            result => {
                // Without the server's word nobody knows what it is now.
                let is_as_before = result.as_ref().is_ok_and(|word| word.says("safe_to_restore"));
                if !order.drain || is_as_before {
                    warn!("{old} server {url} has not switched its role and stays what it is");
                    switch.put_back();
                } else {
                    warn!("{url} may have no role now and gets no requests; POST /workers puts it back");
                }
                let word = result?;
                let status = if word.status.is_success() { StatusCode::BAD_GATEWAY } else { word.status };
                Ok(json_response(status, word.body))
            }
        }
    }

    /// Asks until the server has switched, refuses for good, or is not idle in time.
    async fn ask_to_switch(&self, order: &SwitchRequest) -> Result<SwitchReply, Error> {
        let end = Instant::now() + order.drain_timeout;
        loop {
            if order.drain {
                // A request that is on its way would reach the server in its new role.
                drained(&order.server, end).await;
            }
            let word = self.query_once(order).await?;
            if word.is_success() || !order.drain || !word.is_not_idle() || Instant::now() >= end {
                return Ok(word);
            }
            sleep(RETRY_INTERVAL.min(end.saturating_duration_since(Instant::now()))).await;
        }
    }

    async fn query_once(&self, order: &SwitchRequest) -> Result<SwitchReply, Error> {
        let question = ServerQuery {
            method: Method::POST,
            target: "/pd_role_switch".into(),
            fields: order.fields.clone(),
            body: order.body.clone(),
            timeout: self.switch_timeout,
        };
        let (head, body) = query(&self.pools, Arc::clone(&order.server), question).await.outcome?;
        let fields = match serde_json::from_slice(&body) {
            Ok(Value::Object(fields)) => fields,
            _ => Map::new(),
        };
        Ok(SwitchReply { status: head.status, body, fields })
    }
}
