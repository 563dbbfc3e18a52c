//! What is read off recorded responses, whole and in pieces, and off made-up ones.

use super::CachedTokens::{NoneOrUnreported, Reported, Told, Untold};
use super::*;

/// The body of a recorded response of prefill, as it is framed.
fn recorded(name: &str) -> Vec<u8> {
    let path = format!("{}/tests/fixtures/pd/{name}.prefill.resp", env!("CARGO_MANIFEST_DIR"));
    let response = std::fs::read(path).expect("a recording");
    let head = memchr::memmem::find(&response, b"\r\n\r\n").expect("a head") + 4;
    response[head..].to_vec()
}

fn read(pieces: &[&[u8]]) -> Option<Usage> {
    let mut reader = UsageReader::default();
    pieces.iter().for_each(|piece| reader.push(piece));
    reader.usage()
}

fn usage(prompt_tokens: u64, cached: CachedTokens) -> Option<Usage> {
    Some(Usage { prompt_tokens, cached })
}

/// Recordings, and what they say. The chunk framing is left in the streams, where it does no harm.
const RECORDED: [(&str, Option<Usage>); 12] = [
    ("gen_basic", Some(Usage { prompt_tokens: 4, cached: Told(0) })),
    ("gen_stream", Some(Usage { prompt_tokens: 4, cached: Told(3) })),
    ("gen_logprob", Some(Usage { prompt_tokens: 4, cached: Told(0) })),
    ("gen_logprob_stream", Some(Usage { prompt_tokens: 4, cached: Told(0) })),
    ("gen_batch_lists", None),
    ("gen_batch_lists_stream", None),
    ("gen_n2_introom", None),
    ("chat_basic", Some(Usage { prompt_tokens: 7, cached: NoneOrUnreported })),
    ("chat_stream", Some(Usage { prompt_tokens: 7, cached: NoneOrUnreported })),
    ("chat_n2", Some(Usage { prompt_tokens: 7, cached: NoneOrUnreported })),
    ("cmpl_basic", Some(Usage { prompt_tokens: 3, cached: NoneOrUnreported })),
    // Without `include_usage`.
    ("cmpl_stream", None),
];

#[test]
fn recorded_responses_are_read() {
    for (name, expected) in RECORDED {
        assert_eq!(read(&[&recorded(name)]), expected, "{name}");
    }
}

#[test]
fn where_a_body_is_split_makes_no_difference() {
    for (name, expected) in RECORDED {
        let body = recorded(name);
        for at in 0..=body.len() {
            assert_eq!(read(&[&body[..at], &body[at..]]), expected, "{name} split at {at}");
        }
        let bytes: Vec<&[u8]> = body.chunks(1).collect();
        assert_eq!(read(&bytes), expected, "{name}, byte by byte");
        let pieces: Vec<&[u8]> = body.chunks(OVERLAP - 1).collect();
        assert_eq!(read(&pieces), expected, "{name}, in pieces");
    }
}

#[test]
fn cached_tokens_are_those_of_a_cache_report() {
    let body = br#"{"usage":{"prompt_tokens":9,"prompt_tokens_details":{"cached_tokens":8},"x":1}}"#;
    assert_eq!(read(&[body]), usage(9, Reported(8)));
    for at in 0..=body.len() {
        assert_eq!(read(&[&body[..at], &body[at..]]), usage(9, Reported(8)), "split at {at}");
    }
    assert_eq!(read(&[br#"{"usage": {"prompt_tokens": 9, "total_tokens": 10}}"#]), usage(9, Untold));
}

#[test]
fn a_long_body_is_searched_at_its_beginning_and_at_the_end_of_each_piece() {
    let filler = vec![b'7'; 100 * TAIL];
    let (first, last) = (br#"{"meta_info":{"prompt_tokens":500,"#, br#","cached_tokens":4,"e":1}}"#);
    let body = [&first[..], &filler, last].concat();
    assert_eq!(read(&[&body]), usage(500, Told(4)));
    assert_eq!(read(&[&body[..90_000], &body[90_000..]]), usage(500, Told(4)));
    let hidden = [&filler[..], first, &filler, last].concat();
    assert_eq!(read(&[&hidden]), None, "nothing is searched in the middle");
}

#[test]
fn text_is_not_taken_for_a_number() {
    // As JSON it has backslashes before its quotes.
    let quoted = br#"{"text":"\"prompt_tokens\": 5, \"cached_tokens\": 5,","meta_info":{"prompt_tokens":4,"cached_tokens":1}}"#;
    assert_eq!(read(&[quoted]), usage(4, Told(1)));
    for no_number in ["null", "-1", "1.5", "1e3", "\"4\"", "1234567890", "", "12"] {
        let body = format!(r#"{{"prompt_tokens":{no_number}"#);
        assert_eq!(read(&[body.as_bytes()]), None, "{no_number}");
    }
}

#[test]
fn more_cached_tokens_than_the_prompt_has_are_not_believed() {
    assert_eq!(read(&[br#"{"prompt_tokens":4,"cached_tokens":5}"#]), None);
    assert_eq!(read(&[br#"{"prompt_tokens":4,"cached_tokens":4}"#]), usage(4, Told(4)));
}
