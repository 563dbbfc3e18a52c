//! Reads what the router wrote to a client, as strictly as a client would.

/// An answer: its status and, if it is complete, its body.
#[derive(Debug, PartialEq)]
pub(super) struct Response {
    pub(super) status: u16,
    pub(super) body: Option<Vec<u8>>,
}

/// The answers in what a client has got. Only the last can be cut off; anything that is no answer panics.
pub(super) fn answers(mut text: &[u8]) -> Vec<Response> {
    let mut answers = Vec::new();
    while !text.is_empty() {
        let Some(end) = memchr::memmem::find(text, b"\r\n\r\n") else {
            assert!(
                text.starts_with(b"HTTP/1.") || b"HTTP/1.1 ".starts_with(text),
                "{}",
                text.escape_ascii()
            );
            break;
        };
        let (head, rest) = text.split_at(end + 4);
        let head = Head::read(head);
        if (100..200).contains(&head.status) {
            text = rest;
            continue;
        }
        let (body, rest) = head.body(rest);
        assert!(body.is_some() || rest.is_empty());
        answers.push(Response { status: head.status, body });
        text = rest;
    }
    answers
}

struct Head {
    status: u16,
    length: Option<usize>,
    chunked: bool,
}

impl Head {
    fn read(head: &[u8]) -> Self {
        let mut lines = head.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii_end);
        let start = lines.next().unwrap_or_default();
        let version = start.get(..9).expect("a status line");
        assert!(version == b"HTTP/1.1 " || version == b"HTTP/1.0 ", "{}", start.escape_ascii());
        let status = number(&start[9..start.len().min(12)], 10);
        let mut read =
            Self { status: u16::try_from(status).expect("a status"), length: None, chunked: false };
        for line in lines.filter(|line| !line.is_empty()) {
            let colon = line.iter().position(|byte| *byte == b':').expect("a header");
            let (name, value) = (line[..colon].to_ascii_lowercase(), line[colon + 1..].trim_ascii());
            match &name[..] {
                b"content-length" => read.length = Some(number(value, 10)),
                b"transfer-encoding" => read.chunked = value == b"chunked",
                _ => {}
            }
        }
        assert!(!read.chunked || read.length.is_none(), "two lengths");
        read
    }

    /// The body, and what comes after it.
    fn body<'a>(&self, text: &'a [u8]) -> (Option<Vec<u8>>, &'a [u8]) {
        match self.length {
            _ if [204, 304].contains(&self.status) => (Some(Vec::new()), text),
            _ if self.chunked => dechunked(text),
            Some(length) if length <= text.len() => (Some(text[..length].to_vec()), &text[length..]),
            // Without a length the connection's end is the body's, which does not tell whether it is complete.
            _ => (None, &[]),
        }
    }
}

/// The body that these chunks make, if the last one is there, and what comes after it.
fn dechunked(mut text: &[u8]) -> (Option<Vec<u8>>, &[u8]) {
    let mut body = Vec::new();
    loop {
        let Some(end) = memchr::memmem::find(text, b"\r\n") else { return (None, &[]) };
        let size = number(&text[..end], 16);
        let rest = &text[end + 2..];
        if rest.len() < size + 2 {
            return (None, &[]);
        }
        assert_eq!(&rest[size..size + 2], b"\r\n", "a chunk's end");
        body.extend_from_slice(&rest[..size]);
        text = &rest[size + 2..];
        if size == 0 {
            return (Some(body), text);
        }
    }
}

fn number(digits: &[u8], radix: u32) -> usize {
    let digits = std::str::from_utf8(digits).expect("digits");
    usize::from_str_radix(digits, radix).expect("a number")
}
