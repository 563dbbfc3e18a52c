//! The workers API: lists, adds and removes servers, compatible with `sglang_router`'s
//! `/workers`.
//!
//! A removed server drains: it gets no new requests and finishes those in flight, however
//! long they take. Whether the sender is an operator is checked by the caller.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::header::{HeaderValue, LOCATION};
use hyper::{Method, StatusCode};
use percent_encoding::percent_decode_str;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use super::admin_request::{AdminRequest, invalid, query_timeout};
use super::routes::{RouteAction, RouteEntry, allows};
use crate::admission::AccessControl;
use crate::error::{Error, OwnResponse, json_response};
use crate::http1::{HeaderId, RawHeaders, RequestHead};
use crate::upstream::{
    Address, Backend, DesiredFleet, Encoder, EncoderRegistration, Fleet, LiveFleet, NotChanged, Pools, Role,
    ServerSpec, SocketOptions,
};

/// How often a draining server is checked for requests in flight: below what an operator notices.
const DRAIN_CHECK_INTERVAL: Duration = Duration::from_millis(20);

/// The fields of `sglang_router`'s `POST /workers` that have a meaning here, and `bootstrap_host`. Others are
/// accepted and listed as ignored, so that clients written for it work.
const KNOWN_FIELDS: [&str; 4] = ["url", "worker_type", "bootstrap_port", "bootstrap_host"];

/// The `worker_type` of encoders.
const ENCODE: &str = "encode";

/// Handles the endpoints that list and change servers.
pub(crate) struct WorkersApi {
    pub(super) desired: Arc<DesiredFleet>,
    access: Arc<AccessControl>,
    /// Without idle connections, so any runtime may use them.
    pub(super) pools: Pools,
    /// Longest time for one server to answer a role switch.
    pub(super) switch_timeout: Duration,
}

impl WorkersApi {
    /// `switch_timeout` is the longest time for one server to answer a role switch.
    pub(crate) fn new(
        desired: Arc<DesiredFleet>,
        access: Arc<AccessControl>,
        sockets: &SocketOptions,
        switch_timeout: Duration,
    ) -> Self {
        let pools = Pools::new(&SocketOptions { max_idle: 0, ..sockets.clone() });
        Self { desired, access, pools, switch_timeout }
    }

    pub(crate) fn access(&self) -> &AccessControl {
        &self.access
    }

    pub(super) fn fleet(&self) -> &Arc<LiveFleet> {
        self.desired.fleet()
    }

