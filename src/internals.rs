//! What the benches measure, as functions of plain bytes: only with the feature `internals`, and no part of
//! the public interface.
//!
//! The functions check nothing beyond `expect`. Each returns a number that depends on all of its work, so
//! that the compiler cannot remove any of it.

use std::sync::LazyLock;
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};

use crate::balancer::MiniLoadBalancer;
use crate::http1::{OutgoingBody, read_request_head, read_response_head};
use crate::upstream::{Backend, Demand, Description, InFlight, Outcome, ServerPair};
use crate::wire::body::ClientBody;
use crate::wire::bootstrap::BootstrapFields;
use crate::wire::client_response::ClientResponseHead;
use crate::wire::logprobs::{Merge, PromptLogprobs};
use crate::wire::plan::{OwnIds, RequestPlan};
use crate::wire::samples::StreamMerger;
use crate::wire::shape::{BodyInspector, Dialect, HashKey, Prompt};
use crate::wire::sse::EventSplitter;
use crate::wire::upstream_request::{UpstreamHead, UpstreamTarget};
use crate::wire::usage::{CachedTokens, Usage};

/// Rendered once for each prefill server, so not a part of a request's cost.
static FIELDS: LazyLock<BootstrapFields> =
    LazyLock::new(|| BootstrapFields::new("prefill-1".to_owned(), Some(8998)));

/// Inspects a `/generate` body that arrives in these chunks and adds the bootstrap fields. Returns the length
/// of a leg's body.
pub fn inspect_and_rewrite(chunks: &[Bytes]) -> usize {
    let mut inspector = BodyInspector::new(Dialect::Generate);
    let mut body = ClientBody::default();
    for chunk in chunks {
        inspector.feed(chunk).expect("a well-formed body");
        body.push(chunk.clone());
    }
    let shape = inspector.finish().expect("a complete body");
    // A room of 19 digits, as nearly all rooms have.
    let plan = RequestPlan::sglang(&shape.fields, OwnIds::default());
    plan.bodies(&body, &FIELDS, 1 << 61).prefill().len()
}

/// Inspects a body that arrives in these chunks, and takes its prompt's fingerprint if `with_prompt`.
pub fn inspect(chunks: &[Bytes], is_chat: bool, with_prompt: bool) -> Option<Prompt> {
    let mut inspector = BodyInspector::new(if is_chat { Dialect::Chat } else { Dialect::Generate });
    if with_prompt {
        inspector = inspector.with_prompt(HashKey::from_random(7));
    }
    chunks.iter().for_each(|chunk| inspector.feed(chunk).expect("a well-formed body"));
    inspector.finish().expect("a complete body").prompt
}

/// Selects a pair for a request with this prompt. Returns the work of its prefill server.
pub fn select_pair(router: &MiniLoadBalancer, prompt: &Prompt) -> u64 {
    let demand = Demand { prompt: Some(prompt), body: prompt.bytes(), ..Demand::default() };
    router.select_pair_for(demand).expect("servers of both roles").prefill().work()
}

/// A request that is in flight on its two servers, until this is dropped.
pub struct Legs {
    /// The servers.
    pub pair: ServerPair,
    prefill: Option<InFlight>,
    decode: InFlight,
}

impl Legs {
    /// The prefill leg has ended, if `told` so that its server has said this of the prompt.
    pub fn end_prefill(&mut self, told: Option<ToldPrefill>) {
        if let Some(mut leg) = self.prefill.take() {
            if let Some(ToldPrefill { prompt_tokens, cached_tokens, time }) = told {
                let cached = cached_tokens.map_or(CachedTokens::Untold, CachedTokens::Told);
                leg.prefill_completed(Some(Usage { prompt_tokens, cached }), Some(time));
            }
            leg.set_outcome(Outcome::Completed);
        }
    }
}

/// What a prefill server has said, and when.
pub struct ToldPrefill {
    /// The prompt's tokens.
    pub prompt_tokens: u64,
    /// Those of them that were cached.
    pub cached_tokens: Option<u64>,
    /// How long the leg took.
    pub time: Duration,
}

impl Drop for Legs {
    fn drop(&mut self) {
        self.decode.set_outcome(Outcome::Completed);
    }
}

