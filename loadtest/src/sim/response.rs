//! Responses and their bodies: uvicorn's headers, a body of known length or a stream of events, and SGLang's
//! error shapes. Which response a request gets is decided elsewhere.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::{Response, StatusCode, header};
use tokio::sync::mpsc;

use super::{json, request::Endpoint};

pub(crate) const JSON: &str = "application/json";
const EVENTS: &str = "text/event-stream; charset=utf-8";
/// The last event of the streams whose events have no names.
pub(crate) const DONE: &[u8] = b"data: [DONE]\n\n";

/// Items that a generation sends to its connection.
pub(crate) enum StreamItem {
    /// One event of a stream.
    Frame(Bytes),
    /// The stream is complete.
    End,
    /// No stream, but this complete response.
    Whole(SimResponse),
}

/// A body of known length, or the events of a generation.
pub(crate) enum ResponseBody {
    Full(Bytes),
    Stream { first: Option<Bytes>, rest: mpsc::Receiver<StreamItem> },
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        match self.get_mut() {
            Self::Full(bytes) if bytes.is_empty() => Poll::Ready(None),
            Self::Full(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            Self::Stream { first, rest } => {
                if let Some(frame) = first.take() {
                    return Poll::Ready(Some(Ok(Frame::data(frame))));
                }
                rest.poll_recv(cx).map(|out| match out {
                    Some(StreamItem::Frame(frame)) => Some(Ok(Frame::data(frame))),
                    Some(StreamItem::End) => None,
                    // A truncated stream must not look complete: the last chunk is not sent.
                    Some(StreamItem::Whole(_)) | None => {
                        Some(Err(io::Error::other("the generation is gone")))
                    }
                })
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Full(bytes) if bytes.is_empty())
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Self::Stream { .. } => SizeHint::default(),
        }
    }
}

/// A complete response.
#[derive(Debug)]
pub(crate) struct SimResponse {
    pub status: u16,
    pub content_type: Option<&'static str>,
    pub allow: Option<&'static str>,
    pub body: Bytes,
}

impl SimResponse {
    pub(crate) fn json(body: impl Into<Bytes>) -> Self {
        Self { status: 200, content_type: Some(JSON), allow: None, body: body.into() }
    }

    /// A body without a content type, as FastAPI's bare `Response` has it.
    pub(crate) fn bare(status: u16, body: impl Into<Bytes>) -> Self {
        Self { status, content_type: None, allow: None, body: body.into() }
    }

    pub(crate) fn with_status(mut self, status: u16) -> Self {
        self.status = status;
        self
    }

    /// `{"detail": …}` of the web framework.
    pub(crate) fn detail(status: u16, text: &str) -> Self {
        let mut body = b"{\"detail\":".to_vec();
        json::string(&mut body, text);
        body.push(b'}');
        Self::json(body).with_status(status)
    }

    /// `{"error":{"message": …}}` of `/generate` for invalid values.
    pub(crate) fn value_error(message: &str) -> Self {
        let mut body = b"{\"error\":{\"message\":".to_vec();
        json::string(&mut body, message);
        body.extend_from_slice(b"}}");
        Self::json(body).with_status(400)
    }

    /// `{"error": …}` for unknown fields.
    pub(crate) fn field_error(message: &str) -> Self {
        let mut body = b"{\"error\":".to_vec();
        json::string(&mut body, message);
        body.push(b'}');
        Self::json(body).with_status(400)
    }

    /// `{"object":"error", …}` of the OpenAI endpoints, of validation and of failures with a status.
    pub(crate) fn object_error(status: u16, kind: &str, message: &str) -> Self {
        let mut body = b"{\"object\":\"error\",\"message\":".to_vec();
        json::string(&mut body, message);
        body.extend_from_slice(b",\"type\":");
        json::string(&mut body, kind);
        json::put(&mut body, format_args!(",\"param\":null,\"code\":{status}}}"));
        Self::json(body).with_status(status)
    }

    /// `{"error":{…}}` of `/v1/responses`.
    pub(crate) fn nested_error(status: u16, kind: &str, param: Option<&str>, message: &str) -> Self {
        let mut body = b"{\"error\":{\"message\":".to_vec();
        json::string(&mut body, message);
        body.extend_from_slice(b",\"type\":");
        json::string(&mut body, kind);
        body.extend_from_slice(b",\"param\":");
        json::optional(&mut body, param);
        json::put(&mut body, format_args!(",\"code\":{status}}}}}"));
        Self::json(body).with_status(status)
    }

    /// `{"type":"error","error":{…}}` of `/v1/messages`.
    pub(crate) fn anthropic_error(status: u16, kind: &str, message: &str) -> Self {
        let mut body = b"{\"type\":\"error\",\"error\":{\"type\":".to_vec();
        json::string(&mut body, kind);
        body.extend_from_slice(b",\"message\":");
        json::string(&mut body, message);
        body.extend_from_slice(b"}}");
        Self::json(body).with_status(status)
    }

    pub(crate) fn into_response(self) -> Response<ResponseBody> {
        let mut builder = Response::builder()
            .status(StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR))
            .header(header::SERVER, "uvicorn");
        if let Some(allow) = self.allow {
            builder = builder.header(header::ALLOW, allow);
        }
        builder = builder.header(header::CONTENT_LENGTH, self.body.len());
        if let Some(kind) = self.content_type {
            builder = builder.header(header::CONTENT_TYPE, kind);
        }
        finish(builder, ResponseBody::Full(self.body))
    }
}

/// The head of a stream, and the events that follow.
pub(crate) fn stream(
    endpoint: Endpoint,
    first: Option<Bytes>,
    rest: mpsc::Receiver<StreamItem>,
) -> Response<ResponseBody> {
    let mut builder = Response::builder().header(header::SERVER, "uvicorn");
    if endpoint == Endpoint::Responses {
        builder = builder.header(header::CACHE_CONTROL, "no-cache").header(header::CONNECTION, "keep-alive");
    }
    let builder = builder.header(header::CONTENT_TYPE, EVENTS);
    finish(builder, ResponseBody::Stream { first, rest })
}

fn finish(builder: hyper::http::response::Builder, body: ResponseBody) -> Response<ResponseBody> {
    let response = builder.header(header::VARY, "Origin").body(body);
    // All parts are constants of this file or numbers; an invalid one would show in every test.
    response.unwrap_or_else(|_| Response::new(ResponseBody::Full(Bytes::new())))
}

/// One event.
pub(crate) fn event(payload: &[u8]) -> Bytes {
    let mut frame = Vec::with_capacity(payload.len() + 8);
    frame.extend_from_slice(b"data: ");
    frame.extend_from_slice(payload);
    frame.extend_from_slice(b"\n\n");
    frame.into()
}

/// One event with a name.
pub(crate) fn named_event(name: &str, payload: &[u8]) -> Bytes {
    [b"event: ", name.as_bytes(), b"\ndata: ", payload, b"\n\n"].concat().into()
}
