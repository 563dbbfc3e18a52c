//! The failure matrix: one test for each leg × moment × failure × kind of request.
//!
//! `docs/FAILURES.md` has the same rows; a test compares the two.

mod kit;

use std::time::{Duration, Instant};

use kit::{Client, Gate, Response, Router, ScriptedServer, Step, chunk};
use mini_lb::Outcome as LegOutcome;

/// Within this time a failure must reach the client and the other leg.
const LIMIT: Duration = Duration::from_millis(250);

/// What a client asks for.
#[derive(Clone, Copy)]
struct RequestKind {
    path: &'static str,
    stream: bool,
}

impl RequestKind {
    fn body(self) -> String {
        let prompt = match self.path {
            "/generate" => r#""text":"a""#,
            "/v1/completions" => r#""prompt":"a""#,
            _ => r#""messages":[]"#,
        };
        format!(r#"{{{prompt},"stream":{}}}"#, self.stream)
    }

    /// Decode's complete response, in two parts.
    fn response(self) -> (Vec<u8>, Vec<u8>) {
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

/// When a leg fails.
#[derive(Clone, Copy, PartialEq)]
enum Moment {
    /// Before decode has sent anything.
    BeforeResponse,
    /// After decode's head, before the first byte of its body.
    AfterDecodeHead,
    /// After the first bytes of decode's body.
    MidBody,
}

/// What the client gets.
#[derive(Clone, Copy)]
enum Outcome {
    /// The router's own error: 502 and this code.
    BadGateway(&'static str),
    /// The leg's own error response: status, body and relevant headers.
    Verbatim(u16),
    /// Status and JSON of an error event in a 200 stream.
    ErrorFromEvent(u16),
    /// Truncated; a stream has an event with this code before.
    Truncated(&'static str),
    /// Decode's complete response, as if nothing had failed.
    Complete,
}

/// A row of the matrix.
struct Failure {
    leg: &'static str,
    moment: Moment,
    name: &'static str,
    /// `None`: nothing listens.
    steps: Option<fn() -> Vec<Step>>,
    outcome: Outcome,
}

fn error_response(status: &str, extra: &str, body: &str) -> Vec<Step> {
    let length = body.len();
    let kind = "content-type: application/problem+json";
    let response = format!("HTTP/1.1 {status}\r\n{kind}\r\n{extra}content-length: {length}\r\n\r\n{body}");
    vec![Step::Send(response.into()), Step::Hang]
}

fn event_stream(event: &str) -> Vec<Step> {
    let events = [EVENTS_HEAD.as_bytes(), &chunk(&format!("data: {event}\n\n"))].concat();
    vec![
        Step::Send(events),
        Step::Send(chunk("data: [DONE]\n\n")),
        Step::Send(b"0\r\n\r\n".to_vec()),
        Step::Hang,
    ]
}

/// The body of each error response.
const ERROR_BODY: &str = r#"{"object":"error","message":"no","code":400}"#;
const ERROR_EVENT: &str = r#"{"error":{"message":"too long","type":"invalid_request_error","code":400}}"#;
const ABORT_EVENT: &str =
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
    // Failures that are possible only in a stream.
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
                check(&FAILURE, RequestKind { path: $path, stream: $stream }).await;
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
        refused, all, BeforeResponse, None, Outcome::BadGateway("prefill_connect");
        closed, all, BeforeResponse, Some(|| vec![Step::Close]), Outcome::BadGateway("prefill_closed");
        reset, all, BeforeResponse, Some(|| vec![Step::Reset]), Outcome::BadGateway("prefill_closed");
        garbage, all, BeforeResponse, Some(|| vec![Step::Send(b"SSH-2.0-x\r\n\r\n".to_vec()), Step::Hang]),
            Outcome::BadGateway("prefill_bad_response");
        half_a_head, all, BeforeResponse, Some(|| vec![Step::Send(b"HTTP/1.1 200 OK\r\ncont".to_vec()), Step::Close]),
            Outcome::BadGateway("prefill_closed");
        half_a_body, all, BeforeResponse,
            Some(|| vec![Step::Send(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{".to_vec()), Step::Close]),
            Outcome::BadGateway("prefill_closed");
        bad_chunk, all, BeforeResponse, Some(|| vec![Step::Send([EVENTS_HEAD, "zz\r\n"].concat().into()), Step::Hang]),
            Outcome::BadGateway("prefill_bad_response");
        status_400, all, BeforeResponse, Some(|| error_response("400 Bad Request", "", ERROR_BODY)), Outcome::Verbatim(400);
        status_401, all, BeforeResponse, Some(|| error_response("401 Unauthorized", "", ERROR_BODY)), Outcome::Verbatim(401);
        status_404, all, BeforeResponse, Some(|| error_response("404 Not Found", "", ERROR_BODY)), Outcome::Verbatim(404);
        status_429, all, BeforeResponse, Some(|| error_response("429 Too Many Requests", "retry-after: 7\r\n", ERROR_BODY)),
            Outcome::Verbatim(429);
        status_500, all, BeforeResponse, Some(|| error_response("500 Internal Server Error", "", ERROR_BODY)), Outcome::Verbatim(500);
        status_503, all, BeforeResponse, Some(|| error_response("503 Service Unavailable", "retry-after: 1\r\n", ERROR_BODY)),
            Outcome::Verbatim(503);
        error_in_a_200, all, BeforeResponse, Some(|| event_stream(ERROR_EVENT)), Outcome::ErrorFromEvent(400);
        abort_in_a_200, all, BeforeResponse, Some(|| event_stream(ABORT_EVENT)), Outcome::ErrorFromEvent(500);
        closed_late, streams, AfterDecodeHead, Some(|| vec![Step::Close]), Outcome::Truncated("prefill_closed");
        reset_late, streams, AfterDecodeHead, Some(|| vec![Step::Reset]), Outcome::Truncated("prefill_closed");
        status_500_late, streams, AfterDecodeHead, Some(|| error_response("500 Internal Server Error", "", ERROR_BODY)),
            Outcome::Truncated("prefill_refused");
        abort_in_a_200_late, streams, AfterDecodeHead, Some(|| event_stream(ABORT_EVENT)), Outcome::Truncated("prefill_refused");
        closed_too_late, all, MidBody, Some(|| vec![Step::Close]), Outcome::Complete;
        status_500_too_late, all, MidBody, Some(|| error_response("500 Internal Server Error", "", ERROR_BODY)), Outcome::Complete;
        abort_in_a_200_too_late, all, MidBody, Some(|| event_stream(ABORT_EVENT)), Outcome::Complete;
    }
    decode {
        refused, all, BeforeResponse, None, Outcome::BadGateway("decode_connect");
        closed, all, BeforeResponse, Some(|| vec![Step::Close]), Outcome::BadGateway("decode_closed");
        reset, all, BeforeResponse, Some(|| vec![Step::Reset]), Outcome::BadGateway("decode_closed");
        garbage, all, BeforeResponse, Some(|| vec![Step::Send(b"SSH-2.0-x\r\n\r\n".to_vec()), Step::Hang]),
            Outcome::BadGateway("decode_bad_response");
        half_a_head, all, BeforeResponse, Some(|| vec![Step::Send(b"HTTP/1.1 200 OK\r\ncont".to_vec()), Step::Close]),
            Outcome::BadGateway("decode_closed");
        only_a_head, all, BeforeResponse,
            Some(|| vec![Step::Send(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n".to_vec()), Step::Close]),
            Outcome::BadGateway("decode_closed");
        status_400, all, BeforeResponse, Some(|| error_response("400 Bad Request", "", ERROR_BODY)), Outcome::Verbatim(400);
        status_401, all, BeforeResponse, Some(|| error_response("401 Unauthorized", "", ERROR_BODY)), Outcome::Verbatim(401);
        status_404, all, BeforeResponse, Some(|| error_response("404 Not Found", "", ERROR_BODY)), Outcome::Verbatim(404);
        status_429, all, BeforeResponse, Some(|| error_response("429 Too Many Requests", "retry-after: 7\r\n", ERROR_BODY)),
            Outcome::Verbatim(429);
        status_500, all, BeforeResponse, Some(|| error_response("500 Internal Server Error", "", ERROR_BODY)), Outcome::Verbatim(500);
        status_503, all, BeforeResponse, Some(|| error_response("503 Service Unavailable", "retry-after: 1\r\n", ERROR_BODY)),
            Outcome::Verbatim(503);
        closed_mid_answer, all, MidBody, Some(|| vec![Step::Close]), Outcome::Truncated("decode_closed");
        reset_mid_answer, all, MidBody, Some(|| vec![Step::Reset]), Outcome::Truncated("decode_closed");
        bad_chunk_mid_answer, streams, MidBody, Some(|| vec![Step::Send(b"zz\r\n".to_vec()), Step::Close]),
            Outcome::Truncated("decode_bad_response");
    }
}

/// Runs one row. A slow run is repeated twice, because the time limit is part of the test and the machine may
/// be busy.
async fn check(failure: &Failure, kind: RequestKind) {
    for chance in 1.. {
        let took = match failure.moment {
            Moment::BeforeResponse => before_response(failure, kind).await,
            // Streams only: the head of another response waits for its body, so a failure still gets a
            // status.
            Moment::AfterDecodeHead => after_decode_head(failure, kind).await,
            Moment::MidBody => mid_body(failure, kind).await,
        };
        if took < LIMIT {
            return;
        }
        assert!(chance < 3, "{} {}: {took:?}", failure.leg, failure.name);
    }
}

/// A pair of which one leg fails by its script and the other follows `other`.
struct Pair {
    failing: ScriptedServer,
    other: ScriptedServer,
    router: Router,
}

async fn pair(failure: &Failure, before: Vec<Step>, other: Vec<Step>) -> Pair {
    let steps = move |failure: &Failure| {
        let after = failure.steps.map(|steps| steps()).unwrap_or_default();
        [before.clone(), after].concat()
    };
    let steps = steps(failure);
    let failing = ScriptedServer::start(move |_| steps.clone()).await;
    if failure.steps.is_none() {
        failing.stop_listening().await;
    }
    let other = ScriptedServer::start(move |_| other.clone()).await;
    let (prefill, decode) = if failure.leg == "prefill" { (&failing, &other) } else { (&other, &failing) };
    let router = Router::start(&[prefill], &[decode]).await;
    Pair { failing, other, router }
}

async fn before_response(failure: &Failure, kind: RequestKind) -> Duration {
    let pair = pair(failure, Vec::new(), vec![Step::Hang]).await;
    let start = Instant::now();
    let response = pair.router.client().await.post(kind.path, kind.body()).await;
    let took = start.elapsed();
    assert_outcome(failure, &pair, &response);
    pair.other.wait_closed(pair.other.connections()).await;
    assert_leg_outcomes(failure, &pair).await;
    took
}

async fn after_decode_head(failure: &Failure, kind: RequestKind) -> Duration {
    let now = Gate::new();
    let pair =
        pair(failure, vec![Step::Wait(now.clone())], vec![Step::Send(EVENTS_HEAD.into()), Step::Hang]).await;
    let mut client = pair.router.client().await;
    client.send_request("POST", kind.path, &[], kind.body().as_bytes()).await;
    let head = client.head().await;
    fail_now(failure, &pair, client, head, &now).await
}

async fn mid_body(failure: &Failure, kind: RequestKind) -> Duration {
    let (now, rest) = (Gate::new(), Gate::new());
    let (first, last) = kind.response();
    if failure.leg == "decode" {
        let pair = pair(failure, vec![Step::Send(first), Step::Wait(now.clone())], vec![Step::Hang]).await;
        let (client, head) = first_bytes(&pair, kind).await;
        return fail_now(failure, &pair, client, head, &now).await;
    }
    let decode = vec![Step::Send(first), Step::Wait(rest.clone()), Step::Send(last)];
    let pair = pair(failure, vec![Step::Wait(now.clone())], decode).await;
    let (mut client, head) = first_bytes(&pair, kind).await;
    now.open();
    pair.failing.wait_closed(1).await;
    rest.open();
    let response = client.finish_response(head).await;
    assert_outcome(failure, &pair, &response);
    assert_leg_outcomes(failure, &pair).await;
    Duration::ZERO
}

/// Waits until the client has received the first bytes of the body.
async fn first_bytes(pair: &Pair, kind: RequestKind) -> (Client, kit::Head) {
    let mut client = pair.router.client().await;
    client.send_request("POST", kind.path, &[], kind.body().as_bytes()).await;
    let head = client.head().await;
    client.read_until("text").await;
    (client, head)
}

async fn fail_now(
    failure: &Failure,
    pair: &Pair,
    mut client: Client,
    head: kit::Head,
    now: &Gate,
) -> Duration {
    let start = Instant::now();
    now.open();
    let response = client.finish_response(head).await;
    let took = start.elapsed();
    assert_outcome(failure, pair, &response);
    pair.other.wait_closed(pair.other.connections()).await;
    assert_leg_outcomes(failure, pair).await;
    took
}

fn assert_outcome(failure: &Failure, pair: &Pair, response: &Response) {
    let header = |name| response.head.header(name);
    match failure.outcome {
        Outcome::BadGateway(code) => {
            assert_eq!((response.status(), response.error_code().as_str()), (502, code));
            assert_eq!(response.json()["error"]["server"], pair.failing.url());
        }
        Outcome::Verbatim(status) => {
            assert_eq!((response.status(), response.text()), (status, ERROR_BODY));
            assert_eq!(header("content-type"), Some("application/problem+json"));
            let retry_after = match status {
                429 => Some("7"),
                503 => Some("1"),
                _ => None,
            };
            assert_eq!(header("retry-after"), retry_after);
        }
        Outcome::ErrorFromEvent(status) => {
            let json = if status == 400 { ERROR_EVENT } else { ABORT_EVENT };
            assert_eq!((response.status(), response.text()), (status, json));
            assert_eq!(header("content-type"), Some("application/json"));
        }
        Outcome::Truncated(code) => {
            assert!(!response.complete, "a clean end");
            let text = String::from_utf8_lossy(&response.body);
            let notified = text.contains(&format!("\"code\":\"{code}\""));
            assert_eq!(
                notified,
                header("content-type") == Some("text/event-stream; charset=utf-8"),
                "{text}"
            );
        }
        Outcome::Complete => {
            assert!(response.complete);
            let text = response.text();
            assert!(
                text == "{\"text\":\"\"}" || text == "data: {\"text\":\"a\"}\n\ndata: [DONE]\n\n",
                "{text}"
            );
        }
    }
}

/// The outcome that is counted for the failing leg. The other one is cancelled or completes.
fn leg_outcome(failure: &Failure) -> LegOutcome {
    match failure.name.split('_').collect::<Vec<_>>()[..] {
        ["refused"] => LegOutcome::Connect,
        ["garbage"] | ["bad", ..] => LegOutcome::BadResponse,
        ["status", "500", ..] => LegOutcome::ServerError,
        ["status" | "error" | "abort", ..] => LegOutcome::Refused,
        ["closed" | "reset" | "half" | "only", ..] => LegOutcome::Closed,
        _ => panic!("{} is a new failure", failure.name),
    }
}

/// Each leg is counted once, with its outcome, on its own backend.
async fn assert_leg_outcomes(failure: &Failure, pair: &Pair) {
    pair.router.wait_idle().await;
    let other = if matches!(failure.outcome, Outcome::Complete) {
        LegOutcome::Completed
    } else {
        LegOutcome::Cancelled
    };
    for (server, expected) in [(&pair.failing, leg_outcome(failure)), (&pair.other, other)] {
        let known = pair.router.backend(server);
        let counts = LegOutcome::ALL.map(|outcome| (outcome, known.ended(outcome)));
        // A connection that cannot be opened is retried once.
        let attempts = if failure.steps.is_none() { 2 } else { 1 };
        let expected =
            LegOutcome::ALL.map(|outcome| (outcome, if outcome == expected { attempts } else { 0 }));
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
            Moment::BeforeResponse => "before decode's answer",
            Moment::AfterDecodeHead => "decode has sent a stream's head only",
            Moment::MidBody => "decode's body has begun",
        };
        let (gets, other) = match failure.outcome {
            Outcome::BadGateway(code) => (format!("502 `{code}`"), "closed"),
            Outcome::Verbatim(status) => (format!("that {status}, verbatim"), "closed"),
            Outcome::ErrorFromEvent(status) => (format!("{status} and the event's JSON"), "closed"),
            Outcome::Truncated(code) => {
                (format!("an event `{code}` in a stream; cut off in any case"), "closed")
            }
            Outcome::Complete => ("decode's answer, complete".to_owned(), "goes on"),
        };
        let name = failure.name.replace('_', " ");
        let leg_outcome = leg_outcome(failure).as_str();
        let other_counted =
            if other == "closed" { LegOutcome::Cancelled } else { LegOutcome::Completed }.as_str();
        table += &format!(
            "| {} | {moment} | {name} | `{leg_outcome}` | {gets} | {other} | `{other_counted}` |\n",
            failure.leg
        );
    }
    table
}

#[test]
fn failures_md_contains_this_matrix() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/FAILURES.md");
    let document = std::fs::read_to_string(path).unwrap();
    let table = table();
    assert!(document.contains(&table), "docs/FAILURES.md must have this table:\n\n{table}");
}
