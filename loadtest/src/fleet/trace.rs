//! Requests over time: the reader of traces in Mooncake's format.

use std::fs;
use std::io;
use std::path::Path;

use serde::Deserialize;

use super::noise::factor;

/// Tokens of a block, as in Mooncake's traces.
pub const BLOCK_TOKENS: u64 = 512;

/// A request of a trace.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Seconds since the start of the trace.
    pub at: f64,
    /// Tokens of the prompt; at least 1.
    pub input: u64,
    /// Tokens of the response; at least 1.
    pub output: u64,
    /// A number for each block of [`BLOCK_TOKENS`] tokens, the last of which may be partly filled. It stands
    /// for the block and all before it.
    pub blocks: Vec<u64>,
}

/// A line of a trace.
#[derive(Deserialize)]
struct Line {
    /// In milliseconds.
    timestamp: f64,
    input_length: u64,
    output_length: u64,
    hash_ids: Vec<u64>,
}

/// Reads a trace in Mooncake's format: a JSON object a line. They need not be in the order of `timestamp`,
/// and the first need not be at 0: a router writes the line of a request when it has ended.
///
/// # Errors
/// If the file cannot be read, or a line is not of this format.
pub fn read(path: &Path) -> io::Result<Vec<Request>> {
    let text = fs::read_to_string(path)
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
    let mut requests = text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(at, line)| {
            parse(line).map_err(|error| {
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("{}, line {}: {error}", path.display(), at + 1),
                )
            })
        })
        .collect::<io::Result<Vec<_>>>()?;
    requests.sort_by(|a, b| a.at.total_cmp(&b.at));
    let start = requests.first().map_or(0.0, |request| request.at);
    for request in &mut requests {
        request.at -= start;
    }
    Ok(requests)
}

fn parse(line: &str) -> serde_json::Result<Request> {
    let Line { timestamp, input_length, output_length, hash_ids } = serde_json::from_str(line)?;
    let (input, output) = (input_length.max(1), output_length.max(1));
    Ok(Request { at: timestamp / 1e3, input, output, blocks: hash_ids })
}

/// The window of the conversation trace that is part of this crate.
///
/// # Errors
/// If the file is missing.
pub fn conversation() -> io::Result<Vec<Request>> {
    read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("traces/mooncake_conversation_10min.jsonl"))
}

/// The same requests at `times` the rate.
pub fn at_rate(requests: &[Request], times: f64) -> Vec<Request> {
    requests.iter().map(|request| Request { at: request.at / times, ..request.clone() }).collect()
}

/// Seconds from the first to the last arrival.
pub fn duration(requests: &[Request]) -> f64 {
    requests.last().map_or(0.0, |request| request.at)
}

/// Bytes of a token of English.
const TOKEN_BYTES: f64 = 4.0;
/// σ of the bytes per token of one conversation.
const BYTES_SIGMA: f64 = 0.15;

/// Bytes of the first `tokens` tokens of a prompt. All of one conversation, known by its second block, have
/// the same bytes per token, so a prefix has the same bytes in each of its requests.
pub fn prompt_bytes(request: &Request, tokens: u64) -> u64 {
    let conversation = request.blocks.get(1).copied().unwrap_or(0);
    let first = tokens.min(BLOCK_TOKENS);
    let others = (tokens - first) as f64 * factor(0, 2, conversation, BYTES_SIGMA);
    ((first as f64 + others) * TOKEN_BYTES) as u64
}
