//! Just enough HTTP/1.1 to read a message off a socket, without normalising it.

use tokio::io::{AsyncRead, AsyncReadExt};

/// The head of a request or a response.
#[derive(Debug, Clone, Default)]
pub struct Head {
    /// `POST /path HTTP/1.1` or `HTTP/1.1 200 OK`.
    pub start_line: String,
    /// In order, with the case of their names.
    pub headers: Vec<(String, String)>,
}

impl Head {
    pub fn parse(bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes);
        let mut lines = text.trim_end().split("\r\n");
        let start_line = lines.next().unwrap_or_default().to_owned();
        let header = |line: &str| {
            let (name, value) = line.split_once(':').unwrap_or_else(|| panic!("a header line: {line:?}"));
            (name.to_owned(), value.trim().to_owned())
        };
        Self { start_line, headers: lines.map(header).collect() }
    }

    /// The value of a header that must not be repeated.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut values = self.headers.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name));
        let value = values.next().map(|(_, value)| value.as_str());
        assert!(values.next().is_none(), "{name} comes twice");
        value
    }

    pub fn is_chunked(&self) -> bool {
        self.header("transfer-encoding").is_some_and(|coding| coding.eq_ignore_ascii_case("chunked"))
    }
}

/// Reads one message. `None` if the peer closed before its first byte.
pub async fn read_head(reader: &mut (impl AsyncRead + Unpin), buffer: &mut Vec<u8>) -> Option<Head> {
    loop {
        if let Some(end) = find(buffer, b"\r\n\r\n") {
            let head = Head::parse(&buffer[..end]);
            buffer.drain(..end + 4);
            return Some(head);
        }
        if reader.read_buf(buffer).await.unwrap_or(0) == 0 {
            return None;
        }
    }
}

/// Reads a body with the framing of its head. Returns its bytes and whether it was complete.
pub async fn read_body(
    reader: &mut (impl AsyncRead + Unpin),
    buffer: &mut Vec<u8>,
    head: &Head,
) -> (Vec<u8>, bool) {
    if head.is_chunked() {
        loop {
            if let Some((body, used)) = dechunk(buffer) {
                buffer.drain(..used);
                return (body, true);
            }
            if reader.read_buf(buffer).await.unwrap_or(0) == 0 {
                return (std::mem::take(buffer), false);
            }
        }
    }
    let length = head.header("content-length").map_or(0, |length| length.parse().expect("a length"));
    while buffer.len() < length {
        if reader.read_buf(buffer).await.unwrap_or(0) == 0 {
            return (std::mem::take(buffer), false);
        }
    }
    let rest = buffer.split_off(length);
    (std::mem::replace(buffer, rest), true)
}

/// Decodes the chunked body at the start of `bytes`, if it is complete. Returns its content and its encoded
/// length.
pub fn dechunk(bytes: &[u8]) -> Option<(Vec<u8>, usize)> {
    let mut body = Vec::new();
    let mut at = 0;
    loop {
        let line = at + find(&bytes[at..], b"\r\n")?;
        let size = std::str::from_utf8(&bytes[at..line]).expect("a chunk size");
        let size = usize::from_str_radix(size.trim(), 16).expect("a chunk size in hex");
        let (start, end) = (line + 2, line + 2 + size);
        if bytes.len() < end + 2 {
            return None;
        }
        assert_eq!(&bytes[end..end + 2], b"\r\n", "a chunk ends with a line break");
        if size == 0 {
            return Some((body, end + 2));
        }
        body.extend_from_slice(&bytes[start..end]);
        at = end + 2;
    }
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}
