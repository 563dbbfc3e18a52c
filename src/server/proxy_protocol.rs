//! The PROXY header (versions 1 and 2 of haproxy's protocol) that a load balancer in front sends first on
//! each connection: for whom the connection is.
//!
//! Exactly the header is read: what follows is for TLS, HTTP/2 or HTTP/1.1 as on any other connection.
//! What the address is used for is not known here.

use std::io::{Error, ErrorKind, Result};
use std::net::SocketAddr;

use proxy_header::{ParseConfig, ProxyHeader};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

/// The first bytes of a header of version 2.
const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// The bytes of version 2 up to the length of the rest.
const FIXED_LEN: usize = 16;
/// Longest header of version 2. Addresses take 52 bytes; the rest is for additions of the load balancer,
/// such as AWS's endpoint id or TLS details (haproxy itself takes 1 KiB or so). 64 KiB would be possible.
const MAX_HEADER: usize = 4 << 10;
/// Longest header of version 1, with its line break.
const MAX_LINE: usize = 107;

/// Reads the header of a connection. Returns the client's address, or `None` if the load balancer speaks for
/// itself, as its health checks do. An error of kind `InvalidData` means that there is no header.
pub(super) async fn read(socket: &mut TcpStream) -> Result<Option<SocketAddr>> {
    let mut header = vec![0; SIGNATURE.len()];
    // The shortest header, of version 1, has 15 bytes.
    socket.read_exact(&mut header).await?;
    match header.starts_with(SIGNATURE) {
        true => read_version_2(socket, &mut header).await?,
        false => read_version_1(socket, &mut header).await?,
    }
    let config = ParseConfig { include_tlvs: false, allow_v1: true, allow_v2: true };
    let (parsed, length) = ProxyHeader::parse(&header, config).map_err(|_| malformed("it is malformed"))?;
    if length != header.len() {
        return Err(malformed("it is malformed"));
    }
    Ok(parsed.proxied_address().map(|address| address.source))
}

async fn read_version_2(socket: &mut TcpStream, header: &mut Vec<u8>) -> Result<()> {
    header.resize(FIXED_LEN, 0);
    socket.read_exact(&mut header[SIGNATURE.len()..]).await?;
    let length = FIXED_LEN + usize::from(u16::from_be_bytes([header[FIXED_LEN - 2], header[FIXED_LEN - 1]]));
    if length > MAX_HEADER {
        return Err(malformed("it has more than 4 KiB"));
    }
    header.resize(length, 0);
    socket.read_exact(&mut header[FIXED_LEN..]).await?;
    Ok(())
}

/// Reads the rest of a line. Bytes behind it stay in the socket.
async fn read_version_1(socket: &mut TcpStream, header: &mut Vec<u8>) -> Result<()> {
    if !header.starts_with(b"PROXY ") {
        return Err(malformed("there is none"));
    }
    while header.len() < MAX_LINE {
        let read = header.len();
        header.resize(MAX_LINE, 0);
        let seen = socket.peek(&mut header[read..]).await?;
        if seen == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        let line_end = memchr::memchr(b'\n', &header[read..read + seen]);
        header.truncate(read + line_end.map_or(seen, |at| at + 1));
        socket.read_exact(&mut header[read..]).await?;
        if line_end.is_some() {
            return Ok(());
        }
    }
    Err(malformed("its line has no end"))
}

