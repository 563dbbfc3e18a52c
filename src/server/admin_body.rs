//! The body of an admin request, on either listener: small, and read as a whole.

use std::future::poll_fn;
use std::time::Duration;

use bytes::Bytes;

use crate::error::Error;
use crate::transport::RequestBody;

/// Largest body.
const MAX_BODY: usize = 64 << 10;
/// How long it may take.
const TIMEOUT: Duration = Duration::from_secs(15);

/// Reads all of it.
pub(super) async fn read(request: &mut impl RequestBody) -> Result<Bytes, Error> {
    let reading = async {
        let mut body = Vec::new();
        while let Some(piece) = poll_fn(|cx| request.poll_chunk(cx)).await.map_err(Error::BodyRead)? {
            body.extend_from_slice(&piece);
            if body.len() > MAX_BODY {
                return Err(Error::BodyTooLarge { limit: MAX_BODY, drained: false });
            }
        }
        Ok(body.into())
    };
    let timeout = Error::RequestTimeout { what: "the request body", after: TIMEOUT };
    tokio::time::timeout(TIMEOUT, reading).await.unwrap_or(Err(timeout))
}
