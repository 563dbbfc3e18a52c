use proptest::prelude::*;
use serde_json::Value as Parsed;

use super::*;

/// What is in an object, by walking it.
fn walk_object(text: &[u8]) -> Result<Vec<[&[u8]; 2]>, MalformedJson> {
    Value::root(text)?.members().map(|member| member.map(|it| [it.raw_key, it.value.raw()])).collect()
}

fn walk_array(text: &[u8]) -> Result<Vec<&[u8]>, MalformedJson> {
    Value::root(text)?.elements().map(|element| element.map(Value::raw)).collect()
}

/// Walks all of it, and panics if a value lies outside of the text.
fn walk_everything(value: Value<'_>) -> Result<(), MalformedJson> {
    assert_eq!(value.raw(), &value.text[value.span()]);
    if value.is_object() {
        value.members().try_for_each(|member| walk_everything(member?.value))
    } else if value.is_array() {
        value.elements().try_for_each(|element| walk_everything(element?))
    } else {
        Ok(())
    }
}

fn parse(text: &[u8]) -> Parsed {
    serde_json::from_slice(text).unwrap()
}

fn any_json() -> impl Strategy<Value = Parsed> {
    let scalar = prop_oneof![
        Just(Parsed::Null),
        any::<bool>().prop_map(Parsed::from),
        any::<i64>().prop_map(Parsed::from),
        // serde_json reads eighths exactly, and not every number.
        any::<i32>().prop_map(|number| Parsed::from(f64::from(number) / 8.0)),
        any::<String>().prop_map(Parsed::from),
        "[\\[\\]{}\"\\\\,:]{0,9}".prop_map(Parsed::from),
    ];
    scalar.prop_recursive(5, 60, 8, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..8).prop_map(Parsed::from),
            prop::collection::btree_map(any::<String>(), inner, 0..8)
                .prop_map(|members| Parsed::from(members.into_iter().collect::<serde_json::Map<_, _>>())),
        ]
    })
}

#[test]
fn members_and_elements_come_in_order_and_raw() {
    let text = br#" { "a" : 1.50 , "b":[1, 2 ,{"c":"]"}],"":"\\\"" } "#;
    let members = [[&b"a"[..], b"1.50"], [b"b", br#"[1, 2 ,{"c":"]"}]"#], [b"", br#""\\\"""#]];
    assert_eq!(walk_object(text).unwrap(), members);
    assert_eq!(walk_array(b"[1, 2 ,[3,4],\n]").unwrap_err().what, "no value where one must be");
    assert_eq!(walk_array(b"[1, 2 ,[3,4]\n]").unwrap(), [&b"1"[..], b"2", b"[3,4]"]);
    assert!(walk_object(b"{ }").unwrap().is_empty());
    assert!(walk_array(b"[\n]").unwrap().is_empty());
}

#[test]
fn a_member_is_found_on_its_own_level_only() {
    let text = br#"{"my_index":0,"inner":{"index":1},"list":[{"index":2}],"text":"\"index\":3","index":4}"#;
    let root = Value::root(text).unwrap();
    assert_eq!(root.member("index").unwrap().unwrap().as_u64(), Some(4));
    assert!(root.member("other").unwrap().is_none());
    assert!(Value::root(b"[1]").unwrap().member("index").unwrap().is_none());
}

#[test]
fn a_key_with_escapes_is_the_key_it_stands_for() {
    let text = br#"{"ind\u0065x":1,"a\/b":2,"bad\x":3,"\ud800":4}"#;
    let root = Value::root(text).unwrap();
    assert_eq!(root.member("index").unwrap().unwrap().raw(), b"1");
    assert_eq!(root.member("a/b").unwrap().unwrap().raw(), b"2");
    assert!(root.member("bad\\x").unwrap().is_none());
}

#[test]
fn only_whole_numbers_that_are_not_negative_are_read() {
    let number = |text: &str| Value::root(text.as_bytes()).unwrap().as_u64();
    assert_eq!(number("18446744073709551615"), Some(u64::MAX));
    for other in ["18446744073709551616", "-1", "1.0", "1e3", "null", "\"1\"", "[1]"] {
        assert_eq!(number(other), None, "{other}");
    }
}

#[test]
fn what_is_not_json_is_an_error() {
    let objects: [&[u8]; 9] =
        [b"", b" ", b"{", b"{\"a\" 12}", b"{\"a\":}", b"{\"a\":1,}", b"{\"a\":1 \"b\":2}", b"{a:1}", b"[1]"];
    for text in objects {
        assert!(walk_object(text).is_err(), "{}", text.escape_ascii());
    }
    let arrays: [&[u8]; 9] = [b"[", b"[1", b"[1 2]", b"[,]", b"[1}", b"[\"a]", b"[\"a\\", b"[[1]", b"{}"];
    for text in arrays {
        assert!(walk_array(text).is_err(), "{}", text.escape_ascii());
    }
    assert!(Value::root(b"{} {}").is_err());
}

#[test]
fn depth_costs_no_stack() {
    let deep = ["[".repeat(1_000_000), "]".repeat(1_000_000)].concat();
    assert_eq!(walk_array(deep.as_bytes()).unwrap().len(), 1);
    assert!(Value::root(&deep.as_bytes()[..1_999_999]).is_err());
}

proptest! {
    #[test]
    fn a_walk_sees_what_a_parser_sees(value in any_json(), pretty: bool) {
        let write = if pretty { serde_json::to_vec_pretty } else { serde_json::to_vec };
        let text = write(&value).unwrap();
        prop_assert!(walk_everything(Value::root(&text).unwrap()).is_ok());
        match &value {
            Parsed::Array(elements) => {
                let walked: Vec<_> = walk_array(&text).unwrap().iter().map(|raw| parse(raw)).collect();
                prop_assert_eq!(&walked, elements);
            }
            Parsed::Object(members) => {
                for (name, expected) in members {
                    let found = Value::root(&text).unwrap().member(name).unwrap().unwrap();
                    prop_assert_eq!(&parse(found.raw()), expected);
                }
                prop_assert_eq!(walk_object(&text).unwrap().len(), members.len());
            }
            scalar => prop_assert_eq!(&parse(&text), scalar),
        }
    }

    #[test]
    fn a_cut_object_or_array_is_an_error(value in any_json(), cut: prop::sample::Index) {
        let text = serde_json::to_vec(&[value]).unwrap();
        prop_assert!(Value::root(&text[..cut.index(text.len())]).is_err());
    }

    #[test]
    fn no_bytes_panic(bytes: Vec<u8>, json in "[\\[\\]{}\"\\\\,:a0 ]{0,40}") {
        for text in [&bytes[..], json.as_bytes()] {
            let _ = Value::root(text).and_then(walk_everything);
            let _ = walk_object(text);
            let _ = walk_array(text);
        }
    }

    #[test]
    fn the_first_structural_byte_is_found(text in "[a\\[\\]{}\"]{0,3}[a-z0-9]{0,80}[\\[\\]{}\"a]{0,3}") {
        let expected = text.find(['[', ']', '{', '}', '"']);
        prop_assert_eq!(find_structural(text.as_bytes()), expected);
    }
}
