//! One connection: read a request, throw its body away, write what was composed for it, again.
//!
//! Only bodies with a `Content-Length` are understood: that is what routers send.

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

use super::answers::{Answers, Stream};
use super::rooms::room_in;
use super::{Role, Shared, control};

/// How much of a body is looked at for `"stream":true`.
const LOOKED_AT: usize = 4096;
/// How much of a larger body's end is looked at for its room.
const TAIL: usize = 256;
/// With this flag Linux drops what a TCP socket received instead of copying it out.
const MSG_TRUNC: i32 = 0x20;

/// A request's head, and what matters of it.
struct Head {
    method: String,
    target: String,
    body: usize,
}

pub(super) async fn serve(mut stream: TcpStream, shared: Arc<Shared>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = BytesMut::with_capacity(16 << 10);
    let mut is_counted = false;
    while let Some(head) = read_head(&mut stream, &mut buffer).await? {
        let answers = shared.answers();
        let rooms = shared.rooms.as_ref().filter(|_| answers.paired);
        let tail = if rooms.is_some() { TAIL } else { 0 };
        let body = read_body(&mut stream, &mut buffer, head.body, tail).await?;
        if head.method == "POST" && !head.target.starts_with("/flush") {
            shared.seen.connections.fetch_add(u64::from(!is_counted), Relaxed);
            is_counted = true;
            shared.seen.requests.fetch_add(1, Relaxed);
            shared.seen.bytes.fetch_add(head.body as u64, Relaxed);
            match rooms.zip(body.room) {
                Some((rooms, room)) if shared.role == Role::Prefill => rooms.read(room),
                Some((rooms, room)) => rooms.wait(room).await,
                None => {}
            }
            answer(&mut stream, &answers, &head.target, body.wants_stream).await?;
        } else {
            let answer = control::answer(&shared, &head.method, &head.target);
            stream.write_all(&answer).await?;
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

/// What matters of a body: of a large one its room, of a small one whether it asks for a stream.
#[derive(Default)]
struct Body {
    wants_stream: bool,
    room: Option<u64>,
}

/// Reads a body to its end. Of a large one all but the last `tail` bytes are thrown away.
async fn read_body(
    stream: &mut TcpStream,
    buffer: &mut BytesMut,
    length: usize,
    tail: usize,
) -> io::Result<Body> {
    if length <= LOOKED_AT {
        let body = read_exactly(stream, buffer, length).await?;
        let asks = |wanted: &[u8]| memmem::find(&body, wanted).is_some();
        let wants_stream = asks(b"\"stream\":true") || asks(b"\"stream\": true");
        return Ok(Body { wants_stream, ..Body::default() });
    }
    let thrown_away = length - tail;
    let buffered = buffer.len().min(thrown_away);
    buffer.advance(buffered);
    discard(stream, thrown_away - buffered).await?;
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
    // Never written to: it only says how much may be thrown away at once.
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

async fn answer(
    stream: &mut TcpStream,
    answers: &Answers,
    target: &str,
    wants_stream: bool,
) -> io::Result<()> {
    if !answers.delay.is_zero() {
        sleep(answers.delay).await;
    }
    let is_generate = target.starts_with("/generate");
    match (wants_stream, is_generate) {
        (false, false) => stream.write_all(&answers.chat).await,
        (false, true) => stream.write_all(&answers.generate).await,
        (true, false) => write_stream(stream, &answers.chat_stream, answers).await,
        (true, true) => write_stream(stream, &answers.generate_stream, answers).await,
    }
}

async fn write_stream(stream: &mut TcpStream, events: &Stream, how: &Answers) -> io::Result<()> {
    if how.in_one_write {
        return stream.write_all(&events.at_once(unix_nanos())).await;
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
