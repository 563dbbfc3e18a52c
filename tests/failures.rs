//! The failure matrix: leg × moment × failure × kind of request, a test each.
//!
//! `docs/FAILURES.md` is written from the same rows; a test compares the two.

mod kit;

use std::time::{Duration, Instant};

use kit::{Answer, Client, Gate, Router, Step, Upstream};
use mini_lb::Outcome as Counted;

/// A failure must reach the client, and the other leg, in this time.
const AT_ONCE: Duration = Duration::from_millis(250);

/// What a client asks for.
#[derive(Clone, Copy)]
struct Kind {
    path: &'static str,
    stream: bool,
}

impl Kind {
    fn body(self) -> String {
        let prompt = match self.path {
            "/generate" => r#""text":"a""#,
            "/v1/completions" => r#""prompt":"a""#,
            _ => r#""messages":[]"#,
        };
        format!(r#"{{{prompt},"stream":{}}}"#, self.stream)
    }

    /// What decode answers when all is well, in two parts.
    fn answer(self) -> (Vec<u8>, Vec<u8>) {
        if !self.stream {
            let head =
                "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 11\r\n\r\n{\"text\"";
            return (head.into(), b":\"\"}".to_vec());
        }
        let first = [EVENTS_HEAD.as_bytes(), &chunk("data: {\"text\":\"a\"}\n\n")].concat();
        (first, [&chunk("data: [DONE]\n\n")[..], b"0\r\n\r\n"].concat())
    }
}

const EVENTS_HEAD: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";

fn chunk(text: &str) -> Vec<u8> {
    format!("{:x}\r\n{text}\r\n", text.len()).into()
}

/// When a leg fails.
#[derive(Clone, Copy, PartialEq)]
enum Moment {
    /// Before decode has answered anything.
    BeforeTheAnswer,
    /// After decode's head, before the first byte of its body.
    DecodeSilent,
    /// After the first bytes of decode's body.
    MidAnswer,
}

/// What the client gets.
#[derive(Clone, Copy)]
enum Outcome {
    /// An error of the router's: 502 and this code.
    BadGateway(&'static str),
    /// The leg's own refusal: status, body and headers that matter.
    Verbatim(u16),
    /// The status and the JSON of an event that refuses.
    Unhidden(u16),
    /// A stream ends with an event of this code; any answer is cut off without a clean end.
    CutOff(&'static str),
    /// Decode's answer, as if nothing had happened.
    Complete,
}

/// One way to fail.
struct Failure {
    leg: &'static str,
    moment: Moment,
    name: &'static str,
    /// `None`: nothing listens.
    steps: Option<fn() -> Vec<Step>>,
    outcome: Outcome,
}

fn refusing(status: &str, extra: &str, body: &str) -> Vec<Step> {
    let length = body.len();
    let kind = "content-type: application/problem+json";
    let answer = format!("HTTP/1.1 {status}\r\n{kind}\r\n{extra}content-length: {length}\r\n\r\n{body}");
    vec![Step::Send(answer.into()), Step::Hang]
}

fn hidden(event: &str) -> Vec<Step> {
    let events = [EVENTS_HEAD.as_bytes(), &chunk(&format!("data: {event}\n\n"))].concat();
    vec![
        Step::Send(events),
        Step::Send(chunk("data: [DONE]\n\n")),
        Step::Send(b"0\r\n\r\n".to_vec()),
        Step::Hang,
    ]
}

/// The body of each refusal.
const NO: &str = r#"{"object":"error","message":"no","code":400}"#;
const HIDDEN_ERROR: &str = r#"{"error":{"message":"too long","type":"invalid_request_error","code":400}}"#;
const HIDDEN_ABORT: &str =
    r#"{"text":"","meta_info":{"finish_reason":{"type":"abort","message":"lost","status_code":500}}}"#;

macro_rules! kinds {
    (all) => {
        kinds! {
            generate "/generate" false;
            chat "/v1/chat/completions" false;
            completions "/v1/completions" false;
        }
        kinds!(streams);
    };
    // What can only happen to a stream.
    (streams) => {
        kinds! {
            generate_stream "/generate" true;
            chat_stream "/v1/chat/completions" true;
            completions_stream "/v1/completions" true;
        }
    };
    ($($kind:ident $path:literal $stream:literal;)*) => {
        $(
            #[tokio::test]
            async fn $kind() {
                check(&FAILURE, Kind { path: $path, stream: $stream }).await;
            }
        )*
    };
}

macro_rules! failures {
    ($($leg:ident { $($name:ident, $kinds:ident, $moment:ident, $steps:expr, $outcome:expr;)* })*) => {
        $(
            mod $leg {
                $(
                    mod $name {
                        use super::super::*;

                        pub(super) const FAILURE: Failure = Failure {
                            leg: stringify!($leg),
                            moment: Moment::$moment,
                            name: stringify!($name),
                            steps: $steps,
                            outcome: $outcome,
                        };

                        kinds!($kinds);
                    }
                )*

                pub(super) const ALL: &[super::Failure] = &[$($name::FAILURE),*];
            }
        )*
    };
}

failures! {
    prefill {
        refused, all, BeforeTheAnswer, None, Outcome::BadGateway("prefill_connect");
        closed, all, BeforeTheAnswer, Some(|| vec![Step::Close]), Outcome::BadGateway("prefill_closed");
        reset, all, BeforeTheAnswer, Some(|| vec![Step::Reset]), Outcome::BadGateway("prefill_closed");
        garbage, all, BeforeTheAnswer, Some(|| vec![Step::Send(b"SSH-2.0-x\r\n\r\n".to_vec()), Step::Hang]),
            Outcome::BadGateway("prefill_bad_response");
        half_a_head, all, BeforeTheAnswer, Some(|| vec![Step::Send(b"HTTP/1.1 200 OK\r\ncont".to_vec()), Step::Close]),
            Outcome::BadGateway("prefill_closed");
        half_a_body, all, BeforeTheAnswer,
            Some(|| vec![Step::Send(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{".to_vec()), Step::Close]),
            Outcome::BadGateway("prefill_closed");
        bad_chunk, all, BeforeTheAnswer, Some(|| vec![Step::Send([EVENTS_HEAD, "zz\r\n"].concat().into()), Step::Hang]),
            Outcome::BadGateway("prefill_bad_response");
        status_400, all, BeforeTheAnswer, Some(|| refusing("400 Bad Request", "", NO)), Outcome::Verbatim(400);
        status_401, all, BeforeTheAnswer, Some(|| refusing("401 Unauthorized", "", NO)), Outcome::Verbatim(401);
        status_404, all, BeforeTheAnswer, Some(|| refusing("404 Not Found", "", NO)), Outcome::Verbatim(404);
        status_429, all, BeforeTheAnswer, Some(|| refusing("429 Too Many Requests", "retry-after: 7\r\n", NO)),
            Outcome::Verbatim(429);
        status_500, all, BeforeTheAnswer, Some(|| refusing("500 Internal Server Error", "", NO)), Outcome::Verbatim(500);
        status_503, all, BeforeTheAnswer, Some(|| refusing("503 Service Unavailable", "retry-after: 1\r\n", NO)),
            Outcome::Verbatim(503);
        error_in_a_200, all, BeforeTheAnswer, Some(|| hidden(HIDDEN_ERROR)), Outcome::Unhidden(400);
        abort_in_a_200, all, BeforeTheAnswer, Some(|| hidden(HIDDEN_ABORT)), Outcome::Unhidden(500);
        closed_late, streams, DecodeSilent, Some(|| vec![Step::Close]), Outcome::CutOff("prefill_closed");
        reset_late, streams, DecodeSilent, Some(|| vec![Step::Reset]), Outcome::CutOff("prefill_closed");
        status_500_late, streams, DecodeSilent, Some(|| refusing("500 Internal Server Error", "", NO)),
            Outcome::CutOff("prefill_refused");
        abort_in_a_200_late, streams, DecodeSilent, Some(|| hidden(HIDDEN_ABORT)), Outcome::CutOff("prefill_refused");
        closed_too_late, all, MidAnswer, Some(|| vec![Step::Close]), Outcome::Complete;
        status_500_too_late, all, MidAnswer, Some(|| refusing("500 Internal Server Error", "", NO)), Outcome::Complete;
        abort_in_a_200_too_late, all, MidAnswer, Some(|| hidden(HIDDEN_ABORT)), Outcome::Complete;
    }
    decode {
        refused, all, BeforeTheAnswer, None, Outcome::BadGateway("decode_connect");
        closed, all, BeforeTheAnswer, Some(|| vec![Step::Close]), Outcome::BadGateway("decode_closed");
        reset, all, BeforeTheAnswer, Some(|| vec![Step::Reset]), Outcome::BadGateway("decode_closed");
        garbage, all, BeforeTheAnswer, Some(|| vec![Step::Send(b"SSH-2.0-x\r\n\r\n".to_vec()), Step::Hang]),
            Outcome::BadGateway("decode_bad_response");
        half_a_head, all, BeforeTheAnswer, Some(|| vec![Step::Send(b"HTTP/1.1 200 OK\r\ncont".to_vec()), Step::Close]),
            Outcome::BadGateway("decode_closed");
        only_a_head, all, BeforeTheAnswer,
            Some(|| vec![Step::Send(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n".to_vec()), Step::Close]),
            Outcome::BadGateway("decode_closed");
        status_400, all, BeforeTheAnswer, Some(|| refusing("400 Bad Request", "", NO)), Outcome::Verbatim(400);
        status_401, all, BeforeTheAnswer, Some(|| refusing("401 Unauthorized", "", NO)), Outcome::Verbatim(401);
        status_404, all, BeforeTheAnswer, Some(|| refusing("404 Not Found", "", NO)), Outcome::Verbatim(404);
        status_429, all, BeforeTheAnswer, Some(|| refusing("429 Too Many Requests", "retry-after: 7\r\n", NO)),
            Outcome::Verbatim(429);
        status_500, all, BeforeTheAnswer, Some(|| refusing("500 Internal Server Error", "", NO)), Outcome::Verbatim(500);
        status_503, all, BeforeTheAnswer, Some(|| refusing("503 Service Unavailable", "retry-after: 1\r\n", NO)),
            Outcome::Verbatim(503);
        closed_mid_answer, all, MidAnswer, Some(|| vec![Step::Close]), Outcome::CutOff("decode_closed");
        reset_mid_answer, all, MidAnswer, Some(|| vec![Step::Reset]), Outcome::CutOff("decode_closed");
        bad_chunk_mid_answer, streams, MidAnswer, Some(|| vec![Step::Send(b"zz\r\n".to_vec()), Step::Close]),
            Outcome::CutOff("decode_bad_response");
    }
}

/// Runs one row. Time is part of what is tested, and this machine may be busy: a slow run gets two more chances.
async fn check(failure: &Failure, kind: Kind) {
    for chance in 1.. {
        let took = match failure.moment {
            Moment::BeforeTheAnswer => before_the_answer(failure, kind).await,
            // Only streams: the head of a complete answer waits for its body, so a failure still has a status.
            Moment::DecodeSilent => decode_silent(failure, kind).await,
            Moment::MidAnswer => mid_answer(failure, kind).await,
        };
        if took < AT_ONCE {
            return;
        }
        assert!(chance < 3, "{} {}: {took:?}", failure.leg, failure.name);
    }
}

/// A pair of which one leg fails by its script and the other follows `other`.
struct Pair {
    failing: Upstream,
    other: Upstream,
    router: Router,
}

async fn pair(failure: &Failure, before: Vec<Step>, other: Vec<Step>) -> Pair {
    let steps = move |failure: &Failure| {
        let after = failure.steps.map(|steps| steps()).unwrap_or_default();
        [before.clone(), after].concat()
    };
    let steps = steps(failure);
    let failing = Upstream::start(move |_| steps.clone()).await;
    if failure.steps.is_none() {
        failing.stop_listening().await;
    }
    let other = Upstream::start(move |_| other.clone()).await;
    let (prefill, decode) = if failure.leg == "prefill" { (&failing, &other) } else { (&other, &failing) };
    let router = Router::start(&[prefill], &[decode]).await;
    Pair { failing, other, router }
}

async fn before_the_answer(failure: &Failure, kind: Kind) -> Duration {
    let pair = pair(failure, Vec::new(), vec![Step::Hang]).await;
    let start = Instant::now();
    let answer = pair.router.client().await.post(kind.path, kind.body()).await;
    let took = start.elapsed();
    assert_outcome(failure, &pair, &answer);
    pair.other.closed(pair.other.opened()).await;
    assert_counted(failure, &pair).await;
    took
}

async fn decode_silent(failure: &Failure, kind: Kind) -> Duration {
    let now = Gate::new();
    let pair =
        pair(failure, vec![Step::Wait(now.clone())], vec![Step::Send(EVENTS_HEAD.into()), Step::Hang]).await;
    let mut client = pair.router.client().await;
    client.start("POST", kind.path, &[], kind.body().as_bytes()).await;
    let head = client.head().await;
    fails_now(failure, &pair, client, head, &now).await
}

async fn mid_answer(failure: &Failure, kind: Kind) -> Duration {
    let (now, rest) = (Gate::new(), Gate::new());
    let (first, last) = kind.answer();
    if failure.leg == "decode" {
        let pair = pair(failure, vec![Step::Send(first), Step::Wait(now.clone())], vec![Step::Hang]).await;
        let (client, head) = begun(&pair, kind).await;
        return fails_now(failure, &pair, client, head, &now).await;
    }
    let decode = vec![Step::Send(first), Step::Wait(rest.clone()), Step::Send(last)];
    let pair = pair(failure, vec![Step::Wait(now.clone())], decode).await;
    let (mut client, head) = begun(&pair, kind).await;
    now.open();
    pair.failing.closed(1).await;
    rest.open();
    let answer = client.rest(head).await;
    assert_outcome(failure, &pair, &answer);
    assert_counted(failure, &pair).await;
    Duration::ZERO
}

/// Waits until the client has something of the body.
async fn begun(pair: &Pair, kind: Kind) -> (Client, kit::Head) {
    let mut client = pair.router.client().await;
    client.start("POST", kind.path, &[], kind.body().as_bytes()).await;
    let head = client.head().await;
    client.read_until("text").await;
    (client, head)
}

async fn fails_now(
    failure: &Failure,
    pair: &Pair,
    mut client: Client,
    head: kit::Head,
    now: &Gate,
) -> Duration {
    let start = Instant::now();
    now.open();
    let answer = client.rest(head).await;
    let took = start.elapsed();
    assert_outcome(failure, pair, &answer);
    pair.other.closed(pair.other.opened()).await;
    assert_counted(failure, pair).await;
    took
}

fn assert_outcome(failure: &Failure, pair: &Pair, answer: &Answer) {
    let header = |name| answer.head.header(name);
    match failure.outcome {
        Outcome::BadGateway(code) => {
            assert_eq!((answer.status(), answer.code().as_str()), (502, code));
            assert_eq!(answer.json()["error"]["server"], pair.failing.url());
        }
        Outcome::Verbatim(status) => {
            assert_eq!((answer.status(), answer.text()), (status, NO));
            assert_eq!(header("content-type"), Some("application/problem+json"));
            let retry_after = match status {
                429 => Some("7"),
                503 => Some("1"),
                _ => None,
            };
            assert_eq!(header("retry-after"), retry_after);
        }
        Outcome::Unhidden(status) => {
            let json = if status == 400 { HIDDEN_ERROR } else { HIDDEN_ABORT };
            assert_eq!((answer.status(), answer.text()), (status, json));
            assert_eq!(header("content-type"), Some("application/json"));
        }
        Outcome::CutOff(code) => {
            assert!(!answer.complete, "a clean end");
            let text = String::from_utf8_lossy(&answer.body);
            let told = text.contains(&format!("\"code\":\"{code}\""));
            assert_eq!(told, header("content-type") == Some("text/event-stream; charset=utf-8"), "{text}");
        }
        Outcome::Complete => {
            assert!(answer.complete);
            let text = answer.text();
            assert!(
                text == "{\"text\":\"\"}" || text == "data: {\"text\":\"a\"}\n\ndata: [DONE]\n\n",
                "{text}"
            );
        }
    }
}

/// How the failing leg is counted. The other one is cancelled, or completes.
fn counted(failure: &Failure) -> Counted {
    match failure.name.split('_').collect::<Vec<_>>()[..] {
        ["refused"] => Counted::Connect,
        ["garbage"] | ["bad", ..] => Counted::BadResponse,
        ["status", "500", ..] => Counted::ServerError,
        ["status" | "error" | "abort", ..] => Counted::Refused,
        ["closed" | "reset" | "half" | "only", ..] => Counted::Closed,
        _ => panic!("{} is a new failure", failure.name),
    }
}

/// Each leg is counted once, as what it was, and on its own server.
async fn assert_counted(failure: &Failure, pair: &Pair) {
    pair.router.idle().await;
    let other =
        if matches!(failure.outcome, Outcome::Complete) { Counted::Completed } else { Counted::Cancelled };
    for (server, expected) in [(&pair.failing, counted(failure)), (&pair.other, other)] {
        let known = pair.router.knows(server);
        let counts = Counted::ALL.map(|outcome| (outcome, known.ended(outcome)));
        // A connection that could not be opened is tried a second time.
        let attempts = if failure.steps.is_none() { 2 } else { 1 };
        let expected = Counted::ALL.map(|outcome| (outcome, if outcome == expected { attempts } else { 0 }));
        assert_eq!(counts, expected, "{}", server.url());
    }
}

/// The matrix as the document shows it.
fn table() -> String {
    let mut table = String::from(
        "| leg | moment | failure | counted | the client gets | the other leg | counted |\n|---|---|---|---|---|---|---|\n",
    );
    for failure in prefill::ALL.iter().chain(decode::ALL) {
        let moment = match failure.moment {
            Moment::BeforeTheAnswer => "before decode's answer",
            Moment::DecodeSilent => "decode has sent a stream's head only",
            Moment::MidAnswer => "decode's body has begun",
        };
        let (gets, other) = match failure.outcome {
            Outcome::BadGateway(code) => (format!("502 `{code}`"), "closed"),
            Outcome::Verbatim(status) => (format!("that {status}, verbatim"), "closed"),
            Outcome::Unhidden(status) => (format!("{status} and the event's JSON"), "closed"),
            Outcome::CutOff(code) => {
                (format!("an event `{code}` in a stream; cut off in any case"), "closed")
            }
            Outcome::Complete => ("decode's answer, complete".to_owned(), "goes on"),
        };
        let name = failure.name.replace('_', " ");
        let counted = counted(failure).as_str();
        let other_counted = if other == "closed" { Counted::Cancelled } else { Counted::Completed }.as_str();
        table += &format!(
            "| {} | {moment} | {name} | `{counted}` | {gets} | {other} | `{other_counted}` |\n",
            failure.leg
        );
    }
    table
}

#[test]
fn the_document_shows_this_matrix() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/FAILURES.md");
    let document = std::fs::read_to_string(path).unwrap();
    let table = table();
    assert!(document.contains(&table), "docs/FAILURES.md must have this table:\n\n{table}");
}
