//! What the client sees of copies' responses.

use bytes::BytesMut;

use super::*;

#[test]
fn choices_of_all_copies_are_one_list() {
    let body = |text: &str, tokens: u32| {
        format!(
            r#"{{"id":"{text}","choices":[{{"index":0,"text":"{text}"}}],"usage":{{"prompt_tokens":7,"total_tokens":{},"completion_tokens":{tokens}}}}}"#,
            7 + tokens
        )
        .into()
    };
    let merged = merge_bodies(Dialect::Completions, vec![body("a", 4), body("b", 3)]).unwrap();
    assert_eq!(
        merged,
        r#"{"id":"a","choices":[{"index":0,"text":"a"},{"index":1,"text":"b"}],"usage":{"prompt_tokens":7,"total_tokens":14,"completion_tokens":7}}"#
    );
}

#[test]
fn streams_of_all_copies_are_one_stream() {
    let mut merger = StreamMerger::new(Dialect::Chat, 2, 1_000);
    let mut out = BytesMut::new();
    let event =
        |copy: &str| format!("data: {{\"id\":\"{copy}\",\"choices\":[{{\"index\":0,\"delta\":{{}}}}]}}\n\n");
    for copy in [1, 0] {
        let progress = merger.push(copy, event(&format!("id-{copy}")).as_bytes(), &mut out);
        assert_eq!(progress, Ok(Progress::Open));
    }
    assert_eq!(merger.push(0, b"data: [DONE]\n\n", &mut out), Ok(Progress::Open));
    assert_eq!(merger.push(1, b"data: [DONE]\n\n", &mut out), Ok(Progress::Complete));
    let expected = r#"data: {"id":"id-1","choices":[{"index":1,"delta":{}}]}

data: {"id":"id-1","choices":[{"index":0,"delta":{}}]}

data: [DONE]

"#;
    assert_eq!(out, expected);
}
