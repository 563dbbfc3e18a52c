//! `/workers`: which servers there are, told and changed, as `sglang_router` has it.
//!
//! A server that is removed gets no more requests and keeps those it has: nothing
//! is cut, however long they take.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::header::{HeaderValue, LOCATION};
use hyper::{Method, StatusCode};
use serde_json::{Map, Value, json};
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use super::endpoints::allows;
use crate::admission::AccessControl;
use crate::error::{Error, OwnResponse, json_response};
use crate::http1::{HeaderId, RawHeaders, RequestHead};
use crate::upstream::{
    Address, Backend, DesiredFleet, LiveFleet, NotChanged, Pools, Role, ServerSpec, SocketOptions,
    checked_host,
};

/// How often a server is looked at that is to finish its requests.
const DRAIN_CHECK_INTERVAL: Duration = Duration::from_millis(20);
/// Longest `?timeout` of a `DELETE`, in seconds.
const MAX_DRAIN_TIMEOUT: f64 = 3_600.0;

/// RawHeaders of `sglang_router`'s `POST /workers` that mean something here, and `bootstrap_host`.
const KNOWN_FIELDS: [&str; 4] = ["url", "worker_type", "bootstrap_port", "bootstrap_host"];

/// Answers for the endpoints that show and change servers.
pub(crate) struct WorkersApi {
    pub(super) members: Arc<DesiredFleet>,
    access: Arc<AccessControl>,
    /// Nothing is kept in them, so they belong to no runtime.
    pub(super) pools: Pools,
    /// How long a server may take to switch its role.
    pub(super) switch_timeout: Duration,
}

impl WorkersApi {
    /// `switch_timeout` is how long one server may take to switch its role.
    pub(crate) fn new(
        members: Arc<DesiredFleet>,
        access: Arc<AccessControl>,
        sockets: &SocketOptions,
        switch_timeout: Duration,
    ) -> Self {
        let pools = Pools::new(&SocketOptions { max_idle: 0, ..sockets.clone() });
        Self { members, access, pools, switch_timeout }
    }

    /// Who may ask.
    pub(crate) fn access(&self) -> &AccessControl {
        &self.access
    }

    pub(super) fn fleet(&self) -> &Arc<LiveFleet> {
        self.members.fleet()
    }

