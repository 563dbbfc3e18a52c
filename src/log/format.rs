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

/// What lines are put together in, again and again.
#[derive(Default)]
pub(super) struct Scratch {
    line: String,
    /// Fields, which come behind the message, whenever they were told.
    others: String,
    message: String,
    clock: Clock,
}

impl Scratch {
    /// An event's line, with its end.
    pub(super) fn line(&mut self, event: &Event<'_>, format: Format) -> &str {
        let Self { line, others, message, clock } = self;
        [&mut *line, &mut *others, &mut *message].into_iter().for_each(String::clear);
        let metadata = event.metadata();
        let (level, target) = (metadata.level().as_str(), metadata.target());
        event.record(&mut Fields { format, message, others });
        match format {
            Format::Text => {
                clock.write(SystemTime::now(), line);
                let pad = &"     "[level.len().min(5)..];
                put(&[" ", pad, level, " ", target, ": ", message, others, "\n"], line);
            }
            Format::Json => {
                line.push_str("{\"timestamp\":\"");
                clock.write(SystemTime::now(), line);
                let parts = ["\",\"level\":\"", level, "\",\"target\":\"", target, "\",\"message\":"];
                put(&parts, line);
                put_json(message, line);
                put(&[others, "}\n"], line);
            }
        }
        line
    }
}

/// A line of text for a terminal.
pub(super) fn colored(line: &str, level: Level) -> String {
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
    let mut time = String::new();
    Clock::default().write(SystemTime::now(), &mut time);
    match format {
        Format::Text => format!("{time}  WARN {TARGET}: log lines were lost lost={count}\n"),
        Format::Json => format!(
            "{{\"timestamp\":\"{time}\",\"level\":\"WARN\",\"target\":\"{TARGET}\",\
             \"message\":\"log lines were lost\",\"lost\":{count}}}\n"
        ),
    }
}

struct Fields<'a> {
    format: Format,
    message: &'a mut String,
    /// As they are written, with what separates them from what is before.
    others: &'a mut String,
}

impl Fields<'_> {
    fn name(&mut self, field: &Field) {
        let [before, behind] = match self.format {
            Format::Text => [" ", "="],
            Format::Json => [",\"", "\":"],
        };
        put(&[before, field.name(), behind], self.others);
    }

    /// A value that needs no quotes.
    fn plain(&mut self, field: &Field, value: &str) {
        self.name(field);
        self.others.push_str(value);
    }

    fn text(&mut self, field: &Field, value: &str) {
        let value = cut(value);
        match (field.name(), self.format) {
            ("message", Format::Json) => self.message.push_str(value),
            ("message", Format::Text) => self.message.push_str(&escaped(value)),
            (_, Format::Json) => {
                self.name(field);
                put_json(value, self.others);
            }
            (_, Format::Text) if is_word(value) => self.plain(field, value),
            (_, Format::Text) => {
                let quoted = escaped(value).replace('"', "\\\"");
                self.plain(field, &format!("\"{quoted}\""));
            }
        }
    }
}

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.text(field, &format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.text(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.plain(field, itoa::Buffer::new().format(value));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.plain(field, itoa::Buffer::new().format(value));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.plain(field, if value { "true" } else { "false" });
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        // JSON has no others.
        if value.is_finite() {
            self.name(field);
            put_float(value, self.others);
        }
    }
}

/// Puts the shortest decimal that is this number. Those with three places or less, which all times are, need no search.
fn put_float(value: f64, into: &mut String) {
    let thousandths = (value * 1_000.0).round();
    if !(0.0..1e15).contains(&thousandths) || thousandths / 1_000.0 != value {
        // Writing into a string does not fail.
        let _ = write!(into, "{value}");
        return;
    }
    let thousandths = thousandths as u64;
    into.push_str(itoa::Buffer::new().format(thousandths / 1_000));
    let rest = (thousandths % 1_000) as u32;
    if rest > 0 {
        into.push('.');
        put_digits(rest, 3, into);
        into.truncate(into.trim_end_matches('0').len());
    }
}

