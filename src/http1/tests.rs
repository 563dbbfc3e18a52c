use super::*;

type Read<Body> = (u16, Body, usize, bool);

/// What is read of an answer that comes in pieces of `step` bytes: its status, its body, what is left of the input, and
/// whether the body has ended.
fn read(text: &[u8], step: usize) -> Result<Option<Read<Vec<u8>>>, MalformedMessage> {
    let mut come = 0;
    let answer = loop {
        if come == text.len() {
            return Ok(None);
        }
        come = (come + step).min(text.len());
        if let Some(answer) = read_response_head(&text[..come], come.saturating_sub(step))? {
            break answer;
        }
    };
    let (mut decoder, mut body) = (answer.decoder, Vec::new());
    let mut at = answer.length;
    while at < text.len() {
        let piece = &text[at..(at + step).min(text.len())];
        let used = decoder.decode(piece, &mut body)?;
        at += used;
        if used < piece.len() {
            break;
        }
    }
    Ok(Some((answer.head.status.as_u16(), body, text.len() - at, decoder.is_ended())))
}

/// The same for any pieces.
fn read_any(text: &str) -> Result<Option<Read<String>>, &'static str> {
    let whole = read(text.as_bytes(), text.len());
    for step in 1..9 {
        assert_eq!(read(text.as_bytes(), step), whole, "in pieces of {step}: {text}");
    }
    let text = |(status, body, left, ended)| (status, String::from_utf8(body).unwrap(), left, ended);
    whole.map(|read| read.map(text)).map_err(|MalformedMessage(what)| what)
}

fn of(status: u16, body: &str, left: usize, ended: bool) -> Result<Option<Read<String>>, &'static str> {
    Ok(Some((status, body.to_owned(), left, ended)))
}

fn keeps_alive(text: &str) -> bool {
    read_response_head(text.as_bytes(), 0).unwrap().unwrap().keeps_alive
}

#[test]
fn bodies_of_a_length() {
    let ok = "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n";
    assert_eq!(read_any(&format!("{ok}abc")), of(200, "abc", 0, true));
    assert_eq!(read_any(&format!("{ok}ab")), of(200, "ab", 0, false));
    assert_eq!(read_any(&format!("{ok}abcHTTP")), of(200, "abc", 4, true));
    assert_eq!(read_any("HTTP/1.1 204 No Content\r\ncontent-length: 3\r\n\r\n"), of(204, "", 0, true));
    assert_eq!(read_any("HTTP/1.1 304 x\r\nTransfer-Encoding: chunked\r\n\r\n"), of(304, "", 0, true));
    let twice = "HTTP/1.1 200 OK\r\ncontent-length: 3\r\nContent-Length: 3\r\n\r\nabc";
    assert_eq!(read_any(twice), of(200, "abc", 0, true));
}

#[test]
fn lengths_that_are_none() {
    for lengths in ["3\r\ncontent-length: 4", "-3", "+3", "3, 3", "0x3", "", "99999999999999999999"] {
        let text = format!("HTTP/1.1 200 OK\r\ncontent-length: {lengths}\r\n\r\nabc");
        assert_eq!(read_any(&text), Err("its length is not one number"), "{lengths}");
    }
}

#[test]
fn bodies_up_to_the_end_of_the_connection() {
    let text = "HTTP/1.1 200 OK\r\n\r\nabc";
    assert_eq!(read_any(text), of(200, "abc", 0, false));
    let mut answer = read_response_head(text.as_bytes(), 0).unwrap().unwrap();
    assert!(answer.decoder.close() && answer.decoder.is_ended());
    assert!(!answer.keeps_alive);
}

const CHUNKED: &str = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";

