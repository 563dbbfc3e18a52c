//! What must hold for every input, as functions of bytes: one for each fuzz target in `fuzz/`, and the same
//! functions for the bounded tests that `cargo test` runs.
//!
//! The first four bytes of an input choose options and where the rest is split. The rest is text, in
//! several parts where a target needs more than one. `docs/FUZZING.md` says how the targets are run.

mod http;
mod requests;
mod router;
mod samples;
mod scripted_backend;
#[cfg(test)]
mod tests;

use bytes::Bytes;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

pub use self::requests::requests;
pub use self::router::router;
pub use self::samples::merge_samples;
use crate::wire::body::ClientBody;
use crate::wire::bootstrap::BootstrapFields;
use crate::wire::logprobs::{Merge, PromptLogprobs, StreamSplicer};
use crate::wire::plan::{OwnIds, RequestPlan};
use crate::wire::shape::{BodyError, BodyInspector, BodyShape, Dialect};
use crate::wire::sse::{EventSplitter, single_data_line};

/// Bytes of options before the text.
const OPTIONS: usize = 4;
/// Separates the parts of a text. No UTF-8 text has this byte, so that a part rarely does.
const SEPARATOR: u8 = 0xFF;

const DIALECTS: [Dialect; 5] =
    [Dialect::Generate, Dialect::Chat, Dialect::Completions, Dialect::Responses, Dialect::Messages];

struct FuzzInput<'a> {
    options: [u8; OPTIONS],
    text: &'a [u8],
}

impl<'a> FuzzInput<'a> {
    fn new(data: &'a [u8]) -> Option<Self> {
        let (options, text) = data.split_first_chunk()?;
        Some(Self { options: *options, text })
    }

    /// The text's parts. Missing ones are empty, and separators in the last belong to it.
    fn parts<const N: usize>(&self) -> [&'a [u8]; N] {
        let mut parts = self.text.splitn(N, |byte| *byte == SEPARATOR);
        std::array::from_fn(|_| parts.next().unwrap_or_default())
    }
}

/// Splits a text into chunks: none for seed 0, single bytes for seed 1, else of random lengths.
fn split_at_random(text: &[u8], seed: u8) -> Vec<&[u8]> {
    split_into_at_most(usize::MAX, text, seed)
}

/// The same into a bounded number of chunks, for connections, where each chunk wakes several tasks. The last
/// one is the rest.
fn split_into_at_most(most: usize, text: &[u8], seed: u8) -> Vec<&[u8]> {
    if seed == 0 {
        return vec![text];
    }
    let mut random = fastrand::Rng::with_seed(seed.into());
    let longest = if seed == 1 { 1 } else { 2 << (seed % 9) };
    let mut rest = text;
    let mut chunks = Vec::new();
    while !rest.is_empty() {
        let length = if chunks.len() + 1 < most { random.usize(1..=longest) } else { rest.len() };
        let (chunk, others) = rest.split_at(length.min(rest.len()));
        chunks.push(chunk);
        rest = others;
    }
    chunks
}

/// Whether a strict parser accepts the text. A `RawValue` is read without recursion, so that no depth is
/// rejected.
fn is_json(text: &[u8]) -> bool {
    serde_json::from_slice::<&RawValue>(text).is_ok()
}

/// A request body: what is read of it does not depend on how it is split into chunks, nor on whether long
/// chunks are read in blocks, and rewritten it is the same JSON with the three bootstrap fields.
pub fn inspect_and_rewrite(data: &[u8]) {
    let Some(input) = FuzzInput::new(data) else { return };
    let dialect = DIALECTS[usize::from(input.options[0]) % DIALECTS.len()];
    let whole = inspect(dialect, vec![input.text]);
    let chunked = inspect(dialect, split_at_random(input.text, input.options[1]));
    for (result, seed) in [(&whole, 0), (&chunked, input.options[1])] {
        let chunks = split_at_random(input.text, seed);
        let expected = inspect_by(BodyInspector::new(dialect).reference(), chunks);
        assert_eq!(result.as_ref().map(|(_, shape)| shape), expected.as_ref().map(|(_, shape)| shape));
    }
    match (whole, chunked) {
        (Ok((body, shape)), Ok((chunked_body, chunked_shape))) => {
            assert_eq!(shape, chunked_shape);
            let rewritten = rewrite(&body, &shape);
            assert_eq!(rewritten, rewrite(&chunked_body, &shape));
            check_rewritten(input.text, &rewritten);
        }
        // The two errors may differ: of several, the one that is found first depends on the chunks.
        (Err(error), Err(_)) => {
            let object = serde_json::from_slice::<Map<String, Value>>(input.text);
            assert!(
                object.is_err() || error == BodyError::TooManyChangedPlaces,
                "an object was rejected: {error}"
            );
        }
        (whole, chunked) => panic!("whole: {:?}, in chunks: {:?}", whole.err(), chunked.err()),
    }
}

fn inspect(dialect: Dialect, chunks: Vec<&[u8]>) -> Result<(ClientBody, BodyShape), BodyError> {
    inspect_by(BodyInspector::new(dialect), chunks)
}

