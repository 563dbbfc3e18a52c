//! Responses of `/v1/responses`, OpenAI's second API, complete and streamed. Events have names and numbers,
//! and the stream ends with `response.completed`, `.incomplete` or `.failed` instead of `[DONE]`. Every
//! snapshot of a response repeats the request's settings.

use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Value, value::RawValue};

use super::{
    chat,
    config::{Role, SimConfig},
    generation::Run,
    json::{self, put},
    output::{Finish, Output},
    request::{Fields, Tool, new_id, unix_time},
    response::named_event,
};

/// The settings of a request that its response repeats, as JSON.
#[derive(Debug)]
pub(crate) struct Settings {
    pub id: String,
    created: u64,
    model: String,
    /// From `parallel_tool_calls` to `tools`.
    tools: Vec<u8>,
    /// From `instructions` to `temperature`.
    limits: Vec<u8>,
    text: Option<String>,
    /// From `top_p` to `metadata`.
    rest: Vec<u8>,
    /// Whether the model may call a tool. Then messages are held back until it is known that it does not.
    may_call: bool,
}

/// Parts of the body whose bytes are repeated.
#[derive(Default, Deserialize)]
struct Repeated<'a> {
    #[serde(borrow, default)]
    tools: Option<Vec<RepeatedTool<'a>>>,
    #[serde(borrow, default)]
    tool_choice: Option<&'a RawValue>,
    #[serde(borrow, default)]
    text: Option<&'a RawValue>,
    #[serde(borrow, default)]
    metadata: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct RepeatedTool<'a> {
    #[serde(borrow, rename = "type")]
    kind: &'a RawValue,
    #[serde(borrow, default)]
    name: Option<&'a RawValue>,
    #[serde(borrow, default)]
    description: Option<&'a RawValue>,
    #[serde(borrow, default)]
    parameters: Option<&'a RawValue>,
    #[serde(default)]
    strict: Option<bool>,
}

fn raw<'a>(value: Option<&'a RawValue>, default: &'a str) -> &'a str {
    value.map_or(default, RawValue::get)
}

impl Settings {
    pub(crate) fn of(body: &[u8], fields: &Fields, config: &SimConfig) -> Self {
        let repeated: Repeated<'_> = serde_json::from_slice(body).unwrap_or_default();
        let value = |name: &str, default: &str| match fields.get(name) {
            None | Some(Value::Null) => default.to_owned(),
            Some(value) => value.to_string(),
        };
        let float = |name: &str| match fields.get(name).and_then(Value::as_f64) {
            Some(number) => format!("{number:?}"),
            None => "null".to_owned(),
        };
        let text = |name: &str| fields.get(name).and_then(Value::as_str).map(str::to_owned);
        let choice = raw(repeated.tool_choice, "\"auto\"");
        let listed = repeated.tools.as_deref().unwrap_or_default();
        let mut tools = Vec::new();
        put(
            &mut tools,
            format_args!(
                ",\"parallel_tool_calls\":{},\"tool_choice\":{choice},\"tools\":[",
                value("parallel_tool_calls", "true")
            ),
        );
        for (at, tool) in listed.iter().enumerate() {
            let comma = if at > 0 { "," } else { "" };
            put(
                &mut tools,
                format_args!(
                    "{comma}{{\"type\":{},\"name\":{},\"description\":{},\"parameters\":{},\"strict\":{},\
                     \"tools\":null,\"defer_loading\":null,\"format\":null}}",
                    tool.kind.get(),
                    raw(tool.name, "null"),
                    raw(tool.description, "null"),
                    raw(tool.parameters, "null"),
                    tool.strict.unwrap_or(false)
                ),
            );
        }
        tools.push(b']');
        let limits = format!(
            ",\"instructions\":{},\"max_output_tokens\":{},\"previous_response_id\":null,\"reasoning\":{{\
             \"effort\":null,\"summary\":null}},\"store\":{},\"temperature\":{}",
            value("instructions", "null"),
            value("max_output_tokens", "null"),
            value("store", "true"),
            float("temperature")
        );
        let rest = format!(
            ",\"top_p\":{},\"truncation\":{},\"user\":{},\"metadata\":{}}}",
            float("top_p"),
            value("truncation", "\"disabled\""),
            value("user", "null"),
            raw(repeated.metadata, "{}")
        );
        Self {
            id: text("request_id").unwrap_or_else(|| format!("resp_{}", new_id())),
            created: unix_time() as u64,
            model: text("model").unwrap_or_else(|| config.model.clone()),
            may_call: !listed.is_empty() && choice != "\"none\"",
            text: repeated.text.map(|text| text.get().to_owned()),
            limits: limits.into_bytes(),
            rest: rest.into_bytes(),
            tools,
        }
    }

