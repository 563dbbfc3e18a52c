//! One request on one server: connection, head, body.
//!
//! A leg that is dropped closes its connection, and the server takes that as a
//! cancellation. It gives the connection back only when its body has ended.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use hyper::body::{Body, Incoming, SizeHint};
use hyper::http::response;
use hyper::{Request, Response};

use crate::error::{Cause, Error};
use crate::upstream::{InFlight, Lease, Pools};
use crate::wire::body::LegBody;

/// A leg whose answer has begun.
pub(super) struct Leg {
    lease: Lease,
    body: Incoming,
    server: InFlight,
}

impl Leg {
    /// Takes a connection, sends the request, and waits for the head of the answer.
    pub(super) async fn start(
        pools: &Pools,
        server: InFlight,
        request: Request<LegBody>,
    ) -> Result<(response::Parts, Self), Error> {
        let failed = |cause: Cause| Error::upstream(server.backend(), cause);
        let mut lease = pools.lease(server.backend()).await.map_err(|error| failed(error.into()))?;
        let answer = lease.send(request).await.map_err(|error| failed(error.into()))?;
        let (head, body) = answer.into_parts();
        Ok((head, Self { lease, body, server }))
    }

    /// The next data of the body. Trailers are not passed on: SGLang sends none.
    pub(super) fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Error>>> {
        loop {
            let data = match ready!(self.lease.poll_frame(&mut self.body, cx)) {
                None => None,
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => Some(Ok(data)),
                    Err(_trailers) => continue,
                },
                Some(Err(error)) => Some(Err(Error::upstream(self.server.backend(), error))),
            };
            return Poll::Ready(data);
        }
    }

    async fn data(&mut self) -> Option<Result<Bytes, Error>> {
        std::future::poll_fn(|cx| self.poll_data(cx)).await
    }

    /// The whole body, which may have `limit` bytes, and the connection back to the pool.
    pub(super) async fn collect(mut self, limit: usize) -> Result<Bytes, Error> {
        let mut whole = BytesMut::new();
        while let Some(data) = self.data().await.transpose()? {
            if whole.len() + data.len() > limit {
                return Err(Error::upstream(self.server.backend(), Cause::TooLarge { limit }));
            }
            whole.extend_from_slice(&data);
        }
        self.park();
        Ok(whole.freeze())
    }

    /// Reads the body to its end and throws it away, and gives the connection back to the pool.
    async fn drain(mut self) -> Result<(), Error> {
        while self.data().await.transpose()?.is_some() {}
        self.park();
        Ok(())
    }

    /// Gives the connection back. Only for a leg whose body has ended.
    pub(super) fn park(self) {
        self.lease.park();
    }

    /// Whether a body of announced length has been read to its end. Of a chunked body this is never known before
    /// its end was asked for.
    pub(super) fn is_ended(&self) -> bool {
        self.body.is_end_stream()
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }

    pub(super) fn server(&self) -> &InFlight {
        &self.server
    }
}

/// Largest error answer of a prefill server that is passed on.
const MAX_REFUSAL: usize = 1 << 20;

/// How a prefill leg ended, if it came to an answer.
pub(super) enum PrefillEnd {
    /// The answer's body, or nothing of it when nobody wants it.
    Answered(Bytes),
    /// An answer that says no.
    Refused(Response<Bytes>),
}

/// A prefill leg under way. It is boxed because it is handed on as it stands: from waiting for decode's head, to
/// the answer's body, to a task of its own when decode is done first.
pub(super) type PrefillRun = Pin<Box<dyn Future<Output = Result<PrefillEnd, Error>> + Send>>;

/// Starts a prefill leg. Its answer is kept only if `keep` says up to which size; otherwise it is drained, so that
/// the server can finish in peace and the connection is used again.
pub(super) fn run_prefill(
    pools: Arc<Pools>,
    server: InFlight,
    request: Request<LegBody>,
    keep: Option<usize>,
) -> PrefillRun {
    Box::pin(async move {
        let (head, leg) = Leg::start(&pools, server, request).await?;
        if !head.status.is_success() {
            let body = leg.collect(MAX_REFUSAL).await?;
            return Ok(PrefillEnd::Refused(Response::from_parts(head, body)));
        }
        match keep {
            Some(limit) => leg.collect(limit).await.map(PrefillEnd::Answered),
            None => leg.drain().await.map(|()| PrefillEnd::Answered(Bytes::new())),
        }
    })
}