    /// The methods of a path, as in an `Allow` header; `None` if the path is not of this API.
    pub(crate) fn allow(path: &str) -> Option<&'static str> {
        let entry = RouteEntry::find(path).filter(|entry| entry.action == RouteAction::ByWorkersApi);
        entry.map(|entry| entry.allow)
    }

    /// Handles an operator's request to a path of this API.
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
        // Other methods were rejected above, so each wildcard stands for the one that is left.
        match (path.strip_prefix("/workers/"), &head.method) {
            (Some(id), &Method::DELETE) => self.remove(id, head.query()).await,
            (Some(id), _) => self.show(id),
            (None, &Method::GET) if path == "/list_workers" => Ok(self.list_urls()),
            (None, &Method::GET) => Ok(self.list()),
            (None, _) if path == "/pd_role_switch" => {
                self.switch_role(self.server_headers(&head.headers), &body).await
            }
            (None, _) if path == "/add_worker" => self.add_by_query(head.query()),
            (None, _) if path == "/remove_worker" => self.remove_by_query(head.query()),
            (None, _) => self.add(&body),
        }
    }

    /// An operator's headers as they are sent to a server: with the key for backends instead of the admin
    /// key, which must not leave the router.
    fn server_headers(&self, headers: &RawHeaders) -> RawHeaders {
        let mut headers = headers.clone();
        headers.remove(HeaderId::Authorization);
        self.access.backend_headers().iter().for_each(|header| headers.add(header.name, header.value));
        headers
    }

    fn show(&self, id: &str) -> Result<OwnResponse, Error> {
        if let Some(encoder) = self.find_encoder(id) {
            return Ok(json_response(StatusCode::OK, self.encoder_entry(&encoder).to_string()));
        }
        let server = self.find(id)?;
        let entries = self.entries([&server].into_iter());
        Ok(json_response(StatusCode::OK, entries[0].to_string()))
    }

    fn list(&self) -> OwnResponse {
        let fleet = self.fleet().snapshot();
        let mut workers = self.entries(fleet.all().chain(fleet.draining()));
        let encoders = fleet.encoders().all();
        workers.extend(encoders.iter().map(|encoder| self.encoder_entry(encoder)));
        let body = json!({
            "total": workers.len(),
            "workers": workers,
            "stats": {
                "prefill_count": fleet.prefill().len(),
                "decode_count": fleet.decode().len(),
                "regular_count": fleet.regular().len(),
                "encode_count": encoders.len(),
            },
        });
        json_response(StatusCode::OK, body.to_string())
    }

    fn entries<'a>(&self, servers: impl Iterator<Item = &'a Arc<Backend>>) -> Vec<Value> {
        let fleet = self.fleet().snapshot();
        let sources = self.desired.source_by_key();
        let active: HashSet<u64> = fleet.all().map(|server| server.id()).collect();
        let entry = |server: &Arc<Backend>| {
            let is_active = active.contains(&server.id());
            let description = server.description().unwrap_or_default();
            // A draining server may have been added again: then the source is the new one's.
            let source = sources.get(server.address().key()).filter(|_| is_active);
            json!({
                "id": server.id().to_string(),
                "url": server.url(),
                "worker_type": server.role().as_str(),
                "is_healthy": is_active && server.is_healthy(),
                "status": if is_active { server.health().as_str() } else { "draining" },
                "load": server.in_flight(),
                "connection_mode": "http",
                "source": source.map(|source| source.as_str()),
                "bootstrap_host": server.bootstrap_host(),
                "bootstrap_port": server.bootstrap_port(),
                "dp_size": description.dp_size,
                "disaggregation_mode": description.role.map(Role::as_str),
            })
        };
        servers.map(entry).collect()
    }

    /// An encoder's entry, with the same fields, and where it is registered.
    fn encoder_entry(&self, encoder: &Encoder) -> Value {
        let registration = |(prefill, registration): (String, EncoderRegistration)| json!({ "prefill": prefill, "state": registration.as_str() });
        let registrations: Vec<Value> = encoder.registrations().into_iter().map(registration).collect();
        json!({
            "id": encoder.id().to_string(),
            "url": encoder.url(),
            "worker_type": ENCODE,
            "is_healthy": !encoder.is_down(),
            "status": encoder.health().as_str(),
            // Prefill servers send it requests, the router none.
            "load": null,
            "connection_mode": "http",
            "source": self.fleet().encoders().source(encoder),
            "bootstrap_host": null,
            "bootstrap_port": null,
            "dp_size": null,
            "disaggregation_mode": null,
            "registrations": registrations,
        })
    }

    /// Adds an encoder.
    fn add_encoder(&self, request: &AdminRequest) -> Result<OwnResponse, Error> {
        let address = request.address("url")?;
        if self.find_at(&address).is_ok() {
            return Err(Error::NotChanged(NotChanged::Exists));
        }
        let encoder = self.fleet().encoders().add(&address).map_err(Error::NotChanged)?;
        info!("encoder {} added through the admin API", encoder.url());
        let message = "The encoder is registered with language-only prefill servers.";
        Ok(accepted(encoder.id(), encoder.url(), message, &request.unknown_fields(&KNOWN_FIELDS)))
    }

    /// Removes an encoder. The router has no requests there to wait for.
    fn remove_encoder(&self, encoder: &Encoder) -> Result<OwnResponse, Error> {
        self.fleet().encoders().remove(encoder).map_err(Error::NotChanged)?;
        info!("encoder {} removed through the admin API", encoder.url());
        let body = json!({
            "status": "removed",
            "worker_id": encoder.id().to_string(),
            "url": encoder.url(),
            "in_flight": 0,
            "message": "The encoder is removed, and unregistered from prefill servers.",
        });
        Ok(json_response(StatusCode::OK, body.to_string()))
    }

    /// The encoder with this id, or at this percent-encoded URL.
    fn find_encoder(&self, id: &str) -> Option<Arc<Encoder>> {
        let encoders = self.fleet().encoders();
        match id.parse::<u64>() {
            Ok(id) => encoders.all().iter().find(|encoder| encoder.id() == id).cloned(),
            Err(_) => encoders.find(address_of(id)?.key()),
        }
    }

    fn add(&self, body: &[u8]) -> Result<OwnResponse, Error> {
        let request = AdminRequest::parse(body)?;
        if request.get("worker_type").and_then(Value::as_str) == Some(ENCODE) {
            return self.add_encoder(&request);
        }
        let server = self.add_server(&request)?;
        // Accepted, not created: the server is excluded from selection until its first successful probe.
        let message = "The server gets requests once it is up.";
        Ok(accepted(server.id(), server.url(), message, &request.unknown_fields(&KNOWN_FIELDS)))
    }

    /// Adds the server that a request describes.
    pub(super) fn add_server(&self, request: &AdminRequest) -> Result<Arc<Backend>, Error> {
        let role = self.worker_type(request)?;
        let address = request.address("url")?;
        if self.fleet().encoders().find(address.key()).is_some() {
            return Err(Error::NotChanged(NotChanged::Exists));
        }
        let spec = ServerSpec::new(role, address, request.bootstrap_port()?)
            .with_bootstrap_host(request.bootstrap_host()?);
        let server = self.desired.add(&spec).map_err(Error::NotChanged)?;
        let url = server.url();
        info!("{role} server {url} added through the admin API, in rotation once a probe succeeds");
        Ok(server)
    }

    /// Takes a server out of rotation, if it was not before.
    pub(super) fn take_out(&self, server: &Backend) -> Result<(), Error> {
        match self.desired.remove(server) {
            Ok(()) => log_removal(server, &self.fleet().now()),
            // It drains already: a second DELETE may wait for it.
            Err(NotChanged::Unknown) => {}
            Err(error) => return Err(Error::NotChanged(error)),
        }
        Ok(())
    }

    /// The role of a server that is to be added. A plain server may leave it out, as with `sglang_router`.
    fn worker_type(&self, request: &AdminRequest) -> Result<Role, Error> {
        let is_regular = self.fleet().now().is_regular();
        match request.get("worker_type") {
            None if is_regular => Ok(Role::Regular),
            Some(role) if role == Role::Regular.as_str() && is_regular => Ok(Role::Regular),
            Some(_) if is_regular => Err(invalid(
                r#"worker_type must be "regular": the router is in front of plain servers (--worker-urls)"#,
            )),
            _ => request.role("worker_type"),
        }
    }

    async fn remove(&self, id: &str, query: Option<&str>) -> Result<OwnResponse, Error> {
        // Without it a `DELETE` does not wait.
        let timeout = query_timeout(query)?.unwrap_or_default();
        if let Some(encoder) = self.find_encoder(id) {
            return self.remove_encoder(&encoder);
        }
        let server = self.find(id)?;
        self.take_out(&server)?;
        // Also without a timeout: an idle server is reported as removed at once.
        let is_idle = wait_until_drained(&server, Instant::now() + timeout).await;
        let (code, status, message) = match (is_idle, timeout.is_zero()) {
            (true, _) => (StatusCode::OK, "removed", "The server is removed."),
            (false, true) => (StatusCode::ACCEPTED, "accepted", "The server gets no more requests."),
            (false, false) => (StatusCode::ACCEPTED, "draining", "The server has not finished its requests."),
        };
        let body = json!({
            "status": status,
            "worker_id": server.id().to_string(),
            "url": server.url(),
            "in_flight": if is_idle { 0 } else { server.in_flight() },
            "message": message,
        });
        Ok(json_response(code, body.to_string()))
    }

    /// The server with this id, or at this percent-encoded URL.
    fn find(&self, id: &str) -> Result<Arc<Backend>, Error> {
        let fleet = self.fleet().snapshot();
        let servers = fleet.all().chain(fleet.draining());
        find_by_id_or_url(servers, id).cloned().ok_or(Error::NotChanged(NotChanged::Unknown))
    }

    /// The server in rotation at this address.
    pub(super) fn find_at(&self, address: &Address) -> Result<Arc<Backend>, Error> {
        let fleet = self.fleet().snapshot();
        let found = fleet.all().find(|server| server.address().key() == address.key());
        found.cloned().ok_or(Error::NotChanged(NotChanged::Unknown))
    }
}

