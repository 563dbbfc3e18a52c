//! HTTP side of a simulated server: accepting, reading requests, routing. Endpoints are in `generation` and
//! `info`.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use http_body::Body as _;
use http_body_util::BodyExt as _;
use hyper::{
    Method, Request as HttpRequest, Response,
    body::Incoming,
    header::{self, HeaderMap},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::Value;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
    time,
};

use super::{
    config::{BODY_LIMIT, CRASH_DELAY, Role},
    encoder, errors,
    generation::{self, ClosedWithoutResponse},
    info,
    ranks::NamedRanks,
    request::{Endpoint, Fields, Reject, Request, per_item, wants_stream},
    response::{ResponseBody, SimResponse},
    responses_api::Settings,
    state::{RecordedRequest, State, bump, stopped},
};

/// Pause after a failed accept, for example when no file descriptor is left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Limit of the memory that is reserved for a body before it has arrived.
const RESERVE_LIMIT: u64 = 64 << 20;

/// Accepts until the server is stopped, then drops all connections.
pub(crate) async fn accept<F>(
    listener: TcpListener,
    state: Arc<State>,
    mut stop: watch::Receiver<bool>,
    serve: impl Fn(TcpStream, Arc<State>) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            () = stopped(&mut stop) => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    // Nagle's algorithm would delay small events until the client's acknowledgement.
                    let _ = stream.set_nodelay(true);
                    connections.spawn(serve(stream, Arc::clone(&state)));
                }
                Err(_) => time::sleep(ACCEPT_PAUSE).await,
            },
        }
    }
    drop(listener);
    connections.shutdown().await;
}

struct OpenConnection(Arc<State>);

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.counters.connections_open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Serves one connection of the API port.
pub(crate) async fn connection(stream: TcpStream, state: Arc<State>) {
    bump(&state.counters.connections_opened);
    bump(&state.counters.connections_open);
    let open = OpenConnection(Arc::clone(&state));
    let service = service_fn(|request| {
        let state = Arc::clone(&state);
        async move { respond(request, &state).await }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        // Also the idle time between two requests, which is what uvicorn limits.
        .header_read_timeout(state.config.keep_alive)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(served);
    tokio::select! {
        // Errors are clients that disconnected, or a simulated crash. The connection is closed either way.
        _ = &mut served => {}
        // Not dropped, which would close it, and not polled: what arrives stays unread, and the end of the
        // process makes the kernel reset the connection.
        () = state.silent() => std::future::pending().await,
    }
    drop(open);
}

impl std::fmt::Display for ClosedWithoutResponse {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("the connection is closed without a response")
    }
}

impl std::error::Error for ClosedWithoutResponse {}

async fn respond(
    request: HttpRequest<Incoming>,
    state: &Arc<State>,
) -> Result<Response<ResponseBody>, ClosedWithoutResponse> {
    bump(&state.counters.requests);
    let (head, body) = request.into_parts();
    let Some(body) = read(body).await? else {
        return Ok(SimResponse::detail(413, "Content Too Large").into_response());
    };
    let call = Call { state, head: &head, body };
    if !call.authorized() {
        call.remember(None);
        return Ok(SimResponse::field_error("Unauthorized").with_status(401).into_response());
    }
    call.dispatch().await
}

/// Reads the whole body; `None` if it is too large.
async fn read(mut body: Incoming) -> Result<Option<Bytes>, ClosedWithoutResponse> {
    let hint = body.size_hint();
    if hint.lower() > BODY_LIMIT {
        return Ok(None);
    }
    let mut whole = BytesMut::with_capacity(hint.lower().min(RESERVE_LIMIT) as usize);
    while let Some(frame) = body.frame().await {
        // The client of an incomplete body has disconnected.
        let Ok(data) = frame.map_err(|_| ClosedWithoutResponse)?.into_data() else { continue };
        if (whole.len() + data.len()) as u64 > BODY_LIMIT {
            return Ok(None);
        }
        whole.extend_from_slice(&data);
    }
    Ok(Some(whole.freeze()))
}

struct Call<'a> {
    state: &'a Arc<State>,
    head: &'a hyper::http::request::Parts,
    body: Bytes,
}

