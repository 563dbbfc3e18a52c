//! Keeps encoders registered with prefill servers, and probes them.
//!
//! SGLang's language-only prefill servers have a small HTTP server of their own for it, the encoder bootstrap
//! server, with a list of encoders that is empty after each start. An encoder registers itself in its first
//! 150 s only. So here each prefill server's list is read at every probe period, and what is missing is
//! added. Nothing is unregistered when the router ends: prefill servers go on to use their encoders, and so
//! do other routers.
//!
//! One task for each encoder and one for each prefill server, and a new connection for each request. Which
//! encoders there should be, and what probes mean, is for `upstream`.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep_until};
use tracing::{debug, info, warn};

use super::query::query_address;
use crate::admission::AccessControl;
use crate::error::Cause;
use crate::http1::OutgoingBody;
use crate::upstream::{
    Address, Backend, Encoder, EncoderRegistration, Encoders, HealthOptions, LiveFleet, Outcome, Pools,
    SocketOptions,
};

/// Longest time for an encoder to answer a health check, for which it encodes a dummy behind all that it has
/// to encode. SGLang gives up after 30 s and says so itself.
const ENCODER_HEALTH_TIMEOUT: Duration = Duration::from_secs(35);
/// How much rarer health checks of a working encoder are, as of servers whose health check costs a token.
const HEALTH_FACTOR: u32 = 10;
/// How often an encoder is probed that is not known to work.
const RECOVERY_INTERVAL: Duration = Duration::from_secs(1);

/// Where SGLang's language-only servers take registrations unless they are told otherwise.
const DEFAULT_BOOTSTRAP_PORT: u16 = 8_997;

const LIST: &str = "/list_encoder_urls";
const REGISTER: &str = "/register_encoder_url";
const UNREGISTER: &str = "/unregister_encoder_url";

