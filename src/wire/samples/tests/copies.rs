//! What single servers would have answered, from what a regular server has answered for several samples.

use bytes::Bytes;

use super::*;
use crate::wire::shape::{BodyInspector, RequestedSamples};
use crate::wire::sse::{EventSplitter, single_data_line};

/// A recorded exchange.
pub(super) struct Recorded {
    pub(super) dialect: Dialect,
    /// How many of each prompt.
    pub(super) samples: usize,
    /// The request has one prompt, and not a list of them.
    is_single: bool,
    pub(super) body: Bytes,
}

/// A recorded request, and what a regular server has answered.
pub(super) struct Exchange {
    dialect: Dialect,
    request: Bytes,
    pub(super) status: u16,
    pub(super) response: Bytes,
}

impl Exchange {
    /// What the router reads in the request.
    pub(super) fn samples(&self) -> RequestedSamples {
        let mut inspector = BodyInspector::new(self.dialect);
        inspector.feed(&self.request).unwrap();
        inspector.finish().unwrap().samples
    }
}

/// An exchange of the fixtures.
pub(super) fn exchange(name: &str) -> Exchange {
    let read = |ending: &str| {
        let path = format!("{}/tests/fixtures/{name}.{ending}", env!("CARGO_MANIFEST_DIR"));
        let bytes = std::fs::read(&path).expect(&path);
        let head = bytes.windows(4).position(|at| at == b"\r\n\r\n").unwrap() + 4;
        (String::from_utf8_lossy(&bytes[..head]).to_lowercase(), Bytes::from(bytes).split_off(head))
    };
    let (head, request) = read("req");
    let dialect = match head.split(' ').nth(1).unwrap() {
        "/generate" => Dialect::Generate,
        "/v1/chat/completions" => Dialect::Chat,
        "/v1/completions" => Dialect::Completions,
        "/v1/responses" => Dialect::Responses,
        "/v1/messages" => Dialect::Messages,
        path => panic!("{path}"),
    };
    let (head, body) = read("resp");
    let response = if head.contains("transfer-encoding: chunked") { dechunked(body) } else { body };
    Exchange { dialect, request, status: head.split(' ').nth(1).unwrap().parse().unwrap(), response }
}

/// An exchange in which a regular server has generated several samples.
pub(super) fn recorded(name: &str) -> Recorded {
    let exchange = exchange(name);
    let RequestedSamples::Many(samples) = exchange.samples() else { panic!("{name}") };
    let request: serde_json::Value = serde_json::from_slice(&exchange.request).unwrap();
    let is_single = !request["text"].is_array();
    let samples = samples.count as usize;
    Recorded { dialect: exchange.dialect, samples, is_single, body: exchange.response }
}

fn dechunked(mut body: Bytes) -> Bytes {
    let mut whole = Vec::new();
    loop {
        let line = body.windows(2).position(|at| at == b"\r\n").unwrap();
        let size = usize::from_str_radix(std::str::from_utf8(&body[..line]).unwrap(), 16).unwrap();
        let chunk = body.split_off(line + 2);
        whole.extend_from_slice(&chunk[..size]);
        if size == 0 {
            return whole.into();
        }
        body = chunk.slice(size + 2..);
    }
}

/// What the copies' servers answer.
#[derive(Default)]
pub(super) struct Copies {
    pub(super) bodies: Vec<Bytes>,
    /// The events of all copies, in the order in which the recording has their samples.
    pub(super) events: Vec<(usize, String)>,
    /// The recorded stream with one id for all chunks.
    pub(super) merged: String,
}

/// The names and raw values of an object.
fn members(text: &str) -> Vec<(String, String)> {
    let raw = |range: Range<usize>| text[range].to_owned();
    let mut members = Vec::new();
    let mut at = 0;
    for member in JsonValue::root(text.as_bytes()).unwrap().members() {
        let value = member.unwrap().value.span();
        // The name is what is between the last value and this one.
        let name = raw(at..value.start).trim_matches(['{', ',', ':', '"', ' ']).to_owned();
        at = value.end;
        members.push((name, raw(value)));
    }
    members
}

fn object(members: &[(String, String)]) -> String {
    let members: Vec<_> = members.iter().map(|(name, value)| format!("\"{name}\":{value}")).collect();
    format!("{{{}}}", members.join(","))
}

fn elements(text: &str) -> Vec<String> {
    let value = JsonValue::root(text.as_bytes()).unwrap();
    value.elements().map(|element| text[element.unwrap().span()].to_owned()).collect()
}

/// A copy's part of a count: whole parts, and the rest is the first copy's.
fn share(count: &str, copy: usize, copies: usize) -> u64 {
    let (count, copies) = (count.parse::<u64>().unwrap(), copies as u64);
    count / copies + if copy == 0 { count % copies } else { 0 }
}

