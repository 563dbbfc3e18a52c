//! HTTP/1.1 to the API server: GET requests with a token, over one connection at a time.
//!
//! What is asked, and what the bodies mean, is not known here.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{Builder, SendRequest};
use hyper::header::{ACCEPT, AUTHORIZATION, HOST, HeaderValue, USER_AGENT};
use hyper::{Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use kube_core::Status;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::debug;

use super::cluster::Cluster;
use super::failure::ApiError;
use crate::http1::{MAX_HEAD, MAX_HEADERS, Stream};
use crate::tls::{HandshakeHints, handshake};

/// Time to connect to the API server, with the lookup of its name and TLS.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Most bytes of a response that tells an error: a status has some hundred.
const MAX_STATUS: usize = 64 << 10;
const AGENT: &str = concat!("mini-lb/", env!("CARGO_PKG_VERSION"));
const HINTS: HandshakeHints =
    HandshakeHints { cas: "ca.crt or certificate-authority", certificate: "client-certificate" };

/// A client of one API server.
pub(super) struct ApiClient {
    cluster: Cluster,
    /// Its last response was read to the end.
    idle: Option<ApiConnection>,
}

/// An open connection.
struct ApiConnection {
    sender: SendRequest<Empty<Bytes>>,
    /// Reads and writes for as long as this lives.
    _driver: JoinSet<()>,
}

/// The body of a response, and the connection that it comes from.
pub(super) struct ApiResponse {
    body: Incoming,
    /// Whether the body was read to its end. hyper does not know it of a chunked one.
    has_ended: bool,
    connection: ApiConnection,
}

impl ApiClient {
    pub(super) fn new(cluster: Cluster) -> Self {
        Self { cluster, idle: None }
    }

    /// Sends a request for this path and query, and waits for the head of the response, whose status is 200.
    pub(super) async fn get(&mut self, target: &Uri) -> Result<ApiResponse, ApiError> {
        let sent = self.authorization()?;
        let mut response = self.send(target, sent.as_ref()).await?;
        if response.status() == StatusCode::UNAUTHORIZED {
            let current = self.authorization()?;
            // The token was replaced while the request was under way.
            if current != sent {
                response = self.send(target, current.as_ref()).await?;
            }
        }
        let status = response.status();
        let mut response = response.into_body();
        if status == StatusCode::OK {
            return Ok(response);
        }
        // What cannot be read has a status all the same.
        let body = response.read(MAX_STATUS).await.unwrap_or_default();
        self.keep(response);
        Err(ApiError::Status(Box::new(status_of(status, &body))))
    }

    /// Uses the connection of a response again, if it was read to the end.
    pub(super) fn keep(&mut self, response: ApiResponse) {
        if response.has_ended {
            self.idle = Some(response.connection);
        }
    }

    fn authorization(&self) -> Result<Option<HeaderValue>, ApiError> {
        self.cluster.authorization().map_err(ApiError::Configuration)
    }

    async fn send(
        &mut self,
        target: &Uri,
        authorization: Option<&HeaderValue>,
    ) -> Result<Response<ApiResponse>, ApiError> {
        let idle = self.idle.take();
        let request = || self.request(target, authorization);
        if let Some(mut connection) = idle
            && connection.sender.ready().await.is_ok()
            // The server may close it just now. The request changes nothing, so it can be sent twice.
            && let Ok(response) = connection.sender.send_request(request()?).await
        {
            return Ok(response.map(|body| ApiResponse::new(body, connection)));
        }
        let request = request()?;
        let mut connection = self.connect().await?;
        let response = connection.sender.send_request(request).await;
        let response = response.map_err(|error| ApiError::unreachable(&error))?;
        Ok(response.map(|body| ApiResponse::new(body, connection)))
    }

    fn request(
        &self,
        target: &Uri,
        authorization: Option<&HeaderValue>,
    ) -> Result<Request<Empty<Bytes>>, ApiError> {
        let mut request = Request::get(format!("{}{target}", self.cluster.base_path))
            .header(HOST, &self.cluster.authority)
            .header(ACCEPT, "application/json")
            .header(USER_AGENT, AGENT);
        if let Some(authorization) = authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        request.body(Empty::new()).map_err(|error| ApiError::Configuration(error.to_string()))
    }

    async fn connect(&self) -> Result<ApiConnection, ApiError> {
        let opened = match timeout(CONNECT_TIMEOUT, self.open()).await {
            Ok(opened) => opened.map_err(|error| ApiError::unreachable(&error)),
            Err(_) => Err(ApiError::Unreachable(format!("no connection within {CONNECT_TIMEOUT:?}"))),
        };
        let mut builder = Builder::new();
        builder.max_headers(MAX_HEADERS).max_header_size(MAX_HEAD);
        let shaken = builder.handshake(TokioIo::new(opened?)).await;
        let (sender, connection) = shaken.map_err(|error| ApiError::unreachable(&error))?;
        let mut driver = JoinSet::new();
        // Its errors are those of the responses, too.
        driver.spawn(async move {
            connection.await.ok();
        });
        Ok(ApiConnection { sender, _driver: driver })
    }

    async fn open(&self) -> io::Result<Stream> {
        let Cluster { host, port, tls, .. } = &self.cluster;
        let socket = TcpStream::connect((host.as_str(), *port)).await?;
        socket.set_nodelay(true)?;
        let Some(tls) = tls else { return Ok(Stream::Tcp(socket)) };
        let encrypted = handshake(Arc::clone(&tls.config), tls.name.clone(), socket, &HINTS).await?;
        Ok(Stream::Tls(Box::new(encrypted)))
    }
}

impl ApiResponse {
    fn new(body: Incoming, connection: ApiConnection) -> Self {
        Self { body, has_ended: false, connection }
    }

    /// The whole body.
    pub(super) async fn read(&mut self, max_bytes: usize) -> Result<Bytes, ApiError> {
        let read = Limited::new(&mut self.body, max_bytes).collect().await;
        let read = read.map_err(|error| match error.is::<LengthLimitError>() {
            true => ApiError::Malformed(format!("the response has more than {max_bytes} bytes")),
            false => ApiError::unreachable(&*error),
        })?;
        self.has_ended = true;
        Ok(read.to_bytes())
    }

    /// The next bytes of the body. `None`: its end, whether it was meant or the connection was cut. API
    /// servers that are replaced cut their connections.
    pub(super) async fn next_bytes(&mut self) -> Option<Bytes> {
        loop {
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    // Trailers say nothing.
                    if let Ok(data) = frame.into_data() {
                        return Some(data);
                    }
                }
                Some(Err(error)) => {
                    debug!("Kubernetes: the connection ended: {error}");
                    return None;
                }
                None => {
                    self.has_ended = true;
                    return None;
                }
            }
        }
    }
}

