//! What is read of a body, what is removed from it, and the error for a bad one.

use bytes::Bytes;

use super::*;
use crate::wire::body::ClientBody;
use crate::wire::bootstrap::BootstrapFields;
use crate::wire::plan::{OwnIds, RequestPlan};

mod generators;
mod properties;
mod reference;
mod samples;

const FIELDS: &str = r#""bootstrap_host":"h","bootstrap_port":1,"bootstrap_room":2"#;
const DIALECTS: [Dialect; 5] =
    [Dialect::Generate, Dialect::Chat, Dialect::Completions, Dialect::Responses, Dialect::Messages];

/// What a body requests: a stream, samples, prompt logprobs.
type Features = (bool, Requested, Option<Merge>);

/// How many samples a body requests.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Requested {
    One,
    Many,
    Refused,
}

/// `text` in chunks of these lengths, repeated as needed.
fn chunks<'a>(mut text: &'a [u8], lengths: &'a [usize]) -> impl Iterator<Item = &'a [u8]> {
    lengths.iter().cycle().map_while(move |length| {
        let (chunk, rest) = text.split_at((*length).max(1).min(text.len()));
        text = rest;
        (!chunk.is_empty()).then_some(chunk)
    })
}

fn inspect(dialect: Dialect, text: &[u8], lengths: &[usize]) -> Result<BodyShape, BodyError> {
    let mut inspector = BodyInspector::new(dialect);
    chunks(text, lengths).try_for_each(|chunk| inspector.feed(chunk))?;
    inspector.finish()
}

/// The body that both legs get.
fn rewrite(text: &[u8], fields: &BodyFields, lengths: &[usize]) -> Vec<u8> {
    planned(text, &RequestPlan::sglang(fields, OwnIds::default()), lengths)
}

/// The body that prefill gets by a plan.
fn planned(text: &[u8], plan: &RequestPlan, lengths: &[usize]) -> Vec<u8> {
    let mut client = ClientBody::default();
    chunks(text, lengths).for_each(|chunk| client.push(Bytes::copy_from_slice(chunk)));
    plan.bodies(&client, &BootstrapFields::new("h".into(), Some(1)), 2).prefill().pieces().concat()
}

/// The shape of a good body. It must be the same in one chunk and in chunks of one byte.
fn accepted(dialect: Dialect, text: &str) -> BodyShape {
    let shape = inspect(dialect, text.as_bytes(), &[text.len()]).unwrap();
    assert_eq!(inspect(dialect, text.as_bytes(), &[1]).as_ref(), Ok(&shape), "{text}");
    shape
}

/// The error for a bad body, which must be rejected in one chunk and in chunks of one byte.
#[track_caller]
fn rejected(text: impl AsRef<[u8]>) -> String {
    let text = text.as_ref();
    let error = inspect(Dialect::Chat, text, &[text.len()]).unwrap_err();
    assert!(inspect(Dialect::Chat, text, &[1]).is_err());
    error.to_string()
}

fn features(shape: &BodyShape) -> Features {
    let samples = match shape.samples {
        RequestedSamples::One => Requested::One,
        RequestedSamples::Many(_) => Requested::Many,
        RequestedSamples::Refused(_) => Requested::Refused,
    };
    (shape.stream, samples, shape.merge)
}

fn rewritten(text: &str) -> String {
    let fields = accepted(Dialect::Chat, text).fields;
    String::from_utf8(rewrite(text.as_bytes(), &fields, &[7])).unwrap()
}

#[test]
fn a_body_of_white_space_is_empty() {
    for text in ["", " ", "\n\r\n\t "] {
        assert_eq!(rejected(text), "the body is empty; a JSON object is expected");
    }
}

#[test]
fn a_byte_order_mark_has_its_own_error() {
    let text = b"\xEF\xBB\xBF{}";
    for lengths in [&[6][..], &[1], &[2], &[1, 2], &[3]] {
        let error = inspect(Dialect::Chat, text, lengths).unwrap_err();
        assert_eq!(error.to_string(), "the body begins with a byte order mark, which JSON does not allow");
    }
    assert_eq!(rejected(b" \xEF\xBB\xBF{}"), "the body is not JSON: expected '{' at byte 1");
}

