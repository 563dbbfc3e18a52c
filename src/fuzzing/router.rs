//! The router over connections in memory: a client that sends anything, and two backends that answer
//! anything.
//!
//! The clock is paused and jumps to the next timer, so that timeouts take no time. Routes, limits and API
//! keys are left out: every request goes to the proxy.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::http::{ReceivedResponse, parse_responses};
use super::scripted_backend::{BUFFER_SIZE, MAX_WRITES, RESPONSE_TIMEOUT, ScriptFraming, ScriptedBackend};
use super::{DIALECTS, FuzzInput, splice_stream, split_into_at_most};
use crate::admission::{AdmissionController, AdmissionHandle, AdmissionOptions};
use crate::error::Error;
use crate::http1::{BodyTimeouts, ClientTimeouts, HeadRejection, RequestHead, Stream};
use crate::observe::record::{Record, Recorder, RequestId};
use crate::proxy::{self, Proxy, RequestLimits};
use crate::server::{ClientResponseBody, error_response, relayed_response};
use crate::timer::Timer;
use crate::transport::{
    ClientResponse, ClientStream, ClientTransport, ConnectionHandler, Http1Engine, RejectionResponse,
    Transport,
};
use crate::upstream::{
    Address, FleetSpec, HealthOptions, LiveFleet, Pools, PrefillSpec, Random, Role, SocketOptions,
};
use crate::wire::logprobs::{Merge, PromptLogprobs};
use crate::wire::shape::{BodyInspector, BodyShape, Dialect, InternalFields, RequestedSamples};

/// Longer than all timeouts together.
const FOREVER: Duration = Duration::from_secs(3_600);
const BODY_TIMEOUTS: BodyTimeouts =
    BodyTimeouts { idle: Duration::from_secs(20), whole: Duration::from_secs(300) };

/// Any request and any responses: the router finishes, writes nothing but responses, no more than there were
/// requests, and none looks complete that differs from what decode sent. Between sound peers the response is
/// complete. The text's parts are the client's, prefill's and decode's.
pub fn router(data: &[u8]) {
    let Some(input) = FuzzInput::new(data) else { return };
    // Bootstrap rooms and selection must not differ between two runs of an input.
    fastrand::seed(0);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.expect("a runtime without I/O").block_on(Scenario::new(&input).run());
}

/// What a client does when it has sent its requests.
#[derive(Clone, Copy, PartialEq)]
enum FuzzClient {
    /// Waits for all responses.
    Waits,
    /// Closes its half of the connection at once.
    HalfCloses,
    /// Disconnects at a response's first byte.
    Disconnects,
}

struct Scenario {
    requests: Vec<u8>,
    seed: u8,
    client: FuzzClient,
    /// The first request's shape, if it is certainly valid.
    valid: Option<BodyShape>,
    prefill: ScriptedBackend,
    decode: ScriptedBackend,
}

impl Scenario {
    fn new(input: &FuzzInput<'_>) -> Self {
        let [kind, seed, prefill_options, decode_options] = input.options;
        let [text, prefill, decode] = input.parts();
        let dialect = DIALECTS[usize::from(kind) % DIALECTS.len()];
        let is_raw = kind & 0x80 != 0;
        // On one connection: the second request must not be affected by the first.
        let count = if kind & 0x40 != 0 { 2 } else { 1 };
        Self {
            requests: if is_raw { text.to_vec() } else { request(dialect, text).repeat(count) },
            seed,
            client: [FuzzClient::Waits, FuzzClient::Waits, FuzzClient::HalfCloses, FuzzClient::Disconnects]
                [usize::from(kind >> 4) % 4],
            valid: if is_raw { None } else { shape_of(dialect, text) },
            prefill: ScriptedBackend::new(prefill, seed.rotate_left(2), prefill_options),
            decode: ScriptedBackend::new(decode, seed.rotate_left(4), decode_options),
        }
    }

    async fn run(self) {
        let request_count = Arc::new(AtomicUsize::new(0));
        let (client, socket) = duplex(BUFFER_SIZE);
        let connection = serve(self.proxy(), socket, Arc::clone(&request_count));
        let (_, received) = timeout(FOREVER, async { tokio::join!(connection, self.run_client(client)) })
            .await
            .expect("the connection ends");
        if self.client == FuzzClient::Disconnects {
            return;
        }
        let responses = parse_responses(&received);
        // One more: the error for what is not a request.
        assert!(responses.len() <= request_count.load(Ordering::Relaxed) + 1, "more responses than requests");
        if self.client == FuzzClient::Waits && self.valid.is_some() {
            assert!(!responses.is_empty(), "no response: {}", received.escape_ascii());
        }
        if self.is_sound() {
            let is_complete =
                matches!(responses.first(), Some(ReceivedResponse { status: 200, body: Some(_) }));
            assert!(is_complete, "no complete response: {}", received.escape_ascii());
        }
        self.check(&responses).await;
    }

