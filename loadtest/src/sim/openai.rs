//! What chat and completions share: envelope, usage, finish reasons, top log-probabilities. Choices are in
//! `chat` and `completions`.

use super::{
    config::Role,
    experts,
    json::{self, put},
    output::{Finish, Output},
    request::{Item, Request},
};

/// Fields that all objects of one response share.
pub(crate) struct Envelope<'a> {
    pub id: &'a str,
    pub object: &'a str,
    pub created: u64,
    pub model: &'a str,
}

impl Envelope<'_> {
    /// Appends `{"id":…,"choices":[`.
    pub(crate) fn open(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(b"{\"id\":");
        json::string(out, self.id);
        out.extend_from_slice(b",\"object\":");
        json::string(out, self.object);
        put(out, format_args!(",\"created\":{},\"model\":", self.created));
        json::string(out, self.model);
        out.extend_from_slice(b",\"choices\":[");
    }

    /// The event with the routed experts of a stream.
    pub(crate) fn experts_event(&self, rows: &str) -> Vec<u8> {
        let mut out = Vec::new();
        self.open(&mut out);
        put(&mut out, format_args!("],\"usage\":null,\"sglext\":{{\"routed_experts\":\"{rows}\"}}}}"));
        out
    }

    /// The event with the usage of a stream and without choices.
    pub(crate) fn usage_event(&self, prompt: usize, completion: usize) -> Vec<u8> {
        let mut out = Vec::new();
        self.open(&mut out);
        out.extend_from_slice(b"],");
        usage(&mut out, prompt, completion);
        out.push(b'}');
        out
    }
}

/// Appends the end of a complete response, from the closing bracket of its choices on.
pub(crate) fn close(out: &mut Vec<u8>, request: &Request, role: Role, outputs: &[Output]) {
    let prompt: usize = request.items.iter().map(|item| item.prompt.tokens).sum();
    let completion: usize = outputs.iter().map(|output| output.produced).sum();
    let last = outputs.last().map_or(0, |output| output.produced);
    out.extend_from_slice(b"],");
    usage(out, prompt, completion);
    put(
        out,
        format_args!(
            ",\"metadata\":{{\"weight_version\":\"default\",\"weight_versions\":[{{\"version\":\"default\",\
             \"start\":0,\"end\":{last}}}]}}"
        ),
    );
    if let (Some(item), Some(output)) = (request.items.first(), outputs.first())
        && let Some(rows) = experts::rows(item, role, output)
    {
        put(out, format_args!(",\"sglext\":{{\"routed_experts\":\"{rows}\"}}"));
    }
    out.push(b'}');
}

pub(crate) fn usage(out: &mut Vec<u8>, prompt: usize, completion: usize) {
    put(
        out,
        format_args!(
            "\"usage\":{{\"prompt_tokens\":{prompt},\"total_tokens\":{},\"completion_tokens\":{completion},\
             \"prompt_tokens_details\":null,\"reasoning_tokens\":0,\"completion_tokens_details\":null}}",
            prompt + completion
        ),
    );
}

/// Appends `"finish_reason":…,"matched_stop":…}`, the end of every choice.
pub(crate) fn finish(out: &mut Vec<u8>, reason: Option<&Finish>) {
    let (name, matched) = match reason {
        None => (None, None),
        Some(Finish::Length(_)) => (Some("length"), None),
        Some(Finish::Stop(stop)) => (Some("stop"), Some(stop.as_str())),
        Some(Finish::Abort { .. }) => (Some("abort"), None),
    };
    out.extend_from_slice(b"\"finish_reason\":");
    json::optional(out, name);
    out.extend_from_slice(b",\"matched_stop\":");
    json::optional(out, matched);
    out.push(b'}');
}

/// Number of alternatives that are listed per token.
pub(crate) fn tops(item: &Item) -> usize {
    item.logprobs.as_ref().map_or(0, |wanted| wanted.top)
}
