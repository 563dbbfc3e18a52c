//! Follows DNS names: each of their addresses is a server.
//!
//! A resolver cannot tell a name without addresses from a name server in trouble,
//! so a lookup that brings nothing changes nothing: servers that are gone fail
//! their probes and get no requests anyway.

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};
use tracing::{info, warn};

use crate::upstream::{Address, DesiredFleet, DnsName, MAX_SERVERS_PER_ROLE};

/// Follows the names for as long as it is polled.
pub(crate) async fn follow_names(members: &DesiredFleet, every: Duration) {
    follow(
        members,
        every,
        |host, port| async move { Ok(tokio::net::lookup_host((host, port)).await?.collect()) },
    )
    .await;
}

/// As [`follow_names`], with a resolver of the caller's.
async fn follow<F>(members: &DesiredFleet, every: Duration, resolve: impl Fn(String, u16) -> F)
where
    F: Future<Output = io::Result<Vec<SocketAddr>>> + Send + 'static,
{
    let mut failing = HashSet::new();
    let mut rounds = interval(every);
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        rounds.tick().await;
        // All at the same time, and the next round when each has an answer: a lookup cannot be called off.
        let mut lookups = JoinSet::new();
        for name in members.names() {
            let lookup = resolve(name.host.clone(), name.port);
            lookups.spawn(async move { (name, lookup.await) });
        }
        while let Some(lookup) = lookups.join_next().await {
            let Ok((name, result)) = lookup else { continue };
            take(members, name, result, &mut failing);
        }
    }
}

fn take(
    members: &DesiredFleet,
    name: DnsName,
    result: io::Result<Vec<SocketAddr>>,
    failing: &mut HashSet<DnsName>,
) {
    let why = match result {
        Ok(sockets) if !sockets.is_empty() => {
            if failing.remove(&name) {
                info!("{}:{} has addresses again", name.host, name.port);
            }
            return members.found(&name, addresses(sockets));
        }
        Ok(_) => "it has no address".to_owned(),
        Err(error) => error.to_string(),
    };
    let text = format!("{}:{} is not resolved, its {} servers stay: {why}", name.host, name.port, name.role);
    // Once, and not every few seconds.
    if failing.insert(name) {
        warn!("{text}");
    }
}

