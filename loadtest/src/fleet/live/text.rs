//! Bodies of real size: the text that stands for the blocks of a trace, and what a server reads back.

use std::hash::{DefaultHasher, Hasher as _};

use fastrand::Rng;
use serde::Deserialize;

use super::super::trace::{BLOCK_TOKENS, Request};

/// Bytes of a token.
const TOKEN_BYTES: usize = 4;
/// Bytes of a block.
const BLOCK_BYTES: usize = BLOCK_TOKENS as usize * TOKEN_BYTES;
/// Blocks of one chat message. The first block is the system message.
const MESSAGE_BLOCKS: usize = 4;

/// Where requests go, and so how their prompt is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Dialect {
    /// `/v1/completions`, with one string.
    Completions,
    /// `/v1/chat/completions`, with the prompt as messages of a conversation.
    Chat,
}

impl Dialect {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Completions => "completions",
            Self::Chat => "chat",
        }
    }

    /// Its path.
    pub(super) fn path(self) -> &'static str {
        match self {
            Self::Completions => "/v1/completions",
            Self::Chat => "/v1/chat/completions",
        }
    }
}

/// The text of a block: words of letters, so that JSON needs no escapes.
fn block_text(block: u64) -> String {
    let mut rng = Rng::with_seed(block);
    (0..BLOCK_BYTES).map(|at| if at % 6 == 5 { ' ' } else { rng.lowercase() }).collect()
}

/// The JSON body of request `index`. The number goes along as `user`.
pub(super) fn body(index: usize, request: &Request, dialect: Dialect) -> String {
    let bytes = usize::try_from(request.input).unwrap_or(usize::MAX).saturating_mul(TOKEN_BYTES);
    let mut blocks: Vec<String> = request.blocks.iter().map(|block| block_text(*block)).collect();
    let too_many = (blocks.len() * BLOCK_BYTES).saturating_sub(bytes);
    if let Some(last) = blocks.last_mut() {
        last.truncate(BLOCK_BYTES - too_many.min(BLOCK_BYTES - 1));
    }
    let prompt = match dialect {
        Dialect::Completions => format!(r#""prompt":"{}""#, blocks.concat()),
        Dialect::Chat => format!(r#""messages":[{}]"#, messages(&blocks)),
    };
    let output = request.output;
    format!(
        r#"{{"model":"lab","stream":true,"stream_options":{{"include_usage":true}},"max_tokens":{output},"user":"{index}",{prompt}}}"#
    )
}

fn messages(blocks: &[String]) -> String {
    let message = |(turn, blocks): (usize, &[String])| {
        let role = ["user", "assistant"][turn % 2];
        format!(r#",{{"role":"{role}","content":"{}"}}"#, blocks.concat())
    };
    let (system, rest) = blocks.split_at(blocks.len().min(1));
    let system = format!(r#"{{"role":"system","content":"{}"}}"#, system.concat());
    system + &rest.chunks(MESSAGE_BLOCKS).enumerate().map(message).collect::<String>()
}

/// The fields of a body that a server looks at.
#[derive(Deserialize)]
struct Fields<'a> {
    #[serde(borrow)]
    prompt: Option<&'a str>,
    #[serde(borrow, default)]
    messages: Vec<Message<'a>>,
    max_tokens: Option<u64>,
    user: Option<&'a str>,
    bootstrap_room: Option<u64>,
}

#[derive(Deserialize)]
struct Message<'a> {
    content: &'a str,
}

/// A request as a server reads it.
pub(super) struct Received {
    /// Its number in the trace.
    pub(super) index: usize,
    /// `at` is 0.
    pub(super) request: Request,
    /// `None` of a request that no PD router has sent.
    pub(super) room: Option<u64>,
}

/// Reads a body that [`body`] wrote and a router may have changed; `None` if it is none.
pub(super) fn read(body: &[u8]) -> Option<Received> {
    let fields: Fields<'_> = serde_json::from_slice(body).ok()?;
    let text = match fields.prompt {
        Some(prompt) => prompt.to_owned(),
        None => fields.messages.iter().map(|message| message.content).collect(),
    };
    // The text of a block is that block's alone, with all that is before it.
    let id = |block: &[u8]| {
        let mut hasher = DefaultHasher::new();
        hasher.write(block);
        hasher.finish()
    };
    let request = Request {
        at: 0.0,
        input: (text.len() / TOKEN_BYTES).max(1) as u64,
        output: fields.max_tokens.unwrap_or(1).max(1),
        blocks: text.as_bytes().chunks(BLOCK_BYTES).map(id).collect(),
    };
    // A router's own probe has no number.
    let index = fields.user.and_then(|user| user.parse().ok()).unwrap_or(usize::MAX);
    Some(Received { index, request, room: fields.bootstrap_room })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_reads_the_blocks_that_the_client_wrote() {
        let request = |input, blocks: &[u64]| Request { at: 0.0, input, output: 7, blocks: blocks.to_vec() };
        let long = request(5_000, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
        let longer = request(5_632, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11]);
        for dialect in [Dialect::Completions, Dialect::Chat] {
            let [one, two] = [&long, &longer].map(|request| {
                let received = read(body(3, request, dialect).as_bytes()).expect("a body");
                assert_eq!((received.index, received.room), (3, None));
                assert_eq!((received.request.input, received.request.output), (request.input, 7));
                received.request.blocks
            });
            assert_eq!((one.len(), two.len()), (10, 11));
            assert_eq!(one[..9], two[..9]);
            assert_ne!(one[9], two[9]);
        }
        assert!(read(b"{").is_none());
    }
}