#[test]
fn the_error_for_another_type_names_the_type() {
    for (text, found) in [
        ("[]", "an array"),
        ("[{\"stream\":true}]", "an array"),
        ("\"{}\"", "a string"),
        ("0", "a number"),
        (" -1.5e3", "a number"),
        ("true", "true or false"),
        ("false", "true or false"),
        ("null", "null"),
    ] {
        assert_eq!(rejected(text), format!("the body must be a JSON object, not {found}"), "{text}");
    }
}

#[test]
fn a_syntax_error_has_its_position() {
    for (text, expected, at) in [
        ("}", "'{'", 0),
        (" <html>", "'{'", 1),
        ("'{}'", "'{'", 0),
        ("{}{}", "nothing after the object", 2),
        ("{} {}", "nothing after the object", 3),
        ("{},", "nothing after the object", 2),
        ("{}\0", "nothing after the object", 2),
        ("{,}", "a field's name or '}'", 1),
        ("{a:1}", "a field's name or '}'", 1),
        ("{'a':1}", "a field's name or '}'", 1),
        ("{\"a\":1,}", "a field's name", 7),
        ("{\"a\":1,,\"b\":1}", "a field's name", 7),
        ("{\"a\"}", "':'", 4),
        ("{\"a\" 1}", "':'", 5),
        ("{\"a\"::1}", "a JSON value", 5),
        ("{\"a\":}", "a JSON value", 5),
        ("{\"a\":,\"b\":1}", "a JSON value", 5),
        ("{\"a\":1 2}", "',' or '}'", 7),
        ("{\"a\":\"b\"c}", "',' or '}'", 8),
        ("{\"a\":\"b\"\"c\":1}", "',' or '}'", 8),
        ("{\"a\":{}]}", "',' or '}'", 7),
        ("{\"a\":1]}", "a JSON value", 5),
        ("{\"a\":[}]}", "']'", 6),
        ("{\"a\":{]}}", "'}'", 6),
        ("{\"a\":[[{}]}]}", "']'", 10),
        ("{/**/}", "a field's name or '}'", 1),
        ("{\u{b}}", "a field's name or '}'", 1),
        ("{\u{a0}}", "a field's name or '}'", 1),
    ] {
        assert_eq!(
            rejected(text),
            format!("the body is not JSON: expected {expected} at byte {at}"),
            "{text}"
        );
    }
}

#[test]
fn a_scalar_must_be_json() {
    for good in
        ["true", "false", "null", "0", "-0", "10", "1.0", "0.10", "1e5", "1E+05", "-1.5e-300", "1E400"]
    {
        accepted(Dialect::Chat, &format!("{{\"a\":{good}}}"));
        accepted(Dialect::Chat, &format!("{{\"a\": {good}\n,\"b\":{good},\"c\":{good} }}"));
    }
    for bad in [
        "tru",
        "truee",
        "True",
        "nul",
        "NaN",
        "Infinity",
        "-Infinity",
        "01",
        "-01",
        "+1",
        "-",
        "--1",
        ".5",
        "1.",
        "1.e1",
        "1e",
        "1e+",
        "1e1.5",
        "0x10",
        "1_000",
        "1,5",
        "\u{661}",
        "a",
        "'a'",
        "1\0",
        "1\"\"",
        "undefined",
    ] {
        for text in [format!("{{\"a\":{bad}}}"), format!("{{\"bootstrap_room\":{bad} ,\"b\":1}}")] {
            assert!(rejected(&text).starts_with("the body is not JSON: expected "), "{text}");
        }
    }
}

