//! What went wrong with a request: which server, when and why; and how that is
//! told to the client.
//!
//! Only errors of the router's own are here. What a server answered, however bad,
//! is passed on as it is.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use hyper::{Response, StatusCode};

use crate::admission::{AuthError, Rejection};
use crate::http1::{ConnError, MAX_HEAD, MAX_HEADERS, MalformedMessage, SendError};
use crate::upstream::{Backend, DialError, MAX_SERVERS_PER_ROLE, NotChanged, Outcome, Role};
use crate::wire::segments::SegmentedBytes;
use crate::wire::shape::BodyError;

/// An answer that is complete: the router's own.
pub(crate) type OwnResponse = Response<Full<SegmentedBytes>>;

/// Why a request got no answer from a server.
#[derive(Debug)]
pub(crate) enum Error {
    NotFound,
    MethodNotAllowed {
        allow: &'static str,
    },
    BodyTooLarge {
        limit: usize,
        drained: bool,
    },
    /// The rest of a body did not come, or is none.
    BodyRead(BodyReadError),
    BodyEncoded {
        encoding: String,
    },
    BodyError(BodyError),
    ManySamples,
    /// A head that must not be guessed at.
    BadRequest(&'static str),
    /// A head that is too long, or has too many headers.
    HeadTooLarge,
    /// The client has stopped in the middle of a request.
    RequestTimeout {
        what: &'static str,
        after: Duration,
    },
    /// Without a key that is good here.
    Unauthorized,
    /// Not for whoever asks.
    Forbidden(&'static str),
    /// Over a limit of the router's own.
    Overloaded(Rejection),
    /// The router's own fault: a panic.
    Internal,
    /// An operator's order that makes no sense.
    BadOrder(String),
    /// An operator's change that was not made.
    NotChanged(NotChanged),
    /// An answer of `/ready`.
    NotReady(&'static str),
    /// There is none of this role.
    NoServer(Role),
    Upstream {
        server: Arc<Backend>,
        cause: Cause,
    },
}

/// Why the rest of a client's body can't be had.
#[derive(Debug)]
pub(crate) enum BodyReadError {
    Io(io::Error),
    /// The client has sent no more.
    Closed,
    Malformed(MalformedMessage),
    Http2(hyper::Error),
}

/// What a server did, or did not.
#[derive(Debug)]
pub(crate) enum Cause {
    /// No connection could be opened.
    Connect(io::Error),
    ConnectTimeout(Duration),
    /// The connection ended before the answer did. `unseen`: the server can't have seen the request.
    Closed {
        error: ConnError,
        unseen: bool,
    },
    /// What came is not HTTP.
    BadResponse(MalformedMessage),
    /// No answer in time.
    Timeout(Duration),
    /// An answer that must be held in memory is over the limit.
    TooLarge {
        limit: usize,
    },
    /// The server refused when the client had been told already that the answer begins.
    LateRefusal(u16),
    /// An answer in which the logprobs cannot be found.
    Unmergeable(&'static str),
}

impl Error {
    pub(crate) fn upstream(server: &Arc<Backend>, cause: impl Into<Cause>) -> Self {
        Self::Upstream { server: Arc::clone(server), cause: cause.into() }
    }

    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::NotFound | Self::NotChanged(NotChanged::Unknown) => StatusCode::NOT_FOUND,
            Self::NotChanged(_) => StatusCode::CONFLICT,
            Self::MethodNotAllowed { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Self::BodyTooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::HeadTooLarge => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::BodyEncoded { .. } => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::RequestTimeout { .. } => StatusCode::REQUEST_TIMEOUT,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::Forbidden(_) => StatusCode::FORBIDDEN,
            Self::Overloaded(Rejection::QueueTimeout(_)) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Overloaded(_) => StatusCode::TOO_MANY_REQUESTS,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
            Self::NotReady(_) | Self::NoServer(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::BodyRead(_)
            | Self::BodyError(_)
            | Self::ManySamples
            | Self::BadRequest(_)
            | Self::BadOrder(_) => StatusCode::BAD_REQUEST,
            Self::Upstream { cause: Cause::ConnectTimeout(_) | Cause::Timeout(_), .. } => {
                StatusCode::GATEWAY_TIMEOUT
            }
            Self::Upstream { .. } => StatusCode::BAD_GATEWAY,
        }
    }

    /// What a program can test; part of the public interface.
    pub(crate) fn code(&self) -> &'static str {
        match self {
            Self::NotFound => "not_found",
            Self::MethodNotAllowed { .. } => "method_not_allowed",
            Self::BodyTooLarge { .. } => "body_too_large",
            Self::BodyRead(_) => "body_read",
            Self::BodyEncoded { .. } => "unsupported_encoding",
            Self::BodyError(_) => "invalid_json",
            Self::ManySamples => "n_not_supported",
            Self::BadRequest(_) => "bad_request",
            Self::HeadTooLarge => "head_too_large",
            Self::RequestTimeout { .. } => "request_timeout",
            Self::Unauthorized => "unauthorized",
            Self::Forbidden(_) => "admin_forbidden",
            Self::Overloaded(Rejection::QueueFull { .. }) => "queue_full",
            Self::Overloaded(Rejection::QueueTimeout(_)) => "queue_timeout",
            Self::Overloaded(Rejection::RateLimited { .. }) => "rate_limited",
            Self::Internal => "internal",
            Self::BadOrder(_) => "invalid_admin_request",
            Self::NotChanged(NotChanged::Unknown) => "worker_not_found",
            Self::NotChanged(NotChanged::Exists) => "worker_exists",
            Self::NotChanged(NotChanged::Busy) => "worker_busy",
            Self::NotChanged(NotChanged::Full(_)) => "too_many_workers",
            Self::NotReady(_) => "not_ready",
            Self::NoServer(Role::Prefill) => "prefill_unavailable",
            Self::NoServer(Role::Decode) => "decode_unavailable",
            Self::Upstream { server, cause } => cause.code(server.role()),
        }
    }

    /// The server at fault.
    pub(crate) fn server(&self) -> Option<&Arc<Backend>> {
        match self {
            Self::Upstream { server, .. } => Some(server),
            _ => None,
        }
    }

    /// Whether the request can be sent again, because no server can have begun with it.
    pub(crate) fn is_unseen(&self) -> bool {
        let Self::Upstream { cause, .. } = self else { return false };
        matches!(cause, Cause::Connect(_) | Cause::ConnectTimeout(_) | Cause::Closed { unseen: true, .. })
    }

    /// The error as JSON, in the shape of OpenAI's API.
    pub(crate) fn to_json(&self) -> String {
        let status = self.status();
        let kind = if status.is_client_error() { "invalid_request_error" } else { "server_error" };
        let mut error = serde_json::json!({
            "message": self.to_string(), "type": kind, "param": null, "code": self.code(),
        });
        if let Some(server) = self.server() {
            error["server"] = server.url().into();
        }
        serde_json::json!({ "error": error }).to_string()
    }

    /// The answer to the client.
    pub(crate) fn to_reply(&self) -> OwnResponse {
        let mut reply = json_reply(self.status(), self.to_json());
        match self {
            Self::MethodNotAllowed { allow } => {
                reply.headers_mut().insert(ALLOW, HeaderValue::from_static(allow));
            }
            Self::Unauthorized => {
                reply.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            Self::Overloaded(refusal) => {
                reply.headers_mut().insert(RETRY_AFTER, refusal.retry_after().into());
            }
            _ => {}
        }
        reply
    }

    /// Whether there can be no other request on the connection: what is left of this one would be taken for it, or nobody
    /// knows what is left.
    pub(crate) fn ends_connection(&self) -> bool {
        matches!(
            self,
            Self::BodyTooLarge { drained: false, .. }
                | Self::BodyRead(_)
                | Self::BadRequest(_)
                | Self::HeadTooLarge
                | Self::RequestTimeout { .. }
                | Self::Internal
        )
    }
}

/// A complete answer of JSON.
pub(crate) fn json_reply(status: StatusCode, body: impl Into<Bytes>) -> OwnResponse {
    let mut reply = Response::new(Full::new(body.into().into()));
    *reply.status_mut() = status;
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    reply
}

/// Whether opening a connection has failed for want of something of this machine's: a descriptor, a port, memory.
fn is_exhaustion(error: &io::Error) -> bool {
    use io::ErrorKind::*;
    let of_the_server = matches!(
        error.kind(),
        ConnectionRefused
            | ConnectionReset
            | ConnectionAborted
            | TimedOut
            | HostUnreachable
            | NetworkUnreachable
    );
    // A name that cannot be resolved has no number.
    error.raw_os_error().is_some() && !of_the_server
}

impl Cause {
    /// How a leg has ended that failed of this.
    pub(crate) fn outcome(&self) -> Outcome {
        match self {
            Self::Connect(error) if is_exhaustion(error) => Outcome::Exhausted,
            Self::Connect(_) => Outcome::Connect,
            Self::ConnectTimeout(_) => Outcome::ConnectTimeout,
            Self::Closed { unseen: true, .. } => Outcome::Stale,
            Self::Closed { unseen: false, .. } => Outcome::Closed,
            Self::BadResponse(_) => Outcome::BadResponse,
            Self::Timeout(_) => Outcome::Timeout,
            Self::TooLarge { .. } => Outcome::TooLarge,
            Self::LateRefusal(_) => Outcome::Refused,
            // All of it has come; it is of no use.
            Self::Unmergeable(_) => Outcome::Completed,
        }
    }

    fn code(&self, role: Role) -> &'static str {
        let (prefill, decode) = match self {
            Self::Connect(_) => ("prefill_connect", "decode_connect"),
            Self::ConnectTimeout(_) => ("prefill_connect_timeout", "decode_connect_timeout"),
            Self::Closed { .. } => ("prefill_closed", "decode_closed"),
            Self::LateRefusal(_) => ("prefill_refused", "decode_refused"),
            Self::BadResponse(_) => ("prefill_bad_response", "decode_bad_response"),
            Self::Timeout(_) => ("prefill_timeout", "decode_timeout"),
            Self::TooLarge { .. } => ("prefill_answer_too_large", "decode_answer_too_large"),
            Self::Unmergeable(_) => ("prefill_unmergeable", "decode_unmergeable"),
        };
        match role {
            Role::Prefill => prefill,
            Role::Decode => decode,
        }
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

impl From<Rejection> for Error {
    fn from(refusal: Rejection) -> Self {
        Self::Overloaded(refusal)
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
        match error.cause.into() {
            Self::Closed { error: cause, .. } => Self::Closed { error: cause, unseen: error.unseen },
            cause => cause,
        }
    }
}

impl From<ConnError> for Cause {
    fn from(error: ConnError) -> Self {
        match error {
            ConnError::Bad(bad) => Self::BadResponse(bad),
            ConnError::TooLarge { limit } => Self::TooLarge { limit },
            error => Self::Closed { error, unseen: false },
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFound => f.write_str("there is no such path on this router"),
            Self::MethodNotAllowed { allow } => write!(f, "this path takes {allow}"),
            Self::BodyTooLarge { limit, .. } => write!(f, "the body is over the limit of {limit} bytes"),
            Self::BodyRead(error) => write!(f, "the body could not be read: {error}"),
            Self::BodyEncoded { encoding } => {
                write!(f, "the body is encoded as {encoding}; the router must read it, so send it as it is")
            }
            Self::BodyError(error) => error.fmt(f),
            Self::ManySamples => f.write_str(
                "n > 1 is not supported: SGLang's decode servers hang on it under prefill-decode disaggregation; \
                 send n requests",
            ),
            Self::BadRequest(what) => write!(f, "the request is not good HTTP: {what}"),
            Self::HeadTooLarge => {
                write!(f, "the request's head is over {MAX_HEAD} bytes or {MAX_HEADERS} headers")
            }
            Self::RequestTimeout { what, after } => write!(f, "{what} did not come within {after:?}"),
            Self::Unauthorized => {
                f.write_str("this wants an API key of the router's: Authorization: Bearer KEY")
            }
            Self::Forbidden(why) => f.write_str(why),
            Self::Overloaded(refusal) => refusal.fmt(f),
            Self::Internal => f.write_str("the router failed at this request"),
            Self::BadOrder(what) => f.write_str(what),
            Self::NotChanged(NotChanged::Unknown) => f.write_str("the router has no such server"),
            Self::NotChanged(NotChanged::Exists) => {
                f.write_str("the router has this server with another role or bootstrap port; delete it first")
            }
            Self::NotChanged(NotChanged::Busy) => f.write_str("the server's role is being switched"),
            Self::NotChanged(NotChanged::Full(role)) => {
                write!(f, "the router has {MAX_SERVERS_PER_ROLE} {role} servers and takes no more")
            }
            Self::NotReady(why) => f.write_str(why),
            Self::NoServer(role) => write!(f, "the router has no {role} server"),
            Self::Upstream { server, cause } => write!(f, "{} server {} {cause}", server.role(), server.url()),
        }
    }
}

impl fmt::Display for BodyReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(error) => error.fmt(f),
            Self::Closed => f.write_str("the connection was closed before its end"),
            Self::Malformed(MalformedMessage(what)) => f.write_str(what),
            Self::Http2(error) => error.fmt(f),
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect(error) => write!(f, "cannot be reached: {error}"),
            Self::ConnectTimeout(after) => write!(f, "did not accept a connection within {after:?}"),
            Self::Closed { error, .. } => write!(f, "broke off before its answer was complete: {error}"),
            Self::LateRefusal(status) => write!(f, "refused with {status} when the answer had begun"),
            Self::BadResponse(MalformedMessage(what)) => {
                write!(f, "sent an answer that is not good HTTP: {what}")
            }
            Self::Timeout(after) => write!(f, "did not answer within {after:?}"),
            Self::TooLarge { limit } => write!(f, "sent over {limit} bytes where all must be held in memory"),
            Self::Unmergeable(what) => write!(f, "sent an answer without readable logprobs: {what}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::BodyRead(BodyReadError::Io(error)) => Some(error),
            Self::BodyRead(BodyReadError::Http2(error)) => Some(error),
            Self::Upstream { cause: Cause::Connect(error), .. } => Some(error),
            Self::Upstream { cause: Cause::Closed { error: ConnError::Io(error), .. }, .. } => Some(error),
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