impl Call<'_> {
    fn authorized(&self) -> bool {
        let Some(key) = &self.state.config.api_key else { return true };
        let path = self.head.uri.path();
        if ["/health", "/ready", "/metrics"].iter().any(|open| path.starts_with(open)) {
            return true;
        }
        let given = self.head.headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        self.head.method == Method::OPTIONS
            || given.and_then(|value| value.strip_prefix("Bearer ")) == Some(key)
    }

    fn remember(&self, room: Option<i64>) {
        if !self.state.config.record {
            return;
        }
        let uri = &self.head.uri;
        self.state.remember(RecordedRequest {
            method: self.head.method.to_string(),
            path_and_query: uri.path_and_query().map_or_else(String::new, ToString::to_string),
            headers: owned(&self.head.headers),
            body: self.body.clone(),
            room,
        });
    }

    async fn dispatch(&self) -> Result<Response<ResponseBody>, ClosedWithoutResponse> {
        let (method, path) = (&self.head.method, self.head.uri.path());
        if self.state.config.role == Role::Encoder {
            self.remember(None);
            return Ok(encoder::server::respond(self.state, method, path, &self.body).await.into_response());
        }
        let generating = match path {
            "/generate" if method == Method::POST || method == Method::PUT => Some(Endpoint::Generate),
            "/v1/chat/completions" | "/invocations" if method == Method::POST => Some(Endpoint::Chat),
            "/v1/completions" if method == Method::POST => Some(Endpoint::Completions),
            "/v1/responses" if method == Method::POST => Some(Endpoint::Responses),
            "/v1/messages" if method == Method::POST => Some(Endpoint::Messages),
            _ => None,
        };
        if let Some(endpoint) = generating {
            return self.generate(endpoint).await;
        }
        self.remember(None);
        Ok(self.other(method, path).await.into_response())
    }

    async fn other(&self, method: &Method, path: &str) -> SimResponse {
        let state = self.state;
        let Some(allowed) = allowed(path) else { return SimResponse::detail(404, "Not Found") };
        if !allowed.split(", ").any(|name| name == method.as_str()) {
            let mut response = SimResponse::detail(405, "Method Not Allowed");
            response.allow = Some(allowed);
            return response;
        }
        match path {
            "/" => SimResponse::json("\"SGLang is running\""),
            "/health" | "/health_generate" => info::health(state).await,
            "/ready" => info::ready(state),
            "/ping" => SimResponse::bare(200, ""),
            "/model_info" | "/get_model_info" => info::model_info(state),
            "/server_info" | "/get_server_info" => info::server_info(state),
            "/v1/models" => info::models(state),
            "/v1/loads" => info::loads(state),
            "/metrics" | "/metrics/" => info::metrics(state),
            "/flush_cache" => info::flush(state, self.head.uri.query()).await,
            "/abort_request" => info::abort(state, &self.body),
            "/tokenize" | "/v1/tokenize" => info::tokenize(state, &self.body),
            "/v1/messages/count_tokens" => info::count_tokens(&self.body),
            "/start_profile" => SimResponse::bare(200, "Start profiling.\n"),
            "/stop_profile" => SimResponse::bare(200, "Stop profiling. This will take some time.\n"),
            other if other.starts_with("/v1/responses/") => errors::no_store("response_id"),
            other => info::model(state, other.strip_prefix("/v1/models/").unwrap_or(other)),
        }
    }

    async fn generate(&self, endpoint: Endpoint) -> Result<Response<ResponseBody>, ClosedWithoutResponse> {
        let fields = match self.fields(endpoint) {
            Ok(fields) => fields,
            Err(response) => {
                self.remember(None);
                return Ok(response.into_response());
            }
        };
        self.remember(per_item(fields.get("bootstrap_room"), 0).and_then(Value::as_i64));
        let config = &self.state.config;
        let settings =
            (endpoint == Endpoint::Responses).then(|| Arc::new(Settings::of(&self.body, &fields, config)));
        let stream = wants_stream(&fields);
        let model = fields.get("model").and_then(Value::as_str).unwrap_or(&config.model).to_owned();
        let header = self.head.headers.get("x-data-parallel-rank").and_then(|rank| rank.to_str().ok());
        let named = NamedRanks::of(&fields, header, endpoint);
        let parsed = Request::parse(endpoint, fields, settings.clone(), config);
        match parsed.and_then(|request| self.dispatched(request, named)) {
            Ok(request) if request.items.is_empty() => Ok(SimResponse::json("[]").into_response()),
            Ok(request) => generation::respond(self.state, request).await,
            Err(Reject::Value(message)) if stream && endpoint.streams_at_once() => {
                Ok(generation::refused_stream(endpoint, settings.as_deref(), &model, &message))
            }
            Err(reject) => self.reject(endpoint, reject).await,
        }
    }

    /// Decides on which rank each item runs.
    fn dispatched(&self, mut request: Request, named: NamedRanks) -> Result<Request, Reject> {
        for item in &mut request.items {
            item.dispatch = self.state.ranks.dispatch(&self.state.config, item, named)?;
        }
        Ok(request)
    }

    /// Parses the body as an object, or returns the error response.
    fn fields(&self, endpoint: Endpoint) -> Result<Fields, SimResponse> {
        let kind = self.head.headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
        if kind.is_none_or(|kind| !kind.trim_start().to_ascii_lowercase().starts_with("application/json")) {
            return Err(errors::content_type(endpoint));
        }
        match serde_json::from_slice(&self.body) {
            Ok(Value::Object(fields)) => Ok(fields),
            Ok(_) => Err(errors::validation(endpoint, "{'type': 'dataclass_type', 'loc': ('body',)}")),
            Err(error) => {
                let at = error.column().saturating_sub(1);
                let text = format!(
                    "{{'type': 'json_invalid', 'loc': ('body', {at}), 'msg': 'JSON decode error', 'input': {{}}, \
                     'ctx': {{'error': 'unexpected end of data'}}}}"
                );
                Err(errors::validation(endpoint, &text))
            }
        }
    }

    async fn reject(
        &self,
        endpoint: Endpoint,
        reject: Reject,
    ) -> Result<Response<ResponseBody>, ClosedWithoutResponse> {
        let response = match reject {
            Reject::Crash => {
                bump(&self.state.counters.crashes);
                time::sleep(self.state.config.scaled(CRASH_DELAY)).await;
                return Err(ClosedWithoutResponse);
            }
            Reject::Value(message) => errors::value(endpoint, &message),
            Reject::Field(message) => SimResponse::field_error(&message),
            Reject::Validation(text) => errors::validation(endpoint, &text),
            Reject::Model(name) => errors::unknown_model(&name),
            Reject::Stored(field) => errors::no_store(field),
            Reject::Internal => {
                let mut response = SimResponse::bare(500, "Internal Server Error");
                response.content_type = Some("text/plain; charset=utf-8");
                response
            }
        };
        Ok(response.into_response())
    }
}

