//! Finds images, audio and video in a request body, while it arrives.
//!
//! It looks where SGLang does: at the `type` of the parts of a message's `content`, and at `image_data` and
//! its like on `/generate`. It has a pass of its own over the bytes, behind the inspector's, because it is
//! needed only while all encoders are down. Whether the text is JSON is checked there, not here.

use super::Dialect;
use super::inspector::skip_string;
use super::strict::unescape;
use crate::wire::json::find_structural;

/// The most bytes that are kept of a name or a type. The longest that matters, `input_audio`, has 66 with all
/// its characters written as `\u` escapes.
const MAX_WORD: usize = 72;

/// Types of parts with media, of the chat, Responses and Anthropic APIs.
const MEDIA_TYPES: [&[u8]; 9] = [
    b"image_url",
    b"image",
    b"input_image",
    b"video_url",
    b"video",
    b"input_video",
    b"audio_url",
    b"audio",
    b"input_audio",
];

/// What the name before a value says about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Meaning {
    /// A list of messages or parts.
    Parts,
    /// The type of a part.
    Type,
    /// Media without a part around it.
    Data,
    Other,
}

/// What the scanner is within.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Within {
    /// An object or list on the way to parts.
    Container,
    /// A string there, which is kept or not.
    Text {
        escaped: bool,
        kept: bool,
    },
    /// A value off that way.
    Skipped,
    SkippedText {
        escaped: bool,
    },
}

/// Looks for media. [Feed](Self::feed) it a body's bytes in order, each chunk after the inspector has
/// accepted it.
#[derive(Debug)]
pub(crate) struct MediaFinder {
    dialect: Dialect,
    found: bool,
    within: Within,
    /// Open brackets on the way from the body to a part. The body is 1, lists are even, objects are odd.
    level: usize,
    /// Open brackets within a skipped value.
    skipped: usize,
    /// In an object: the next string is a value and no name.
    is_value: bool,
    meaning: Meaning,
    /// The name or type that is being read, still escaped.
    word: Vec<u8>,
}

impl MediaFinder {
    pub(crate) fn new(dialect: Dialect) -> Self {
        Self {
            dialect,
            found: false,
            within: Within::Container,
            level: 0,
            skipped: 0,
            is_value: false,
            meaning: Meaning::Other,
            word: Vec::new(),
        }
    }

    /// Whether there are media in what it was fed.
    pub(crate) fn found(&self) -> bool {
        self.found
    }

    /// Reads the body's next chunk.
    pub(crate) fn feed(&mut self, chunk: &[u8]) {
        let mut at = 0;
        while at < chunk.len() && !self.found {
            at = match self.within {
                Within::Container => self.in_container(chunk[at], at),
                Within::Text { escaped, kept } => self.in_text(chunk, at, escaped, kept),
                Within::Skipped => self.in_skipped(chunk, at),
                Within::SkippedText { escaped } => self.in_skipped_text(chunk, at, escaped),
            };
        }
    }

    fn in_container(&mut self, byte: u8, at: usize) -> usize {
        match byte {
            b'"' => self.start_text(),
            b'{' | b'[' => self.open(byte),
            b'}' | b']' => {
                self.level = self.level.saturating_sub(1);
                self.meaning = Meaning::Other;
                // The value of a name, or an element: what follows is a comma, or the next end.
                self.is_value = self.is_object();
            }
            b':' => self.is_value = true,
            b',' => (self.is_value, self.meaning) = (false, Meaning::Other),
            // White space, and scalars, which say nothing.
            _ => {}
        }
        at + 1
    }

    fn is_object(&self) -> bool {
        self.level % 2 == 1
    }

    fn start_text(&mut self) {
        let is_name = self.is_object() && !self.is_value;
        if self.is_value && self.meaning == Meaning::Data {
            self.found = true;
        }
        self.word.clear();
        let kept = is_name || (self.is_value && self.meaning == Meaning::Type);
        self.within = Within::Text { escaped: false, kept };
    }

    fn open(&mut self, bracket: u8) {
        let is_on_the_way = match (bracket, self.level) {
            (b'{', 0) => true,
            (b'{', _) => !self.is_object(),
            _ => self.is_object() && self.meaning == Meaning::Parts,
        };
        if bracket == b'{' && self.meaning == Meaning::Data {
            self.found = true;
        }
        if is_on_the_way {
            self.level += 1;
            (self.is_value, self.meaning) = (false, Meaning::Other);
        } else {
            (self.within, self.skipped) = (Within::Skipped, 1);
        }
    }

