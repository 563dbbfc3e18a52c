//! The error of a request whose head could not be read, on either listener.

use std::sync::Arc;

use crate::error::Error;
use crate::http1::HeadRejection;
use crate::observe::record::Recorder;
use crate::transport::RejectionResponse;

fn error(rejection: HeadRejection) -> Error {
    match rejection {
        HeadRejection::Malformed(what) => Error::BadRequest(what),
        HeadRejection::TooLarge => Error::HeadTooLarge,
        HeadRejection::Timeout(after) => {
            Error::RequestTimeout { what: "the rest of the request head", after }
        }
    }
}

/// Records the request and makes its response.
pub(super) fn response(rejection: HeadRejection, recorder: &Arc<Recorder>) -> RejectionResponse {
    let error = error(rejection);
    let request_id = recorder.reject_before_parse(&error).as_str().to_owned();
    RejectionResponse { status: error.status(), json: error.to_json(), request_id }
}
