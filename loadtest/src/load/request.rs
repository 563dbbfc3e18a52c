//! What is sent, and what a right answer has.

use std::net::SocketAddr;

use bytes::Bytes;

/// The four shapes of requests that cost a router differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `/v1/chat/completions`, one JSON answer.
    Chat,
    /// `/v1/chat/completions`, a stream.
    ChatStream,
    /// `/generate` with prompt logprobs, one JSON answer.
    Logprobs,
    /// `/generate` with prompt logprobs, a stream.
    LogprobStream,
}

/// A request, composed once, and what its answer must have.
#[derive(Clone, Debug)]
pub struct Request {
    /// Head and body.
    pub(super) bytes: Bytes,
    pub(super) kind: Kind,
    /// Tokens of a stream that are a complete answer.
    pub(super) tokens: u32,
    /// Leave when this many tokens have come, as a user does who has seen enough.
    pub(super) leave_after: Option<u32>,
}

impl Request {
    /// A request with a body of about `body` bytes (300 is the least) for a server that answers `tokens` tokens.
    pub fn new(target: SocketAddr, kind: Kind, body: usize, tokens: u32) -> Self {
        let path = if kind.has_logprobs() { "/generate" } else { "/v1/chat/completions" };
        let body = kind.body(body, tokens);
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: {target}\r\nuser-agent: loadtest\r\naccept: */*\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        Self { bytes: Bytes::from(head + &body), kind, tokens, leave_after: None }
    }

    /// The same, from a client that closes its connection after `tokens` tokens of a stream.
    pub fn leaving_after(self, tokens: u32) -> Self {
        Self { leave_after: Some(tokens), ..self }
    }
}

impl Kind {
    pub(super) fn is_stream(self) -> bool {
        matches!(self, Self::ChatStream | Self::LogprobStream)
    }

    pub(super) fn has_logprobs(self) -> bool {
        matches!(self, Self::Logprobs | Self::LogprobStream)
    }

    /// What an answer without a stream must contain.
    pub(super) fn needle(self) -> &'static str {
        if self.has_logprobs() { "\"output_token_logprobs\":" } else { "\"finish_reason\":\"length\"" }
    }

    fn body(self, size: usize, tokens: u32) -> String {
        let (before, after) = if self.has_logprobs() {
            let stream = self.is_stream();
            (
                r#"{"text":""#.to_owned(),
                format!(
                    r#"","sampling_params":{{"temperature":0,"max_new_tokens":{tokens}}},"return_logprob":true,"logprob_start_len":0,"stream":{stream}}}"#
                ),
            )
        } else {
            let stream = if self.is_stream() { r#","stream":true"# } else { "" };
            (
                r#"{"model":"tiny","messages":[{"role":"system","content":"You are a helpful assistant."},{"role":"user","content":""#
                    .to_owned(),
                format!(r#""}}],"max_tokens":{tokens},"temperature":0.7,"top_p":0.95{stream}}}"#),
            )
        };
        let text = "All work and no play makes a dull prompt. ";
        let length = size.saturating_sub(before.len() + after.len());
        let prompt: String = text.chars().cycle().take(length).collect();
        before + &prompt + &after
    }
}

/// Requests of several kinds in turn, as a day brings them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mix;

impl Mix {
    /// Of ten: six small answers, three streams, and one stream whose client leaves.
    pub fn day(target: SocketAddr, tokens: u32) -> Vec<Request> {
        let small = Request::new(target, Kind::Chat, 300, tokens);
        let stream = Request::new(target, Kind::ChatStream, 300, tokens);
        let left = stream.clone().leaving_after(tokens / 4);
        [&small, &stream, &small, &small, &stream, &small, &left, &small, &stream, &small]
            .into_iter()
            .cloned()
            .collect()
    }
}