    /// Appends the response as it is now.
    fn snapshot(&self, out: &mut Vec<u8>, now: &Snapshot<'_>) {
        out.extend_from_slice(b"{\"id\":");
        json::string(out, &self.id);
        put(out, format_args!(",\"object\":\"response\",\"created_at\":{},\"model\":", self.created));
        json::string(out, &self.model);
        out.extend_from_slice(b",\"output\":[");
        out.extend_from_slice(now.items);
        put(out, format_args!("],\"status\":\"{}\",\"usage\":", now.status));
        match now.tokens {
            None => out.extend_from_slice(b"null"),
            Some((prompt, produced)) => put(
                out,
                format_args!(
                    "{{\"input_tokens\":{prompt},\"input_tokens_details\":{{\"cached_tokens\":0,\
                     \"cache_write_tokens\":0}},\"output_tokens\":{produced},\"output_tokens_details\":{{\
                     \"reasoning_tokens\":0}},\"total_tokens\":{}}}",
                    prompt + produced
                ),
            ),
        }
        out.extend_from_slice(&self.tools);
        out.extend_from_slice(b",\"error\":");
        match now.error {
            None => out.extend_from_slice(b"null"),
            Some(message) => {
                out.extend_from_slice(b"{\"code\":\"server_error\",\"message\":");
                json::string(out, message);
                out.push(b'}');
            }
        }
        let incomplete = match now.status {
            "incomplete" => "{\"reason\":\"max_output_tokens\"}",
            _ => "null",
        };
        put(out, format_args!(",\"incomplete_details\":{incomplete}"));
        out.extend_from_slice(&self.limits);
        let format = if now.only_text { "{\"format\":{\"type\":\"text\"}}" } else { "null" };
        put(out, format_args!(",\"text\":{}", self.text.as_deref().unwrap_or(format)));
        out.extend_from_slice(&self.rest);
    }

    /// The event that has the response as it is now.
    fn lifecycle(&self, sequence: usize, now: &Snapshot<'_>, name: &str) -> Bytes {
        let mut out = format!("{{\"type\":\"response.{name}\",\"response\":").into_bytes();
        self.snapshot(&mut out, now);
        put(&mut out, format_args!(",\"sequence_number\":{sequence}}}"));
        named_event(&format!("response.{name}"), &out)
    }

    /// The events before anything is known of the request.
    pub(crate) fn first_events(&self) -> [Bytes; 2] {
        let now = Snapshot { status: "in_progress", ..Snapshot::default() };
        [self.lifecycle(0, &now, "created"), self.lifecycle(1, &now, "in_progress")]
    }

    /// The event that follows the first ones where nothing is generated.
    pub(crate) fn failed_event(&self, message: &str) -> Bytes {
        let now = Snapshot { status: "failed", error: Some(message), ..Snapshot::default() };
        self.lifecycle(FIRST_EVENTS, &now, "failed")
    }
}

/// Number of events before the first of the output.
const FIRST_EVENTS: usize = 2;

/// What changes in a response while it is generated.
#[derive(Default)]
struct Snapshot<'a> {
    status: &'a str,
    /// The contents of the list of output items.
    items: &'a [u8],
    only_text: bool,
    /// Prompt and output.
    tokens: Option<(usize, usize)>,
    error: Option<&'a str>,
}

