//! The line of a request in a load trace: when it came, how long its prompt and its response are, and
//! hashes that tell which other prompts begin as its own.
//!
//! What is known is what the router sees, bytes and not tokens: lengths are estimates, except where a server
//! says the number. How a line is written is for the receiver of the lines.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use memchr::memmem;

use crate::observe::record::{CompletedRequest, ResponseTail, StatusClass};
use crate::wire::shape::Prompt;

/// Bytes of a prompt's JSON for one token: 512 tokens are one block of hashes, as in Mooncake's traces.
const PROMPT_BYTES_PER_TOKEN: u64 = 4;
/// Bytes of a whole response for one token, if it does not say how many it has.
const RESPONSE_BYTES_PER_TOKEN: u64 = 4;
/// Bytes of an event with one token, where events are so long that the tail does not have two.
const EVENT_BYTES: u64 = 256;

/// One generation request of a trace, as it is when the request has ended.
///
/// It has no text, and nothing of the client's. Requests whose body the router could not accept have no line,
/// and those without a prompt. One that failed, or that its client cancelled, has one with the output that it
/// got.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct TraceLine<'a> {
    /// When the request came, since the arrival of the first one that this router had.
    pub arrival: Duration,
    /// The length of the prompt in tokens of four bytes of JSON. Of a prompt over 2 MiB only so much counts.
    pub input_length: u64,
    /// The length of the response in tokens: as the server says, or else estimated from its bytes.
    pub output_length: u64,
    prompt: &'a Prompt,
}

impl TraceLine<'_> {
    /// A hash for each 512 tokens (2 KiB) of the prompt, the last of which may be fewer. It covers all that
    /// is before its end as well. Where `consistent_hash` is the only policy that looks at prompts the hashes
    /// of a prompt are the same in every process; mix them with a random number before others see them.
    pub fn hashes(&self) -> impl Iterator<Item = u64> + '_ {
        self.prompt.hashes()
    }
}

impl fmt::Debug for TraceLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TraceLine")
            .field("arrival", &self.arrival)
            .field("input_length", &self.input_length)
            .field("output_length", &self.output_length)
            .finish_non_exhaustive()
    }
}

type WriteTraceLine = dyn Fn(&TraceLine<'_>) + Send + Sync;

/// Receives the lines: see [`MiniLbConfig::trace_log`](crate::MiniLbConfig::trace_log).
#[derive(Clone)]
pub(crate) struct TraceLog {
    write: Arc<WriteTraceLine>,
    /// When the first request arrived. Of all workers, so that their lines have one clock.
    first_arrival: Arc<OnceLock<Instant>>,
}

impl TraceLog {
    pub(crate) fn new(write: impl Fn(&TraceLine<'_>) + Send + Sync + 'static) -> Self {
        Self { write: Arc::new(write), first_arrival: Arc::default() }
    }

    pub(super) fn request_arrived(&self, at: Instant) {
        self.first_arrival.get_or_init(|| at);
    }

    pub(super) fn log(&self, request: &CompletedRequest<'_>) {
        let Some(traced) = request.traced() else { return };
        // Without text there is no load to replay: servers refuse such a request, or it has an image only.
        if traced.prompt.bytes() == 0 {
            return;
        }
        let first = self.first_arrival.get_or_init(|| request.started_at());
        (self.write)(&TraceLine {
            // Two workers may have had their first requests within a microsecond, and in the other order.
            arrival: request.started_at().saturating_duration_since(*first),
            input_length: input_length(&traced.prompt),
            output_length: output_length(request, &traced.tail),
            prompt: &traced.prompt,
        });
    }
}

/// The tokens of a prompt. If a server's own count is to be used one day, it belongs here; then the number of
/// hashes has to follow it.
fn input_length(prompt: &Prompt) -> u64 {
    prompt.hashed_bytes().div_ceil(PROMPT_BYTES_PER_TOKEN)
}

/// The tokens of what the client was sent of the response.
fn output_length(request: &CompletedRequest<'_>, tail: &ResponseTail) -> u64 {
    // The text of an error is no output.
    if request.status_class != StatusClass::Success {
        return 0;
    }
    let end = tail.to_vec();
    counted(&end).unwrap_or_else(|| match request.streaming() {
        true => estimated_of_stream(&end, request.bytes_out()),
        false => request.bytes_out().div_ceil(RESPONSE_BYTES_PER_TOKEN),
    })
}

/// The number of tokens that a server says last: in `usage` of the OpenAI APIs, in `meta_info` of each event
/// of `/generate`. In a generated text the quotes would be escaped.
fn counted(end: &[u8]) -> Option<u64> {
    const NAME: &[u8] = b"\"completion_tokens\":";
    memmem::FinderRev::new(NAME).rfind_iter(end).find_map(|at| {
        let value = end[at + NAME.len()..].trim_ascii_start();
        let digits = value.iter().position(|byte| !byte.is_ascii_digit())?;
        // None of `null`, and of a number that is cut off.
        std::str::from_utf8(&value[..digits]).ok()?.parse().ok()
    })
}

/// The tokens of a stream of `bytes`: SGLang sends an event for each, and all of about the same length.
fn estimated_of_stream(tail: &[u8], bytes: u64) -> u64 {
    let end = tail.strip_suffix(b"data: [DONE]\n\n").unwrap_or(tail);
    let mut ends = memmem::find_iter(end, b"\n\n");
    let Some(first) = ends.next() else { return bytes.div_ceil(EVENT_BYTES) };
    let (last, others) = ends.fold((first, 0), |(_, count), at| (at, count + 1));
    match (last - first) as u128 {
        _ if bytes <= tail.len() as u64 => others + 1,
        0 => bytes.div_ceil(EVENT_BYTES),
        length => (u128::from(bytes) * u128::from(others) / length) as u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_whole_count_is_the_one() {
        for (end, count) in [
            (r#"{"text":"a","meta_info":{"completion_tokens":17,"cached_tokens":0}}"#, Some(17)),
            (r#"{"usage":{"completion_tokens": 6}}"#, Some(6)),
            (r#"{"completion_tokens":6},{"usage":{"completion_tokens":null}}"#, Some(6)),
            (r#"{"completion_tokens":6} data: {"completion_tokens":7"#, Some(6)),
            (r#"{"text":"\"completion_tokens\":9"}"#, None),
            (r#"{"completion_tokens_details":9}"#, None),
            (r#"{"completion_tokens":99999999999999999999}"#, None),
            ("", None),
        ] {
            assert_eq!(counted(end.as_bytes()), count, "{end}");
        }
    }

    #[test]
    fn tokens_of_a_stream_are_estimated_from_the_length_of_its_last_events() {
        let event = format!("data: {}\n\n", "x".repeat(192));
        let tail = |events: usize| format!("x{}data: [DONE]\n\n", event.repeat(events)).into_bytes();
        assert_eq!(estimated_of_stream(&tail(9), 200 * 500), 500);
        assert_eq!(estimated_of_stream(&tail(9), 9 * 200 + 14), 9, "all of it is there");
        assert_eq!(estimated_of_stream(&tail(1), 200), 1);
        assert_eq!(estimated_of_stream(&tail(1), 25_600), 100, "too few to tell");
        assert_eq!(estimated_of_stream(b"data: x", 25_600), 100);
        assert_eq!(estimated_of_stream(b"", 0), 0);
    }
}
