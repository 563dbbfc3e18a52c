//! An event as a line: text for people, or JSON for programs.
//!
//! Values may hold what clients and servers sent. Whatever they hold, a line stays
//! one line, and JSON stays JSON.

use std::fmt::{self, Write};
use std::time::SystemTime;

use clap::ValueEnum;
use tracing::field::{Field, Visit};
use tracing::{Event, Level};

/// Longest value in a line; what is beyond is cut off.
const MAX_VALUE: usize = 8 << 10;

/// How lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Time, level, place and message, and then names with values
    Text,
    /// One JSON object a line
    Json,
}

/// An event's line, with its end.
pub(super) fn line(event: &Event<'_>, format: Format) -> String {
    let metadata = event.metadata();
    let (time, level, target) = (timestamp(SystemTime::now()), metadata.level(), metadata.target());
    let mut fields = Fields { format, message: String::new(), others: String::new() };
    event.record(&mut fields);
    let Fields { message, others, .. } = fields;
    match format {
        Format::Text => format!("{time} {level:>5} {target}: {message}{others}\n"),
        Format::Json => format!(
            "{{\"timestamp\":\"{time}\",\"level\":\"{level}\",\"target\":\"{target}\",\"message\":{}{others}}}\n",
            json(&message),
        ),
    }
}

/// A line of text for a terminal.
pub(super) fn colored(line: String, level: Level) -> String {
    let color = match level {
        Level::ERROR => "31",
        Level::WARN => "33",
        Level::INFO => "32",
        _ => "34",
    };
    // The level is the first of these words: nothing but the time is before it.
    line.replacen(level.as_str(), &format!("\x1b[{color}m{level}\x1b[0m"), 1)
}

/// The line that says how many others are missing. It is no event: nobody but the queue itself could carry it.
pub(super) fn lost(count: u64, format: Format) -> String {
    const TARGET: &str = module_path!();
    let time = timestamp(SystemTime::now());
    match format {
        Format::Text => format!("{time}  WARN {TARGET}: log lines were lost lost={count}\n"),
        Format::Json => format!(
            "{{\"timestamp\":\"{time}\",\"level\":\"WARN\",\"target\":\"{TARGET}\",\
             \"message\":\"log lines were lost\",\"lost\":{count}}}\n"
        ),
    }
}

struct Fields {
    format: Format,
    message: String,
    /// As they are written, with what separates them from what is before.
    others: String,
}

impl Fields {
    /// A value that needs no quotes.
    fn plain(&mut self, field: &Field, value: impl fmt::Display) {
        // Writing into a string does not fail.
        let _ = match self.format {
            Format::Text => write!(self.others, " {}={value}", field.name()),
            Format::Json => write!(self.others, ",\"{}\":{value}", field.name()),
        };
    }

    fn text(&mut self, field: &Field, value: &str) {
        let value = cut(value);
        match (field.name(), self.format) {
            ("message", Format::Json) => self.message = value.to_owned(),
            ("message", Format::Text) => self.message = escaped(value),
            (_, Format::Json) => self.plain(field, json(value)),
            (_, Format::Text) if is_word(value) => self.plain(field, value),
            (_, Format::Text) => {
                let quoted = escaped(value).replace('"', "\\\"");
                self.plain(field, format_args!("\"{quoted}\""));
            }
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.text(field, &format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.text(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.plain(field, value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.plain(field, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.plain(field, value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        // JSON has no others.
        if value.is_finite() {
            self.plain(field, value);
        }
    }
}

/// The beginning of a value.
fn cut(value: &str) -> &str {
    let mut end = value.len().min(MAX_VALUE);
    while !value.is_char_boundary(end) {
        end -= 1;
    }
    &value[..end]
}

/// Whether a value can stand in a line of text as it is.
fn is_word(value: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_graphic() && !b"\"\\=".contains(&byte);
    !value.is_empty() && value.bytes().all(is_plain)
}

/// A text without anything that would end the line, steer a terminal, or hide what is there.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for char in text.chars() {
        let hides =
            matches!(char, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}');
        if char.is_control() || hides || char == '\\' {
            escaped.extend(char.escape_default());
        } else {
            escaped.push(char);
        }
    }
    escaped
}

fn json(text: &str) -> serde_json::Value {
    text.into()
}

/// A time in UTC, to the microsecond.
fn timestamp(time: SystemTime) -> String {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let (day, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (hours, minutes, seconds) = (second / 3_600, second / 60 % 60, second % 60);
    format!("{}T{hours:02}:{minutes:02}:{seconds:02}.{:06}Z", date(day), since.subsec_micros())
}

/// The date of a day, counted from 1970: the years of 400 repeat, and one that begins in March ends with its leap day.
pub(super) fn date(day: u64) -> String {
    const DAYS_OF_400_YEARS: u64 = 146_097;
    // From 0000-03-01 to 1970-01-01.
    let day = day + 719_468;
    let (era, day) = (day / DAYS_OF_400_YEARS, day % DAYS_OF_400_YEARS);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (year, month) = if month < 10 { (year, month + 3) } else { (year + 1, month - 9) };
    format!("{:04}-{month:02}-{day:02}", era * 400 + year)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (day, expected) in [
            (0, "1970-01-01"),
            (11_016, "2000-02-29"),
            (11_017, "2000-03-01"),
            (20_453, "2025-12-31"),
            (20_454, "2026-01-01"),
            (47_540, "2100-02-28"),
            (47_541, "2100-03-01"),
        ] {
            assert_eq!(date(day), expected);
        }
        let time = SystemTime::UNIX_EPOCH + std::time::Duration::from_micros(1_767_225_599_000_007);
        assert_eq!(timestamp(time), "2025-12-31T23:59:59.000007Z");
    }

    #[test]
    fn nothing_in_a_value_ends_a_line_or_steers_a_terminal() {
        let escaped = escaped("a\r\nb\x1b[31m\u{85}\u{2028}\u{202e}\u{7f}\\nä");
        assert_eq!(escaped, "a\\r\\nb\\u{1b}[31m\\u{85}\\u{2028}\\u{202e}\\u{7f}\\\\nä");
        assert!(is_word("/v1/models") && !is_word("a b") && !is_word("a=b") && !is_word(""));
    }

    #[test]
    fn color_is_the_levels_alone() {
        let line = "2026-01-01T00:00:00.000000Z  WARN mini_lb: WARN\n".to_owned();
        let expected = "2026-01-01T00:00:00.000000Z  \x1b[33mWARN\x1b[0m mini_lb: WARN\n";
        assert_eq!(colored(line, Level::WARN), expected);
    }
}