    /// The methods that a path takes, as in an `Allow` header. `None`: the path is somebody else's.
    pub(crate) fn allow(path: &str) -> Option<&'static str> {
        match path {
            "/workers" => Some("GET, POST"),
            "/pd_role_switch" => Some("POST"),
            _ => path.strip_prefix("/workers/").filter(|id| !id.is_empty()).map(|_| "GET, DELETE"),
        }
    }

    /// Answers a request to a path that is this one's. Whether the client may ask is for the caller to know.
    pub(crate) async fn handle(
        self: &Arc<Self>,
        head: &RequestHead,
        body: Bytes,
    ) -> Result<OwnResponse, Error> {
        let path = head.path();
        let allow = Self::allow(path).ok_or(Error::NotFound)?;
        if !allows(allow, &head.method) {
            return Err(Error::MethodNotAllowed { allow });
        }
        match (path.strip_prefix("/workers/"), &head.method) {
            (Some(id), &Method::DELETE) => self.remove(id, head.query()).await,
            (Some(id), _) => {
                let server = self.find(id)?;
                Ok(json_response(StatusCode::OK, self.entries([&server].into_iter())[0].to_string()))
            }
            (None, &Method::GET) => Ok(self.list()),
            (None, _) if path == "/pd_role_switch" => {
                self.switch_role(self.to_server(&head.fields), &body).await
            }
            (None, _) => self.add(&body),
        }
    }

    /// An operator's headers, as a server gets them: the router's keys are no server's business, and it has its own.
    fn to_server(&self, fields: &RawHeaders) -> RawHeaders {
        let mut fields = fields.clone();
        fields.remove(HeaderId::Authorization);
        self.access.own_fields().iter().for_each(|line| fields.add(line.name, line.value));
        fields
    }

    fn list(&self) -> OwnResponse {
        let fleet = self.members.fleet().snapshot();
        let workers = self.entries(fleet.all().chain(fleet.draining()));
        let body = json!({
            "total": workers.len(),
            "workers": workers,
            "stats": {
                "prefill_count": fleet.prefill().len(),
                "decode_count": fleet.decode().len(),
                "regular_count": 0,
            },
        });
        json_response(StatusCode::OK, body.to_string())
    }

    fn entries<'a>(&self, servers: impl Iterator<Item = &'a Arc<Backend>>) -> Vec<Value> {
        let fleet = self.members.fleet().snapshot();
        let sources = self.members.sources();
        let wanted: HashSet<u64> = fleet.all().map(|server| server.id()).collect();
        let entry = |server: &Arc<Backend>| {
            let is_wanted = wanted.contains(&server.id());
            let said = server.description().unwrap_or_default();
            let source = sources.get(&server.address().authority).filter(|_| is_wanted);
            json!({
                "id": server.id().to_string(),
                "url": server.url(),
                "worker_type": server.role().as_str(),
                "is_healthy": is_wanted && server.is_healthy(),
                "status": if is_wanted { server.health().as_str() } else { "draining" },
                "load": server.in_flight(),
                "connection_mode": "http",
                "source": source.map(|source| source.as_str()),
                "bootstrap_host": server.bootstrap_host(),
                "bootstrap_port": server.bootstrap_port(),
                "dp_size": said.dp_size,
                "disaggregation_mode": said.role.map(Role::as_str),
            })
        };
        servers.map(entry).collect()
    }

    fn add(&self, body: &[u8]) -> Result<OwnResponse, Error> {
        let order = object(body)?;
        let role = role(&order, "worker_type")?;
        let address = address(&order, "url")?;
        let mut member = ServerSpec::new(role, address.clone(), port(&order)?);
        if let (ServerSpec::Prefill(spec), Some(host)) = (&mut member, bootstrap_host(&order)?) {
            spec.bootstrap_host = host;
        }
        let server = self.members.add(&member).map_err(Error::NotChanged)?;
        let (id, url) = (server.id().to_string(), server.url());
        info!("{role} server {url} was added by an operator; it gets requests once it is up");
        let ignored: Vec<&String> =
            order.keys().filter(|name| !KNOWN_FIELDS.contains(&name.as_str())).collect();
        let location = format!("/workers/{id}");
        let body = json!({
            "status": "accepted",
            "worker_id": id,
            "url": url,
            "location": location,
            "message": "The server gets requests once it is up.",
            "ignored": ignored,
        });
        let mut reply = json_response(StatusCode::ACCEPTED, body.to_string());
        if let Ok(location) = HeaderValue::from_str(&location) {
            reply.headers_mut().insert(LOCATION, location);
        }
        Ok(reply)
    }

    async fn remove(&self, id: &str, query: Option<&str>) -> Result<OwnResponse, Error> {
        let timeout = drain_timeout(query)?;
        let server = self.find(id)?;
        let (role, url) = (server.role(), server.url());
        match self.members.remove(&server) {
            Ok(()) => info!("{role} server {url} was removed by an operator"),
            // It is draining already, and may be waited for.
            Err(NotChanged::Unknown) => {}
            Err(error) => return Err(Error::NotChanged(error)),
        }
        let fleet = self.members.fleet().snapshot();
        let is_last = if role == Role::Prefill { fleet.prefill() } else { fleet.decode() }.is_empty();
        if is_last {
            warn!("there is no {role} server any more: requests are refused");
        }
        drop(fleet);
        let is_idle = drained(&server, Instant::now() + timeout).await;
        let left = if is_idle { 0 } else { server.in_flight() };
        let (status, word, message) = match (is_idle, timeout.is_zero()) {
            (true, _) => (StatusCode::OK, "removed", "The server is removed."),
            (false, true) => (StatusCode::ACCEPTED, "accepted", "The server gets no more requests."),
            (false, false) => (StatusCode::ACCEPTED, "draining", "The server has not finished its requests."),
        };
        let body = json!({
            "status": word,
            "worker_id": server.id().to_string(),
            "url": url,
            "in_flight": left,
            "message": message,
        });
        Ok(json_response(status, body.to_string()))
    }

    /// The server with an id, or at a percent-encoded URL.
    fn find(&self, id: &str) -> Result<Arc<Backend>, Error> {
        let unknown = Error::NotChanged(NotChanged::Unknown);
        let is_it: Box<dyn Fn(&Backend) -> bool> = if let Ok(id) = id.parse::<u64>() {
            Box::new(move |server| server.id() == id)
        } else {
            let Some(Ok(address)) = percent_decoded(id).map(|url| Address::parse(&url)) else {
                return Err(unknown);
            };
            Box::new(move |server| server.address().authority == address.authority)
        };
        let fleet = self.members.fleet().snapshot();
        let found = fleet.all().chain(fleet.draining()).find(|server| is_it(server));
        found.cloned().ok_or(unknown)
    }

    /// The server at the URL in a field.
    pub(super) fn find_at(&self, address: &Address) -> Result<Arc<Backend>, Error> {
        let fleet = self.members.fleet().snapshot();
        let found = fleet.all().find(|server| server.address().authority == address.authority);
        found.cloned().ok_or(Error::NotChanged(NotChanged::Unknown))
    }
}

