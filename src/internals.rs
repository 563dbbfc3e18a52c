//! What the benches measure of `wire`, as functions of plain bytes: only with the
//! feature `internals`, and no part of the public interface.
//!
//! They check nothing. Each returns a number that depends on all of its work, so
//! that no compiler leaves any of it out.

use std::sync::LazyLock;

use bytes::Bytes;
use hyper::header::HeaderValue;

use crate::http1::OutgoingBody;
use crate::http1::{read_request_head, read_response_head};
use crate::wire::body::ClientBody;
use crate::wire::bootstrap::BootstrapFields;
use crate::wire::client_response::ClientResponseHead;
use crate::wire::logprobs::{Merge, PromptLogprobs};
use crate::wire::shape::{Dialect, Inspector};
use crate::wire::sse::Events;
use crate::wire::upstream_request::UpstreamHead;

/// What a prefill server has once, not a request.
static FIELDS: LazyLock<BootstrapFields> =
    LazyLock::new(|| BootstrapFields::new("prefill-1".to_owned(), Some(8998)));

/// Looks through a `/generate` body that comes in these pieces, and adds the bootstrap fields: how many bytes a leg
/// gets.
pub fn rewrite(pieces: &[Bytes]) -> usize {
    let mut inspector = Inspector::new(Dialect::Generate);
    let mut body = ClientBody::default();
    for piece in pieces {
        inspector.feed(piece).expect("a good body");
        body.push(piece.clone());
    }
    let shape = inspector.finish().expect("a whole body");
    body.with_fields(&shape.edit, &FIELDS, 1 << 61).len()
}

/// Reads a request's head, and writes those of both legs: how many bytes they get.
pub fn pass_head_on(text: &[u8], host: &HeaderValue) -> usize {
    let (head, _, _) = read_request_head(text, 0).expect("a good head").expect("a whole head");
    let head = UpstreamHead::new(&head.method, head.target.as_str(), &head.fields, true);
    let [prefill, decode] = [(); 2].map(|()| head.to(host, b"", &OutgoingBody::default()));
    use bytes::Buf as _;
    prefill.remaining() + decode.remaining()
}

/// Reads an answer's head, and writes the client's: how many bytes it gets.
pub fn pass_answer_head_on(text: &[u8]) -> usize {
    let answer = read_response_head(text, 0).expect("a good head").expect("a whole head");
    let mut written = Vec::with_capacity(text.len());
    ClientResponseHead::from(answer.head).write(true, &mut written);
    written.len()
}

/// Reads an answer of which each of these pieces is read at a time, the first with all of the head: how many bytes its
/// body has.
pub fn read_answer(pieces: &[Bytes]) -> usize {
    let answer = read_response_head(&pieces[0], 0).expect("a good head").expect("a whole head");
    let mut decoder = answer.decoder;
    let mut length = 0;
    for (number, piece) in pieces.iter().enumerate() {
        let begin = if number == 0 { answer.length } else { 0 };
        let mut body = Vec::with_capacity(piece.len());
        decoder.decode(&piece[begin..], &mut body).expect("a good body");
        length += body.len();
    }
    assert!(decoder.is_ended());
    length
}

/// Splits a stream that comes in these frames: how many events it has.
pub fn split_events(frames: &[Bytes]) -> usize {
    let mut events = Events::new(usize::MAX);
    let count = |frame: &Bytes| {
        events.push(frame.clone());
        std::iter::from_fn(|| events.next()).count()
    };
    frames.iter().map(count).sum()
}

/// Splices prefill's lists into decode's whole `/generate` answer: how many bytes the client gets.
pub fn splice_body(prefill: &Bytes, decode: &Bytes) -> usize {
    let lists = PromptLogprobs::read(Merge::Generate, prefill).expect("lists");
    lists.splice_body(decode).len()
}

/// Splices them into decode's stream, which comes in these frames.
pub fn splice_stream(prefill: &Bytes, frames: &[Bytes]) -> usize {
    let lists = PromptLogprobs::read(Merge::Generate, prefill).expect("lists");
    let mut splicer = lists.into_splicer(usize::MAX);
    let mut length = 0;
    for frame in frames {
        splicer.push(frame.clone());
        while let Some(event) = splicer.next() {
            length += event.expect("there is no limit").len();
        }
    }
    length + splicer.finish().map_or(0, |rest| rest.len())
}
