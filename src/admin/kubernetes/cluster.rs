//! Where the API server is, what proves that it is it, and what proves who the router is.
//!
//! From a kubeconfig if `KUBECONFIG` names one, and otherwise from the service account of the
//! router's pod. Files are read here; nothing is sent.

use std::env;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hyper::Uri;
use hyper::header::HeaderValue;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};

use super::kubeconfig;
use super::pod::shown;
use crate::tls::{client_config, system_cas};

/// Names a kubeconfig, as for kubectl.
const KUBECONFIG: &str = "KUBECONFIG";
/// Where Kubernetes puts the files of a pod's service account.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// Where Kubernetes says to every container that the API server is.
const SERVICE_HOST: &str = "KUBERNETES_SERVICE_HOST";
const SERVICE_PORT: &str = "KUBERNETES_SERVICE_PORT";

/// Most bytes of a kubeconfig, a bundle of CAs, a key or a token.
const MAX_FILE: u64 = 1 << 20;

/// An API server, and how to be admitted.
pub(super) struct Cluster {
    /// Without the brackets of IPv6.
    pub(super) host: String,
    pub(super) port: u16,
    /// The value of `Host`.
    pub(super) authority: HeaderValue,
    /// Comes before the path of each request, as where one server proxies for several clusters. Without the
    /// last slash.
    pub(super) base_path: String,
    /// `None`: plain HTTP, as to `kubectl proxy`.
    pub(super) tls: Option<ClusterTls>,
    token: TokenSource,
}

/// The TLS of an API server.
pub(super) struct ClusterTls {
    pub(super) config: Arc<ClientConfig>,
    /// The name that its certificate must have.
    pub(super) name: ServerName<'static>,
}

/// Where the bearer token comes from.
pub(super) enum TokenSource {
    /// There is none: a client certificate, or a proxy that adds its own.
    Nowhere,
    Text(String),
    /// A projected token is replaced every hour or so, when 80% of its time are over.
    File(PathBuf),
}

/// PEM texts, each with the name of where it is from.
#[derive(Default)]
pub(super) struct ClusterPems {
    /// `None`: the CAs of the system.
    pub(super) ca: Option<(String, Vec<u8>)>,
    pub(super) certificate: Option<(String, Vec<u8>)>,
    pub(super) key: Option<(String, Vec<u8>)>,
}

impl Cluster {
    /// The cluster that the environment names. The error says what is missing.
    pub(super) fn find() -> Result<Self, String> {
        if let Some(path) = env::var_os(KUBECONFIG).filter(|path| !path.is_empty()) {
            let path = PathBuf::from(path);
            return kubeconfig::load(&path)
                .map_err(|why| format!("{KUBECONFIG} {}: {why}", shown(&path.display().to_string())));
        }
        let variable = |name: &str| {
            let value = env::var(name).ok().filter(|value| !value.is_empty());
            value.ok_or_else(|| {
                format!(
                    "{KUBECONFIG} is not set, and neither is {name}, which a pod of Kubernetes would have: \
                     the API server is unknown"
                )
            })
        };
        Self::of_service_account(
            Path::new(SERVICE_ACCOUNT),
            &variable(SERVICE_HOST)?,
            &variable(SERVICE_PORT)?,
        )
    }

    /// The cluster of the pod in which this runs.
    pub(super) fn of_service_account(folder: &Path, host: &str, port: &str) -> Result<Self, String> {
        // An IPv6 address comes without brackets.
        let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
        let ca = folder.join("ca.crt");
        let ca = (ca.display().to_string(), read_named(&ca)?);
        let pems = ClusterPems { ca: Some(ca), ..ClusterPems::default() };
        Self::new(&format!("https://{host}:{port}"), None, pems, TokenSource::File(folder.join("token")))
    }

