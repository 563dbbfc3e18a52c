//! Long chunks, which are read in blocks, against the same bytes read a word at a time and validated first:
//! what is found and which error is returned, and where, must be the same.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::generators::{deep, object};
use super::*;

/// What becomes of a body in chunks of these lengths.
fn read(inspector: BodyInspector, text: &[u8], lengths: &[usize]) -> Result<BodyShape, BodyError> {
    let mut inspector = inspector.with_prompt(HashKey::STABLE).with_stable_prefix();
    chunks(text, lengths).try_for_each(|chunk| inspector.feed(chunk))?;
    inspector.finish()
}

#[track_caller]
fn assert_agree(text: &[u8], dialect: Dialect, lengths: &[usize]) {
    let inspector = || BodyInspector::new(dialect);
    let expected = read(inspector().reference(), text, lengths);
    assert_eq!(read(inspector(), text, lengths), expected, "{lengths:?}: {}", text.escape_ascii());
}

/// Chunks of less than a block, of some, and of all.
fn lengths() -> impl Strategy<Value = Vec<usize>> {
    prop_oneof![
        vec(1_usize..140, 1..6),
        vec(64_usize..2_000, 1..6),
        // As a connection may read them: with a part of a character at the end of a long chunk.
        (64_usize..2_000, 1_usize..5).prop_map(|(long, short)| vec![long, short]),
        Just(vec![usize::MAX]),
    ]
}

/// Contents of a string, or nearly: runs of backslashes, long clean parts, brackets, and characters.
fn contents() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        3 => r#"([a-z ]|\\n|\\"|\\\\|[\[\]{},:]){0,60}"#.prop_map(String::into_bytes),
        2 => (0_usize..80).prop_map(|pairs| br"\\".repeat(pairs)),
        2 => (0_usize..1_500).prop_map(|length| vec![b'Q'; length]),
        1 => "[é€😀a]{1,60}".prop_map(String::into_bytes),
    ];
    vec(piece, 0..10).prop_map(|pieces| pieces.concat())
}

/// A body with a long value of each kind.
fn long_body() -> impl Strategy<Value = Vec<u8>> {
    let name = select(&["messages", "text", "prompt", "bootstrap_host", "rid", "a", "tools"][..]);
    let field =
        (name, contents(), vec(any::<u32>(), 0..200), 0_u8..4).prop_map(|(name, contents, ids, kind)| {
            let quoted = [b"\"", &contents[..], b"\""].concat();
            let ids = format!("{ids:?}").into_bytes();
            let value = match kind {
                0 => quoted,
                1 => [b"[{\"role\":\"user\",\"content\":", &quoted[..], b"},", &quoted, b"]"].concat(),
                2 => ids,
                _ => [b"{", &quoted[..], b":", &ids, b"}"].concat(),
            };
            [b"\"", name.as_bytes(), b"\":", &value].concat()
        });
    vec(field, 1..4).prop_map(|fields| [b"{", &fields.join(&b',')[..], b"}"].concat())
}

/// Changes a byte, or puts several in its place.
fn mutation() -> impl Strategy<Value = (Index, Vec<u8>)> {
    const SPECIAL: [&[u8]; 12] =
        [b"\"", b"\\", b"\\\"", b"{", b"}", b"[", b"]", b"", b"\xff", b"\xc3", b"\xe2\x82", b"\x80"];
    let special = select(&SPECIAL[..]);
    let bytes = prop_oneof![
        4 => special.prop_map(<[u8]>::to_vec),
        1 => (1_usize..70).prop_map(|length| vec![b'\\'; length]),
        1 => vec(any::<u8>(), 1..4),
    ];
    (any::<Index>(), bytes)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn a_long_body_is_read_in_blocks_as_in_words(
        body in long_body(), mutations in vec(mutation(), 0..3),
        dialect in select(&DIALECTS[..]), lengths in lengths(),
    ) {
        let mut body = body;
        for (at, bytes) in mutations {
            let at = at.index(body.len());
            body.splice(at..=at, bytes);
        }
        assert_agree(&body, dialect, &lengths);
    }

    #[test]
    fn any_body_is_read_in_blocks_as_in_words(
        body in prop_oneof![object().prop_map(|body| body.text()).boxed(), deep(900..=1_030).boxed()],
        mutations in vec(mutation(), 0..3), dialect in select(&DIALECTS[..]), lengths in lengths(),
    ) {
        let mut body = body.into_bytes();
        for (at, bytes) in mutations {
            let at = at.index(body.len());
            body.splice(at..=at, bytes);
        }
        assert_agree(&body, dialect, &lengths);
    }
}

#[test]
fn a_backslash_outside_a_string_escapes_nothing() {
    let fill = " ".repeat(100);
    for nested in [r#"[\"]"]"#, r#"[\\"]"]"#, r#"[\{\}]"#, r#"["a"\,"\\"\]"#, r#"{\"\"]":[\[]]}"#] {
        for (before, after) in [("", &*fill), (&fill, ""), (&fill, &fill)] {
            let text = format!("{{\"a\":{before}{nested}{after},\"bootstrap_room\":1}}");
            assert_agree(text.as_bytes(), Dialect::Chat, &[text.len()]);
            assert!(accepted(Dialect::Chat, &text).fields.has(ChangedField::Internal), "{text}");
        }
    }
}

#[test]
fn text_that_is_not_utf8_is_said_before_any_other_error_of_its_chunk() {
    let ascii = "x".repeat(1_000);
    for error in ["}", "{", "]", "\"", "\"internal"] {
        let before = format!("{{\"a\":[\"{ascii}\"]{error}");
        let text = [before.as_bytes(), ascii.as_bytes(), b"\xff"].concat();
        let found = inspect(Dialect::Chat, &text, &[text.len()]);
        assert_eq!(found, Err(BodyError::NotUtf8 { at: text.len() - 1 }), "{before}");
    }
}

#[test]
fn a_character_that_a_long_value_cuts_short_is_an_error_where_it_begins() {
    let ascii = "x".repeat(1_000);
    for cut in [&b"\xe2"[..], b"\xe2\x82", b"\xf0\x9f\x98"] {
        for before in ["{\"a\":\"", "{\"a\":[\"", "{\"a\":[[1],\""] {
            let text = [before.as_bytes(), cut, ascii.as_bytes(), b"\"]}"].concat();
            for first in [before.len(), before.len() + cut.len(), text.len()] {
                let found = inspect(Dialect::Chat, &text, &[first, text.len()]);
                assert_eq!(found, Err(BodyError::NotUtf8 { at: before.len() }), "{}", text.escape_ascii());
            }
        }
    }
}
