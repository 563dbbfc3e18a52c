//! The router's endpoints besides generation.
//!
//! Each asks one server, or all of them, and composes one answer. A server that
//! fails is named in it, never left out.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::{Method, Response, StatusCode};
use serde_json::json;
use serde_json::value::RawValue;
use tracing::warn;

use super::query::{ProbeResponse, ServerQuery, query, query_all};
use crate::error::{Error, OwnResponse, json_response};
use crate::http1::RequestHead;
use crate::observe::report::log_limit;
use crate::upstream::{Backend, LiveFleet, Pools, Role};
use crate::wire::client_response::ClientResponseHead;

/// How long a server may take to describe itself.
const INFO_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a server may take to prove its health. SGLang runs a token for it, and gives up after 20 s itself.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(30);

/// What the router answers itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RouterEndpoint {
    /// The router runs.
    Health,
    /// It can answer generation requests, and means to go on.
    Ready,
    /// All servers can generate.
    HealthGenerate,
    /// Empties every server's cache.
    FlushCache,
    /// What all servers say of themselves.
    ServerInfo,
    /// What one server says: all of them serve the same model.
    FromOne,
}

/// Whether the router has been told to end. Seen by all who hold a clone.
#[derive(Clone, Default)]
pub(crate) struct Draining(Arc<AtomicBool>);