impl<'a> Snapshot<'a> {
    fn of(run: &Run, output: &'a Output, items: &'a [u8], called: bool) -> Self {
        let (status, error) = match &output.finish {
            // The grammar ends a call; the tokens of it are not simulated.
            _ if called => ("completed", None),
            Some(Finish::Length(_)) => ("incomplete", None),
            Some(Finish::Abort { message, .. }) => ("failed", Some(message.as_str())),
            Some(Finish::Stop(_)) | None => ("completed", None),
        };
        let only_text = !called && !items.is_empty();
        let tokens = Some((run.request.items[0].prompt.tokens, output.produced));
        Self { status, items, only_text, tokens, error }
    }
}

/// A tool call is made where the request forces one; prefill has no more than the first token of it.
fn tool(run: &Run) -> Option<&Tool> {
    run.request.tool.as_ref().filter(|_| run.role() != Role::Prefill)
}

/// Appends an item of a tool call.
fn call(out: &mut Vec<u8>, id: &str, tool: &Tool, arguments: &str, status: &str) {
    out.extend_from_slice(b"{\"arguments\":");
    json::string(out, arguments);
    put(out, format_args!(",\"call_id\":\"call_{}\",\"name\":", &id[..24]));
    json::string(out, &tool.name);
    put(
        out,
        format_args!(",\"type\":\"function_call\",\"id\":\"fc_{}\",\"status\":\"{status}\"}}", &id[24..]),
    );
}

/// Appends a part of a message, with log-probabilities in the form of a JSON value.
fn text_part(out: &mut Vec<u8>, text: &str, logprobs: &[u8]) {
    out.extend_from_slice(b"{\"annotations\":[],\"text\":");
    json::string(out, text);
    out.extend_from_slice(b",\"type\":\"output_text\",\"logprobs\":");
    out.extend_from_slice(logprobs);
    out.push(b'}');
}

/// Appends an item of a message with the given part, or with none.
fn message(out: &mut Vec<u8>, id: &str, part: &[u8], status: &str) {
    put(out, format_args!("{{\"id\":\"msg_{id}\",\"content\":["));
    out.extend_from_slice(part);
    put(
        out,
        format_args!(
            "],\"role\":\"assistant\",\"status\":\"{status}\",\"type\":\"message\",\"phase\":\"final_answer\"}}"
        ),
    );
}

/// The complete response.
pub(crate) fn whole(run: &Run, settings: &Settings, output: &Output) -> Vec<u8> {
    let mut items = Vec::new();
    let tool = tool(run);
    match tool {
        Some(tool) => call(&mut items, &run.id, tool, &tool.arguments, "completed"),
        None if output.text.is_empty() => {}
        None => {
            let (item, mut logprobs, mut part) = (&run.request.items[0], Vec::new(), Vec::new());
            match item.logprobs {
                None => logprobs.extend_from_slice(b"null"),
                Some(_) => chat::token_logprobs(&mut logprobs, item, output),
            }
            text_part(&mut part, &output.text, &logprobs);
            message(&mut items, &run.id, &part, "completed");
        }
    }
    let mut out = Vec::new();
    settings.snapshot(&mut out, &Snapshot::of(run, output, &items, tool.is_some()));
    out
}

/// The state of a stream. Streams have no log-probabilities, asked for or not.
#[derive(Debug)]
pub(crate) struct Stream {
    sequence: usize,
    /// Whether the message has begun.
    message: bool,
    /// Events of a message that may be followed by a call.
    held: Option<Vec<Bytes>>,
}

impl Stream {
    pub(crate) fn new(settings: &Settings) -> Self {
        Self { sequence: FIRST_EVENTS, message: false, held: settings.may_call.then(Vec::new) }
    }

    /// An event with its fields before and behind its number; they are in the order of their names.
    fn event(&mut self, events: &mut Vec<Bytes>, kind: &str, before: &str, behind: &str) {
        let number = self.sequence;
        self.sequence += 1;
        let payload =
            format!("{{{before},\"sequence_number\":{number}{behind},\"type\":\"response.{kind}\"}}");
        events.push(named_event(&format!("response.{kind}"), payload.as_bytes()));
    }

