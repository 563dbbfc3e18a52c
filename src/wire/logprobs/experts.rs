//! `routed_experts`: the experts that each token was routed to, as base64 of rows of equal length. Prefill
//! knows the rows of the prompt and decode those of its output, with other bytes in the prompt's place.
//!
//! The client gets prefill's bytes and, from their length on, decode's. In base64 this is a cut at a border
//! of four characters; if the cut is within such a group, that group alone is decoded. Where the two texts
//! are in a response is for the modules beside this one.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use memchr::memchr;

use super::splicer::Insertion;

/// Characters that stand for three bytes.
const GROUP: usize = 4;

/// Prefill's rows, in base64 that has been checked.
#[derive(Clone)]
pub(super) struct PromptRows {
    text: Bytes,
}

impl PromptRows {
    /// Reads the JSON string whose opening quote is at `start`. `None` if it is no base64, or empty.
    pub(super) fn read(json: &Bytes, start: usize) -> Option<Self> {
        let text = string_at(json, start)?;
        let (whole, last) = text.split_last_chunk::<GROUP>()?;
        let is_valid = decode(last).is_some() && whole.iter().all(|byte| is_digit(*byte));
        is_valid.then(|| Self { text: json.slice(start + 1..start + 1 + text.len()) })
    }

    /// Puts the rows in the place of the first ones of decode's text, the JSON string whose opening quote
    /// is at `start`. One that is no base64 as far as it is read stays as it is; what the client gets of
    /// it anyway is not read.
    pub(super) fn insert(&self, json: &[u8], start: usize, insertions: &mut Vec<Insertion>) -> Option<()> {
        let decode_text = string_at(json, start)?;
        let first = start + 1;
        if self.text.ends_with(b"=") && decode_text.len() >= self.text.len() {
            // The rows end within a group: the rest of its three bytes is decode's.
            let cut = self.text.len() - GROUP;
            let (ours, theirs) = (decode(&self.text[cut..])?, decode(&decode_text[cut..cut + GROUP])?);
            let seam = [&ours[..], theirs.get(ours.len()..).unwrap_or_default()].concat();
            // A padded group can only be the last.
            (seam.len() == 3 || cut + GROUP == decode_text.len()).then_some(())?;
            let after = first + cut + GROUP;
            insertions.push(Insertion { replaced: first..after, list: self.text.slice(..cut) });
            insertions.push(Insertion { replaced: after..after, list: STANDARD.encode(seam).into() });
        } else {
            let end = first + self.text.len().min(decode_text.len());
            insertions.push(Insertion { replaced: first..end, list: self.text.clone() });
        }
        Some(())
    }
}

/// The contents of the string at `start`, if they are whole groups and have no escapes: base64 has none.
fn string_at(json: &[u8], start: usize) -> Option<&[u8]> {
    let inside = json.get(start..)?.strip_prefix(b"\"")?;
    let text = &inside[..memchr(b'"', inside)?];
    (text.len().is_multiple_of(GROUP) && memchr(b'\\', text).is_none()).then_some(text)
}

fn decode(group: &[u8]) -> Option<Vec<u8>> {
    STANDARD.decode(group).ok()
}

fn is_digit(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/')
}
