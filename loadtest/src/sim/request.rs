//! Parses request bodies: prompts, limits, bootstrap targets. Checks are SGLang's, in its order as far as a
//! client can observe it.

use std::{sync::Arc, time::SystemTime};

use serde_json::{Map, Value};
use tokio::sync::watch;

use super::{
    bootstrap_fields::{self, BootstrapTarget},
    config::{Role, SimConfig},
    encoder::media::{self, Media},
    prompt::Prompt,
    ranks::Dispatch,
    responses_api::Settings,
    sampling::{self, Sampling},
};

/// Endpoints that generate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Endpoint {
    Generate,
    Chat,
    Completions,
    Responses,
    Messages,
}

impl Endpoint {
    /// Whether its streams have names of events, and no `[DONE]`.
    pub(crate) fn names_events(self) -> bool {
        matches!(self, Self::Responses | Self::Messages)
    }

    /// Whether it sends the head of a stream before it validates any value.
    pub(crate) fn streams_at_once(self) -> bool {
        self == Self::Generate || self.names_events()
    }
}

/// Why a request is rejected.
#[derive(Debug)]
pub(crate) enum Reject {
    /// An invalid value: 400 in the endpoint's own shape.
    Value(String),
    /// An unknown sampling parameter.
    Field(String),
    /// The body violates the endpoint's schema.
    Validation(String),
    /// A model that the server does not have.
    Model(String),
    /// A field that names an earlier response.
    Stored(&'static str),
    /// The real server's process crashes.
    Crash,
    /// The real server's handler raises an exception: a 500 without a JSON body.
    Internal,
}

/// Which log-probabilities a response has.
#[derive(Clone, Debug, Default)]
pub(crate) struct Logprobs {
    /// The first prompt token that is listed; `None` lists none.
    pub start: Option<usize>,
    pub top: usize,
    pub ids: Option<Vec<u32>>,
    pub text: bool,
}

/// One prompt and its parameters.
#[derive(Debug)]
pub(crate) struct Item {
    pub prompt: Prompt,
    pub sampling: Sampling,
    pub logprobs: Option<Logprobs>,
    /// The first token whose routed experts are listed; `None` lists none.
    pub experts: Option<usize>,
    /// Language-only: what encoders have to encode.
    pub media: Vec<Media>,
    pub bootstrap: BootstrapTarget,
    /// Where it runs, once that is decided.
    pub dispatch: Dispatch,
    pub rid: String,
    /// Set to true to cancel the item.
    pub cancel: watch::Sender<bool>,
}

/// A tool that must be called.
#[derive(Debug)]
pub(crate) struct Tool {
    pub name: String,
    pub arguments: String,
}

/// An accepted request.
#[derive(Debug)]
pub(crate) struct Request {
    pub endpoint: Endpoint,
    pub stream: bool,
    /// Whether prompts are a list, even of one.
    pub batch: bool,
    /// Responses per prompt.
    pub n: usize,
    pub items: Vec<Item>,
    pub model: String,
    pub usage: bool,
    pub continuous_usage: bool,
    pub echo: bool,
    pub tool: Option<Tool>,
    /// Of `/v1/responses`.
    pub settings: Option<Arc<Settings>>,
    pub arrived_at: f64,
}

pub(crate) type Fields = Map<String, Value>;

/// 32 hexadecimal digits, as Python's `uuid4().hex`.
pub(crate) fn new_id() -> String {
    format!("{:032x}", fastrand::u128(..))
}

pub(crate) fn unix_time() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// Whether a body requests a stream; needed for rejected bodies, too.
pub(crate) fn wants_stream(fields: &Fields) -> bool {
    fields.get("stream").and_then(Value::as_bool).unwrap_or(false)
}

impl Request {
    pub(crate) fn parse(
        endpoint: Endpoint,
        mut fields: Fields,
        settings: Option<Arc<Settings>>,
        config: &SimConfig,
    ) -> Result<Self, Reject> {
        if endpoint == Endpoint::Responses {
            check_response(&fields, config)?;
        }
        let prompts = Prompts::take(endpoint, &mut fields)?;
        let count = prompts.list.len();
        let samplings = sampling::all(endpoint, &fields, count)?;
        let targets = match config.role {
            Role::Regular | Role::Encoder => (0..count).map(|_| BootstrapTarget::Missing).collect(),
            _ => bootstrap_fields::targets(&fields, count, prompts.batch)?,
        };
        let rids = match &settings {
            Some(settings) => vec![settings.id.clone()],
            None => rids(&fields, count, prompts.batch),
        };
        let n = samplings.iter().map(|sampling| sampling.n).max().unwrap_or(1);
        let parts = prompts.list.into_iter().zip(samplings).zip(targets).zip(rids).enumerate();
        let items: Vec<Item> = parts
            .map(|(at, (((prompt, sampling), bootstrap), rid))| Item {
                logprobs: logprobs(endpoint, &fields, at),
                experts: experts(&fields),
                media: if config.language_only {
                    media::of(endpoint, &fields, at, prompts.batch)
                } else {
                    Vec::new()
                },
                cancel: watch::Sender::new(false),
                prompt,
                sampling,
                bootstrap,
                dispatch: Dispatch::default(),
                rid,
            })
            .collect();
        check_lengths(&items, config.context_length)?;
        Ok(Self {
            stream: wants_stream(&fields),
            batch: prompts.batch,
            n,
            items,
            model: fields.get("model").and_then(Value::as_str).unwrap_or(&config.model).to_owned(),
            usage: stream_option(&fields, "include_usage"),
            continuous_usage: stream_option(&fields, "continuous_usage_stats"),
            echo: fields.get("echo").and_then(Value::as_bool).unwrap_or(false),
            tool: forced_tool(&fields),
            settings,
            endpoint,
            arrived_at: unix_time(),
        })
    }
}

struct Prompts {
    list: Vec<Prompt>,
    batch: bool,
}

impl Prompts {
    fn take(endpoint: Endpoint, fields: &mut Fields) -> Result<Self, Reject> {
        match endpoint {
            Endpoint::Generate => Self::of_generate(fields),
            Endpoint::Chat => match fields.get("messages") {
                Some(messages @ Value::Array(list)) if !list.is_empty() => {
                    Ok(Self { list: vec![Prompt::messages(messages)], batch: false })
                }
                Some(Value::Array(_)) => Err(Reject::Value("Messages cannot be empty.".to_owned())),
                _ => Err(missing("messages")),
            },
            Endpoint::Messages => Self::of_messages(fields),
            Endpoint::Responses => {
                let input = fields.get("input").filter(|input| !input.is_null());
                let own = input.ok_or_else(|| missing("input"))?;
                Ok(Self::of_turns(fields.get("instructions"), own))
            }
            Endpoint::Completions => match fields.remove("prompt") {
                Some(Value::String(text)) => Ok(Self { list: vec![Prompt::text(text)], batch: false }),
                Some(Value::Array(list)) if list.first().is_some_and(|first| !first.is_string()) => {
                    Self::of_ids(list)
                }
                Some(Value::Array(list)) => Self::of_texts(list),
                _ => Err(missing("prompt")),
            },
        }
    }

