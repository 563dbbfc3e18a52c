//! Responses of `/v1/messages`, Anthropic's API, complete and streamed. Events have names, and the stream
//! ends with `message_stop` instead of `[DONE]`. Errors of requests that are not streamed are in `errors`.

use bytes::Bytes;

use super::{
    config::Role,
    generation::Run,
    json::{self, put},
    output::{Finish, Output},
    request::{Request, Tool, new_id},
    response::named_event,
};

/// A tool call is made where the request forces one; prefill has no more than the first token of it.
fn tool(request: &Request, role: Role) -> Option<&Tool> {
    request.tool.as_ref().filter(|_| role != Role::Prefill)
}

fn stop_reason(output: &Output, tool: bool) -> &'static str {
    match output.finish {
        _ if tool => "tool_use",
        Some(Finish::Length(_)) => "max_tokens",
        _ => "end_turn",
    }
}

/// Appends a `tool_use` block with the given input.
fn tool_use(out: &mut Vec<u8>, id: &str, tool: &Tool, input: &str) {
    put(out, format_args!("{{\"type\":\"tool_use\",\"id\":\"call_{}\",\"name\":", &id[..24]));
    json::string(out, &tool.name);
    put(out, format_args!(",\"input\":{input}}}"));
}

/// Appends `{"id":…,"type":"message","role":"assistant","content":[`.
fn open(out: &mut Vec<u8>, id: &str) {
    put(out, format_args!("{{\"id\":\"msg_{id}\",\"type\":\"message\",\"role\":\"assistant\",\"content\":["));
}

fn model_after_content(out: &mut Vec<u8>, model: &str) {
    out.extend_from_slice(b"],\"model\":");
    json::string(out, model);
}

fn usage(out: &mut Vec<u8>, input: usize, output: usize) {
    put(out, format_args!(",\"usage\":{{\"input_tokens\":{input},\"output_tokens\":{output}}}}}"));
}

/// The complete response.
pub(crate) fn whole(run: &Run, output: &Output) -> Vec<u8> {
    let (request, mut out) = (&run.request, Vec::new());
    let tool = tool(request, run.role());
    open(&mut out, &run.id);
    match tool {
        Some(tool) => tool_use(&mut out, &run.id, tool, &tool.arguments),
        None => {
            out.extend_from_slice(b"{\"type\":\"text\",\"text\":");
            json::string(&mut out, &output.text);
            out.push(b'}');
        }
    }
    model_after_content(&mut out, &request.model);
    put(&mut out, format_args!(",\"stop_reason\":\"{}\"", stop_reason(output, tool.is_some())));
    usage(&mut out, request.items[0].prompt.tokens, output.produced);
    out
}

fn message_start(id: &str, model: &str, input: usize) -> Bytes {
    let mut out = b"{\"type\":\"message_start\",\"message\":".to_vec();
    open(&mut out, id);
    model_after_content(&mut out, model);
    usage(&mut out, input, 0);
    out.push(b'}');
    named_event("message_start", &out)
}

fn message_stop() -> Bytes {
    named_event("message_stop", b"{\"type\":\"message_stop\"}")
}

/// The whole stream of a request that fails before its first token.
pub(crate) fn failed_stream(model: &str, status: u16, message: &str) -> [Bytes; 3] {
    let (kind, message) = match status {
        400 => ("invalid_request_error", message),
        _ => ("api_error", "Internal server error"),
    };
    let mut out = format!("{{\"type\":\"error\",\"error\":{{\"type\":\"{kind}\",\"message\":").into_bytes();
    json::string(&mut out, message);
    out.extend_from_slice(b"}}");
    [message_start(&new_id(), model, 0), named_event("error", &out), message_stop()]
}

/// The state of a stream: which of its frames have been written.
#[derive(Debug, Default)]
pub(crate) struct Stream {
    started: bool,
    block: bool,
}

impl Stream {
    /// The events for the output since the last step.
    pub(crate) fn step(&mut self, run: &Run, output: &Output) -> Vec<Bytes> {
        let (request, mut events) = (&run.request, Vec::new());
        if !std::mem::replace(&mut self.started, true) {
            events.push(message_start(&run.id, &request.model, request.items[0].prompt.tokens));
        }
        let tool = tool(request, run.role());
        match tool {
            Some(tool) if output.finish.is_some() => {
                let mut block = Vec::new();
                tool_use(&mut block, &run.id, tool, "{}");
                self.open_block(&mut events, &block);
                let mut delta = b"{\"type\":\"input_json_delta\",\"partial_json\":".to_vec();
                json::string(&mut delta, &tool.arguments);
                events.push(block_delta(&delta));
            }
            None if !output.text_json.is_empty() => {
                self.open_block(&mut events, b"{\"type\":\"text\",\"text\":\"\"}");
                let text = [b"{\"type\":\"text_delta\",\"text\":\"", &output.text_json[..], b"\""].concat();
                events.push(block_delta(&text));
            }
            _ => {}
        }
        if output.finish.is_some() {
            self.end(&mut events, output, tool.is_some());
        }
        events
    }

    fn open_block(&mut self, events: &mut Vec<Bytes>, block: &[u8]) {
        if !std::mem::replace(&mut self.block, true) {
            let start = b"{\"type\":\"content_block_start\",\"index\":0,\"content_block\":";
            events.push(named_event("content_block_start", &[start, block, b"}"].concat()));
        }
    }

    fn end(&self, events: &mut Vec<Bytes>, output: &Output, tool: bool) {
        if self.block {
            let stop = b"{\"type\":\"content_block_stop\",\"index\":0}";
            events.push(named_event("content_block_stop", stop));
        }
        let delta = format!(
            "{{\"type\":\"message_delta\",\"delta\":{{\"stop_reason\":\"{}\"}},\"usage\":{{\"output_tokens\":{}}}}}",
            stop_reason(output, tool),
            output.produced
        );
        events.push(named_event("message_delta", delta.as_bytes()));
        events.push(message_stop());
    }
}

/// The event of a delta, which is given without its closing brace.
fn block_delta(delta: &[u8]) -> Bytes {
    let start = b"{\"type\":\"content_block_delta\",\"index\":0,\"delta\":";
    named_event("content_block_delta", &[start, delta, b"}}"].concat())
}
