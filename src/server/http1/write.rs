//! Answers, written as HTTP/1 as soon as any of them is there.
//!
//! What is there at a time goes out with one write, the head with the first of the
//! body. Small pieces are put together in a buffer that all connections of a thread
//! share; large ones are handed to the kernel where they are.

use std::cell::{Cell, RefCell};
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::SystemTime;

use bytes::buf::Chain;
use bytes::{Buf, Bytes};
use hyper::StatusCode;
use hyper::body::Body;
use tokio::io::AsyncWrite;
use tokio::time::Instant;

use super::{ClientTimeouts, Http1};
use crate::observe::metrics::WorkerMetrics;
use crate::server::response::{ClientResponse, ClientResponseBody};
use crate::server::stream::ClientStream;
use crate::timer::Timer;
use crate::wire::client_response::ClientResponseHead;
use crate::wire::headers::write_line;
use crate::wire::segments::SegmentedBytes;

/// A piece of a body up to this size is copied behind what goes before it, which costs less than handing over two.
const COPY_UP_TO: usize = 4 << 10;
/// When so much is there to be written, nothing is added to it.
const ENOUGH: usize = 64 << 10;
/// Pieces that are written at a time.
const MAX_SLICES: usize = 64;

thread_local! {
    /// Where what is written next is put together, by any connection of this thread.
    static OUTPUT: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// What became of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WriteOutcome {
    /// All of it is written, and the connection may have another request.
    KeptAlive,
    /// All of it is written, and the client knows that it was the last one.
    Last,
    /// It is not complete, and never will be.
    CutOff,
    /// The client has left, or takes nothing.
    Left,
}

/// How an answer goes over the connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WriteOptions {
    pub(crate) is_http_11: bool,
    /// Only the head was asked for.
    pub(crate) head_only: bool,
    /// The connection may have another request.
    pub(crate) keeps_alive: bool,
}

/// How a client knows where a body ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ResponseFraming {
    /// By the head.
    SpanItem,
    Chunked,
    /// By the connection's end: HTTP/1.0 has no chunks.
    UntilClose,
}

/// What the kernel has not taken yet: put together, pieces of a body, and what comes behind them.
pub(super) type PendingWrite = Chain<Chain<Bytes, SegmentedBytes>, &'static [u8]>;

/// Something to be written.
pub(super) fn unsent(text: Bytes, pieces: SegmentedBytes, end: &'static [u8]) -> PendingWrite {
    text.chain(pieces).chain(end)
}

/// What of an answer is there to be written, besides the text that was put together.
struct WriteBatch {
    pieces: SegmentedBytes,
    end: &'static [u8],
    then: BodyStep,
}

/// What a body does next.
#[derive(Clone, Copy, PartialEq, Eq)]
enum BodyStep {
    GoesOn,
    /// The task is woken when there is more.
    Waits,
    Ends,
    Fails,
}

impl Http1 {
    /// Writes an answer. `timer` is one for all waits of the connection.
    pub(crate) async fn send(
        &mut self,
        answer: ClientResponse,
        mut delivery: WriteOptions,
        timer: &mut Timer,
        patience: ClientTimeouts,
        metrics: Option<&WorkerMetrics>,
    ) -> WriteOutcome {
        let ClientResponse { head, body, .. } = answer;
        let (mut head, mut body) = (Some(head), Some(body));
        let mut framing = ResponseFraming::SpanItem;
        let mut end = WriteOutcome::CutOff;
        // Of decode's first byte, until it is written.
        let mut first_came = None;
        let mut stalled = Stalled::default();
        std::future::poll_fn(|cx| {
            let mut waits = false;
            loop {
                match self.poll_flush(cx) {
                    Poll::Ready(Ok(())) => stalled = Stalled::default(),
                    Poll::Pending if self.poll_disconnect(cx).is_pending() => {
                        let since = stalled.since(self.unsent.remaining());
                        return timer.poll_until(since + patience.idle, cx).map(|()| WriteOutcome::Left);
                    }
                    _ => return Poll::Ready(WriteOutcome::Left),
                }
                if let (Some(came), Some(metrics)) = (first_came.take(), metrics) {
                    metrics.relayed(std::time::Instant::elapsed(&came));
                }
                let Some(open) = &mut body else { return Poll::Ready(end) };
                if waits {
                    return self.poll_disconnect(cx).map(|()| WriteOutcome::Left);
                }
                let mut text = OUTPUT.take();
                text.clear();
                if let Some(head) = head.take() {
                    framing = write_head(&head, open, &mut delivery, &mut text);
                }
                let WriteBatch { pieces, end: behind, then } = gather(open, framing, cx, &mut text);
                first_came = open.take_first_came();
                waits = then == BodyStep::Waits;
                if matches!(then, BodyStep::Ends | BodyStep::Fails) {
                    // Its record is finished before the client can know of its end.
                    body = None;
                    end = match then {
                        BodyStep::Fails => WriteOutcome::CutOff,
                        _ if delivery.keeps_alive => WriteOutcome::KeptAlive,
                        _ => WriteOutcome::Last,
                    };
                }
                let written = self.write(cx, &text, pieces, behind);
                OUTPUT.set(text);
                if written.is_err() {
                    return Poll::Ready(WriteOutcome::Left);
                }
            }
        })
        .await
    }

