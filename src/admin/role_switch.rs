//! `/pd_role_switch`: a server changes its role while the others continue, in the protocol
//! of Python's mini_lb.
//!
//! SGLang (0.5.21 and later, with `--enable-pd-role-switch`) switches only when it is idle,
//! answers "not idle" before that, and says in `safe_to_restore` whether it can continue in
//! its old role after a failure.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::{Method, StatusCode};
use serde_json::{Map, Value, json};
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use super::admin_request::{AdminRequest, invalid};
use super::query::{ServerQuery, query};
use super::workers::{WorkersApi, wait_until_drained};
use crate::error::{Error, OwnResponse, json_response};
use crate::http1::{OutgoingBody, RawHeaders};
use crate::upstream::{Backend, Role};

/// Default `drain_timeout_secs`, as in mini_lb.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(300);
/// Longest `drain_timeout_secs`.
const MAX_DRAIN_TIMEOUT: u64 = 3_600;
/// Time between two attempts while the server is not idle, as in mini_lb.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// Fields that are forwarded to the server besides `new_role`.
const FORWARDED_FIELDS: [&str; 2] = ["decode_cuda_graph_bs", "decode_cuda_graph_memory_gb"];

/// A role switch as an operator requests it.
struct SwitchRequest {
    server: Arc<Backend>,
    role: Role,
    bootstrap_host: Option<String>,
    bootstrap_port: Option<u16>,
    /// Whether the server is out of rotation until it has switched.
    drain: bool,
    drain_timeout: Duration,
    /// What is sent to the server.
    body: Bytes,
    headers: RawHeaders,
}

/// The server's response to a role switch.
struct SwitchReply {
    status: StatusCode,
    body: Bytes,
    fields: Map<String, Value>,
}

impl SwitchReply {
    fn is_true(&self, name: &str) -> bool {
        self.fields.get(name).and_then(Value::as_bool) == Some(true)
    }

    fn is_success(&self) -> bool {
        self.status == StatusCode::OK && self.is_true("success")
    }

    /// SGLang has no error code for it, only the message.
    fn is_not_idle(&self) -> bool {
        let message = self.fields.get("message").and_then(Value::as_str);
        message.is_some_and(|message| message.to_ascii_lowercase().contains("not idle"))
    }

    fn into_response(self) -> OwnResponse {
        // A failure that the server reports with 200 must not look like a success.
        let is_disguised = self.status.is_success() && !self.is_success();
        json_response(if is_disguised { StatusCode::BAD_GATEWAY } else { self.status }, self.body)
    }
}

impl WorkersApi {
    pub(super) async fn switch_role(
        self: &Arc<Self>,
        headers: RawHeaders,
        body: &[u8],
    ) -> Result<OwnResponse, Error> {
        let request = self.parse_switch(headers, body)?;
        // A success, so that a script can be run again.
        if request.server.role() == request.role {
            let role = request.role.as_str();
            let message = "already in target role";
            let body = json!({ "success": true, "message": message, "old_role": role, "new_role": role });
            return Ok(json_response(StatusCode::OK, body.to_string()));
        }
        let workers = Arc::clone(self);
        #[cfg_attr(
            not(test),
            expect(
                clippy::disallowed_methods,
                reason = "a client that disconnects must not leave the server between two roles"
            )
        )]
        let switched = tokio::spawn(async move { workers.switch(request).await });
        switched.await.unwrap_or(Err(Error::Internal))
    }

    fn parse_switch(&self, headers: RawHeaders, body: &[u8]) -> Result<SwitchRequest, Error> {
        if self.fleet().now().is_regular() {
            return Err(invalid("plain servers (--worker-urls) have no role to switch"));
        }
        let request = AdminRequest::parse(body)?;
        let role = request.role("new_role")?;
        let mut forwarded = json!({ "new_role": role.as_str() });
        for name in FORWARDED_FIELDS {
            // `null` is dropped: SGLang reads a missing field as its default.
            if let Some(value) = request.get(name) {
                forwarded[name] = value.clone();
            }
        }
        Ok(SwitchRequest {
            server: self.find_at(&request.address("worker_url")?)?,
            role,
            bootstrap_host: request.bootstrap_host()?,
            bootstrap_port: request.bootstrap_port()?,
            drain: request.bool_or("drain", true)?,
            drain_timeout: request.seconds_or("drain_timeout_secs", MAX_DRAIN_TIMEOUT, DRAIN_TIMEOUT)?,
            body: forwarded.to_string().into(),
            headers,
        })
    }

    async fn switch(&self, request: SwitchRequest) -> Result<OwnResponse, Error> {
        let (old, new, url) = (request.server.role(), request.role, request.server.url());
        let switch = self.desired.begin_switch(&request.server).map_err(Error::NotChanged)?;
        if request.drain {
            info!("{old} server {url} is taken out of rotation to become a {new} server");
            switch.take_out();
        }
        let reply = self.send_until_switched(&request).await;
        if reply.as_ref().is_ok_and(SwitchReply::is_success) {
            switch.complete(new, request.bootstrap_host, request.bootstrap_port);
            info!("{url} is a {new} server now");
            return reply.map(SwitchReply::into_response);
        }
        // Without a reply the server's role is unknown.
        let is_unchanged = reply.as_ref().is_ok_and(|reply| reply.is_true("safe_to_restore"));
        if !request.drain || is_unchanged {
            warn!("{old} server {url} has not switched its role: it stays a {old} server");
            switch.restore();
        } else {
            warn!(
                "role switch of {url} failed and its role is unknown: it stays out of rotation; check it, then add it with POST /workers"
            );
        }
        reply.map(SwitchReply::into_response)
    }

    /// Asks the server to switch until it has, refuses for another reason than "not idle", or the drain
    /// timeout is over.
    async fn send_until_switched(&self, request: &SwitchRequest) -> Result<SwitchReply, Error> {
        let deadline = Instant::now() + request.drain_timeout;
        loop {
            if request.drain {
                // A request on its way would arrive at the server in its new role.
                wait_until_drained(&request.server, deadline).await;
            }
            let reply = self.send_switch(request).await?;
            let is_final = reply.is_success() || !request.drain || !reply.is_not_idle();
            if is_final || Instant::now() >= deadline {
                return Ok(reply);
            }
            sleep(RETRY_INTERVAL.min(deadline.saturating_duration_since(Instant::now()))).await;
        }
    }

    async fn send_switch(&self, request: &SwitchRequest) -> Result<SwitchReply, Error> {
        let switch = ServerQuery {
            method: Method::POST,
            target: "/pd_role_switch".into(),
            headers: request.headers.clone(),
            body: OutgoingBody::new(vec![request.body.clone()]),
            timeout: self.switch_timeout,
        };
        let (head, body) = query(&self.pools, Arc::clone(&request.server), switch).await.result?;
        // Older servers answer 404 with a body that is not JSON, which is forwarded as it is.
        let fields = match serde_json::from_slice(&body) {
            Ok(Value::Object(fields)) => fields,
            _ => Map::new(),
        };
        Ok(SwitchReply { status: head.status, body, fields })
    }
}
