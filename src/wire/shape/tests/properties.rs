//! Properties of every body, in chunks of any lengths.

use std::collections::BTreeMap;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use serde_json::Value;
use serde_json::value::RawValue;
use simd_json::OwnedValue;
use simd_json::prelude::{ValueAsArray, ValueAsObject, ValueAsScalar};

use super::generators::{deep, object, steering_object};
use super::*;
use crate::wire::json;
use crate::wire::plan::LegPlan;
use crate::wire::shape::strict::Utf8Validator;

/// What a plan does with one kind of field.
fn change() -> impl Strategy<Value = FieldChange> {
    select(vec![FieldChange::Keep, FieldChange::Cut, FieldChange::Replace(Bytes::from_static(b"[7]"))])
}

fn planned_field(name: &str) -> Option<ChangedField> {
    match name {
        "rid" => Some(ChangedField::Rid),
        "request_id" => Some(ChangedField::RequestId),
        _ if name.starts_with("bootstrap_") => Some(ChangedField::Internal),
        _ => None,
    }
}

fn dialect() -> impl Strategy<Value = Dialect> {
    select(&DIALECTS[..])
}

/// The lengths of a body's chunks, repeated as needed.
fn lengths() -> impl Strategy<Value = Vec<usize>> {
    prop_oneof![Just(vec![1]), vec(1_usize..40, 1..6)]
}

/// The top level as a strict parser reads it, with raw values; of duplicate names the last. Every byte is
/// validated, but not the size of numbers or the characters of escapes.
fn strict(text: &[u8]) -> Option<BTreeMap<String, String>> {
    let fields: BTreeMap<String, Box<RawValue>> = serde_json::from_slice(text).ok()?;
    Some(fields.into_iter().map(|(name, value)| (name, value.get().to_owned())).collect())
}

/// What a strict parser must read in the rewritten body.
fn with_bootstrap<V: From<String>>(
    mut fields: BTreeMap<String, V>,
    parse: impl Fn(&str) -> V,
) -> BTreeMap<String, V> {
    fields.retain(|name, _| !name.starts_with("bootstrap_"));
    let added = [("host", "\"h\""), ("port", "1"), ("room", "2")];
    fields.extend(added.map(|(name, value)| (format!("bootstrap_{name}"), parse(value))));
    fields
}

/// What the fields request, computed independently of the inspector. `None` if the parsers cannot read one
/// of them, which is the case for large numbers within lists and objects.
fn expected_features(fields: &BTreeMap<String, String>, dialect: Dialect) -> Option<Features> {
    let read = |name: &str| fields.get(name).map_or(Some(Value::Null), |raw| value(raw));
    let any = |name: &str, test: fn(&Value) -> bool| {
        let value = read(name)?;
        Some(value.as_array().map_or_else(|| test(&value), |items| items.iter().any(test)))
    };
    let stream = any("stream", is_true)?;
    let experts = any("return_routed_experts", is_true)?;
    Some(match dialect {
        Dialect::Generate => {
            let start = any("logprob_start_len", |from| number(from).is_some_and(|from| from != -1.0))?;
            let ids = any("token_ids_logprob", |ids| !ids.is_null())?;
            let merge = any("return_logprob", is_true)? && (start || ids);
            (
                stream,
                requested_by_params(fields),
                merge.then_some(Merge::Generate).or(experts.then_some(Merge::GenerateExperts)),
            )
        }
        Dialect::Chat => (stream, requested_by_n(fields.get("n"))?, experts.then_some(Merge::Experts)),
        // `n` is ignored on these.
        Dialect::Responses | Dialect::Messages => (stream, Requested::One, None),
        Dialect::Completions => {
            let merge = any("echo", is_true)? & any("logprobs", |count| number(count) > Some(0.0))?;
            (
                stream,
                requested_by_n(fields.get("n"))?,
                merge.then_some(Merge::Echo).or(experts.then_some(Merge::Experts)),
            )
        }
    })
}

fn is_true(value: &Value) -> bool {
    match value {
        Value::String(text) if ["true", "t", "yes", "y", "on"].contains(&&*text.to_lowercase()) => true,
        value => number(value).is_some_and(|number| number != 0.0),
    }
}

