//! One client connection: how long it may wait, and how it is closed.
//!
//! hyper reads heads and writes answers. Its own head timeout cannot tell an idle
//! connection from a slow head, so both are timed here, with one timer a connection
//! that is set again only when it has gone off, or goes off too late.

use std::convert::Infallible;
use std::io;
use std::net::Shutdown;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::Request;
use hyper::body::Incoming;
use hyper::header::HeaderValue;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, Sleep, sleep};
use tracing::debug;

use super::activity::{Activity, AnswerBody, Busy, Waiting, Watched};
use super::http2;
use super::opening::{Front, Opened};
use super::service::Service;
use super::stream::ClientStream;
use crate::error::Error;
use crate::report::Reporter;
use crate::timer::poll_until;

/// Longest head of a request; a longer one gets a 431. hyper bounds its headers to 100 by itself; said here, they
/// would cost an allocation a request.
pub(super) const MAX_HEAD_SIZE: usize = 64 << 10;
/// What is read of a request at a time. hyper goes up to 400 KiB by itself, and what a read leaves free is lost for as
/// long as the body is kept: then 64 MiB of bodies took 105 MiB.
const MAX_READ: usize = 128 << 10;
/// How long the rest of a request that was refused is read and thrown away. Closing a socket with unread bytes
/// resets the connection, and the client may lose the answer.
pub(super) const LINGER: Duration = Duration::from_secs(1);
/// Bytes that are thrown away at a time.
const DISCARDED_AT_ONCE: usize = 4 << 10;

/// How long a connection may wait for a request.
#[derive(Clone, Copy)]
pub(super) struct Patience {
    /// From the first byte of a head to its last.
    pub(super) head: Duration,
    /// From an answer's last byte to the next head's first.
    pub(super) idle: Duration,
}

/// How a connection ended.
enum End {
    Idle,
    SlowHead,
    /// By hyper's word: the client left, asked to close, or was refused.
    Done(hyper::Result<()>),
}

/// Serves a connection to its end. It ends after the requests under way when `closing` changes.
pub(super) async fn serve(
    socket: TcpStream,
    service: Arc<Service>,
    front: Front,
    patience: Patience,
    mut closing: watch::Receiver<()>,
) {
    if front.is_plain() {
        return serve_http1(ClientStream::Plain(socket), service, patience, closing).await;
    }
    let opened = tokio::select! {
        opened = front.open(socket, patience, &service.reporter) => opened,
        _ = closing.changed() => None,
    };
    // Boxed, so that a plain connection takes no more memory than it did.
    match opened {
        None => {}
        Some(Opened::Http1(stream)) => Box::pin(serve_http1(stream, service, patience, closing)).await,
        Some(Opened::Http2(stream)) => {
            Box::pin(http2::serve(stream, service, front.max_streams, patience, closing)).await;
        }
    }
}

async fn serve_http1(
    stream: ClientStream,
    service: Arc<Service>,
    patience: Patience,
    mut closing: watch::Receiver<()>,
) {
    let activity = Arc::new(Activity::new(stream.socket().peer_addr().ok(), Arc::clone(&service.metrics)));
    let reporter = Arc::clone(&service.reporter);
    let answer = {
        let activity = Arc::clone(&activity);
        move |request: Request<Incoming>| {
            let (service, busy) = (Arc::clone(&service), Busy::begin(&activity));
            // hyper would keep a place of its size for as long as the connection lives, and a stream lives long.
            Box::pin(async move {
                let mut record = service.recorder.begin();
                let (answer, place) = service.answer(request, busy.activity(), &mut record).await;
                Ok::<_, Infallible>(answer.map(|body| AnswerBody::new(body, busy, place, record)))
            })
        }
    };
    let io = TokioIo::new(Watched::new(stream, Arc::clone(&activity)));
    let mut builder = http1::Builder::new();
    builder.header_read_timeout(None).max_header_size(MAX_HEAD_SIZE).max_buf_size(MAX_READ);
    let mut connection = builder.serve_connection(io, service_fn(answer));

    let mut closed = pin!(closing.changed());
    let mut is_closing = false;
    let mut wait = Wait { activity: &activity, patience, since: Instant::now() };
    let mut timer = pin!(sleep(patience.idle));
    let end = std::future::poll_fn(|cx| {
        if !is_closing && closed.as_mut().poll(cx).is_ready() {
            is_closing = true;
            Pin::new(&mut connection).graceful_shutdown();
        }
        match Pin::new(&mut connection).poll(cx) {
            Poll::Ready(done) => Poll::Ready(End::Done(done)),
            Poll::Pending => wait.poll(timer.as_mut(), cx),
        }
    });
    let end = end.await;
    let stream = connection.into_parts().io.into_inner().into_stream();
    close(stream, end, &activity, patience, &reporter).await;
}

