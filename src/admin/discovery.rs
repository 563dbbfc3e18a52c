//! DNS discovery: resolves the configured names again and again, and makes each address a
//! server.
//!
//! A failed or empty lookup keeps the current servers: a resolver cannot tell a name without
//! addresses from a name server in trouble, and servers that are gone fail their probes
//! anyway.

use std::collections::HashSet;
use std::hash::Hash;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tracing::{info, warn};

use crate::upstream::{Address, DesiredFleet, DnsName, EncoderName, Encoders, MAX_SERVERS_PER_ROLE};

/// How long one lookup may take where nobody tries again: the resolver's own three tries take 15 s.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(20);

/// Who has names, the addresses of which are servers.
pub(crate) trait NamesServers {
    type Name: Clone + Eq + Hash + Send + 'static;

    /// The names to resolve.
    fn names(&self) -> Vec<Self::Name>;

    /// What to look up.
    fn host_and_port(name: &Self::Name) -> (&str, u16);

    /// What the servers of a name are called.
    fn kind(name: &Self::Name) -> &'static str;

    /// Sets the addresses of a name.
    fn set_addresses(&self, name: &Self::Name, addresses: Vec<Address>);
}

impl NamesServers for DesiredFleet {
    type Name = DnsName;

    fn names(&self) -> Vec<DnsName> {
        self.dns_names()
    }

    fn host_and_port(name: &DnsName) -> (&str, u16) {
        (&name.host, name.port)
    }

    fn kind(name: &DnsName) -> &'static str {
        name.role.as_str()
    }

    fn set_addresses(&self, name: &DnsName, addresses: Vec<Address>) {
        Self::set_addresses(self, name, addresses);
    }
}

impl NamesServers for Encoders {
    type Name = EncoderName;

    fn names(&self) -> Vec<EncoderName> {
        Self::names(self)
    }

    fn host_and_port(name: &EncoderName) -> (&str, u16) {
        (&name.host, name.port)
    }

    fn kind(_: &EncoderName) -> &'static str {
        "encode"
    }

    fn set_addresses(&self, name: &EncoderName, addresses: Vec<Address>) {
        Self::set_addresses(self, name, addresses);
    }
}

/// Resolves the names every `period`, for as long as it is polled.
pub(crate) async fn follow_names(servers: &impl NamesServers, period: Duration) {
    follow(servers, period, |host, port| async move {
        Ok(tokio::net::lookup_host((host, port)).await?.collect())
    })
    .await;
}

/// Resolves the names once. Returns what is wrong with those that have no addresses: the name, and why.
pub(crate) async fn resolve_names<S: NamesServers>(servers: &S) -> Vec<(String, String)> {
    let mut lookups = JoinSet::new();
    for name in servers.names() {
        let (host, port) = S::host_and_port(&name);
        let (host, shown) = (host.to_owned(), format!("{host}:{port}"));
        lookups.spawn(async move {
            let lookup = timeout(LOOKUP_TIMEOUT, tokio::net::lookup_host((host, port)));
            let late = |_| io::Error::new(io::ErrorKind::TimedOut, "no answer from the name server");
            let found = lookup.await.map_err(late).and_then(|found| Ok(found?.collect()));
            (name, shown, found)
        });
    }
    let mut failed = Vec::new();
    while let Some(joined) = lookups.join_next().await {
        let Ok((name, shown, found)) = joined else { continue };
        if let Err(why) = take(servers, &name, found) {
            failed.push((shown, why));
        }
    }
    // They come in the order in which name servers answer.
    failed.sort_unstable();
    failed
}