/// By `n` of chat and completions, as pydantic converts it.
fn requested_by_n(raw: Option<&String>) -> Option<Requested> {
    let Some(raw) = raw else { return Some(Requested::One) };
    if raw.parse::<f64>().is_ok_and(f64::is_infinite) {
        return Some(Requested::Refused);
    }
    let count = match value(raw)? {
        Value::Bool(is_one) => Some(f64::from(is_one)),
        Value::Number(number) => number.as_f64().filter(|number| number.fract() == 0.0),
        Value::String(text) => {
            let text = text.trim();
            let whole = text.trim_end_matches('0').strip_suffix('.').unwrap_or(text);
            whole.parse::<i128>().ok().map(|number| number as f64)
        }
        _ => None,
    };
    Some(match count {
        None => Requested::Refused,
        Some(count) if count > 1.0 => Requested::Many,
        Some(0.0) => Requested::Refused,
        Some(_) => Requested::One,
    })
}

/// By `n` of `sampling_params`, and lists that do not go with it.
fn requested_by_params(fields: &BTreeMap<String, String>) -> Requested {
    let count = |params: &str| {
        let params: BTreeMap<String, Box<RawValue>> = serde_json::from_str(params).unwrap_or_default();
        params.get("n").map_or("1", |count| count.get()).to_owned()
    };
    let params = fields.get("sampling_params").map_or("{}", String::as_str);
    let counts: Vec<String> = match serde_json::from_str::<Vec<Box<RawValue>>>(params) {
        Ok(list) => list.iter().map(|params| count(params.get())).collect(),
        Err(_) => vec![count(params)],
    };
    let counts: Option<Vec<Option<i64>>> = counts
        .iter()
        .map(|count| if count == "null" { Some(None) } else { count.parse().ok().map(Some) })
        .collect();
    let Some(counts) = counts else { return Requested::Refused };
    let is_list = |name: &str| fields.get(name).is_some_and(|raw| raw.starts_with('['));
    let is_nested = |name: &str| {
        let list = fields.get(name).and_then(|raw| serde_json::from_str::<Vec<Box<RawValue>>>(raw).ok());
        list.is_some_and(|list| list.first().is_some_and(|first| first.get().starts_with('[')))
    };
    match counts[..] {
        [] => Requested::One,
        [first, ..] if counts.iter().any(|count| *count != first) => Requested::Refused,
        [None, ..] => Requested::Refused,
        [Some(..=1), ..] => Requested::One,
        _ if ["return_logprob", "logprob_start_len", "top_logprobs_num"].into_iter().any(is_list)
            || is_nested("token_ids_logprob") =>
        {
            Requested::Refused
        }
        _ => Requested::Many,
    }
}

/// What a strict parser must read in the body of a copy.
fn with_one_sample(mut fields: BTreeMap<String, String>, dialect: Dialect) -> BTreeMap<String, String> {
    let without_n = |params: &mut Value| {
        params.as_object_mut().map(|params| params.remove("n"));
    };
    fields.remove("rid");
    if dialect != Dialect::Generate {
        fields.remove("n");
        return fields;
    }
    let params = fields.get_mut("sampling_params").unwrap();
    let mut value: Value = serde_json::from_str(params).unwrap();
    match &mut value {
        Value::Array(list) => list.iter_mut().for_each(without_n),
        value => without_n(value),
    }
    // To a batch of one they are the same.
    if let Value::Array(list) = &mut value
        && list.len() == 1
    {
        value = list.remove(0);
    }
    *params = value.to_string();
    fields
}

/// A number, also from a string or a boolean, as pydantic accepts them.
fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Bool(value) => Some(if *value { 1.0 } else { 0.0 }),
        Value::String(digits) => digits.trim().parse().ok(),
        value => value.as_f64(),
    }
}

/// A value that two parsers must read alike.
fn value(raw: &str) -> Option<Value> {
    if let Ok(number) = raw.parse::<f64>() {
        return Some(number.clamp(f64::MIN, f64::MAX).into());
    }
    let value = serde_json::from_str(raw).ok()?;
    let other = simd_json::to_owned_value(&mut raw.as_bytes().to_vec()).ok()?;
    assert!(agree(&value, &other), "{value} {other}");
    Some(value)
}

