//! Requests of the generator, and what a correct response to each contains.

use std::net::SocketAddr;

use bytes::Bytes;

/// Kinds of requests that differ in what they cost a router.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// `/v1/chat/completions`, one JSON response.
    Chat,
    /// `/v1/chat/completions`, a stream.
    ChatStream,
    /// `/generate` with prompt logprobs, one JSON response.
    Logprobs,
    /// `/generate` with prompt logprobs, a stream.
    LogprobStream,
}

/// A request, composed once, and what its response must contain.
#[derive(Clone, Debug)]
pub struct Request {
    /// Head and body.
    pub(super) bytes: Bytes,
    pub(super) kind: RequestKind,
    /// Number of tokens in a complete stream.
    pub(super) tokens: u32,
    /// Disconnect after this many tokens, as a user does who cancels a generation.
    pub(super) cancel_after: Option<u32>,
}

impl Request {
    /// A request with a body of about `body` bytes (at least 300) to a server that responds with `tokens`
    /// tokens.
    pub fn new(target: SocketAddr, kind: RequestKind, body: usize, tokens: u32) -> Self {
        let path = if kind.has_logprobs() { "/generate" } else { "/v1/chat/completions" };
        let body = kind.body(body, tokens);
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: {target}\r\nuser-agent: loadtest\r\naccept: */*\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        Self { bytes: Bytes::from(head + &body), kind, tokens, cancel_after: None }
    }

    /// The same request from a client that disconnects after `tokens` tokens of the stream.
    pub fn cancelled_after(self, tokens: u32) -> Self {
        Self { cancel_after: Some(tokens), ..self }
    }
}

impl RequestKind {
    pub(super) fn is_stream(self) -> bool {
        matches!(self, Self::ChatStream | Self::LogprobStream)
    }

    pub(super) fn has_logprobs(self) -> bool {
        matches!(self, Self::Logprobs | Self::LogprobStream)
    }

    /// What a response that is no stream must contain.
    pub(super) fn expected_text(self) -> &'static str {
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

/// Mixtures of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mix;

impl Mix {
    /// For soak tests. Of ten requests, six have a small response, three are streams, and one is a stream
    /// whose client disconnects.
    pub fn soak(target: SocketAddr, tokens: u32) -> Vec<Request> {
        let small = Request::new(target, RequestKind::Chat, 300, tokens);
        let stream = Request::new(target, RequestKind::ChatStream, 300, tokens);
        let left = stream.clone().cancelled_after(tokens / 4);
        [&small, &stream, &small, &small, &stream, &small, &left, &small, &stream, &small]
            .into_iter()
            .cloned()
            .collect()
    }
}
