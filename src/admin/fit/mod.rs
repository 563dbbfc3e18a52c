//! Whether servers fit the configuration and each other: asks each of them once, before
//! traffic flows.
//!
//! What a server says is read in [`server_facts`], and what does not fit is said in [`rules`].
//! Nothing is changed here, at servers or in the router, but that names are resolved.

mod rules;
mod server_facts;

use std::sync::Arc;
use std::time::Duration;

use hyper::{Method, StatusCode};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::descriptions::ask;
use super::discovery::resolve_names;
use super::encoders::{self, EncoderClient};
use super::probes::{ProbeClient, READY};
use crate::admission::AccessControl;
use crate::http1::OutgoingBody;
use crate::upstream::{Address, Backend, DesiredFleet, Encoder, Role, SocketOptions};
pub use server_facts::ServerFacts;

/// Servers that are asked at the same time: one connection each, below the 1,024 descriptors that a shell
/// allows by default.
const MAX_ASKED: usize = 256;

/// What is known of all servers after each was asked once.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct FleetCheck {
    /// Prefill servers first, encoders last.
    pub servers: Vec<ServerCheck>,
    /// What is wrong with no single server, such as a name without addresses.
    pub findings: Vec<Finding>,
}

/// What is known of one server.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ServerCheck {
    /// Its URL, as configured or as a name resolved to it.
    pub url: String,
    /// `prefill`, `decode`, `regular`, or `encode` of an encoder.
    pub role: &'static str,
    /// The bootstrap port that requests will carry, if it is configured.
    pub bootstrap_port: Option<u16>,
    /// What it says of itself; `None` if it does not, and of encoders.
    pub facts: Option<ServerFacts>,
    /// What does not fit, and what may not.
    pub findings: Vec<Finding>,
}

/// One sentence about what does not fit.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Finding {
    /// Requests may work all the same.
    pub is_warning: bool,
    /// In printable ASCII, whatever a server has sent.
    pub text: String,
}

impl FleetCheck {
    /// Whether all servers have answered and fit, apart from warnings.
    pub fn fits(&self) -> bool {
        self.servers.iter().all(ServerCheck::fits) && self.findings.iter().all(|finding| finding.is_warning)
    }
}

impl ServerCheck {
    /// Whether the server has answered and fits, apart from warnings.
    pub fn fits(&self) -> bool {
        self.findings.iter().all(|finding| finding.is_warning)
    }

    fn error(&mut self, text: impl Into<String>) {
        self.findings.push(Finding::new(false, text));
    }

    fn warning(&mut self, text: impl Into<String>) {
        self.findings.push(Finding::new(true, text));
    }
}

impl Finding {
    fn new(is_warning: bool, text: impl Into<String>) -> Self {
        Self { is_warning, text: server_facts::printable(&text.into()) }
    }
}

/// What all questions share.
struct Asker {
    client: ProbeClient,
    /// For what is no backend: encoders and bootstrap servers.
    others: EncoderClient,
    has_key: bool,
    timeout: Duration,
    free: Semaphore,
}

/// Asks all servers at the same time, each within the health checks' timeout. Names are resolved first, as
/// discovery resolves them.
pub(crate) async fn check_fleet(
    desired: &Arc<DesiredFleet>,
    access: &Arc<AccessControl>,
    sockets: &SocketOptions,
) -> FleetCheck {
    let (fleet, encoders) = (desired.fleet(), desired.fleet().encoders());
    let (names, encoder_names) = tokio::join!(resolve_names(&**desired), resolve_names(&*encoders));
    let asker = Arc::new(Asker {
        client: ProbeClient::new(sockets, access),
        others: EncoderClient::new(sockets, access),
        has_key: access.backend_headers().iter().next().is_some(),
        timeout: fleet.health_options().timeout,
        free: Semaphore::new(MAX_ASKED),
    });
    // Aborts the tasks when this future is dropped.
    let mut asked = JoinSet::new();
    let servers = fleet.servers();
    for (place, server) in servers.iter().cloned().enumerate() {
        let asker = Arc::clone(&asker);
        asked.spawn(async move { (place, asker.server(&server).await) });
    }
    for (place, encoder) in encoders.all().iter().cloned().enumerate() {
        let (asker, place) = (Arc::clone(&asker), servers.len() + place);
        asked.spawn(async move { (place, asker.encoder(&encoder).await) });
    }
    let mut checks = asked.join_all().await;
    checks.sort_by_key(|(place, _)| *place);
    let servers = checks.into_iter().map(|(_, check)| check).collect();
    let mut check = FleetCheck { servers, findings: Vec::new() };
    for (name, why) in names.into_iter().chain(encoder_names) {
        check.findings.push(Finding::new(false, format!("DNS lookup of {name} failed: {why}")));
    }
    rules::between(&mut check, fleet.snapshot().roles());
    check
}

