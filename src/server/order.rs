//! The body of what an operator asks for, on either listener: small, and read whole.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;

use crate::error::Error;

/// Largest body.
const MAX_BODY: usize = 64 << 10;
/// How long it may take.
const TIMEOUT: Duration = Duration::from_secs(15);

/// Reads all of it.
pub(super) async fn read(body: Incoming) -> Result<Bytes, Error> {
    match tokio::time::timeout(TIMEOUT, Limited::new(body, MAX_BODY).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(_)) => Err(Error::BodyTooLarge { limit: MAX_BODY, drained: false }),
        Err(_) => Err(Error::RequestTimeout { what: "the body", after: TIMEOUT }),
    }
}
