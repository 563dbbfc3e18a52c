//! Servers that are pods of a Kubernetes cluster.

use super::{ConfigError, Options};
use crate::options::PodOptions;
use crate::upstream::{PodLabels, PodSource, Role};

/// The port of servers, as in sglang_router.
const DEFAULT_PORT: u16 = 80;
/// Longest name of a label (without its prefix), longest value, and longest name of a namespace: Kubernetes'
/// own limits.
const MAX_NAME: usize = 63;
/// Longest prefix of a label's name.
const MAX_PREFIX: usize = 253;
/// Most labels of a selector. They are a part of a URL.
const MAX_LABELS: usize = 16;

impl Options {
    /// The pods that are servers, if the options name any that can be.
    pub(super) fn pod_source(&self) -> Result<Option<PodSource>, ConfigError> {
        self.pods.source()
    }
}

impl PodOptions {
    fn source(&self) -> Result<Option<PodSource>, ConfigError> {
        let given = [
            ("--selector", Role::Regular, &self.selector),
            ("--prefill-selector", Role::Prefill, &self.prefill_selector),
            ("--decode-selector", Role::Decode, &self.decode_selector),
        ];
        let given: Vec<_> = given.into_iter().filter(|(_, _, words)| !words.is_empty()).collect();
        if !self.is_on {
            return self.refuse_without_switch(given.first().map(|(flag, _, _)| *flag));
        }
        let selectors: Result<Vec<_>, _> =
            given.iter().map(|(flag, role, words)| Ok((*role, labels(flag, words)?))).collect();
        let selectors: Vec<(Role, PodLabels)> = selectors?;
        let error = |sentence: &str| Err(ConfigError::new(sentence.to_owned()));
        match selectors.as_slice() {
            [] => {
                return error(
                    "--service-discovery: --selector, or --prefill-selector and --decode-selector, must say which \
                     pods are servers",
                );
            }
            [(Role::Regular, _), _, ..] => {
                return error(&format!(
                    "--selector and {} exclude each other: requests go to plain servers or to pairs",
                    given[1].0
                ));
            }
            [(_, first), (_, second)] if first == second => {
                return error(
                    "--prefill-selector and --decode-selector are the same: each pod would have both roles",
                );
            }
            _ => {}
        }
        let namespace = self.namespace.as_deref().map(checked_namespace).transpose()?;
        Ok(Some(PodSource { namespace, port: self.port.unwrap_or(DEFAULT_PORT), selectors }))
    }

    /// Without `--service-discovery` the other flags would have no effect, which no one can want.
    fn refuse_without_switch(&self, selector: Option<&str>) -> Result<Option<PodSource>, ConfigError> {
        let port = self.port.map(|_| "--service-discovery-port");
        let namespace = self.namespace.as_ref().map(|_| "--service-discovery-namespace");
        match selector.or(port).or(namespace) {
            None => Ok(None),
            Some(flag) => Err(ConfigError::new(format!("{flag} has no effect without --service-discovery"))),
        }
    }
}

/// Reads the labels given with `flag`.
fn labels(flag: &str, words: &[String]) -> Result<PodLabels, ConfigError> {
    let error = |word: &str, why: &str| ConfigError::new(format!("{flag} {}: {why}", word.escape_debug()));
    if words.len() > MAX_LABELS {
        return Err(ConfigError::new(format!("{flag}: at most {MAX_LABELS} labels are supported")));
    }
    let mut labels = PodLabels::new();
    for word in words {
        // `key==value` is the same to kubectl.
        let pair = word.split_once("==").or_else(|| word.split_once('='));
        let (key, value) = pair.ok_or_else(|| error(word, "not a label such as app=sglang"))?;
        let (prefix, name) = key.split_once('/').map_or((None, key), |(prefix, name)| (Some(prefix), name));
        let has_prefix = prefix.is_none_or(|prefix| is_word(prefix, MAX_PREFIX));
        // A value may be empty, a name may not.
        if !has_prefix || !is_word(name, MAX_NAME) || !(value.is_empty() || is_word(value, MAX_NAME)) {
            return Err(error(word, "not a label that Kubernetes allows"));
        }
        if labels.insert(key.to_owned(), value.to_owned()).is_some_and(|before| before != value) {
            return Err(error(word, "a pod has one value of this label, and two are asked for"));
        }
    }
    Ok(labels)
}

