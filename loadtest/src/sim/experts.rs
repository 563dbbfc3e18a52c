//! `routed_experts`: a row of bytes for each token, as base64. A prefill server has the rows of the prompt, a
//! decode server those of its output and zeros for the prompt, a regular server all.

use super::{config::Role, output::Output, request::Item};

/// Bytes of a row: no multiple of three, so that prompts end anywhere in a group of base64.
const ROW: usize = 5;

/// The rows of a finished output, if they were requested.
pub(crate) fn rows(item: &Item, role: Role, output: &Output) -> Option<String> {
    let start = item.experts?;
    let prompt = item.prompt.tokens;
    // The last token is an input of nothing.
    let count = if role == Role::Prefill { prompt } else { prompt + output.produced.saturating_sub(1) };
    let row = |position: usize| {
        let hash = if position < prompt { item.prompt.hash } else { output.hash };
        let is_known = role != Role::Decode || position >= prompt;
        let byte = move |at: usize| (hash >> (8 * at)) as u8 ^ (position as u8).wrapping_mul(31);
        (0..ROW).map(move |at| if is_known { byte(at) } else { 0 })
    };
    Some(base64(&(start..count).flat_map(row).collect::<Vec<u8>>()))
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let bits = group.iter().fold(0, |bits, &byte| bits << 8 | u32::from(byte)) << (8 * (3 - group.len()));
        for digit in 0..4 {
            let index = (bits >> (18 - 6 * digit)) as usize & 63;
            text.push(if digit > group.len() { '=' } else { char::from(DIGITS[index]) });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::base64;

    #[test]
    fn base64_is_that_of_rfc_4648() {
        for (bytes, text) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg==")]
        {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }
}