fn malformed(why: &'static str) -> Error {
    Error::new(ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    use super::*;

    /// What is read of a connection on which these bytes arrive, in pieces of `size`, and what is left.
    async fn read_of(bytes: &[u8], size: usize) -> (Result<Option<SocketAddr>>, Vec<u8>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        client.set_nodelay(true).unwrap();
        let (mut socket, _) = listener.accept().await.unwrap();
        let write = async {
            for piece in bytes.chunks(size) {
                // The reader may have closed the connection.
                let _ = client.write_all(piece).await;
                tokio::task::yield_now().await;
            }
            let _ = client.shutdown().await;
        };
        let read = async {
            let result = read(&mut socket).await;
            let mut rest = Vec::new();
            let _ = socket.read_to_end(&mut rest).await;
            (result, rest)
        };
        tokio::join!(write, read).1
    }

    fn version_2(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
        let length = u16::try_from(rest.len()).unwrap().to_be_bytes();
        [&SIGNATURE[..], &[command, family], &length, rest].concat()
    }

    #[tokio::test]
    async fn both_versions_are_read_to_their_last_byte() {
        let v4 = [&[10, 0, 0, 1, 10, 0, 0, 2][..], &7_u16.to_be_bytes(), &80_u16.to_be_bytes()].concat();
        let v6 = [&[0; 15][..], &[9], &[0; 15], &[8], &7_u16.to_be_bytes(), &80_u16.to_be_bytes()].concat();
        let with_addition = [&v4[..], &[0xea, 0, 3, 1, 2, 3]].concat();
        let longest = [&v4[..], &vec![4; MAX_HEADER - FIXED_LEN - v4.len()]].concat();
        for (header, address) in [
            (b"PROXY TCP4 10.0.0.1 10.0.0.2 7 80\r\n".to_vec(), Some("10.0.0.1:7")),
            (b"PROXY TCP6 ::9 ::8 7 80\r\n".to_vec(), Some("[::9]:7")),
            (b"PROXY UNKNOWN\r\n".to_vec(), None),
            (b"PROXY UNKNOWN anything at all\r\n".to_vec(), None),
            (version_2(0x21, 0x11, &v4), Some("10.0.0.1:7")),
            (version_2(0x21, 0x21, &v6), Some("[::9]:7")),
            (version_2(0x21, 0x11, &with_addition), Some("10.0.0.1:7")),
            (version_2(0x20, 0x00, &[]), None),
            (version_2(0x20, 0x11, &v4), None),
            (version_2(0x21, 0x00, &[1, 2, 3]), None),
            (version_2(0x21, 0x11, &longest), Some("10.0.0.1:7")),
        ] {
            let behind = b"GET / HTTP/1.1\r\n\r\n";
            for size in [1, 13, header.len() + 3, 10_000] {
                let (read, rest) = read_of(&[&header[..], behind].concat(), size).await;
                let expected = address.map(|address| address.parse().unwrap());
                assert_eq!(read.unwrap(), expected, "{}", header.escape_ascii());
                assert_eq!(rest, behind, "{size}: {}", header.escape_ascii());
            }
        }
    }

    #[tokio::test]
    async fn what_is_no_header_is_an_error() {
        let mut long = b"PROXY TCP4 ".to_vec();
        long.resize(MAX_LINE, b'1');
        for (bytes, kind) in [
            (&b"GET / HTTP/1.1\r\n\r\n"[..], ErrorKind::InvalidData),
            (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\0\0\0", ErrorKind::InvalidData),
            (b"PROXY TCP4 10.0.0.1 10.0.0.2 7\r\n", ErrorKind::InvalidData),
            (b"PROXY TCP4 10.0.0.1 10.0.0.2 7 80\n", ErrorKind::InvalidData),
            (b"PROXY TCP4 ::9 ::8 7 80\r\n", ErrorKind::InvalidData),
            (&[&long[..], b"\r\n"].concat(), ErrorKind::InvalidData),
            (b"PROXY TCP4 10.0.0.1", ErrorKind::UnexpectedEof),
            (b"PROXY", ErrorKind::UnexpectedEof),
            (b"", ErrorKind::UnexpectedEof),
            (SIGNATURE, ErrorKind::UnexpectedEof),
            (&version_2(0x21, 0x11, &[1, 2, 3]), ErrorKind::InvalidData),
            (&version_2(0x31, 0x11, &[0; 12]), ErrorKind::InvalidData),
            (&version_2(0x2f, 0x11, &[0; 12]), ErrorKind::InvalidData),
            (&version_2(0x21, 0x11, &[0; MAX_HEADER]), ErrorKind::InvalidData),
        ] {
            let (read, _) = read_of(bytes, 10_000).await;
            assert_eq!(read.unwrap_err().kind(), kind, "{}", bytes.escape_ascii());
        }
    }
}
