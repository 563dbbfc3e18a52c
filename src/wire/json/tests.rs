use proptest::prelude::*;
use serde_json::Value as ParsedJson;

use super::*;

/// An object's names and values, as they were written.
fn members_of(text: &[u8]) -> Result<Vec<[&[u8]; 2]>, MalformedJson> {
    JsonValue::root(text)?.members().map(|member| member.map(|it| [it.name.raw(), it.value.raw()])).collect()
}

/// An array's elements, as they were written.
fn elements_of(text: &[u8]) -> Result<Vec<&[u8]>, MalformedJson> {
    JsonValue::root(text)?.elements().map(|element| element.map(JsonValue::raw)).collect()
}

/// Iterates everything in a value of `text`. Panics if a value is not where it says it is.
fn walk_everything(text: &[u8], value: JsonValue<'_>) -> Result<(), MalformedJson> {
    assert_eq!(value.raw(), &text[value.span()]);
    if value.is_object() {
        value.members().try_for_each(|member| walk_everything(text, member?.value))
    } else if value.is_array() {
        value.elements().try_for_each(|element| walk_everything(text, element?))
    } else {
        Ok(())
    }
}

fn parse(text: &[u8]) -> ParsedJson {
    serde_json::from_slice(text).unwrap()
}

fn any_json() -> impl Strategy<Value = ParsedJson> {
    let scalar = prop_oneof![
        Just(ParsedJson::Null),
        any::<bool>().prop_map(ParsedJson::from),
        any::<i64>().prop_map(ParsedJson::from),
        // Multiples of 1/8 are exact in binary: serde_json is off by one bit for some other numbers.
        any::<i32>().prop_map(|number| ParsedJson::from(f64::from(number) / 8.0)),
        any::<String>().prop_map(ParsedJson::from),
        "[\\[\\]{}\"\\\\,:]{0,9}".prop_map(ParsedJson::from),
    ];
    scalar.prop_recursive(5, 60, 8, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..8).prop_map(ParsedJson::from),
            prop::collection::btree_map(any::<String>(), inner, 0..8)
                .prop_map(|members| ParsedJson::from(members.into_iter().collect::<serde_json::Map<_, _>>())),
        ]
    })
}