impl Draining {
    pub(crate) fn begin(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub(crate) fn has_begun(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Answers for all endpoints but generation.
pub(crate) struct RouterEndpoints {
    fleet: Arc<LiveFleet>,
    pools: Arc<Pools>,
    draining: Draining,
}

impl RouterEndpoints {
    pub(crate) fn new(fleet: Arc<LiveFleet>, pools: Arc<Pools>, draining: Draining) -> Self {
        Self { fleet, pools, draining }
    }

    /// `flush_timeout` is how long one server may take to flush: it may wait for its requests to end.
    pub(crate) async fn handle(
        &self,
        endpoint: RouterEndpoint,
        head: RequestHead,
        flush_timeout: Duration,
    ) -> Result<OwnResponse, Error> {
        match endpoint {
            RouterEndpoint::Health => Ok(Response::default()),
            RouterEndpoint::Ready => self.ready(),
            RouterEndpoint::HealthGenerate => Ok(self.health_generate(head).await),
            RouterEndpoint::FlushCache => Ok(self.flush_cache(head, flush_timeout).await),
            RouterEndpoint::ServerInfo => Ok(self.server_info(head).await),
            RouterEndpoint::FromOne => self.pass_on(head).await,
        }
    }

    fn ready(&self) -> Result<OwnResponse, Error> {
        let is_missing = |servers: &[Arc<Backend>]| !servers.iter().any(|server| server.is_ready());
        let fleet = self.fleet.now();
        let why = if self.draining.has_begun() {
            "the router is shutting down"
        } else if is_missing(fleet.prefill()) {
            "no prefill server is known to be healthy"
        } else if is_missing(fleet.decode()) {
            "no decode server is known to be healthy"
        } else {
            return Ok(Response::default());
        };
        Err(Error::NotReady(why))
    }

    async fn health_generate(&self, head: RequestHead) -> OwnResponse {
        let question = question(head, HEALTH_TIMEOUT);
        let answers = query_all(&self.pools, self.fleet.snapshot().all(), &question).await;
        let unwell = failures(&answers);
        if unwell.is_empty() {
            return Response::default();
        }
        failure_reply(StatusCode::SERVICE_UNAVAILABLE, "unhealthy", "not all servers are well", &unwell)
    }

    async fn flush_cache(&self, head: RequestHead, timeout: Duration) -> OwnResponse {
        let question = question(head, timeout);
        let answers = query_all(&self.pools, self.fleet.snapshot().all(), &question).await;
        let failed = failures(&answers);
        if failed.is_empty() {
            let servers: Vec<&str> = answers.iter().map(|answer| answer.server.url()).collect();
            let body = json!({ "message": "The cache of every server was flushed.", "servers": servers });
            return json_response(StatusCode::OK, body.to_string());
        }
        // A server's own refusal (400 while it is busy) says more than 502; with several, the worst counts.
        let status = failed.iter().filter_map(|failure| failure.status).max();
        let all_answered = failed.iter().all(|failure| failure.status.is_some());
        let status = status.filter(|_| all_answered).unwrap_or(StatusCode::BAD_GATEWAY);
        failure_reply(status, "flush_cache_failed", "not every server flushed its cache", &failed)
    }

    /// The shape of Python's mini_lb, which SGLang's own benchmark tools read.
    async fn server_info(&self, head: RequestHead) -> OwnResponse {
        let question = question(head, INFO_TIMEOUT);
        let fleet = self.fleet.snapshot();
        let answers = query_all(&self.pools, fleet.all(), &question).await;
        let (prefill, decode) = answers.split_at(fleet.prefill().len());
        let body = format!(
            r#"{{"internal_states":{},"prefill":{},"decode":{}}}"#,
            list(decode.iter().flat_map(internal_states)),
            list(prefill.iter().map(info)),
            list(decode.iter().map(info)),
        );
        let none = answers.iter().all(|answer| description(answer).is_none());
        json_response(if none { StatusCode::BAD_GATEWAY } else { StatusCode::OK }, body)
    }

    /// Passes the question on to the first prefill server that can be reached, and its answer back.
    async fn pass_on(&self, head: RequestHead) -> Result<OwnResponse, Error> {
        let question = question(head, INFO_TIMEOUT);
        let mut first_error = None;
        for server in self.fleet.snapshot().prefill() {
            match query(&self.pools, Arc::clone(server), question.clone()).await.outcome {
                Ok((head, body)) => {
                    let head = ClientResponseHead::from(head).into_parts();
                    return Ok(Response::from_parts(head, Full::new(body.into())));
                }
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        Err(first_error.unwrap_or(Error::NoServer(Role::Prefill)))
    }
}

/// The client's question, as it goes to a server: same method, path, query and headers; no body.
fn question(head: RequestHead, timeout: Duration) -> ServerQuery {
    let target = head.target.to_string().into();
    ServerQuery { method: head.method, target, fields: head.fields, body: Bytes::new(), timeout }
}

/// A server that did not answer with success.
struct Failure<'a> {
    server: &'a Backend,
    /// What it answered, if it did.
    status: Option<StatusCode>,
    message: String,
}

/// How much of a server's error text is quoted.
const MAX_QUOTED: usize = 512;

fn failures(answers: &[ProbeResponse]) -> Vec<Failure<'_>> {
    let failure = |answer: &'_ ProbeResponse| match &answer.outcome {
        Ok((head, _)) if head.status.is_success() => None,
        Ok((head, body)) => {
            let quoted = String::from_utf8_lossy(&body[..body.len().min(MAX_QUOTED)]);
            let message = format!("answered {}: {}", head.status.as_u16(), quoted.trim());
            Some((Some(head.status), message))
        }
        Err(error) => Some((None, error.to_string())),
    };
    let with_server = |answer| {
        let (status, message) = failure(answer)?;
        Some(Failure { server: &answer.server, status, message })
    };
    answers.iter().filter_map(with_server).collect()
}

fn failure_reply(
    status: StatusCode,
    code: &'static str,
    message: &str,
    failures: &[Failure<'_>],
) -> OwnResponse {
    let named: Vec<String> = failures
        .iter()
        .map(|failure| format!("{} {}", failure.server.role(), failure.server.url()))
        .collect();
    let servers: Vec<serde_json::Value> = failures.iter().map(failure_entry).collect();
    let message = format!("{message}: {}", named.join(", "));
    if log_limit::admit(code) {
        warn!(code, "{message}");
    }
    let error = json!({ "message": message, "type": "server_error", "param": null, "code": code });
    json_response(status, json!({ "error": error, "servers": servers }).to_string())
}

fn failure_entry(failure: &Failure<'_>) -> serde_json::Value {
    json!({
        "url": failure.server.url(),
        "role": failure.server.role().as_str(),
        "status": failure.status.map(|status| status.as_u16()),
        "message": failure.message,
    })
}

/// A server's description, as the server wrote it.
fn description(answer: &ProbeResponse) -> Option<&RawValue> {
    let (head, body) = answer.outcome.as_ref().ok()?;
    head.status.is_success().then(|| serde_json::from_slice(body).ok()).flatten()
}

/// JSON texts as a list, each as it was written.
fn list<T: AsRef<str>>(texts: impl Iterator<Item = T>) -> String {
    let texts: Vec<T> = texts.collect();
    let texts: Vec<&str> = texts.iter().map(T::as_ref).collect();
    format!("[{}]", texts.join(","))
}

/// A server's entry: its description, or why there is none.
fn info(answer: &ProbeResponse) -> Cow<'_, str> {
    match description(answer) {
        Some(info) => info.get().into(),
        None => json!({ "error": missing_info(answer) }).to_string().into(),
    }
}

fn missing_info(answer: &ProbeResponse) -> serde_json::Value {
    match failures(std::slice::from_ref(answer)).first() {
        Some(failure) => failure_entry(failure),
        None => failure_entry(&Failure {
            server: &answer.server,
            status: Some(StatusCode::OK),
            message: "the answer is not JSON".into(),
        }),
    }
}

/// The entries of a description's `internal_states`.
fn internal_states(answer: &ProbeResponse) -> Vec<&str> {
    let fields = description(answer)
        .and_then(|info| serde_json::from_str::<HashMap<Cow<'_, str>, &RawValue>>(info.get()).ok());
    let states = fields.and_then(|fields| fields.get("internal_states").copied());
    let states = states.and_then(|states| serde_json::from_str::<Vec<&RawValue>>(states.get()).ok());
    states.unwrap_or_default().into_iter().map(RawValue::get).collect()
}

impl RouterEndpoint {
    /// The methods that this endpoint takes, as in an `Allow` header.
    pub(crate) fn allow(self) -> &'static str {
        match self {
            Self::FlushCache => "POST",
            Self::Health | Self::Ready => "GET, HEAD",
            Self::HealthGenerate | Self::ServerInfo | Self::FromOne => "GET",
        }
    }

    /// The endpoint at a path.
    pub(crate) fn at(path: &str) -> Option<Self> {
        Some(match path {
            "/health" => Self::Health,
            "/ready" => Self::Ready,
            "/health_generate" => Self::HealthGenerate,
            "/flush_cache" => Self::FlushCache,
            "/server_info" | "/get_server_info" => Self::ServerInfo,
            "/model_info" | "/get_model_info" | "/v1/models" => Self::FromOne,
            // The id may have slashes itself, as in "org/model".
            _ if path.strip_prefix("/v1/models/").is_some_and(|id| !id.is_empty()) => Self::FromOne,
            _ => return None,
        })
    }
}

/// Whether an `Allow` list has a method.
pub(crate) fn allows(allow: &str, method: &Method) -> bool {
    let method = method.as_str().as_bytes();
    allow.as_bytes().split(|byte| *byte == b',').any(|allowed| allowed.trim_ascii_start() == method)
}
