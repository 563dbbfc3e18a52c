//! Writes HTTP/1 responses, each part as soon as it is ready.
//!
//! What is ready at the same time goes out with one write, the head together with the first data of the body.
//! Small chunks are copied into a buffer that all connections of a thread share; large ones are written from
//! where they are. What a response means is not known here.

use std::cell::{Cell, RefCell};
use std::io;
use std::task::{Context, Poll};
use std::time::SystemTime;

use bytes::{Buf, Bytes};
use hyper::StatusCode;
use tokio::time::Instant;

use super::io::poll_write_all;
use super::server::{ClientTimeouts, ServerConnection};
use crate::timer::Timer;

/// A chunk up to this size is copied into the batch, which costs less than a `writev` of two buffers.
const COPY_UP_TO: usize = 4 << 10;
/// A batch of this size is written before more is added to it.
const FULL_BATCH: usize = 64 << 10;
/// The end of a chunked body (RFC 9112, section 7.1).
const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

thread_local! {
    /// The batch buffer of all connections of this thread.
    static OUTPUT: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// A response as the writer sees it.
pub(crate) trait OutgoingResponse: Send {
    type Data: Buf + Send + Sync + 'static;

    /// Writes the status line and the header lines, without framing and without the empty line at their end.
    /// Called once, first.
    fn write_head(&mut self, is_http_11: bool, into: &mut Vec<u8>) -> HeadSummary;

    /// The next data of the body. An error means that the body will not be complete.
    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Self::Data, Incomplete>>>;

    /// Whether all of the body was returned. It may be `false` until [`poll_data`](Self::poll_data) returns
    /// `None`.
    fn is_ended(&self) -> bool;

    /// The body's length, if it is known.
    fn exact_length(&self) -> Option<u64>;

    /// Drops the body: only the head was asked for.
    fn skip_body(&mut self);

    /// When the last data's first byte arrived, if the time until it is written is to be measured.
    fn take_first_byte(&mut self) -> Option<std::time::Instant>;
}

/// What the framing depends on in a head.
pub(crate) struct HeadSummary {
    pub(crate) status: StatusCode,
    pub(crate) has_content_length: bool,
    pub(crate) has_date: bool,
}

/// The body ended with an error, which its source has recorded.
pub(crate) struct Incomplete;

/// How the write of a response ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WriteOutcome {
    /// All of it was written, and the connection may be reused.
    KeptAlive,
    /// All of it was written, and the client knows that the connection ends.
    Last,
    /// The body failed. The client sees that the end of its framing is missing.
    CutOff,
    /// The body failed, and is close-delimited: an orderly close would look like its end.
    Truncated,
    /// The client closed the connection, or stopped reading.
    Disconnected,
}

/// How a response is written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WriteOptions {
    pub(crate) is_http_11: bool,
    /// Only the head was asked for.
    pub(crate) head_only: bool,
    /// The connection may be reused.
    pub(crate) keep_alive: bool,
}

/// How the client knows where the body ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ResponseFraming {
    /// By the head: a length, or no body.
    FromHead,
    Chunked,
    /// By the close of the connection: HTTP/1.0 has no chunks.
    UntilClose,
}

/// What is ready to be written, besides the batch buffer.
struct WriteBatch<D> {
    /// A chunk that is too large to copy.
    data: Option<D>,
    /// The framing after it.
    end: &'static [u8],
    next: BodyStep,
}

/// What the body does next.
#[derive(Clone, Copy, PartialEq, Eq)]
enum BodyStep {
    Continues,
    /// Nothing is ready. The task is woken when there is more.
    Pending,
    Ends,
    Fails,
}

