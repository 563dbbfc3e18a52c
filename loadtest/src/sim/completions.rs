//! Choices of `/v1/completions`, complete and streamed. The envelope is in `openai`.

use super::{
    config::Role,
    json::{self, put},
    openai::{Envelope, close, finish, tops, usage},
    output::{Output, logprob},
    request::{Item, Request},
    text,
};

/// The four lists of a choice's `logprobs`, as the contents of JSON lists.
#[derive(Default)]
struct Lists {
    offsets: Vec<u8>,
    logprobs: Vec<u8>,
    tokens: Vec<u8>,
    tops: Vec<u8>,
}

impl Lists {
    fn push(
        &mut self,
        text: &str,
        micros: Option<text::Micros>,
        id: u32,
        tops: usize,
        rank: impl Fn(usize) -> u32,
    ) {
        for list in [&mut self.offsets, &mut self.logprobs, &mut self.tokens, &mut self.tops] {
            if !list.is_empty() {
                list.push(b',');
            }
        }
        self.offsets.extend_from_slice(b"-1");
        logprob(&mut self.logprobs, micros);
        json::string(&mut self.tokens, text);
        if micros.is_none() {
            return self.tops.extend_from_slice(b"null");
        }
        self.tops.push(b'{');
        for at in 0..tops {
            if at > 0 {
                self.tops.push(b',');
            }
            json::string(&mut self.tops, text::token_text(text::alternative(id, at)));
            self.tops.push(b':');
            logprob(&mut self.tops, Some(rank(at)));
        }
        self.tops.push(b'}');
    }

    fn push_prompt(&mut self, item: &Item) {
        for (position, (id, word)) in item.prompt.listing().into_iter().enumerate() {
            let rank = |rank| text::input_micros(item.prompt.hash, position, rank);
            self.push(&word, (position > 0).then(|| rank(0)), id, tops(item), rank);
        }
    }

    fn push_output(&mut self, item: &Item, hash: u64, index: usize) {
        let id = text::token_id(hash, index);
        let rank = |rank| text::output_micros(hash, index, rank);
        self.push(text::token_text(id), Some(rank(0)), id, tops(item), rank);
    }

    fn write(&self, out: &mut Vec<u8>, tops: bool) {
        for (key, list) in [
            ("{\"text_offset\":[", &self.offsets),
            ("],\"token_logprobs\":[", &self.logprobs),
            ("],\"tokens\":[", &self.tokens),
        ] {
            out.extend_from_slice(key.as_bytes());
            out.extend_from_slice(list);
        }
        out.extend_from_slice(b"],\"top_logprobs\":");
        if tops {
            out.push(b'[');
            out.extend_from_slice(&self.tops);
            out.extend_from_slice(b"]}");
        } else {
            out.extend_from_slice(b"null}");
        }
    }
}

/// Whether the prompt's log-probabilities are requested and this server has them.
fn lists_prompt(item: &Item, role: Role) -> bool {
    role != Role::Decode && item.logprobs.as_ref().is_some_and(|wanted| wanted.start.is_some())
}

fn choice(out: &mut Vec<u8>, index: usize, echo: Option<&str>, text_json: &[u8]) {
    put(out, format_args!("{{\"index\":{index},\"text\":\""));
    json::escape(out, echo.unwrap_or_default());
    out.extend_from_slice(text_json);
    out.extend_from_slice(b"\",\"logprobs\":");
}

/// The complete response. The samples of one prompt are adjacent.
pub(crate) fn whole(envelope: &Envelope<'_>, request: &Request, role: Role, outputs: &[Output]) -> Vec<u8> {
    let mut out = Vec::new();
    envelope.open(&mut out);
    for (index, output) in outputs.iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        let item = &request.items[index / request.n];
        let echo = request.echo.then(|| item.prompt.echo());
        choice(&mut out, index, echo.as_deref(), &output.text_json);
        logprobs(&mut out, item, role, output, 0..output.produced, true);
        out.push(b',');
        finish(&mut out, output.finish.as_ref());
    }
    close(&mut out, request, role, outputs);
    out
}

fn logprobs(
    out: &mut Vec<u8>,
    item: &Item,
    role: Role,
    output: &Output,
    tokens: std::ops::Range<usize>,
    first: bool,
) {
    if item.logprobs.is_none() {
        return out.extend_from_slice(b"null");
    }
    let mut lists = Lists::default();
    if first && lists_prompt(item, role) {
        lists.push_prompt(item);
    }
    tokens.for_each(|index| lists.push_output(item, output.hash, index));
    lists.write(out, tops(item) > 0);
}

/// The event of the tokens since the last event.
pub(crate) fn event(
    envelope: &Envelope<'_>,
    request: &Request,
    role: Role,
    index: usize,
    output: &Output,
    tokens: std::ops::Range<usize>,
) -> Vec<u8> {
    let item = &request.items[index / request.n];
    let first = tokens.start == 0;
    let echo = (first && request.echo).then(|| item.prompt.echo());
    let mut out = Vec::with_capacity(512);
    envelope.open(&mut out);
    choice(&mut out, index, echo.as_deref(), &output.text_json);
    logprobs(&mut out, item, role, output, tokens, first);
    out.push(b',');
    finish(&mut out, output.finish.as_ref());
    out.extend_from_slice(b"],");
    if request.continuous_usage {
        usage(&mut out, item.prompt.tokens, output.produced);
    } else {
        out.extend_from_slice(b"\"usage\":null");
    }
    out.push(b'}');
    out
}
