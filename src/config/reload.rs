//! What of a configuration changes while the router serves, and what waits for a restart.
//!
//! It compares and says; who takes what over is listed in `balancer`.

use std::fmt::{self, Debug};
use std::fs;
use std::path::PathBuf;

use super::{Options, Settings, TlsOptions};
use crate::admission::{AccessOptions, Secret};
use crate::tls::{ClientFiles, KeyFiles};
use crate::upstream::Role;

/// What came of a [`reload`](crate::MiniLoadBalancer::reload). Options are named as their flags are, without the
/// dashes before them; as text it is one line for a log.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Reloaded {
    /// Servers that get requests from now on.
    pub servers_added: usize,
    /// Servers that get none any more.
    pub servers_removed: usize,
    /// What holds from now on, for requests and connections that begin from now on.
    pub changed: Vec<&'static str>,
    /// What differs from what the router was started with, and cannot be changed while it runs.
    pub needs_restart: Vec<&'static str>,
}

impl fmt::Display for Reloaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { servers_added, servers_removed, changed, needs_restart } = self;
        let mut parts: Vec<String> = Vec::new();
        if servers_added + servers_removed > 0 {
            parts.push(format!("servers +{servers_added} -{servers_removed}"));
        }
        parts.extend(changed.iter().map(|&name| name.to_owned()));
        match parts.is_empty() {
            true => f.write_str("nothing has changed")?,
            false => f.write_str(&parts.join(", "))?,
        }
        if !needs_restart.is_empty() {
            write!(f, "; needs a restart: {}", needs_restart.join(", "))?;
        }
        Ok(())
    }
}

/// When another value of an option holds.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Holds {
    AtOnce,
    AfterRestart,
}

/// An option that can be compared: its flag, and its value as text that is never shown.
type Entry = (&'static str, Holds, String);

/// What changes between two configurations can be seen in.
pub(crate) struct ConfigSnapshot(Vec<Entry>);

impl ConfigSnapshot {
    pub(crate) fn of(settings: &Settings) -> Self {
        let Settings { host, port, wanted: _, names, access, options } = settings;
        let mut entries = vec![after_restart("host", host), after_restart("port", port)];
        entries.extend(access_entries(access));
        for (flag, role) in [("prefill-dns", Role::Prefill), ("decode-dns", Role::Decode)] {
            entries.push(at_once(flag, &names.iter().filter(|name| name.role == role).collect::<Vec<_>>()));
        }
        entries.extend(options.entries());
        Self(entries)
    }

    /// The options with `holds` that have another value in `new`.
    fn changed(&self, new: &Self, holds: Holds) -> Vec<&'static str> {
        let pairs = self.0.iter().zip(&new.0);
        pairs.filter(|(old, new)| old.1 == holds && old.2 != new.2).map(|(old, _)| old.0).collect()
    }

    /// What has changed since the last configuration.
    pub(crate) fn changed_at_once(&self, new: &Self) -> Vec<&'static str> {
        self.changed(new, Holds::AtOnce)
    }

    /// What is not as in the configuration that the router was started with.
    pub(crate) fn needs_restart(&self, new: &Self) -> Vec<&'static str> {
        self.changed(new, Holds::AfterRestart)
    }
}

fn at_once(flag: &'static str, value: &dyn Debug) -> Entry {
    (flag, Holds::AtOnce, format!("{value:?}"))
}

fn after_restart(flag: &'static str, value: &dyn Debug) -> Entry {
    (flag, Holds::AfterRestart, format!("{value:?}"))
}

impl Options {
    /// Every option, so that a new one cannot be forgotten here.
    fn entries(&self) -> Vec<Entry> {
        let mut entries = self.tls.entries();
        entries.extend(self.plain_entries());
        entries
    }