impl ServerConnection {
    /// Writes a response. `timer` serves all waits of the connection; `written` gets the time from
    /// [`OutgoingResponse::take_first_byte`] until the kernel accepted that byte.
    pub(crate) async fn send<R: OutgoingResponse>(
        &mut self,
        response: R,
        mut options: WriteOptions,
        timer: &mut Timer,
        timeouts: ClientTimeouts,
        written: impl Fn(std::time::Duration) + Send,
    ) -> WriteOutcome {
        let mut response = Some(response);
        let mut framing = None;
        let mut outcome = WriteOutcome::CutOff;
        let mut first_byte = None;
        let mut stall = Stall::default();
        std::future::poll_fn(|cx| {
            let mut is_pending = false;
            loop {
                match self.poll_flush(cx) {
                    Poll::Ready(Ok(())) => stall = Stall::default(),
                    Poll::Pending if self.poll_disconnect(cx).is_pending() => {
                        let since = stall.since(self.unwritten());
                        let timed_out = timer.poll_until(since + timeouts.idle, cx);
                        return timed_out.map(|()| WriteOutcome::Disconnected);
                    }
                    _ => return Poll::Ready(WriteOutcome::Disconnected),
                }
                if let Some(arrived) = first_byte.take() {
                    written(std::time::Instant::elapsed(&arrived));
                }
                let Some(open) = &mut response else { return Poll::Ready(outcome) };
                // Nothing to write: if the client closes now, both legs end at once.
                if is_pending {
                    return self.poll_disconnect(cx).map(|()| WriteOutcome::Disconnected);
                }
                let mut text = OUTPUT.take();
                text.clear();
                let framing = *framing.get_or_insert_with(|| write_head(open, &mut options, &mut text));
                let WriteBatch { data, end, next } = gather(open, framing, cx, &mut text);
                first_byte = open.take_first_byte();
                is_pending = next == BodyStep::Pending;
                if matches!(next, BodyStep::Ends | BodyStep::Fails) {
                    // Dropped before the last write: its record is complete before the client sees the end.
                    response = None;
                    outcome = match next {
                        BodyStep::Fails if framing == ResponseFraming::UntilClose => WriteOutcome::Truncated,
                        BodyStep::Fails => WriteOutcome::CutOff,
                        _ if options.keep_alive => WriteOutcome::KeptAlive,
                        _ => WriteOutcome::Last,
                    };
                }
                let result = self.write(cx, &text, data, end);
                OUTPUT.set(text);
                if result.is_err() {
                    return Poll::Ready(WriteOutcome::Disconnected);
                }
            }
        })
        .await
    }

    /// Bytes that the kernel has not accepted yet.
    fn unwritten(&self) -> usize {
        self.pending_write.as_ref().map_or(0, |pending| pending.remaining())
    }

    /// Writes what the kernel accepts, and keeps the rest.
    fn write<D: Buf + Send + Sync + 'static>(
        &mut self,
        cx: &mut Context<'_>,
        text: &[u8],
        data: Option<D>,
        end: &'static [u8],
    ) -> io::Result<()> {
        let Some(data) = data else {
            let mut left = text;
            return match poll_write_all(&mut self.stream, cx, &mut left) {
                Poll::Ready(written) => written,
                Poll::Pending => {
                    self.pending_write = Some(Box::new(Bytes::copy_from_slice(left)));
                    Ok(())
                }
            };
        };
        let mut all = text.chain(data).chain(end);
        if let Poll::Ready(written) = poll_write_all(&mut self.stream, cx, &mut all) {
            return written;
        }
        let (begin, end) = all.into_inner();
        let (text, data) = begin.into_inner();
        self.pending_write = Some(Box::new(Bytes::copy_from_slice(text).chain(data).chain(end)));
        Ok(())
    }
}

/// How long the client has read nothing although there is something to write.
#[derive(Default)]
struct Stall {
    since: Option<Instant>,
    unwritten: usize,
}

impl Stall {
    /// Since when `unwritten` has not changed.
    fn since(&mut self, unwritten: usize) -> Instant {
        if std::mem::replace(&mut self.unwritten, unwritten) != unwritten {
            self.since = None;
        }
        *self.since.get_or_insert_with(Instant::now)
    }
}

/// Collects what is ready of a body: small chunks in the batch buffer, or one large chunk.
fn gather<R: OutgoingResponse>(
    response: &mut R,
    framing: ResponseFraming,
    cx: &mut Context<'_>,
    text: &mut Vec<u8>,
) -> WriteBatch<R::Data> {
    let only = |next| WriteBatch { data: None, end: b"", next };
    let is_chunked = framing == ResponseFraming::Chunked;
    while text.len() < FULL_BATCH {
        let data = match response.poll_data(cx) {
            Poll::Pending => return only(BodyStep::Pending),
            Poll::Ready(Some(Err(Incomplete))) => return only(BodyStep::Fails),
            Poll::Ready(Some(Ok(data))) => data,
            Poll::Ready(None) => {
                text.extend_from_slice(if is_chunked { LAST_CHUNK } else { b"" });
                return only(BodyStep::Ends);
            }
        };
        // A chunk of size 0 would end the body.
        if !data.has_remaining() {
            continue;
        }
        if is_chunked {
            write_chunk_size(data.remaining(), text);
        }
        let next = if response.is_ended() { BodyStep::Ends } else { BodyStep::Continues };
        let end: &'static [u8] = match (is_chunked, next) {
            (false, _) => b"",
            (true, BodyStep::Ends) => b"\r\n0\r\n\r\n",
            (true, _) => b"\r\n",
        };
        // A large chunk ends the batch: it is written from where it is.
        if data.remaining() > COPY_UP_TO {
            return WriteBatch { data: Some(data), end, next };
        }
        copy(data, text);
        text.extend_from_slice(end);
        if next == BodyStep::Ends {
            return only(next);
        }
    }
    only(BodyStep::Continues)
}

