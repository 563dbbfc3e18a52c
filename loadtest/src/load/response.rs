//! An incremental parser of responses: head, framing, and what the body must contain.
//!
//! Only the HTTP that SGLang and the routers in front of it use: a content length, or chunks. No socket here.

use std::fmt;

use memchr::{memchr, memmem, memrchr};

use super::request::Request;
use crate::canned::{PROMPT_LOGPROB_MARKER, TIMESTAMP_FIELD};

/// Why a request failed: an I/O error, or a response that is not what was requested.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RequestError(pub(super) String);

impl fmt::Display for RequestError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

fn invalid<T>(why: impl Into<String>) -> Result<T, RequestError> {
    Err(RequestError(why.into()))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Framing {
    Head,
    /// Remaining bytes of a sized body.
    Sized(usize),
    ChunkSize,
    Chunk(usize),
    ChunkEnd,
    /// After the last chunk.
    Trailer,
    Done,
}

/// Reads one response.
#[derive(Debug)]
pub(super) struct ResponseReader {
    framing: Framing,
    /// Incomplete head or framing, kept until more bytes arrive.
    raw: Vec<u8>,
    /// A stream: the incomplete last line. Otherwise the whole body.
    text: Vec<u8>,
    is_stream: bool,
    status: u16,
    has_body: bool,
    pub(super) tokens: u32,
    markers: u32,
    has_done_event: bool,
    /// The response has `connection: close`.
    pub(super) connection_close: bool,
}

impl ResponseReader {
    pub(super) fn new(is_stream: bool) -> Self {
        Self {
            framing: Framing::Head,
            raw: Vec::new(),
            text: Vec::new(),
            is_stream,
            status: 0,
            has_body: false,
            tokens: 0,
            markers: 0,
            has_done_event: false,
            connection_close: false,
        }
    }

    pub(super) fn is_done(&self) -> bool {
        self.framing == Framing::Done
    }

    /// Whether a byte of the body has arrived.
    pub(super) fn has_body(&self) -> bool {
        self.has_body
    }

    /// Parses received bytes and calls `on_timestamp` with the timestamp of each token that is now complete.
    pub(super) fn feed(
        &mut self,
        bytes: &[u8],
        mut on_timestamp: impl FnMut(u64),
    ) -> Result<(), RequestError> {
        let kept = std::mem::take(&mut self.raw);
        // Only when a head or a chunk's framing was split between two reads.
        let joined = if kept.is_empty() { None } else { Some([&kept, bytes].concat()) };
        let mut rest = joined.as_deref().unwrap_or(bytes);
        while !rest.is_empty() && !self.is_done() {
            let used = self.step(rest)?;
            if used == 0 {
                self.raw = rest.to_vec();
                break;
            }
            rest = &rest[used..];
        }
        if self.is_done() && !rest.is_empty() {
            return invalid("bytes after the response");
        }
        if self.is_stream {
            self.read_lines(&mut on_timestamp);
        }
        Ok(())
    }

    /// Returns how many bytes were consumed; 0 means that more are needed.
    fn step(&mut self, rest: &[u8]) -> Result<usize, RequestError> {
        match self.framing {
            Framing::Head => self.head(rest),
            Framing::Sized(left) => Ok(self.body(rest, left, Framing::Sized, Framing::Done)),
            Framing::Chunk(left) => Ok(self.body(rest, left, Framing::Chunk, Framing::ChunkEnd)),
            Framing::ChunkSize => self.chunk_size(rest),
            Framing::ChunkEnd => Ok(self.line_end(rest, Framing::ChunkSize)),
            Framing::Trailer => Ok(self.line_end(rest, Framing::Done)),
            Framing::Done => Ok(0),
        }
    }

    fn body(&mut self, rest: &[u8], left: usize, more: fn(usize) -> Framing, then: Framing) -> usize {
        let taken = left.min(rest.len());
        self.text.extend_from_slice(&rest[..taken]);
        self.has_body |= taken > 0;
        self.framing = if taken == left { then } else { more(left - taken) };
        taken
    }

    fn head(&mut self, rest: &[u8]) -> Result<usize, RequestError> {
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut head = httparse::Response::new(&mut headers);
        let length = match head.parse(rest) {
            Ok(httparse::Status::Complete(length)) => length,
            Ok(httparse::Status::Partial) => return Ok(0),
            Err(error) => return invalid(format!("not HTTP: {error}")),
        };
        self.status = head.code.unwrap_or(0);
        let value = |name: &str| {
            let header = head.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name));
            header.map(|header| String::from_utf8_lossy(header.value).to_ascii_lowercase())
        };
        self.connection_close = value("connection").is_some_and(|value| value == "close");
        self.framing = if value("transfer-encoding").is_some_and(|value| value == "chunked") {
            Framing::ChunkSize
        } else {
            match value("content-length").and_then(|value| value.parse().ok()) {
                Some(0) => Framing::Done,
                Some(length) => Framing::Sized(length),
                None => return invalid("a response without a length"),
            }
        };
        Ok(length)
    }

    fn chunk_size(&mut self, rest: &[u8]) -> Result<usize, RequestError> {
        let Some(end) = memchr(b'\n', rest) else { return Ok(0) };
        let line = std::str::from_utf8(&rest[..end]).unwrap_or("");
        let digits = line.trim_end().split(';').next().unwrap_or("");
        let Ok(size) = usize::from_str_radix(digits, 16) else { return invalid("a bad chunk") };
        self.framing = if size == 0 { Framing::Trailer } else { Framing::Chunk(size) };
        Ok(end + 1)
    }

    fn line_end(&mut self, rest: &[u8], then: Framing) -> usize {
        if rest.len() < 2 {
            return 0;
        }
        self.framing = then;
        2
    }

    fn read_lines(&mut self, on_timestamp: &mut impl FnMut(u64)) {
        let Some(end) = memrchr(b'\n', &self.text) else { return };
        let lines = &self.text[..=end];
        for at in memmem::find_iter(lines, TIMESTAMP_FIELD) {
            self.tokens += 1;
            let digits = lines.get(at + TIMESTAMP_FIELD.len()..at + TIMESTAMP_FIELD.len() + 19);
            let time = digits.and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok());
            on_timestamp(time.unwrap_or(0));
        }
        self.markers +=
            u32::try_from(memmem::find_iter(lines, PROMPT_LOGPROB_MARKER).count()).unwrap_or(u32::MAX);
        self.has_done_event |= memmem::find(lines, b"data: [DONE]").is_some();
        self.text.drain(..=end);
    }

    /// Status and body of a complete response that is not a stream.
    pub(super) fn into_text(self) -> (u16, String) {
        (self.status, String::from_utf8_lossy(&self.text).into_owned())
    }

    /// Checks a complete response to `request`. Returns whether it has the prompt logprobs that were
    /// requested: a router that does not merge them is not wrong otherwise, and its cost is still of
    /// interest.
    pub(super) fn check(&self, request: &Request) -> Result<bool, RequestError> {
        if self.status != 200 {
            return invalid(format!("status {}", self.status));
        }
        let kind = request.kind;
        if !kind.is_stream() {
            let has = |expected_text: &str| memmem::find(&self.text, expected_text.as_bytes()).is_some();
            return if has(kind.expected_text()) {
                Ok(!kind.has_logprobs() || has(PROMPT_LOGPROB_MARKER))
            } else {
                invalid("not the expected body")
            };
        }
        if self.tokens != request.tokens {
            return invalid(format!("{} tokens instead of {}", self.tokens, request.tokens));
        }
        if !self.has_done_event {
            return invalid("a stream without [DONE]");
        }
        Ok(!kind.has_logprobs() || self.markers == self.tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::RequestKind;

    const STREAM: &[u8] = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n\
        2d\r\ndata: {\"sent_at_ns\":1795347733000000001,\"x\":1\r\n3\r\n}\n\n\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";

    fn stream_of(tokens: u32) -> Request {
        Request::new(([127, 0, 0, 1], 1).into(), RequestKind::ChatStream, 300, tokens)
    }

    #[test]
    fn a_stream_is_parsed_the_same_however_it_is_split() {
        for size in 1..STREAM.len() {
            let (mut response, mut timestamps) = (ResponseReader::new(true), Vec::new());
            for piece in STREAM.chunks(size) {
                response.feed(piece, |timestamp| timestamps.push(timestamp)).expect("a good stream");
            }
            assert!(response.is_done(), "in pieces of {size}");
            assert_eq!(timestamps, [1_795_347_733_000_000_001]);
            assert_eq!(response.check(&stream_of(1)), Ok(true));
        }
    }

    #[test]
    fn a_stream_with_too_few_tokens_is_an_error() {
        let mut response = ResponseReader::new(true);
        response.feed(STREAM, |_| {}).expect("a good stream");
        assert_eq!(response.check(&stream_of(2)), invalid("1 tokens instead of 2"));
    }

    #[test]
    fn status_and_body_of_a_sized_response_are_checked() {
        let request = Request::new(([127, 0, 0, 1], 1).into(), RequestKind::Chat, 300, 1);
        for (raw, why) in [
            ("HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n", "status 503"),
            ("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", "not the expected body"),
        ] {
            let mut response = ResponseReader::new(false);
            response.feed(raw.as_bytes(), |_| {}).expect("HTTP");
            assert!(response.is_done());
            assert_eq!(response.check(&request), invalid(why));
        }
    }
}