    fn plain_entries(&self) -> Vec<Entry> {
        let Self {
            prefill_policy: _,
            prefill_policy_kind,
            decode_policy: _,
            decode_policy_kind,
            max_payload_size,
            max_merge_size,
            request_timeout,
            stream_idle_timeout,
            max_retries,
            retry_on,
            request_head_timeout,
            request_body_idle_timeout,
            client_idle_timeout,
            shutdown_lame_duck,
            shutdown_grace_period,
            health,
            sockets,
            discovery,
            worker_threads,
            admin,
            keys: _,
            gate,
            tls,
            report,
        } = self;
        let entries = vec![
            at_once("prefill-policy", prefill_policy_kind),
            at_once("decode-policy", decode_policy_kind),
            at_once("max-payload-size", max_payload_size),
            at_once("max-merge-size", max_merge_size),
            at_once("request-timeout-secs", request_timeout),
            at_once("stream-idle-timeout-secs", stream_idle_timeout),
            at_once("retry-max-retries", max_retries),
            at_once("retry-on-status", retry_on),
            at_once("request-head-timeout-secs", request_head_timeout),
            at_once("request-body-idle-timeout-secs", request_body_idle_timeout),
            at_once("client-idle-timeout-secs", client_idle_timeout),
            at_once("shutdown-lame-duck-secs", shutdown_lame_duck),
            at_once("shutdown-grace-period-secs", shutdown_grace_period),
            at_once("disable-health-check", &health.enabled),
            at_once("health-check-interval-secs", &health.interval),
            at_once("health-check-timeout-secs", &health.timeout),
            at_once("health-failure-threshold", &health.failure_threshold),
            at_once("health-success-threshold", &health.success_threshold),
            at_once("worker-startup-timeout-secs", &health.startup_timeout),
            at_once("worker-startup-check-interval", &health.startup_interval),
            after_restart("dns-interval-secs", &discovery.interval),
            at_once("max-concurrent-requests", &gate.max_concurrent),
            at_once("queue-size", &gate.queue_size),
            at_once("queue-timeout-secs", &gate.queue_timeout),
            at_once("rate-limit-tokens-per-second", &gate.rate),
            at_once("max-in-flight-per-prefill", &gate.caps.prefill),
            at_once("max-in-flight-per-decode", &gate.caps.decode),
            after_restart("http2", &tls.http2),
            after_restart("http2-max-streams", &tls.http2_max_streams),
            after_restart("connect-timeout-secs", &sockets.connect_timeout),
            after_restart("backend-idle-timeout-secs", &sockets.idle_timeout),
            after_restart("max-idle-per-backend", &sockets.max_idle),
            after_restart("socket-buffer-size", &sockets.buffer_size),
            after_restart("http1-engine", &sockets.engine),
            after_restart("worker-threads", worker_threads),
            after_restart("prometheus-host", &admin.as_ref().map(|admin| &admin.host)),
            after_restart("prometheus-port", &admin.as_ref().map(|admin| (admin.port, admin.must))),
            after_restart("access-log", &report.access_log),
            after_restart("request-id-headers", &report.request_id_headers),
        ];
        #[cfg(feature = "otel")]
        let entries = [entries, vec![after_restart("otlp-traces-endpoint", &report.traces)]].concat();
        entries
    }
}

/// Keys are compared as the text that they are.
fn access_entries(access: &AccessOptions) -> Vec<Entry> {
    let AccessOptions { client_keys, admin_key, worker_key, worker_key_replaces, origins } = access;
    let text = |key: &Secret| key.to_header().as_bytes().to_vec();
    vec![
        at_once("api-key", &client_keys.iter().map(text).collect::<Vec<_>>()),
        at_once("admin-api-key", &admin_key.as_ref().map(text)),
        at_once("worker-api-key", &worker_key.as_ref().map(text)),
        at_once("worker-api-key-replaces-authorization", worker_key_replaces),
        at_once("cors-allowed-origins", origins),
    ]
}

impl TlsOptions {
    /// Certificates and keys are what is in their files. Whether there is TLS at all cannot change.
    fn entries(&self) -> Vec<Entry> {
        let content = |path: &PathBuf| fs::read(path).ok();
        let certs = |pair: &Option<KeyFiles>| pair.as_ref().map(|pair| content(&pair.cert));
        let keys = |pair: &Option<KeyFiles>| pair.as_ref().map(|pair| content(&pair.key));
        let TlsOptions { files, client_files: ClientFiles { cas, own }, .. } = self;
        vec![
            after_restart("tls-cert-path", &files.is_some()),
            at_once("tls-cert-path", &certs(files)),
            at_once("tls-key-path", &keys(files)),
            at_once("ca-cert-paths", &cas.iter().map(content).collect::<Vec<_>>()),
            at_once("client-cert-path", &certs(own)),
            at_once("client-key-path", &keys(own)),
        ]
    }
}