#[test]
fn chunked_bodies() {
    for (framed, body, left) in [
        ("3\r\nabc\r\n0\r\n\r\n", "abc", 0),
        ("3\r\nabc\r\n2\r\nde\r\n0\r\n\r\nnext", "abcde", 4),
        ("00A\r\n0123456789\r\n000\r\n\r\n", "0123456789", 0),
        ("a\r\n0123456789\r\n0\r\n\r\n", "0123456789", 0),
        ("1;a=b;c=\"d\"\r\nx\r\n0 ;e\r\n\r\n", "x", 0),
        ("1 \t\r\nx\r\n0\r\nA: b\r\nC: d\r\n\r\n", "x", 0),
        ("0\r\n\r\n", "", 0),
    ] {
        assert_eq!(read_any(&format!("{CHUNKED}{framed}")), of(200, body, left, true), "{framed}");
    }
    for (framed, body) in [("3\r\nab", "ab"), ("3\r\nabc\r\n", "abc"), ("3\r\nabc\r\n0\r\n", "abc"), ("", "")]
    {
        assert_eq!(read_any(&format!("{CHUNKED}{framed}")), of(200, body, 0, false), "{framed}");
        let mut decoder = read_response_head(CHUNKED.as_bytes(), 0).unwrap().unwrap().decoder;
        decoder.decode(framed.as_bytes(), &mut Vec::new()).unwrap();
        assert!(!decoder.close(), "{framed}");
    }
}

#[test]
fn chunks_that_could_be_read_in_two_ways() {
    let (size, longer, trailers) =
        ("a chunk's size is malformed", "a chunk is longer than its size", "its trailers are malformed");
    for (framed, what) in [
        ("zz\r\n", size),
        ("\r\n", size),
        (" 3\r\nabc", size),
        ("-1\r\n", size),
        ("0x3\r\nabc", size),
        ("3 3\r\nabc", size),
        ("3\nabc\r\n", size),
        ("3\r\rabc", size),
        ("3;a\nb\r\nabc", size),
        ("3\r\nabcd\r\n", longer),
        ("3\r\nabc\n0\r\n", longer),
        ("3\r\nabc\rx", longer),
        ("0\r\n\n", trailers),
        ("0\r\nA: b\n\r\n", trailers),
        ("0\r\nA: b\r\r\n", trailers),
        ("0\r\nA\r\n\r\n", trailers),
        ("0\r\n: b\r\n\r\n", trailers),
        ("0\r\nA : b\r\n\r\n", trailers),
        ("0\r\nA: b\r\n c\r\n\r\n", trailers),
        ("0\r\nA: b\x00\r\n\r\n", trailers),
        ("0\r\n\u{ed}: b\r\n\r\n", trailers),
        ("11111111111111111\r\n", "a chunk's size is too large"),
    ] {
        assert_eq!(read_any(&format!("{CHUNKED}{framed}")), Err(what), "{framed:?}");
    }
}

#[test]
fn what_is_ignored_is_bounded() {
    let too_long = Err("its chunk extensions or trailers are too long");
    let long = "x".repeat(MAX_IGNORED);
    let each = "1;x\r\na\r\n".repeat(MAX_IGNORED);
    let many = format!("0\r\n{}\r\n", "a:\r\n".repeat(MAX_HEADERS + 1));
    for framed in [format!("0;{long}\r\n\r\n"), format!("0\r\na:{long}\r\n\r\n"), each, many] {
        let text = format!("{CHUNKED}{framed}");
        assert_eq!(
            read(text.as_bytes(), text.len()).map(|_| ()).map_err(|MalformedMessage(what)| what),
            too_long.clone()
        );
    }
}

#[test]
fn codings_other_than_chunked_are_refused() {
    for coding in ["gzip, chunked", "gzip", "identity", "chunked\r\ntransfer-encoding: chunked", ""] {
        let text = format!("HTTP/1.1 200 OK\r\ntransfer-encoding: {coding}\r\ncontent-length: 1\r\n\r\na");
        assert_eq!(read_any(&text), Err("its transfer coding is not chunked"), "{coding}");
    }
    let old = "HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n";
    assert_eq!(read_any(old), Err("it is chunked and HTTP/1.0"));
}

