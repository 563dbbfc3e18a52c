//! Parses what the router wrote to a client, as strictly as a client would.
//!
//! Written independently of `http1`, so that an error in the router's own codec does not hide itself.

/// A response: its status and, if it is complete, its body.
#[derive(Debug, PartialEq)]
pub(super) struct ReceivedResponse {
    pub(super) status: u16,
    pub(super) body: Option<Vec<u8>>,
}

/// The responses in what a client received. Only the last can be truncated. Anything that is not a response
/// panics.
pub(super) fn parse_responses(mut text: &[u8]) -> Vec<ReceivedResponse> {
    let mut responses = Vec::new();
    while !text.is_empty() {
        let Some(end) = memchr::memmem::find(text, b"\r\n\r\n") else {
            assert!(
                text.starts_with(b"HTTP/1.") || b"HTTP/1.1 ".starts_with(text),
                "not a response: {}",
                text.escape_ascii()
            );
            break;
        };
        let (head, rest) = text.split_at(end + 4);
        let head = ReceivedHead::parse(head);
        // `100 Continue` and its like are followed by the response.
        if (100..200).contains(&head.status) {
            text = rest;
            continue;
        }
        let (body, rest) = head.body(rest);
        assert!(body.is_some() || rest.is_empty());
        responses.push(ReceivedResponse { status: head.status, body });
        text = rest;
    }
    responses
}

struct ReceivedHead {
    status: u16,
    length: Option<usize>,
    is_chunked: bool,
}

impl ReceivedHead {
    fn parse(head: &[u8]) -> Self {
        let mut lines = head.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii_end);
        let start = lines.next().unwrap_or_default();
        let version = start.get(..9).expect("a status line");
        assert!(
            version == b"HTTP/1.1 " || version == b"HTTP/1.0 ",
            "not a status line: {}",
            start.escape_ascii()
        );
        let status = number(&start[9..start.len().min(12)], 10);
        let status = u16::try_from(status).expect("a status of three digits");
        let mut parsed = Self { status, length: None, is_chunked: false };
        for line in lines.filter(|line| !line.is_empty()) {
            let colon = line.iter().position(|byte| *byte == b':').expect("a header line has a colon");
            let (name, value) = (line[..colon].to_ascii_lowercase(), line[colon + 1..].trim_ascii());
            match &name[..] {
                b"content-length" => parsed.length = Some(number(value, 10)),
                b"transfer-encoding" => parsed.is_chunked = value == b"chunked",
                _ => {}
            }
        }
        // A sender must not send both (RFC 9112, section 6.2).
        assert!(!parsed.is_chunked || parsed.length.is_none(), "a length beside a transfer encoding");
        parsed
    }

    /// The body, and what follows it.
    fn body<'a>(&self, text: &'a [u8]) -> (Option<Vec<u8>>, &'a [u8]) {
        match self.length {
            // No body, whatever the headers (RFC 9112, section 6.3).
            _ if [204, 304].contains(&self.status) => (Some(Vec::new()), text),
            _ if self.is_chunked => decode_chunks(text),
            Some(length) if length <= text.len() => (Some(text[..length].to_vec()), &text[length..]),
            // Without a length the body ends with the connection, which does not show whether it is complete.
            _ => (None, &[]),
        }
    }
}

/// The body of these chunks, if the last one is there, and what follows it.
fn decode_chunks(mut text: &[u8]) -> (Option<Vec<u8>>, &[u8]) {
    let mut body = Vec::new();
    loop {
        let Some(end) = memchr::memmem::find(text, b"\r\n") else { return (None, &[]) };
        let size = number(&text[..end], 16);
        let rest = &text[end + 2..];
        if rest.len() < size + 2 {
            return (None, &[]);
        }
        assert_eq!(&rest[size..size + 2], b"\r\n", "a chunk ends with CR LF");
        body.extend_from_slice(&rest[..size]);
        text = &rest[size + 2..];
        if size == 0 {
            return (Some(body), text);
        }
    }
}

fn number(digits: &[u8], radix: u32) -> usize {
    let digits = std::str::from_utf8(digits).expect("digits are ASCII");
    usize::from_str_radix(digits, radix).expect("a number")
}