    fn in_text(&mut self, chunk: &[u8], at: usize, escaped: bool, kept: bool) -> usize {
        let (end, unfinished) = skip_string(chunk, at, escaped);
        if kept {
            // One byte more than a word that matters, so that a longer one is not taken for it.
            let left = (MAX_WORD + 1).saturating_sub(self.word.len());
            self.word.extend_from_slice(&chunk[at..at + left.min(end - at)]);
        }
        match unfinished {
            Some(escaped) => self.within = Within::Text { escaped, kept },
            None => {
                self.within = Within::Container;
                if kept {
                    self.end_word();
                }
            }
        }
        end
    }

    /// A name or a type was read, with the quote behind it unless it is too long.
    fn end_word(&mut self) {
        let text = self.word.strip_suffix(b"\"").unwrap_or_default();
        let unescaped = text.contains(&b'\\').then(|| unescape(text).unwrap_or_default());
        let word = unescaped.as_ref().map_or(text, String::as_bytes);
        if self.is_value {
            self.found = MEDIA_TYPES.contains(&word);
        } else {
            self.meaning = self.meaning_of(word);
        }
    }

    /// What the value of this name is, in the object that is being read.
    fn meaning_of(&self, name: &[u8]) -> Meaning {
        match (name, self.dialect, self.level) {
            (b"messages", Dialect::Chat | Dialect::Messages, 1) | (b"input", Dialect::Responses, 1) => {
                Meaning::Parts
            }
            (b"image_data" | b"video_data" | b"audio_data", Dialect::Generate, 1) => Meaning::Data,
            (_, _, 1) => Meaning::Other,
            (b"type", ..) => Meaning::Type,
            // Parts may have parts: of the result of a tool, for example.
            (b"content", ..) | (b"output", Dialect::Responses, _) => Meaning::Parts,
            _ => Meaning::Other,
        }
    }

    fn in_skipped(&mut self, chunk: &[u8], at: usize) -> usize {
        let Some(offset) = find_structural(&chunk[at..]) else { return chunk.len() };
        let end = at + offset + 1;
        match chunk[end - 1] {
            b'"' => self.within = Within::SkippedText { escaped: false },
            b'{' | b'[' => self.skipped += 1,
            _ => {
                self.skipped = self.skipped.saturating_sub(1);
                if self.skipped == 0 {
                    self.within = Within::Container;
                }
            }
        }
        // A list of media; one of nulls is none.
        if self.meaning == Meaning::Data && matches!(chunk[end - 1], b'"' | b'{') {
            self.found = true;
        }
        end
    }

