//! Formats an event as a line: text for people, or JSON for programs.
//!
//! Values are escaped, so that a line stays one line and JSON stays valid.

use std::fmt;

use tracing::field::{Field, Visit};
use tracing::{Event, Level};

use super::clock::Clock;
use super::escape;

/// Longest value in a line, in bytes; longer ones are truncated.
const MAX_VALUE: usize = 8 << 10;

/// The format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// Time, level, target and message, followed by `name=value`.
    Text,
    /// One JSON object per line.
    Json,
}

/// The beginning of every line: time, level, target and message.
pub(super) struct Begin<'a> {
    pub(super) level: Level,
    pub(super) target: &'a str,
    pub(super) message: &'a str,
}

impl Begin<'_> {
    pub(super) fn put(&self, format: Format, clock: &mut Clock, line: &mut Vec<u8>) {
        let (level, target, message) = (self.level.as_str(), self.target, cut(self.message));
        match format {
            Format::Text => {
                clock.put_now(line);
                // One space, and two before INFO and WARN: levels end in one column, as tracing-subscriber
                // writes them.
                escape::text(["", " ", "  "][6_usize.saturating_sub(level.len()).min(2)], line);
                escape::all(&[level, " ", target, ": "], line);
                escape::escaped(message, line);
            }
            Format::Json => {
                escape::text("{\"timestamp\":\"", line);
                clock.put_now(line);
                escape::all(&["\",\"level\":\"", level, "\",\"target\":\"", target, "\",\"message\":"], line);
                escape::json(message, line);
            }
        }
    }
}

/// Puts the end of every line.
pub(super) fn end(format: Format, line: &mut Vec<u8>) {
    escape::text(if format == Format::Json { "}\n" } else { "\n" }, line);
}

/// Puts an event's line, with its end.
pub(super) fn put_event(event: &Event<'_>, format: Format, clock: &mut Clock, line: &mut Vec<u8>) {
    let mut fields = Fields { format, message: String::new(), others: Vec::new() };
    event.record(&mut fields);
    let metadata = event.metadata();
    let begin = Begin { level: *metadata.level(), target: metadata.target(), message: &fields.message };
    begin.put(format, clock, line);
    line.extend_from_slice(&fields.others);
    end(format, line);
}

/// A line of text for a terminal.
pub(super) fn colored(line: &[u8], level: Level) -> String {
    let color = match level {
        Level::ERROR => "31",
        Level::WARN => "33",
        Level::INFO => "32",
        _ => "34",
    };
    // The level is the first of these words: nothing but the time is before it.
    let line = String::from_utf8_lossy(line);
    line.replacen(level.as_str(), &format!("\x1b[{color}m{level}\x1b[0m"), 1)
}

/// The line with the number of dropped lines. It is not an event, since the queue itself writes it.
pub(super) fn lost(count: u64, format: Format) -> Vec<u8> {
    let begin = Begin { level: Level::WARN, target: module_path!(), message: "log lines were lost" };
    let mut line = Vec::new();
    begin.put(format, &mut Clock::default(), &mut line);
    let [before, behind] = match format {
        Format::Text => [" ", "="],
        Format::Json => [",\"", "\":"],
    };
    escape::all(&[before, "lost", behind, &count.to_string()], &mut line);
    end(format, &mut line);
    line
}

struct Fields {
    format: Format,
    message: String,
    /// The other fields, formatted, each with its separator before it. They come after the message, in
    /// whichever order `tracing` visits them.
    others: Vec<u8>,
}

impl Fields {
    /// Puts a field's name, and then a value that needs no quotes.
    fn plain(&mut self, field: &Field, value: &str) {
        self.name(field);
        escape::text(value, &mut self.others);
    }

    fn name(&mut self, field: &Field) {
        let [before, behind] = match self.format {
            Format::Text => [" ", "="],
            Format::Json => [",\"", "\":"],
        };
        escape::all(&[before, field.name(), behind], &mut self.others);
    }

    fn text(&mut self, field: &Field, value: &str) {
        let value = cut(value);
        // tracing records an event's text as a field called `message`. In a line it comes first, without
        // this name.
        if field.name() == "message" {
            return self.message.push_str(value);
        }
        self.name(field);
        match self.format {
            Format::Json => escape::json(value, &mut self.others),
            Format::Text => escape::word(value, &mut self.others),
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // `%value` arrives here too: tracing wraps it so that its Debug text is its Display text.
        self.text(field, &format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.text(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.plain(field, &value.to_string());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.plain(field, &value.to_string());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.plain(field, &value.to_string());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        // JSON has no NaN and no infinity.
        if value.is_finite() {
            self.plain(field, &value.to_string());
        }
    }
}

/// The first [`MAX_VALUE`] bytes of a value, at most.
fn cut(value: &str) -> &str {
    let mut end = value.len().min(MAX_VALUE);
    while !value.is_char_boundary(end) {
        end -= 1;
    }
    &value[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn color_is_the_levels_alone() {
        let line = "2026-01-01T00:00:00.000000Z  WARN mini_lb: WARN\n";
        let expected = "2026-01-01T00:00:00.000000Z  \x1b[33mWARN\x1b[0m mini_lb: WARN\n";
        assert_eq!(colored(line.as_bytes(), Level::WARN), expected);
    }
}
