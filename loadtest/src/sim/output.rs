//! The tokens of one output, stored as the JSON fragments that frames are composed from: frames of
//! `/generate` are cumulative, so each token is written once and copied often. Pacing is done elsewhere.

use super::{
    config::Role,
    json::{self, put},
    request::{Item, Logprobs},
    text::{self, Micros},
};

/// Finish reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Finish {
    Length(usize),
    Stop(String),
    Abort { message: String, status: Option<u16> },
}

/// One token with its text.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Token {
    pub id: u32,
    pub text: &'static str,
    pub index: usize,
}

/// An output so far. The byte fields are contents of JSON strings and lists.
#[derive(Clone, Debug, Default)]
pub(crate) struct Output {
    pub hash: u64,
    pub produced: usize,
    pub text: String,
    /// Start of the JSON fragments in `text`; not 0 only after a `cut`.
    pub sent: usize,
    pub text_json: Vec<u8>,
    pub ids: Vec<u8>,
    pub logprobs: Vec<u8>,
    pub top: Vec<u8>,
    pub listed: Vec<u8>,
    pub finish: Option<Finish>,
}

impl Output {
    pub(crate) fn new(hash: u64) -> Self {
        Self { hash, ..Self::default() }
    }

    /// Produces the next token; sets `finish` if it is the last.
    pub(crate) fn push(&mut self, item: &Item, role: Role) -> Token {
        let index = self.produced;
        let id = text::token_id(self.hash, index);
        let token = Token { id, text: text::token_text(id), index };
        self.produced += 1;
        self.text.push_str(token.text);
        json::escape(&mut self.text_json, token.text);
        comma(&mut self.ids);
        put(&mut self.ids, format_args!("{id}"));
        if let Some(wanted) = &item.logprobs {
            self.push_logprobs(token, wanted, role);
        }
        if role == Role::Prefill {
            self.finish = Some(Finish::Length(0));
        } else if let Some((at, stop)) = first_stop(&self.text, token.text.len(), &item.sampling.stop) {
            self.text.truncate(at);
            self.text_json.clear();
            json::escape(&mut self.text_json, &self.text[self.sent.min(at)..]);
            self.finish = Some(Finish::Stop(stop.to_owned()));
        } else if self.produced >= item.sampling.max_new {
            self.finish = Some(Finish::Length(item.sampling.max_new));
        }
        token
    }

    fn push_logprobs(&mut self, token: Token, wanted: &Logprobs, role: Role) {
        let micros = |rank| text::output_micros(self.hash, token.index, rank);
        comma(&mut self.logprobs);
        entry(&mut self.logprobs, Some(micros(0)), token.id, wanted.text.then_some(token.text));
        if wanted.top > 0 {
            comma(&mut self.top);
            ranks(&mut self.top, token.id, wanted, micros);
        }
        if let Some(ids) = &wanted.ids {
            comma(&mut self.listed);
            // The first token's log-probabilities come from prefill, and are lost in the transfer.
            if role == Role::Decode && token.index == 0 {
                self.listed.extend_from_slice(b"null");
            } else {
                listed(&mut self.listed, ids, wanted, |rank| micros(rank + 1));
            }
        }
    }

    /// Drops what has been sent: the next frame starts after it.
    pub(crate) fn cut(&mut self) {
        self.sent = self.text.len();
        for part in [&mut self.text_json, &mut self.ids, &mut self.logprobs, &mut self.top, &mut self.listed]
        {
            part.clear();
        }
    }
}

/// The earliest stop string that the last token completes.
fn first_stop<'a>(text: &str, last: usize, stops: &'a [String]) -> Option<(usize, &'a str)> {
    let find = |stop: &'a String| {
        let mut from = text.len().saturating_sub(last + stop.len());
        while !text.is_char_boundary(from) {
            from -= 1;
        }
        text[from..].find(stop.as_str()).map(|at| (from + at, stop.as_str()))
    };
    stops.iter().filter(|stop| !stop.is_empty()).filter_map(find).min_by_key(|(at, _)| *at)
}

fn comma(list: &mut Vec<u8>) {
    if !list.is_empty() {
        list.push(b',');
    }
}

pub(crate) fn logprob(out: &mut Vec<u8>, micros: Option<Micros>) {
    match micros {
        Some(micros) => put(out, format_args!("-{}.{:06}", micros / 1_000_000, micros % 1_000_000)),
        None => out.extend_from_slice(b"null"),
    }
}

/// `[logprob, id, text]`.
fn entry(out: &mut Vec<u8>, micros: Option<Micros>, id: u32, text: Option<&str>) {
    out.push(b'[');
    logprob(out, micros);
    put(out, format_args!(",{id},"));
    json::optional(out, text);
    out.push(b']');
}

fn ranks(out: &mut Vec<u8>, id: u32, wanted: &Logprobs, micros: impl Fn(usize) -> Micros) {
    out.push(b'[');
    for rank in 0..wanted.top {
        let id = text::alternative(id, rank);
        if rank > 0 {
            out.push(b',');
        }
        entry(out, Some(micros(rank)), id, wanted.text.then_some(text::token_text(id)));
    }
    out.push(b']');
}

fn listed(out: &mut Vec<u8>, ids: &[u32], wanted: &Logprobs, micros: impl Fn(usize) -> Micros) {
    out.push(b'[');
    for (at, &id) in ids.iter().enumerate() {
        if at > 0 {
            out.push(b',');
        }
        entry(out, Some(micros(at)), id, wanted.text.then_some(text::token_text(id)));
    }
    out.push(b']');
}

/// The prompt's log-probabilities; each field is the contents of a list.
#[derive(Debug, Default)]
pub(crate) struct PromptLogprobs {
    pub tokens: Vec<u8>,
    pub top: Vec<u8>,
    pub listed: Vec<u8>,
}

/// Writes the prompt's log-probabilities, which only a server that computed the prompt has.
pub(crate) fn prompt_logprobs(item: &Item, role: Role) -> PromptLogprobs {
    let mut out = PromptLogprobs::default();
    let Some(wanted) = item.logprobs.as_ref().filter(|_| role != Role::Decode) else { return out };
    let Some(start) = wanted.start else { return out };
    for (position, (id, word)) in item.prompt.listing().into_iter().enumerate().skip(start) {
        let first = position == start;
        let micros = |rank| text::input_micros(item.prompt.hash, position, rank);
        comma(&mut out.tokens);
        entry(&mut out.tokens, (!first).then(|| micros(0)), id, wanted.text.then_some(word.as_str()));
        comma(&mut out.top);
        comma(&mut out.listed);
        if first {
            out.top.extend_from_slice(b"null");
            out.listed.extend_from_slice(b"null");
            continue;
        }
        ranks(&mut out.top, id, wanted, micros);
        listed(&mut out.listed, wanted.ids.as_deref().unwrap_or_default(), wanted, |rank| micros(rank + 1));
    }
    out
}
