//! One client connection: its requests one after the other, and how it is closed.
//!
//! How a connection begins is for [`opening`](super::negotiate) to find out, how HTTP/1.1 is read and written for
//! [`http1`](super::http1), and what is answered for [`service`](super::service).

use std::io;
use std::net::Shutdown;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use hyper::Method;
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::sync::watch;

use super::http1::{ClientTimeouts, Http1, NextRequest, WriteOptions, WriteOutcome};
use super::http2;
use super::negotiate::{Negotiated, Negotiator};
use super::response::ClientResponse;
use super::service::Service;
use super::stream::ClientStream;
use crate::error::Error;
use crate::http1::{RequestFraming, RequestHead};
use crate::observe::metrics::WorkerMetrics;
use crate::observe::record::RequestId;
use crate::proxy::RequestBody;
use crate::timer::Timer;

/// How long the rest of a request that was refused is read and thrown away. Closing a socket with unread bytes
/// resets the connection, and the client may lose the answer.
pub(crate) const LINGER: Duration = Duration::from_secs(1);
/// Bytes that are thrown away at a time.
const DISCARDED_AT_ONCE: usize = 4 << 10;

/// Who answers the requests of a connection, one at a time.
pub(crate) trait ConnectionHandler {
    /// Reads what is wanted of a request's body, and answers it. `None`: the client has left.
    fn answer(
        &self,
        connection: &mut Http1,
        head: RequestHead,
        timer: &mut Timer,
    ) -> impl Future<Output = Option<ClientResponse>> + Send;

    /// Whether no more requests are wanted.
    fn is_over(&self) -> bool;

    /// Tells of a request that could not be read, and gives its answer a name.
    fn log_rejected_before_parse(&self, error: &Error) -> RequestId;

    /// Where the router's own time is counted.
    fn metrics(&self) -> Option<&WorkerMetrics>;
}

/// How a connection goes on, or ends.
enum NextStep {
    NextRequest,
    /// The client knows that the connection ends.
    End,
    /// The client may still be sending, and must not lose its answer.
    Linger,
    /// The client has left, or must see that its answer is not complete.
    Cut,
}

/// Serves a connection to its end. It ends after the request under way when `closing` changes.
pub(crate) async fn serve(
    socket: TcpStream,
    service: Arc<Service>,
    front: Negotiator,
    patience: ClientTimeouts,
    mut closing: watch::Receiver<()>,
) {
    if front.is_plain() {
        return serve_http1(ClientStream::Plain(socket), &*service, patience, closing).await;
    }
    let opened = tokio::select! {
        opened = front.open(socket, patience, &*service) => opened,
        _ = closing.changed() => None,
    };
    // Boxed, so that a plain connection takes no more memory than it did.
    match opened {
        None => {}
        Some(Negotiated::Http1(stream)) => Box::pin(serve_http1(stream, &*service, patience, closing)).await,
        Some(Negotiated::Http2(stream)) => {
            Box::pin(http2::serve(stream, service, front.max_streams, patience, closing)).await;
        }
    }
}

impl ConnectionHandler for Service {
    async fn answer(
        &self,
        connection: &mut Http1,
        head: RequestHead,
        timer: &mut Timer,
    ) -> Option<ClientResponse> {
        Self::answer(self, head, connection, timer).await
    }

    fn is_over(&self) -> bool {
        self.is_draining()
    }

    fn log_rejected_before_parse(&self, error: &Error) -> RequestId {
        self.metrics.log_rejected_before_parse(error.status().as_u16(), error.code());
        self.reporter.log_rejected_before_parse(error)
    }

    fn metrics(&self) -> Option<&WorkerMetrics> {
        Some(&self.metrics)
    }
}

/// Answers requests over HTTP/1 until the connection ends, and closes it.
pub(crate) async fn serve_http1(
    stream: ClientStream,
    who: &impl ConnectionHandler,
    patience: ClientTimeouts,
    closing: watch::Receiver<()>,
) {
    let mut connection = Http1::new(stream);
    // One for all waits of the connection.
    let mut timer = Timer::default();
    let mut watched = closing.clone();
    let mut end = pin!(async move { watched.changed().await.unwrap_or(()) });
    let then = loop {
        match connection.next(&mut timer, patience, end.as_mut()).await {
            NextRequest::Request(head, manner) => {
                let is_over = || who.is_over() || closing.has_changed().unwrap_or(true);
                match exchange(&mut connection, who, head, manner, is_over, &mut timer, patience).await {
                    NextStep::NextRequest => {}
                    then => break then,
                }
            }
            NextRequest::Refused(error) => {
                let id = who.log_rejected_before_parse(&error);
                return refuse(connection.into_stream(), &error, &id).await;
            }
            NextRequest::Closed | NextRequest::Idle | NextRequest::Ended => break NextStep::End,
        }
    };
    close(connection.into_stream(), then).await;
}

/// Answers one request.
async fn exchange(
    connection: &mut Http1,
    who: &impl ConnectionHandler,
    head: RequestHead,
    manner: RequestFraming,
    is_over: impl Fn() -> bool,
    timer: &mut Timer,
    patience: ClientTimeouts,
) -> NextStep {
    let head_only = head.method == Method::HEAD;
    let Some(answer) = who.answer(connection, head, timer).await else { return NextStep::Cut };
    // What is left of the body would be taken for the next request.
    let is_cut_short = answer.closes || !connection.is_ended();
    let keeps_alive = manner.keeps_alive && !is_cut_short && !is_over();
    let delivery = WriteOptions { is_http_11: manner.is_http_11, head_only, keeps_alive };
    match connection.send(answer, delivery, timer, patience, who.metrics()).await {
        WriteOutcome::KeptAlive => NextStep::NextRequest,
        WriteOutcome::Last if is_cut_short => NextStep::Linger,
        WriteOutcome::Last => NextStep::End,
        WriteOutcome::CutOff | WriteOutcome::Left => NextStep::Cut,
    }
}

async fn close(mut stream: ClientStream, then: NextStep) {
    match then {
        NextStep::NextRequest | NextStep::Cut => {}
        NextStep::End => say_end(&mut stream).await,
        NextStep::Linger => linger(stream).await,
    }
}

/// Closes a connection with an error for a last word.
pub(crate) async fn refuse(mut stream: ClientStream, error: &Error, id: &RequestId) {
    let word = raw(error, id);
    let _ = tokio::time::timeout(LINGER, stream.say(word.as_bytes())).await;
    linger(stream).await;
}

/// For a client that knows already that the connection ends.
async fn say_end(stream: &mut ClientStream) {
    let _ = tokio::time::timeout(LINGER, stream.say_end()).await;
}

/// An error as it goes over the wire.
fn raw(error: &Error, id: &RequestId) -> String {
    let (status, body, id) = (error.status(), error.to_json(), id.as_str());
    format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\nx-request-id: {id}\r\n\r\n{body}",
        body.len(),
    )
}

/// Says that nothing more will come, and reads until the client has understood.
async fn linger(mut stream: ClientStream) {
    say_end(&mut stream).await;
    let Some(socket) = stream.socket() else { return };
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