fn find_by_id_or_url<'a>(
    mut servers: impl Iterator<Item = &'a Arc<Backend>>,
    id: &str,
) -> Option<&'a Arc<Backend>> {
    // A URL never parses as a number, so the two kinds of identifiers cannot be confused.
    if let Ok(id) = id.parse::<u64>() {
        return servers.find(|server| server.id() == id);
    }
    let address = address_of(id)?;
    servers.find(|server| server.address().key() == address.key())
}

/// The address in an id that is a percent-encoded URL.
fn address_of(id: &str) -> Option<Address> {
    Address::parse(&percent_decode_str(id).decode_utf8().ok()?).ok()
}

/// The response to a server that was added.
fn accepted(id: u64, url: &str, message: &str, ignored: &[&String]) -> OwnResponse {
    let location = format!("/workers/{id}");
    let body = json!({
        "status": "accepted",
        "worker_id": id.to_string(),
        "url": url,
        "location": location,
        "message": message,
        "ignored": ignored,
    });
    let mut response = json_response(StatusCode::ACCEPTED, body.to_string());
    // Digits and slashes are always a valid header value.
    if let Ok(location) = HeaderValue::from_str(&location) {
        response.headers_mut().insert(LOCATION, location);
    }
    response
}

fn log_removal(server: &Backend, fleet: &Fleet) {
    let (role, url) = (server.role(), server.url());
    info!("{role} server {url} removed through the admin API, draining {} requests", server.in_flight());
    if fleet.servers(role).is_empty() {
        warn!("no {role} server is left: generation requests are rejected until one is added");
    }
}

/// Waits until a server that is out of rotation has no requests in flight; `false` if it still has some at
/// `deadline`.
pub(super) async fn wait_until_drained(server: &Backend, deadline: Instant) -> bool {
    loop {
        // Sleeps before the first check: a worker that selected the server just before its removal may not
        // have counted its request yet.
        let now = Instant::now();
        sleep(DRAIN_CHECK_INTERVAL.min(deadline.saturating_duration_since(now))).await;
        if server.in_flight() == 0 {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upstream::FleetSpec;

    #[test]
    fn a_server_is_found_by_id_and_by_url_escaped_or_not() {
        let fleet = LiveFleet::new(FleetSpec::unknown(1, 1)).snapshot();
        let find = |id: &str| find_by_id_or_url(fleet.all(), id).map(|server| server.id());
        let decode = fleet.decode()[0].id();
        for id in [&decode.to_string(), "http%3A%2F%2Fdecode-0%3a80", "http://decode-0:80", "http://decode-0"]
        {
            assert_eq!(find(id), Some(decode), "{id}");
        }
        for id in ["0", "%", "%2", "http://decode-0:80%", "http://decode-0%zz", "%ff", "http://decode-9:80"] {
            assert_eq!(find(id), None, "{id}");
        }
    }
}