fn agree(one: &Value, other: &OwnedValue) -> bool {
    match one {
        Value::Null => other.as_null().is_some(),
        Value::Bool(one) => other.as_bool() == Some(*one),
        Value::String(one) => other.as_str() == Some(one),
        Value::Number(one) => {
            // serde_json is off by one bit for some numbers.
            let (one, other) = (one.as_f64().unwrap(), other.cast_f64().unwrap());
            (one - other).abs() <= one.abs() * 1e-15
        }
        Value::Array(one) => {
            let other = other.as_array().unwrap();
            one.len() == other.len() && one.iter().zip(other.iter()).all(|(one, other)| agree(one, other))
        }
        Value::Object(one) => {
            let other: BTreeMap<_, _> = other.as_object().unwrap().iter().collect();
            one.len() == other.len() && one.iter().all(|(name, one)| agree(one, other[name]))
        }
    }
}

/// Holds for any bytes: chunks do not change the result, a body that is rejected is malformed, and one that
/// is accepted stays what it is when rewritten. If that is malformed, then within its values only.
fn assert_consistent(text: &[u8], dialect: Dialect, lengths: &[usize]) -> Result<(), TestCaseError> {
    let shape = match (inspect(dialect, text, &[text.len()]), inspect(dialect, text, lengths)) {
        (Ok(whole), Ok(chunked)) if whole == chunked => whole,
        (Err(_), Err(_)) => {
            prop_assert!(strict(text).is_none(), "a well-formed body is rejected");
            return Ok(());
        }
        (whole, chunked) => return Err(TestCaseError::fail(format!("{whole:?} {chunked:?}"))),
    };
    let walked = json::JsonValue::root(text).map(|body| body.members().all(|field| field.is_ok()));
    prop_assert_eq!(walked, Ok(true), "the top level is malformed");
    let after = rewrite(text, &shape.fields, lengths);
    let Some(before) = strict(text) else {
        prop_assert!(
            strict(&after).is_none(),
            "a malformed body became well-formed: {}",
            after.escape_ascii()
        );
        return Ok(());
    };
    if let Some(expected) = expected_features(&before, dialect) {
        prop_assert_eq!(expected, features(&shape));
    }
    prop_assert_eq!(strict(&after), Some(with_bootstrap(before, str::to_owned)));
    Ok(())
}

/// Tokens of JSON, in any order.
fn nearly_json() -> impl Strategy<Value = Vec<u8>> {
    let token = select(
        &[
            "{",
            "}",
            "[",
            "]",
            ",",
            ":",
            " ",
            "\"",
            "\\",
            "\"a\":",
            "\"stream\":",
            "\"bootstrap_host\":",
            "1",
            "tru",
            "true",
            "\"\"",
            "\\u",
            "-",
            "é",
            "{\"",
        ][..],
    );
    vec(token, 0..24).prop_map(|tokens| tokens.concat().into_bytes())
}

/// Characters, some truncated, and a few other bytes.
fn nearly_utf8() -> impl Strategy<Value = Vec<u8>> {
    let character = (any::<char>(), 1..=4_usize, 0..8).prop_map(|(character, length, whole)| {
        let mut bytes = character.to_string().into_bytes();
        bytes.truncate(if whole > 0 { 4 } else { length });
        bytes
    });
    vec(prop_oneof![30 => character, 1 => any::<u8>().prop_map(|byte| vec![byte])], 0..24)
        .prop_map(|characters| characters.concat())
}

/// Any byte, often one of JSON's syntax.
fn byte() -> impl Strategy<Value = u8> {
    prop_oneof![any::<u8>(), select(&b"{}[]\",:\\/u0e-+.1tn \n\x00\x1f\xef\xc3"[..])]
}

