//! What the client sees of copies' responses.

use bytes::{Bytes, BytesMut};

use super::*;

mod copies;
mod properties;

use crate::wire::shape::RequestedSamples;
use copies::{Copies, exchange, recorded};

/// All recordings of a regular server that has generated several samples: the bodies.
const BODIES: [&str; 18] = [
    "chat_n2",
    "chat_n3",
    "chat_n3_logprobs",
    "chat_n3_rid",
    "chat_n3_tools_required",
    "cmpl_n2",
    "cmpl_n2_batch",
    "cmpl_n2_batch_logprobs_echo",
    "cmpl_n2_best_of",
    "cmpl_n2_echo",
    "gen_n2",
    "gen_n2_batch",
    "gen_n2_batch_logprob",
    "gen_n2_batch_one",
    "gen_n2_batch_rid_list",
    "gen_n2_logprob",
    "gen_n2_max1",
    "gen_n2_sampled",
];

/// The same: the streams.
const STREAMS: [&str; 13] = [
    "chat_n2_stream",
    "chat_n3_logprobs_stream",
    "chat_n3_stop_stream",
    "chat_n3_stream_usage",
    "chat_n3_stream_usage_cont",
    "cmpl_n2_batch_logprobs_echo_stream",
    "cmpl_n2_batch_stream",
    "cmpl_n2_batch_stream_usage",
    "cmpl_n2_stream",
    "gen_n2_batch_stream",
    "gen_n2_logprob_stream",
    "gen_n2_sampled_stream",
    "gen_n2_stream",
];

const MAX_EVENT: usize = 1 << 20;

/// Feeds copies' bytes in this order, and then each stream's end.
fn merge(dialect: Dialect, copies: usize, fed: &[(usize, &[u8])]) -> (MergeProgress, String) {
    let mut merger = StreamMerger::new(dialect, copies, MAX_EVENT);
    let mut out = BytesMut::new();
    for (copy, data) in fed {
        merger.push(*copy, data, &mut out).unwrap();
    }
    let mut progress = MergeProgress::Open;
    for copy in 0..copies {
        progress = merger.end(copy, &mut out).unwrap();
    }
    (progress, String::from_utf8(out.to_vec()).unwrap())
}