#[test]
fn interim_answers_are_skipped() {
    let text = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 x\r\na: b\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nx";
    assert_eq!(read_any(text), of(200, "x", 0, true));
    assert_eq!(read_any("HTTP/1.1 101 x\r\n\r\n"), Err("it switches protocols"));
    let many = "HTTP/1.1 100 Continue\r\n\r\n".repeat(MAX_HEAD / 25 + 1);
    assert!(read_response_head(many.as_bytes(), 0).is_err());
}

#[test]
fn what_does_not_begin_like_an_answer_is_refused_at_once() {
    let no_version = Err("it does not begin with a version of HTTP/1");
    for text in [
        "S",
        "SSH-2.0-x\r\n\r\n",
        "\r\nHTTP/1.1 200 OK\r\n\r\n",
        "HTTP/2 200\r\n\r\n",
        "http/1.1 200 OK\r\n\r\n",
    ] {
        assert_eq!(read_any(text), no_version, "{text}");
    }
    for text in ["H", "HTTP/1.", "HTTP/1.1 200 OK\r\ncont", "HTTP/1.1 200 OK\r\na: b\r\n\r"] {
        assert_eq!(read_any(text), Ok(None), "{text}");
    }
}

#[test]
fn malformed_heads_are_refused() {
    for text in [
        "HTTP/1.1 2x0 OK\r\n\r\n",
        "HTTP/1.1 99 OK\r\n\r\n",
        "HTTP/1.2 200 OK\r\n\r\n",
        "HTTP/1.1 200 OK\r\na\r\n\r\n",
        "HTTP/1.1 200 OK\r\na : b\r\n\r\n",
        "HTTP/1.1 200 OK\r\na: b\x00\r\n\r\n",
        "HTTP/1.1 200 OK\r\na: b\r\n c\r\n\r\n",
    ] {
        assert!(read_any(text).is_err(), "{text:?}");
    }
    let many = format!("HTTP/1.1 200 OK\r\n{}\r\n", "a: b\r\n".repeat(MAX_HEADERS + 1));
    assert_eq!(read_any(&many), Err("it has too many headers"));
    let long = format!("HTTP/1.1 200 OK\r\na: {}", "b".repeat(MAX_HEAD));
    assert_eq!(read_any(&long), Err("its head is too long"));
}

#[test]
fn headers_keep_their_values_and_order() {
    let text = "HTTP/1.1 200 Fine\r\nX-A:  1 \r\nx-a: \u{e9}\r\nServer:uvicorn\r\n\r\n";
    let headers = read_response_head(text.as_bytes(), 0).unwrap().unwrap().head.into_parts().headers;
    let values: Vec<&[u8]> = headers.get_all("x-a").iter().map(|value| value.as_bytes()).collect();
    assert_eq!(values, [&b"1"[..], "\u{e9}".as_bytes()]);
    assert_eq!(headers["server"], "uvicorn");
}

#[test]
fn a_connection_is_kept_if_the_server_means_to_and_the_end_is_sure() {
    let length = "content-length: 0\r\n";
    assert!(keeps_alive(&format!("HTTP/1.1 200 OK\r\n{length}\r\n")));
    assert!(keeps_alive(&format!("HTTP/1.1 200 OK\r\n{length}connection: keep-alive\r\n\r\n")));
    assert!(!keeps_alive(&format!("HTTP/1.1 200 OK\r\n{length}connection: x, Close\r\n\r\n")));
    assert!(!keeps_alive(&format!("HTTP/1.0 200 OK\r\n{length}connection: keep-alive\r\n\r\n")));
    assert!(!keeps_alive("HTTP/1.1 200 OK\r\n\r\n"));
    assert!(keeps_alive(CHUNKED));
    assert!(!keeps_alive(&format!("HTTP/1.1 200 OK\r\n{length}transfer-encoding: chunked\r\n\r\n")));
}
