//! The log line of a request. With an access log there is one for every request, so it is
//! written here straight from the library's [`RequestLine`]: a tracing event of twenty fields
//! costs several times as much.

use std::time::Duration;

use mini_lb::{LineFieldName, RequestLine, RequestLineVisitor};

use super::clock::Clock;
use super::escape;
use super::format::{self, Begin, Format};

/// The target of the library's events of the same content.
const TARGET: &str = "mini_lb::request";

/// Appends the line, with its newline.
pub(super) fn put(request: &RequestLine<'_>, format: Format, clock: &mut Clock, line: &mut Vec<u8>) {
    let begin = Begin { level: request.level(), target: TARGET, message: &request.message() };
    begin.put(format, clock, line);
    // The format is chosen once for a line, not once for each of its twenty fields.
    match format {
        Format::Text => request.visit(&mut TextFields(line)),
        Format::Json => request.visit(&mut JsonFields(line)),
    }
    format::end(format, line);
}

/// Appends fields as `name=value`.
struct TextFields<'a>(&'a mut Vec<u8>);

impl RequestLineVisitor for TextFields<'_> {
    // Inlined into `RequestLine::visit`, where names and their lengths are constants.
    #[inline(always)]
    fn text(&mut self, name: LineFieldName, value: &str) {
        escape::text(name.as_key(), self.0);
        // Plain values too: a request id may hold `=`, which would look like another field.
        escape::word(value, self.0);
    }

    #[inline(always)]
    fn number(&mut self, name: LineFieldName, value: u64) {
        escape::text(name.as_key(), self.0);
        escape::number(value, self.0);
    }

    #[inline(always)]
    fn flag(&mut self, name: LineFieldName, value: bool) {
        escape::text(name.as_key(), self.0);
        escape::text(if value { "true" } else { "false" }, self.0);
    }

    #[inline(always)]
    fn time(&mut self, name: LineFieldName, value: Duration) {
        escape::text(name.as_key(), self.0);
        escape::milliseconds(value, self.0);
    }
}

/// Appends fields as members of a JSON object.
struct JsonFields<'a>(&'a mut Vec<u8>);

impl RequestLineVisitor for JsonFields<'_> {
    #[inline(always)]
    fn text(&mut self, name: LineFieldName, value: &str) {
        escape::text(name.as_json_key(), self.0);
        escape::json(value, self.0);
    }

    /// Without a look for characters to escape, which the library promises not to be there.
    #[inline(always)]
    fn plain(&mut self, name: LineFieldName, value: &str) {
        escape::text(name.as_json_key(), self.0);
        escape::quoted(value, self.0);
    }

    #[inline(always)]
    fn number(&mut self, name: LineFieldName, value: u64) {
        escape::text(name.as_json_key(), self.0);
        escape::number(value, self.0);
    }

    #[inline(always)]
    fn flag(&mut self, name: LineFieldName, value: bool) {
        escape::text(name.as_json_key(), self.0);
        escape::text(if value { "true" } else { "false" }, self.0);
    }

    #[inline(always)]
    fn time(&mut self, name: LineFieldName, value: Duration) {
        escape::text(name.as_json_key(), self.0);
        escape::milliseconds(value, self.0);
    }
}