    fn of_messages(fields: &Fields) -> Result<Self, Reject> {
        let required = |name: &str| match fields.get(name) {
            None | Some(Value::Null) => Err(Reject::Validation(format!("{name}: Field required"))),
            Some(value) => Ok(value),
        };
        let messages = required("messages")?;
        required("max_tokens")?;
        Ok(Self::of_turns(fields.get("system"), messages))
    }

    /// The prompt of a system text and the turns that follow it, each of which may be a plain text.
    fn of_turns(system: Option<&Value>, turns: &Value) -> Self {
        let turn = |role: &str, content: &Value| {
            let fields = [("role", Value::from(role)), ("content", content.clone())];
            Value::Object(fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
        };
        let system = system.filter(|system| !system.is_null()).map(|text| turn("system", text));
        let turns = match turns {
            Value::Array(list) => list.clone(),
            text => vec![turn("user", text)],
        };
        let messages = Value::Array(system.into_iter().chain(turns).collect());
        Self { list: vec![Prompt::messages(&messages)], batch: false }
    }

    fn of_generate(fields: &mut Fields) -> Result<Self, Reject> {
        match fields.remove("text") {
            Some(Value::String(text)) => return Ok(Self { list: vec![Prompt::text(text)], batch: false }),
            Some(Value::Array(list)) => return Self::of_texts(list),
            Some(Value::Null) | None => {}
            Some(other) => return Err(string_wanted(&other)),
        }
        match fields.remove("input_ids") {
            Some(Value::Array(list)) => return Self::of_ids(list),
            Some(Value::Null) | None => {}
            Some(_) => return Err(missing("input_ids")),
        }
        match fields.remove("input_embeds") {
            Some(Value::Array(rows)) => Ok(Self::of_embeds(rows)),
            _ => {
                let message = "Either text, input_ids or input_embeds should be provided.";
                Err(Reject::Value(message.to_owned()))
            }
        }
    }

    fn of_texts(list: Vec<Value>) -> Result<Self, Reject> {
        let prompt = |value| match value {
            Value::String(text) => Ok(Prompt::text(text)),
            other => Err(string_wanted(&other)),
        };
        Ok(Self { list: list.into_iter().map(prompt).collect::<Result<_, _>>()?, batch: true })
    }

    fn of_ids(list: Vec<Value>) -> Result<Self, Reject> {
        match list.first() {
            None => Err(Reject::Value("input_ids cannot be empty.".to_owned())),
            Some(Value::Array(_)) => {
                let row =
                    |value: Value| value.as_array().map(|row| ids(row)).ok_or_else(|| missing("input_ids"));
                let rows = list.into_iter().map(row).map(|row| Ok(Prompt::ids(row??)));
                Ok(Self { list: rows.collect::<Result<_, Reject>>()?, batch: true })
            }
            Some(_) => Ok(Self { list: vec![Prompt::ids(ids(&list)?)], batch: false }),
        }
    }

    /// A list of rows of floats is one prompt; a list of such lists is a batch.
    fn of_embeds(rows: Vec<Value>) -> Self {
        let single = rows.first().and_then(|row| row.get(0)).is_some_and(Value::is_number);
        if single {
            let count = rows.len();
            return Self { list: vec![Prompt::opaque(&Value::Array(rows), count)], batch: false };
        }
        let length = |prompt: &Value| prompt.as_array().map_or(0, Vec::len);
        Self { list: rows.iter().map(|prompt| Prompt::opaque(prompt, length(prompt))).collect(), batch: true }
    }
}

fn ids(list: &[Value]) -> Result<Vec<u32>, Reject> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    list.iter().map(|value| id(value).ok_or_else(|| missing("input_ids"))).collect()
}

/// The checks of `/v1/responses` that come before all others.
fn check_response(fields: &Fields, config: &SimConfig) -> Result<(), Reject> {
    match fields.get("model").and_then(Value::as_str) {
        Some(model) if model != config.model => return Err(Reject::Model(model.to_owned())),
        _ => {}
    }
    match fields.get("previous_response_id") {
        None | Some(Value::Null) => Ok(()),
        Some(_) => Err(Reject::Stored("previous_response_id")),
    }
}

fn missing(field: &str) -> Reject {
    Reject::Validation(format!("{{'type': 'missing', 'loc': ('body', '{field}'), 'msg': 'Field required'}}"))
}

fn string_wanted(value: &Value) -> Reject {
    Reject::Validation(format!(
        "{{'type': 'string_type', 'loc': ('body', 'text', 'str'), 'msg': 'Input should be a valid string', \
         'input': {value}}}"
    ))
}

/// The value of a field that has one value for all items, or a list with one for each.
pub(crate) fn per_item(value: Option<&Value>, at: usize) -> Option<&Value> {
    match value {
        Some(Value::Array(list)) => list.get(at),
        other => other,
    }
}

fn rids(fields: &Fields, count: usize, batch: bool) -> Vec<String> {
    let rid = |at: usize| match fields.get("rid") {
        Some(Value::String(rid)) if batch => format!("{rid}_{at}"),
        other => per_item(other, at).and_then(Value::as_str).map_or_else(new_id, str::to_owned),
    };
    (0..count).map(rid).collect()
}

fn stream_option(fields: &Fields, name: &str) -> bool {
    fields
        .get("stream_options")
        .and_then(|options| options.get(name))
        .and_then(Value::as_bool)
        .unwrap_or(false)
}

/// The entry of `include` that asks `/v1/responses` for log-probabilities.
const RESPONSE_LOGPROBS: &str = "message.output_text.logprobs";

fn logprobs(endpoint: Endpoint, fields: &Fields, at: usize) -> Option<Logprobs> {
    let number = |name| per_item(fields.get(name), at).and_then(Value::as_i64);
    let flag = |name| per_item(fields.get(name), at).and_then(Value::as_bool).unwrap_or(false);
    let count = |number: Option<i64>| usize::try_from(number.unwrap_or(0)).unwrap_or(0);
    match endpoint {
        Endpoint::Generate => flag("return_logprob").then(|| Logprobs {
            // Below -1, the default, a negative number counts as 0.
            start: number("logprob_start_len")
                .filter(|&start| start != -1)
                .map(|start| usize::try_from(start).unwrap_or(0)),
            top: count(number("top_logprobs_num")),
            ids: listed_ids(fields.get("token_ids_logprob"), at),
            text: flag("return_text_in_logprobs"),
        }),
        Endpoint::Chat => {
            flag("logprobs").then(|| Logprobs { top: count(number("top_logprobs")), ..Logprobs::default() })
        }
        Endpoint::Responses => {
            let included = fields.get("include").and_then(Value::as_array);
            let wanted = included.is_some_and(|list| list.iter().any(|name| name == RESPONSE_LOGPROBS));
            wanted.then(|| Logprobs { top: count(number("top_logprobs")), ..Logprobs::default() })
        }
        Endpoint::Messages => None,
        Endpoint::Completions => number("logprobs").map(|top| Logprobs {
            start: (flag("echo") && top > 0).then_some(0),
            top: count(Some(top)),
            ..Logprobs::default()
        }),
    }
}

fn experts(fields: &Fields) -> Option<usize> {
    let start = fields.get("routed_experts_start_len").and_then(Value::as_u64).unwrap_or(0);
    let is_wanted = fields.get("return_routed_experts").and_then(Value::as_bool).unwrap_or(false);
    is_wanted.then_some(usize::try_from(start).unwrap_or(usize::MAX))
}

/// One list for all items, or a list of lists.
fn listed_ids(value: Option<&Value>, at: usize) -> Option<Vec<u32>> {
    let list = value?.as_array()?;
    let list = if list.first().is_some_and(Value::is_number) { list } else { list.get(at)?.as_array()? };
    ids(list).ok()
}

fn check_lengths(items: &[Item], limit: usize) -> Result<(), Reject> {
    for item in items {
        let (tokens, wanted) = (item.prompt.tokens, item.sampling.max_new);
        if tokens >= limit {
            return Err(Reject::Value(format!(
                "The input ({tokens} tokens) is longer than the model's context length ({limit} tokens)."
            )));
        }
        if item.sampling.explicit && tokens + wanted > limit {
            return Err(Reject::Value(format!(
                "Requested token count exceeds the model's maximum context length of {limit} tokens. You \
                 requested a total of {} tokens: {tokens} tokens from the input messages and {wanted} tokens \
                 for the completion. Please reduce the number of tokens in the input messages or the \
                 completion to fit within the limit.",
                tokens + wanted
            )));
        }
    }
    Ok(())
}

fn forced_tool(fields: &Fields) -> Option<Tool> {
    let tools = fields.get("tools")?.as_array()?;
    let named = match fields.get("tool_choice")? {
        Value::String(choice) if choice == "required" => None,
        // Anthropic's for `required`.
        choice if choice.get("type")? == "any" => None,
        choice => Some(choice.get("function").unwrap_or(choice).get("name")?.as_str()?),
    };
    // In chat a function is a field of its tool; elsewhere it is the tool.
    let function = |tool: &Value| Some(tool.get("function").unwrap_or(tool).clone());
    let matches = |function: &Value| named.is_none() || function.get("name").and_then(Value::as_str) == named;
    let function = tools.iter().filter_map(function).find(matches)?;
    Some(Tool {
        name: function.get("name")?.as_str()?.to_owned(),
        arguments: arguments(function.get("parameters").or_else(|| function.get("input_schema"))),
    })
}

/// The smallest object that satisfies a flat schema.
fn arguments(schema: Option<&Value>) -> String {
    let properties = schema.and_then(|schema| schema.get("properties")).and_then(Value::as_object);
    let sample = |property: &Value| match property.get("type").and_then(Value::as_str) {
        Some("integer" | "number") => Value::from(1),
        Some("boolean") => Value::from(true),
        Some("array") => Value::Array(Vec::new()),
        Some("object") => Value::Object(Map::new()),
        _ => property.get("enum").and_then(|list| list.get(0)).cloned().unwrap_or_else(|| Value::from("the")),
    };
    let fields: Map<String, Value> =
        properties.into_iter().flatten().map(|(name, property)| (name.clone(), sample(property))).collect();
    Value::Object(fields).to_string()
}
