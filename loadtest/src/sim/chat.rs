//! Choices of `/v1/chat/completions`, complete and streamed. The envelope is in `openai`.

use super::{
    config::Role,
    json::{self, put},
    openai::{Envelope, close, finish, tops, usage},
    output::{Finish, Output, Token, logprob},
    request::{Item, Request, Tool},
    text,
};

/// The complete response.
pub(crate) fn whole(envelope: &Envelope<'_>, request: &Request, role: Role, outputs: &[Output]) -> Vec<u8> {
    let mut out = Vec::new();
    envelope.open(&mut out);
    for (index, output) in outputs.iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        put(&mut out, format_args!("{{\"index\":{index},\"message\":{{\"role\":\"assistant\",\"content\":"));
        let tool = request.tool.as_ref().filter(|_| role != Role::Prefill);
        match tool {
            None => {
                json::string(&mut out, &output.text);
                out.extend_from_slice(b",\"reasoning_content\":null},\"logprobs\":");
                let item = &request.items[0];
                whole_logprobs(&mut out, item, output);
                out.push(b',');
                finish(&mut out, output.finish.as_ref());
            }
            Some(tool) => {
                out.extend_from_slice(b"null,\"reasoning_content\":null,\"tool_calls\":[");
                call(&mut out, envelope.id, tool, &tool.arguments);
                out.extend_from_slice(
                    b"]},\"logprobs\":null,\"finish_reason\":\"tool_calls\",\"matched_stop\":null}",
                );
            }
        }
    }
    close(&mut out, request, role, outputs);
    out
}

fn call(out: &mut Vec<u8>, id: &str, tool: &Tool, arguments: &str) {
    put(
        out,
        format_args!(
            "{{\"id\":\"call_{}\",\"index\":0,\"type\":\"function\",\"function\":{{\"name\":",
            &id[..24]
        ),
    );
    json::string(out, &tool.name);
    out.extend_from_slice(b",\"arguments\":");
    json::string(out, arguments);
    out.extend_from_slice(b"}}");
}

fn whole_logprobs(out: &mut Vec<u8>, item: &Item, output: &Output) {
    if item.logprobs.is_none() {
        return out.extend_from_slice(b"null");
    }
    out.extend_from_slice(b"{\"content\":");
    token_logprobs(out, item, output);
    out.push(b'}');
}

/// Appends the list of every token's log-probabilities.
pub(crate) fn token_logprobs(out: &mut Vec<u8>, item: &Item, output: &Output) {
    out.push(b'[');
    for index in 0..output.produced {
        if index > 0 {
            out.push(b',');
        }
        let id = text::token_id(output.hash, index);
        token_logprob(out, output.hash, Token { id, text: text::token_text(id), index }, tops(item));
    }
    out.push(b']');
}

fn token_logprob(out: &mut Vec<u8>, hash: u64, token: Token, tops: usize) {
    named(out, token.text, text::output_micros(hash, token.index, 0));
    out.extend_from_slice(b",\"top_logprobs\":[");
    for rank in 0..tops {
        if rank > 0 {
            out.push(b',');
        }
        let other = text::token_text(text::alternative(token.id, rank));
        named(out, other, text::output_micros(hash, token.index, rank));
        out.push(b'}');
    }
    out.extend_from_slice(b"]}");
}

/// Appends `{"token":…,"bytes":[…],"logprob":…` without the closing brace.
fn named(out: &mut Vec<u8>, token: &str, micros: text::Micros) {
    out.extend_from_slice(b"{\"token\":");
    json::string(out, token);
    out.extend_from_slice(b",\"bytes\":[");
    for (at, byte) in token.bytes().enumerate() {
        if at > 0 {
            out.push(b',');
        }
        put(out, format_args!("{byte}"));
    }
    out.extend_from_slice(b"],\"logprob\":");
    logprob(out, Some(micros));
}

fn delta_start(envelope: &Envelope<'_>, index: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(512);
    envelope.open(&mut out);
    put(&mut out, format_args!("{{\"index\":{index},\"delta\":{{\"reasoning_content\":null"));
    out
}

/// The event with the role, before any token.
pub(crate) fn role_event(envelope: &Envelope<'_>, index: usize) -> Vec<u8> {
    let mut out = delta_start(envelope, index);
    out.extend_from_slice(b",\"role\":\"assistant\",\"content\":\"\"},\"logprobs\":null,");
    finish(&mut out, None);
    out.extend_from_slice(b"]}");
    out
}

/// The event of one token, which is the last in `output`.
pub(crate) fn token_event(
    envelope: &Envelope<'_>,
    request: &Request,
    item: &Item,
    index: usize,
    output: &Output,
    token: Token,
) -> Vec<u8> {
    let mut out = delta_start(envelope, index);
    out.extend_from_slice(b",\"content\":\"");
    out.extend_from_slice(&output.text_json);
    out.extend_from_slice(b"\"},\"logprobs\":");
    if item.logprobs.is_some() {
        out.extend_from_slice(b"{\"content\":[");
        token_logprob(&mut out, output.hash, token, tops(item));
        out.extend_from_slice(b"]}");
    } else {
        out.extend_from_slice(b"null");
    }
    out.push(b',');
    finish(&mut out, None);
    out.push(b']');
    if request.continuous_usage {
        out.push(b',');
        usage(&mut out, item.prompt.tokens, output.produced);
    }
    out.push(b'}');
    out
}

/// The events of a tool call: its name first, then its arguments.
pub(crate) fn tool_events(envelope: &Envelope<'_>, index: usize, tool: &Tool) -> [Vec<u8>; 2] {
    let mut head = delta_start(envelope, index);
    head.extend_from_slice(b",\"tool_calls\":[");
    call(&mut head, envelope.id, tool, "");
    let mut rest = delta_start(envelope, index);
    rest.extend_from_slice(
        b",\"tool_calls\":[{\"id\":null,\"index\":0,\"type\":\"function\",\"function\":{\"name\":null,\"arguments\":",
    );
    json::string(&mut rest, &tool.arguments);
    rest.extend_from_slice(b"}}");
    [head, rest].map(|mut out| {
        out.extend_from_slice(b"]},\"logprobs\":null,");
        finish(&mut out, None);
        out.extend_from_slice(b"]}");
        out
    })
}

/// The last event of a choice.
pub(crate) fn finish_event(
    envelope: &Envelope<'_>,
    index: usize,
    reason: Option<&Finish>,
    tool: bool,
) -> Vec<u8> {
    let mut out = delta_start(envelope, index);
    out.extend_from_slice(b"},\"logprobs\":null,");
    if tool {
        out.extend_from_slice(b"\"finish_reason\":\"tool_calls\",\"matched_stop\":null}");
    } else {
        finish(&mut out, reason);
    }
    out.extend_from_slice(b"]}");
    out
}
