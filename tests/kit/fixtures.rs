//! Exchanges recorded with real SGLang servers.

use std::fs;
use std::path::{Path, PathBuf};

use super::http::{Head, dechunk};

/// One recorded response or request.
pub struct Recording {
    pub head: Head,
    /// Without chunk framing.
    pub body: Vec<u8>,
    /// As it was on the wire, with its framing.
    pub raw: Vec<u8>,
}

/// A request and the responses of both servers.
pub struct Exchange {
    pub name: String,
    pub request: Recording,
    pub prefill: Recording,
    pub decode: Recording,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// The recording in a file such as `reg/gen_basic.resp`. `None` if the server never responded.
pub fn fixture(path: &str) -> Option<Recording> {
    let raw = fs::read(folder().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
    let end = raw.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = Head::parse(&raw[..end]);
    let rest = &raw[end + 4..];
    let body = if head.is_chunked() { dechunk(rest)?.0 } else { rest.to_vec() };
    Some(Recording { head, body, raw })
}

/// The names in a folder that have a file with this ending.
pub fn fixture_names(sub: &str, ending: &str) -> Vec<String> {
    let entries = fs::read_dir(folder().join(sub)).expect("the fixtures are part of the project");
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.strip_suffix(ending).map(str::to_owned))
        .collect();
    names.sort();
    names
}

/// All recorded pairs in which both servers responded.
pub fn exchanges() -> Vec<Exchange> {
    let exchange = |name: String| {
        let part = |what: &str| fixture(&format!("pd/{name}.{what}"));
        let request = part("decode.req").expect("a recorded request");
        let (prefill, decode) = (part("prefill.resp")?, part("decode.resp")?);
        Some(Exchange { request, prefill, decode, name })
    };
    fixture_names("pd", ".decode.req").into_iter().filter_map(exchange).collect()
}