#[test]
fn a_truncated_body_is_rejected() {
    let text =
        r#" {"a\"é" : [{"b":"\"\u00e9é]"}, null] , "bootstrap_host":{}, "c":1.5,"d":"\\" }"#.as_bytes();
    for end in 0..text.len() {
        rejected(&text[..end]);
    }
    assert!(inspect(Dialect::Chat, text, &[1]).is_ok());
    assert_eq!(rejected("{\"a\":\"b"), "the body is not JSON: it ends at byte 7 inside the object");
    assert_eq!(rejected("{\"a\":[[]"), "the body is not JSON: it ends at byte 8 inside the object");
    assert_eq!(rejected("{\"a\":1"), "the body is not JSON: it ends at byte 6 inside the object");
}

#[test]
fn a_name_must_be_a_valid_string() {
    for name in [
        r"\ud800",
        r"\udc00\ud800",
        r"a\ud83dz",
        r"\x",
        r"\u12",
        r"\u12g4",
        r"\U0041",
        "a\tb",
        "bootstrap_\0",
    ] {
        let message = "the body is not JSON: expected a valid string at byte 2";
        assert_eq!(rejected(format!("{{ \"{name}\":1}}")), message);
    }
    for name in [r"\ud83d\ude00", r"\/\b\f\n\r\t\\", r#"\""#, "\u{7f}\u{80}", r"\u0000"] {
        accepted(Dialect::Chat, &format!("{{\"{name}\":1}}"));
    }
}

#[test]
fn invalid_utf8_is_rejected_at_any_position() {
    // Truncated (3), a lone continuation byte, overlong (2), a surrogate, above U+10FFFF, an unused byte.
    let bad: [&[u8]; 9] = [
        b"\xC3",
        b"\xE2\x82",
        b"\xF0\x9F\x98",
        b"\x80",
        b"\xC0\x80",
        b"\xE0\x9F\xBF",
        b"\xED\xA0\x80",
        b"\xF4\x90\x80\x80",
        b"\xFF",
    ];
    for places in [
        "?{}",
        "{?}",
        "{\"?\":1}",
        "{\"a\"?:1}",
        "{\"a\":?}",
        "{\"a\":1?}",
        "{\"a\":\"x?y\"}",
        "{\"a\":[\"?\"]}",
        "{\"a\":[?]}",
        "{\"a\":1,?}",
        "{}?",
        "{} ?",
    ] {
        let (before, after) = places.split_once('?').unwrap();
        for bytes in bad {
            let text = [before.as_bytes(), bytes, after.as_bytes()].concat();
            let message = format!("the body is not UTF-8 at byte {}", before.len());
            for first in 1..=text.len() {
                let error = inspect(Dialect::Chat, &text, &[first, text.len()]).unwrap_err();
                let is_found_before = matches!(error, BodyError::Syntax { .. } | BodyError::Truncated { .. });
                assert!(is_found_before || error.to_string() == message, "{error}: {}", text.escape_ascii());
            }
        }
    }
    assert_eq!(rejected(b"{\"a\":\"\xC3\"}"), "the body is not UTF-8 at byte 6");
}

#[test]
fn a_character_may_span_chunks() {
    let text = "{\"é€😀\":\"é€😀\",\"b\":[\"é€😀\"],\"stream\":true}";
    for first in 1..text.len() {
        for second in 1..5 {
            let shape = inspect(Dialect::Chat, text.as_bytes(), &[first, second, text.len()]).unwrap();
            assert!(shape.stream);
        }
    }
}

fn nested(name: &str, open: &str, close: &str, levels: usize) -> String {
    format!("{{\"{name}\":{}1{}}}", open.repeat(levels), close.repeat(levels))
}

#[test]
fn the_object_itself_counts_as_one_of_1024_levels() {
    for name in ["a", "sampling_params", "token_ids_logprob", "stream", "bootstrap_host"] {
        for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
            for levels in [1, 63, 64, 65, 1_000, 1_023] {
                accepted(Dialect::Generate, &nested(name, open, close, levels));
            }
            let at = name.len() + 4 + 1_023 * open.len();
            let message = format!("the body is nested deeper than 1024 levels at byte {at}");
            assert_eq!(rejected(nested(name, open, close, 1_024)), message);
        }
    }
    // Each field's value starts at level 1 again.
    let field = "[".repeat(1_000) + &"]".repeat(1_000);
    accepted(Dialect::Chat, &format!("{{\"a\":{field},\"b\":{field}}}"));
}