fn copy(mut data: impl Buf, text: &mut Vec<u8>) {
    while data.has_remaining() {
        let chunk = data.chunk();
        text.extend_from_slice(chunk);
        data.advance(chunk.len());
    }
}

/// Writes a chunk's size and the end of its line.
fn write_chunk_size(size: usize, text: &mut Vec<u8>) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digits = (usize::BITS - size.leading_zeros()).div_ceil(4).max(1);
    text.extend((0..digits).rev().map(|place| DIGITS[size >> (4 * place) & 15]));
    text.extend_from_slice(b"\r\n");
}

/// Writes the response's head; clears `keep_alive` if the body is close-delimited.
fn write_head(
    response: &mut impl OutgoingResponse,
    options: &mut WriteOptions,
    text: &mut Vec<u8>,
) -> ResponseFraming {
    let head = response.write_head(options.is_http_11, text);
    if !head.has_date {
        write_date(text);
    }
    let framing = write_framing(&head, response.exact_length(), options.is_http_11, text);
    options.keep_alive &= framing != ResponseFraming::UntilClose;
    match (options.keep_alive, options.is_http_11) {
        (true, true) => {}
        // HTTP/1.0 closes by default, HTTP/1.1 keeps the connection (RFC 9112, section 9.3).
        (true, false) => text.extend_from_slice(b"connection: keep-alive\r\n"),
        (false, _) => text.extend_from_slice(b"connection: close\r\n"),
    }
    text.extend_from_slice(b"\r\n");
    if options.head_only {
        response.skip_body();
        return ResponseFraming::FromHead;
    }
    framing
}

/// Writes the framing headers: the body's length, or `chunked` (RFC 9112, section 6).
fn write_framing(
    head: &HeadSummary,
    length: Option<u64>,
    is_http_11: bool,
    text: &mut Vec<u8>,
) -> ResponseFraming {
    let has_no_body = head.status.is_informational()
        || [StatusCode::NO_CONTENT, StatusCode::NOT_MODIFIED].contains(&head.status);
    // 1xx, 204 and 304 have no body and need no framing.
    if has_no_body || head.has_content_length {
        return ResponseFraming::FromHead;
    }
    if let Some(length) = length {
        text.extend_from_slice(b"content-length: ");
        text.extend_from_slice(itoa::Buffer::new().format(length).as_bytes());
        text.extend_from_slice(b"\r\n");
        return ResponseFraming::FromHead;
    }
    if !is_http_11 {
        return ResponseFraming::UntilClose;
    }
    text.extend_from_slice(b"transfer-encoding: chunked\r\n");
    ResponseFraming::Chunked
}

/// Writes `Date`, which an origin server with a clock must send (RFC 9110, section 6.6.1). Responses of
/// backends have one already.
fn write_date(text: &mut Vec<u8>) {
    thread_local! {
        /// The last date written, and its second.
        static DATE: RefCell<(u64, String)> = const { RefCell::new((0, String::new())) };
    }
    let now = SystemTime::now();
    let second = now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    DATE.with_borrow_mut(|(written, date)| {
        if *written != second || date.is_empty() {
            (*written, *date) = (second, httpdate::fmt_http_date(now));
        }
        text.extend_from_slice(b"date: ");
        text.extend_from_slice(date.as_bytes());
        text.extend_from_slice(b"\r\n");
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunk_sizes_are_hexadecimal_without_leading_zeros() {
        for size in [1, 9, 15, 16, 255, 256, 4_096, 65_535, 1 << 20, usize::MAX] {
            let mut text = Vec::new();
            write_chunk_size(size, &mut text);
            assert_eq!(text, format!("{size:x}\r\n").into_bytes());
        }
    }

    #[test]
    fn the_date_header_holds_an_http_date() {
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
