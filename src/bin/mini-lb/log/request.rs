//! The line about a request. There may be one for every request, so it is put together
//! here without events and their fields, which cost several times as much.
//!
//! Names and order are those of the library's events of the target `mini_lb::request`.

use std::time::Duration;

use mini_lb::RequestLine;

use super::clock::Clock;
use super::format::{self, Begin, Format};
use super::put;

const TARGET: &str = "mini_lb::request";

/// Puts the line, with its end.
pub(super) fn put(request: &RequestLine<'_>, format: Format, clock: &mut Clock, line: &mut Vec<u8>) {
    let begin = Begin { level: request.level(), target: TARGET, message: &request.message() };
    begin.put(format, clock, line);
    put_fields(request, &mut Fields { format, line });
    format::end(format, line);
}

/// A field's name with what is around it, in each format: one copy of a length that the compiler knows.
macro_rules! name {
    ($name:literal) => {
        [concat!(" ", $name, "="), concat!(",\"", $name, "\":")]
    };
}

fn put_fields(request: &RequestLine<'_>, to: &mut Fields<'_>) {
    let RequestLine { times, failure, .. } = request;
    to.word(name!("request_id"), Some(request.request_id));
    to.word(name!("method"), Some(request.method));
    to.text(name!("path"), Some(request.path));
    to.number(name!("status"), request.status);
    to.word(name!("code"), failure.map(|failure| failure.code));
    to.word(name!("phase"), Some(request.phase));
    to.word(name!("prefill"), request.prefill);
    to.word(name!("decode"), request.decode);
    to.number(name!("attempts"), Some(request.attempts));
    to.text(name!("retried"), request.retried.as_deref());
    to.name(name!("streaming"));
    put::text(if request.streaming { "true" } else { "false" }, to.line);
    to.number(name!("bytes_in"), Some(request.bytes_in));
    to.number(name!("bytes_out"), Some(request.bytes_out));
    to.time(name!("request_ms"), times.request);
    to.time(name!("sent_ms"), times.sent);
    to.time(name!("prefill_head_ms"), times.prefill_head);
    to.time(name!("decode_head_ms"), times.decode_head);
    to.time(name!("first_byte_ms"), times.first_byte);
    to.time(name!("total_ms"), Some(times.end));
}

/// Puts fields, and nothing for a value that there is not.
struct Fields<'a> {
    format: Format,
    line: &'a mut Vec<u8>,
}

impl Fields<'_> {
    #[inline(always)]
    fn name(&mut self, [text, json]: [&'static str; 2]) {
        match self.format {
            Format::Text => put::text(text, self.line),
            Format::Json => put::text(json, self.line),
        }
    }

    #[inline(always)]
    fn text(&mut self, name: [&'static str; 2], value: Option<&str>) {
        let Some(value) = value else { return };
        self.name(name);
        match self.format {
            Format::Text => put::word(value, self.line),
            Format::Json => put::json(value, self.line),
        }
    }

    /// Puts one of the library's own words, or what it promises to be as plain: JSON has it as it is.
    #[inline(always)]
    fn word(&mut self, name: [&'static str; 2], value: Option<&str>) {
        let Some(value) = value else { return };
        self.name(name);
        match self.format {
            Format::Text => put::word(value, self.line),
            Format::Json => put::quoted(value, self.line),
        }
    }

    #[inline(always)]
    fn number(&mut self, name: [&'static str; 2], value: Option<impl itoa::Integer>) {
        let Some(value) = value else { return };
        self.name(name);
        put::number(value, self.line);
    }

    #[inline(always)]
    fn time(&mut self, name: [&'static str; 2], value: Option<Duration>) {
        let Some(value) = value else { return };
        self.name(name);
        put::milliseconds(value, self.line);
    }
}
