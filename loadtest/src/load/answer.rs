//! An answer's bytes, taken as they come: head, framing, and what its body must have.
//!
//! Only as much HTTP as SGLang and the routers in front of it speak: a length, or chunks. No socket here.

use std::fmt;

use memchr::{memchr, memmem, memrchr};

use super::request::Request;
use crate::canned::{MARK, STAMP};

/// Why an answer is not what was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wrong(pub(super) String);

impl fmt::Display for Wrong {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

fn wrong<T>(why: impl Into<String>) -> Result<T, Wrong> {
    Err(Wrong(why.into()))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Framing {
    Head,
    /// Bytes of a body, or of a chunk, that are still to come.
    Sized(usize),
    ChunkSize,
    Chunk(usize),
    ChunkEnd,
    /// After the last chunk.
    Trailer,
    Done,
}

/// Reads one answer.
#[derive(Debug)]
pub(super) struct Answer {
    framing: Framing,
    /// What could not be used yet of head or framing.
    raw: Vec<u8>,
    /// Of a stream: the beginning of its next line. Of another body: all of it.
    text: Vec<u8>,
    is_stream: bool,
    status: u16,
    has_body: bool,
    pub(super) tokens: u32,
    marks: u32,
    has_end: bool,
    /// The connection ends with this answer.
    pub(super) closes: bool,
}

impl Answer {
    pub(super) fn new(is_stream: bool) -> Self {
        Self {
            framing: Framing::Head,
            raw: Vec::new(),
            text: Vec::new(),
            is_stream,
            status: 0,
            has_body: false,
            tokens: 0,
            marks: 0,
            has_end: false,
            closes: false,
        }
    }

    pub(super) fn is_done(&self) -> bool {
        self.framing == Framing::Done
    }

    /// Whether a byte of the body has come.
    pub(super) fn has_body(&self) -> bool {
        self.has_body
    }

    /// Takes what came; calls `stamped` with the time in each token that is now complete.
    pub(super) fn take(&mut self, bytes: &[u8], mut stamped: impl FnMut(u64)) -> Result<(), Wrong> {
        let kept = std::mem::take(&mut self.raw);
        // Rarely: framing that was cut in two.
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
            return wrong("bytes after the answer");
        }
        if self.is_stream {
            self.read_lines(&mut stamped);
        }
        Ok(())
    }

    /// How many bytes were used up; none if there are too few.
    fn step(&mut self, rest: &[u8]) -> Result<usize, Wrong> {
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

    fn head(&mut self, rest: &[u8]) -> Result<usize, Wrong> {
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut head = httparse::Response::new(&mut headers);
        let length = match head.parse(rest) {
            Ok(httparse::Status::Complete(length)) => length,
            Ok(httparse::Status::Partial) => return Ok(0),
            Err(error) => return wrong(format!("not HTTP: {error}")),
        };
        self.status = head.code.unwrap_or(0);
        let value = |name: &str| {
            let header = head.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name));
            header.map(|header| String::from_utf8_lossy(header.value).to_ascii_lowercase())
        };
        self.closes = value("connection").is_some_and(|value| value == "close");
        self.framing = if value("transfer-encoding").is_some_and(|value| value == "chunked") {
            Framing::ChunkSize
        } else {
            match value("content-length").and_then(|value| value.parse().ok()) {
                Some(0) => Framing::Done,
                Some(length) => Framing::Sized(length),
                None => return wrong("an answer without a length"),
            }
        };
        Ok(length)
    }

    fn chunk_size(&mut self, rest: &[u8]) -> Result<usize, Wrong> {
        let Some(end) = memchr(b'\n', rest) else { return Ok(0) };
        let line = std::str::from_utf8(&rest[..end]).unwrap_or("");
        let digits = line.trim_end().split(';').next().unwrap_or("");
        let Ok(size) = usize::from_str_radix(digits, 16) else { return wrong("a bad chunk") };
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

    fn read_lines(&mut self, stamped: &mut impl FnMut(u64)) {
        let Some(end) = memrchr(b'\n', &self.text) else { return };
        let lines = &self.text[..=end];
        for at in memmem::find_iter(lines, STAMP) {
            self.tokens += 1;
            let digits = lines.get(at + STAMP.len()..at + STAMP.len() + 19);
            let time = digits.and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok());
            stamped(time.unwrap_or(0));
        }
        self.marks += u32::try_from(memmem::find_iter(lines, MARK).count()).unwrap_or(u32::MAX);
        self.has_end |= memmem::find(lines, b"data: [DONE]").is_some();
        self.text.drain(..=end);
    }

    /// Status and body of a complete answer that is not a stream.
    pub(super) fn into_text(self) -> (u16, String) {
        (self.status, String::from_utf8_lossy(&self.text).into_owned())
    }

    /// Whether a complete answer to `request` has the prompt logprobs that were asked for, or what else is wrong.
    pub(super) fn check(&self, request: &Request) -> Result<bool, Wrong> {
        if self.status != 200 {
            return wrong(format!("status {}", self.status));
        }
        let kind = request.kind;
        if !kind.is_stream() {
            let has = |needle: &str| memmem::find(&self.text, needle.as_bytes()).is_some();
            return if has(kind.needle()) {
                Ok(!kind.has_logprobs() || has(MARK))
            } else {
                wrong("not the answer")
            };
        }
        if self.tokens != request.tokens {
            return wrong(format!("{} tokens instead of {}", self.tokens, request.tokens));
        }
        if !self.has_end {
            return wrong("a stream without [DONE]");
        }
        Ok(!kind.has_logprobs() || self.marks == self.tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Kind;

    const STREAM: &[u8] = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n\
        2d\r\ndata: {\"sent_at_ns\":1795347733000000001,\"x\":1\r\n3\r\n}\n\n\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";

    fn stream_of(tokens: u32) -> Request {
        Request::new(([127, 0, 0, 1], 1).into(), Kind::ChatStream, 300, tokens)
    }

    #[test]
    fn stream_is_read_the_same_however_it_is_cut() {
        for size in 1..STREAM.len() {
            let (mut answer, mut stamps) = (Answer::new(true), Vec::new());
            for piece in STREAM.chunks(size) {
                answer.take(piece, |stamp| stamps.push(stamp)).expect("a good stream");
            }
            assert!(answer.is_done(), "in pieces of {size}");
            assert_eq!(stamps, [1_795_347_733_000_000_001]);
            assert_eq!(answer.check(&stream_of(1)), Ok(true));
        }
    }

    #[test]
    fn stream_with_too_few_tokens_is_wrong() {
        let mut answer = Answer::new(true);
        answer.take(STREAM, |_| {}).expect("a good stream");
        assert_eq!(answer.check(&stream_of(2)), wrong("1 tokens instead of 2"));
    }

    #[test]
    fn status_and_text_of_a_sized_answer_are_checked() {
        let request = Request::new(([127, 0, 0, 1], 1).into(), Kind::Chat, 300, 1);
        for (answered, why) in [
            ("HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n", "status 503"),
            ("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", "not the answer"),
        ] {
            let mut answer = Answer::new(false);
            answer.take(answered.as_bytes(), |_| {}).expect("HTTP");
            assert!(answer.is_done());
            assert_eq!(answer.check(&request), wrong(why));
        }
    }
}