/// The wait for a head, or for the rest of it.
struct Wait<'a> {
    activity: &'a Activity,
    patience: Patience,
    since: Instant,
}

impl Wait<'_> {
    /// Ends when the wait has taken too long. To be called whenever something may have happened.
    fn poll(&mut self, timer: Pin<&mut Sleep>, cx: &mut Context<'_>) -> Poll<End> {
        let Some(waiting) = self.activity.waiting() else { return Poll::Pending };
        if self.activity.take_touched() {
            self.since = Instant::now();
        }
        let (limit, end) = match waiting {
            Waiting::ForHead => (self.patience.idle, End::Idle),
            Waiting::ForRestOfHead => (self.patience.head, End::SlowHead),
        };
        poll_until(timer, self.since + limit, cx).map(|()| end)
    }
}

/// Closes a connection, with a last word where hyper had none.
async fn close(
    mut stream: ClientStream,
    end: End,
    activity: &Activity,
    patience: Patience,
    reporter: &Reporter,
) {
    let error = match end {
        End::Idle => {
            debug!("a client connection was idle for {:?}", patience.idle);
            return say_end(&mut stream).await;
        }
        End::SlowHead => {
            let what = "the rest of the request's head";
            Some(Error::RequestTimeout { what, after: patience.head })
        }
        End::Done(Ok(())) if activity.is_cut_short() => None,
        End::Done(Err(error)) if error.is_parse_version_h2() => {
            Some(Error::BadRequest("HTTP/2 is not spoken here"))
        }
        End::Done(Err(error)) if error.is_parse() => None,
        End::Done(Ok(())) => return say_end(&mut stream).await,
        End::Done(Err(error)) => return debug!("a client connection ended: {error}"),
    };
    // In the middle of an unread answer it would be taken for a part of it.
    match error.filter(|_| !activity.is_blocked()) {
        Some(error) => refuse(stream, &error, reporter).await,
        None => linger(stream).await,
    }
}

/// Closes a connection with an error for a last word.
pub(super) async fn refuse(mut stream: ClientStream, error: &Error, reporter: &Reporter) {
    let word = raw(error, &reporter.unheard(error));
    let _ = tokio::time::timeout(LINGER, stream.say(word.as_bytes())).await;
    linger(stream).await;
}

/// For a client that knows already that the connection ends.
async fn say_end(stream: &mut ClientStream) {
    let _ = tokio::time::timeout(LINGER, stream.say_end()).await;
}

/// An error as it goes over the wire.
fn raw(error: &Error, id: &HeaderValue) -> String {
    let (status, body, id) = (error.status(), error.to_json(), id.to_str().unwrap_or("-"));
    format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\nx-request-id: {id}\r\n\r\n{body}",
        body.len(),
    )
}

/// Says that nothing more will come, and reads until the client has understood.
async fn linger(mut stream: ClientStream) {
    say_end(&mut stream).await;
    let socket = stream.socket();
    if SockRef::from(socket).shutdown(Shutdown::Write).is_err() {
        return;
    }
    let read_out = async { while socket.readable().await.is_ok() && discard(socket) {} };
    let _ = tokio::time::timeout(LINGER, read_out).await;
}

/// Throws away what has come. Returns whether more may come.
fn discard(socket: &TcpStream) -> bool {
    match socket.try_read(&mut [0; DISCARDED_AT_ONCE]) {
        Ok(count) => count > 0,
        Err(error) => error.kind() == io::ErrorKind::WouldBlock,
    }
}
