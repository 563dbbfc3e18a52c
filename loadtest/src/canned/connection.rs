//! One connection: read a request, discard its body, write the composed response, repeat.
//!
//! Only bodies with a `Content-Length` are supported: no router in the comparison sends chunks.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::{Buf, BytesMut};
use memchr::memmem;
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, sleep_until};

use super::responses::{Responses, Stream};
use super::rooms::room_in;
use super::{Role, Shared, admin};

/// Bodies up to this size are searched for `"stream":true`; larger ones are discarded unread.
const SCANNED_BODY_BYTES: usize = 4096;
/// The part of a larger body that is searched for its room. Routers append the bootstrap fields.
const SCANNED_TAIL_BYTES: usize = 256;
/// With this flag, Linux discards received TCP data instead of copying it to user space.
const MSG_TRUNC: i32 = 0x20;

/// The parts of a request's head that decide the response.
struct Head {
    method: String,
    target: String,
    body: usize,
}

pub(super) async fn serve(mut stream: TcpStream, shared: Arc<Shared>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = BytesMut::with_capacity(16 << 10);
    let mut connection_counted = false;
    while let Some(head) = read_head(&mut stream, &mut buffer).await? {
        let responses = shared.responses();
        let rooms = shared.rooms.as_ref().filter(|_| responses.paired);
        let tail = if rooms.is_some() { SCANNED_TAIL_BYTES } else { 0 };
        let body = read_body(&mut stream, &mut buffer, head.body, tail).await?;
        if head.method == "POST" && !head.target.starts_with("/flush") {
            shared.counters.connections.fetch_add(u64::from(!connection_counted), Relaxed);
            connection_counted = true;
            shared.counters.requests.fetch_add(1, Relaxed);
            shared.counters.bytes.fetch_add(head.body as u64, Relaxed);
            match rooms.zip(body.room) {
                Some((rooms, room)) if shared.role == Role::Prefill => rooms.read(room),
                Some((rooms, room)) => rooms.wait(room).await,
                None => {}
            }
            respond(&mut stream, &responses, &head.target, body.wants_stream).await?;
        } else {
            let response = admin::respond(&shared, &head.method, &head.target);
            stream.write_all(&response).await?;
        }
    }
    Ok(())
}

async fn read_head(stream: &mut TcpStream, buffer: &mut BytesMut) -> io::Result<Option<Head>> {
    loop {
        if let Some((length, head)) = parse_head(buffer)? {
            buffer.advance(length);
            return Ok(Some(head));
        }
        buffer.reserve(4 << 10);
        if stream.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    }
}

fn parse_head(bytes: &[u8]) -> io::Result<Option<(usize, Head)>> {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut request = httparse::Request::new(&mut headers);
    let status = request.parse(bytes).map_err(io::Error::other)?;
    let httparse::Status::Complete(length) = status else { return Ok(None) };
    let (method, target) = (request.method.unwrap_or("").to_owned(), request.path.unwrap_or("").to_owned());
    let named = |name: &str| request.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name));
    if named("transfer-encoding").is_some() {
        return Err(io::Error::other("a body without a length"));
    }
    let body =
        named("content-length").and_then(|header| std::str::from_utf8(header.value).ok()?.parse().ok());
    Ok(Some((length, Head { method, target, body: body.unwrap_or(0) })))
}

/// The parts of a body that decide the response: the room of a large one, whether a small one requests a
/// stream.
#[derive(Default)]
struct Body {
    wants_stream: bool,
    room: Option<u64>,
}

/// Reads a body to its end. All but the last `tail` bytes of a large one are discarded.
async fn read_body(
    stream: &mut TcpStream,
    buffer: &mut BytesMut,
    length: usize,
    tail: usize,
) -> io::Result<Body> {
    if length <= SCANNED_BODY_BYTES {
        let body = read_exactly(stream, buffer, length).await?;
        let contains = |wanted: &[u8]| memmem::find(&body, wanted).is_some();
        let wants_stream = contains(b"\"stream\":true") || contains(b"\"stream\": true");
        return Ok(Body { wants_stream, ..Body::default() });
    }
    let discarded = length - tail;
    let buffered = buffer.len().min(discarded);
    buffer.advance(buffered);
    discard(stream, discarded - buffered).await?;
    let end = read_exactly(stream, buffer, tail).await?;
    Ok(Body { room: room_in(&end), ..Body::default() })
}

async fn read_exactly(stream: &mut TcpStream, buffer: &mut BytesMut, length: usize) -> io::Result<BytesMut> {
    while buffer.len() < length {
        buffer.reserve(length);
        if stream.read_buf(buffer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(buffer.split_to(length))
}

async fn discard(stream: &TcpStream, mut left: usize) -> io::Result<()> {
    // Never read from; its capacity only bounds how much one call discards.
    let mut scratch = Vec::with_capacity(left.min(1 << 20));
    while left > 0 {
        stream.readable().await?;
        let space = scratch.spare_capacity_mut();
        let wanted = space.len().min(left);
        let read = stream.try_io(Interest::READABLE, || {
            SockRef::from(stream).recv_with_flags(&mut space[..wanted], MSG_TRUNC)
        });
        match read {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => left -= count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

async fn respond(
    stream: &mut TcpStream,
    responses: &Responses,
    target: &str,
    wants_stream: bool,
) -> io::Result<()> {
    if !responses.delay.is_zero() {
        sleep(responses.delay).await;
    }
    let is_generate = target.starts_with("/generate");
    match (wants_stream, is_generate) {
        (false, false) => stream.write_all(&responses.chat).await,
        (false, true) => stream.write_all(&responses.generate).await,
        (true, false) => write_stream(stream, &responses.chat_stream, responses).await,
        (true, true) => write_stream(stream, &responses.generate_stream, responses).await,
    }
}

async fn write_stream(stream: &mut TcpStream, events: &Stream, how: &Responses) -> io::Result<()> {
    if how.single_write {
        return stream.write_all(&events.with_timestamp(unix_nanos())).await;
    }
    let mut out = events.head().to_vec();
    let mut due = Instant::now();
    for event in 0..events.events() {
        if events.is_token(event) {
            if !out.is_empty() {
                stream.write_all(&out).await?;
                out.clear();
            }
            if !how.interval.is_zero() {
                due += how.interval;
                sleep_until(due).await;
            }
        }
        events.write_event(event, unix_nanos(), &mut out);
    }
    stream.write_all(&out).await
}

pub(crate) fn unix_nanos() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}
