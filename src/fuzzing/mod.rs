//! What must hold for every input, as functions of bytes: one for each fuzz
//! target in `fuzz/`, and the same for the bounded tests here.
//!
//! The first four bytes of an input choose options and where the rest is cut. The
//! rest is text, in parts where a target takes more than one. How the targets are
//! run is in `docs/FUZZING.md`.

mod http;
mod requests;
mod router;
#[cfg(test)]
mod tests;

use bytes::Bytes;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

pub use self::requests::requests;
pub use self::router::router;
use crate::http1::OutgoingBody;
use crate::wire::body::ClientBody;
use crate::wire::bootstrap::BootstrapFields;
use crate::wire::logprobs::{Merge, PromptLogprobs};
use crate::wire::shape::{BodyError, BodyShape, Dialect, Inspector};
use crate::wire::sse::{Events, only_data};

/// Bytes that choose, in front of the text.
const OPTIONS: usize = 4;
/// Comes between the parts of a text: a byte that UTF-8 does not have, so that texts seldom do.
const SEPARATOR: u8 = 0xFF;

const DIALECTS: [Dialect; 3] = [Dialect::Generate, Dialect::Chat, Dialect::Completions];

struct Input<'a> {
    options: [u8; OPTIONS],
    text: &'a [u8],
}

impl<'a> Input<'a> {
    fn of(data: &'a [u8]) -> Option<Self> {
        let (options, text) = data.split_first_chunk()?;
        Some(Self { options: *options, text })
    }

    /// The text's parts. Missing ones are empty, and separators in the last are a part of it.
    fn parts<const N: usize>(&self) -> [&'a [u8]; N] {
        let mut parts = self.text.splitn(N, |byte| *byte == SEPARATOR);
        std::array::from_fn(|_| parts.next().unwrap_or_default())
    }
}

/// Cuts a text as `how` says: not at all, at every byte, or anywhere.
fn cut(text: &[u8], how: u8) -> Vec<&[u8]> {
    cut_at_most(usize::MAX, text, how)
}

/// The same into few pieces, for where each is dear: the last one is what is left.
fn cut_at_most(most: usize, text: &[u8], how: u8) -> Vec<&[u8]> {
    if how == 0 {
        return vec![text];
    }
    let mut random = fastrand::Rng::with_seed(how.into());
    let longest = if how == 1 { 1 } else { 2 << (how % 9) };
    let mut rest = text;
    let mut pieces = Vec::new();
    while !rest.is_empty() {
        let length = if pieces.len() + 1 < most { random.usize(1..=longest) } else { rest.len() };
        let (piece, others) = rest.split_at(length.min(rest.len()));
        pieces.push(piece);
        rest = others;
    }
    pieces
}

/// JSON as strict parsers take it, however deep.
fn is_json(text: &[u8]) -> bool {
    serde_json::from_slice::<&RawValue>(text).is_ok()
}

/// A request's body: what is read of it and made of it does not depend on how it is cut, and it stays the JSON that
/// it was, with the three fields of ours.
pub fn inspect_and_rewrite(data: &[u8]) {
    let Some(input) = Input::of(data) else { return };
    let dialect = DIALECTS[usize::from(input.options[0]) % DIALECTS.len()];
    let whole = inspect(dialect, vec![input.text]);
    let pieces = inspect(dialect, cut(input.text, input.options[1]));
    match (whole, pieces) {
        (Ok((body, shape)), Ok((body_of_pieces, shape_of_pieces))) => {
            assert_eq!(shape, shape_of_pieces);
            let rewritten = rewrite(&body, &shape);
            assert_eq!(rewritten, rewrite(&body_of_pieces, &shape));
            check_rewritten(input.text, &rewritten);
        }
        // Which of several faults is named depends on what is there when the first is seen.
        (Err(error), Err(_)) => {
            let object = serde_json::from_slice::<Map<String, Value>>(input.text);
            assert!(object.is_err() || error == BodyError::TooManyCuts, "an object was refused: {error}");
        }
        (whole, pieces) => panic!("whole: {:?}, in pieces: {:?}", whole.err(), pieces.err()),
    }
}

fn inspect(dialect: Dialect, pieces: Vec<&[u8]>) -> Result<(ClientBody, BodyShape), BodyError> {
    let mut inspector = Inspector::new(dialect);
    let mut body = ClientBody::default();
    for piece in pieces {
        inspector.feed(piece)?;
        body.push(Bytes::copy_from_slice(piece));
    }
    Ok((body, inspector.finish()?))
}

fn rewrite(body: &ClientBody, shape: &BodyShape) -> Vec<u8> {
    let fields = BootstrapFields::new("prefill".into(), Some(8998));
    bytes_of(body.with_fields(&shape.edit, &fields, 7))
}

fn bytes_of(body: OutgoingBody) -> Vec<u8> {
    body.pieces().concat()
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
    // Spelled with six bytes a letter, a longer name may pass the bound of names that are read.
    let is_cut = |name: &str| name.starts_with("bootstrap_") && name.len() <= 40;
    assert!(!after.keys().any(|name| is_cut(name)), "a field of the client's is left");
    for object in [&mut before, &mut after] {
        object.retain(|name, _| !name.starts_with("bootstrap_"));
    }
    assert_eq!(before, after);
}

