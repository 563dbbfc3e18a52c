//! Request bodies: inspected and rewritten, beside what two parsers take for the same text.

use std::fmt::{self, Write};

use bytes::Bytes;
use divan::Bencher;
use divan::counter::BytesCount;
use mini_lb::internals;
use serde_json::{Map, Value};

/// The size of the chunks that a connection reads of a large body.
const CHUNK: usize = 400 << 10;

#[derive(Clone, Copy)]
enum Body {
    Chat300B,
    Chat4KiB,
    Chat64KiB,
    Ids32k,
    Chat1MiB,
    Base64Of8MiB,
}

const BODIES: [Body; 6] =
    [Body::Chat300B, Body::Chat4KiB, Body::Chat64KiB, Body::Ids32k, Body::Chat1MiB, Body::Base64Of8MiB];

impl fmt::Display for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Chat300B => "chat_300b",
            Self::Chat4KiB => "chat_4kib",
            Self::Chat64KiB => "chat_64kib",
            Self::Ids32k => "32k_ids",
            Self::Chat1MiB => "chat_1mib",
            Self::Base64Of8MiB => "8mib_base64",
        })
    }
}

impl Body {
    fn text(self) -> String {
        match self {
            Self::Chat300B => chat(300),
            Self::Chat4KiB => chat(4 << 10),
            Self::Chat64KiB => chat(64 << 10),
            Self::Ids32k => ids(32 << 10),
            Self::Chat1MiB => chat(1 << 20),
            Self::Base64Of8MiB => image(8 << 20),
        }
    }

    fn chunks(self) -> Vec<Bytes> {
        let text = Bytes::from(self.text());
        let starts = (0..text.len()).step_by(CHUNK);
        starts.map(|start| text.slice(start..text.len().min(start + CHUNK))).collect()
    }
}

/// A conversation of `length` bytes: prose, with some escapes.
fn chat(length: usize) -> String {
    const PROSE: &str =
        r#"The prefill server reads the prompt.\nIt says \"done\", and the decode server begins. "#;
    const TURN: &str = r#""},{"role":"user","content":""#;
    const END: &str = r#""}],"temperature":0.2,"max_tokens":64,"stream":true}"#;
    let mut text =
        r#"{"model":"llama","messages":[{"role":"system","content":"Be brief."},{"role":"user","content":""#
            .to_owned();
    while text.len() + TURN.len() + 10 * PROSE.len() + END.len() < length {
        text.extend(std::iter::repeat_n(PROSE, 10));
        text.push_str(TURN);
    }
    while text.len() + PROSE.len() + END.len() < length {
        text.push_str(PROSE);
    }
    // Padding to the exact length: a bench's throughput is computed from it.
    text.extend(std::iter::repeat_n('x', length - text.len() - END.len()));
    text + END
}

fn ids(count: usize) -> String {
    let mut text = r#"{"input_ids":["#.to_owned();
    for number in 0..count {
        let comma = if number == 0 { "" } else { "," };
        write!(text, "{comma}{}", number * 7_919 % 128_256).expect("writing to a string does not fail");
    }
    text + r#"],"sampling_params":{"max_new_tokens":64,"temperature":0.2},"stream":true}"#
}

/// A message with an image of `length` bytes of base64.
fn image(length: usize) -> String {
    const BASE64: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text =
        r#"{"model":"llava","messages":[{"role":"user","content":[{"type":"image_url","#.to_owned();
    text += r#""image_url":{"url":"data:image/png;base64,"#;
    text.extend((0..length).map(|at| char::from(BASE64[at * 31 % 64])));
    text + r#""}},{"type":"text","text":"What is this?"}]}],"max_tokens":64}"#
}

/// The scan alone, and the same with the prompt's fingerprint: the difference is the price of `cache_aware`.
#[divan::bench(args = BODIES)]
fn inspect_without_prompt(bencher: Bencher<'_, '_>, body: Body) {
    inspect(bencher, body, false);
}

#[divan::bench(args = BODIES)]
fn inspect_with_prompt(bencher: Bencher<'_, '_>, body: Body) {
    inspect(bencher, body, true);
}

fn inspect(bencher: Bencher<'_, '_>, body: Body, with_prompt: bool) {
    let (length, chunks) = (body.text().len(), body.chunks());
    let is_chat = body.text().contains("messages");
    bencher
        .counter(BytesCount::new(length))
        .bench_local(|| internals::inspect(&chunks, is_chat, with_prompt));
}

#[divan::bench(args = BODIES)]
fn inspect_and_rewrite(bencher: Bencher<'_, '_>, body: Body) {
    let chunks = body.chunks();
    let bencher = bencher.counter(BytesCount::new(body.text().len()));
    bencher.bench_local(|| internals::inspect_and_rewrite(&chunks));
}

/// The fastest parser, without reading anything of its tape. The copy in which it writes is not counted.
#[divan::bench(args = BODIES)]
fn simd_json_tape(bencher: Bencher<'_, '_>, body: Body) {
    let text = body.text().into_bytes();
    let bencher = bencher.counter(BytesCount::new(text.len()));
    bencher
        .with_inputs(|| text.clone())
        .bench_local_refs(|text| simd_json::to_tape(text).expect("JSON").0.len());
}

/// What routers do that parse a body into a value: parse it, add the fields, and serialise it again.
#[divan::bench(args = BODIES)]
fn serde_json_parse_and_serialise(bencher: Bencher<'_, '_>, body: Body) {
    let text = body.text();
    let bencher = bencher.counter(BytesCount::new(text.len()));
    bencher.bench_local(|| parse_and_serialise(&text).len());
}

fn parse_and_serialise(text: &str) -> Vec<u8> {
    let mut body: Map<String, Value> = serde_json::from_str(text).expect("an object");
    body.insert("bootstrap_host".to_owned(), "prefill-1".into());
    body.insert("bootstrap_port".to_owned(), 8998.into());
    body.insert("bootstrap_room".to_owned(), (1_u64 << 61).into());
    serde_json::to_vec(&body).expect("an object serialises")
}