/// The servers at these addresses, in an order that does not depend on the name server's.
fn addresses(mut sockets: Vec<SocketAddr>) -> Vec<Address> {
    sockets.sort_unstable();
    sockets.dedup();
    if sockets.len() > MAX_SERVERS_PER_ROLE {
        warn!("a name has {} addresses; {MAX_SERVERS_PER_ROLE} of them are taken", sockets.len());
        sockets.truncate(MAX_SERVERS_PER_ROLE);
    }
    // A link-local address with a scope is no URL's host, and no name server's answer either.
    sockets.iter().filter_map(|socket| Address::parse(&format!("http://{socket}")).ok()).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::upstream::{FleetSpec, HealthOptions, InFlight, Random, Role};

    /// What the resolver says, as a test changes it.
    type Script = Arc<Mutex<Result<Vec<&'static str>, &'static str>>>;

    fn wanted() -> FleetSpec {
        let second = Duration::from_secs(1);
        let health = HealthOptions {
            enabled: false,
            interval: second,
            timeout: second,
            failure_threshold: 1,
            success_threshold: 1,
            startup_interval: second,
            startup_timeout: second,
        };
        let policy = Arc::new(Random);
        FleetSpec {
            prefill: Vec::new(),
            decode: Vec::new(),
            prefill_policy: policy.clone(),
            decode_policy: policy,
            health,
        }
    }

    fn urls(members: &DesiredFleet) -> Vec<String> {
        members.fleet().now().all().map(|server| server.url().to_owned()).collect()
    }

    /// Lets some rounds go by, in a time that does not pass.
    async fn rounds() {
        tokio::time::sleep(Duration::from_secs(60)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn addresses_come_and_go_and_a_lookup_that_brings_nothing_changes_nothing() {
        let name = DnsName { role: Role::Prefill, host: "p".into(), port: 7, bootstrap_port: Some(8998) };
        let members = DesiredFleet::new(wanted(), vec![name]);
        let script: Script = Arc::new(Mutex::new(Err("no such name")));
        let said = Arc::clone(&script);
        let resolve = move |host: String, port: u16| {
            assert_eq!((host.as_str(), port), ("p", 7));
            let said = said.lock().unwrap().clone();
            async move {
                said.map(|all| all.iter().map(|one| one.parse().unwrap()).collect()).map_err(io::Error::other)
            }
        };
        let tell = |said| *script.lock().unwrap() = said;
        let test = async {
            rounds().await;
            assert!(urls(&members).is_empty());
            tell(Ok(vec!["10.0.0.2:7", "[fd00::1]:7", "10.0.0.1:7", "10.0.0.2:7"]));
            rounds().await;
            let all = ["http://10.0.0.1:7", "http://10.0.0.2:7", "http://[fd00::1]:7"];
            assert_eq!(urls(&members), all);
            let known = members.fleet().snapshot();
            assert_eq!(known.prefill()[2].bootstrap_host(), Some("[fd00::1]"));
            assert_eq!(known.prefill()[2].bootstrap_port(), Some(8998));
            for nothing in [Err("the name server is away"), Ok(vec![])] {
                tell(nothing);
                rounds().await;
                assert_eq!(urls(&members), all);
            }
            // One is gone that has a request; another is new; the third stays who it is.
            let open = InFlight::enter(Arc::clone(&known.prefill()[0]));
            tell(Ok(vec!["10.0.0.3:7", "10.0.0.2:7"]));
            rounds().await;
            assert_eq!(urls(&members), ["http://10.0.0.2:7", "http://10.0.0.3:7"]);
            let now = members.fleet().snapshot();
            assert!(Arc::ptr_eq(&now.prefill()[0], &known.prefill()[1]));
            let draining = || now.draining().map(|server| server.url().to_owned()).collect::<Vec<_>>();
            assert_eq!(draining(), ["http://10.0.0.1:7"]);
            drop(open);
            assert!(draining().is_empty());
        };
        tokio::select! {
            () = follow(&members, Duration::from_secs(5), resolve) => unreachable!("it follows for ever"),
            () = test => {}
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_operators_say_of_an_address_holds_until_it_is_gone() {
        let name = DnsName { role: Role::Decode, host: "d".into(), port: 7, bootstrap_port: None };
        let members = DesiredFleet::new(wanted(), vec![name.clone()]);
        let at = |all: &[&str]| addresses(all.iter().map(|one| one.parse().unwrap()).collect());
        members.found(&name, at(&["10.0.0.1:7", "10.0.0.2:7"]));
        let first = members.fleet().now().decode()[0].clone();
        members.remove(&first).unwrap();
        members.found(&name, at(&["10.0.0.1:7", "10.0.0.2:7", "10.0.0.3:7"]));
        assert_eq!(urls(&members), ["http://10.0.0.2:7", "http://10.0.0.3:7"]);
        members.found(&name, at(&["10.0.0.2:7"]));
        members.found(&name, at(&["10.0.0.1:7", "10.0.0.2:7"]));
        assert_eq!(urls(&members), ["http://10.0.0.1:7", "http://10.0.0.2:7"]);
        // A name that is configured no more has no servers.
        members.configure(wanted(), Vec::new());
        members.found(&name, at(&["10.0.0.9:7"]));
        assert!(urls(&members).is_empty());
    }

    #[test]
    fn a_name_of_thousands_of_addresses_is_cut() {
        let many = (0..5_000_u32).map(|number| SocketAddr::from((number.to_be_bytes(), 7))).collect();
        assert_eq!(addresses(many).len(), MAX_SERVERS_PER_ROLE);
    }
}