fn inspect_by(
    mut inspector: BodyInspector,
    chunks: Vec<&[u8]>,
) -> Result<(ClientBody, BodyShape), BodyError> {
    let mut body = ClientBody::default();
    for chunk in chunks {
        inspector.feed(chunk)?;
        body.push(Bytes::copy_from_slice(chunk));
    }
    Ok((body, inspector.finish()?))
}

fn rewrite(body: &ClientBody, shape: &BodyShape) -> Vec<u8> {
    let fields = BootstrapFields::new("prefill".into(), Some(8998));
    let plan = RequestPlan::sglang(&shape.fields, OwnIds::default());
    plan.bodies(body, &fields, 7).decode().pieces().concat()
}

fn check_rewritten(before: &[u8], after: &[u8]) {
    assert_eq!(is_json(before), is_json(after), "{}", after.escape_ascii());
    let object = |text| serde_json::from_slice::<Map<String, Value>>(text);
    let (Ok(mut before), Ok(mut after)) = (object(before), object(after)) else { return };
    for (name, value) in [
        ("bootstrap_host", Value::from("prefill")),
        ("bootstrap_port", Value::from(8998)),
        ("bootstrap_room", Value::from(7)),
    ] {
        assert_eq!(after.remove(name), Some(value));
    }
    // Escapes take up to six bytes a character, so the inspector's 256 bytes hold any name up to this length.
    let is_removed = |name: &str| name.starts_with("bootstrap_") && name.len() <= 40;
    assert!(!after.keys().any(|name| is_removed(name)), "a bootstrap field of the client's is left");
    for object in [&mut before, &mut after] {
        object.retain(|name, _| !name.starts_with("bootstrap_"));
    }
    assert_eq!(before, after);
}

/// A stream's events: no byte is lost, every event ends at its first blank line, and frame boundaries and
/// limits change nothing else.
pub fn split_events(data: &[u8]) {
    let Some(input) = FuzzInput::new(data) else { return };
    let [seed, limit, ..] = input.options;
    let (events, rest, _) = split(vec![input.text], usize::MAX);
    for event in &events {
        assert_eq!(end_of_event(event), Some(event.len()), "{}", event.escape_ascii());
    }
    assert_eq!(end_of_event(&rest), None);
    assert_eq!([events.concat(), rest.to_vec()].concat(), input.text);
    let frames = || split_at_random(input.text, seed);
    assert_eq!(split(frames(), usize::MAX), (events.clone(), rest.clone(), false));

    let limit = usize::from(limit);
    let fitting = events.iter().take_while(|event| event.len() <= limit).count();
    let (limited, remaining, is_too_large) = split(frames(), limit);
    assert_eq!(limited, events[..fitting]);
    assert_eq!([limited.concat(), remaining.to_vec()].concat(), input.text);
    assert_eq!(is_too_large, fitting < events.len() || rest.len() > limit);
}

/// The events of a stream that arrives in these frames, the remaining bytes, and whether an event was too
/// large.
fn split(frames: Vec<&[u8]>, limit: usize) -> (Vec<Bytes>, Bytes, bool) {
    let mut splitter = EventSplitter::new(limit);
    let mut events = Vec::new();
    let mut is_too_large = false;
    for frame in frames {
        splitter.push(Bytes::copy_from_slice(frame));
        while !is_too_large {
            match splitter.next() {
                Some(Ok(event)) => events.push(event),
                Some(Err(_)) => is_too_large = true,
                None => break,
            }
        }
    }
    let rest = [splitter.take_remaining(), splitter.take_remaining()];
    (events, rest.into_iter().flatten().collect::<Vec<_>>().concat().into(), is_too_large)
}

/// The end of a text's first event, by a search for each kind of blank line.
fn end_of_event(text: &[u8]) -> Option<usize> {
    let ends = [&b"\n\n"[..], b"\n\r\n", b"\r\r"];
    let end = |end: &&[u8]| memchr::memmem::find(text, end).map(|at| at + end.len());
    ends.iter().filter_map(end).min()
}