    fn in_skipped_text(&mut self, chunk: &[u8], at: usize, escaped: bool) -> usize {
        let (end, unfinished) = skip_string(chunk, at, escaped);
        self.within = match unfinished {
            Some(escaped) => Within::SkippedText { escaped },
            None => Within::Skipped,
        };
        end
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Dialect::*;

    /// Whether media are found, however the body is cut into chunks.
    fn has_media(dialect: Dialect, body: &str) -> bool {
        assert!(serde_json::from_str::<serde_json::Value>(body).is_ok(), "{body}");
        let found = |chunks: &[&[u8]]| {
            let mut finder = MediaFinder::new(dialect);
            chunks.iter().for_each(|chunk| finder.feed(chunk));
            finder.found()
        };
        let body = body.as_bytes();
        let whole = found(&[body]);
        for cut in 0..body.len() {
            let (first, second) = body.split_at(cut);
            assert_eq!(found(&[first, second]), whole, "cut at {cut}");
        }
        assert_eq!(found(&body.chunks(1).collect::<Vec<_>>()), whole, "byte by byte");
        whole
    }

    fn message(content: &str) -> String {
        format!(
            r#"{{"model":"m","messages":[{{"role":"system","content":"s"}},{{"role":"user","content":{content}}}],"n":1}}"#
        )
    }

    #[test]
    fn parts_of_messages_are_found() {
        for kind in ["image_url", "video_url", "audio_url", "input_audio", "image", "video", "audio"] {
            let part =
                format!(r#"[{{"type":"text","text":"t"}},{{"{kind}":{{"url":"data:"}},"type":"{kind}"}}]"#);
            assert!(has_media(Chat, &message(&part)), "{kind}");
        }
        for written in [
            r#"[{"type":"\u0069mage_url"}]"#,
            r#"[{"\u0074ype":"image_url"}]"#,
            r#"[ {"a" : [ {"b":[]} ] , "type" : "image_url" } ]"#,
            r#"[{"type":"text"},{"type":"tool_result","content":[{"type":"text"},{"type":"image"}]}]"#,
            r#"[{"type":"\u0069\u006e\u0070\u0075\u0074\u005f\u0061\u0075\u0064\u0069\u006f"}]"#,
        ] {
            assert!(has_media(Chat, &message(written)), "{written}");
            assert!(has_media(Messages, &message(written)), "{written}");
        }
        assert!(has_media(Chat, r#"{"m\u0065ssages":[{"content":[{"type":"image_url"}]}]}"#));
        assert!(has_media(Responses, r#"{"input":[{"role":"user","content":[{"type":"input_image"}]}]}"#));
        assert!(has_media(Responses, r#"{"input":[{"type":"x","output":[{"type":"input_image"}]}]}"#));
        assert!(has_media(Responses, r#"{"input":[{"type":"input_image","image_url":"data:"}]}"#));
    }

    #[test]
    fn what_only_looks_like_media_is_not() {
        for content in [
            r#""image_url""#,
            r#""{\"type\":\"image_url\"}""#,
            "null",
            "[]",
            r#"[{"type":"text","text":"\"type\":\"image_url\""}]"#,
            r#"[{"type":"text","text":"image_url"}]"#,
            r#"[{"text":"type"},{"image_url":"type"}]"#,
            r#"[{"type":"image_urls"}]"#,
            r#"[{"type":"image_url\n"}]"#,
            r#"[{"type":["image_url"]}]"#,
            r#"[{"type":{"type":"image_url"}}]"#,
            r#"[{"types":"image_url"}]"#,
            r#"[{"type":"tool_use","input":{"type":"image_url","content":[{"type":"image"}]}}]"#,
            r#"{"type":"image_url"}"#,
            r#"[[{"type":"image_url"}]]"#,
            r#"["image_url","type"]"#,
        ] {
            assert!(!has_media(Chat, &message(content)), "{content}");
            assert!(!has_media(Messages, &message(content)), "{content}");
        }
        for body in [
            r#"{"tools":[{"type":"image_url","content":[{"type":"image"}]}],"messages":[]}"#,
            r#"{"input":[{"content":[{"type":"image_url"}]}]}"#,
            r#"{"x":{"messages":[{"content":[{"type":"image_url"}]}]}}"#,
            r#"{"image_data":"data:"}"#,
            r#"{"type":"image_url","content":[{"type":"image_url"}]}"#,
            r#"{"messages":{"content":[{"type":"image_url"}]}}"#,
        ] {
            assert!(!has_media(Chat, body), "{body}");
        }
        let long = "x".repeat(2 * MAX_WORD);
        assert!(!has_media(Chat, &message(&format!(r#"[{{"type":"{long}"}},{{"{long}":"image_url"}}]"#))));
        assert!(!has_media(Completions, r#"{"prompt":["image_url"],"image_data":"x"}"#));
    }

    #[test]
    fn data_of_generate_is_found_unless_it_is_null() {
        for field in ["image_data", "video_data", "audio_data"] {
            for (value, found) in [
                (r#""data:""#, true),
                (r#"["data:"]"#, true),
                (r#"[null,[null,"data:"]]"#, true),
                (r#"{"url":"data:"}"#, true),
                (r#"[{"format":"x"}]"#, true),
                ("null", false),
                ("[]", false),
                ("[null,[null]]", false),
            ] {
                let body = format!(r#"{{"{field}":{value},"text":"image_data","n":[["x"]]}}"#);
                assert_eq!(has_media(Generate, &body), found, "{body}");
                let body =
                    format!(r#"{{"text":["a"],"sampling_params":{{"image_data":"x"}},"{field}":{value}}}"#);
                assert_eq!(has_media(Generate, &body), found, "{body}");
            }
        }
        assert!(!has_media(Generate, r#"{"text":"t","input":[{"content":[{"type":"image_url"}]}]}"#));
    }

    #[test]
    fn bytes_that_are_no_json_do_no_harm() {
        for body in ["]]]]{{{{", "}}\"", "{\"messages\":[}]{{]", "[\"type\":\"image_url\"]"] {
            let mut finder = MediaFinder::new(Chat);
            finder.feed(body.as_bytes());
            assert!(!finder.found(), "{body}");
        }
    }
}