/// [`follow_names`] with another resolver, for tests.
async fn follow<S, F>(servers: &S, period: Duration, resolve: impl Fn(String, u16) -> F)
where
    S: NamesServers,
    F: Future<Output = io::Result<Vec<SocketAddr>>> + Send + 'static,
{
    let mut failing = HashSet::new();
    let mut rounds = interval(period);
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        rounds.tick().await;
        // Concurrently, and the next round only when all are done: getaddrinfo blocks a thread and cannot be
        // cancelled.
        let mut lookups = JoinSet::new();
        for name in servers.names() {
            let (host, port) = S::host_and_port(&name);
            let lookup = resolve(host.to_owned(), port);
            lookups.spawn(async move { (name, lookup.await) });
        }
        while let Some(joined) = lookups.join_next().await {
            // A lookup that panicked is tried again in the next round.
            let Ok((name, result)) = joined else { continue };
            apply(servers, name, result, &mut failing);
        }
    }
}

/// Publishes the result of one lookup. `failing`: the names whose failure has been logged.
fn apply<S: NamesServers>(
    servers: &S,
    name: S::Name,
    result: io::Result<Vec<SocketAddr>>,
    failing: &mut HashSet<S::Name>,
) {
    let (host, port) = S::host_and_port(&name);
    let Err(reason) = take(servers, &name, result) else {
        if failing.remove(&name) {
            info!("DNS lookup of {host}:{port} succeeds again");
        }
        return;
    };
    let kind = S::kind(&name);
    let text = format!("DNS lookup of {host}:{port} failed, keeping current {kind} servers: {reason}");
    // Logged once per outage, not in every round.
    if failing.insert(name) {
        warn!("{text}");
    }
}

