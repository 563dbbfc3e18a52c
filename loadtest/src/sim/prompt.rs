//! Prompts: hash and length in tokens, computed in one pass without a tokenizer. `text` derives the output.

use serde_json::Value;

use super::text;

/// Tokens that a chat template adds to each message.
const TEMPLATE_TOKENS: usize = 4;

/// One prompt.
#[derive(Debug)]
pub(crate) struct Prompt {
    /// Determines the output, and all log-probabilities.
    pub hash: u64,
    /// Its length in tokens.
    pub tokens: usize,
    body: Body,
}

#[derive(Debug)]
enum Body {
    Text(String),
    Ids(Vec<u32>),
    Opaque,
}

/// The hash of a text prompt.
#[must_use]
pub fn hash_text(prompt: &str) -> u64 {
    text::hash_bytes(1, prompt.as_bytes())
}

/// The hash of a prompt of token ids.
#[must_use]
pub fn hash_ids(ids: &[u32]) -> u64 {
    ids.iter().fold(2, |hash, id| text::hash_bytes(hash, &id.to_le_bytes()))
}

/// The hash of a JSON value, such as a chat's messages.
#[must_use]
pub fn hash_value(value: &Value) -> u64 {
    absorb(3, value)
}

fn absorb(hash: u64, value: &Value) -> u64 {
    match value {
        Value::Null => text::hash_bytes(hash, b"n"),
        Value::Bool(flag) => text::hash_bytes(hash, &[u8::from(*flag)]),
        Value::Number(number) => text::hash_bytes(hash, number.to_string().as_bytes()),
        Value::String(string) => text::hash_bytes(hash, string.as_bytes()),
        Value::Array(items) => items.iter().fold(hash, absorb),
        Value::Object(fields) => fields
            .iter()
            .fold(hash, |hash, (key, value)| absorb(text::hash_bytes(hash, key.as_bytes()), value)),
    }
}

fn words(value: &Value) -> usize {
    match value {
        Value::String(string) => count_words(string),
        Value::Array(items) => items.iter().map(words).sum(),
        Value::Object(fields) => {
            ["content", "text"].iter().filter_map(|key| fields.get(*key)).map(words).sum()
        }
        _ => 0,
    }
}

fn count_words(text: &str) -> usize {
    let mut inside = false;
    text.bytes()
        .filter(|byte| {
            let was = std::mem::replace(&mut inside, !byte.is_ascii_whitespace());
            inside && !was
        })
        .count()
}

impl Prompt {
    pub(crate) fn text(prompt: String) -> Self {
        Self { hash: hash_text(&prompt), tokens: count_words(&prompt).max(1), body: Body::Text(prompt) }
    }

    pub(crate) fn ids(ids: Vec<u32>) -> Self {
        Self { hash: hash_ids(&ids), tokens: ids.len(), body: Body::Ids(ids) }
    }

    /// A prompt without text, such as rows of embeddings.
    pub(crate) fn opaque(value: &Value, tokens: usize) -> Self {
        Self { hash: hash_value(value), tokens, body: Body::Opaque }
    }

    pub(crate) fn messages(messages: &Value) -> Self {
        let count = messages.as_array().map_or(1, Vec::len);
        Self::opaque(messages, words(messages) + TEMPLATE_TOKENS * count)
    }

    /// The prompt's text, for `echo`.
    pub(crate) fn echo(&self) -> String {
        match &self.body {
            Body::Text(text) => text.clone(),
            Body::Ids(ids) => ids.iter().map(|&id| text::token_text(id)).collect(),
            Body::Opaque => String::new(),
        }
    }

    /// Id and text of every token, in order.
    pub(crate) fn listing(&self) -> Vec<(u32, String)> {
        match &self.body {
            Body::Text(text) => {
                let spaced =
                    |(at, word): (usize, &str)| if at == 0 { word.to_owned() } else { format!(" {word}") };
                text.split_ascii_whitespace()
                    .enumerate()
                    .map(|word| (word_id(word.1), spaced(word)))
                    .collect()
            }
            Body::Ids(ids) => ids.iter().map(|&id| (id, text::token_text(id).to_owned())).collect(),
            Body::Opaque => (0..self.tokens)
                .map(|position| text::token_id(!self.hash, position))
                .map(|id| (id, text::token_text(id).to_owned()))
                .collect(),
        }
    }
}

fn word_id(word: &str) -> u32 {
    (text::hash_bytes(4, word.as_bytes()) % u64::from(text::VOCABULARY)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn word_count_does_not_depend_on_spacing() {
        assert_eq!(Prompt::text("  the of\n and ".to_owned()).tokens, 3);
        assert_eq!(Prompt::text("the".to_owned()).tokens, 1);
    }

    #[test]
    fn a_listing_has_one_entry_per_token() {
        let prompt = Prompt::text("the of and".to_owned());
        let texts: Vec<String> = prompt.listing().into_iter().map(|(_, text)| text).collect();
        assert_eq!(texts, ["the", " of", " and"]);
    }
}