impl Asker {
    async fn server(&self, server: &Arc<Backend>) -> ServerCheck {
        let _permit = self.free.acquire().await;
        let mut check = ServerCheck {
            url: server.url().to_owned(),
            role: server.role().as_str(),
            bootstrap_port: server.bootstrap_port(),
            facts: None,
            findings: Vec::new(),
        };
        match ask(server, &self.client, self.timeout).await {
            Err(error) => check.error(rules::unreachable(&error, server.address())),
            Ok((path, head, body)) => match rules::described(path, &head, &body, self.has_key) {
                Ok(told) => check.facts = Some(told),
                Err(why) => check.error(why),
            },
        }
        if let Some(told) = check.facts.clone() {
            rules::own(&mut check, server.role(), &told);
            self.readiness(server, &mut check).await;
            if server.role() == Role::Prefill {
                self.bootstrap(server, &told, &mut check).await;
            }
        }
        check
    }

    /// A server that drains, or whose model loads, describes itself and gets no requests.
    async fn readiness(&self, server: &Arc<Backend>, check: &mut ServerCheck) {
        match self.client.get(server, READY, self.timeout).await.result {
            Ok((head, _)) if head.status == StatusCode::SERVICE_UNAVAILABLE => {
                check.error(format!("it is starting or draining: GET {READY} returned 503"));
            }
            Err(error) => check.error(rules::unreachable(&error, server.address())),
            // 404 before SGLang 0.5.21, whose /health generates a token.
            Ok(_) => {}
        }
    }

    /// Whether somebody answers where decode servers will look for this server. They may be in a network
    /// that the router is not in, so that silence alone is a warning.
    async fn bootstrap(&self, server: &Backend, told: &ServerFacts, check: &mut ServerCheck) {
        let (configured, told) = (check.bootstrap_port, told.bootstrap_port);
        let host = server.bootstrap_host().unwrap_or_default();
        let Some(port) = configured.or(told) else {
            let why = "it does not say its bootstrap port, and none is configured: requests carry null, and decode \
                       servers take their own --disaggregation-bootstrap-port; write the port behind the URL";
            return check.warning(why);
        };
        let Ok(address) = Address::parse(&format!("http://{host}:{port}")) else { return };
        let get = (Method::GET, "/health");
        let answer = self.others.send(&address, get, OutgoingBody::default(), self.timeout).await;
        if let Some(other) = told.filter(|told| *told != port) {
            match answer {
                Ok(_) => check.warning(format!(
                    "its bootstrap port is {other}, and {port} is configured: right only if {port} is mapped to {other}"
                )),
                Err(_) => check.error(format!(
                    "its bootstrap port is {other}, and {port} is configured, where nobody answers: write {other} behind \
                     its URL, or no port"
                )),
            }
        } else if let Err(cause) = answer {
            check.warning(format!(
                "its bootstrap server {host}:{port} {cause}: decode servers must reach it there (see \
                 --prefill-bootstrap-host)"
            ));
        }
    }

    async fn encoder(&self, encoder: &Encoder) -> ServerCheck {
        let _permit = self.free.acquire().await;
        let mut check = ServerCheck {
            url: encoder.url().to_owned(),
            role: "encode",
            bootstrap_port: None,
            facts: None,
            findings: Vec::new(),
        };
        match encoders::check(encoder, &self.others, self.timeout).await {
            Some(Ok(())) => {}
            // Either what it has answered, or what happened to it.
            Some(Err(why)) if why.starts_with("GET ") => check.error(format!("it does not work: {why}")),
            Some(Err(why)) => check.error(format!("it {why}")),
            None => check.error("the router cannot open a connection: it has no descriptor or port left"),
        }
        check
    }
}