#[test]
fn members_and_elements_are_raw_and_in_order() {
    let text = br#" { "a" : 1.50 , "b":[1, 2 ,{"c":"]"}],"":"\\\"" } "#;
    let members = [[&b"a"[..], b"1.50"], [b"b", br#"[1, 2 ,{"c":"]"}]"#], [b"", br#""\\\"""#]];
    assert_eq!(members_of(text).unwrap(), members);
    assert_eq!(elements_of(b"[1, 2 ,[3,4],\n]").unwrap_err().reason, "a value is missing");
    assert_eq!(elements_of(b"[1, 2 ,[3,4]\n]").unwrap(), [&b"1"[..], b"2", b"[3,4]"]);
    assert!(members_of(b"{ }").unwrap().is_empty());
    assert!(elements_of(b"[\n]").unwrap().is_empty());
}

#[test]
fn member_finds_names_of_its_own_level_only() {
    let text = br#"{"my_index":0,"inner":{"index":1},"list":[{"index":2}],"text":"\"index\":3","index":4}"#;
    let root = JsonValue::root(text).unwrap();
    assert_eq!(root.member("index").unwrap().unwrap().as_u64(), Some(4));
    assert!(root.member("other").unwrap().is_none());
    assert!(JsonValue::root(b"[1]").unwrap().member("index").unwrap().is_none());
}

#[test]
fn escaped_names_are_compared_unescaped() {
    let text = br#"{"ind\u0065x":1,"a\/b":2,"bad\x":3,"\ud800":4}"#;
    let root = JsonValue::root(text).unwrap();
    assert_eq!(root.member("index").unwrap().unwrap().raw(), b"1");
    assert_eq!(root.member("a/b").unwrap().unwrap().raw(), b"2");
    assert!(root.member("bad\\x").unwrap().is_none());
}

#[test]
fn as_u64_reads_unsigned_integers_only() {
    let number = |text: &str| JsonValue::root(text.as_bytes()).unwrap().as_u64();
    assert_eq!(number("18446744073709551615"), Some(u64::MAX));
    for other in ["18446744073709551616", "-1", "1.0", "1e3", "null", "\"1\"", "[1]"] {
        assert_eq!(number(other), None, "{other}");
    }
}

#[test]
fn malformed_json_is_an_error() {
    let objects: [&[u8]; 9] =
        [b"", b" ", b"{", b"{\"a\" 12}", b"{\"a\":}", b"{\"a\":1,}", b"{\"a\":1 \"b\":2}", b"{a:1}", b"[1]"];
    for text in objects {
        assert!(members_of(text).is_err(), "{}", text.escape_ascii());
    }
    let arrays: [&[u8]; 9] = [b"[", b"[1", b"[1 2]", b"[,]", b"[1}", b"[\"a]", b"[\"a\\", b"[[1]", b"{}"];
    for text in arrays {
        assert!(elements_of(text).is_err(), "{}", text.escape_ascii());
    }
    assert!(JsonValue::root(b"{} {}").is_err());
}

#[test]
fn a_million_levels_do_not_overflow_the_stack() {
    let deep = ["[".repeat(1_000_000), "]".repeat(1_000_000)].concat();
    assert_eq!(elements_of(deep.as_bytes()).unwrap().len(), 1);
    assert!(JsonValue::root(&deep.as_bytes()[..1_999_999]).is_err());
}

proptest! {
    #[test]
    fn a_walk_finds_the_same_values_as_a_parser(value in any_json(), pretty: bool) {
        let write = if pretty { serde_json::to_vec_pretty } else { serde_json::to_vec };
        let text = write(&value).unwrap();
        prop_assert!(walk_everything(&text, JsonValue::root(&text).unwrap()).is_ok());
        match &value {
            ParsedJson::Array(elements) => {
                let walked: Vec<_> = elements_of(&text).unwrap().iter().map(|raw| parse(raw)).collect();
                prop_assert_eq!(&walked, elements);
            }
            ParsedJson::Object(members) => {
                for (name, expected) in members {
                    let found = JsonValue::root(&text).unwrap().member(name).unwrap().unwrap();
                    prop_assert_eq!(&parse(found.raw()), expected);
                }
                prop_assert_eq!(members_of(&text).unwrap().len(), members.len());
            }
            scalar => prop_assert_eq!(&parse(&text), scalar),
        }
    }

    #[test]
    fn a_truncated_object_or_array_is_an_error(value in any_json(), cut: prop::sample::Index) {
        let text = serde_json::to_vec(&[value]).unwrap();
        prop_assert!(JsonValue::root(&text[..cut.index(text.len())]).is_err());
    }

    #[test]
    fn no_input_panics(bytes: Vec<u8>, json in "[\\[\\]{}\"\\\\,:a0 ]{0,40}") {
        for text in [&bytes[..], json.as_bytes()] {
            let _ = JsonValue::root(text).and_then(|root| walk_everything(text, root));
            let _ = members_of(text);
            let _ = elements_of(text);
        }
    }

    #[test]
    fn find_structural_returns_the_first_structural_byte(text in "[a\\[\\]{}\"]{0,3}[a-z0-9]{0,80}[\\[\\]{}\"a]{0,3}") {
        let expected = text.find(['[', ']', '{', '}', '"']);
        prop_assert_eq!(find_structural(text.as_bytes()), expected);
    }
}

#[test]
fn a_long_value_ends_where_its_last_bracket_closes() {
    for fill in [0, 1, 60, 64, 100, 1_000] {
        let fill = "1,".repeat(fill);
        let text = format!(r#"{{"a":[{fill}[{{"]}}":"\\\"]"}},[{fill}[]]]],"b":[{fill}2]}}"#);
        let all = members_of(text.as_bytes()).unwrap();
        assert_eq!(all[1], [&b"b"[..], format!("[{fill}2]").as_bytes()]);
        for cut in 6..all[0][1].len() + 5 {
            let reason = end_of_value(&text.as_bytes()[..cut], 5).unwrap_err().reason;
            let is_string = reason == "a string is not terminated";
            assert!(is_string || reason == "an object or array is not terminated", "{reason}");
            // As of the text up to the cut, which is short.
            let in_string = text[..cut].replace(r"\\", "").replace(r#"\""#, "").matches('"').count() % 2 == 1;
            assert_eq!(is_string, in_string, "{}", &text[..cut]);
        }
    }
}
