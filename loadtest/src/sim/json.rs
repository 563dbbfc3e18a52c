//! Writing JSON by hand, compactly and without spaces as orjson does. Reading it is `serde_json`'s work.

use std::io::Write as _;

/// Appends `text` as a JSON string with its quotes.
pub(crate) fn string(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    escape(out, text);
    out.push(b'"');
}

/// Appends `text` escaped, without quotes. Only what JSON demands is escaped.
pub(crate) fn escape(out: &mut Vec<u8>, text: &str) {
    let bytes = text.as_bytes();
    let mut plain = 0;
    for (at, &byte) in bytes.iter().enumerate() {
        if byte >= 0x20 && byte != b'"' && byte != b'\\' {
            continue;
        }
        out.extend_from_slice(&bytes[plain..at]);
        plain = at + 1;
        match byte {
            b'"' => out.extend_from_slice(b"\\\""),
            b'\\' => out.extend_from_slice(b"\\\\"),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            _ => put(out, format_args!("\\u{byte:04x}")),
        }
    }
    out.extend_from_slice(&bytes[plain..]);
}

/// Appends formatted text as it is.
pub(crate) fn put(out: &mut Vec<u8>, text: std::fmt::Arguments<'_>) {
    // A Vec takes every byte; there is no error to handle.
    let _ = out.write_fmt(text);
}

/// Appends a string or `null`.
pub(crate) fn optional(out: &mut Vec<u8>, text: Option<&str>) {
    match text {
        Some(text) => string(out, text),
        None => out.extend_from_slice(b"null"),
    }
}

/// Appends seconds the way Python prints a float: never without a point.
pub(crate) fn seconds(out: &mut Vec<u8>, value: f64) {
    put(out, format_args!("{value:.7}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escaped_text_reads_back_as_itself() {
        let text = "a\"b\\c\n\r\t\u{1}é你[DONE]";
        let mut out = Vec::new();
        string(&mut out, text);
        assert_eq!(serde_json::from_slice::<String>(&out).unwrap(), text);
    }
}