    /// Writes what the kernel takes, and keeps the rest.
    fn write(
        &mut self,
        cx: &mut Context<'_>,
        text: &[u8],
        pieces: SegmentedBytes,
        end: &'static [u8],
    ) -> io::Result<()> {
        let mut all = text.chain(pieces).chain(end);
        if let Poll::Ready(written) = poll_write(&mut self.stream, cx, &mut all) {
            return written;
        }
        let (begin, end) = all.into_inner();
        let (text, pieces) = begin.into_inner();
        self.unsent = unsent(Bytes::copy_from_slice(text), pieces, end);
        Ok(())
    }

    /// Writes what the kernel has not taken yet.
    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.unsent.has_remaining() {
            ready!(poll_write(&mut self.stream, cx, &mut self.unsent))?;
            // What was held is held no longer.
            self.unsent = unsent(Bytes::new(), SegmentedBytes::default(), b"");
        }
        if self.stream.is_plain() { Poll::Ready(Ok(())) } else { Pin::new(&mut self.stream).poll_flush(cx) }
    }
}

/// How long the client has taken nothing of what there is.
#[derive(Default)]
struct Stalled {
    since: Option<Instant>,
    left: usize,
}

impl Stalled {
    fn since(&mut self, left: usize) -> Instant {
        if std::mem::replace(&mut self.left, left) != left {
            self.since = None;
        }
        *self.since.get_or_insert_with(Instant::now)
    }
}

/// Writes all of it, or what the kernel takes.
fn poll_write(stream: &mut ClientStream, cx: &mut Context<'_>, data: &mut impl Buf) -> Poll<io::Result<()>> {
    while data.has_remaining() {
        let mut stream = Pin::new(&mut *stream);
        let written = if data.chunk().len() == data.remaining() {
            ready!(stream.as_mut().poll_write(cx, data.chunk()))?
        } else {
            let mut slices = [IoSlice::new(&[]); MAX_SLICES];
            let count = data.chunks_vectored(&mut slices);
            ready!(stream.as_mut().poll_write_vectored(cx, &slices[..count]))?
        };
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        data.advance(written);
    }
    Poll::Ready(Ok(()))
}

/// Takes what there is of a body: small pieces behind the text, or one that is large.
fn gather(
    body: &mut ClientResponseBody,
    framing: ResponseFraming,
    cx: &mut Context<'_>,
    text: &mut Vec<u8>,
) -> WriteBatch {
    let only = |then| WriteBatch { pieces: SegmentedBytes::default(), end: b"", then };
    let is_chunked = framing == ResponseFraming::Chunked;
    while text.len() < ENOUGH {
        let data = match Pin::new(&mut *body).poll_frame(cx) {
            Poll::Pending => return only(BodyStep::Waits),
            Poll::Ready(Some(Err(_))) => return only(BodyStep::Fails),
            Poll::Ready(Some(Ok(frame))) => frame.into_data().unwrap_or_default(),
            Poll::Ready(None) => {
                text.extend_from_slice(if is_chunked { LAST_CHUNK } else { b"" });
                return only(BodyStep::Ends);
            }
        };
        // An empty chunk would be the last.
        if data.is_empty() {
            continue;
        }
        if is_chunked {
            write_size(data.len(), text);
        }
        let then = if body.is_end_stream() { BodyStep::Ends } else { BodyStep::GoesOn };
        let end: &'static [u8] = match (is_chunked, then) {
            (false, _) => b"",
            (true, BodyStep::Ends) => b"\r\n0\r\n\r\n",
            (true, _) => b"\r\n",
        };
        if data.len() > COPY_UP_TO {
            return WriteBatch { pieces: data, end, then };
        }
        copy(data, text);
        text.extend_from_slice(end);
        if then == BodyStep::Ends {
            return only(then);
        }
    }
    only(BodyStep::GoesOn)
}