/// Whether it has letters, digits, dashes, dots and underscores only, the first two at both ends.
fn is_word(text: &str, longest: usize) -> bool {
    let is_end = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = text.as_bytes();
    bytes.len() <= longest
        && is_end(bytes.first())
        && is_end(bytes.last())
        && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(byte))
}

fn checked_namespace(name: &str) -> Result<String, ConfigError> {
    // It becomes a part of a path.
    let is_valid = is_word(name, MAX_NAME) && name.bytes().all(|byte| !b"._".contains(&byte));
    if !is_valid || name.bytes().any(|byte| byte.is_ascii_uppercase()) {
        let name = name.escape_debug();
        return Err(ConfigError::new(format!(
            "--service-discovery-namespace \"{name}\": not the name of a namespace"
        )));
    }
    Ok(name.to_owned())
}

#[cfg(test)]
mod tests {
    use crate::MiniLbConfig;

    fn config(options: &[(&str, &[&str])]) -> MiniLbConfig {
        let config = MiniLbConfig::new("127.0.0.1", 1, vec![], vec![], 1);
        let set = |config: MiniLbConfig, (name, values): &(&str, &[&str])| {
            config.set_option(name, [values.to_vec()]).unwrap()
        };
        options.iter().fold(config, set)
    }

    const ON: (&str, &[&str]) = ("service-discovery", &[]);

    #[test]
    fn selectors_say_which_pods_are_servers_of_which_role() {
        for (options, said) in [
            (
                &[ON, ("selector", &["app=sglang,tier=a"])][..],
                "pods with app=sglang,tier=a (regular) in all namespaces",
            ),
            (
                &[
                    ON,
                    ("prefill-selector", &["example.com/role==p"]),
                    ("decode-selector", &["example.com/role=d"]),
                    ("service-discovery-namespace", &["llm-1"]),
                ],
                "pods with example.com/role=p (prefill) or example.com/role=d (decode) in namespace llm-1",
            ),
        ] {
            let source = config(options).validate().ok().unwrap().pod_source.unwrap();
            assert_eq!((source.to_string().as_str(), source.port), (said, 80));
        }
        assert!(config(&[]).validate().ok().unwrap().pod_source.is_none());
    }

    #[test]
    fn what_cannot_be_meant_is_refused_in_one_sentence() {
        for (options, error) in [
            (&[("selector", &["a=b"][..])][..], "--selector has no effect without --service-discovery"),
            (
                &[("service-discovery-port", &["1"])],
                "--service-discovery-port has no effect without --service-discovery",
            ),
            (
                &[ON],
                "--service-discovery: --selector, or --prefill-selector and --decode-selector, must say which pods are \
                 servers",
            ),
            (
                &[ON, ("selector", &["a=b"]), ("decode-selector", &["a=c"])],
                "--selector and --decode-selector exclude each other: requests go to plain servers or to pairs",
            ),
            (
                &[ON, ("selector", &["a=b"]), ("prefill", &["http://a"])],
                "--selector and --prefill exclude each other: requests go to plain servers or to pairs",
            ),
            (
                &[ON, ("prefill-selector", &["a=b"]), ("decode-selector", &["a=b"])],
                "--prefill-selector and --decode-selector are the same: each pod would have both roles",
            ),
            (&[ON, ("selector", &["app"])], "--selector app: not a label such as app=sglang"),
            (&[ON, ("selector", &["=x"])], "--selector =x: not a label that Kubernetes allows"),
            (&[ON, ("selector", &["a=b c"])], "--selector a=b c: not a label that Kubernetes allows"),
            (&[ON, ("selector", &["a/b/c=d"])], "--selector a/b/c=d: not a label that Kubernetes allows"),
            (
                &[ON, ("selector", &["a=b,a=c"])],
                "--selector a=c: a pod has one value of this label, and two are asked for",
            ),
            (
                &[ON, ("selector", &["a=b"]), ("service-discovery-namespace", &["../x"])],
                "--service-discovery-namespace \"../x\": not the name of a namespace",
            ),
        ] {
            assert_eq!(config(options).validate().err().unwrap().to_string(), error);
        }
    }
}
