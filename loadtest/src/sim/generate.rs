//! Responses of `/generate`: one object per prompt, with the keys of `meta_info` in the recorded order. Which
//! keys there are depends on the role, and on whether the object is the first, a middle or the last one of a
//! stream.

use super::{
    config::Role,
    experts,
    json::{self, put, seconds},
    output::{Finish, Output, PromptLogprobs},
    request::{Item, Request, unix_time},
    transfer::Failure,
};

/// Which timestamps an object has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// The only object of its prompt.
    Whole,
    /// The first of several in a stream.
    First,
    Middle,
    /// The last of several in a stream.
    Last,
}

/// Timestamps of one item.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Times {
    pub arrived: f64,
    pub forwarded: f64,
    pub first_token: f64,
}

impl Times {
    pub(crate) fn now(request: &Request) -> Self {
        let now = unix_time();
        Self { arrived: request.arrived_at, forwarded: now, first_token: now }
    }
}

/// The inputs of one object.
pub(crate) struct Object<'a> {
    pub role: Role,
    pub item: &'a Item,
    /// The prompt's empty lists are left out.
    pub omits_lists: bool,
    pub prompt: &'a PromptLogprobs,
    pub times: Times,
    /// The item's index in a batch, which is the last key in a stream.
    pub index: Option<usize>,
}

impl Object<'_> {
    /// Appends the object for the output so far.
    pub(crate) fn write(&self, out: &mut Vec<u8>, output: &Output, part: Part) {
        out.reserve(output.text_json.len() + output.ids.len() + output.logprobs.len() + 1024);

        out.extend_from_slice(b"{\"text\":\"");
        out.extend_from_slice(&output.text_json);
        out.extend_from_slice(b"\",\"output_ids\":[");
        out.extend_from_slice(&output.ids);
        out.extend_from_slice(b"],\"meta_info\":{\"id\":");
        json::string(out, &self.item.rid);
        out.extend_from_slice(b",\"finish_reason\":");
        finish_reason(out, output.finish.as_ref());
        let failed = output.produced == 0 && matches!(output.finish, Some(Finish::Abort { .. }));
        self.write_start(out, failed);
        if self.item.logprobs.is_some() && !failed {
            self.write_logprobs(out, output);
        }
        self.write_counts(out, output, part);
        self.write_times(out, output, part);
        out.push(b'}');
        if let Some(index) = self.index {
            put(out, format_args!(",\"index\":{index}"));
        }
        out.push(b'}');
    }

    fn write_start(&self, out: &mut Vec<u8>, failed: bool) {
        put(out, format_args!(",\"prompt_tokens\":{}", self.item.prompt.tokens));
        out.extend_from_slice(b",\"weight_version\":\"default\",\"num_retractions\":0");
        if failed {
            out.extend_from_slice(b",\"queue_time\":0.0");
            return;
        }
        let computed = self.role != Role::Decode;
        if computed {
            out.extend_from_slice(b",\"storage_prefetch_wait\":0.0,\"storage_staging_wait\":0.0");
        }
        key_seconds(out, "forward_entry_time", self.times.forwarded);
        if computed {
            key_seconds(out, "prefill_finished_time", self.times.first_token);
        }
        key_seconds(out, "queue_time", self.times.forwarded - self.times.arrived);
    }

    fn write_logprobs(&self, out: &mut Vec<u8>, output: &Output) {
        let Some(wanted) = &self.item.logprobs else { return };
        list(out, "input_token_logprobs", &self.prompt.tokens);
        list(out, "output_token_logprobs", &output.logprobs);
        put(out, format_args!(",\"output_token_logprobs_length\":{}", output.produced));
        if wanted.top > 0 {
            self.input_list(out, "input_top_logprobs", &self.prompt.top);
            list(out, "output_top_logprobs", &output.top);
        }
        if wanted.ids.is_some() {
            self.input_list(out, "input_token_ids_logprobs", &self.prompt.listed);
            list(out, "output_token_ids_logprobs", &output.listed);
        }
    }

    fn input_list(&self, out: &mut Vec<u8>, key: &str, inside: &[u8]) {
        if !(self.omits_lists && inside.is_empty()) {
            list(out, key, inside);
        }
    }

    fn write_counts(&self, out: &mut Vec<u8>, output: &Output, part: Part) {
        let tokens = output.produced;
        let cached = self.item.dispatch.cached;
        put(
            out,
            format_args!(",\"reasoning_tokens\":0,\"completion_tokens\":{tokens},\"cached_tokens\":{cached}"),
        );
        if matches!(part, Part::Whole | Part::Last) {
            put(
                out,
                format_args!(
                    ",\"weight_versions\":[{{\"version\":\"default\",\"start\":0,\"end\":{tokens}}}]"
                ),
            );
        }
        out.extend_from_slice(b",\"cached_tokens_details\":null,\"dp_rank\":");
        match self.item.dispatch.rank {
            Some(rank) => put(out, format_args!("{rank}")),
            None => out.extend_from_slice(b"null"),
        }
        if matches!(part, Part::Whole | Part::Last)
            && tokens > 0
            && let Some(rows) = experts::rows(self.item, self.role, output)
        {
            put(out, format_args!(",\"routed_experts\":\"{rows}\""));
        }
    }

    fn write_times(&self, out: &mut Vec<u8>, output: &Output, part: Part) {
        let (now, times) = (unix_time(), self.times);
        match part {
            Part::First => return key_seconds(out, "response_sent_to_client_ts", now),
            Part::Middle => return,
            Part::Whole | Part::Last => {}
        }
        key_seconds(out, "e2e_latency", now - times.arrived);
        key_seconds(out, "request_received_ts", times.arrived);
        key_seconds(out, "first_token_latency", times.first_token - times.arrived);
        key_seconds(out, "api_server_dispatch_finish_ts", times.arrived);
        let rate = output.produced as f64 / (now - times.first_token).max(1e-6);
        if part == Part::Last {
            key_seconds(out, "response_sent_to_client_ts", times.first_token);
            key_seconds(out, "request_finished_ts", now);
            key_seconds(out, "decode_throughput", rate);
        } else {
            key_seconds(out, "request_finished_ts", now);
            if self.role == Role::Regular && output.produced > 1 {
                key_seconds(out, "decode_throughput", rate);
            }
            key_seconds(out, "response_sent_to_client_ts", now);
        }
    }
}

