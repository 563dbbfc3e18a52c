//! The error of a request whose head could not be read, on either listener.

use crate::error::Error;
use crate::http1::HeadRejection;
use crate::observe::report::RequestLogger;
use crate::transport::RejectionResponse;

pub(super) fn error(rejection: HeadRejection) -> Error {
    match rejection {
        HeadRejection::Malformed(what) => Error::BadRequest(what),
        HeadRejection::TooLarge => Error::HeadTooLarge,
        HeadRejection::Timeout(after) => {
            Error::RequestTimeout { what: "the rest of the request head", after }
        }
    }
}

/// Logs the request and makes its response.
pub(super) fn response(error: &Error, logger: &RequestLogger) -> RejectionResponse {
    let request_id = logger.log_rejected_before_parse(error).as_str().to_owned();
    RejectionResponse { status: error.status(), json: error.to_json(), request_id }
}
