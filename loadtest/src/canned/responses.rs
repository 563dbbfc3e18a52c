//! Response bytes, composed once per plan.
//!
//! Each event of a stream has a field `sent_at_ns` that is overwritten with the time of its write, so that
//! the receiver can compute its delay. No socket and no clock here.

use std::fmt::Write as _;
use std::ops::Range;
use std::time::Duration;

use super::{Plan, Role};

/// Precedes the time of an event's write: nanoseconds of the system's clock, always 19 digits, so that it can
/// be overwritten in place.
pub const TIMESTAMP_FIELD: &str = "\"sent_at_ns\":";
/// A token id that occurs only in prefill's prompt logprobs: a response without it was not merged.
pub const PROMPT_LOGPROB_MARKER: &str = "1517791517";

const PLACEHOLDER_TIME: &str = "1000000000000000000";
const HEAD: &str = "HTTP/1.1 200 OK\r\ndate: Sun, 22 Nov 2026 11:42:12 GMT\r\nserver: uvicorn\r\n";
const ID: &str = "3ef91dd116574d2f888f73caa45cc0b7";

/// A streamed response: head, events as chunks, end.
pub(super) struct Stream {
    bytes: Vec<u8>,
    head: usize,
    events: Vec<Range<usize>>,
    timestamps: Vec<usize>,
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
        let timestamps =
            memchr::memmem::find_iter(&bytes, TIMESTAMP_FIELD).map(|at| at + TIMESTAMP_FIELD.len()).collect();
        Self { bytes, head, events: ranges, timestamps }
    }

    /// The whole response in one buffer, with `now_ns` in every event.
    pub(super) fn with_timestamp(&self, now_ns: u64) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        let now = now_ns.to_string();
        for &at in &self.timestamps {
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

    /// Whether an event has a timestamp. Only those events are tokens, and only those are paced.
    pub(super) fn is_token(&self, event: usize) -> bool {
        self.timestamp_of(event).is_some()
    }

    fn timestamp_of(&self, event: usize) -> Option<usize> {
        let range = &self.events[event];
        let first = self.timestamps.partition_point(|&at| at < range.start);
        self.timestamps.get(first).copied().filter(|at| range.contains(at))
    }

    /// Appends an event with `now_ns`, and the end of the body after the last one.
    pub(super) fn write_event(&self, event: usize, now_ns: u64, out: &mut Vec<u8>) {
        let range = self.events[event].clone();
        let start = out.len();
        out.extend_from_slice(&self.bytes[range.clone()]);
        if let Some(at) = self.timestamp_of(event) {
            let (at, now) = (start + at - range.start, now_ns.to_string());
            out[at..at + now.len()].copy_from_slice(now.as_bytes());
        }
        if event + 1 == self.events.len() {
            out.extend_from_slice(b"0\r\n\r\n");
        }
    }
}

/// All responses of one server.
pub(super) struct Responses {
    pub(super) single_write: bool,
    pub(super) interval: Duration,
    /// Delay before a generation request gets its response.
    pub(super) delay: Duration,
    /// Decode waits until prefill has read the request's room.
    pub(super) paired: bool,
    pub(super) chat: Vec<u8>,
    pub(super) generate: Vec<u8>,
    pub(super) chat_stream: Stream,
    pub(super) generate_stream: Stream,
}

impl Responses {
    pub(super) fn new(role: Role, plan: Plan) -> Self {
        let prefill = role == Role::Prefill;
        // Prefill produces one token, whatever was requested.
        let tokens = if prefill { 1 } else { plan.tokens };
        let prompt = if prefill { prompt_logprobs(plan.prompt_tokens) } else { String::new() };
        Self {
            single_write: plan.single_write,
            interval: if prefill { Duration::ZERO } else { plan.interval },
            delay: if prefill { plan.prefill_delay } else { Duration::ZERO },
            paired: plan.paired,
            chat: sized(&chat(tokens)),
            generate: sized(&generate_body(tokens, tokens, &prompt, false)),
            chat_stream: Stream::new(&chat_events(tokens)),
            generate_stream: Stream::new(&generate_events(tokens, &prompt)),
        }
    }
}

/// A JSON response with a content length.
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

fn chat_event(timestamp: &str, delta: &str, finish: &str) -> String {
    format!(
        r#"{{{timestamp}"id":"{ID}","object":"chat.completion.chunk","created":1795347733,"model":"tiny","choices":[{{"index":0,"delta":{{"reasoning_content":null{delta}}},"logprobs":null,"finish_reason":{finish},"matched_stop":null}}]}}"#
    )
}

fn chat_events(tokens: u32) -> Vec<String> {
    let timestamp = format!("{TIMESTAMP_FIELD}{PLACEHOLDER_TIME},");
    let mut events = vec![chat_event("", r#","role":"assistant","content":"""#, "null")];
    events.extend((0..tokens).map(|_| chat_event(&timestamp, r#","content":" come""#, "null")));
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
    let _ = write!(list, ",[-7.4541215896606445,{PROMPT_LOGPROB_MARKER},null]");
    list
}

/// A body of `/generate`, or an event of its stream, after `emitted` of `tokens` tokens.
fn generate_body(emitted: u32, tokens: u32, prompt: &str, timestamped: bool) -> String {
    let join = |piece: &str| vec![piece; emitted as usize].join(",");
    let timestamp = if timestamped { format!("{TIMESTAMP_FIELD}{PLACEHOLDER_TIME},") } else { String::new() };
    let finish = if emitted < tokens {
        "null".to_owned()
    } else {
        format!(r#"{{"type":"length","length":{tokens}}}"#)
    };
    format!(
        r#"{{{timestamp}"text":"{}","output_ids":[{}],"meta_info":{{"id":"{ID}","finish_reason":{finish},"prompt_tokens":4,"weight_version":"default","num_retractions":0,"forward_entry_time":1795347731.5573552,"queue_time":0.000242634000187536,"input_token_logprobs":[{prompt}],"output_token_logprobs":[{}],"output_token_logprobs_length":{emitted},"reasoning_tokens":0,"completion_tokens":{emitted},"cached_tokens":0,"cached_tokens_details":null,"dp_rank":null,"e2e_latency":0.1354580359998181}}}}"#,
        " come".repeat(emitted as usize),
        join("768"),
        join("[-2.268392562866211,768,null]"),
    )
}

fn generate_events(tokens: u32, prompt: &str) -> Vec<String> {
    let mut events: Vec<_> =
        (1..=tokens).map(|emitted| generate_body(emitted, tokens, prompt, true)).collect();
    events.push("[DONE]".to_owned());
    events
}