/// The methods of a route, as in its `allow` header; `None` for an unknown path.
fn allowed(path: &str) -> Option<&'static str> {
    Some(match path {
        "/generate" => "PUT, POST",
        "/v1/chat/completions"
        | "/v1/completions"
        | "/v1/responses"
        | "/v1/messages"
        | "/invocations"
        | "/abort_request"
        | "/tokenize"
        | "/v1/tokenize"
        | "/v1/messages/count_tokens" => "POST",
        other if other.starts_with("/v1/responses/") => {
            if other.ends_with("/cancel") {
                "POST"
            } else {
                "GET"
            }
        }
        "/flush_cache" | "/start_profile" | "/stop_profile" => "GET, POST",
        "/" => "GET, HEAD",
        "/health" | "/health_generate" | "/ready" | "/ping" | "/model_info" | "/get_model_info"
        | "/server_info" | "/get_server_info" | "/v1/models" | "/v1/loads" => "GET",
        "/metrics" | "/metrics/" => "GET, HEAD",
        other if other.strip_prefix("/v1/models/").is_some_and(|name| !name.is_empty()) => "GET",
        _ => return None,
    })
}

fn owned(headers: &HeaderMap) -> Vec<(String, String)> {
    let text = |value: &header::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    headers.iter().map(|(name, value)| (name.to_string(), text(value))).collect()
}