/// What a response says that is not 200: a status of Kubernetes, or whatever a proxy sends.
fn status_of(code: StatusCode, body: &[u8]) -> Status {
    let status = serde_json::from_slice::<Status>(body);
    let status = status.ok().filter(|status| !status.message.is_empty());
    let mut status = status.unwrap_or_else(|| {
        let text = String::from_utf8_lossy(body);
        Status { message: text.trim().to_owned(), ..Status::default() }
    });
    if status.message.is_empty() {
        code.canonical_reason().unwrap_or("no reason is given").clone_into(&mut status.message);
    }
    status.code = code.as_u16();
    status
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_kubernetes_own_or_what_a_proxy_says() {
        let message = |code: u16, body: &str| {
            let status = status_of(StatusCode::from_u16(code).unwrap(), body.as_bytes());
            (status.code, status.message)
        };
        let own = r#"{"kind":"Status","code":403,"message":"pods is forbidden"}"#;
        assert_eq!(message(403, own), (403, "pods is forbidden".to_owned()));
        assert_eq!(message(502, "<html>\n"), (502, "<html>".to_owned()));
        assert_eq!(message(503, ""), (503, "Service Unavailable".to_owned()));
        assert_eq!(message(500, "{}"), (500, "{}".to_owned()));
        assert_eq!(message(599, " "), (599, "no reason is given".to_owned()));
    }
}
