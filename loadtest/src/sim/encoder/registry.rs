//! The encoder bootstrap server of a language-only server: a small HTTP server on a port of its own, with the
//! list of encoders. After a start the list has nothing but `--encoder-urls`.

use std::{convert::Infallible, sync::Arc};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Method, Request, Response, body::Incoming, header, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;

use crate::sim::state::State;

/// Limit of a request's body.
const BODY_LIMIT: usize = 64 << 10;

/// Serves one connection to the encoder bootstrap port.
pub(crate) async fn connection(stream: TcpStream, state: Arc<State>) {
    let service = service_fn(|request| {
        let state = Arc::clone(&state);
        async move { Ok::<_, Infallible>(respond(request, &state).await) }
    });
    // Errors are the client's and end its connection.
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

async fn respond(request: Request<Incoming>, state: &State) -> Response<Full<Bytes>> {
    let (head, body) = request.into_parts();
    let urls = |change: fn(&mut Vec<String>, &str)| {
        // A body also with DELETE.
        let body = Limited::new(body, BODY_LIMIT);
        async move {
            let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
            let fields: Value = serde_json::from_slice(&body).unwrap_or_default();
            let url = fields.get("url").and_then(Value::as_str).unwrap_or_default().trim_end_matches('/');
            if url.is_empty() {
                return answer(400, "application/json", r#"{"error":"Missing or empty 'url' field"}"#);
            }
            change(&mut state.encoding.lock(), url);
            answer(200, "text/plain; charset=utf-8", "OK")
        }
    };
    match (&head.method, head.uri.path()) {
        (&Method::GET, "/health") => answer(200, "text/plain; charset=utf-8", "OK"),
        (&Method::GET, "/list_encoder_urls") => {
            answer(200, "application/json", &json!({ "encoder_urls": state.encoding.urls() }).to_string())
        }
        (&Method::POST, "/register_encoder_url") => {
            let add = |urls: &mut Vec<String>, url: &str| {
                if !urls.iter().any(|known| known == url) {
                    urls.push(url.to_owned());
                }
            };
            urls(add).await
        }
        (&Method::DELETE, "/unregister_encoder_url") => {
            urls(|urls, url| urls.retain(|known| known != url)).await
        }
        _ => answer(404, "application/json", r#"{"detail":"Not Found"}"#),
    }
}

fn answer(status: u16, kind: &str, body: &str) -> Response<Full<Bytes>> {
    let body = Full::from(body.to_owned());
    Response::builder().status(status).header(header::CONTENT_TYPE, kind).body(body).unwrap_or_default()
}
