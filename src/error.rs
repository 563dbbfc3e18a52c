//! The router's own errors: which server failed, how, and the error response that follows.
//!
//! An error response of a server is no error here: it is passed on as it is.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use hyper::{Response, StatusCode};

use crate::admission::{AuthError, MemoryFull, Rejection};
use crate::http1::{BodyReadError, ConnError, MAX_HEAD, MAX_HEADERS, MalformedMessage, SendError};
use crate::transport::{BodyFailure, RequestBodyError};
use crate::upstream::{Backend, DialError, MAX_ENCODERS, MAX_SERVERS_PER_ROLE, NotChanged, Outcome, Role};
use crate::wire::segments::SegmentedBytes;
use crate::wire::shape::{BodyError, Dialect, RefusedSamples};

/// A complete response of the router's own.
pub(crate) type OwnResponse = Response<Full<SegmentedBytes>>;

/// Why a request has no response of a server, or only a part of one.
#[derive(Debug)]
pub(crate) enum Error {
    NotFound,
    /// A path of SGLang's that the router does not serve; the text says what does.
    NotServed(&'static str),
    /// A path of SGLang's that cannot work on pairs; the text says why, and what to do.
    NotPossible(&'static str),
    MethodNotAllowed {
        allow: &'static str,
    },
    BodyTooLarge {
        limit: usize,
        /// The option that sets it.
        option: &'static str,
    },
    /// The client's connection failed in the middle of the body, or the body's framing is malformed.
    BodyRead(RequestBodyError),
    BodyEncoded {
        encoding: String,
    },
    /// The body is no JSON object that the router can add fields to.
    InvalidBody(BodyError),
    /// More samples of a prompt (`n`) than `--max-n` allows.
    TooManySamples {
        samples: u32,
        limit: u32,
    },
    /// An `n` that no server takes, with what SGLang says of it.
    InvalidSamples(&'static RefusedSamples),
    /// A request that continues an earlier response, which its servers do not keep.
    PreviousResponse,
    /// Malformed HTTP, or HTTP that two programs could read in two ways.
    BadRequest(&'static str),
    HeadTooLarge,
    /// The client stopped sending in the middle of a request.
    RequestTimeout {
        what: &'static str,
        after: Duration,
    },
    /// No key, or not one of the accepted keys.
    Unauthorized,
    /// An admin request that is neither from this machine nor has the admin key.
    Forbidden(&'static str),
    /// Over one of the router's limits.
    Overloaded(Rejection),
    /// No memory for the request's body.
    MemoryLimit(MemoryFull),
    /// A panic.
    Internal,
    /// An admin request whose body is not valid.
    BadAdminRequest(String),
    /// A change of the fleet that was not made.
    NotChanged(NotChanged),
    /// The 503 of `/ready`.
    NotReady(&'static str),
    /// No healthy server has this role.
    NoServer(Role),
    /// All encoders are down, and the request has images, audio or video.
    NoEncoder,
    Upstream {
        server: Arc<Backend>,
        cause: Cause,
    },
}

/// How a server failed.
#[derive(Debug)]
pub(crate) enum Cause {
    /// No connection could be opened.
    Connect(io::Error),
    ConnectTimeout(Duration),
    /// The connection ended before the response did.
    Closed(ConnError),
    /// The response is not valid HTTP.
    BadResponse(MalformedMessage),
    /// No response in time.
    Timeout(Duration),
    /// A response that must be held in memory is over the limit.
    TooLarge {
        limit: usize,
    },
    /// Prefill responded with an error after decode's head had been sent to the client.
    LateRefusal(u16),
    /// The logprobs cannot be found in the response.
    Unmergeable(&'static str),
}

impl Error {
    pub(crate) fn upstream(server: &Arc<Backend>, cause: impl Into<Cause>) -> Self {
        Self::Upstream { server: Arc::clone(server), cause: cause.into() }
    }

    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::NotFound | Self::NotServed(_) | Self::NotChanged(NotChanged::Unknown) => {
                StatusCode::NOT_FOUND
            }
            Self::NotPossible(_) => StatusCode::NOT_IMPLEMENTED,
            Self::NotChanged(_) => StatusCode::CONFLICT,
            Self::MethodNotAllowed { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Self::BodyTooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::HeadTooLarge => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::BodyEncoded { .. } => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::RequestTimeout { .. } => StatusCode::REQUEST_TIMEOUT,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::Forbidden(_) => StatusCode::FORBIDDEN,
            // 503 and not 429: the client did nothing too often, the servers are too slow.
            Self::Overloaded(Rejection::QueueTimeout(_)) | Self::MemoryLimit(_) => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Self::Overloaded(_) => StatusCode::TOO_MANY_REQUESTS,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
            Self::NotReady(_) | Self::NoServer(_) | Self::NoEncoder => StatusCode::SERVICE_UNAVAILABLE,
            Self::InvalidSamples(refused) => {
                StatusCode::from_u16(refused.status).unwrap_or(StatusCode::BAD_REQUEST)
            }
            Self::BodyRead(_)
            | Self::InvalidBody(_)
            | Self::TooManySamples { .. }
            | Self::PreviousResponse
            | Self::BadRequest(_)
            | Self::BadAdminRequest(_) => StatusCode::BAD_REQUEST,
            // RFC 9110, section 15.6.5: no response in time is 504, a bad or broken one 502.
            Self::Upstream { cause: Cause::ConnectTimeout(_) | Cause::Timeout(_), .. } => {
                StatusCode::GATEWAY_TIMEOUT
            }
            Self::Upstream { .. } => StatusCode::BAD_GATEWAY,
        }
    }

    /// The `code` of the JSON error: part of the public interface (`docs/API.md`).
    pub(crate) fn code(&self) -> &'static str {
        match self {
            Self::NotFound | Self::NotServed(_) => "not_found",
            Self::NotPossible(_) => "not_possible_with_pd",
            Self::MethodNotAllowed { .. } => "method_not_allowed",
            Self::BodyTooLarge { .. } => "body_too_large",
            Self::BodyRead(_) => "body_read",
            Self::BodyEncoded { .. } => "unsupported_encoding",
            Self::InvalidBody(BodyError::InternalField { .. }) => "internal_field",
            Self::InvalidBody(_) => "invalid_json",
            Self::TooManySamples { .. } => "n_too_large",
            Self::InvalidSamples(_) => "invalid_n",
            Self::PreviousResponse => "previous_response_not_supported",
            Self::BadRequest(_) => "bad_request",
            Self::HeadTooLarge => "head_too_large",
            Self::RequestTimeout { .. } => "request_timeout",
            Self::Unauthorized => "unauthorized",
            Self::Forbidden(_) => "admin_forbidden",
            Self::Overloaded(Rejection::QueueFull { .. }) => "queue_full",
            Self::Overloaded(Rejection::QueueTimeout(_)) => "queue_timeout",
            Self::Overloaded(Rejection::RateLimited { .. }) => "rate_limited",
            Self::MemoryLimit(_) => "memory_limit",
            Self::Internal => "internal",
            Self::BadAdminRequest(_) => "invalid_admin_request",
            Self::NotChanged(NotChanged::Unknown) => "worker_not_found",
            Self::NotChanged(NotChanged::Exists) => "worker_exists",
            Self::NotChanged(NotChanged::Busy) => "worker_busy",
            Self::NotChanged(NotChanged::Full(_) | NotChanged::TooManyEncoders) => "too_many_workers",
            Self::NotReady(_) => "not_ready",
            Self::NoEncoder => "encoder_unavailable",
            Self::NoServer(Role::Prefill) => "prefill_unavailable",
            Self::NoServer(Role::Decode) => "decode_unavailable",
            Self::NoServer(Role::Regular) => "regular_unavailable",
            Self::Upstream { server, cause } => cause.code(server.role()),
        }
    }

    /// The server that failed.
    pub(crate) fn server(&self) -> Option<&Arc<Backend>> {
        match self {
            Self::Upstream { server, .. } => Some(server),
            _ => None,
        }
    }

    /// The error as JSON, in the shape of OpenAI's API.
    pub(crate) fn to_json(&self) -> String {
        serde_json::json!({ "error": self.fields(ErrorFormat::OpenAi) }).to_string()
    }

    fn fields(&self, format: ErrorFormat) -> serde_json::Value {
        let kind = match format {
            ErrorFormat::Anthropic => anthropic_type(self.status()),
            _ if self.status().is_client_error() => "invalid_request_error",
            _ => "server_error",
        };
        let mut error = serde_json::json!({
            "message": self.to_string(), "type": kind, "param": null, "code": self.code(),
        });
        if let Some(server) = self.server() {
            error["server"] = server.url().into();
        }
        error
    }

    /// The error as JSON, as the client of this API expects it.
    fn to_json_in(&self, format: ErrorFormat) -> String {
        match format {
            ErrorFormat::OpenAi | ErrorFormat::Responses => self.to_json(),
            ErrorFormat::Anthropic => {
                serde_json::json!({ "type": "error", "error": self.fields(format) }).to_string()
            }
        }
    }

    /// The error as the last event of a stream.
    pub(crate) fn to_event(&self, format: ErrorFormat) -> String {
        match format {
            ErrorFormat::OpenAi => format!("data: {}\n\n", self.to_json()),
            ErrorFormat::Anthropic => format!("event: error\ndata: {}\n\n", self.to_json_in(format)),
            // OpenAI's API has the fields at the top level, and its SDKs look for `error` all the same.
            ErrorFormat::Responses => {
                let error = self.fields(format);
                let event = serde_json::json!({
                    "type": "error", "code": error["code"], "message": error["message"], "param": null,
                    "error": error,
                });
                format!("event: error\ndata: {event}\n\n")
            }
        }
    }

    /// The error response.
    pub(crate) fn to_response(&self) -> OwnResponse {
        self.to_response_in(ErrorFormat::OpenAi)
    }

    /// The same, as the client of this API expects it.
    pub(crate) fn to_response_in(&self, format: ErrorFormat) -> OwnResponse {
        let mut response = json_response(self.status(), self.to_json_in(format));
        match self {
            // RFC 9110, section 15.5.6: a 405 must say which methods are allowed.
            Self::MethodNotAllowed { allow } => {
                response.headers_mut().insert(ALLOW, HeaderValue::from_static(allow));
            }
            // Section 15.5.2: a 401 must say how to authenticate.
            Self::Unauthorized => {
                response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            Self::Overloaded(rejection) => {
                response.headers_mut().insert(RETRY_AFTER, rejection.retry_after().into());
            }
            // As of a full queue: when memory is free, or a server there, cannot be known. A new server is
            // probed once a second until it is up.
            Self::MemoryLimit(_) | Self::NoServer(_) | Self::NoEncoder => {
                response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
            }
            _ => {}
        }
        response
    }

    /// Whether the connection must end, because it is not known where the request ends, or the client is too
    /// slow.
    pub(crate) fn ends_connection(&self) -> bool {
        matches!(
            self,
            Self::BodyRead(_)
                | Self::BadRequest(_)
                | Self::HeadTooLarge
                | Self::RequestTimeout { .. }
                | Self::Internal
        )
    }
}

/// The shape of the router's errors on one API.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum ErrorFormat {
    #[default]
    OpenAi,
    /// `/v1/messages`
    Anthropic,
    /// `/v1/responses`, whose streams have errors of their own.
    Responses,
}

impl From<Dialect> for ErrorFormat {
    fn from(dialect: Dialect) -> Self {
        match dialect {
            Dialect::Generate | Dialect::Chat | Dialect::Completions => Self::OpenAi,
            Dialect::Responses => Self::Responses,
            Dialect::Messages => Self::Anthropic,
        }
    }
}

/// Anthropic's type of an error with this status.
fn anthropic_type(status: StatusCode) -> &'static str {
    match status.as_u16() {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        400..500 => "invalid_request_error",
        503 => "overloaded_error",
        504 => "timeout_error",
        _ => "api_error",
    }
}

/// A complete JSON response.
pub(crate) fn json_response(status: StatusCode, body: impl Into<Bytes>) -> OwnResponse {
    let mut response = Response::new(Full::new(body.into().into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Whether opening a connection failed because this machine ran out of descriptors, ports or memory.
fn is_exhaustion(error: &io::Error) -> bool {
    use io::ErrorKind::*;
    let is_remote = matches!(
        error.kind(),
        ConnectionRefused
            | ConnectionReset
            | ConnectionAborted
            | TimedOut
            | HostUnreachable
            | NetworkUnreachable
    );
    // A name that cannot be resolved has no OS error number.
    error.raw_os_error().is_some() && !is_remote
}

impl Cause {
    /// The outcome of a leg that failed like this.
    pub(crate) fn outcome(&self) -> Outcome {
        match self {
            // No fault of the backend: it must not be taken out of rotation for it.
            Self::Connect(error) if is_exhaustion(error) => Outcome::Exhausted,
            Self::Connect(_) => Outcome::Connect,
            Self::ConnectTimeout(_) => Outcome::ConnectTimeout,
            Self::Closed(_) => Outcome::Closed,
            Self::BadResponse(_) => Outcome::BadResponse,
            Self::Timeout(_) => Outcome::Timeout,
            Self::TooLarge { .. } => Outcome::TooLarge,
            Self::LateRefusal(_) => Outcome::Refused,
            // The server did its part: the response is complete, only not one that can be merged.
            Self::Unmergeable(_) => Outcome::Completed,
        }
    }

    fn code(&self, role: Role) -> &'static str {
        let by_role = match self {
            Self::Connect(_) => ["prefill_connect", "decode_connect", "regular_connect"],
            Self::ConnectTimeout(_) => {
                ["prefill_connect_timeout", "decode_connect_timeout", "regular_connect_timeout"]
            }
            Self::Closed(_) => ["prefill_closed", "decode_closed", "regular_closed"],
            Self::LateRefusal(_) => ["prefill_refused", "decode_refused", "regular_refused"],
            Self::BadResponse(_) => ["prefill_bad_response", "decode_bad_response", "regular_bad_response"],
            Self::Timeout(_) => ["prefill_timeout", "decode_timeout", "regular_timeout"],
            Self::TooLarge { .. } => {
                ["prefill_answer_too_large", "decode_answer_too_large", "regular_answer_too_large"]
            }
            Self::Unmergeable(_) => ["prefill_unmergeable", "decode_unmergeable", "regular_unmergeable"],
        };
        by_role[role as usize]
    }
}

impl From<AuthError> for Error {
    fn from(error: AuthError) -> Self {
        match error {
            AuthError::MissingKey => Self::Unauthorized,
            AuthError::AmbiguousKey => Self::BadRequest("there is more than one Authorization header"),
            AuthError::AdminForbidden(why) => Self::Forbidden(why),
        }
    }
}

impl From<MemoryFull> for Error {
    fn from(full: MemoryFull) -> Self {
        Self::MemoryLimit(full)
    }
}

impl From<BodyFailure> for Error {
    fn from(failure: BodyFailure) -> Self {
        match failure {
            BodyFailure::Read(error) => Self::BodyRead(error),
            BodyFailure::Timeout { what, after } => Self::RequestTimeout { what, after },
        }
    }
}

impl From<Rejection> for Error {
    fn from(rejection: Rejection) -> Self {
        Self::Overloaded(rejection)
    }
}

impl From<DialError> for Cause {
    fn from(error: DialError) -> Self {
        match error {
            DialError::Io(error) => Self::Connect(error),
            DialError::Timeout(after) => Self::ConnectTimeout(after),
        }
    }
}

impl From<SendError> for Cause {
    fn from(error: SendError) -> Self {
        error.cause.into()
    }
}

impl From<ConnError> for Cause {
    fn from(error: ConnError) -> Self {
        match error {
            ConnError::Malformed(malformed) => Self::BadResponse(malformed),
            ConnError::TooLarge { limit } => Self::TooLarge { limit },
            error => Self::Closed(error),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFound => f.write_str("this router has no such path"),
            Self::NotServed(instead) => write!(f, "this router does not serve this path: {instead}"),
            Self::NotPossible(reason) => {
                write!(f, "not possible under prefill-decode disaggregation: {reason}")
            }
            Self::MethodNotAllowed { allow } => write!(f, "method not allowed; this path accepts {allow}"),
            Self::BodyTooLarge { limit, option } => {
                write!(f, "the request body is larger than the limit of {limit} bytes ({option})")
            }
            Self::BodyRead(error) => write!(f, "the request body could not be read: {error}"),
            Self::BodyEncoded { encoding } => write!(
                f,
                "the request body has Content-Encoding {encoding}; the router must read it, so send it without one"
            ),
            Self::InvalidBody(error) => error.fmt(f),
            Self::PreviousResponse => f.write_str(
                "previous_response_id is not supported: SGLang keeps no responses with prefill-decode \
                 disaggregation; send the whole conversation as input",
            ),
            Self::TooManySamples { samples, limit } => {
                write!(
                    f,
                    "n is {samples}, more than the router takes ({limit}, --max-n): each is a request of its own"
                )
            }
            Self::InvalidSamples(refused) => f.write_str(refused.message),
            Self::BadRequest(what) => write!(f, "malformed HTTP request: {what}"),
            Self::HeadTooLarge => {
                write!(f, "the request head is larger than {MAX_HEAD} bytes or {MAX_HEADERS} headers")
            }
            Self::RequestTimeout { what, after } => write!(f, "{what} did not arrive within {after:?}"),
            Self::Unauthorized => f.write_str(
                "missing or invalid API key; send Authorization: Bearer KEY with one of the router's keys",
            ),
            Self::Forbidden(why) => f.write_str(why),
            Self::Overloaded(rejection) => rejection.fmt(f),
            Self::MemoryLimit(full) => full.fmt(f),
            Self::Internal => f.write_str("internal router error; the router's log names the request"),
            Self::BadAdminRequest(what) => f.write_str(what),
            Self::NotChanged(NotChanged::Unknown) => f.write_str("the router has no such server"),
            Self::NotChanged(NotChanged::Exists) => f.write_str(
                "the router already has this server with another role or bootstrap port; delete it first",
            ),
            Self::NotChanged(NotChanged::Busy) => {
                f.write_str("the role of this server is being switched; try again when that has ended")
            }
            Self::NotChanged(NotChanged::Full(role)) => {
                write!(f, "the router has {MAX_SERVERS_PER_ROLE} {role} servers, which is the maximum")
            }
            Self::NotChanged(NotChanged::TooManyEncoders) => {
                write!(f, "the router has {MAX_ENCODERS} encoders, which is the maximum")
            }
            Self::NoEncoder => f.write_str(
                "no encoder is up, and the request has images, audio or video; text alone is served",
            ),
            Self::NotReady(why) => f.write_str(why),
            Self::NoServer(role) => write!(f, "no {role} server is available"),
            Self::Upstream { server, cause } => {
                write!(f, "{} server {} {cause}", server.role(), server.url())
            }
        }
    }
}

impl fmt::Display for RequestBodyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Http1(BodyReadError::Io(error)) => error.fmt(f),
            Self::Http1(BodyReadError::Closed) => f.write_str("the connection was closed before its end"),
            Self::Http1(BodyReadError::Malformed(MalformedMessage(what))) => f.write_str(what),
            Self::Hyper(error) => error.fmt(f),
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect(error) => write!(f, "cannot be reached: {error}"),
            Self::ConnectTimeout(after) => write!(f, "did not accept a connection within {after:?}"),
            Self::Closed(error) => {
                write!(f, "closed the connection before its response was complete: {error}")
            }
            Self::LateRefusal(status) => write!(f, "responded {status} after the response had begun"),
            Self::BadResponse(MalformedMessage(what)) => write!(f, "sent a malformed HTTP response: {what}"),
            Self::Timeout(after) => write!(f, "did not respond within {after:?}"),
            Self::TooLarge { limit } => write!(
                f,
                "sent a response larger than {limit} bytes, the most that is held in memory for a logprob merge \
                 (--max-merge-size)"
            ),
            Self::Unmergeable(what) => write!(f, "sent a response that cannot be merged: {what}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::BodyRead(RequestBodyError::Http1(BodyReadError::Io(error))) => Some(error),
            Self::BodyRead(RequestBodyError::Hyper(error)) => Some(error),
            Self::Upstream { cause: Cause::Connect(error), .. } => Some(error),
            Self::Upstream { cause: Cause::Closed(ConnError::Io(error)), .. } => Some(error),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Linux numbers them.
    const EMFILE: i32 = 24;
    const EADDRNOTAVAIL: i32 = 99;
    const ECONNREFUSED: i32 = 111;
    const EHOSTUNREACH: i32 = 113;

    #[test]
    fn a_router_without_descriptors_or_ports_blames_no_server() {
        let outcome = |error| Cause::Connect(error).outcome();
        for number in [EMFILE, EADDRNOTAVAIL] {
            assert_eq!(outcome(io::Error::from_raw_os_error(number)), Outcome::Exhausted, "{number}");
        }
        for number in [ECONNREFUSED, EHOSTUNREACH] {
            assert_eq!(outcome(io::Error::from_raw_os_error(number)), Outcome::Connect, "{number}");
        }
        assert_eq!(outcome(io::Error::other("the name is not known")), Outcome::Connect);
    }
}
