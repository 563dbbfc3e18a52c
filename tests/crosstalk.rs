//! Many requests at once, answered by servers that do everything servers do wrong: every client gets its own answer or
//! an error.
//!
//! What happens to a request is written in the request: its number says what it asks for, how either server answers,
//! and what the client does. Whatever comes back carries the token of the request that it answers.

mod kit;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::time::Duration;

use fastrand::Rng;
use kit::{Answer, Client, Router, Seen, Step, Upstream};

const REQUESTS: u64 = 400;
const CONNECTIONS: u64 = 16;

/// What a client asks for.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Whole,
    Stream,
    /// Prompt logprobs: one answer, made of both servers'.
    Merged,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    Refuses(&'static str),
    /// Prefill only: a stream that says in an event that the request was aborted.
    HidesAnAbort,
    Closes,
    Resets,
    ClosesInTheHead,
    ClosesInTheBody,
    ResetsInTheBody,
    IsNoHttp,
    SendsABadChunk,
}

const FAULTS: [Fault; 11] = [
    Fault::Refuses("400 Bad Request"),
    Fault::Refuses("429 Too Many Requests"),
    Fault::Refuses("503 Service Unavailable"),
    Fault::HidesAnAbort,
    Fault::Closes,
    Fault::Resets,
    Fault::ClosesInTheHead,
    Fault::ClosesInTheBody,
    Fault::ResetsInTheBody,
    Fault::IsNoHttp,
    Fault::SendsABadChunk,
];

/// What a server does after its answer. None of it is the client's business.
#[derive(Debug, Clone, Copy)]
enum After {
    StaysOpen,
    Closes,
    /// Sends an answer that nobody has asked for.
    SaysMore,
}

/// How one server answers one request.
#[derive(Debug)]
struct Manner {
    fault: Option<Fault>,
    chunked: bool,
    slow: bool,
    after: After,
}

/// All that happens to one request.
#[derive(Debug)]
struct Plan {
    number: u64,
    kind: Kind,
    prefill: Manner,
    decode: Manner,
    /// How much decode has to say.
    events: usize,
    /// The client leaves: at once, or when the answer has begun.
    leaves: Option<bool>,
}

impl Plan {
    fn new(number: u64) -> Self {
        let mut rng = Rng::with_seed(number);
        // The first number hardly depends on the seed.
        rng.u64(..);
        let kind = [Kind::Whole, Kind::Stream, Kind::Stream, Kind::Merged][rng.usize(..4)];
        let (prefill, decode) = match rng.u8(..10) {
            _ if number >= REQUESTS => (false, false),
            0..5 => (false, false),
            5..7 => (true, false),
            7..9 => (false, true),
            _ => (true, true),
        };
        let leaves = (number < REQUESTS && rng.u8(..12) == 0).then(|| rng.bool());
        let mut manner = |faulty: bool, chunked: bool| Manner {
            fault: faulty.then(|| FAULTS[rng.usize(..FAULTS.len())]),
            chunked: chunked || rng.bool(),
            slow: rng.u8(..3) == 0,
            after: [After::StaysOpen, After::StaysOpen, After::Closes, After::SaysMore][rng.usize(..4)],
        };
        let prefill = manner(prefill, false);
        let mut decode = manner(decode, kind == Kind::Stream);
        if decode.fault == Some(Fault::HidesAnAbort) {
            decode.fault = Some(Fault::Closes);
        }
        Self { number, kind, prefill, decode, events: rng.usize(1..200), leaves }
    }

    /// The plan that a request asks its server to follow.
    fn of(seen: &Seen) -> (Self, String) {
        let body = seen.json();
        (Self::new(body["number"].as_u64().unwrap()), body["text"].as_str().unwrap().to_owned())
    }

    fn token(&self) -> String {
        format!("token-{:04}", self.number)
    }

