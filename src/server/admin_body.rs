//! Reads the body of an admin request, on either listener: small, and held in memory as a whole.
//!
//! What is in it is for `admin`. Generation requests are read by `proxy`.

use std::future::poll_fn;
use std::time::Duration;

use bytes::Bytes;

use crate::error::Error;
use crate::transport::RequestBody;

/// Largest body. An admin request names one server, usually in less than 1 KiB.
const MAX_BODY: usize = 64 << 10;
/// How long the whole body may take. An operator's tool sends it at once; a slow
/// body is a client that stalls.
const TIMEOUT: Duration = Duration::from_secs(15);

/// Reads the whole body.
pub(super) async fn read(request: &mut impl RequestBody) -> Result<Bytes, Error> {
    let reading = async {
        let mut body = Vec::new();
        while let Some(chunk) = poll_fn(|cx| request.poll_chunk(cx)).await.map_err(Error::BodyRead)? {
            body.extend_from_slice(&chunk);
            if body.len() > MAX_BODY {
                let option = "fixed for requests of operators";
                return Err(Error::BodyTooLarge { limit: MAX_BODY, option });
            }
        }
        Ok(body.into())
    };
    let timeout = Error::RequestTimeout { what: "the request body", after: TIMEOUT };
    tokio::time::timeout(TIMEOUT, reading).await.unwrap_or(Err(timeout))
}
