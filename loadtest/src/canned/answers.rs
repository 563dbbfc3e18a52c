//! The bytes of every answer, composed once for a plan.
//!
//! Each event of a stream has a field `sent_at_ns` that is overwritten with the time when it is written, so that
//! who receives it can tell how long it was under way. No socket and no clock here.

use std::fmt::Write as _;
use std::ops::Range;
use std::time::Duration;

use super::{Plan, Role};

/// In front of the time, in nanoseconds of the system's clock, at which an event was written: always 19 digits.
pub const STAMP: &str = "\"sent_at_ns\":";
/// A token that only prefill's prompt logprobs have: an answer without it was not merged.
pub const MARK: &str = "1517791517";

const NO_TIME: &str = "1000000000000000000";
const HEAD: &str = "HTTP/1.1 200 OK\r\ndate: Sun, 22 Nov 2026 11:42:12 GMT\r\nserver: uvicorn\r\n";
const ID: &str = "3ef91dd116574d2f888f73caa45cc0b7";

/// A stream: its head, its events as chunks, its end.
pub(super) struct Stream {
    bytes: Vec<u8>,
    head: usize,
    events: Vec<Range<usize>>,
    stamps: Vec<usize>,
}

impl Stream {
    fn new(events: &[String]) -> Self {
        let mut bytes = HEAD.as_bytes().to_vec();
        bytes.extend_from_slice(
            b"content-type: text/event-stream; charset=utf-8\r\nvary: Origin\r\nTransfer-Encoding: chunked\r\n\r\n",
        );
        let head = bytes.len();
        let mut ranges = Vec::new();
        for event in events {
            let start = bytes.len();
            bytes.extend_from_slice(format!("{:x}\r\ndata: {event}\n\n\r\n", event.len() + 8).as_bytes());
            ranges.push(start..bytes.len());
        }
        bytes.extend_from_slice(b"0\r\n\r\n");
        let stamps = memchr::memmem::find_iter(&bytes, STAMP).map(|at| at + STAMP.len()).collect();
        Self { bytes, head, events: ranges, stamps }
    }

    /// The whole answer, every event written at `now_ns`.
    pub(super) fn at_once(&self, now_ns: u64) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        let now = now_ns.to_string();
        for &at in &self.stamps {
            bytes[at..at + now.len()].copy_from_slice(now.as_bytes());
        }
        bytes
    }

    pub(super) fn head(&self) -> &[u8] {
        &self.bytes[..self.head]
    }

    pub(super) fn events(&self) -> usize {
        self.events.len()
    }

    /// Whether an event has a stamp: only these are tokens, and only these are paced.
    pub(super) fn is_token(&self, event: usize) -> bool {
        self.stamp_of(event).is_some()
    }

    fn stamp_of(&self, event: usize) -> Option<usize> {
        let range = &self.events[event];
        let first = self.stamps.partition_point(|&at| at < range.start);
        self.stamps.get(first).copied().filter(|at| range.contains(at))
    }

    /// Appends an event, written at `now_ns`, and the end of the body after the last one.
    pub(super) fn write_event(&self, event: usize, now_ns: u64, out: &mut Vec<u8>) {
        let range = self.events[event].clone();
        let start = out.len();
        out.extend_from_slice(&self.bytes[range.clone()]);
        if let Some(at) = self.stamp_of(event) {
            let (at, now) = (start + at - range.start, now_ns.to_string());
            out[at..at + now.len()].copy_from_slice(now.as_bytes());
        }
        if event + 1 == self.events.len() {
            out.extend_from_slice(b"0\r\n\r\n");
        }
    }
}

/// All answers of one server.
pub(super) struct Answers {
    pub(super) in_one_write: bool,
    pub(super) interval: Duration,
    /// Time until a generation request is answered.
    pub(super) delay: Duration,
    /// Decode's answer to a room waits for prefill.
    pub(super) paired: bool,
    pub(super) chat: Vec<u8>,
    pub(super) generate: Vec<u8>,
    pub(super) chat_stream: Stream,
    pub(super) generate_stream: Stream,
}