/// Selects a pair for a request with this prompt, and counts the request on both servers.
pub fn enter_pair(router: &MiniLoadBalancer, prompt: &Prompt) -> Legs {
    let demand = Demand { prompt: Some(prompt), body: prompt.bytes(), ..Demand::default() };
    let (pair, prefill, decode) =
        router.live_fleet().now().enter_pair(demand).expect("servers of both roles");
    Legs { pair, prefill, decode }
}

/// All prefill servers have told that their cache holds so many tokens, that of each of `dp_size` ranks.
pub fn set_cache_tokens(router: &MiniLoadBalancer, tokens: u64, dp_size: u64) {
    for server in router.live_fleet().now().prefill() {
        let (cache_tokens, dp_size) = (Some(tokens), Some(dp_size));
        server.record_description(Description { cache_tokens, dp_size, ..Description::default() });
    }
    router.live_fleet().descriptions_changed();
}

/// Each prefill server has told that so many tokens wait on it.
pub fn tell_waiting_tokens(router: &MiniLoadBalancer, tokens: impl Fn(&Backend) -> u64) {
    for server in router.live_fleet().now().prefill() {
        server.record_waiting_tokens(tokens(server), server.work());
    }
}

/// Reads a request's head and writes those of both legs. Returns their length.
pub fn forward_request_head(text: &[u8], host: &str) -> usize {
    let (head, _, _) = read_request_head(text, 0).expect("a well-formed head").expect("a complete head");
    let head = UpstreamHead::new(&head.method, head.target.as_str(), &head.headers, true);
    let target = UpstreamTarget::new(host, "");
    let [prefill, decode] = [(); 2].map(|()| head.for_backend(&target, b"", &OutgoingBody::default()));
    prefill.remaining() + decode.remaining()
}

/// Reads a response's head and writes the client's. Returns its length.
pub fn forward_response_head(text: &[u8]) -> usize {
    let response = read_response_head(text, 0).expect("a well-formed head").expect("a complete head");
    let mut written = Vec::with_capacity(text.len());
    ClientResponseHead::from(response.head).write(true, &mut written);
    written.len()
}

/// Decodes a response that arrives in these reads, of which the first has all of the head. Returns the body's
/// length.
pub fn decode_response(reads: &[Bytes]) -> usize {
    let response = read_response_head(&reads[0], 0).expect("a well-formed head").expect("a complete head");
    let mut decoder = response.decoder;
    let mut length = 0;
    for (number, read) in reads.iter().enumerate() {
        let start = if number == 0 { response.length } else { 0 };
        let mut body = Vec::with_capacity(read.len());
        decoder.decode(&read[start..], &mut body).expect("a well-formed body");
        length += body.len();
    }
    assert!(decoder.is_ended());
    length
}

/// Splits a stream that arrives in these frames. Returns the number of events.
pub fn split_events(frames: &[Bytes]) -> usize {
    let mut events = EventSplitter::new(usize::MAX);
    let count = |frame: &Bytes| {
        events.push(frame.clone());
        std::iter::from_fn(|| events.next()).count()
    };
    frames.iter().map(count).sum()
}

/// Merges the streams of the copies of a request for several samples, which send these events in turns.
/// Returns the length of the merged stream.
///
/// # Panics
///
/// If an event is malformed.
pub fn merge_samples(copies: usize, events: &[Bytes]) -> usize {
    let mut merger = StreamMerger::new(Dialect::Chat, copies, usize::MAX);
    let (mut out, mut length) = (BytesMut::new(), 0);
    for event in events {
        for copy in 0..copies {
            merger.push(copy, event, &mut out).expect("a well-formed event");
            length += out.len();
            out.clear();
        }
    }
    length
}

/// Splices prefill's lists into decode's `/generate` response. Returns the length of the client's body.
pub fn splice_body(prefill: &Bytes, decode: &Bytes) -> usize {
    let lists = PromptLogprobs::read(Merge::Generate, prefill).expect("a well-formed response");
    lists.splice_body(decode).len()
}

/// Splices prefill's lists into decode's stream, which arrives in these frames. Returns the length of the
/// client's stream.
pub fn splice_stream(prefill: &Bytes, frames: &[Bytes]) -> usize {
    let lists = PromptLogprobs::read(Merge::Generate, prefill).expect("a well-formed response");
    let mut splicer = lists.into_splicer(usize::MAX);
    let mut length = 0;
    for frame in frames {
        splicer.push(frame.clone());
        while let Some(events) = splicer.next() {
            length += events.expect("there is no limit").len();
        }
    }
    length + splicer.finish().map_or(0, |rest| rest.len())
}