/// Waits until a server has finished its requests; `false` if it has not by then. It must get no new ones.
pub(super) async fn drained(server: &Backend, end: Instant) -> bool {
    loop {
        // Asked after a pause: a request that had just been given to the server may not count yet.
        let begun = Instant::now();
        sleep(DRAIN_CHECK_INTERVAL.min(end.saturating_duration_since(begun))).await;
        if server.in_flight() == 0 {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
    }
}

/// The fields of an order.
pub(super) fn object(body: &[u8]) -> Result<Map<String, Value>, Error> {
    match serde_json::from_slice(body) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(_) => Err(bad("the body is not a JSON object")),
        Err(error) => Err(bad(format!("the body is not JSON: {error}"))),
    }
}

pub(super) fn bad(what: impl Into<String>) -> Error {
    Error::BadAdminRequest(what.into())
}

/// The role in a field.
pub(super) fn role(order: &Map<String, Value>, name: &str) -> Result<Role, Error> {
    match order.get(name).and_then(Value::as_str) {
        Some("prefill") => Ok(Role::Prefill),
        Some("decode") => Ok(Role::Decode),
        _ => Err(bad(format!(r#"{name} must be "prefill" or "decode""#))),
    }
}

/// The server's URL in a field.
pub(super) fn address(order: &Map<String, Value>, name: &str) -> Result<Address, Error> {
    let url = order.get(name).and_then(Value::as_str).ok_or_else(|| bad(format!("{name} is missing")))?;
    Address::parse(url).map_err(|why| bad(format!("{name} {}: {why}", url.escape_debug())))
}

pub(super) fn port(order: &Map<String, Value>) -> Result<Option<u16>, Error> {
    let Some(value) = order.get("bootstrap_port").filter(|value| !value.is_null()) else { return Ok(None) };
    let port = value.as_u64().and_then(|port| u16::try_from(port).ok()).filter(|port| *port > 0);
    port.map(Some).ok_or_else(|| bad("bootstrap_port must be a number between 1 and 65535, or null"))
}

pub(super) fn bootstrap_host(order: &Map<String, Value>) -> Result<Option<String>, Error> {
    let Some(value) = order.get("bootstrap_host").filter(|value| !value.is_null()) else { return Ok(None) };
    let host = value.as_str().and_then(checked_host);
    host.map(Some).ok_or_else(|| bad("bootstrap_host is not a name or an address"))
}

/// `timeout` of a query, in seconds; without one nothing is waited for.
fn drain_timeout(query: Option<&str>) -> Result<Duration, Error> {
    let fields = query.unwrap_or_default().split('&').filter_map(|field| field.split_once('='));
    let Some((_, value)) = fields.into_iter().find(|(name, _)| *name == "timeout") else {
        return Ok(Duration::ZERO);
    };
    let seconds = value.parse().ok().filter(|seconds| (0.0..=MAX_DRAIN_TIMEOUT).contains(seconds));
    let seconds =
        seconds.ok_or_else(|| bad(format!("timeout must be seconds between 0 and {MAX_DRAIN_TIMEOUT}")))?;
    Ok(Duration::from_secs_f64(seconds))
}

/// `None`: the escapes are malformed, or what they stand for is not UTF-8.
fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let mut digit = || char::from(rest.next()?).to_digit(16);
            let (high, low) = (digit()?, digit()?);
            bytes.push(u8::try_from(high * 16 + low).ok()?);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_in_a_path_may_be_escaped() {
        for path in ["http%3A%2F%2Fh%3a80", "http://h:80"] {
            assert_eq!(percent_decoded(path).as_deref(), Some("http://h:80"));
        }
        for broken in ["%", "%2", "%zz", "%ff", "a%"] {
            assert_eq!(percent_decoded(broken), None, "{broken}");
        }
    }

    #[test]
    fn a_timeout_is_a_number_of_seconds_within_bounds() {
        let timeout = |query| drain_timeout(query).ok().map(|timeout| timeout.as_secs_f64());
        assert_eq!(timeout(None), Some(0.0));
        assert_eq!(timeout(Some("a=b&timeout=1.5")), Some(1.5));
        for wrong in ["timeout=", "timeout=-1", "timeout=3601", "timeout=NaN", "timeout=inf"] {
            assert_eq!(timeout(Some(wrong)), None, "{wrong}");
        }
    }
}
