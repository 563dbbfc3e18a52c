//! The images, audio and video of a request, as a language-only server finds them.

use serde_json::Value;

use crate::sim::request::{Endpoint, Fields, per_item};

/// What an encoder is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Modality {
    Image,
    Video,
    Audio,
}

impl Modality {
    pub(crate) const ALL: [Self; 3] = [Self::Image, Self::Video, Self::Audio];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Image => "IMAGE",
            Self::Video => "VIDEO",
            Self::Audio => "AUDIO",
        }
    }
}

/// One item: its modality, and its URL or data.
pub(crate) type Media = (Modality, String);

/// The media of the prompt at this place.
pub(crate) fn of(endpoint: Endpoint, fields: &Fields, at: usize, is_batch: bool) -> Vec<Media> {
    match endpoint {
        Endpoint::Generate => of_generate(fields, at, is_batch),
        Endpoint::Chat | Endpoint::Messages => of_messages(fields.get("messages")),
        Endpoint::Responses => of_messages(fields.get("input")),
        Endpoint::Completions => Vec::new(),
    }
}

fn of_generate(fields: &Fields, at: usize, is_batch: bool) -> Vec<Media> {
    let names = ["image_data", "video_data", "audio_data"];
    let mut all = Vec::new();
    for (name, modality) in names.into_iter().zip(Modality::ALL) {
        let value = fields.get(name);
        let own = if is_batch { per_item(value, at) } else { value };
        let items = match own {
            Some(Value::Array(items)) => items.iter().collect(),
            other => other.into_iter().collect::<Vec<_>>(),
        };
        all.extend(items.into_iter().filter_map(url).map(|url| (modality, url)));
    }
    all
}

fn of_messages(messages: Option<&Value>) -> Vec<Media> {
    let list = |value: Option<&Value>| value.and_then(Value::as_array).cloned().unwrap_or_default();
    let parts = list(messages).into_iter().flat_map(|message| list(message.get("content")));
    parts.filter_map(|part| of_part(&part)).collect()
}

fn of_part(part: &Value) -> Option<Media> {
    let (modality, name) = match part.get("type")?.as_str()? {
        "image_url" | "input_image" => (Modality::Image, "image_url"),
        "image" => (Modality::Image, "source"),
        "video_url" => (Modality::Video, "video_url"),
        "audio_url" => (Modality::Audio, "audio_url"),
        "input_audio" => (Modality::Audio, "input_audio"),
        _ => return None,
    };
    Some((modality, url(part.get(name)?)?))
}

/// A URL, or an object that has it or the data itself.
fn url(value: &Value) -> Option<String> {
    let inner = || value.get("url").or_else(|| value.get("data"));
    value.as_str().or_else(|| inner()?.as_str()).map(str::to_owned)
}
