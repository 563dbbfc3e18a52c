//! Gets `/metrics` from a router: one request on one connection, as the router may have restarted since the
//! last one.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1;
use hyper::header::{AUTHORIZATION, HOST, HeaderValue};
use hyper::{Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use crate::columns::printable;

/// For the whole exchange.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Of a response: about 20 times that of a router with 1,000 servers and all of its pairs.
const MAX_RESPONSE: usize = 64 << 20;

/// The mistake that is made most: clients' port has no `/metrics`.
const LISTENER: &str = "the admin listener is at the router's --prometheus-host and --prometheus-port";

/// Where the numbers are.
pub(super) struct Source {
    /// Without user and password.
    shown: String,
    host: String,
    port: u16,
    target: String,
    authorization: Option<HeaderValue>,
}

impl Source {
    /// The error says what is wrong with the URL or the key.
    pub(super) fn new(url: &str, key: Option<&str>) -> Result<Self, String> {
        let refused = |why: &str| format!("{}: {why}", printable(without_password(url)));
        let uri: Uri = url.parse().map_err(|_| refused("not a URL such as http://127.0.0.1:29000"))?;
        match uri.scheme_str() {
            Some("http") => {}
            Some("https") => {
                return Err(refused(
                    "the admin listener speaks http only; use http://, through a tunnel if need be",
                ));
            }
            _ => return Err(refused("the router's URL must begin with http://")),
        }
        let authority = uri.authority().map_or("", |authority| authority.as_str());
        let (user, host) =
            authority.rsplit_once('@').map_or((None, authority), |(user, host)| (Some(user), host));
        let port = uri.port_u16().unwrap_or(80);
        let bare = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']').to_owned();
        // What was copied from a browser or from Prometheus' configuration is as good.
        let path = uri.path().trim_end_matches('/');
        let path = path.strip_suffix("/ui").or(path.strip_suffix("/metrics")).unwrap_or(path);
        let authorization = match (key, user) {
            (Some(_), Some(_)) => {
                return Err(refused("give user:password@ or --admin-api-key-file, not both"));
            }
            (Some(key), None) => Some(format!("Bearer {key}")),
            (None, Some(user)) => Some(format!("Basic {}", STANDARD.encode(user))),
            (None, None) => None,
        };
        let header = |value: String| {
            HeaderValue::from_str(&value).map_err(|_| refused("the key is not printable ASCII"))
        };
        Ok(Self {
            shown: format!("http://{host}{path}"),
            host: bare,
            port,
            target: format!("{path}/metrics"),
            authorization: authorization.map(header).transpose()?,
        })
    }

    pub(super) fn shown(&self) -> &str {
        &self.shown
    }

    /// The text of `/metrics`. The error is a sentence.
    pub(super) async fn fetch(&self) -> Result<String, String> {
        let answer = tokio::time::timeout(TIMEOUT, self.exchange()).await;
        let answer = answer.unwrap_or_else(|_| Err(format!("did not answer within {TIMEOUT:?}")));
        answer.map_err(|why| format!("{} {why}", self.shown))
    }

    async fn exchange(&self) -> Result<String, String> {
        let socket = TcpStream::connect((self.host.as_str(), self.port)).await;
        let socket = socket.map_err(|error| format!("cannot be reached ({LISTENER}): {error}"))?;
        let broken = |error: &dyn std::fmt::Display| printable(&format!("does not speak HTTP: {error}"));
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(socket)).await.map_err(|error| broken(&error))?;
        let exchange = async {
            let response = sender.send_request(self.request()).await.map_err(|error| broken(&error))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_RESPONSE).collect().await;
            let body = body.map_err(|error| broken(&error))?.to_bytes();
            Ok::<_, String>((status, body))
        };
        // The connection is driven beside the exchange, and ends with it.
        tokio::pin!(exchange, connection);
        let (status, body) = tokio::select! {
            answer = &mut exchange => answer?,
            _ = &mut connection => exchange.await?,
        };
        match status {
            StatusCode::OK => Ok(String::from_utf8_lossy(&body).into_owned()),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                Err(format!("wants a key ({}): see --admin-api-key-file", status.as_u16()))
            }
            StatusCode::NOT_FOUND => Err(format!("has no /metrics ({LISTENER}): 404")),
            _ => Err(format!("answered {}", status.as_u16())),
        }
    }

    fn request(&self) -> Request<Empty<Bytes>> {
        let mut request = Request::new(Empty::new());
        *request.uri_mut() = self.target.parse().unwrap_or_default();
        let host = self.shown.trim_start_matches("http://").split('/').next().unwrap_or_default();
        if let Ok(host) = HeaderValue::from_str(host) {
            request.headers_mut().insert(HOST, host);
        }
        if let Some(authorization) = &self.authorization {
            request.headers_mut().insert(AUTHORIZATION, authorization.clone());
        }
        request
    }
}

/// What may be shown of a URL, also if it is none.
fn without_password(url: &str) -> &str {
    url.rsplit_once('@').map_or(url, |(_, rest)| rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_may_be_that_of_the_page_and_may_have_a_password() {
        for (url, shown, target, authorization) in [
            ("http://a:1", "http://a:1", "/metrics", None),
            ("http://a:1/ui", "http://a:1", "/metrics", None),
            ("http://a/x/metrics/", "http://a/x", "/x/metrics", None),
            ("http://u:p@[::1]:7/", "http://[::1]:7", "/metrics", Some("Basic dTpw")),
        ] {
            let source = Source::new(url, None).unwrap();
            assert_eq!((source.shown(), source.target.as_str()), (shown, target), "{url}");
            assert_eq!(source.authorization.as_ref().map(|value| value.to_str().unwrap()), authorization);
        }
        assert_eq!(Source::new("http://a", Some("k")).unwrap().authorization.unwrap(), "Bearer k");
        let refused = |url, key| Source::new(url, key).err().unwrap();
        assert!(refused("http://u:secret@a", Some("k")).starts_with("a: give"));
        assert!(!refused("https://u:secret@a", None).contains("secret"));
        assert!(refused("127.0.0.1:29000", None).contains("http://"));
    }
}
