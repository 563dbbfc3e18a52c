//! What fits and what does not: a server's answer, what it says of itself, and what it says
//! beside the others.
//!
//! Each sentence says what to change. Nothing is asked here.

use std::collections::{BTreeMap, BTreeSet};

use hyper::StatusCode;

use super::server_facts::NoFacts;
use super::{Finding, FleetCheck, ServerCheck, ServerFacts};
use crate::error::{Cause, Error};
use crate::http1::{HeaderId, ResponseHead};
use crate::upstream::{Address, Role};

/// Why a server could not be asked, and what to look at.
pub(super) fn unreachable(error: &Error, address: &Address) -> String {
    let Error::Upstream { cause, .. } = error else { return format!("it cannot be asked: {error}") };
    let said = cause.to_string();
    let is_https = address.tls_name.is_some();
    let hint = match cause {
        // Says itself which certificate is at fault, and how.
        Cause::Connect(_) if said.contains("TLS: what it sent is not TLS") => "; write its URL with http://",
        Cause::Connect(_) if said.contains("TLS: ") => "",
        Cause::Connect(_) => "; is it started, and are its host and port right?",
        Cause::ConnectTimeout(_) => "; a firewall or a wrong address would look like this",
        Cause::BadResponse(_) | Cause::Closed(_) if !is_https => {
            "; it speaks no HTTP, or TLS: then write its URL with https://"
        }
        _ => "",
    };
    format!("it {said}{hint}")
}

/// The description in a server's answer, or what is wrong with the answer.
pub(super) fn described(
    path: &str,
    head: &ResponseHead,
    body: &[u8],
    has_key: bool,
) -> Result<ServerFacts, String> {
    let asked = format!("GET {path} returned {}", head.status.as_u16());
    match head.status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if has_key => {
            return Err(format!("it refuses the key: {asked}; --worker-api-key must be its --api-key"));
        }
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            return Err(format!("it wants a key: {asked}; give its --api-key with --worker-api-key"));
        }
        StatusCode::SERVICE_UNAVAILABLE => return Err(format!("it is not ready: {asked}")),
        StatusCode::NOT_FOUND => {
            return Err(format!(
                "{asked}, as /server_info did: it is no SGLang server, or its base path is wrong; an \
                 encoder goes to --encode"
            ));
        }
        status if !status.is_success() => return Err(format!("it does not describe itself: {asked}")),
        _ => {}
    }
    ServerFacts::parse(body).map_err(|why| match why {
        NoFacts::NotJson => {
            let kind = head.headers.all(HeaderId::ContentType).next().unwrap_or(b"no content type");
            let kind = String::from_utf8_lossy(&kind[..kind.len().min(64)]);
            format!("it is no SGLang server: {asked} with {kind} and no JSON object")
        }
        NoFacts::Router => {
            format!("it is a router, not a server: {asked} with the descriptions of several servers")
        }
        NoFacts::Unknown => {
            format!("it is no SGLang server: {asked} without version, model_path or disaggregation_mode")
        }
    })
}

/// What a server says of itself against its place in the configuration.
pub(super) fn own(check: &mut ServerCheck, role: Role, told: &ServerFacts) {
    let flag = flag(role);
    if told.is_encoder {
        check.error(format!(
            "it is an encoder (--encoder-only) and is given with {flag}: give it with --encode"
        ));
    }
    let Some(mode) = told.mode.as_deref() else {
        return check.warning(
            "it does not say its --disaggregation-mode: its version is too old to tell whether it fits",
        );
    };
    let given = format!("it is given with {flag} and was started");
    match (role, mode) {
        (Role::Prefill, "prefill") | (Role::Decode, "decode") | (Role::Regular, "null") => {}
        (Role::Regular, _) => check.error(format!(
            "{given} with --disaggregation-mode {mode}: it would wait for the other server of a pair; use --prefill and \
             --decode"
        )),
        (_, "null") => check.error(format!(
            "{given} without --disaggregation-mode: start it with --disaggregation-mode {role}, or give it with \
             --worker-urls"
        )),
        (_, "prefill" | "decode") => {
            check.error(format!("{given} with --disaggregation-mode {mode}: give it with --{mode}"));
        }
        _ => check.error(format!("{given} with --disaggregation-mode {mode}, which mini-lb does not know")),
    }
    if role == Role::Decode && told.language_only == Some(true) {
        check.warning("it is language-only, as prefill servers are: it has media encoded a second time");
    }
}

fn flag(role: Role) -> &'static str {
    match role {
        Role::Prefill => "--prefill",
        Role::Decode => "--decode",
        Role::Regular => "--worker-urls",
    }
}