fn mutate(text: &mut Vec<u8>, kind: u8, at: Index, byte: u8) {
    if text.is_empty() {
        return;
    }
    let at = at.index(text.len());
    match kind {
        0..4 => drop(text.remove(at)),
        4..8 => text.insert(at, byte),
        8..12 => text[at] = byte,
        _ => text.truncate(at),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn chunk_boundaries_do_not_change_the_shape(
        body in object(), dialect in dialect(), lengths in lengths(),
    ) {
        let text = body.text();
        let whole = inspect(dialect, text.as_bytes(), &[text.len()]);
        prop_assert!(whole.is_ok(), "{:?}", whole);
        prop_assert_eq!(&whole, &inspect(dialect, text.as_bytes(), &[1]));
        prop_assert_eq!(&whole, &inspect(dialect, text.as_bytes(), &lengths));
    }

    #[test]
    fn a_rewritten_body_differs_in_the_bootstrap_fields_only(
        body in object(), dialect in dialect(), lengths in lengths(),
    ) {
        let text = body.text();
        let fields = inspect(dialect, text.as_bytes(), &lengths).unwrap().fields;
        for lengths in [&lengths[..], &[1], &[text.len()]] {
            let after = rewrite(text.as_bytes(), &fields, lengths);
            prop_assert_eq!(String::from_utf8(after).unwrap(), body.rewritten(FIELDS));
        }
    }

    #[test]
    fn a_plan_changes_what_it_says_and_nothing_else(
        body in object(), dialect in dialect(), lengths in lengths(), changes in [change(), change(), change()],
        added: bool,
    ) {
        let text = body.text();
        let shape = inspect(dialect, text.as_bytes(), &lengths).unwrap();
        let added = if added { r#","x":"y""# } else { "" };
        let of = |field| match field {
            // What becomes of samples depends on values, which the model below does not read.
            ChangedField::Samples | ChangedField::SamplingParams => FieldChange::Keep,
            // Adjacent internal fields are one, so they are kept or cut.
            ChangedField::Internal if matches!(changes[0], FieldChange::Replace(_)) => FieldChange::Cut,
            field => changes[field as usize].clone(),
        };
        let plan = RequestPlan::of_prefill(LegPlan::new(&shape.fields, of, added.into()));
        let expected = body.changed(|name| planned_field(name).map(of), &[FIELDS, added].concat());
        for lengths in [&lengths[..], &[1], &[text.len()]] {
            let after = planned(text.as_bytes(), &plan, lengths);
            prop_assert_eq!(std::str::from_utf8(&after).unwrap(), &expected);
        }
        prop_assert!(strict(expected.as_bytes()).is_some());
    }

    #[test]
    fn a_copy_of_a_request_for_samples_asks_for_one(
        body in prop_oneof![object().boxed(), steering_object().boxed()], lengths in lengths(),
    ) {
        let text = body.text();
        for dialect in DIALECTS {
            let shape = inspect(dialect, text.as_bytes(), &lengths).unwrap();
            let RequestedSamples::Many(samples) = &shape.samples else { continue };
            let plan = RequestPlan::sglang_sample(&shape.fields, samples, OwnIds::default());
            let after = planned(text.as_bytes(), &plan, &lengths);
            prop_assert_eq!(inspect(dialect, &after, &lengths).unwrap().samples, RequestedSamples::One);
            let read = |text: &[u8]| {
                let mut fields = strict(text).unwrap();
                // White space and duplicates within them are of no matter.
                if let Some(params) = fields.get_mut("sampling_params")
                    && let Ok(value) = serde_json::from_str::<Value>(params)
                {
                    *params = value.to_string();
                }
                fields
            };
            let expected = with_one_sample(with_bootstrap(read(text.as_bytes()), str::to_owned), dialect);
            let mut after = read(&after);
            // What stays of duplicates is what every client may send.
            if dialect != Dialect::Generate && after.get("n").is_some_and(|n| n == "1") {
                after.remove("n");
            }
            prop_assert_eq!(after, expected);
        }
    }

    #[test]
    fn ids_are_set_whatever_the_client_has(body in object(), lengths in lengths()) {
        let text = body.text();
        let fields = inspect(Dialect::Chat, text.as_bytes(), &lengths).unwrap().fields;
        let ids = OwnIds { rid: Some("r-1"), request_id: Some("q-1") };
        let after = strict(&planned(text.as_bytes(), &RequestPlan::sglang(&fields, ids), &lengths)).unwrap();
        for (name, id) in [("rid", "\"r-1\""), ("request_id", "\"q-1\"")] {
            prop_assert_eq!(after[name].as_str(), id);
        }
    }

    #[test]
    fn parsers_read_the_same_fields_in_the_rewritten_body(body in object(), lengths in lengths()) {
        let text = body.text();
        let fields = inspect(Dialect::Chat, text.as_bytes(), &lengths).unwrap().fields;
        let after = rewrite(text.as_bytes(), &fields, &lengths);
        prop_assert_eq!(strict(&after), Some(with_bootstrap(strict(text.as_bytes()).unwrap(), str::to_owned)));
        // If serde_json cannot read a number, comparing the raw values above must do.
        if let Ok(before) = serde_json::from_str::<BTreeMap<String, Value>>(&text) {
            let after: BTreeMap<String, Value> = serde_json::from_slice(&after).unwrap();
            prop_assert_eq!(after, with_bootstrap(before, |value| serde_json::from_str(value).unwrap()));
        }
    }

    #[test]
    fn the_router_reads_the_same_features_as_parsers(
        body in prop_oneof![object().boxed(), steering_object().boxed()], lengths in lengths(),
    ) {
        let text = body.text();
        for dialect in DIALECTS {
            let shape = inspect(dialect, text.as_bytes(), &lengths).unwrap();
            let expected = expected_features(&strict(text.as_bytes()).unwrap(), dialect);
            prop_assert_eq!(Some(features(&shape)), expected);
        }
    }

    #[test]
    fn a_malformed_body_is_rejected_or_stays_malformed(
        body in object(),
        mutations in vec((0..13_u8, any::<Index>(), byte()), 1..4),
        dialect in dialect(),
        lengths in lengths(),
    ) {
        let mut text = body.text().trim().as_bytes().to_vec();
        for (kind, at, byte) in mutations {
            mutate(&mut text, kind, at, byte);
            assert_consistent(&text, dialect, &lengths)?;
        }
    }

    #[test]
    fn any_bytes_are_accepted_or_rejected_as_parsers_do(
        random in vec(byte(), 0..80), nearly in nearly_json(), dialect in dialect(), lengths in lengths(),
    ) {
        assert_consistent(&random, dialect, &lengths)?;
        assert_consistent(&nearly, dialect, &lengths)?;
        assert_consistent(&[b"{", &nearly[..], b"}"].concat(), dialect, &lengths)?;
    }

    #[test]
    fn utf8_validation_agrees_with_the_standard_library(
        bytes in prop_oneof![nearly_utf8(), any::<Vec<u8>>()], lengths in lengths(),
    ) {
        let mut utf8 = Utf8Validator::default();
        let mut at = 0;
        let fed = chunks(&bytes, &lengths).try_for_each(|chunk| {
            utf8.feed(chunk, at)?;
            at += chunk.len();
            Ok(())
        });
        let expected = std::str::from_utf8(&bytes).map(|_| ());
        let expected = expected.map_err(|error| BodyError::NotUtf8 { at: error.valid_up_to() });
        prop_assert_eq!(fed.and_then(|()| utf8.finish(at)), expected);
    }

    #[test]
    fn a_string_must_be_utf8(bytes in nearly_utf8(), nested: bool, lengths in lengths()) {
        let mut contents = bytes;
        contents.retain(|byte| !matches!(byte, b'"' | b'\\' | 0..32));
        let around = if nested { ["{\"a\":[\"", "\"]}"] } else { ["{\"a\":\"", "\"}"] };
        let text = [around[0].as_bytes(), &contents, around[1].as_bytes()].concat();
        assert_consistent(&text, Dialect::Chat, &lengths)?;
    }

    #[test]
    fn a_body_of_up_to_1000_levels_is_accepted(text in deep(0..=1_000), lengths in lengths(), dialect in dialect()) {
        assert_consistent(text.as_bytes(), dialect, &lengths)?;
        let fields = inspect(dialect, text.as_bytes(), &lengths).unwrap().fields;
        let mut after = rewrite(text.as_bytes(), &fields, &lengths);
        if !fields.has(ChangedField::Internal) {
            let kept = text.strip_suffix("}").unwrap();
            prop_assert_eq!(std::str::from_utf8(&after).unwrap(), format!("{kept},{FIELDS}}}"));
        }
        prop_assert!(simd_json::to_tape(&mut after).is_ok());
    }
}
