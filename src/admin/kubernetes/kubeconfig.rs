//! A kubeconfig in JSON, as `kubectl config view -o json` writes it: the cluster and the user of its
//! current context.
//!
//! What is not supported is refused and not passed over: the router would talk to another server, or as
//! another user, than kubectl does.

use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::cluster::{Cluster, ClusterPems, TokenSource, read_file};
use super::pod::shown;

/// Writes a kubeconfig that can be read here.
const COMMAND: &str = "`kubectl config view --raw --minify --flatten -o json`";

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Kubeconfig {
    current_context: Option<String>,
    contexts: Option<Vec<ContextEntry>>,
    clusters: Option<Vec<ClusterEntry>>,
    users: Option<Vec<UserEntry>>,
}

#[derive(Deserialize)]
struct ContextEntry {
    name: String,
    context: ContextFields,
}

#[derive(Deserialize)]
struct ContextFields {
    cluster: String,
    user: Option<String>,
}

#[derive(Deserialize)]
struct ClusterEntry {
    name: String,
    cluster: ClusterFields,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct ClusterFields {
    server: String,
    tls_server_name: Option<String>,
    certificate_authority: Option<String>,
    certificate_authority_data: Option<String>,
    insecure_skip_tls_verify: Option<bool>,
    proxy_url: Option<String>,
}

#[derive(Deserialize)]
struct UserEntry {
    name: String,
    user: UserFields,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct UserFields {
    token: Option<String>,
    #[serde(rename = "tokenFile")]
    token_file: Option<String>,
    client_certificate: Option<String>,
    client_certificate_data: Option<String>,
    client_key: Option<String>,
    client_key_data: Option<String>,
    exec: Option<IgnoredAny>,
    auth_provider: Option<IgnoredAny>,
    username: Option<IgnoredAny>,
    #[serde(rename = "as")]
    impersonated: Option<IgnoredAny>,
}

/// The cluster of the current context of a file.
pub(super) fn load(path: &Path) -> Result<Cluster, String> {
    parse(&read_file(path)?, path.parent().unwrap_or(Path::new("")))
}

/// The cluster of the current context. Relative paths in it are from `folder`.
fn parse(text: &[u8], folder: &Path) -> Result<Cluster, String> {
    if !text.trim_ascii_start().starts_with(b"{") {
        return Err(format!("it is not JSON, and YAML is not read: write it with {COMMAND}"));
    }
    // Not serde's text, which may show a value, such as a token in the wrong place.
    let config: Kubeconfig = serde_json::from_slice(text).map_err(|error| {
        let (line, column) = (error.line(), error.column());
        format!("line {line}, column {column}: not a kubeconfig in JSON: write it with {COMMAND}")
    })?;
    let current =
        config.current_context.filter(|name| !name.is_empty()).ok_or("it has no current-context")?;
    let missing = |kind: &str, name: &str| format!("it has no {kind} {}", shown(name));
    let contexts = config.contexts.unwrap_or_default();
    let context = contexts.into_iter().find(|entry| entry.name == current);
    let ContextFields { cluster, user } = context.ok_or_else(|| missing("context", &current))?.context;
    let clusters = config.clusters.unwrap_or_default();
    let found = clusters.into_iter().find(|entry| entry.name == cluster);
    let cluster = found.ok_or_else(|| missing("cluster", &cluster))?.cluster;
    let user = match user.filter(|name| !name.is_empty()) {
        None => UserFields::default(),
        Some(name) => {
            let found = config.users.unwrap_or_default().into_iter().find(|entry| entry.name == name);
            found.ok_or_else(|| missing("user", &name))?.user
        }
    };
    refuse_unsupported(&cluster, &user)?;
    let pem = |name: &str, data: Option<String>, path: Option<String>| pem(folder, name, data, path);
    let pems = ClusterPems {
        ca: pem("certificate-authority", cluster.certificate_authority_data, cluster.certificate_authority)?,
        certificate: pem("client-certificate", user.client_certificate_data, user.client_certificate)?,
        key: pem("client-key", user.client_key_data, user.client_key)?,
    };
    // The file first, as in kubectl: it has the newer one.
    let token = match (set(user.token_file), set(user.token)) {
        (Some(path), _) => TokenSource::File(folder.join(path)),
        (None, Some(token)) => TokenSource::Text(token),
        (None, None) => TokenSource::Nowhere,
    };
    Cluster::new(&cluster.server, set(cluster.tls_server_name).as_deref(), pems, token)
}

fn refuse_unsupported(cluster: &ClusterFields, user: &UserFields) -> Result<(), String> {
    if cluster.insecure_skip_tls_verify == Some(true) {
        return Err(
            "insecure-skip-tls-verify would send the token to anyone: name the certificate-authority \
                    instead"
                .to_owned(),
        );
    }
    if cluster.proxy_url.as_ref().is_some_and(|url| !url.is_empty()) {
        return Err("proxy-url is not supported".to_owned());
    }
    if user.exec.is_some() || user.auth_provider.is_some() {
        return Err(
            "commands and providers that fetch tokens (exec, auth-provider) are not supported: use a \
                    token, as of `kubectl create token`, or the URL of `kubectl proxy`"
                .to_owned(),
        );
    }
    if user.username.is_some() {
        return Err("username and password are not supported: use a token".to_owned());
    }
    if user.impersonated.is_some() {
        return Err("to act as another user (as) is not supported: use a token of that user".to_owned());
    }
    Ok(())
}

/// A value that is not empty, which means the same as none.
fn set(value: Option<String>) -> Option<String> {
    value.filter(|value| !value.is_empty())
}

/// A PEM text of `<name>-data`, in Base64, or of the file `<name>`, with the name of where it is from.
fn pem(
    folder: &Path,
    name: &str,
    data: Option<String>,
    path: Option<String>,
) -> Result<Option<(String, Vec<u8>)>, String> {
    if let Some(data) = set(data) {
        let name = format!("{name}-data");
        let text = STANDARD.decode(data).map_err(|_| format!("{name} is not Base64"))?;
        return Ok(Some((name, text)));
    }
    let Some(path) = set(path) else { return Ok(None) };
    let path = folder.join(path);
    let place = format!("{name} {}", path.display());
    let text = read_file(&path).map_err(|why| format!("{place}: {why}"))?;
    Ok(Some((place, text)))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn config(cluster: Value, user: Value) -> Value {
        json!({
            "kind": "Config", "apiVersion": "v1", "preferences": {}, "current-context": "here",
            "clusters": [
                {"name": "other", "cluster": {"server": "http://other"}},
                {"name": "c", "cluster": cluster},
            ],
            "users": [{"name": "u", "user": user}],
            "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
        })
    }

    fn cluster_of(config: &Value) -> Result<Cluster, String> {
        parse(config.to_string().as_bytes(), Path::new("/nowhere"))
    }

    #[test]
    fn the_current_context_names_cluster_and_user() {
        let proxied = config(json!({"server": "http://127.0.0.1:8001"}), json!({}));
        assert_eq!(cluster_of(&proxied).unwrap().authority, "127.0.0.1:8001");
        for (key, why) in [
            ("current-context", "it has no current-context"),
            ("contexts", "it has no context here"),
            ("clusters", "it has no cluster c"),
            ("users", "it has no user u"),
        ] {
            let mut without = proxied.clone();
            without[key] = Value::Null;
            assert_eq!(cluster_of(&without).err().as_deref(), Some(why));
        }
    }

    #[test]
    fn certificates_are_in_the_config_or_in_files() {
        let made = rcgen::generate_simple_self_signed(vec!["router".to_owned()]).unwrap();
        let (cert, key) = (made.cert.pem(), made.signing_key.serialize_pem());
        let [cert, key] = [cert, key].map(|pem| STANDARD.encode(pem));
        let cluster = json!({"server": "https://api:6443", "certificate-authority-data": cert,
            "tls-server-name": "kubernetes"});
        let user = json!({"client-certificate-data": cert, "client-key-data": key});
        let parsed = cluster_of(&config(cluster.clone(), user.clone())).unwrap();
        assert_eq!((parsed.host.as_str(), parsed.port), ("api", 6443));
        assert!(parsed.authorization().unwrap().is_none());
        let tls = parsed.tls.unwrap();
        assert_eq!(tls.name.to_str(), "kubernetes");
        assert!(tls.config.client_auth_cert_resolver.has_certs());
        for (key, value, why) in [
            ("client-key-data", json!("="), "client-key-data is not Base64"),
            ("client-key-data", json!(null), "there is only one"),
            ("client-key-data", json!(cert), "client-key-data: no private key"),
            ("client-certificate-data", json!(key), "client-certificate-data: no certificate"),
        ] {
            let mut user = user.clone();
            user[key] = value;
            let error = cluster_of(&config(cluster.clone(), user)).err().unwrap();
            assert!(error.contains(why), "{error}");
        }
        let files = json!({"server": "https://api", "certificate-authority": "ca.crt"});
        let error = cluster_of(&config(files, user)).err().unwrap();
        assert!(error.contains("certificate-authority /nowhere/ca.crt: No such file"), "{error}");
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        let plain = json!({"server": "http://127.0.0.1"});
        let with = |key: &str, value: Value| {
            let mut cluster = plain.clone();
            cluster[key] = value;
            cluster
        };
        for (cluster, user, why) in [
            (with("insecure-skip-tls-verify", json!(true)), json!({}), "insecure-skip-tls-verify"),
            (with("proxy-url", json!("http://a")), json!({}), "proxy-url"),
            (plain.clone(), json!({"exec": {"command": "aws"}}), "use a token, as of `kubectl create token`"),
            (plain.clone(), json!({"auth-provider": {"name": "oidc"}}), "auth-provider"),
            (plain.clone(), json!({"username": "a", "password": "b"}), "username"),
            (plain.clone(), json!({"as": "admin"}), "act as another user"),
            (plain.clone(), json!({"token": "secret"}), "only sent with TLS"),
        ] {
            let error = cluster_of(&config(cluster, user)).err().unwrap();
            assert!(error.contains(why) && !error.contains("secret"), "{error}");
        }
        // Said, but not so.
        let neither = with("insecure-skip-tls-verify", json!(false));
        assert!(cluster_of(&config(neither, json!({"exec": null, "token": ""}))).is_ok());
    }

    #[test]
    fn yaml_and_broken_json_are_refused_with_the_command_that_helps() {
        let parsed = |text: &str| parse(text.as_bytes(), Path::new("")).err().unwrap();
        for text in ["apiVersion: v1\nkind: Config\n", "---\n{}", ""] {
            let error = parsed(text);
            assert!(error.contains("YAML is not read") && error.contains(COMMAND), "{error}");
        }
        let error = parsed("{\n\"users\": \"secret\"}");
        assert!(error.starts_with("line 2, column 17: ") && !error.contains("secret"), "{error}");
        assert!(error.contains(COMMAND), "{error}");
    }
}