/// Prefill's lists in decode's response: nothing but the lists changes, JSON stays JSON, and a stream's frame
/// boundaries do not matter. The text's parts are prefill's body and decode's.
pub fn splice_logprobs(data: &[u8]) {
    let Some(input) = FuzzInput::new(data) else { return };
    let [merge, seed, ..] = input.options;
    let merges = [Merge::Generate, Merge::Echo, Merge::GenerateExperts, Merge::Experts];
    let merge = merges[usize::from(merge) % merges.len()];
    let [prefill, decode] = input.parts();
    let (prefill, decode) = (Bytes::copy_from_slice(prefill), Bytes::copy_from_slice(decode));
    let read = || PromptLogprobs::read(merge, &prefill);
    let Ok(lists) = read() else { return };
    let is_empty = lists.is_empty();
    let body = lists.splice_body(&decode).into_bytes();
    let stream = splice_stream(lists, vec![&decode]);
    let lists = read().expect("it was read before");
    assert_eq!(splice_stream(lists, split_at_random(&decode, seed)), stream);
    // Names with escapes, which no server writes, are not looked for in early events.
    if merge == Merge::Experts && memchr::memmem::find(&decode, b"\\u").is_none() {
        let lists = read().expect("it was read before");
        assert_eq!(splice_late(lists, split_at_random(&decode, seed)), stream);
    }
    if is_empty {
        assert_eq!((&body, &stream), (&decode, &decode));
    }
    // An echo only inserts, unless rows replace others.
    if merge == Merge::Echo && memchr::memmem::find(&prefill, b"routed").is_none() {
        assert!(is_subsequence(&decode, &body) && is_subsequence(&decode, &stream), "a byte is lost");
    }
    let is_stream = !matches!(prefill.trim_ascii_start(), [b'{' | b'[', ..]);
    let is_valid =
        if is_stream { data_of(&prefill).iter().all(|data| is_json(data)) } else { is_json(&prefill) };
    if is_valid {
        check_spliced(merge, &decode, &body);
        // A list with line ends, which no server sends, would end an event of decode's early.
        if is_stream || !prefill.iter().any(|byte| matches!(byte, b'\n' | b'\r')) {
            check_spliced_events(merge, &decode, &stream);
        }
    }
}

/// What the client gets of a stream of decode's that arrives in these frames.
fn splice_stream(lists: PromptLogprobs, frames: Vec<&[u8]>) -> Bytes {
    let mut splicer = lists.into_splicer(usize::MAX);
    let mut sent = Vec::new();
    for frame in frames {
        splicer.push(Bytes::copy_from_slice(frame));
        while let Some(event) = splicer.next() {
            sent.extend_from_slice(&event.expect("there is no limit").into_bytes());
        }
    }
    sent.extend_from_slice(&splicer.finish().unwrap_or_default());
    sent.into()
}

/// The same of a late merge, with lists that are there when they are needed.
fn splice_late(lists: PromptLogprobs, frames: Vec<&[u8]>) -> Bytes {
    let (mut splicer, mut lists) = (StreamSplicer::late(usize::MAX), Some(lists));
    let mut sent = Vec::new();
    for frame in frames {
        splicer.push(Bytes::copy_from_slice(frame));
        loop {
            while let Some(event) = splicer.next() {
                sent.extend_from_slice(&event.expect("there is no limit").into_bytes());
            }
            let Some(lists) = lists.take_if(|_| splicer.needs_lists()) else { break };
            sent.extend_from_slice(&splicer.supply(lists).into_bytes());
        }
    }
    sent.extend_from_slice(&splicer.finish().unwrap_or_default());
    sent.into()
}

/// Whether `longer` has all bytes of `text`, in order.
fn is_subsequence(text: &[u8], longer: &[u8]) -> bool {
    let mut rest = longer.iter();
    text.iter().all(|byte| rest.any(|other| other == byte))
}

/// The data of those events of a stream that are a single line of data.
fn data_of(stream: &[u8]) -> Vec<Bytes> {
    let (mut events, rest, _) = split(vec![stream], usize::MAX);
    events.push(rest);
    let data = events.iter().filter_map(|event| single_data_line(event).map(|data| event.slice(data)));
    data.filter(|data| data != "[DONE]").collect()
}

fn check_spliced_events(merge: Merge, before: &[u8], after: &[u8]) {
    let (before, after) = (data_of(before), data_of(after));
    assert_eq!(before.len(), after.len());
    for (before, after) in before.iter().zip(&after) {
        check_spliced(merge, before, after);
    }
}

fn check_spliced(merge: Merge, before: &[u8], after: &[u8]) {
    if !is_json(before) {
        return;
    }
    assert!(is_json(after), "{}", after.escape_ascii());
    let value = |text| serde_json::from_slice::<Value>(text);
    if let (Ok(mut before), Ok(mut after)) = (value(before), value(after)) {
        remove_lists(merge, &mut before);
        remove_lists(merge, &mut after);
        assert_eq!(before, after);
    }
}

/// Removes the lists, which a merge may change, at every level.
fn remove_lists(merge: Merge, value: &mut Value) {
    const ECHO: [&str; 5] = ["text_offset", "token_logprobs", "tokens", "top_logprobs", "routed_experts"];
    const GENERATE: [&str; 5] = [
        "output_token_ids_logprobs",
        "routed_experts",
        "prefill_finished_time",
        "storage_prefetch_wait",
        "storage_staging_wait",
    ];
    match value {
        Value::Array(items) => items.iter_mut().for_each(|item| remove_lists(merge, item)),
        Value::Object(members) => {
            members.retain(|name, _| match merge {
                Merge::Generate | Merge::GenerateExperts => {
                    !name.starts_with("input_to") && !GENERATE.contains(&name.as_str())
                }
                Merge::Echo => !ECHO.contains(&name.as_str()),
                Merge::Experts => name != "routed_experts",
            });
            members.values_mut().for_each(|member| remove_lists(merge, member));
        }
        _ => {}
    }
}