#[test]
fn a_body_nested_too_deeply_is_rejected_before_it_ends() {
    for brackets in ["[".repeat(100_000), "{\"a\":".repeat(100_000), "[{\"a\":".repeat(50_000)] {
        let text = format!("{{\"a\":{brackets}");
        assert!(rejected(&text).starts_with("the body is nested deeper than 1024 levels"));
        // The first level too many is enough.
        rejected(&text[..5 + 1_024 * 5]);
    }
    assert_eq!(rejected("[".repeat(100_000)), "the body must be a JSON object, not an array");
    assert_eq!(
        rejected("{".repeat(100_000)),
        "the body is not JSON: expected a field's name or '}' at byte 1"
    );
}

const TOO_MANY: &str =
    "the body has fields that the router removes or reads, such as bootstrap_* and rid, in over 64 places";

#[test]
fn bootstrap_fields_in_up_to_64_places_are_removed() {
    let run = "\"bootstrap_room\":1,".repeat(10);
    let places = |count: usize, end: &str| format!("{{{}{end}}}", format!("{run}\"a\":1,").repeat(count));
    for good in [places(64, "\"b\":1"), places(63, "\"bootstrap_host\":\"x\"")] {
        assert!(!rewritten(&good).contains("room\":1,"));
    }
    for bad in [places(65, "\"b\":1"), places(64, "\"bootstrap_host\":\"x\"")] {
        assert_eq!(rejected(bad), TOO_MANY);
    }
}

#[test]
fn adjacent_bootstrap_fields_count_as_one_place() {
    let run = "\"bootstrap_room\" : 1 ,".repeat(5_000);
    assert_eq!(rewritten(&format!("{{{run}\"a\":1}}")), format!("{{\"a\":1,{FIELDS}}}"));
}

#[test]
fn an_escaped_name_is_recognised() {
    let escaped = |name: &str| name.chars().map(|it| format!("\\u{:04X}", u32::from(it))).collect::<String>();
    let (bootstrap, stream) = (escaped("bootstrap_pair_key"), escaped("stream"));
    let text =
        format!("{{\"{bootstrap}\":1,\"{stream}\":true,\"\\u0062ootstrap_room\":1,\"bootstrap\\u005f\":1}}");
    assert_eq!(rewritten(&text), format!("{{\"{stream}\":true,{FIELDS}}}"));
    assert!(accepted(Dialect::Chat, &text).stream);
    // An escaped backslash does not start another escape.
    let text = r#"{"\\u0062ootstrap_room":1,"s\\u0074ream":true}"#;
    assert_eq!(rewritten(text), format!("{},{FIELDS}}}", text.strip_suffix('}').unwrap()));
    assert!(!accepted(Dialect::Chat, text).stream);
}

#[test]
fn a_name_longer_than_any_that_matters_is_not_removed() {
    let fill = "x".repeat(300);
    for name in [fill.clone(), format!("stream{fill}"), format!("bootstrap_{fill}"), format!("\\u0062{fill}")]
    {
        assert_eq!(rewritten(&format!("{{\"{name}\":1}}")), format!("{{\"{name}\":1,{FIELDS}}}"));
    }
    let longest = |length: usize| format!("{{\"bootstrap_{}\":1}}", "x".repeat(length - "bootstrap_".len()));
    assert_eq!(rewritten(&longest(inspector::MAX_NAME - 1)), format!("{{{FIELDS}}}"));
    assert!(rewritten(&longest(inspector::MAX_NAME)).starts_with("{\"bootstrap_x"));
}

#[test]
fn values_that_are_forwarded_are_not_validated() {
    for value in [r#"[1 2 nope]"#, r#"{"a" "b"}"#, "\"\t\"", r#""\x\ud800""#, r#"[{"bootstrap_room":1}]"#] {
        assert_eq!(rewritten(&format!("{{\"a\":{value}}}")), format!("{{\"a\":{value},{FIELDS}}}"));
    }
}