    /// The events for the output since the last step.
    pub(crate) fn step(&mut self, run: &Run, settings: &Settings, output: &Output) -> Vec<Bytes> {
        let mut events = Vec::new();
        // What a forced call would be is never streamed as text.
        if run.request.tool.is_none() && !output.text_json.is_empty() {
            self.text(&mut events, &run.id, &String::from_utf8_lossy(&output.text_json));
        }
        if output.finish.is_some() {
            self.end(&mut events, run, settings, output);
        }
        let Some(held) = &mut self.held else { return events };
        held.append(&mut events);
        if output.finish.is_some() { std::mem::take(held) } else { events }
    }

    fn text(&mut self, events: &mut Vec<Bytes>, id: &str, delta: &str) {
        if !std::mem::replace(&mut self.message, true) {
            let item = format!(
                "\"item\":{},\"output_index\":0",
                text_of(|out| message(out, id, b"", "in_progress"))
            );
            self.event(events, "output_item.added", &item, "");
            self.event(events, "content_part.added", &part_fields(id, ""), "");
        }
        let fields = format!(
            "\"content_index\":0,\"delta\":\"{delta}\",\"item_id\":\"msg_{id}\",\"logprobs\":[],\"output_index\":0"
        );
        self.event(events, "output_text.delta", &fields, "");
    }

    fn end(&mut self, events: &mut Vec<Bytes>, run: &Run, settings: &Settings, output: &Output) {
        let tool = tool(run);
        let item = match tool {
            Some(tool) => self.end_call(events, &run.id, tool),
            None if self.message => self.end_message(events, &run.id, &output.text),
            None => String::new(),
        };
        let now = Snapshot::of(run, output, item.as_bytes(), tool.is_some());
        events.push(settings.lifecycle(self.sequence, &now, now.status));
    }

    fn end_message(&mut self, events: &mut Vec<Bytes>, id: &str, text: &str) -> String {
        let quoted = text_of(|out| json::string(out, text));
        let fields =
            format!("\"content_index\":0,\"item_id\":\"msg_{id}\",\"logprobs\":[],\"output_index\":0");
        self.event(events, "output_text.done", &fields, &format!(",\"text\":{quoted}"));
        self.event(events, "content_part.done", &part_fields(id, text), "");
        let part = text_of(|out| text_part(out, text, b"null"));
        let item = text_of(|out| message(out, id, part.as_bytes(), "completed"));
        self.event(events, "output_item.done", &format!("\"item\":{item},\"output_index\":0"), "");
        item
    }

    fn end_call(&mut self, events: &mut Vec<Bytes>, id: &str, tool: &Tool) -> String {
        let begun = text_of(|out| call(out, id, tool, "", "in_progress"));
        self.event(events, "output_item.added", &format!("\"item\":{begun},\"output_index\":0"), "");
        let (arguments, name) =
            (text_of(|out| json::string(out, &tool.arguments)), text_of(|out| json::string(out, &tool.name)));
        let place = format!("\"item_id\":\"fc_{}\"", &id[24..]);
        let delta = format!("\"delta\":{arguments},{place},\"output_index\":0");
        self.event(events, "function_call_arguments.delta", &delta, "");
        let done = format!("\"arguments\":{arguments},{place},\"name\":{name},\"output_index\":0");
        self.event(events, "function_call_arguments.done", &done, "");
        let item = text_of(|out| call(out, id, tool, &tool.arguments, "completed"));
        self.event(events, "output_item.done", &format!("\"item\":{item},\"output_index\":0"), "");
        item
    }
}

/// What is written into an empty buffer, as text.
fn text_of(write: impl FnOnce(&mut Vec<u8>)) -> String {
    let mut out = Vec::new();
    write(&mut out);
    String::from_utf8_lossy(&out).into_owned()
}

/// The fields of an event about the only part of the message.
fn part_fields(id: &str, text: &str) -> String {
    let part = text_of(|out| text_part(out, text, b"null"));
    format!("\"content_index\":0,\"item_id\":\"msg_{id}\",\"output_index\":0,\"part\":{part}")
}
