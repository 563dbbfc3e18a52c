//! Responses that arrive in reads of any size: heads, and bodies in each framing.

use super::*;

/// Status, body, unread bytes of the input, and whether the body is complete.
type Read<Body> = (u16, Body, usize, bool);

/// Reads a response that arrives in reads of `step` bytes. `None`: its head is incomplete.
fn read(text: &[u8], step: usize) -> Result<Option<Read<Vec<u8>>>, MalformedMessage> {
    let mut received = 0;
    let response = loop {
        if received == text.len() {
            return Ok(None);
        }
        received = (received + step).min(text.len());
        if let Some(response) = read_response_head(&text[..received], received.saturating_sub(step))? {
            break response;
        }
    };
    let (mut decoder, mut body) = (response.decoder, Vec::new());
    let mut at = response.length;
    while at < text.len() {
        let received = &text[at..(at + step).min(text.len())];
        let used = decoder.decode(received, &mut body)?;
        at += used;
        if used < received.len() {
            break;
        }
    }
    Ok(Some((response.head.status.as_u16(), body, text.len() - at, decoder.is_ended())))
}

/// Reads a response in one read, and in reads of 1 to 8 bytes, which must all give the same.
fn read_any(text: &str) -> Result<Option<Read<String>>, &'static str> {
    let whole = read(text.as_bytes(), text.len());
    for step in 1..9 {
        assert_eq!(read(text.as_bytes(), step), whole, "in reads of {step}: {text}");
    }
    let text = |(status, body, unread, ended)| (status, String::from_utf8(body).unwrap(), unread, ended);
    whole.map(|read| read.map(text)).map_err(|MalformedMessage(what)| what)
}

fn response(
    status: u16,
    body: &str,
    unread: usize,
    ended: bool,
) -> Result<Option<Read<String>>, &'static str> {
    Ok(Some((status, body.to_owned(), unread, ended)))
}

fn keeps_alive(text: &str) -> bool {
    read_response_head(text.as_bytes(), 0).unwrap().unwrap().keeps_alive
}

#[test]
fn a_body_with_a_length_ends_after_so_many_bytes() {
    let ok = "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n";
    assert_eq!(read_any(&format!("{ok}abc")), response(200, "abc", 0, true));
    assert_eq!(read_any(&format!("{ok}ab")), response(200, "ab", 0, false));
    assert_eq!(read_any(&format!("{ok}abcHTTP")), response(200, "abc", 4, true));
    assert_eq!(read_any("HTTP/1.1 204 No Content\r\ncontent-length: 3\r\n\r\n"), response(204, "", 0, true));
    assert_eq!(read_any("HTTP/1.1 304 x\r\nTransfer-Encoding: chunked\r\n\r\n"), response(304, "", 0, true));
    let twice = "HTTP/1.1 200 OK\r\ncontent-length: 3\r\nContent-Length: 3\r\n\r\nabc";
    assert_eq!(read_any(twice), response(200, "abc", 0, true));
}

#[test]
fn a_content_length_that_is_not_one_number_is_malformed() {
    for lengths in ["3\r\ncontent-length: 4", "-3", "+3", "3, 3", "0x3", "", "99999999999999999999"] {
        let text = format!("HTTP/1.1 200 OK\r\ncontent-length: {lengths}\r\n\r\nabc");
        assert_eq!(read_any(&text), Err("its Content-Length is not one number"), "{lengths}");
    }
}

#[test]
fn a_body_without_length_or_chunks_ends_when_the_connection_closes() {
    let text = "HTTP/1.1 200 OK\r\n\r\nabc";
    assert_eq!(read_any(text), response(200, "abc", 0, false));
    let mut response = read_response_head(text.as_bytes(), 0).unwrap().unwrap();
    assert!(response.decoder.close() && response.decoder.is_ended());
    assert!(!response.keeps_alive);
}

const CHUNKED: &str = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";

#[test]
fn a_chunked_body_ends_with_its_last_chunk() {
    for (framed, body, unread) in [
        ("3\r\nabc\r\n0\r\n\r\n", "abc", 0),
        ("3\r\nabc\r\n2\r\nde\r\n0\r\n\r\nnext", "abcde", 4),
        ("00A\r\n0123456789\r\n000\r\n\r\n", "0123456789", 0),
        ("a\r\n0123456789\r\n0\r\n\r\n", "0123456789", 0),
        ("3\r\nabc\r\nB\r\n0123456789a\r\n00\r\n\r\n", "abc0123456789a", 0),
        ("10\r\n0123456789abcdef\r\n0\r\n\r\n", "0123456789abcdef", 0),
        ("000000003\r\nabc\r\n1;\r\nd\r\n0\r\n\r\n", "abcd", 0),
        ("1;a=b;c=\"d\"\r\nx\r\n0 ;e\r\n\r\n", "x", 0),
        ("1 \t\r\nx\r\n0\r\nA: b\r\nC: d\r\n\r\n", "x", 0),
        ("0\r\n\r\n", "", 0),
    ] {
        assert_eq!(read_any(&format!("{CHUNKED}{framed}")), response(200, body, unread, true), "{framed}");
    }
    for (framed, body) in [
        ("3\r\nab", "ab"),
        ("3\r\nabc\r\n", "abc"),
        ("3\r\nabc\r\n0\r\n", "abc"),
        ("", ""),
        // More than 32 bits.
        ("ffffffff\r\nab", "ab"),
        ("123456789\r\nab", "ab"),
    ] {
        assert_eq!(read_any(&format!("{CHUNKED}{framed}")), response(200, body, 0, false), "{framed}");
        let mut decoder = read_response_head(CHUNKED.as_bytes(), 0).unwrap().unwrap().decoder;
        decoder.decode(framed.as_bytes(), &mut Vec::new()).unwrap();
        assert!(!decoder.close(), "{framed}");
    }
}