/// The object for a failed generation in a stream.
pub(crate) fn failed(object: &Object<'_>, failure: &Failure) -> Vec<u8> {
    let mut output = Output::new(0);
    output.finish = Some(Finish::Abort { message: failure.message.clone(), status: Some(failure.status) });
    let mut out = Vec::new();
    object.write(&mut out, &output, Part::Whole);
    out
}

/// The event for a request with invalid values in a stream.
pub(crate) fn error_event(message: &str) -> Vec<u8> {
    let mut out = b"{\"error\":{\"message\":".to_vec();
    json::string(&mut out, message);
    out.extend_from_slice(b",\"type\":\"invalid_request_error\",\"code\":400,\"retryable\":false}}");
    out
}

fn key_seconds(out: &mut Vec<u8>, key: &str, value: f64) {
    put(out, format_args!(",\"{key}\":"));
    seconds(out, value);
}

fn list(out: &mut Vec<u8>, key: &str, inside: &[u8]) {
    put(out, format_args!(",\"{key}\":["));
    out.extend_from_slice(inside);
    out.push(b']');
}

fn finish_reason(out: &mut Vec<u8>, finish: Option<&Finish>) {
    match finish {
        None => out.extend_from_slice(b"null"),
        Some(Finish::Length(length)) => put(out, format_args!("{{\"type\":\"length\",\"length\":{length}}}")),
        Some(Finish::Stop(matched)) => {
            out.extend_from_slice(b"{\"type\":\"stop\",\"matched\":");
            json::string(out, matched);
            out.push(b'}');
        }
        Some(Finish::Abort { message, status }) => {
            out.extend_from_slice(b"{\"type\":\"abort\",\"message\":");
            json::string(out, message);
            out.extend_from_slice(b",\"status_code\":");
            match status {
                Some(status) => put(out, format_args!("{status}")),
                None => out.extend_from_slice(b"null"),
            }
            out.extend_from_slice(b",\"err_type\":null}");
        }
    }
}