#[test]
fn values_that_are_removed_must_be_json() {
    for value in ["[1 2]", "[nope]", "{\"a\" 1}", "[1,]", "\"\t\"", r#""\x""#, r#"["\u12"]"#] {
        let message = "the body is not JSON: expected a JSON value at byte 18";
        assert_eq!(rejected(format!("{{\"bootstrap_host\":{value},\"a\":1}}")), message);
    }
    for value in ["[1, [\"x\", null] , {}]", "\"\\u0000\"", "[123456789012345678901234567890, 1E+400]"] {
        assert_eq!(rewritten(&format!("{{\"bootstrap_host\":{value}}}")), format!("{{{FIELDS}}}"));
    }
}

#[test]
fn a_number_of_100000_digits_is_accepted() {
    let digits = "9".repeat(100_000);
    for number in [digits.clone(), format!("-{digits}.{digits}e-{digits}")] {
        let text = format!("{{\"a\":{number}}}");
        assert_eq!(rewritten(&text), format!("{{\"a\":{number},{FIELDS}}}"));
        assert!(rejected(format!("{{\"a\":{number}x}}")).ends_with("expected a JSON value at byte 5"));
    }
}

#[test]
fn a_value_too_long_to_keep_counts_as_a_request_for_logprobs_only() {
    let long = format!("[{}1]", "1,".repeat(fields::MAX_VALUE / 2));
    let requested = |text: &str| {
        let whole = inspect(Dialect::Generate, text.as_bytes(), &[text.len()]).unwrap();
        assert_eq!(inspect(Dialect::Generate, text.as_bytes(), &[1_000]).as_ref(), Ok(&whole));
        features(&whole)
    };
    let merge = Some(Merge::Generate);
    assert_eq!(
        requested(&format!("{{\"return_logprob\":true,\"token_ids_logprob\":{long}}}")),
        (false, Requested::One, merge)
    );
    assert_eq!(
        requested(&format!("{{\"return_logprob\":{long},\"logprob_start_len\":0}}")),
        (false, Requested::One, merge)
    );
    assert_eq!(
        requested(&format!("{{\"logprob_start_len\":{long},\"return_logprob\":1}}")),
        (false, Requested::One, merge)
    );
    assert_eq!(requested(&format!("{{\"token_ids_logprob\":{long}}}")), (false, Requested::One, None));
    assert_eq!(
        requested(&format!("{{\"stream\":{long},\"sampling_params\":{long}}}")),
        (false, Requested::One, None)
    );
    assert_eq!(requested(&format!("{{\"stream\":{long},\"stream\":true}}")), (true, Requested::One, None));
    assert_eq!(rewritten(&format!("{{\"bootstrap_room\":{long}}}")), format!("{{{FIELDS}}}"));
}

#[test]
fn stream_accepts_what_pydantic_accepts_as_true() {
    let stream = |value: &str| {
        let text = format!("{{\"stream\":{value}}}");
        let streams = DIALECTS.map(|dialect| accepted(dialect, &text).stream);
        assert!(streams.iter().all(|it| *it == streams[0]));
        streams[0]
    };
    for value in ["true", "1", "1.0", "-1", "1e0", "\"true\"", "\"Yes\"", "\"1\""] {
        assert!(stream(value), "{value}");
    }
    for value in
        ["false", "null", "0", "-0", "0.0e5", "\"false\"", "\"0\"", "\"\"", "{}", "[]", "{\"stream\":true}"]
    {
        assert!(!stream(value), "{value}");
    }
}