    /// Whether decode's response must reach the client. Not if prefill sends events: one may be an error,
    /// which the client gets instead.
    fn is_sound(&self) -> bool {
        let is_plain = |shape: &BodyShape| shape.merge.is_none() && shape.samples == RequestedSamples::One;
        let prefill = self.prefill.is_sound() && self.prefill.framing == ScriptFraming::Length;
        let is_waiting = self.client == FuzzClient::Waits && self.valid.as_ref().is_some_and(is_plain);
        is_waiting && prefill && self.decode.is_sound()
    }

    fn proxy(&self) -> Proxy {
        let address = |url| Address::parse(url).expect("a URL");
        let prefill = PrefillSpec {
            address: address("http://prefill:1"),
            bootstrap_host: "prefill".into(),
            bootstrap_port: Some(8998),
        };
        // A backend that is ejected is selected nevertheless: there is no other.
        let health = HealthOptions {
            enabled: true,
            interval: Duration::from_secs(10),
            timeout: Duration::from_secs(5),
            // The first failure ejects: an input has too few requests for more.
            failure_threshold: 1,
            success_threshold: 1,
            startup_interval: Duration::from_secs(1),
            startup_timeout: Duration::from_secs(1),
            load_poll_interval: Duration::ZERO,
        };
        let decode = vec![address("http://decode:2")];
        let fleet = LiveFleet::new(FleetSpec {
            prefill: vec![prefill],
            decode,
            regular: Vec::new(),
            is_regular: false,
            prefill_policy: Arc::new(Random),
            decode_policy: Arc::new(Random),
            regular_policy: Arc::new(Random),
            is_dp_aware: false,
            health,
        });
        let options = SocketOptions {
            connect_timeout: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(4),
            max_idle: 2,
            buffer_size: None,
            engine: Http1Engine::Native,
            tls: Arc::default(),
        };
        let (prefill, decode) = (self.prefill.clone(), self.decode.clone());
        let connect = move |backend: &crate::upstream::Backend| match backend.role() {
            Role::Prefill => prefill.connect(),
            Role::Decode | Role::Regular => decode.connect(),
        };
        let pools = Pools::in_memory(&options, Box::new(connect));
        let limits = RequestLimits {
            // Within reach of a fuzzer's inputs, which are 4 KiB by default and sent twice.
            max_payload_size: 16 << 10,
            max_merge_size: 16 << 10,
            body_timeouts: BODY_TIMEOUTS,
            request_timeout: Duration::from_secs(30),
            stream_idle_timeout: Duration::from_secs(5),
            stream_keepalive: None,
            max_retries: 1,
            retry_on: vec![503],
            hash_key_headers: vec!["x-session-id".to_owned()],
            internal_fields: InternalFields::default(),
            abort_on_disconnect: false,
            max_samples: 4,
        };
        let controller = AdmissionController::new(&AdmissionOptions::default());
        let admission = AdmissionHandle::new(Arc::new(controller));
        Proxy::new(Arc::new(fleet), Arc::new(pools), Arc::new(ArcSwap::from_pointee(limits)), admission)
    }

    /// Sends the requests and returns all that is received.
    async fn run_client(&self, socket: DuplexStream) -> Vec<u8> {
        let (mut reader, mut writer) = tokio::io::split(socket);
        let write = async {
            for part in split_into_at_most(MAX_WRITES, &self.requests, self.seed) {
                if writer.write_all(part).await.is_err() {
                    return;
                }
                // Lets the router read this much before the next write.
                tokio::task::yield_now().await;
            }
            if self.client == FuzzClient::Waits {
                sleep(RESPONSE_TIMEOUT).await;
            }
            let _ = writer.shutdown().await;
        };
        let mut received = Vec::new();
        if self.client == FuzzClient::Disconnects {
            tokio::select! { _ = reader.read_u8() => {}, () = async { write.await; sleep(RESPONSE_TIMEOUT).await } => {} }
        } else {
            let _ = tokio::join!(write, reader.read_to_end(&mut received));
        }
        received
    }

    /// Checks the first response, if it is a complete success: it is decode's, with prefill's lists if they
    /// were requested. A later one may have been made of what a backend sent after its response.
    async fn check(&self, responses: &[ReceivedResponse]) {
        let Some(ReceivedResponse { status: 200..300, body: Some(body) }) = responses.first() else {
            return;
        };
        let decode = self.decode.success_read_by_hyper().await;
        let decode = decode.expect("a complete response was made of a complete one");
        let prefill = self.prefill.success_read_by_hyper().await;
        // What a raw request asks for is not known here.
        let merges = [Merge::Generate, Merge::GenerateExperts, Merge::Echo, Merge::Experts];
        let any = || merges.into_iter().map(Some).chain([None]).collect();
        let merges = self.valid.as_ref().map_or_else(any, |shape| vec![shape.merge]);
        let expected = |merge: Option<Merge>| match merge {
            None => vec![decode.clone()],
            // Decode's stream need not have what a late merge changes.
            Some(merge) if merge.is_late() => {
                [merged(merge, prefill.as_ref(), &decode), vec![decode.clone()]].concat()
            }
            Some(merge) => merged(merge, prefill.as_ref(), &decode),
        };
        let is_expected = merges.into_iter().flat_map(expected).any(|expected| expected == body);
        assert!(is_expected, "{} is not {}", body.escape_ascii(), decode.escape_ascii());
    }
}