/// What servers say beside each other.
pub(super) fn between(check: &mut FleetCheck, roles: &[Role]) {
    for role in roles {
        if !check.servers.iter().any(|server| server.role == role.as_str()) {
            let text = format!("there is no {role} server: requests get 503 ({} names one)", flag(*role));
            check.findings.push(Finding::new(false, text));
        }
    }
    let servers = &mut check.servers;
    differ(
        servers,
        |told| told.model.clone(),
        |server, other, most| {
            server.error(format!("it serves the model {other}, and most others serve {most}"));
        },
    );
    let is_pair = !roles.contains(&Role::Regular);
    if is_pair {
        caches(servers);
        hosts(servers);
    }
    encoders(check);
    versions(check);
    sizes(check);
}

/// What must be the same for a KV cache to be sent from one server to another: SGLang's decode server raises
/// an error at its first request otherwise.
fn caches(servers: &mut [ServerCheck]) {
    differ(
        servers,
        |told| told.transfer_backend.clone(),
        |server, other, most| {
            server.error(format!(
                "its --disaggregation-transfer-backend is {other}, and that of most others is {most}"
            ));
        },
    );
    let page_size =
        |told: &ServerFacts| told.page_size.filter(|_| !told.has_hisparse).map(|size| size.to_string());
    differ(servers, page_size, |server, other, most| {
        server.error(format!(
            "its --page-size is {other}, and that of most others is {most}: no KV cache can be sent"
        ));
    });
    differ(
        servers,
        |told| told.kv_cache_dtype.clone(),
        |server, other, most| {
            let text = format!("its --kv-cache-dtype is {other}, and that of most others is {most}");
            match [other, most].contains(&"auto") {
                // It may come to the same.
                true => server.warning(text),
                false => server.error(format!("{text}: no KV cache can be sent")),
            }
        },
    );
}

/// Calls back for each server whose value is not that of most: of two that are as frequent, not that of the
/// first server.
fn differ(
    servers: &mut [ServerCheck],
    value: impl Fn(&ServerFacts) -> Option<String>,
    mut report: impl FnMut(&mut ServerCheck, &str, &str),
) {
    let values: Vec<Option<String>> =
        servers.iter().map(|server| server.facts.as_ref().and_then(&value)).collect();
    let count = |wanted: &String| values.iter().flatten().filter(|value| *value == wanted).count();
    // The last of several maxima would be taken otherwise.
    let Some(most) = values.iter().flatten().rev().max_by_key(|value| count(value)) else { return };
    for (server, value) in servers.iter_mut().zip(&values) {
        if let Some(other) = value.as_ref().filter(|value| *value != most) {
            report(server, other, most);
        }
    }
}

/// A prefill server at a loopback address, where a decode server on another machine looks on its own.
fn hosts(servers: &mut [ServerCheck]) {
    let is_far = servers.iter().any(|server| server.role == "decode" && !is_loopback(&server.url));
    let near = servers.iter_mut().filter(|server| server.role == "prefill" && is_loopback(&server.url));
    for server in near.filter(|_| is_far) {
        server.warning(
            "its host is this machine's loopback address, and decode servers are elsewhere: unless \
             --prefill-bootstrap-host names another one, they look for it on their own machine",
        );
    }
}