impl Answers {
    pub(super) fn new(role: Role, plan: Plan) -> Self {
        let prefill = role == Role::Prefill;
        // Prefill makes one token, whatever was asked for.
        let tokens = if prefill { 1 } else { plan.tokens };
        let prompt = if prefill { prompt_logprobs(plan.prompt_tokens) } else { String::new() };
        Self {
            in_one_write: plan.in_one_write,
            interval: if prefill { Duration::ZERO } else { plan.interval },
            delay: if prefill { plan.prefill_delay } else { Duration::ZERO },
            paired: plan.paired,
            chat: sized(&chat(tokens)),
            generate: sized(&generated(tokens, tokens, &prompt, false)),
            chat_stream: Stream::new(&chat_events(tokens)),
            generate_stream: Stream::new(&generate_events(tokens, &prompt)),
        }
    }
}

/// An answer with JSON of a known length.
pub(super) fn sized(body: &str) -> Vec<u8> {
    let length = body.len();
    format!("{HEAD}content-length: {length}\r\ncontent-type: application/json\r\nvary: Origin\r\n\r\n{body}")
        .into_bytes()
}

fn chat(tokens: u32) -> String {
    let content = " come".repeat(tokens.min(6) as usize);
    format!(
        r#"{{"id":"{ID}","object":"chat.completion","created":1795347733,"model":"tiny","choices":[{{"index":0,"message":{{"role":"assistant","content":"{content}","reasoning_content":null}},"logprobs":null,"finish_reason":"length","matched_stop":null}}],"usage":{{"prompt_tokens":7,"total_tokens":{},"completion_tokens":{tokens},"prompt_tokens_details":null,"reasoning_tokens":0,"completion_tokens_details":null}},"metadata":{{"weight_version":"default","weight_versions":[{{"version":"default","start":0,"end":{tokens}}}]}}}}"#,
        tokens + 7
    )
}

fn chat_event(stamp: &str, delta: &str, finish: &str) -> String {
    format!(
        r#"{{{stamp}"id":"{ID}","object":"chat.completion.chunk","created":1795347733,"model":"tiny","choices":[{{"index":0,"delta":{{"reasoning_content":null{delta}}},"logprobs":null,"finish_reason":{finish},"matched_stop":null}}]}}"#
    )
}

fn chat_events(tokens: u32) -> Vec<String> {
    let stamp = format!("{STAMP}{NO_TIME},");
    let mut events = vec![chat_event("", r#","role":"assistant","content":"""#, "null")];
    events.extend((0..tokens).map(|_| chat_event(&stamp, r#","content":" come""#, "null")));
    events.push(chat_event("", "", r#""length""#));
    events.push("[DONE]".to_owned());
    events
}

fn prompt_logprobs(count: u32) -> String {
    let mut list = "[null,616,null]".to_owned();
    for index in 1..count.saturating_sub(1) {
        let digits = 100_003 + u64::from(index) * 7_919_777;
        let _ = write!(list, ",[-{}.{digits:012},{},null]", index % 13, 300 + index % 600);
    }
    let _ = write!(list, ",[-7.4541215896606445,{MARK},null]");
    list
}

/// One body of `/generate`, or one event of its stream, after `so_far` of `tokens`.
fn generated(so_far: u32, tokens: u32, prompt: &str, stamped: bool) -> String {
    let join = |piece: &str| vec![piece; so_far as usize].join(",");
    let stamp = if stamped { format!("{STAMP}{NO_TIME},") } else { String::new() };
    let finish =
        if so_far < tokens { "null".to_owned() } else { format!(r#"{{"type":"length","length":{tokens}}}"#) };
    format!(
        r#"{{{stamp}"text":"{}","output_ids":[{}],"meta_info":{{"id":"{ID}","finish_reason":{finish},"prompt_tokens":4,"weight_version":"default","num_retractions":0,"forward_entry_time":1795347731.5573552,"queue_time":0.000242634000187536,"input_token_logprobs":[{prompt}],"output_token_logprobs":[{}],"output_token_logprobs_length":{so_far},"reasoning_tokens":0,"completion_tokens":{so_far},"cached_tokens":0,"cached_tokens_details":null,"dp_rank":null,"e2e_latency":0.1354580359998181}}}}"#,
        " come".repeat(so_far as usize),
        join("768"),
        join("[-2.268392562866211,768,null]"),
    )
}

fn generate_events(tokens: u32, prompt: &str) -> Vec<String> {
    let mut events: Vec<_> = (1..=tokens).map(|so_far| generated(so_far, tokens, prompt, true)).collect();
    events.push("[DONE]".to_owned());
    events
}