/// The possible results of a merge: decode's response read as a JSON text and as a stream.
fn merged(merge: Merge, prefill: Option<&Bytes>, decode: &Bytes) -> Vec<Bytes> {
    let read = || PromptLogprobs::read(merge, prefill?).ok();
    let body = read().map(|lists| lists.splice_body(decode).into_bytes());
    let stream = read().map(|lists| splice_stream(lists, vec![decode]));
    body.into_iter().chain(stream).collect()
}

/// A well-formed request with this body.
fn request(dialect: Dialect, body: &[u8]) -> Vec<u8> {
    let path = match dialect {
        Dialect::Generate => "/generate",
        Dialect::Chat => "/v1/chat/completions",
        Dialect::Completions => "/v1/completions",
        Dialect::Responses => "/v1/responses",
        Dialect::Messages => "/v1/messages",
    };
    let head = format!("POST {path} HTTP/1.1\r\nHost: router\r\nContent-Length: {}\r\n\r\n", body.len());
    [head.as_bytes(), body].concat()
}

/// A body's shape, if the router accepts it.
fn shape_of(dialect: Dialect, body: &[u8]) -> Option<BodyShape> {
    let mut inspector = BodyInspector::new(dialect);
    inspector.feed(body).ok()?;
    inspector.finish().ok()
}

/// Serves a client's connection to its end.
async fn serve(proxy: Proxy, socket: DuplexStream, request_count: Arc<AtomicUsize>) {
    let (head, idle) = (Duration::from_secs(90), Duration::from_secs(90));
    let timeouts = ClientTimeouts { head, idle, body: BODY_TIMEOUTS };
    // Dropping the sender would start a drain.
    let (_open, closing) = watch::channel(());
    let handler = Arc::new(ProxyHandler { proxy, request_count });
    let transport = Transport::new(Http1Engine::Native, 1);
    // How it ended shows in what the client received.
    transport.serve(ClientStream::http1(Stream::Memory(socket)), handler, timeouts, closing).await;
}

/// A router without routes: every request goes to the proxy.
struct ProxyHandler {
    proxy: Proxy,
    request_count: Arc<AtomicUsize>,
}

impl ProxyHandler {
    async fn handle<C: ClientTransport>(
        &self,
        client: &mut C,
        head: &RequestHead,
        record: &mut Record,
        timer: &mut Timer,
    ) -> Result<Option<proxy::UpstreamResponse>, Error> {
        if let Some(reason) = head.reject_reason {
            return Err(Error::BadRequest(reason));
        }
        let dialect = match head.path() {
            "/v1/chat/completions" => Dialect::Chat,
            "/v1/completions" => Dialect::Completions,
            "/v1/responses" => Dialect::Responses,
            "/v1/messages" => Dialect::Messages,
            _ => Dialect::Generate,
        };
        let request = self.proxy.read(Some(dialect), head, client, record, timer).await?;
        if request.samples() > 1 {
            let dispatch = Box::pin(self.proxy.fan_out(request, None, &head.headers, record));
            return client.cancel_on_disconnect(dispatch).await.transpose();
        }
        let (sample, prompt) = record.sample_and_prompt();
        let dispatch = self.proxy.dispatch(&request, request.own(), None, prompt, sample, timer);
        client.cancel_on_disconnect(dispatch).await.transpose()
    }
}

impl ConnectionHandler for ProxyHandler {
    type Body = ClientResponseBody;

    async fn respond<C: ClientTransport>(
        &self,
        client: &mut C,
        head: RequestHead,
        timer: &mut Timer,
    ) -> Option<ClientResponse<ClientResponseBody>> {
        self.request_count.fetch_add(1, Ordering::Relaxed);
        let mut record = Recorder::new(Vec::new()).begin();
        Some(match self.handle(client, &head, &mut record, timer).await {
            Ok(response) => relayed_response(response?, None, record),
            Err(error) => error_response(&error, record),
        })
    }

    fn is_draining(&self) -> bool {
        false
    }

    fn reject(&self, rejection: HeadRejection) -> RejectionResponse {
        let error = match rejection {
            HeadRejection::TooLarge => Error::HeadTooLarge,
            HeadRejection::Malformed(reason) => Error::BadRequest(reason),
            HeadRejection::Timeout(after) => {
                Error::RequestTimeout { what: "the rest of the request head", after }
            }
        };
        let request_id = RequestId::generate().as_str().to_owned();
        RejectionResponse { status: error.status(), json: error.to_json(), request_id }
    }

    fn relayed(&self, _: Duration) {}
}