fn is_loopback(url: &str) -> bool {
    let host = Address::parse(url).map(|address| address.host).unwrap_or_default();
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    bare == "localhost" || bare.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Media are encoded by encoders exactly where there are both encoders and servers that want them.
fn encoders(check: &mut FleetCheck) {
    let has_encoders = check.servers.iter().any(|server| server.role == "encode");
    let servers = check.servers.iter_mut().filter(|server| ["prefill", "regular"].contains(&server.role));
    for server in servers {
        match server.facts.as_ref().and_then(|told| told.language_only) {
            Some(true) if !has_encoders => server.warning(
                "it is language-only, and no encoder is given with --encode: unless its own --encoder-urls has some, \
                 requests with images, audio or video fail",
            ),
            Some(false) if has_encoders && server.role == "prefill" => {
                server.warning("it is not language-only: it encodes media itself and takes no encoders");
            }
            _ => {}
        }
    }
}

/// Different versions work together as long as their transfer of the KV cache does: a rolling upgrade.
fn versions(check: &mut FleetCheck) {
    let mut versions: BTreeMap<&str, BTreeMap<&str, usize>> = BTreeMap::new();
    for server in &check.servers {
        if let Some(version) = server.facts.as_ref().and_then(|told| told.version.as_deref()) {
            *versions.entry(version).or_default().entry(server.role).or_default() += 1;
        }
    }
    if versions.len() < 2 {
        return;
    }
    let of = |(version, roles): (&&str, &BTreeMap<&str, usize>)| {
        let counts: Vec<String> = roles.iter().map(|(role, count)| format!("{count} {role}")).collect();
        format!("{version} ({})", counts.join(", "))
    };
    let all = versions.iter().map(of).collect::<Vec<_>>().join(", ");
    check.findings.push(Finding::new(true, format!("servers run different versions of SGLang: {all}")));
}

/// Servers of one role that are not equally large.
fn sizes(check: &mut FleetCheck) {
    let mut found = Vec::new();
    for role in ["prefill", "decode", "regular"] {
        let told =
            || check.servers.iter().filter(|server| server.role == role).filter_map(|one| one.facts.as_ref());
        for (name, sizes) in [
            ("dp_size", told().filter_map(|told| told.dp_size).collect::<BTreeSet<u64>>()),
            ("tp_size", told().filter_map(|told| told.tp_size).collect()),
        ] {
            if sizes.len() > 1 {
                let all = sizes.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
                found.push(format!("{role} servers differ in {name}: {all}"));
            }
        }
    }
    check.findings.extend(found.into_iter().map(|text| Finding::new(true, text)));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(role: &'static str, url: &str, told: ServerFacts) -> ServerCheck {
        ServerCheck { url: url.into(), role, bootstrap_port: None, facts: Some(told), findings: Vec::new() }
    }

    fn pair(prefill: ServerFacts, decode: ServerFacts) -> FleetCheck {
        let servers = vec![
            server("prefill", "http://10.0.0.1:1", prefill),
            server("decode", "http://10.0.0.2:1", decode),
        ];
        let mut check = FleetCheck { servers, findings: Vec::new() };
        between(&mut check, &[Role::Prefill, Role::Decode]);
        check
    }

    fn texts(check: &FleetCheck) -> Vec<(bool, String)> {
        let all = check.servers.iter().flat_map(|server| &server.findings).chain(&check.findings);
        all.map(|finding| (finding.is_warning, finding.text.clone())).collect()
    }

    #[test]
    fn what_a_kv_cache_needs_must_be_the_same_on_both_sides() {
        let same = ServerFacts {
            page_size: Some(64),
            kv_cache_dtype: Some("auto".into()),
            ..ServerFacts::default()
        };
        assert_eq!(texts(&pair(same.clone(), same.clone())), []);
        let other = ServerFacts { page_size: Some(1), ..same.clone() };
        let [(false, text)] = &texts(&pair(same.clone(), other.clone()))[..] else { panic!() };
        assert!(text.contains("--page-size is 1"), "{text}");
        // A decode server with HiSparse has pages of its own.
        assert!(pair(same.clone(), ServerFacts { has_hisparse: true, ..other }).fits());
        let typed = |name: &str| ServerFacts { kv_cache_dtype: Some(name.into()), ..same.clone() };
        assert!(pair(same.clone(), typed("fp8_e5m2")).fits(), "auto may be the same");
        assert!(!pair(typed("fp8_e4m3"), typed("fp8_e5m2")).fits());
    }

    #[test]
    fn the_one_that_differs_from_most_is_the_one_that_does_not_fit() {
        let model = |name: &str| ServerFacts { model: Some(name.into()), ..ServerFacts::default() };
        let mut servers: Vec<ServerCheck> = ["b", "a", "a", "c"]
            .into_iter()
            .map(|name| server("regular", "http://10.0.0.1:1", model(name)))
            .collect();
        let mut odd = Vec::new();
        differ(
            &mut servers,
            |told| told.model.clone(),
            |_, other, most| odd.push(format!("{other}!={most}")),
        );
        assert_eq!(odd, ["b!=a", "c!=a"]);
        let mut odd = Vec::new();
        differ(
            &mut servers[..2],
            |told| told.model.clone(),
            |_, other, most| odd.push(format!("{other}!={most}")),
        );
        assert_eq!(odd, ["a!=b"]);
    }

    #[test]
    fn versions_and_sizes_are_a_warning() {
        let sized = |version: &str, dp_size| ServerFacts {
            version: Some(version.into()),
            dp_size: Some(dp_size),
            ..ServerFacts::default()
        };
        let check = pair(sized("0.5.21", 2), sized("0.5.23", 1));
        assert_eq!(
            texts(&check),
            [(
                true,
                "servers run different versions of SGLang: 0.5.21 (1 prefill), 0.5.23 (1 decode)".into()
            )]
        );
    }

    #[test]
    fn a_loopback_address_is_of_no_use_to_decode_servers_elsewhere() {
        let told = ServerFacts::default;
        for (prefill, decode, is_warned) in [
            ("http://127.0.0.1:1", "http://10.0.0.2:1", true),
            ("http://[::1]:1", "http://decode:1", true),
            ("http://localhost:1", "http://127.0.0.1:2", false),
            ("http://10.0.0.1:1", "http://10.0.0.2:1", false),
        ] {
            let mut servers = [server("prefill", prefill, told()), server("decode", decode, told())];
            hosts(&mut servers);
            assert_eq!(!servers[0].findings.is_empty(), is_warned, "{prefill}");
        }
    }
}