const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

fn copy(mut data: SegmentedBytes, text: &mut Vec<u8>) {
    while data.has_remaining() {
        let chunk = data.chunk();
        text.extend_from_slice(chunk);
        data.advance(chunk.len());
    }
}

/// A chunk's size, and the end of its line.
fn write_size(size: usize, text: &mut Vec<u8>) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digits = (usize::BITS - size.leading_zeros()).div_ceil(4).max(1);
    text.extend((0..digits).rev().map(|place| DIGITS[size >> (4 * place) & 15]));
    text.extend_from_slice(b"\r\n");
}

/// Writes the head of an answer. What it can't keep of the delivery, it changes.
fn write_head(
    head: &ClientResponseHead,
    body: &mut ClientResponseBody,
    delivery: &mut WriteOptions,
    text: &mut Vec<u8>,
) -> ResponseFraming {
    head.write(delivery.is_http_11, text);
    if let Some(id) = body.id() {
        write_line(b"x-request-id", id.as_bytes(), text);
    }
    if !head.has_date() {
        write_date(text);
    }
    let framing = write_framing(head, body, delivery.is_http_11, text);
    delivery.keeps_alive &= framing != ResponseFraming::UntilClose;
    match (delivery.keeps_alive, delivery.is_http_11) {
        (true, true) => {}
        (true, false) => write_line(b"connection", b"keep-alive", text),
        (false, _) => write_line(b"connection", b"close", text),
    }
    text.extend_from_slice(b"\r\n");
    if delivery.head_only {
        body.empty();
        return ResponseFraming::SpanItem;
    }
    framing
}

/// Says how long the body is, or else how its end is told (RFC 9112, section 6).
fn write_framing(
    head: &ClientResponseHead,
    body: &ClientResponseBody,
    is_http_11: bool,
    text: &mut Vec<u8>,
) -> ResponseFraming {
    let status = head.status();
    let has_none =
        status.is_informational() || [StatusCode::NO_CONTENT, StatusCode::NOT_MODIFIED].contains(&status);
    if has_none || head.has_length() {
        return ResponseFraming::SpanItem;
    }
    if let Some(length) = body.size_hint().exact() {
        write_line(b"content-length", itoa::Buffer::new().format(length).as_bytes(), text);
        return ResponseFraming::SpanItem;
    }
    if !is_http_11 {
        return ResponseFraming::UntilClose;
    }
    write_line(b"transfer-encoding", b"chunked", text);
    ResponseFraming::Chunked
}

/// Whoever has a clock says when an answer was made (RFC 9110, section 6.6.1). Servers' answers have their own.
fn write_date(text: &mut Vec<u8>) {
    thread_local! {
        /// The last date written, and of which second it is.
        static DATE: RefCell<(u64, String)> = const { RefCell::new((0, String::new())) };
    }
    let now = SystemTime::now();
    let second = now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    DATE.with_borrow_mut(|(written, date)| {
        if *written != second || date.is_empty() {
            (*written, *date) = (second, httpdate::fmt_http_date(now));
        }
        write_line(b"date", date.as_bytes(), text);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_hexadecimal_without_zeros_in_front() {
        for size in [1, 9, 15, 16, 255, 256, 4_096, 65_535, 1 << 20, usize::MAX] {
            let mut text = Vec::new();
            write_size(size, &mut text);
            assert_eq!(text, format!("{size:x}\r\n").into_bytes());
        }
    }

    #[test]
    fn a_date_is_one_of_http() {
        let mut text = Vec::new();
        write_date(&mut text);
        write_date(&mut text);
        let text = String::from_utf8(text).unwrap();
        let dates: Vec<&str> =
            text.split_terminator("\r\n").map(|line| line.strip_prefix("date: ").unwrap()).collect();
        assert_eq!(dates.len(), 2);
        let age = SystemTime::now().duration_since(httpdate::parse_http_date(dates[0]).unwrap()).unwrap();
        assert!(age.as_secs() < 5, "{text}");
    }
}