    fn request(&self) -> String {
        let (number, token, stream) = (self.number, self.token(), self.kind == Kind::Stream);
        let merged =
            if self.kind == Kind::Merged { r#","return_logprob":true,"logprob_start_len":0"# } else { "" };
        format!(r#"{{"number":{number},"text":"{token}","stream":{stream}{merged}}}"#)
    }

    /// Whether nothing keeps the client from its answer.
    fn is_faultless(&self) -> bool {
        self.prefill.fault.is_none() && self.decode.fault.is_none()
    }

    /// What the client of this token gets.
    fn answer(&self, token: &str) -> String {
        let decode = self.decode_body(token).concat();
        decode.replace(r#""input_token_logprobs":[]"#, &prompt_logprobs(token))
    }

    fn decode_body(&self, token: &str) -> Vec<String> {
        let words = || (0..self.events).map(|count| format!("{token}:{count} "));
        match self.kind {
            Kind::Whole => vec![format!(r#"{{"text":"{}"}}"#, words().collect::<String>())],
            Kind::Merged => {
                let text: String = words().collect();
                vec![format!(r#"{{"text":"{text}","meta_info":{{"input_token_logprobs":[]}}}}"#)]
            }
            Kind::Stream => {
                let events = words().map(|word| format!("data: {{\"text\":\"{word}\"}}\n\n"));
                events.chain(["data: [DONE]\n\n".to_owned()]).collect()
            }
        }
    }

    fn prefill_body(&self, token: &str) -> Vec<String> {
        let lists = prompt_logprobs(token);
        match self.kind {
            Kind::Whole => vec![format!(r#"{{"text":"{token}"}}"#)],
            Kind::Merged => vec![format!(r#"{{"text":"","meta_info":{{{lists}}}}}"#)],
            Kind::Stream => {
                vec![format!("data: {{\"text\":\"{token}\"}}\n\n"), "data: [DONE]\n\n".to_owned()]
            }
        }
    }
}

fn prompt_logprobs(token: &str) -> String {
    format!(r#""input_token_logprobs":[[null,7,"{token}"],[-0.5,8,"{token}"]]"#)
}

fn prefill_steps(seen: &Seen) -> Vec<Step> {
    let (plan, token) = Plan::of(seen);
    steps(&plan.prefill, &plan.prefill_body(&token), &token, plan.kind == Kind::Stream, plan.number)
}

fn decode_steps(seen: &Seen) -> Vec<Step> {
    let (plan, token) = Plan::of(seen);
    // Another seed than prefill's: the two are cut in other places.
    steps(&plan.decode, &plan.decode_body(&token), &token, plan.kind == Kind::Stream, !plan.number)
}

/// An answer that nobody has asked for.
const MORE: &str = "HTTP/1.1 200 OK\r\ncontent-length: 22\r\n\r\n{\"text\":\"token-stray\"}\n";

fn steps(manner: &Manner, body: &[String], token: &str, events: bool, seed: u64) -> Vec<Step> {
    let mut rng = Rng::with_seed(seed);
    let (head, framed) = framed("200 OK", body, events, manner.chunked);
    let whole = [head.as_bytes(), framed.as_bytes()].concat();
    // Short of its last byte.
    let part = &whole[..rng.usize(head.len()..whole.len())];
    let Some(fault) = manner.fault else {
        let mut steps = in_pieces(&whole, manner.slow, &mut rng);
        match (manner.after, steps.last_mut()) {
            (After::Closes, _) => steps.push(Step::Close),
            // In one piece with the answer's end, so that it is there before the next request.
            (After::SaysMore, Some(Step::Send(last))) => last.extend_from_slice(MORE.as_bytes()),
            _ => {}
        }
        return steps;
    };
    let send = |text: &str| Step::Send(text.into());
    let broken = |last: Step, rng: &mut Rng| {
        let mut steps = in_pieces(part, manner.slow, rng);
        steps.push(last);
        steps
    };
    match fault {
        Fault::Refuses(status) => {
            let (head, body) = framed_error(status, token, manner.chunked);
            in_pieces(&[head, body].concat().into_bytes(), manner.slow, &mut rng)
        }
        Fault::HidesAnAbort => {
            let reason = format!(r#"{{"type":"abort","message":"{token}","status_code":500}}"#);
            let event = format!("data: {{\"text\":\"\",\"meta_info\":{{\"finish_reason\":{reason}}}}}\n\n");
            let (head, body) = self::framed("200 OK", &[event], true, true);
            in_pieces(&[head, body].concat().into_bytes(), manner.slow, &mut rng)
        }
        Fault::Closes => vec![Step::Close],
        Fault::Resets => vec![Step::Reset],
        Fault::ClosesInTheHead => vec![send("HTTP/1.1 200 OK\r\ncontent-le"), Step::Close],
        Fault::ClosesInTheBody => broken(Step::Close, &mut rng),
        Fault::ResetsInTheBody => broken(Step::Reset, &mut rng),
        Fault::IsNoHttp => vec![send("SSH-2.0-server\r\n\r\n"), Step::Close],
        Fault::SendsABadChunk => {
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

/// Cuts bytes at random places.
fn in_pieces(bytes: &[u8], slow: bool, rng: &mut Rng) -> Vec<Step> {
    let mut cuts: Vec<usize> = (0..rng.usize(..6)).map(|_| rng.usize(..bytes.len())).collect();
    cuts.extend([0, bytes.len()]);
    cuts.sort_unstable();
    cuts.dedup();
    let pieces = cuts.windows(2).map(|ends| Step::Send(bytes[ends[0]..ends[1]].to_vec()));
    let pause = |rng: &mut Rng| Step::Pause(Duration::from_micros(if slow { rng.u64(..4_000) } else { 0 }));
    pieces.flat_map(|piece| [pause(rng), piece]).collect()
}

/// How a request ended for its client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum End {
    Answered,
    Refused,
    CutOff,
    Left,
}

/// Says how a request ended, if it ended in a way that is allowed.
fn end(plan: &Plan, answer: &Answer) -> End {
    let token = plan.token();
    if !answer.complete {
        assert_eq!(answer.status(), 200, "{plan:?}");
        let body = if answer.head.is_chunked() { contents(&answer.body) } else { answer.body.clone() };
        let text = String::from_utf8_lossy(&body);
        // In a stream an event says why.
        let (begun, reason) = text.split_once("data: {\"error\":").unwrap_or((&text, ""));
        assert!(plan.answer(&token).starts_with(begun.trim_end_matches('\n')), "{plan:?}: {text}");
        assert_eq!(reason.is_empty(), plan.kind != Kind::Stream, "{plan:?}: {text}");
        return End::CutOff;
    }
    let text = answer.text();
    if answer.status() == 200 {
        assert_eq!(text, plan.answer(&token), "{plan:?}");
        return End::Answered;
    }
    assert!(answer.status() >= 400, "{plan:?}: {}", answer.status());
    let json = answer.json();
    match json["error"]["code"].as_str() {
        // The leg that is blamed is one that fails.
        Some(code) => {
            let blamed = match code.split_once('_') {
                Some(("prefill", _)) => plan.prefill.fault,
                Some(("decode", _)) => plan.decode.fault,
                _ => None,
            };
            assert!(blamed.is_some(), "{plan:?}: {text}");
        }
        // A server's own words.
        None => assert!(text.contains(&token), "{plan:?}: {text}"),
    }
    End::Refused
}

/// What is in the chunks of a body that was cut off.
fn contents(mut framed: &[u8]) -> Vec<u8> {
    let mut contents = Vec::new();
    while let Some(line) = framed.windows(2).position(|window| window == b"\r\n") {
        let size = std::str::from_utf8(&framed[..line]).expect("a chunk size");
        let size = usize::from_str_radix(size, 16).expect("a chunk size in hex");
        let rest = &framed[line + 2..];
        contents.extend_from_slice(&rest[..size.min(rest.len())]);
        framed = rest.get(size + 2..).unwrap_or_default();
    }
    contents
}

/// Sends the requests of one client, one after another, on a connection that is kept as long as it lives.
async fn converse(address: std::net::SocketAddr, numbers: Range<u64>) -> (Vec<(u64, End)>, bool) {
    let mut open = None;
    let mut ends = Vec::new();
    for plan in numbers.map(Plan::new) {
        let mut client = match open.take() {
            Some(client) => client,
            None => Client::connect(address).await,
        };
        client.start("POST", "/generate", &[], plan.request().as_bytes()).await;
        if let Some(late) = plan.leaves {
            if late {
                client.head().await;
            }
            ends.push((plan.number, End::Left));
            continue;
        }
        let answer = client.answer().await;
        let end = end(&plan, &answer);
        if end == End::CutOff {
            client.closed().await;
        } else {
            assert!(!client.has_leftovers(), "{plan:?}: bytes that belong to no answer");
            open = Some(client);
        }
        ends.push((plan.number, end));
    }
    // Whatever happened on it, a connection that is open is as good as new.
    let Some(mut client) = open else { return (ends, false) };
    let clean = Plan::new(REQUESTS + ends[0].0);
    let answer = client.post("/generate", clean.request()).await;
    assert_eq!(end(&clean, &answer), End::Answered, "{clean:?}");
    (ends, true)
}

/// The rooms in which servers saw each request, by its token.
fn rooms(servers: &[&Upstream]) -> HashMap<String, HashSet<u64>> {
    let mut rooms: HashMap<String, HashSet<u64>> = HashMap::new();
    for seen in servers.iter().flat_map(|server| server.seen()) {
        let body = seen.json();
        let room = body["bootstrap_room"].as_u64().unwrap();
        let of_token = rooms.entry(body["text"].as_str().unwrap().to_owned()).or_default();
        assert!(of_token.insert(room), "a room was used twice");
    }
    rooms
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_client_gets_its_own_answer_or_an_error() {
    let (p1, p2) = (Upstream::start(prefill_steps).await, Upstream::start(prefill_steps).await);
    let (d1, d2) = (Upstream::start(decode_steps).await, Upstream::start(decode_steps).await);
    let router = Router::start_with(&[&p1, &p2], &[&d1, &d2], |config| config.worker_threads(2)).await;
    let share = REQUESTS / CONNECTIONS;
    let clients: Vec<_> = (0..CONNECTIONS)
        .map(|client| tokio::spawn(converse(router.address(), client * share..(client + 1) * share)))
        .collect();
    let mut tally: BTreeMap<End, usize> = BTreeMap::new();
    let (prefill, decode) = (|| rooms(&[&p1, &p2]), || rooms(&[&d1, &d2]));
    let (mut answered, mut clean) = (HashSet::new(), 0);
    for client in clients {
        let (ends, was_open) = client.await.expect("every answer is as it may be");
        clean += usize::from(was_open);
        for (number, end) in ends {
            let plan = Plan::new(number);
            *tally.entry(end).or_default() += 1;
            if end == End::Answered {
                answered.insert(plan.token());
                assert!(plan.decode.fault.is_none(), "{plan:?}");
            }
            assert!(!plan.is_faultless() || matches!(end, End::Answered | End::Left), "{plan:?}: {end:?}");
        }
    }
    // One server may be done before the other has noted its request.
    kit::patiently("every answered request at both servers", async {
        let (mut at_prefill, mut at_decode) = (prefill(), decode());
        while answered.iter().any(|token| !at_prefill.contains_key(token) || !at_decode.contains_key(token)) {
            tokio::time::sleep(Duration::from_millis(1)).await;
            (at_prefill, at_decode) = (prefill(), decode());
        }
    })
    .await;
    let (prefill, decode) = (prefill(), decode());
    for token in &answered {
        assert!(!prefill[token].is_disjoint(&decode[token]), "{token}: its servers never met");
    }
    // It was a storm: everything that can happen did, and more than once.
    assert_eq!(tally.values().sum::<usize>() as u64, REQUESTS);
    let faultless = (0..REQUESTS).map(Plan::new).filter(|plan| plan.is_faultless() && plan.leaves.is_none());
    assert!(tally[&End::Answered] >= faultless.count() && tally[&End::Answered] >= 150, "{tally:?}");
    assert!(tally[&End::Refused] >= 50 && tally[&End::CutOff] >= 10 && tally[&End::Left] >= 20, "{tally:?}");
    assert!(clean >= 8, "{clean} connections were open at the end");
}
