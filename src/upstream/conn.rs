//! One HTTP/1.1 connection to a server, driven by whoever uses it.
//!
//! hyper hands out a connection as two halves: a sender, and a driver that does
//! the reading and writing. The usual way is a task for the driver. Here it is
//! polled inline, by the request that holds the connection: that saves a wake-up
//! and a channel hop for every frame (measured on streams of 64 tokens: 3.5 times
//! the CPU with a task, and a write call a token). The price: a connection that
//! nobody holds is polled by nobody, so [`Conn::is_usable`] looks at it before use.

use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;

use super::socket::{Heard, Socket, Stream};
use crate::wire::body::LegBody;

pub(super) struct Conn {
    sender: SendRequest<LegBody>,
    driver: http1::Connection<TokioIo<Socket>, LegBody>,
    heard: Heard,
    /// It has carried a request before.
    used: bool,
}

/// Why a request has no answer.
#[derive(Debug)]
pub(crate) struct SendError {
    pub(crate) cause: hyper::Error,
    /// The connection had been idle, and it died without a byte: the server had closed it before the request
    /// came, as servers do that bound their keep-alive.
    pub(crate) unseen: bool,
}

impl Conn {
    /// Boxed, once a connection: what it consists of is large, and leases are moved from hand to hand several times a
    /// request (copying them was a quarter of a small request's instructions).
    pub(super) async fn handshake(stream: Stream) -> hyper::Result<Box<Self>> {
        let (socket, heard) = Socket::new(stream);
        let (sender, driver) = http1::Builder::new().handshake(TokioIo::new(socket)).await?;
        Ok(Box::new(Self { sender, driver, heard, used: false }))
    }

    /// Whether an idle connection can take a request: the server has neither closed it nor sent anything since.
    pub(super) fn is_usable(&mut self) -> bool {
        // No waker is needed: the next poll, with one, is that of the request that follows.
        let mut cx = Context::from_waker(Waker::noop());
        Pin::new(&mut self.driver).poll(&mut cx).is_pending() && self.sender.is_ready()
    }

    /// Sends a request and waits for the head of its answer.
    pub(super) async fn send(&mut self, request: Request<LegBody>) -> Result<Response<Incoming>, SendError> {
        self.heard.reset();
        let reused = std::mem::replace(&mut self.used, true);
        let answer = self.exchange(request).await;
        answer.map_err(|cause| SendError { cause, unseen: reused && !self.heard.anything() })
    }

    async fn exchange(&mut self, request: Request<LegBody>) -> hyper::Result<Response<Incoming>> {
        let mut answer = pin!(self.sender.send_request(request));
        let driver = &mut self.driver;
        std::future::poll_fn(|cx| {
            // The driver first: only then can an answer be there. A driver that has ended has told the answer why.
            let driven = Pin::new(&mut *driver).poll(cx);
            match (answer.as_mut().poll(cx), driven) {
                (Poll::Ready(answer), _) => Poll::Ready(answer),
                (Poll::Pending, Poll::Ready(Err(error))) => Poll::Ready(Err(error)),
                (Poll::Pending, _) => Poll::Pending,
            }
        })
        .await
    }

    /// The next frame of an answer's body.
    pub(super) fn poll_frame(
        &mut self,
        body: &mut Incoming,
        cx: &mut Context<'_>,
    ) -> Poll<Option<hyper::Result<Frame<Bytes>>>> {
        if let Poll::Ready(frame) = Pin::new(&mut *body).poll_frame(cx) {
            return Poll::Ready(frame);
        }
        let driven = Pin::new(&mut self.driver).poll(cx);
        match (Pin::new(body).poll_frame(cx), driven) {
            (Poll::Pending, Poll::Ready(Err(error))) => Poll::Ready(Some(Err(error))),
            (frame, _) => frame,
        }
    }
}
