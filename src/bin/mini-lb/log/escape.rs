//! Appends texts and numbers to a line, without the cost of `std::fmt`.
//!
//! Texts may contain what clients and servers sent: they are escaped, so that they stay within the line.

use std::time::Duration;

pub(super) fn text(text: &str, into: &mut Vec<u8>) {
    into.extend_from_slice(text.as_bytes());
}

pub(super) fn all(parts: &[&str], into: &mut Vec<u8>) {
    parts.iter().for_each(|part| text(part, into));
}

/// The last six digits of a number.
pub(super) fn digits(number: u32) -> [u8; 6] {
    [100_000, 10_000, 1_000, 100, 10, 1].map(|unit| b'0' + (number / unit % 10) as u8)
}

pub(super) fn number(number: impl itoa::Integer, into: &mut Vec<u8>) {
    text(itoa::Buffer::new().format(number), into);
}

/// Puts a time in milliseconds, to the microsecond.
pub(super) fn milliseconds(time: Duration, into: &mut Vec<u8>) {
    let (seconds, micros) = (time.as_secs(), time.subsec_micros());
    let digit = |unit: u32| b'0' + (micros / unit % 10) as u8;
    let places = [digit(1_000), b'.', digit(100), digit(10), digit(1)];
    match (seconds, micros) {
        // Below 10 ms there is one digit before the point, and it is in `places`.
        (0, 0..10_000) => {}
        _ => number(seconds * 100 + u64::from(micros / 10_000), into),
    }
    into.extend_from_slice(&places);
    // Drops trailing zeros, and a point without digits after it.
    let idle = match places {
        [_, _, b'0', b'0', b'0'] => 4,
        [.., b'0', b'0'] => 2,
        [.., b'0'] => 1,
        _ => 0,
    };
    into.truncate(into.len() - idle);
}

/// Puts a JSON string of a text that needs no escapes.
pub(super) fn quoted(plain: &str, into: &mut Vec<u8>) {
    into.push(b'"');
    text(plain, into);
    into.push(b'"');
}

/// Puts a JSON string.
pub(super) fn json(value: &str, into: &mut Vec<u8>) {
    if is_plain_json(value.as_bytes()) {
        quoted(value, into);
    } else {
        let _ = serde_json::to_writer(into, value);
    }
}

/// Whether a JSON string needs no escapes for these bytes. Checks eight at a time.
fn is_plain_json(bytes: &[u8]) -> bool {
    const EACH: u64 = u64::from_ne_bytes([1; 8]);
    const HIGHEST: u64 = EACH << 7;
    // The highest bit of a byte, or of one behind it, if the byte is less than that; those over 127 are not.
    let less = |word: u64, than: u8| word.wrapping_sub(EACH * u64::from(than)) & !word;
    let is_plain = |word: u64| {
        let quotes = less(word ^ (EACH * u64::from(b'"')), 1);
        let backslashes = less(word ^ (EACH * u64::from(b'\\')), 1);
        (less(word, b' ') | quotes | backslashes) & HIGHEST == 0
    };
    // The last word may overlap the one before it.
    match (bytes.last_chunk(), bytes.first_chunk(), bytes.last_chunk()) {
        (Some(last), ..) => {
            let words = bytes.as_chunks().0.iter();
            words.copied().map(u64::from_le_bytes).all(is_plain) && is_plain(u64::from_le_bytes(*last))
        }
        (None, Some(&[a, b, c, d]), Some(&[e, f, g, h])) => {
            is_plain(u64::from_le_bytes([a, b, c, d, e, f, g, h]))
        }
        _ => bytes.iter().all(|byte| is_plain(EACH * u64::from(*byte))),
    }
}

/// Puts a text, and escapes what would end the line, control a terminal, or hide other characters.
pub(super) fn escaped(value: &str, into: &mut Vec<u8>) {
    escaped_with(value, |char| char == '\\', into);
}

/// The same, in quotes unless the text is one plain word.
pub(super) fn word(value: &str, into: &mut Vec<u8>) {
    if is_word(value) {
        return text(value, into);
    }
    into.push(b'"');
    escaped_with(value, |char| matches!(char, '\\' | '"'), into);
    into.push(b'"');
}

fn is_word(value: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_graphic() & (byte != b'"') & (byte != b'\\') & (byte != b'=');
    // Not `all`, which stops at the first other byte: without a branch for each byte the loop is vectorised.
    !value.is_empty() && value.bytes().fold(true, |all, byte| all & is_plain(byte))
}

fn escaped_with(value: &str, is_special: fn(char) -> bool, into: &mut Vec<u8>) {
    for char in value.chars() {
        // Zero-width characters, text direction marks and line separators, with which a client could hide or
        // reorder a part of the line.
        let hides =
            matches!(char, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}');
        if char.is_control() || hides || is_special(char) {
            char.escape_default().for_each(|char| into.push(char as u8));
        } else {
            text(char.encode_utf8(&mut [0; 4]), into);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(part: impl FnOnce(&mut Vec<u8>)) -> String {
        let mut line = b"-".to_vec();
        part(&mut line);
        String::from_utf8(line).unwrap().split_off(1)
    }

    #[test]
    fn times_are_written_as_rust_writes_numbers() {
        for micros in (0..20_000).map(|number| number * 7).chain([10_000_000_010, 86_400_000_000_000]) {
            let written = put(|line| milliseconds(Duration::from_micros(micros), line));
            assert_eq!(written, (micros as f64 / 1_000.0).to_string());
        }
        assert_eq!(&digits(7_120_304), b"120304");
    }

    #[test]
    fn a_json_string_is_one_whatever_it_holds() {
        for text in ["", "plain", "ä", "a\"b", "a\\b", "a\nb", "\u{7f}\u{1b}"] {
            assert_eq!(serde_json::from_str::<String>(&put(|line| json(text, line))).unwrap(), text);
        }
        // Each byte in each place of a word, and behind the last whole one.
        for (byte, place) in (0..128_u8).flat_map(|byte| (0..20).map(move |place| (byte, place))) {
            let mut text = "ä234567ä".repeat(2);
            text.push_str("12");
            while !text.is_char_boundary(place) || text.as_bytes()[place] >= 128 {
                text = text.replace('ä', "ab");
            }
            text.replace_range(place..=place, &char::from(byte).to_string());
            let expected = serde_json::to_string(&text).unwrap();
            assert_eq!(put(|line| json(&text, line)), expected);
            let needs_escape = byte < b' ' || byte == b'"' || byte == b'\\';
            assert_eq!(is_plain_json(text.as_bytes()), !needs_escape, "{text:?}");
        }
    }

    #[test]
    fn nothing_in_a_value_ends_a_line_or_steers_a_terminal() {
        let text = "a\r\nb\x1b[31m\u{85}\u{2028}\u{202e}\u{7f}\\n\"ä";
        let expected = "a\\r\\nb\\u{1b}[31m\\u{85}\\u{2028}\\u{202e}\\u{7f}\\\\n";
        assert_eq!(put(|line| escaped(text, line)), format!("{expected}\"ä"));
        assert_eq!(put(|line| word(text, line)), format!("\"{expected}\\\"ä\""));
        assert_eq!(put(|line| word("/v1/models", line)), "/v1/models");
        for text in ["a b", "a=b", ""] {
            assert_eq!(put(|line| word(text, line)), format!("\"{text}\""));
        }
    }
}