#[test]
fn chunks_that_two_parsers_could_read_differently_are_malformed() {
    let (size, longer, trailers) =
        ("a chunk size is malformed", "a chunk is longer than its size", "its trailers are malformed");
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
        ("11111111111111111\r\n", "a chunk size is too large"),
    ] {
        assert_eq!(read_any(&format!("{CHUNKED}{framed}")), Err(what), "{framed:?}");
    }
}

#[test]
fn chunk_size_lines_and_trailers_are_bounded() {
    let too_long = Err("its chunk extensions or trailers are too long");
    let long = "x".repeat(MAX_IGNORED);
    let many = format!("0\r\n{}\r\n", "a:\r\n".repeat(MAX_HEADERS + 1));
    let lines = [
        format!("1;{long}\r\na\r\n"),
        format!("1{}\r\na\r\n", " ".repeat(MAX_IGNORED + 1)),
        format!("{}1\r\na\r\n", "0".repeat(MAX_IGNORED + 1)),
        format!("0;{long}\r\n\r\n"),
        format!("0\r\na:{long}\r\n\r\n"),
        many,
    ];
    for framed in lines {
        let text = format!("{CHUNKED}1\r\na\r\n{framed}");
        assert_eq!(
            read(text.as_bytes(), text.len()).map(|_| ()).map_err(|MalformedMessage(what)| what),
            too_long.clone()
        );
    }
}

#[test]
fn padding_and_extensions_are_bounded_for_each_line_alone() {
    let long = "x".repeat(MAX_IGNORED - 1);
    for line in
        ["5   ".to_owned(), "5;ext=1".into(), "005".into(), "5 \t ; a=\"b\"".into(), format!("5;{long}")]
    {
        let count = if line.len() > MAX_IGNORED { 3 } else { 6_000 };
        let chunks = format!("{line}\r\nabcde\r\n").repeat(count);
        let text = format!("{CHUNKED}{chunks}0;{0}\r\na:{0}\r\n\r\n", &long[2..]);
        let read = read(text.as_bytes(), text.len()).map(|_| ());
        assert_eq!(read.map_err(|MalformedMessage(what)| what), Ok(()), "{}", &line[..4.min(line.len())]);
    }
}

#[test]
fn transfer_codings_other_than_chunked_are_malformed() {
    for coding in ["gzip, chunked", "gzip", "identity", "chunked\r\ntransfer-encoding: chunked", ""] {
        let text = format!("HTTP/1.1 200 OK\r\ntransfer-encoding: {coding}\r\ncontent-length: 1\r\n\r\na");
        assert_eq!(read_any(&text), Err("its transfer coding is not chunked"), "{coding}");
    }
    let http_10 = "HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n";
    assert_eq!(read_any(http_10), Err("it has Transfer-Encoding in HTTP/1.0"));
}

#[test]
fn interim_responses_are_skipped() {
    let text = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 x\r\na: b\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nx";
    assert_eq!(read_any(text), response(200, "x", 0, true));
    assert_eq!(read_any("HTTP/1.1 101 x\r\n\r\n"), Err("it switches protocols"));
    let many = "HTTP/1.1 100 Continue\r\n\r\n".repeat(MAX_HEAD / 25 + 1);
    assert!(read_response_head(many.as_bytes(), 0).is_err());
}

#[test]
fn what_cannot_become_a_response_is_malformed_at_its_first_byte() {
    let no_version = Err("it does not start with HTTP/1");
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
fn invalid_heads_are_malformed() {
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
fn a_connection_is_reused_if_the_server_keeps_it_and_the_body_has_a_known_end() {
    let length = "content-length: 0\r\n";
    assert!(keeps_alive(&format!("HTTP/1.1 200 OK\r\n{length}\r\n")));
    assert!(keeps_alive(&format!("HTTP/1.1 200 OK\r\n{length}connection: keep-alive\r\n\r\n")));
    assert!(!keeps_alive(&format!("HTTP/1.1 200 OK\r\n{length}connection: x, Close\r\n\r\n")));
    assert!(!keeps_alive(&format!("HTTP/1.0 200 OK\r\n{length}connection: keep-alive\r\n\r\n")));
    assert!(!keeps_alive("HTTP/1.1 200 OK\r\n\r\n"));
    assert!(keeps_alive(CHUNKED));
    assert!(!keeps_alive(&format!("HTTP/1.1 200 OK\r\n{length}transfer-encoding: chunked\r\n\r\n")));
}