/// A stream's end by an error.
fn error_of(result: Result<MergeProgress, StreamMergeError>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn requests_are_read_as_a_regular_server_has_read_them() {
    const REFUSED: [(&str, &str); 10] = [
        ("chat_n_0", "range() arg 3 must not be zero"),
        ("chat_n_float", "Input should be a valid integer, got a number with a fractional part"),
        ("chat_n_null", "Input should be a valid integer"),
        ("cmpl_n_0", "range() arg 3 must not be zero"),
        ("cmpl_n_null", "Input should be a valid integer"),
        ("gen_n_null", "Internal Server Error"),
        // The regular server's message names a library's types.
        ("gen_n_str", "invalid type"),
        ("gen_n_mixed_list", "The parallel_sample_num should be the same for all samples in sample params."),
        ("gen_n2_batch_lists", "Cannot use list return_logprob with parallel_sample_num > 1"),
        ("gen_n2_rid_list", "The specified rids length mismatch with the batch_size for batch processing."),
    ];
    for (name, message) in REFUSED {
        let exchange = exchange(&format!("reg/{name}"));
        let RequestedSamples::Refused(refused) = exchange.samples() else { panic!("{name}") };
        assert_eq!(refused.status, exchange.status, "{name}");
        assert!(refused.message.contains(message), "{name}");
        assert!(String::from_utf8_lossy(&exchange.response).contains(message), "{name}");
    }
    for name in ["chat_n_neg", "cmpl_n_neg", "gen_n_0", "gen_n_neg", "messages_n2", "responses_n2"] {
        let exchange = exchange(&format!("reg/{name}"));
        assert_eq!((exchange.status, exchange.samples()), (200, RequestedSamples::One), "{name}");
    }
    for name in BODIES.into_iter().chain(STREAMS).chain(["chat_n_str", "cmpl_n_str"]) {
        let exchange = exchange(&format!("reg/{name}"));
        let RequestedSamples::Many(samples) = exchange.samples() else { panic!("{name}") };
        let expected = if name.starts_with("chat_n3") { 3 } else { 2 };
        assert_eq!((exchange.status, samples.count), (200, expected), "{name}");
    }
}

#[test]
fn bodies_are_merged_to_what_a_regular_server_sends() {
    for name in BODIES {
        let regular = recorded(&format!("reg/{name}"));
        let copies = Copies::of_body(&regular);
        let merged = merge_bodies(regular.dialect, copies.bodies);
        // Byte for byte: the first copy has the recording's id and time.
        assert_eq!(merged.as_deref(), Ok(&regular.body[..]), "{name}");
    }
}

#[test]
fn bodies_of_the_rust_server_are_merged_too() {
    for name in ["chat_n2", "cmpl_n2"] {
        let regular = recorded(&format!("rust_server/{name}"));
        let copies = Copies::of_body(&regular);
        assert_eq!(merge_bodies(regular.dialect, copies.bodies).as_deref(), Ok(&regular.body[..]), "{name}");
    }
}

#[test]
fn streams_are_merged_to_what_a_regular_server_sends() {
    for name in
        STREAMS.map(|name| format!("reg/{name}")).into_iter().chain(["rust_server/chat_n2_stream".into()])
    {
        let regular = recorded(&name);
        let copies = Copies::of_stream(&regular);
        let fed: Vec<_> = copies.events.iter().map(|(copy, event)| (*copy, event.as_bytes())).collect();
        let (progress, merged) = merge(regular.dialect, regular.samples, &fed);
        assert_eq!(progress, MergeProgress::Complete);
        // Byte for byte but for ids of chunks, of which a regular server has one for each sample.
        assert_eq!(merged, copies.merged, "{name}");
    }
}

#[test]
fn an_error_event_ends_the_merged_stream() {
    let regular = recorded("reg/gen_n2_err_toolong_stream");
    let mut merger = StreamMerger::new(Dialect::Generate, 2, MAX_EVENT);
    let mut out = BytesMut::new();
    assert_eq!(merger.push(1, &regular.body, &mut out), Ok(MergeProgress::Failed));
    assert_eq!(merger.push(0, &regular.body, &mut out), Ok(MergeProgress::Failed));
    assert_eq!(merger.end(0, &mut out), Ok(MergeProgress::Failed));
    assert_eq!(out, regular.body);
}

#[test]
fn an_abort_is_an_error_with_its_index() {
    let abort = r#"{"text":"","meta_info":{"id":"a","finish_reason":{"type":"abort","message":"KV transfer failed","status_code":500}}"#;
    let (progress, merged) = merge(Dialect::Generate, 3, &[(2, format!("data: {abort}}}\n\n").as_bytes())]);
    assert_eq!(progress, MergeProgress::Failed);
    assert_eq!(merged, format!("data: {abort},\"index\":2}}\n\ndata: [DONE]\n\n"));
}

#[test]
fn an_error_of_chat_fails_the_stream_as_it_is() {
    let chunk = "data: {\"id\":\"a\",\"choices\":[{\"index\":0}],\"error\":null}\n\n";
    let error = "data: {\"error\":{\"message\":\"aborted\",\"code\":500}}\n\n";
    let (progress, merged) = merge(Dialect::Chat, 2, &[(1, chunk.as_bytes()), (0, error.as_bytes())]);
    assert_eq!(progress, MergeProgress::Failed);
    assert_eq!(merged, format!("{}{error}data: [DONE]\n\n", chunk.replace("\"index\":0", "\"index\":1")));
}

#[test]
fn generated_text_is_no_error_and_no_end() {
    let event = r#"data: {"text":"[DONE] \"error\":{} data: [DONE]\\\"","meta_info":{"finish_reason":{"type":"stop","matched":"abort"},"error":null}"#;
    let (progress, merged) = merge(Dialect::Generate, 1, &[(0, format!("{event}}}\n\n").as_bytes())]);
    assert_eq!(progress, MergeProgress::Complete);
    assert_eq!(merged, format!("{event},\"index\":0}}\n\n"));
}

#[test]
fn a_copy_cut_off_ends_the_stream_without_its_end() {
    let chunk = |copy: usize| format!("data: {{\"choices\":[{{\"index\":{copy}}}]}}\n\n");
    let usage = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":1,\"total_tokens\":2,\"completion_tokens\":1}}\n\n";
    let whole = [chunk(0), usage.into(), "data: [DONE]\n\n".into()].concat();
    // The second has neither usage nor [DONE], and its last event no blank line.
    let (progress, merged) =
        merge(Dialect::Chat, 2, &[(0, whole.as_bytes()), (1, chunk(0).trim_end().as_bytes())]);
    assert_eq!(progress, MergeProgress::Complete);
    assert_eq!(merged, [chunk(0), chunk(1)].concat());
}

#[test]
fn comments_of_one_copy_pass() {
    let fed: [(usize, &[u8]); 5] = [
        (0, b": ping\n\n"),
        (1, b": ping\n\n"),
        (0, b"data: [DONE]\n\n: late\n\n"),
        (1, b": pong\r\n\r\n"),
        (1, b"data: [DONE]\n\n"),
    ];
    let (progress, merged) = merge(Dialect::Completions, 2, &fed);
    assert_eq!((progress, &*merged), (MergeProgress::Complete, ": ping\n\n: pong\r\n\r\ndata: [DONE]\n\n"));
}

#[test]
fn an_extension_of_the_response_passes_once() {
    let event = |id: &str| format!("data: {{\"id\":\"{id}\",\"choices\":[],\"sglext\":{{\"a\":1}}}}\n\n");
    let (_, merged) = merge(Dialect::Chat, 2, &[(1, event("x").as_bytes()), (0, event("y").as_bytes())]);
    assert_eq!(merged, event("x"));
}

#[test]
fn what_the_prompt_had_cached_is_the_first_copys_and_details_are_sums() {
    let body = |cached: u32, tokens: u32| -> Bytes {
        let total = 9 + tokens;
        format!(
            r#"{{"choices":[{{"index":0}}],"usage":{{"prompt_tokens":9,"total_tokens":{total},"completion_tokens":{tokens},"prompt_tokens_details":{{"cached_tokens":{cached}}},"reasoning_tokens":{tokens},"completion_tokens_details":{{"accepted_prediction_tokens":{tokens},"rejected_prediction_tokens":1,"x":null}}}}}}"#
        )
        .into()
    };
    let merged = merge_bodies(Dialect::Chat, vec![body(4, 10), body(8, 5)]).unwrap();
    assert_eq!(
        merged,
        r#"{"choices":[{"index":0},{"index":1}],"usage":{"prompt_tokens":9,"total_tokens":24,"completion_tokens":15,"prompt_tokens_details":{"cached_tokens":4},"reasoning_tokens":15,"completion_tokens_details":{"accepted_prediction_tokens":15,"rejected_prediction_tokens":2,"x":null}}}"#
    );
}

#[test]
fn bodies_that_do_not_belong_together_are_not_merged() {
    for (dialect, bodies, reason) in [
        (Dialect::Generate, ["[{},{}]", "[{}]"], "the copies have different numbers of samples"),
        (Dialect::Generate, ["[{},{}", "[{}]"], "an object or array is not terminated"),
        (Dialect::Chat, ["{}", "{}"], "a response has no choices"),
        (Dialect::Chat, [r#"{"choices":[{}]}"#, "{}"], "a choice has no index"),
        (
            Dialect::Chat,
            [r#"{"choices":[{"index":0},{"index":1}]}"#, r#"{"choices":[{"index":0}]}"#],
            "the copies have different numbers of samples",
        ),
        (Dialect::Chat, [r#"{"choices":[{"index":18446744073709551615}]}"#, "{}"], "an index is no number"),
        (Dialect::Chat, [r#"{"choices":[{"index":"0"}]}"#, "{}"], "an index is no number"),
        (Dialect::Responses, ["{}", "{}"], "this API has one sample a prompt"),
    ] {
        let merged = merge_bodies(dialect, bodies.map(Bytes::from).to_vec());
        assert_eq!(merged, Err(reason), "{bodies:?}");
    }
}

#[test]
fn events_that_are_no_objects_are_errors() {
    for (event, reason) in [
        ("data: 1\n\n", "malformed JSON: a value has another type than expected"),
        (
            "data: {\"choices\":[{\"index\":0}],\"a\"}\n\n",
            "malformed JSON: a colon is missing after a member's name",
        ),
        ("data: {\"a\":1} {}\n\n", "malformed JSON: an event has more than one value"),
        ("data: {\"choices\":[{\"index\":\"0\"}]}\n\n", "malformed JSON: an index is no number"),
        ("data: {\ndata: }\n\n", "malformed JSON: an event has several lines of data"),
        ("data: {\"a\":\n\n", "malformed JSON: a value is missing at the end of the text"),
    ] {
        let mut merger = StreamMerger::new(Dialect::Chat, 2, MAX_EVENT);
        let mut out = BytesMut::new();
        assert_eq!(error_of(merger.push(0, event.as_bytes(), &mut out)), reason, "{event}");
        assert_eq!(out, "", "{event}");
    }
}

#[test]
fn an_event_over_the_limit_is_an_error() {
    for size in [1, 3, 100] {
        let mut merger = StreamMerger::new(Dialect::Generate, 2, 20);
        let mut out = BytesMut::new();
        let stream = b"data: {\"text\":1}\n\ndata: {\"text\":\"longer\"}\n\n";
        let result = stream.chunks(size).try_for_each(|part| merger.push(1, part, &mut out).map(drop));
        assert_eq!(result.unwrap_err().to_string(), "a server-sent event is larger than 20 bytes");
        assert_eq!(out, "data: {\"text\":1,\"index\":1}\n\n");
    }
}