    /// The cluster with this URL. `tls_name`: the name that its certificate has instead of the URL's.
    pub(super) fn new(
        url: &str,
        tls_name: Option<&str>,
        pems: ClusterPems,
        token: TokenSource,
    ) -> Result<Self, String> {
        let invalid = |why: &str| format!("the server {} {why}", shown(url));
        let uri: Uri = url.parse().map_err(|_| invalid("is not a URL"))?;
        let is_tls = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(invalid("does not begin with https:// or http://")),
        };
        let host = uri.host().filter(|host| !host.is_empty()).ok_or_else(|| invalid("has no host"))?;
        // `Uri` accepts a port that is too large.
        let port = match uri.authority().and_then(|authority| authority.as_str().strip_suffix(host)) {
            Some(_) => {
                if is_tls {
                    443
                } else {
                    80
                }
            }
            None => uri.port_u16().ok_or_else(|| invalid("has a port that is not one"))?,
        };
        let authority =
            HeaderValue::try_from(format!("{host}:{port}")).map_err(|_| invalid("is not a URL"))?;
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let tls = if is_tls {
            let name = ServerName::try_from(tls_name.unwrap_or(&host).to_owned());
            let name = name.map_err(|_| invalid("has a name that no certificate can have"))?;
            Some(ClusterTls { config: Arc::new(pems.config()?), name })
        } else {
            None
        };
        if !is_tls && !matches!(token, TokenSource::Nowhere) {
            return Err(invalid("begins with http://, and a token is only sent with TLS"));
        }
        let base_path = uri.path().trim_end_matches('/').to_owned();
        Ok(Self { host, port, authority, base_path, tls, token })
    }

    /// The value of `Authorization`. A file is read each time: requests are rare, and so a token that was
    /// replaced needs neither a clock nor a failure to be noticed.
    pub(super) fn authorization(&self) -> Result<Option<HeaderValue>, String> {
        let (token, place) = match &self.token {
            TokenSource::Nowhere => return Ok(None),
            TokenSource::Text(token) => (token.clone(), "the token".to_owned()),
            TokenSource::File(path) => {
                let place = format!("the token in {}", path.display());
                let token = String::from_utf8(read_named(path)?);
                (token.map_err(|_| format!("{place} is not text"))?, place)
            }
        };
        let token = token.trim();
        if token.is_empty() {
            return Err(format!("{place} is empty"));
        }
        // The error would not show the token either; it just says less.
        let mut value = HeaderValue::try_from(format!("Bearer {token}"))
            .map_err(|_| format!("{place} has characters that no header can have"))?;
        value.set_sensitive(true);
        Ok(Some(value))
    }
}

impl ClusterPems {
    fn config(self) -> Result<ClientConfig, String> {
        let roots = match &self.ca {
            None => system_cas().map_err(|error| error.to_string())?,
            Some((place, pem)) => {
                let mut roots = RootCertStore::empty();
                for certificate in certificates(place, pem)? {
                    let added = roots.add(certificate);
                    added.map_err(|error| format!("{place}: not a CA certificate: {error}"))?;
                }
                roots
            }
        };
        let own = match (&self.certificate, &self.key) {
            (None, None) => None,
            (Some((place, pem)), Some((key_place, key_pem))) => {
                let key = PrivateKeyDer::from_pem_slice(key_pem);
                let key =
                    key.map_err(|_| format!("{key_place}: no private key in it, or an encrypted one"))?;
                Some((certificates(place, pem)?, key))
            }
            _ => return Err("of client-certificate and client-key there is only one".to_owned()),
        };
        client_config(roots, own).map_err(|error| format!("the client certificate cannot be used: {error}"))
    }
}

/// All certificates of a PEM text; at least one.
fn certificates(place: &str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let certificates = certificates.map_err(|error| format!("{place}: not a PEM text: {error}"))?;
    if certificates.is_empty() {
        return Err(format!("{place}: no certificate in it"));
    }
    Ok(certificates)
}

/// A file of credentials. The error names it.
fn read_named(path: &Path) -> Result<Vec<u8>, String> {
    read_file(path).map_err(|why| format!("{}: {why}", path.display()))
}