/// A stream's events: no byte is lost, every event ends where it should, and cuts and limits change nothing else.
pub fn split_events(data: &[u8]) {
    let Some(input) = Input::of(data) else { return };
    let [cuts, limit, ..] = input.options;
    let (events, rest, _) = split(vec![input.text], usize::MAX);
    for event in &events {
        assert_eq!(end_of_event(event), Some(event.len()), "{}", event.escape_ascii());
    }
    assert_eq!(end_of_event(&rest), None);
    assert_eq!([events.concat(), rest.to_vec()].concat(), input.text);
    assert_eq!(split(cut(input.text, cuts), usize::MAX), (events.clone(), rest.clone(), false));

    let limit = usize::from(limit);
    let fitting = events.iter().take_while(|event| event.len() <= limit).count();
    let (bounded, left, too_large) = split(cut(input.text, cuts), limit);
    assert_eq!(bounded, events[..fitting]);
    assert_eq!([bounded.concat(), left.to_vec()].concat(), input.text);
    assert_eq!(too_large, fitting < events.len() || rest.len() > limit);
}

/// The events of a stream that comes in these pieces, what is left, and whether something was too large.
fn split(pieces: Vec<&[u8]>, limit: usize) -> (Vec<Bytes>, Bytes, bool) {
    let mut splitter = Events::new(limit);
    let mut events = Vec::new();
    let mut too_large = false;
    for piece in pieces {
        splitter.push(Bytes::copy_from_slice(piece));
        while !too_large {
            match splitter.next() {
                Some(Ok(event)) => events.push(event),
                Some(Err(_)) => too_large = true,
                None => break,
            }
        }
    }
    let rest = [splitter.take_rest(), splitter.take_rest()].into_iter().flatten().collect::<Vec<_>>();
    (events, rest.concat().into(), too_large)
}

/// Where the first event of a text ends, by the letter: behind the first blank line.
fn end_of_event(text: &[u8]) -> Option<usize> {
    let ends = [&b"\n\n"[..], b"\n\r\n", b"\r\r"];
    let end = |end: &&[u8]| memchr::memmem::find(text, end).map(|at| at + end.len());
    ends.iter().filter_map(end).min()
}

/// Prefill's lists in decode's answer: nothing but the lists changes, JSON stays JSON, and a stream's cuts do not
/// matter. The text is prefill's answer and decode's.
pub fn splice_logprobs(data: &[u8]) {
    let Some(input) = Input::of(data) else { return };
    let [merge, cuts, ..] = input.options;
    let merge = [Merge::Generate, Merge::Echo][usize::from(merge) % 2];
    let [prefill, decode] = input.parts();
    let (prefill, decode) = (Bytes::copy_from_slice(prefill), Bytes::copy_from_slice(decode));
    let read = || PromptLogprobs::read(merge, &prefill);
    let Ok(lists) = read() else { return };
    let nothing = lists.is_empty();
    let body = lists.splice_body(&decode).into_bytes();
    let stream = splice_stream(lists, vec![&decode]);
    let again = read().expect("it was read before");
    assert_eq!(splice_stream(again, cut(&decode, cuts)), stream);
    if nothing {
        assert_eq!((&body, &stream), (&decode, &decode));
    }
    if merge == Merge::Echo {
        assert!(is_within(&decode, &body) && is_within(&decode, &stream), "something is lost");
    }
    let is_stream = !matches!(prefill.trim_ascii_start(), [b'{' | b'[', ..]);
    let is_sound = if is_stream { are_json(&data_of(&prefill)) } else { is_json(&prefill) };
    if is_sound {
        check_spliced(merge, &decode, &body);
        // A list with line ends, which no server sends, would end an event of decode's early.
        if is_stream || !prefill.iter().any(|byte| matches!(byte, b'\n' | b'\r')) {
            check_spliced_events(merge, &decode, &stream);
        }
    }
}

fn splice_stream(lists: PromptLogprobs, decode: Vec<&[u8]>) -> Bytes {
    let mut splicer = lists.into_splicer(usize::MAX);
    let mut sent = Vec::new();
    for piece in decode {
        splicer.push(Bytes::copy_from_slice(piece));
        while let Some(event) = splicer.next() {
            sent.extend_from_slice(&event.expect("there is no limit").into_bytes());
        }
    }
    sent.extend_from_slice(&splicer.finish().unwrap_or_default());
    sent.into()
}

/// Whether all of `text` is in `longer`, in its order.
fn is_within(text: &[u8], longer: &[u8]) -> bool {
    let mut rest = longer.iter();
    text.iter().all(|byte| rest.any(|other| other == byte))
}

/// The data of a stream's events, where that is all there is in them.
fn data_of(stream: &[u8]) -> Vec<Bytes> {
    let (mut events, rest, _) = split(vec![stream], usize::MAX);
    events.push(rest);
    let data = events.iter().filter_map(|event| only_data(event).map(|data| event.slice(data)));
    data.filter(|data| data != "[DONE]").collect()
}

fn are_json(texts: &[Bytes]) -> bool {
    texts.iter().all(|text| is_json(text))
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

/// Removes what may differ.
fn remove_lists(merge: Merge, value: &mut Value) {
    const ECHO: [&str; 4] = ["text_offset", "token_logprobs", "tokens", "top_logprobs"];
    match value {
        Value::Array(items) => items.iter_mut().for_each(|item| remove_lists(merge, item)),
        Value::Object(members) => {
            members.retain(|name, _| match merge {
                Merge::Generate => !name.starts_with("input_to"),
                Merge::Echo => !ECHO.contains(&name.as_str()),
            });
            members.values_mut().for_each(|member| remove_lists(merge, member));
        }
        _ => {}
    }
}