fn put(parts: &[&str], into: &mut String) {
    parts.iter().for_each(|part| into.push_str(part));
}

/// Puts so many last digits of a number.
fn put_digits(number: u32, digits: u32, into: &mut String) {
    into.extend((0..digits).rev().map(|place| (b'0' + (number / 10u32.pow(place) % 10) as u8) as char));
}

/// Puts a JSON string.
fn put_json(text: &str, into: &mut String) {
    let is_plain = |byte: u8| byte >= b' ' && byte != b'"' && byte != b'\\';
    if text.bytes().fold(true, |all, byte| all & is_plain(byte)) {
        put(&["\"", text, "\""], into);
    } else {
        let _ = write!(into, "{}", serde_json::Value::from(text));
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

/// Writes times; what it wrote of a second it remembers.
#[derive(Default)]
struct Clock {
    second: u64,
    /// Date and time up to the second; nothing before the first time.
    begin: String,
}

impl Clock {
    /// Puts a time in UTC, to the microsecond.
    fn write(&mut self, time: SystemTime, into: &mut String) {
        let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        if self.second != since.as_secs() || self.begin.is_empty() {
            self.second = since.as_secs();
            let (day, second) = (self.second / 86_400, self.second % 86_400);
            let (hours, minutes, seconds) = (second / 3_600, second / 60 % 60, second % 60);
            self.begin = format!("{}T{hours:02}:{minutes:02}:{seconds:02}.", date(day));
        }
        into.push_str(&self.begin);
        put_digits(since.subsec_micros(), 6, into);
        into.push('Z');
    }
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
        let mut clock = Clock::default();
        for (micros, expected) in [
            (0, "1970-01-01T00:00:00.000000Z"),
            (1_767_225_599_000_007, "2025-12-31T23:59:59.000007Z"),
            (1_767_225_599_999_999, "2025-12-31T23:59:59.999999Z"),
            (1_767_225_600_000_000, "2026-01-01T00:00:00.000000Z"),
        ] {
            let mut written = String::new();
            clock.write(SystemTime::UNIX_EPOCH + std::time::Duration::from_micros(micros), &mut written);
            assert_eq!(written, expected);
        }
    }

    #[test]
    fn numbers_are_written_as_rust_writes_them() {
        let others = [-1.5, 0.000_1, 1e15, 1e300, 0.1 + 0.2, 123.456_7];
        for value in (0..20_000).map(|micros| f64::from(micros * 7) / 1_000.0).chain(others) {
            let mut written = String::new();
            put_float(value, &mut written);
            assert_eq!(written, value.to_string());
        }
    }

    #[test]
    fn a_json_string_is_one_whatever_it_holds() {
        for text in ["", "plain", "ä", "a\"b", "a\\b", "a\nb", "\u{7f}\u{1b}"] {
            let mut written = String::new();
            put_json(text, &mut written);
            assert_eq!(serde_json::from_str::<String>(&written).unwrap(), text);
        }
    }

    #[test]
    fn nothing_in_a_value_ends_a_line_or_steers_a_terminal() {
        let escaped = escaped("a\r\nb\x1b[31m\u{85}\u{2028}\u{202e}\u{7f}\\nä");
        assert_eq!(escaped, "a\\r\\nb\\u{1b}[31m\\u{85}\\u{2028}\\u{202e}\\u{7f}\\\\nä");
        assert!(is_word("/v1/models") && !is_word("a b") && !is_word("a=b") && !is_word(""));
    }

    #[test]
    fn color_is_the_levels_alone() {
        let line = "2026-01-01T00:00:00.000000Z  WARN mini_lb: WARN\n";
        let expected = "2026-01-01T00:00:00.000000Z  \x1b[33mWARN\x1b[0m mini_lb: WARN\n";
        assert_eq!(colored(line, Level::WARN), expected);
    }
}