/// A file of credentials.
pub(super) fn read_file(path: &Path) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut bytes));
    read.map_err(|error| error.to_string())?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(format!("it has more than {MAX_FILE} bytes"));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder as Kubernetes mounts it, which is removed afterwards.
    struct Mounted(PathBuf);

    impl Mounted {
        fn new(name: &str) -> Self {
            let folder = env::temp_dir().join(format!("mini-lb-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&folder).unwrap();
            let mounted = Self(folder);
            // A bundle of two, as while a cluster changes its CA.
            mounted.put("ca.crt", &[ca(), ca()].concat());
            mounted.put("token", "first\n");
            mounted
        }

        fn put(&self, name: &str, text: &str) {
            std::fs::write(self.0.join(name), text).unwrap();
        }

        fn cluster(&self, host: &str, port: &str) -> Result<Cluster, String> {
            Cluster::of_service_account(&self.0, host, port)
        }
    }

    impl Drop for Mounted {
        fn drop(&mut self) {
            std::fs::remove_dir_all(&self.0).ok();
        }
    }

    fn ca() -> String {
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().pem()
    }

    #[test]
    fn a_pod_finds_its_api_server_by_ipv4_ipv6_and_name() {
        let mounted = Mounted::new("hosts");
        for (host, shown, authority) in [
            ("10.96.0.1", "10.96.0.1", "10.96.0.1:443"),
            ("fd00:10:96::1", "fd00:10:96::1", "[fd00:10:96::1]:443"),
            ("kubernetes.default", "kubernetes.default", "kubernetes.default:443"),
        ] {
            let cluster = mounted.cluster(host, "443").unwrap();
            assert_eq!((cluster.host.as_str(), cluster.port), (shown, 443));
            assert_eq!(cluster.authority, authority);
            assert_eq!(cluster.tls.unwrap().name.to_str(), shown);
            assert_eq!(cluster.base_path, "");
        }
        for port in ["0x1", "65536", "-1"] {
            assert!(mounted.cluster("10.96.0.1", port).is_err(), "{port}");
        }
    }

    #[test]
    fn a_token_is_read_for_each_request_and_never_shown() {
        let mounted = Mounted::new("token");
        let cluster = mounted.cluster("10.96.0.1", "443").unwrap();
        for token in ["first", "second"] {
            mounted.put("token", &format!("{token}\n"));
            let value = cluster.authorization().unwrap().unwrap();
            assert_eq!(value, format!("Bearer {token}"));
            assert_eq!(format!("{value:?}"), "Sensitive");
        }
        for (token, why) in [(" \n", "is empty"), ("sec\nret", "no header can have")] {
            mounted.put("token", token);
            let error = cluster.authorization().err().unwrap();
            assert!(error.contains(why) && !error.contains("sec"), "{error}");
        }
    }

    #[test]
    fn files_that_are_missing_or_wrong_are_named() {
        let mounted = Mounted::new("files");
        for (text, why) in
            [("", "no certificate in it"), ("-----BEGIN CERTIFICATE-----\n!", "not a PEM text")]
        {
            mounted.put("ca.crt", text);
            let error = mounted.cluster("10.96.0.1", "443").err().unwrap();
            assert!(error.contains("ca.crt") && error.contains(why), "{error}");
        }
        mounted.put("ca.crt", &"x".repeat(MAX_FILE as usize + 1));
        let error = mounted.cluster("10.96.0.1", "443").err().unwrap();
        assert!(error.contains("ca.crt: it has more than 1048576 bytes"), "{error}");
        std::fs::remove_file(mounted.0.join("ca.crt")).unwrap();
        let error = mounted.cluster("10.96.0.1", "443").err().unwrap();
        assert!(error.contains("ca.crt: No such file"), "{error}");
    }

    #[test]
    fn urls_have_a_base_path_and_a_default_port() {
        let cluster = |url: &str| Cluster::new(url, None, ClusterPems::default(), TokenSource::Nowhere);
        let proxied = cluster("http://localhost/k8s/clusters/c-1/").unwrap();
        assert_eq!((proxied.port, proxied.base_path.as_str()), (80, "/k8s/clusters/c-1"));
        for url in ["localhost:8001", "ftp://localhost", "https://", "http://localhost:99999", "http://a b"] {
            assert!(cluster(url).is_err(), "{url}");
        }
        let token = TokenSource::Text("secret".to_owned());
        let error = Cluster::new("http://localhost", None, ClusterPems::default(), token).err().unwrap();
        assert!(error.contains("a token is only sent with TLS"), "{error}");
    }
}
