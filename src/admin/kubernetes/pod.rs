//! A pod as the API server sends it, and whether it is a server.
//!
//! Of the 10 to 20 KB of a pod only these fields are kept.

use std::net::{IpAddr, SocketAddr};

use serde::Deserialize;

use crate::upstream::{Address, PodLabels, PodSource, Role, ServerSpec};

/// Where a prefill server's bootstrap port is, as for sglang_router.
const BOOTSTRAP_ANNOTATION: &str = "sglang.ai/bootstrap-port";

/// Most characters of a name or a value in a log line: Kubernetes' names have 253 at most.
const MAX_SHOWN: usize = 253;

/// The fields of a pod that are read. What is missing or `null` is as Kubernetes means it: not set.
#[derive(Debug, Clone, Default, Deserialize)]
pub(super) struct Pod {
    pub(super) metadata: PodMetadata,
    status: Option<PodStatus>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PodMetadata {
    pub(super) name: String,
    pub(super) namespace: Option<String>,
    pub(super) uid: Option<String>,
    pub(super) resource_version: Option<String>,
    /// RFC 3339 in UTC with whole seconds, so that the texts have the order of the times.
    pub(super) creation_timestamp: Option<String>,
    deletion_timestamp: Option<String>,
    labels: Option<PodLabels>,
    annotations: Option<PodLabels>,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct PodStatus {
    phase: Option<String>,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    conditions: Option<Vec<PodCondition>>,
}

#[derive(Debug, Clone, Deserialize)]
struct PodCondition {
    #[serde(rename = "type")]
    name: String,
    status: String,
}

/// What a pod is to the router.
#[derive(Debug, Clone)]
pub(super) enum Verdict {
    /// No server: its labels are not asked for, or it is not ready, or it is terminating.
    Absent,
    /// It would be a server but for this error in it.
    Refused(String),
    Server {
        address: IpAddr,
        spec: ServerSpec,
    },
}

impl Pod {
    /// What it is to the router.
    pub(super) fn judge(&self, source: &PodSource) -> Verdict {
        let no_labels = PodLabels::new();
        let role = source.role(self.metadata.labels.as_ref().unwrap_or(&no_labels));
        let (Some(role), true) = (role, self.is_serving()) else { return Verdict::Absent };
        // A pod is ready only once it has an address.
        let Some(text) = self.address() else { return Verdict::Absent };
        let Ok(address) = text.parse::<IpAddr>() else {
            return Verdict::Refused(format!("its podIP {} is not an address", shown(text)));
        };
        let bootstrap_port = match self.bootstrap_port(role) {
            Ok(port) => port,
            Err(text) => {
                let text = shown(text);
                return Verdict::Refused(format!(
                    "its annotation {BOOTSTRAP_ANNOTATION} {text} is not a port between 1 and 65535"
                ));
            }
        };
        // Written by std, with brackets around IPv6.
        match Address::parse(&format!("http://{}", SocketAddr::new(address, source.port))) {
            Ok(parsed) => Verdict::Server { address, spec: ServerSpec::new(role, parsed, bootstrap_port) },
            Err(why) => Verdict::Refused(format!("its podIP {}: {why}", shown(text))),
        }
    }

    #[cfg(test)]
    pub(super) fn set_address(&mut self, address: impl Into<IpAddr>) {
        let address: IpAddr = address.into();
        self.status.get_or_insert_default().pod_ip = Some(address.to_string());
    }

    /// How a log line names it.
    pub(super) fn shown_name(&self) -> String {
        let PodMetadata { name, namespace, .. } = &self.metadata;
        shown(&format!("{}/{name}", namespace.as_deref().unwrap_or_default()))
    }

    /// Whether it gets requests: as the endpoints of a service, and never a pod that has ended, whose address
    /// may be another's by now.
    fn is_serving(&self) -> bool {
        let Some(status) = &self.status else { return false };
        let has_ended = matches!(status.phase.as_deref(), Some("Failed" | "Succeeded"));
        let is_ready = |condition: &PodCondition| condition.name == "Ready" && condition.status == "True";
        self.metadata.deletion_timestamp.is_none()
            && !has_ended
            && status.conditions.iter().flatten().any(is_ready)
    }

    fn address(&self) -> Option<&str> {
        self.status.as_ref()?.pod_ip.as_deref().filter(|address| !address.is_empty())
    }

    /// The port of the annotation, if there is one. The error is its value. Only prefill servers have one.
    fn bootstrap_port(&self, role: Role) -> Result<Option<u16>, &str> {
        let annotations = self.metadata.annotations.as_ref().filter(|_| role == Role::Prefill);
        let Some(text) = annotations.and_then(|all| all.get(BOOTSTRAP_ANNOTATION)) else { return Ok(None) };
        // `parse` would take a sign.
        let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
        match text.parse() {
            Ok(port) if is_number && port > 0 => Ok(Some(port)),
            _ => Err(text),
        }
    }
}

/// Text of the API server in one line of any log. The program's own log escapes what it writes.
pub(super) fn shown(text: &str) -> String {
    let mut shown = String::new();
    for character in text.chars().take(MAX_SHOWN) {
        match character.is_control() {
            true => shown.extend(character.escape_debug()),
            false => shown.push(character),
        }
    }
    shown
}
