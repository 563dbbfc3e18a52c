//! Which pods of a Kubernetes cluster are servers: their labels, namespace and port.
//!
//! Nothing is asked here (`admin` follows the pods), and no flag is read.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::Role;

/// The labels that a pod must have, all of them.
pub(crate) type PodLabels = BTreeMap<String, String>;

/// Pods that are servers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodSource {
    /// `None`: all namespaces.
    pub(crate) namespace: Option<String>,
    /// The port of every server.
    pub(crate) port: u16,
    /// The labels of the pods of each role. The first that a pod matches is its role.
    pub(crate) selectors: Vec<(Role, PodLabels)>,
}

impl PodSource {
    /// The role of a pod with these labels.
    pub(crate) fn role(&self, labels: &PodLabels) -> Option<Role> {
        let matches =
            |selector: &PodLabels| selector.iter().all(|(key, value)| labels.get(key) == Some(value));
        self.selectors.iter().find(|(_, selector)| matches(selector)).map(|(role, _)| *role)
    }

    /// Where the API server has the pods.
    pub(crate) fn path(&self) -> String {
        match &self.namespace {
            Some(namespace) => format!("/api/v1/namespaces/{namespace}/pods"),
            None => "/api/v1/pods".to_owned(),
        }
    }

    /// A label selector for the API server that every pod of a role matches, and few others: the keys that
    /// all selectors have, with the values of any. One for all roles, so that a pod which changes its role is
    /// one event and not two of two watches.
    pub(crate) fn label_selector(&self) -> String {
        let Some((_, first)) = self.selectors.first() else { return String::new() };
        let values_of = |key: &String| {
            let values = self.selectors.iter().map(|(_, selector)| selector.get(key));
            values.collect::<Option<BTreeSet<&String>>>()
        };
        let requirement = |key: &String| {
            let values: Vec<&str> = values_of(key)?.into_iter().map(String::as_str).collect();
            Some(match values.as_slice() {
                [value] => format!("{key}={value}"),
                values => format!("{key} in ({})", values.join(",")),
            })
        };
        first.keys().filter_map(requirement).collect::<Vec<_>>().join(",")
    }
}

/// As a sentence names them: `pods with role=prefill (prefill) or role=decode (decode) in namespace llm`.
impl fmt::Display for PodSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("pods with ")?;
        for (place, (role, labels)) in self.selectors.iter().enumerate() {
            let labels: Vec<String> = labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
            let gap = if place == 0 { "" } else { " or " };
            write!(f, "{gap}{} ({role})", labels.join(","))?;
        }
        match &self.namespace {
            Some(namespace) => write!(f, " in namespace {namespace}"),
            None => f.write_str(" in all namespaces"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(selectors: &[(Role, &[(&str, &str)])]) -> PodSource {
        let owned = |labels: &[(&str, &str)]| {
            labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
        };
        let selectors = selectors.iter().map(|(role, labels)| (*role, owned(labels))).collect();
        PodSource { namespace: None, port: 30_000, selectors }
    }

    #[test]
    fn the_api_server_is_asked_for_what_the_selectors_have_in_common() {
        for (selectors, expected) in [
            (&[(Role::Regular, &[("app", "sglang"), ("tier", "a")][..])][..], "app=sglang,tier=a"),
            (
                &[
                    (Role::Prefill, &[("app", "s"), ("role", "p")]),
                    (Role::Decode, &[("app", "s"), ("role", "d")]),
                ],
                "app=s,role in (d,p)",
            ),
            // A pod may have one of the two keys only.
            (&[(Role::Prefill, &[("is-prefill", "1")]), (Role::Decode, &[("is-decode", "1")])], ""),
            (&[(Role::Prefill, &[("a", "1"), ("b", "2")]), (Role::Decode, &[("a", "1")])], "a=1"),
            (&[(Role::Decode, &[("empty", "")])], "empty="),
        ] {
            assert_eq!(source(selectors).label_selector(), expected);
        }
    }

    #[test]
    fn a_pod_has_the_first_role_whose_labels_it_has_all_of() {
        let both =
            source(&[(Role::Prefill, &[("app", "s"), ("role", "p")]), (Role::Decode, &[("app", "s")])]);
        let role = |labels: &[(&str, &str)]| {
            let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
            both.role(&labels.iter().map(owned).collect())
        };
        assert_eq!(role(&[("app", "s"), ("role", "p"), ("other", "x")]), Some(Role::Prefill));
        assert_eq!(role(&[("app", "s"), ("role", "q")]), Some(Role::Decode));
        assert_eq!(role(&[("role", "p")]), None);
        assert_eq!(role(&[]), None);
        assert_eq!(both.to_string(), "pods with app=s,role=p (prefill) or app=s (decode) in all namespaces");
    }
}
