//! Many concurrent requests to servers with every kind of fault: each client gets its own response or an
//! error.
//!
//! A request carries its own plan: its number determines what it asks for, how each server behaves, and what
//! the client does. Every response carries the token of its request.

mod kit;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::time::Duration;

use fastrand::Rng;
use kit::{Client, ReceivedRequest, Response, Router, ScriptedServer, Step};

const REQUESTS: u64 = 400;
const CONNECTIONS: u64 = 16;

/// What a client asks for.
#[derive(Debug, Clone, Copy, PartialEq)]
enum RequestKind {
    Whole,
    Stream,
    /// Prompt logprobs: the response is merged from both servers'.
    Merged,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    ErrorStatus(&'static str),
    /// Prefill only: a stream with an event that reports an aborted request.
    AbortEvent,
    Closes,
    Resets,
    ClosesInHead,
    ClosesInBody,
    ResetsInBody,
    NotHttp,
    BadChunk,
}

const FAULTS: [Fault; 11] = [
    Fault::ErrorStatus("400 Bad Request"),
    Fault::ErrorStatus("429 Too Many Requests"),
    Fault::ErrorStatus("503 Service Unavailable"),
    Fault::AbortEvent,
    Fault::Closes,
    Fault::Resets,
    Fault::ClosesInHead,
    Fault::ClosesInBody,
    Fault::ResetsInBody,
    Fault::NotHttp,
    Fault::BadChunk,
];

/// What a server does after its response. None of it may affect the client.
#[derive(Debug, Clone, Copy)]
enum AfterResponse {
    StaysOpen,
    Closes,
    /// Sends a response without a request.
    SendsExtra,
}

/// How one server behaves for one request.
#[derive(Debug)]
struct Behavior {
    fault: Option<Fault>,
    chunked: bool,
    slow: bool,
    after: AfterResponse,
}

/// All that happens to one request.
#[derive(Debug)]
struct Plan {
    number: u64,
    kind: RequestKind,
    prefill: Behavior,
    decode: Behavior,
    /// The number of events in decode's response.
    events: usize,
    /// The client disconnects: at once (false), or after the response head (true).
    disconnect: Option<bool>,
}

impl Plan {
    fn new(number: u64) -> Self {
        let mut rng = Rng::with_seed(number);
        // The first output hardly depends on the seed.
        rng.u64(..);
        let kind = [RequestKind::Whole, RequestKind::Stream, RequestKind::Stream, RequestKind::Merged]
            [rng.usize(..4)];
        let (prefill, decode) = match rng.u8(..10) {
            _ if number >= REQUESTS => (false, false),
            0..5 => (false, false),
            5..7 => (true, false),
            7..9 => (false, true),
            _ => (true, true),
        };
        let disconnect = (number < REQUESTS && rng.u8(..12) == 0).then(|| rng.bool());
        let mut behavior = |faulty: bool, chunked: bool| Behavior {
            fault: faulty.then(|| FAULTS[rng.usize(..FAULTS.len())]),
            chunked: chunked || rng.bool(),
            slow: rng.u8(..3) == 0,
            after: [
                AfterResponse::StaysOpen,
                AfterResponse::StaysOpen,
                AfterResponse::Closes,
                AfterResponse::SendsExtra,
            ][rng.usize(..4)],
        };
        let prefill = behavior(prefill, false);
        let mut decode = behavior(decode, kind == RequestKind::Stream);
        if decode.fault == Some(Fault::AbortEvent) {
            decode.fault = Some(Fault::Closes);
        }
        Self { number, kind, prefill, decode, events: rng.usize(1..200), disconnect }
    }

    /// The plan and the token of a request.
    fn of(seen: &ReceivedRequest) -> (Self, String) {
        let body = seen.json();
        (Self::new(body["number"].as_u64().unwrap()), body["text"].as_str().unwrap().to_owned())
    }

    fn token(&self) -> String {
        format!("token-{:04}", self.number)
    }

