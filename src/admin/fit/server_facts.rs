//! What a server says of itself, as far as it tells whether the server fits.

use serde_json::{Map, Value};

use super::super::descriptions;

/// Most characters of a text that a server says.
const MAX_TEXT: usize = 96;

/// What a server says of itself at `/server_info`. What is missing is unknown, as versions differ. Texts are
/// printable ASCII and short, whatever the server has sent.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct ServerFacts {
    /// The version of SGLang.
    pub version: Option<String>,
    /// Its `--served-model-name`, or else its `--model-path`.
    pub model: Option<String>,
    /// Its `--disaggregation-mode`: `prefill`, `decode`, or `null` of a plain server.
    pub mode: Option<String>,
    /// Its `--disaggregation-bootstrap-port`, which decode servers have too, without using it.
    pub bootstrap_port: Option<u16>,
    /// Tensor parallelism: the GPUs of one rank.
    pub tp_size: Option<u64>,
    /// Its number of data-parallel ranks.
    pub dp_size: Option<u64>,
    /// Tokens of a page of its KV cache.
    pub page_size: Option<u64>,
    /// Its `--disaggregation-transfer-backend`.
    pub transfer_backend: Option<String>,
    /// Its `--kv-cache-dtype`, which may be `auto`.
    pub kv_cache_dtype: Option<String>,
    /// Whether it has media encoded by encoders.
    pub language_only: Option<bool>,
    pub(super) is_encoder: bool,
    /// Its KV cache has pages of its own kind, and may differ from prefill's.
    pub(super) has_hisparse: bool,
}

/// Why a body is no description of an SGLang server.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NoFacts {
    NotJson,
    /// The merged descriptions of a router's servers.
    Router,
    /// An object without a field that all versions of SGLang have.
    Unknown,
}

impl ServerFacts {
    pub(super) fn parse(body: &[u8]) -> Result<Self, NoFacts> {
        let fields: Map<String, Value> = serde_json::from_slice(body).map_err(|_| NoFacts::NotJson)?;
        let of_router = ["prefill", "decode", "regular"];
        if of_router.iter().any(|role| fields.get(*role).is_some_and(Value::is_array)) {
            return Err(NoFacts::Router);
        }
        if !["version", "model_path", "disaggregation_mode"].iter().any(|name| fields.contains_key(*name)) {
            return Err(NoFacts::Unknown);
        }
        let text = |name: &str| fields.get(name).and_then(Value::as_str).map(short);
        let number = |name: &str| fields.get(name).and_then(Value::as_u64);
        let is = |name: &str| fields.get(name) == Some(&Value::Bool(true));
        let described = descriptions::parse(body).unwrap_or_default();
        Ok(Self {
            version: text("version"),
            model: text("served_model_name").or_else(|| text("model_path")),
            // `null` is a text in SGLang's own options, and JSON's in what some front ends make of it.
            mode: text("disaggregation_mode")
                .or_else(|| fields.get("disaggregation_mode").map(|_| "null".to_owned())),
            bootstrap_port: described.bootstrap_port,
            tp_size: number("tp_size"),
            dp_size: described.dp_size,
            page_size: number("page_size"),
            transfer_backend: text("disaggregation_transfer_backend"),
            kv_cache_dtype: text("kv_cache_dtype"),
            language_only: described.language_only,
            is_encoder: is("encoder_only"),
            has_hisparse: is("enable_hisparse"),
        })
    }
}

/// The text without what a terminal could take for orders.
pub(super) fn printable(text: &str) -> String {
    let is_plain = |c: char| c == ' ' || c.is_ascii_graphic();
    text.chars().flat_map(|c| if is_plain(c) { vec![c] } else { c.escape_default().collect() }).collect()
}

fn short(text: &str) -> String {
    let mut shown = printable(&text.chars().take(MAX_TEXT).collect::<String>());
    // Escapes make it longer again.
    if shown.len() > MAX_TEXT || text.chars().nth(MAX_TEXT).is_some() {
        shown.truncate(MAX_TEXT - 2);
        shown.push_str("..");
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_description_is_told_apart() {
        let parsed = |text: &str| ServerFacts::parse(text.as_bytes()).unwrap_err();
        for text in ["", "<html>", "[]", "OK", "7"] {
            assert_eq!(parsed(text), NoFacts::NotJson, "{text}");
        }
        assert_eq!(parsed(r#"{"internal_states":[],"prefill":[],"decode":[]}"#), NoFacts::Router);
        assert_eq!(parsed(r#"{"regular":[]}"#), NoFacts::Router);
        assert_eq!(parsed("{}"), NoFacts::Unknown);
    }

    #[test]
    fn texts_are_short_and_printable() {
        let body = format!(r#"{{"version":"\u001b[2J{}","served_model_name":"é"}}"#, "x".repeat(1_000));
        let told = ServerFacts::parse(body.as_bytes()).unwrap();
        let version = told.version.unwrap();
        assert!(version.starts_with("\\u{1b}[2Jxxx") && version.ends_with("x.."), "{version}");
        assert_eq!(version.len(), MAX_TEXT);
        assert_eq!(told.model.as_deref(), Some("\\u{e9}"));
    }

    #[test]
    fn a_mode_of_null_is_that_of_a_plain_server_and_no_mode_is_unknown() {
        let mode = |text: &str| ServerFacts::parse(text.as_bytes()).unwrap().mode;
        assert_eq!(mode(r#"{"disaggregation_mode":"null"}"#).as_deref(), Some("null"));
        assert_eq!(mode(r#"{"disaggregation_mode":null}"#).as_deref(), Some("null"));
        assert_eq!(mode(r#"{"version":"0.4.6"}"#), None);
    }
}