/// Probes and registers all encoders, also those that are added later, for as long as it is polled.
pub(crate) async fn keep_encoders(
    fleet: &Arc<LiveFleet>,
    access: &Arc<AccessControl>,
    sockets: &SocketOptions,
) {
    let client = Arc::new(EncoderClient::new(sockets, access));
    let encoders = fleet.encoders();
    let (mut servers_changed, mut encoders_changed) = (fleet.changes(), encoders.changes());
    // Aborts the tasks when this future is dropped.
    let mut tasks = JoinSet::new();
    let (mut probes, mut registrars) = (HashMap::new(), HashMap::new());
    loop {
        let (all, servers) = (encoders.all(), fleet.snapshot());
        keep(&mut probes, |id| all.iter().any(|encoder| encoder.id() == id));
        for encoder in all.iter() {
            probes.entry(encoder.id()).or_insert_with(|| {
                let encoder = Arc::clone(encoder);
                tasks.spawn(probe(encoder, Arc::clone(&encoders), Arc::clone(fleet), Arc::clone(&client)))
            });
        }
        keep(&mut registrars, |id| servers.prefill().iter().any(|server| server.id() == id));
        // Those that there are stay without encoders: they tell their servers of the last one's removal.
        for server in servers.prefill().iter().filter(|_| !all.is_empty()) {
            registrars.entry(server.id()).or_insert_with(|| {
                let registrar = Registrar::new(Arc::clone(server), Arc::clone(fleet), Arc::clone(&client));
                tasks.spawn(registrar.run())
            });
        }
        let is_there = |url: &str| servers.prefill().iter().any(|server| server.url() == url);
        all.iter().for_each(|encoder| encoder.retain_registrations(is_there));
        drop(servers);
        let changed = tokio::select! {
            changed = servers_changed.changed() => changed,
            changed = encoders_changed.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
        // Takes the results of aborted tasks, which the set keeps otherwise.
        while tasks.try_join_next().is_some() {}
    }
}

/// Aborts the tasks of what is gone.
fn keep(tasks: &mut HashMap<u64, AbortHandle>, is_there: impl Fn(u64) -> bool) {
    tasks.retain(|id, task| {
        let stays = is_there(*id);
        if !stays {
            task.abort();
        }
        stays
    });
}

/// Sends the router's own requests to encoders and to bootstrap servers.
pub(super) struct EncoderClient {
    pools: Pools,
    /// Has the key for backends, which a reload may change.
    access: Arc<AccessControl>,
}

impl EncoderClient {
    /// Opens a connection for each request.
    pub(super) fn new(sockets: &SocketOptions, access: &Arc<AccessControl>) -> Self {
        // No idle connections, so that each request opens one.
        let pools = Pools::new(&SocketOptions { max_idle: 0, ..sockets.clone() });
        Self { pools, access: Arc::clone(access) }
    }

    pub(super) async fn send(
        &self,
        address: &Address,
        (method, path): (Method, &str),
        body: OutgoingBody,
        timeout: Duration,
    ) -> Result<(StatusCode, Bytes), Cause> {
        let headers = self.access.backend_headers();
        query_address(&self.pools, address, (&method, path), &headers, body, timeout).await
    }
}

/// Probes one encoder for as long as it is polled.
async fn probe(
    encoder: Arc<Encoder>,
    encoders: Arc<Encoders>,
    fleet: Arc<LiveFleet>,
    client: Arc<EncoderClient>,
) {
    loop {
        let (begun, options) = (Instant::now(), fleet.health_options());
        if options.enabled
            && let Some(result) = check(&encoder, &client, options.timeout).await
        {
            encoders.record_probe(&encoder, result);
        }
        sleep_until(begun + probe_interval(&encoder, &options)).await;
    }
}

fn probe_interval(encoder: &Encoder, options: &HealthOptions) -> Duration {
    match encoder.is_recovering() {
        true => RECOVERY_INTERVAL.min(options.interval),
        false => options.interval.saturating_mul(HEALTH_FACTOR),
    }
}

/// Probes an encoder once. `None` says nothing about it: the router itself could not open a connection.
pub(super) async fn check(
    encoder: &Encoder,
    client: &EncoderClient,
    timeout: Duration,
) -> Option<Result<(), String>> {
    let timeout = timeout.max(ENCODER_HEALTH_TIMEOUT);
    let get = (Method::GET, "/health");
    match client.send(encoder.address(), get, OutgoingBody::default(), timeout).await {
        Ok((status, _)) if status.is_success() => Some(Ok(())),
        Ok((status, _)) => Some(Err(format!("GET /health returned {}", status.as_u16()))),
        Err(cause) if cause.outcome() == Outcome::Exhausted => None,
        Err(cause) => Some(Err(cause.to_string())),
    }
}

/// Why a request to an encoder bootstrap server has failed.
struct Failed {
    registration: EncoderRegistration,
    reason: String,
}

impl From<Cause> for Failed {
    fn from(cause: Cause) -> Self {
        let registration = match &cause {
            Cause::Connect(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                EncoderRegistration::Refused
            }
            _ => EncoderRegistration::Unreachable,
        };
        Self { registration, reason: cause.to_string() }
    }
}

/// Keeps the list of one prefill server.
struct Registrar {
    server: Arc<Backend>,
    fleet: Arc<LiveFleet>,
    encoders: Arc<Encoders>,
    client: Arc<EncoderClient>,
    /// URLs of the router's encoders that are in the server's list: it is told when one is removed. What
    /// others have put there stays.
    registered: HashSet<String>,
    /// The failure that was logged last.
    logged: Option<EncoderRegistration>,
}

impl Registrar {
    fn new(server: Arc<Backend>, fleet: Arc<LiveFleet>, client: Arc<EncoderClient>) -> Self {
        let encoders = fleet.encoders();
        Self { server, fleet, encoders, client, registered: HashSet::new(), logged: None }
    }

    /// Keeps the list for as long as it is polled. Also while the server is not healthy: it should have its
    /// encoders before it gets its first request.
    async fn run(mut self) {
        let mut changes = self.encoders.changes();
        loop {
            let (begun, options) = (Instant::now(), self.fleet.health_options());
            let all = self.encoders.all();
            if !(all.is_empty() && self.registered.is_empty()) {
                self.reconcile(&all, options.timeout).await;
            }
            tokio::select! {
                () = sleep_until(begun + options.interval) => {}
                changed = changes.changed() => if changed.is_err() { return },
            }
        }
    }

    /// Adds to the list what is missing, and removes what the router has removed.
    async fn reconcile(&mut self, all: &[Arc<Encoder>], timeout: Duration) {
        let Some(address) = self.bootstrap_address() else { return };
        if self.server.description().and_then(|told| told.language_only) == Some(false) {
            let reason = "it is not language-only".to_owned();
            return self.failed(all, &address, Failed { registration: EncoderRegistration::Refused, reason });
        }
        let listed = match self.list(&address, timeout).await {
            Ok(listed) => listed,
            Err(failed) => return self.failed(all, &address, failed),
        };
        if self.logged.take().is_some() {
            info!("prefill server {} takes encoders at {}", self.server.url(), address.authority);
        }
        self.unregister_removed(all, &listed, &address, timeout).await;
        for encoder in all {
            let registration = if spelled_in(&listed, encoder.url()).is_some() {
                EncoderRegistration::Registered
            } else if encoder.is_down() {
                // The server has dropped it, or was started meanwhile: requests would fail there.
                EncoderRegistration::Pending
            } else {
                self.register(encoder, &address, timeout).await
            };
            match registration {
                EncoderRegistration::Registered => self.registered.insert(encoder.url().to_owned()),
                _ => self.registered.remove(encoder.url()),
            };
            encoder.note_registration(self.server.url(), registration);
        }
    }

    /// On the host at which the router reaches the server: the bootstrap host is for decode servers. A
    /// configured port wins, as the server may be behind a port mapping that it does not know.
    fn bootstrap_address(&self) -> Option<Address> {
        let host = &self.server.address().host;
        let told = || self.server.description()?.encoder_bootstrap_port;
        let port = self.encoders.bootstrap_port().or_else(told).unwrap_or(DEFAULT_BOOTSTRAP_PORT);
        Address::parse(&format!("http://{host}:{port}")).ok()
    }

    /// The URLs in the server's list.
    async fn list(&self, address: &Address, timeout: Duration) -> Result<Vec<String>, Failed> {
        let unusable = |reason| Failed { registration: EncoderRegistration::Unreachable, reason };
        let get = (Method::GET, LIST);
        let (status, body) = self.client.send(address, get, OutgoingBody::default(), timeout).await?;
        if !status.is_success() {
            return Err(unusable(format!("GET {LIST} returned {}", status.as_u16())));
        }
        let listed = serde_json::from_slice::<Value>(&body).unwrap_or_default();
        let urls = listed.get("encoder_urls").and_then(Value::as_array);
        let urls = urls.ok_or_else(|| unusable(format!("GET {LIST} returned no encoder_urls")))?;
        Ok(urls.iter().filter_map(Value::as_str).map(str::to_owned).collect())
    }

    async fn register(&self, encoder: &Encoder, address: &Address, timeout: Duration) -> EncoderRegistration {
        let (url, server) = (encoder.url(), self.server.url());
        let (registration, reason) = match self.change((Method::POST, REGISTER), url, address, timeout).await
        {
            Ok(status) if status.is_success() => {
                info!("encoder {url} registered with prefill server {server}");
                return EncoderRegistration::Registered;
            }
            Ok(status) => {
                (EncoderRegistration::Unreachable, format!("POST {REGISTER} returned {}", status.as_u16()))
            }
            Err(Failed { registration, reason }) => (registration, reason),
        };
        // Again after the next change only: it is tried in every period.
        let is_new = !encoder.registrations().contains(&(server.to_owned(), registration));
        if is_new {
            warn!("encoder {url} cannot be registered with prefill server {server}: {reason}");
        }
        registration
    }

    /// Tells the server of encoders that the router has had and has no more. Once it has answered, whatever
    /// it says, others may register them again.
    async fn unregister_removed(
        &mut self,
        all: &[Arc<Encoder>],
        listed: &[String],
        address: &Address,
        timeout: Duration,
    ) {
        let is_kept = |url: &String| all.iter().any(|encoder| encoder.url() == url);
        let removed: Vec<String> = self.registered.iter().filter(|url| !is_kept(url)).cloned().collect();
        for url in removed {
            if let Some(spelled) = spelled_in(listed, &url) {
                let delete = (Method::DELETE, UNREGISTER);
                match self.change(delete, spelled, address, timeout).await {
                    Ok(status) => {
                        let status = status.as_u16();
                        info!(status, "encoder {url} unregistered from prefill server {}", self.server.url());
                    }
                    // In the next period.
                    Err(Failed { reason, .. }) => {
                        debug!("cannot unregister encoder {url}: {reason}");
                        continue;
                    }
                }
            }
            self.registered.remove(&url);
        }
    }

    /// Sends a change of one URL in the list.
    async fn change(
        &self,
        request: (Method, &str),
        url: &str,
        address: &Address,
        timeout: Duration,
    ) -> Result<StatusCode, Failed> {
        let body = Bytes::from(json!({ "url": url }).to_string());
        let sent = self.client.send(address, request, OutgoingBody::new(vec![body]), timeout).await;
        Ok(sent?.0)
    }

    /// The list could not be read.
    fn failed(&mut self, all: &[Arc<Encoder>], address: &Address, failed: Failed) {
        let Failed { registration, reason } = failed;
        let (server, authority) = (self.server.url(), &address.authority);
        // Of a server that is not known to be up nothing else is to be expected.
        let is_expected = !self.server.is_ready();
        let registration = if is_expected { EncoderRegistration::Pending } else { registration };
        all.iter().for_each(|encoder| encoder.note_registration(server, registration));
        if is_expected || self.logged.replace(registration) == Some(registration) {
            return;
        }
        match registration {
            EncoderRegistration::Refused => warn!(
                "prefill server {server} takes no encoders at {authority}: {reason}. It encodes media itself, or \
                 --encoder-bootstrap-port is another one"
            ),
            _ => warn!("prefill server {server} cannot be told of encoders at {authority}: {reason}"),
        }
    }
}

/// The same URL as it is spelled in a server's list, where an encoder or an operator may have put it.
fn spelled_in<'a>(listed: &'a [String], url: &str) -> Option<&'a str> {
    let is_same = |listed: &&String| {
        listed.as_str() == url || Address::parse(listed).is_ok_and(|address| address.url == url)
    };
    listed.iter().find(is_same).map(String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_found_in_a_list_however_it_is_spelled() {
        let listed = ["http://a:1/", "HTTP://B.example", "nonsense", "http://c:3"].map(str::to_owned);
        for (url, spelled) in [
            ("http://a:1", Some("http://a:1/")),
            ("http://b.example:80", Some("HTTP://B.example")),
            ("http://c:3", Some("http://c:3")),
            ("http://c:4", None),
        ] {
            assert_eq!(spelled_in(&listed, url), spelled, "{url}");
        }
    }
}
