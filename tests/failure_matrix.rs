//! However one leg fails and whatever the other leg does, the client hears of it at once.
//!
//! `failures.rs` has what exactly the client gets; this file has all combinations: seven failures, three
//! states of the other leg, six kinds of request and both roles, 252 for each HTTP/1.1 engine.

mod kit;

use std::time::{Duration, Instant};

use kit::{Client, Gate, Router, STREAM_HEAD, ScriptedServer, Step, chunk};
use tokio::task::JoinSet;

/// Within this time the client must hear of a failure.
const LIMIT: Duration = Duration::from_secs(1);
/// A refusal that stalls is cut after a pause of 1 s.
const STALL_LIMIT: Duration = Duration::from_millis(2_000);
/// Cases that run at the same time: most of a case is waiting.
const CONCURRENCY: usize = 12;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Failure {
    /// The server takes no connections.
    Unreachable,
    Closes,
    Resets,
    SendsGarbage,
    SendsHalfAHead,
    /// It sends an error status and the start of its body, and no more.
    StallsInARefusal,
    /// It sends the start of a successful response and closes.
    SendsHalfABody,
}

const FAILURES: [Failure; 7] = [
    Failure::Unreachable,
    Failure::Closes,
    Failure::Resets,
    Failure::SendsGarbage,
    Failure::SendsHalfAHead,
    Failure::StallsInARefusal,
    Failure::SendsHalfABody,
];

/// What the other leg has done when the failure comes. After that it stays silent.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Other {
    Silent,
    SentItsHead,
    SentAPart,
}

const OTHERS: [Other; 3] = [Other::Silent, Other::SentItsHead, Other::SentAPart];

/// What the client asks for.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Kind {
    path: &'static str,
    body: &'static str,
    is_stream: bool,
    is_merge: bool,
}

const KINDS: [Kind; 6] = [
    kind("/generate", r#"{"text":"a"}"#, false, false),
    kind("/generate", r#"{"text":"a","stream":true}"#, true, false),
    kind("/v1/chat/completions", r#"{"messages":[]}"#, false, false),
    kind("/v1/chat/completions", r#"{"messages":[],"stream":true}"#, true, false),
    kind("/generate", r#"{"text":"a","return_logprob":true,"logprob_start_len":0}"#, false, true),
    kind("/v1/completions", r#"{"prompt":"a","echo":true,"logprobs":1,"stream":true}"#, true, true),
];

const fn kind(path: &'static str, body: &'static str, is_stream: bool, is_merge: bool) -> Kind {
    Kind { path, body, is_stream, is_merge }
}

const WHOLE_HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n";

impl Kind {
    fn head(self) -> Vec<u8> {
        if self.is_stream { STREAM_HEAD.into() } else { WHOLE_HEAD.into() }
    }

    /// The head and a part of the body.
    fn part(self) -> Vec<u8> {
        let start = if self.is_stream { chunk("data: {\"text\":\"a\"}\n\n") } else { b"{\"text\"".to_vec() };
        [self.head(), start].concat()
    }
}

#[derive(Debug, Clone, Copy)]
struct Case {
    role: &'static str,
    failure: Failure,
    other: Other,
    kind: Kind,
}

impl Case {
    fn failing_steps(self, now: &Gate) -> Vec<Step> {
        let send = |bytes: &[u8]| Step::Send(bytes.to_vec());
        let steps = match self.failure {
            Failure::Unreachable | Failure::Closes => vec![Step::Close],
            Failure::Resets => vec![Step::Reset],
            Failure::SendsGarbage => vec![send(b"garbage\r\n\r\n"), Step::Hang],
            Failure::SendsHalfAHead => vec![send(b"HTTP/1.1 200 OK\r\ncontent-"), Step::Close],
            Failure::StallsInARefusal => {
                vec![send(b"HTTP/1.1 500 Broken\r\ncontent-length: 100\r\n\r\n{"), Step::Hang]
            }
            Failure::SendsHalfABody => vec![Step::Send(self.kind.part()), Step::Close],
        };
        [vec![Step::Wait(now.clone())], steps].concat()
    }

    fn other_steps(self) -> Vec<Step> {
        let before = match self.other {
            Other::Silent => return vec![Step::Hang],
            Other::SentItsHead => self.kind.head(),
            Other::SentAPart => self.kind.part(),
        };
        vec![Step::Send(before), Step::Hang]
    }

    /// Decode's response has begun and does not need prefill any more.
    fn decode_goes_on(self) -> bool {
        let has_begun = self.other == Other::SentAPart && !self.kind.is_merge;
        self.role == "prefill" && has_begun && self.failure != Failure::Unreachable
    }

    /// The time from the failure until the client has heard all that there is to hear.
    async fn run(self) -> Duration {
        let now = Gate::new();
        let (failing, other) = (self.failing_steps(&now), self.other_steps());
        let failing = ScriptedServer::start(move |_| failing.clone()).await;
        let other = ScriptedServer::start(move |_| other.clone()).await;
        if self.failure == Failure::Unreachable {
            failing.stop_listening().await;
        }
        let (prefill, decode) = if self.role == "prefill" { (&failing, &other) } else { (&other, &failing) };
        let router = Router::start(&[prefill], &[decode]).await;
        let mut client = router.client().await;
        client.send_request("POST", self.kind.path, &[], self.kind.body.as_bytes()).await;
        if self.failure == Failure::Unreachable {
            let start = Instant::now();
            assert_eq!(client.response().await.status(), 502, "{self:?}");
            // Nothing was written to the other server.
            assert_eq!(other.requests().len(), 0, "{self:?}");
            return start.elapsed();
        }
        failing.wait_for_requests(1).await;
        other.wait_for_requests(1).await;
        self.fail(&mut client, &now).await
    }

    async fn fail(self, client: &mut Client, now: &Gate) -> Duration {
        if self.decode_goes_on() {
            client.read_until("text").await;
            now.open();
            return Duration::ZERO;
        }
        let start = Instant::now();
        now.open();
        let head = client.head().await;
        let until_head = start.elapsed();
        let response = client.finish_response(head).await;
        assert!(!response.complete || response.status() >= 500, "{self:?}: looks complete: {response:?}");
        // Its status is out at once; its end is not known before the pause is over.
        let stalls = self.failure == Failure::StallsInARefusal && response.status() == 500;
        let whole = start.elapsed();
        if stalls && whole < STALL_LIMIT { until_head } else { whole }
    }
}

/// Runs one case. A slow run is repeated, because the time limit is part of the test and the machine may be
/// busy.
async fn check(case: Case) {
    for chance in 1.. {
        let took = case.run().await;
        if took < LIMIT {
            return;
        }
        assert!(chance < 3, "{case:?}: the client heard nothing for {took:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_client_hears_of_every_failure_at_once() {
    let mut cases = Vec::new();
    for role in ["prefill", "decode"] {
        for (failure, other) in FAILURES.into_iter().flat_map(|f| OTHERS.map(|other| (f, other))) {
            cases.extend(KINDS.map(|kind| Case { role, failure, other, kind }));
        }
    }
    assert_eq!(cases.len(), 252);
    let mut running = JoinSet::new();
    for case in cases {
        if running.len() == CONCURRENCY {
            running.join_next().await.expect("one is running").expect("no case fails");
        }
        running.spawn(check(case));
    }
    running.join_all().await;
}