/// Gives a name the addresses of a lookup. The error says why there are none.
fn take<S: NamesServers>(
    servers: &S,
    name: &S::Name,
    result: io::Result<Vec<SocketAddr>>,
) -> Result<(), String> {
    match result {
        Ok(sockets) if !sockets.is_empty() => {
            servers.set_addresses(name, addresses(sockets));
            Ok(())
        }
        Ok(_) => Err("the name has no addresses".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// The servers at these addresses, sorted: name servers rotate the order, which policies must not notice.
fn addresses(mut sockets: Vec<SocketAddr>) -> Vec<Address> {
    sockets.sort_unstable();
    sockets.dedup();
    if sockets.len() > MAX_SERVERS_PER_ROLE {
        warn!("a DNS name has {} addresses: all but {MAX_SERVERS_PER_ROLE} are ignored", sockets.len());
        sockets.truncate(MAX_SERVERS_PER_ROLE);
    }
    // Drops link-local addresses with a scope: they are not valid in a URL, and DNS does not return them.
    sockets.iter().filter_map(|socket| Address::parse(&format!("http://{socket}")).ok()).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::upstream::{FleetSpec, HealthOptions, InFlight, Random, Role};

    /// The resolver's result, as a test sets it.
    type Resolved = Arc<Mutex<Result<Vec<&'static str>, &'static str>>>;

    fn spec() -> FleetSpec {
        let second = Duration::from_secs(1);
        let health = HealthOptions {
            enabled: false,
            interval: second,
            timeout: second,
            failure_threshold: 1,
            success_threshold: 1,
            startup_interval: second,
            startup_timeout: second,
            load_poll_interval: Duration::ZERO,
        };
        let policy = Arc::new(Random);
        FleetSpec {
            prefill: Vec::new(),
            decode: Vec::new(),
            regular: Vec::new(),
            is_regular: false,
            prefill_policy: policy.clone(),
            decode_policy: policy.clone(),
            regular_policy: policy,
            is_dp_aware: false,
            health,
        }
    }

    fn urls(desired: &DesiredFleet) -> Vec<String> {
        desired.fleet().now().all().map(|server| server.url().to_owned()).collect()
    }

    /// Lets some rounds pass, in paused time.
    async fn rounds() {
        tokio::time::sleep(Duration::from_secs(60)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn servers_follow_the_addresses_and_a_failed_lookup_keeps_them() {
        let name = DnsName { role: Role::Prefill, host: "p".into(), port: 7, bootstrap_port: Some(8998) };
        let desired = DesiredFleet::new(spec(), vec![name]);
        let resolved: Resolved = Arc::new(Mutex::new(Err("no such name")));
        let shared = Arc::clone(&resolved);
        let resolve = move |host: String, port: u16| {
            assert_eq!((host.as_str(), port), ("p", 7));
            let result = shared.lock().unwrap().clone();
            async move {
                result
                    .map(|all| all.iter().map(|one| one.parse().unwrap()).collect())
                    .map_err(io::Error::other)
            }
        };
        let set = |result| *resolved.lock().unwrap() = result;
        let test = async {
            rounds().await;
            assert!(urls(&desired).is_empty());
            set(Ok(vec!["10.0.0.2:7", "[fd00::1]:7", "10.0.0.1:7", "10.0.0.2:7"]));
            rounds().await;
            let all = ["http://10.0.0.1:7", "http://10.0.0.2:7", "http://[fd00::1]:7"];
            assert_eq!(urls(&desired), all);
            let known = desired.fleet().snapshot();
            assert_eq!(known.prefill()[2].bootstrap_host(), Some("[fd00::1]"));
            assert_eq!(known.prefill()[2].bootstrap_port(), Some(8998));
            for failure in [Err("the name server does not respond"), Ok(vec![])] {
                set(failure);
                rounds().await;
                assert_eq!(urls(&desired), all);
            }
            // The first is removed with a request in flight, the second keeps its state, and a third is
            // added.
            let open = InFlight::enter(Arc::clone(&known.prefill()[0]), None);
            set(Ok(vec!["10.0.0.3:7", "10.0.0.2:7"]));
            rounds().await;
            assert_eq!(urls(&desired), ["http://10.0.0.2:7", "http://10.0.0.3:7"]);
            let now = desired.fleet().snapshot();
            assert!(Arc::ptr_eq(&now.prefill()[0], &known.prefill()[1]));
            let draining = || now.draining().map(|server| server.url().to_owned()).collect::<Vec<_>>();
            assert_eq!(draining(), ["http://10.0.0.1:7"]);
            drop(open);
            assert!(draining().is_empty());
        };
        tokio::select! {
            () = follow(&desired, Duration::from_secs(5), resolve) => unreachable!("it runs until it is dropped"),
            () = test => {}
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_an_operator_removed_stays_out_until_dns_drops_it() {
        let name = DnsName { role: Role::Decode, host: "d".into(), port: 7, bootstrap_port: None };
        let desired = DesiredFleet::new(spec(), vec![name.clone()]);
        let at = |all: &[&str]| addresses(all.iter().map(|one| one.parse().unwrap()).collect());
        desired.set_addresses(&name, at(&["10.0.0.1:7", "10.0.0.2:7"]));
        let first = desired.fleet().now().decode()[0].clone();
        desired.remove(&first).unwrap();
        desired.set_addresses(&name, at(&["10.0.0.1:7", "10.0.0.2:7", "10.0.0.3:7"]));
        assert_eq!(urls(&desired), ["http://10.0.0.2:7", "http://10.0.0.3:7"]);
        desired.set_addresses(&name, at(&["10.0.0.2:7"]));
        desired.set_addresses(&name, at(&["10.0.0.1:7", "10.0.0.2:7"]));
        assert_eq!(urls(&desired), ["http://10.0.0.1:7", "http://10.0.0.2:7"]);
        // A name that is no longer configured has no servers.
        desired.configure(spec(), Vec::new());
        desired.set_addresses(&name, at(&["10.0.0.9:7"]));
        assert!(urls(&desired).is_empty());
    }

    #[test]
    fn addresses_beyond_the_limit_are_ignored() {
        let many = (0..5_000_u32).map(|number| SocketAddr::from((number.to_be_bytes(), 7))).collect();
        assert_eq!(addresses(many).len(), MAX_SERVERS_PER_ROLE);
    }
}