    fn request(&self) -> String {
        let (number, token, stream) = (self.number, self.token(), self.kind == RequestKind::Stream);
        let merged = if self.kind == RequestKind::Merged {
            r#","return_logprob":true,"logprob_start_len":0"#
        } else {
            ""
        };
        format!(r#"{{"number":{number},"text":"{token}","stream":{stream}{merged}}}"#)
    }

    /// Whether neither server has a fault.
    fn is_faultless(&self) -> bool {
        self.prefill.fault.is_none() && self.decode.fault.is_none()
    }

    /// The body that the client of this token must get.
    fn response(&self, token: &str) -> String {
        let decode = self.decode_body(token).concat();
        decode.replace(r#""input_token_logprobs":[]"#, &prompt_logprobs(token))
    }

    fn decode_body(&self, token: &str) -> Vec<String> {
        let words = || (0..self.events).map(|count| format!("{token}:{count} "));
        match self.kind {
            RequestKind::Whole => vec![format!(r#"{{"text":"{}"}}"#, words().collect::<String>())],
            RequestKind::Merged => {
                let text: String = words().collect();
                vec![format!(r#"{{"text":"{text}","meta_info":{{"input_token_logprobs":[]}}}}"#)]
            }
            RequestKind::Stream => {
                let events = words().map(|word| format!("data: {{\"text\":\"{word}\"}}\n\n"));
                events.chain(["data: [DONE]\n\n".to_owned()]).collect()
            }
        }
    }

    fn prefill_body(&self, token: &str) -> Vec<String> {
        let lists = prompt_logprobs(token);
        match self.kind {
            RequestKind::Whole => vec![format!(r#"{{"text":"{token}"}}"#)],
            RequestKind::Merged => vec![format!(r#"{{"text":"","meta_info":{{{lists}}}}}"#)],
            RequestKind::Stream => {
                vec![format!("data: {{\"text\":\"{token}\"}}\n\n"), "data: [DONE]\n\n".to_owned()]
            }
        }
    }
}

fn prompt_logprobs(token: &str) -> String {
    format!(r#""input_token_logprobs":[[null,7,"{token}"],[-0.5,8,"{token}"]]"#)
}

fn prefill_steps(seen: &ReceivedRequest) -> Vec<Step> {
    let (plan, token) = Plan::of(seen);
    steps(&plan.prefill, &plan.prefill_body(&token), &token, plan.kind == RequestKind::Stream, plan.number)
}

fn decode_steps(seen: &ReceivedRequest) -> Vec<Step> {
    let (plan, token) = Plan::of(seen);
    // Another seed than prefill's, so that the two are split at different places.
    steps(&plan.decode, &plan.decode_body(&token), &token, plan.kind == RequestKind::Stream, !plan.number)
}

/// A response without a request.
const EXTRA_RESPONSE: &str = "HTTP/1.1 200 OK\r\ncontent-length: 22\r\n\r\n{\"text\":\"token-stray\"}\n";

fn steps(behavior: &Behavior, body: &[String], token: &str, events: bool, seed: u64) -> Vec<Step> {
    let mut rng = Rng::with_seed(seed);
    let (head, framed) = framed("200 OK", body, events, behavior.chunked);
    let whole = [head.as_bytes(), framed.as_bytes()].concat();
    // At least the head, never the last byte.
    let part = &whole[..rng.usize(head.len()..whole.len())];
    let Some(fault) = behavior.fault else {
        let mut steps = split_randomly(&whole, behavior.slow, &mut rng);
        match (behavior.after, steps.last_mut()) {
            (AfterResponse::Closes, _) => steps.push(Step::Close),
            // In one write with the response's end, so that it arrives before the next request.
            (AfterResponse::SendsExtra, Some(Step::Send(last))) => {
                last.extend_from_slice(EXTRA_RESPONSE.as_bytes());
            }
            _ => {}
        }
        return steps;
    };
    let send = |text: &str| Step::Send(text.into());
    let broken = |last: Step, rng: &mut Rng| {
        let mut steps = split_randomly(part, behavior.slow, rng);
        steps.push(last);
        steps
    };
    match fault {
        Fault::ErrorStatus(status) => {
            let (head, body) = framed_error(status, token, behavior.chunked);
            split_randomly(&[head, body].concat().into_bytes(), behavior.slow, &mut rng)
        }
        Fault::AbortEvent => {
            let reason = format!(r#"{{"type":"abort","message":"{token}","status_code":500}}"#);
            let event = format!("data: {{\"text\":\"\",\"meta_info\":{{\"finish_reason\":{reason}}}}}\n\n");
            let (head, body) = self::framed("200 OK", &[event], true, true);
            split_randomly(&[head, body].concat().into_bytes(), behavior.slow, &mut rng)
        }
        Fault::Closes => vec![Step::Close],
        Fault::Resets => vec![Step::Reset],
        Fault::ClosesInHead => vec![send("HTTP/1.1 200 OK\r\ncontent-le"), Step::Close],
        Fault::ClosesInBody => broken(Step::Close, &mut rng),
        Fault::ResetsInBody => broken(Step::Reset, &mut rng),
        Fault::NotHttp => vec![send("SSH-2.0-server\r\n\r\n"), Step::Close],
        Fault::BadChunk => {
            let (head, framed) = self::framed("200 OK", body, events, true);
            vec![send(&head), send(framed.strip_suffix("0\r\n\r\n").unwrap()), send("zz\r\n"), Step::Close]
        }
    }
}

/// A head and a body with its framing.
fn framed(status: &str, body: &[String], events: bool, chunked: bool) -> (String, String) {
    let kind = if events { "text/event-stream" } else { "application/json" };
    let length = body.iter().map(String::len).sum::<usize>();
    let framing =
        if chunked { "transfer-encoding: chunked".to_owned() } else { format!("content-length: {length}") };
    let head = format!("HTTP/1.1 {status}\r\ncontent-type: {kind}\r\n{framing}\r\n\r\n");
    if !chunked {
        return (head, body.concat());
    }
    let chunks = body.iter().map(|piece| format!("{:x}\r\n{piece}\r\n", piece.len()));
    (head, chunks.chain(["0\r\n\r\n".to_owned()]).collect())
}

fn framed_error(status: &str, token: &str, chunked: bool) -> (String, String) {
    framed(status, &[format!(r#"{{"object":"error","message":"{token}"}}"#)], false, chunked)
}

/// Splits bytes at random places.
fn split_randomly(bytes: &[u8], slow: bool, rng: &mut Rng) -> Vec<Step> {
    let mut cuts: Vec<usize> = (0..rng.usize(..6)).map(|_| rng.usize(..bytes.len())).collect();
    cuts.extend([0, bytes.len()]);
    cuts.sort_unstable();
    cuts.dedup();
    let pieces = cuts.windows(2).map(|outcomes| Step::Send(bytes[outcomes[0]..outcomes[1]].to_vec()));
    let pause = |rng: &mut Rng| Step::Pause(Duration::from_micros(if slow { rng.u64(..4_000) } else { 0 }));
    pieces.flat_map(|piece| [pause(rng), piece]).collect()
}

/// How a request ended for its client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum ClientOutcome {
    Completed,
    Rejected,
    Truncated,
    Disconnected,
}

/// Classifies how a request ended. Panics if its plan does not allow it.
fn outcome(plan: &Plan, response: &Response) -> ClientOutcome {
    let token = plan.token();
    if !response.complete {
        assert_eq!(response.status(), 200, "{plan:?}");
        let body =
            if response.head.is_chunked() { dechunk_partial(&response.body) } else { response.body.clone() };
        let text = String::from_utf8_lossy(&body);
        // A stream ends with an event that gives the reason.
        let (begun, reason) = text.split_once("data: {\"error\":").unwrap_or((&text, ""));
        assert!(plan.response(&token).starts_with(begun.trim_end_matches('\n')), "{plan:?}: {text}");
        assert_eq!(reason.is_empty(), plan.kind != RequestKind::Stream, "{plan:?}: {text}");
        return ClientOutcome::Truncated;
    }
    let text = response.text();
    if response.status() == 200 {
        assert_eq!(text, plan.response(&token), "{plan:?}");
        return ClientOutcome::Completed;
    }
    assert!(response.status() >= 400, "{plan:?}: {}", response.status());
    let json = response.json();
    match json["error"]["code"].as_str() {
        // The leg that the error names must have a fault.
        Some(code) => {
            let blamed = match code.split_once('_') {
                Some(("prefill", _)) => plan.prefill.fault,
                Some(("decode", _)) => plan.decode.fault,
                _ => None,
            };
            assert!(blamed.is_some(), "{plan:?}: {text}");
        }
        // A server's own error.
        None => assert!(text.contains(&token), "{plan:?}: {text}"),
    }
    ClientOutcome::Rejected
}

/// The content of a truncated chunked body.
fn dechunk_partial(mut framed: &[u8]) -> Vec<u8> {
    let mut dechunk_partial = Vec::new();
    while let Some(line) = framed.windows(2).position(|window| window == b"\r\n") {
        let size = std::str::from_utf8(&framed[..line]).expect("a chunk size");
        let size = usize::from_str_radix(size, 16).expect("a chunk size in hex");
        let rest = &framed[line + 2..];
        dechunk_partial.extend_from_slice(&rest[..size.min(rest.len())]);
        framed = rest.get(size + 2..).unwrap_or_default();
    }
    dechunk_partial
}

/// Sends the requests of one client one after another, on one connection for as long as it stays open.
async fn run_client(address: std::net::SocketAddr, numbers: Range<u64>) -> (Vec<(u64, ClientOutcome)>, bool) {
    let mut open = None;
    let mut outcomes = Vec::new();
    for plan in numbers.map(Plan::new) {
        let mut client = match open.take() {
            Some(client) => client,
            None => Client::connect(address).await,
        };
        client.send_request("POST", "/generate", &[], plan.request().as_bytes()).await;
        if let Some(late) = plan.disconnect {
            if late {
                client.head().await;
            }
            outcomes.push((plan.number, ClientOutcome::Disconnected));
            continue;
        }
        let response = client.response().await;
        let outcome = outcome(&plan, &response);
        if outcome == ClientOutcome::Truncated {
            client.wait_closed().await;
        } else {
            assert!(!client.has_unread_bytes(), "{plan:?}: bytes beyond the response");
            open = Some(client);
        }
        outcomes.push((plan.number, outcome));
    }
    // A connection that is still open must be in a clean state.
    let Some(mut client) = open else { return (outcomes, false) };
    let clean = Plan::new(REQUESTS + outcomes[0].0);
    let response = client.post("/generate", clean.request()).await;
    assert_eq!(outcome(&clean, &response), ClientOutcome::Completed, "{clean:?}");
    (outcomes, true)
}

/// The bootstrap rooms that these servers saw, by token. A room belongs to one server, which may see it a
/// second time: on a new connection, after it closed a kept-alive one as soon as the request was there.
fn rooms(servers: &[&ScriptedServer]) -> HashMap<String, HashSet<u64>> {
    let mut rooms: HashMap<String, HashSet<u64>> = HashMap::new();
    let mut seen_by: HashMap<u64, (usize, u32)> = HashMap::new();
    for (index, server) in servers.iter().enumerate() {
        for seen in server.requests() {
            let body = seen.json();
            let room = body["bootstrap_room"].as_u64().unwrap();
            let (owner, times) = seen_by.entry(room).or_insert((index, 0));
            *times += 1;
            assert!(*owner == index && *times <= 2, "room {room} was seen by two servers, or three times");
            rooms.entry(body["text"].as_str().unwrap().to_owned()).or_default().insert(room);
        }
    }
    rooms
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_client_gets_its_own_response_or_an_error() {
    let (p1, p2) = (ScriptedServer::start(prefill_steps).await, ScriptedServer::start(prefill_steps).await);
    let (d1, d2) = (ScriptedServer::start(decode_steps).await, ScriptedServer::start(decode_steps).await);
    let router = Router::start_with(&[&p1, &p2], &[&d1, &d2], |config| config.worker_threads(2)).await;
    let share = REQUESTS / CONNECTIONS;
    let clients: Vec<_> = (0..CONNECTIONS)
        .map(|client| tokio::spawn(run_client(router.address(), client * share..(client + 1) * share)))
        .collect();
    let mut tally: BTreeMap<ClientOutcome, usize> = BTreeMap::new();
    let (prefill, decode) = (|| rooms(&[&p1, &p2]), || rooms(&[&d1, &d2]));
    let (mut answered, mut clean) = (HashSet::new(), 0);
    for client in clients {
        let (outcomes, was_open) = client.await.expect("every outcome is allowed by its plan");
        clean += usize::from(was_open);
        for (number, outcome) in outcomes {
            let plan = Plan::new(number);
            *tally.entry(outcome).or_default() += 1;
            if outcome == ClientOutcome::Completed {
                answered.insert(plan.token());
                assert!(plan.decode.fault.is_none(), "{plan:?}");
            }
            assert!(
                !plan.is_faultless()
                    || matches!(outcome, ClientOutcome::Completed | ClientOutcome::Disconnected),
                "{plan:?}: {outcome:?}"
            );
        }
    }
    // One server may respond before the other has recorded its request.
    kit::with_timeout("every answered request at both servers", async {
        let (mut at_prefill, mut at_decode) = (prefill(), decode());
        while answered.iter().any(|token| !at_prefill.contains_key(token) || !at_decode.contains_key(token)) {
            tokio::time::sleep(Duration::from_millis(1)).await;
            (at_prefill, at_decode) = (prefill(), decode());
        }
    })
    .await;
    let (prefill, decode) = (prefill(), decode());
    for token in &answered {
        assert!(!prefill[token].is_disjoint(&decode[token]), "{token}: no room at both servers");
    }
    // The plans cover every outcome more than once.
    assert_eq!(tally.values().sum::<usize>() as u64, REQUESTS);
    let faultless =
        (0..REQUESTS).map(Plan::new).filter(|plan| plan.is_faultless() && plan.disconnect.is_none());
    assert!(
        tally[&ClientOutcome::Completed] >= faultless.count() && tally[&ClientOutcome::Completed] >= 150,
        "{tally:?}"
    );
    assert!(
        tally[&ClientOutcome::Rejected] >= 50
            && tally[&ClientOutcome::Truncated] >= 10
            && tally[&ClientOutcome::Disconnected] >= 20,
        "{tally:?}"
    );
    assert!(clean >= 8, "{clean} connections were open at the end");
}