/// The usage of one copy. How many tokens each sample had is not recorded, only their sum.
fn usage_of(usage: &str, copy: usize, copies: usize) -> String {
    let mut usage = members(usage);
    let prompt = usage.iter().find(|(name, _)| name == "prompt_tokens").unwrap().1.parse::<u64>().unwrap();
    let tokens = usage.iter().find(|(name, _)| name == "completion_tokens").unwrap().1.clone();
    for (name, value) in &mut usage {
        match &**name {
            "completion_tokens" | "reasoning_tokens" => *value = share(value, copy, copies).to_string(),
            "total_tokens" => *value = (prompt + share(&tokens, copy, copies)).to_string(),
            // Other copies have found the whole prompt cached.
            "prompt_tokens_details" if copy > 0 => *value = r#"{"cached_tokens":1}"#.into(),
            _ => {}
        }
    }
    object(&usage)
}

/// Replaces an index by the number of its prompt. Returns the copy that it is of.
fn cut_index(members: &mut Vec<(String, String)>, copies: usize, is_single: bool) -> usize {
    let at = members.iter().position(|(name, _)| name == "index").unwrap();
    let index: usize = members[at].1.parse().unwrap();
    if is_single {
        assert_eq!(index / copies, 0);
        members.remove(at);
    } else {
        members[at].1 = (index / copies).to_string();
    }
    index % copies
}

impl Copies {
    pub(super) fn of_body(regular: &Recorded) -> Self {
        let text = std::str::from_utf8(&regular.body).unwrap();
        let copies = regular.samples;
        let of = |copy: usize| {
            if regular.dialect == Dialect::Generate {
                let answers: Vec<_> = elements(text).into_iter().skip(copy).step_by(copies).collect();
                return if regular.is_single {
                    answers[0].clone()
                } else {
                    format!("[{}]", answers.join(","))
                };
            }
            let mut body = members(text);
            for (name, value) in &mut body {
                match &**name {
                    "id" if copy > 0 => *value = "\"another\"".into(),
                    "created" if copy > 0 => *value = "1".into(),
                    "choices" => {
                        let of_copy = elements(value).into_iter().filter_map(|choice| {
                            let mut choice = members(&choice);
                            (cut_index(&mut choice, copies, false) == copy).then(|| object(&choice))
                        });
                        *value = format!("[{}]", of_copy.collect::<Vec<_>>().join(","));
                    }
                    "usage" => *value = usage_of(value, copy, copies),
                    _ => {}
                }
            }
            object(&body)
        };
        Self { bodies: (0..copies).map(|copy| of(copy).into()).collect(), ..Self::default() }
    }

    pub(super) fn of_stream(regular: &Recorded) -> Self {
        let mut splitter = EventSplitter::new(usize::MAX);
        splitter.push(regular.body.clone());
        let mut copies = Self::default();
        let mut first_id = None;
        while let Some(event) = splitter.next() {
            let event = event.unwrap();
            let text = String::from_utf8(event[single_data_line(&event).unwrap()].to_vec()).unwrap();
            if text == "[DONE]" {
                for copy in 0..regular.samples {
                    copies.events.push((copy, "data: [DONE]\n\n".into()));
                }
                copies.merged += "data: [DONE]\n\n";
                continue;
            }
            let mut chunk = members(&text);
            if regular.dialect != Dialect::Generate {
                let id = &mut chunk.iter_mut().find(|(name, _)| name == "id").unwrap().1;
                id.clone_from(first_id.get_or_insert_with(|| id.clone()));
            }
            copies.merged += &format!("data: {}\n\n", object(&chunk));
            copies.add(regular, chunk);
        }
        copies
    }

    fn add(&mut self, regular: &Recorded, mut chunk: Vec<(String, String)>) {
        if regular.dialect == Dialect::Generate {
            let copy = cut_index(&mut chunk, regular.samples, regular.is_single);
            return self.events.push((copy, format!("data: {}\n\n", object(&chunk))));
        }
        let value = |chunk: &[(String, String)], name: &str| {
            chunk.iter().find(|(other, _)| other == name).map(|(_, value)| value.clone())
        };
        let choices = elements(&value(&chunk, "choices").unwrap());
        let is_first = self.events.is_empty();
        let of_copy = |copy: usize, changed: &str, by: String| {
            let mut chunk = chunk.clone();
            for (name, value) in &mut chunk {
                match &**name {
                    // The first chunk's id and time are the merged stream's.
                    "id" if !is_first => *value = format!("\"copy-{copy}\""),
                    "created" if !is_first => *value = copy.to_string(),
                    name if name == changed => value.clone_from(&by),
                    _ => {}
                }
            }
            (copy, format!("data: {}\n\n", object(&chunk)))
        };
        if let [choice] = &choices[..] {
            let mut choice = members(choice);
            let copy = cut_index(&mut choice, regular.samples, false);
            self.events.push(of_copy(copy, "choices", format!("[{}]", object(&choice))));
            return;
        }
        assert!(choices.is_empty());
        let usage = value(&chunk, "usage").unwrap();
        for copy in 0..regular.samples {
            self.events.push(of_copy(copy, "usage", usage_of(&usage, copy, regular.samples)));
        }
    }
}
