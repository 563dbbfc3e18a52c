//! Sampling parameters: number of tokens, number of samples, stop strings. Temperatures are validated but not
//! used.

use serde_json::Value;

use super::request::{Endpoint, Fields, Reject, per_item};

/// Default of `max_new_tokens`.
const DEFAULT_MAX_NEW: usize = 128;
/// The same on `/v1/completions`.
const DEFAULT_MAX_NEW_COMPLETIONS: usize = 16;
/// Tokens of `max_output_tokens` that `/v1/responses` keeps for begin and end of a text.
const RESPONSES_RESERVED_TOKENS: usize = 2;

/// Fields of `sampling_params` on `/generate`, in the order of its error message.
const FIELDS: [&str; 28] = [
    "max_new_tokens",
    "stop",
    "stop_token_ids",
    "stop_regex",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "min_new_tokens",
    "n",
    "json_schema",
    "regex",
    "ebnf",
    "structural_tag",
    "ignore_eos",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "no_stop_trim",
    "stream_interval",
    "logit_bias",
    "sampling_seed",
    "custom_params",
    "beam_width",
    "watermark",
    "choice",
];

/// The parameters of one prompt.
#[derive(Clone, Debug)]
pub(crate) struct Sampling {
    pub max_new: usize,
    /// Whether the request has `max_new_tokens`.
    pub explicit: bool,
    pub stop: Vec<String>,
    pub n: usize,
}

/// The parameters of every prompt.
pub(crate) fn all(endpoint: Endpoint, fields: &Fields, count: usize) -> Result<Vec<Sampling>, Reject> {
    if endpoint != Endpoint::Generate {
        return Ok(vec![of_openai(endpoint, fields)?; count]);
    }
    let empty = Fields::new();
    let one = |at| {
        let own = per_item(fields.get("sampling_params"), at).and_then(Value::as_object).unwrap_or(&empty);
        of_generate(own)
    };
    (0..count).map(one).collect()
}

fn of_generate(fields: &Fields) -> Result<Sampling, Reject> {
    if let Some(unknown) = fields.keys().find(|key| !FIELDS.contains(&key.as_str())) {
        let known = FIELDS.map(|field| format!("`{field}`")).join(", ");
        return Err(Reject::Field(format!("unknown field `{unknown}`, expected one of {known}")));
    }
    check_temperature(fields, |value| value.to_string())?;
    let wanted = natural(fields.get("max_new_tokens"));
    Ok(Sampling {
        max_new: wanted.unwrap_or(DEFAULT_MAX_NEW),
        explicit: wanted.is_some(),
        stop: stops(fields.get("stop")),
        n: natural(fields.get("n")).unwrap_or(1).max(1),
    })
}

fn of_openai(endpoint: Endpoint, fields: &Fields) -> Result<Sampling, Reject> {
    // The real schema converts it to a float before the error message is formatted.
    check_temperature(fields, |value| format!("{:?}", value.as_f64().unwrap_or(0.0)))?;
    let wanted = match endpoint {
        Endpoint::Responses => natural(fields.get("max_output_tokens"))
            .map(|tokens| tokens.saturating_sub(RESPONSES_RESERVED_TOKENS)),
        _ => natural(fields.get("max_completion_tokens")).or_else(|| natural(fields.get("max_tokens"))),
    };
    let default = match endpoint {
        Endpoint::Completions => DEFAULT_MAX_NEW_COMPLETIONS,
        _ => DEFAULT_MAX_NEW,
    };
    Ok(Sampling {
        max_new: wanted.unwrap_or(default),
        explicit: wanted.is_some(),
        stop: stops(fields.get(if endpoint == Endpoint::Messages { "stop_sequences" } else { "stop" })),
        n: if endpoint.names_events() { 1 } else { natural(fields.get("n")).unwrap_or(1).max(1) },
    })
}

fn natural(value: Option<&Value>) -> Option<usize> {
    value.and_then(Value::as_u64).and_then(|number| usize::try_from(number).ok())
}

fn check_temperature(fields: &Fields, print: impl Fn(&Value) -> String) -> Result<(), Reject> {
    match fields.get("temperature") {
        Some(value) if value.as_f64().is_some_and(|degrees| degrees < 0.0) => {
            let message = format!("temperature must be a non-negative finite number, got {}.", print(value));
            Err(Reject::Value(message))
        }
        _ => Ok(()),
    }
}

fn stops(wanted: Option<&Value>) -> Vec<String> {
    match wanted {
        Some(Value::String(stop)) => vec![stop.clone()],
        Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        _ => Vec::new(),
    }
}