#[test]
fn the_last_of_duplicate_fields_counts() {
    let generate = |text: &str| features(&accepted(Dialect::Generate, text));
    assert_eq!(generate(r#"{"stream":true,"stream":false}"#), (false, Requested::One, None));
    assert_eq!(generate(r#"{"stream":false,"\u0073tream":true}"#), (true, Requested::One, None));
    assert_eq!(
        generate(r#"{"sampling_params":{"n":2},"sampling_params":null}"#),
        (false, Requested::One, None)
    );
    assert_eq!(generate(r#"{"sampling_params":{"n":1,"n":2}}"#), (false, Requested::Many, None));
    assert_eq!(generate(r#"{"sampling_params":{"n":2,"\u006e":1}}"#), (false, Requested::One, None));
    let others = (0..40).map(|it| format!("\"{it}\":0,")).collect::<String>();
    assert_eq!(
        generate(&format!("{{\"sampling_params\":{{\"n\":1,{others}\"n\":2}}}}")),
        (false, Requested::Many, None)
    );
}

#[test]
fn a_merge_is_needed_for_prompt_logprobs_and_routed_experts_only() {
    for (dialect, text, merge) in [
        (Dialect::Generate, r#"{"return_logprob":true}"#, None),
        (Dialect::Generate, r#"{"return_logprob":true,"logprob_start_len":-1}"#, None),
        (Dialect::Generate, r#"{"return_logprob":true,"logprob_start_len":0}"#, Some(Merge::Generate)),
        (Dialect::Generate, r#"{"return_logprob":true,"logprob_start_len":-5}"#, Some(Merge::Generate)),
        (
            Dialect::Generate,
            r#"{"logprob_start_len":0,"return_logprob":[false,true]}"#,
            Some(Merge::Generate),
        ),
        (Dialect::Generate, r#"{"return_logprob":[false,0,null],"logprob_start_len":0}"#, None),
        (Dialect::Generate, r#"{"return_logprob":true,"logprob_start_len":[-1,7]}"#, Some(Merge::Generate)),
        (Dialect::Generate, r#"{"return_logprob":true,"token_ids_logprob":[1]}"#, Some(Merge::Generate)),
        (
            Dialect::Generate,
            r#"{"return_logprob":true,"token_ids_logprob":[null,[1]]}"#,
            Some(Merge::Generate),
        ),
        (Dialect::Generate, r#"{"return_logprob":true,"token_ids_logprob":[null]}"#, None),
        (Dialect::Generate, r#"{"return_logprob":true,"token_ids_logprob":null}"#, None),
        (Dialect::Generate, r#"{"echo":true,"logprobs":1}"#, None),
        (Dialect::Completions, r#"{"echo":true,"logprobs":1}"#, Some(Merge::Echo)),
        (Dialect::Completions, r#"{"echo":true,"logprobs":0}"#, None),
        (Dialect::Completions, r#"{"echo":true,"logprobs":null}"#, None),
        (Dialect::Completions, r#"{"echo":false,"logprobs":1}"#, None),
        (Dialect::Completions, r#"{"return_logprob":true,"logprob_start_len":0}"#, None),
        (Dialect::Chat, r#"{"echo":true,"logprobs":true,"return_logprob":true,"logprob_start_len":0}"#, None),
        (Dialect::Generate, r#"{"return_routed_experts":true}"#, Some(Merge::GenerateExperts)),
        (
            Dialect::Generate,
            r#"{"return_routed_experts":true,"return_logprob":true,"logprob_start_len":0}"#,
            Some(Merge::Generate),
        ),
        (Dialect::Generate, r#"{"return_routed_experts":false}"#, None),
        (Dialect::Chat, r#"{"return_routed_experts":true}"#, Some(Merge::Experts)),
        (Dialect::Completions, r#"{"return_routed_experts":1}"#, Some(Merge::Experts)),
        (Dialect::Completions, r#"{"return_routed_experts":1,"echo":true,"logprobs":1}"#, Some(Merge::Echo)),
        (Dialect::Completions, r#"{"routed_experts_start_len":1}"#, None),
    ] {
        assert_eq!(accepted(dialect, text).merge, merge, "{text}");
    }
}

#[test]
fn a_number_over_64_bits_does_not_hide_other_fields() {
    let params = r#"{"sampling_params":{"n":2,"a":123456789012345678901234567890}}"#;
    assert!(matches!(accepted(Dialect::Generate, params).samples, RequestedSamples::Many(_)));
}
