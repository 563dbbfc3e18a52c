use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{Buf, Bytes};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::wire::sse::EventTooLarge;

const INPUT_LISTS: [&str; 3] = ["input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs"];
const MEASUREMENTS: [&str; 3] = ["prefill_finished_time", "storage_prefetch_wait", "storage_staging_wait"];
const ECHO_LISTS: [&str; 4] = ["text_offset", "token_logprobs", "tokens", "top_logprobs"];

/// A recorded response's body as the frames it arrived in: its chunks, or all of it.
fn frames(name: &str) -> Vec<Bytes> {
    let path = format!("{}/tests/fixtures/{name}.resp", env!("CARGO_MANIFEST_DIR"));
    let response = std::fs::read(&path).expect(&path);
    let head = response.windows(4).position(|at| at == b"\r\n\r\n").unwrap() + 4;
    let mut body = Bytes::from(response).split_off(head);
    if body.starts_with(b"{") || body.starts_with(b"[") {
        return vec![body];
    }
    let mut chunks = Vec::new();
    loop {
        let line = body.windows(2).position(|at| at == b"\r\n").unwrap();
        let size = usize::from_str_radix(std::str::from_utf8(&body[..line]).unwrap(), 16).unwrap();
        let mut chunk = body.split_off(line + 2);
        body = chunk.split_off(size + 2);
        chunk.truncate(size);
        if chunk.is_empty() {
            return chunks;
        }
        chunks.push(chunk);
    }
}

fn body(name: &str) -> Bytes {
    frames(name).concat().into()
}

fn text(bytes: impl Into<Bytes>) -> String {
    String::from_utf8(bytes.into().into()).unwrap()
}

fn read(merge: Merge, prefill: &[u8]) -> PromptLogprobs {
    PromptLogprobs::read(merge, &Bytes::copy_from_slice(prefill)).unwrap()
}

fn splice(merge: Merge, prefill: &[u8], decode: &[u8]) -> String {
    text(read(merge, prefill).splice_body(&Bytes::copy_from_slice(decode)).into_bytes())
}

/// What the client receives of a stream that arrives in these frames.
fn splice_stream<'a>(merge: Merge, prefill: &[u8], decode: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut splicer = read(merge, prefill).into_splicer(usize::MAX);
    let mut sent = Vec::new();
    for frame in decode {
        splicer.push(Bytes::copy_from_slice(frame));
        while let Some(event) = splicer.next() {
            sent.extend_from_slice(&event.unwrap().into_bytes());
        }
    }
    sent.extend_from_slice(&splicer.finish().unwrap_or_default());
    text(sent)
}

fn parse(json: impl AsRef<[u8]>) -> Value {
    serde_json::from_slice(json.as_ref()).unwrap()
}

/// The JSON data of a stream's events, whose line ends must be LF.
fn parse_events(stream: &str) -> Vec<Value> {
    let data = |event: &str| event.strip_prefix("data: ").filter(|data| *data != "[DONE]").map(parse);
    stream.split("\n\n").filter_map(data).collect()
}

/// The items of a response, single or a batch.
fn items(response: &mut Value) -> Vec<&mut Value> {
    match response {
        Value::Array(items) => items.iter_mut().collect(),
        item => vec![item],
    }
}

/// The expected merge, computed on parsed values.
fn merged(prefill: Value, decode: Value) -> Value {
    let has_lists = has_lists(&prefill);
    merged_if(has_lists, prefill, decode)
}

/// Whether prefill's response has more than measurements.
fn has_lists(prefill: &Value) -> bool {
    let has_list = |item: &mut Value| {
        let info = &item["meta_info"];
        let is_filled = |name| info[name].as_array().is_some_and(|list| !list.is_empty());
        INPUT_LISTS.into_iter().any(is_filled)
            || info["routed_experts"].is_string()
            || info["output_token_ids_logprobs"].get(0).is_some_and(|first| !first.is_null())
    };
    items(&mut prefill.clone()).into_iter().any(has_list)
}

/// `decode`, each `meta_info` with what only prefill has.
fn merged_if(has_lists: bool, mut prefill: Value, mut decode: Value) -> Value {
    for (prefill, decode) in items(&mut prefill).into_iter().zip(items(&mut decode)).filter(|_| has_lists) {
        let (prefill, decode) = (&prefill["meta_info"], &mut decode["meta_info"]);
        let is_filled = |list: &str| prefill[list].as_array().is_some_and(|list| !list.is_empty());
        // What decode leaves out is inserted behind the list that it never leaves out.
        let anchor = INPUT_LISTS[0];
        let inserts = decode.get(anchor) == Some(&json!([])) && is_filled(anchor);
        for list in INPUT_LISTS.into_iter().filter(|list| is_filled(list)) {
            match decode.get(list) {
                Some(empty) => assert_eq!(*empty, json!([])),
                None if inserts => {}
                None => continue,
            }
            decode[list] = prefill[list].clone();
        }
        if let Some(first) = prefill["output_token_ids_logprobs"].get(0)
            && let Some(list) = decode.get_mut("output_token_ids_logprobs")
            && list.get(0) == Some(&Value::Null)
        {
            list[0] = first.clone();
        }
        for name in MEASUREMENTS {
            if let Some(measured) = prefill.get(name).filter(|measured| !measured.is_null())
                && decode.get(name).is_none_or(Value::is_null)
            {
                decode[name] = measured.clone();
            }
        }
    }
    decode
}

/// The text with what is merged removed again. SGLang writes an `output_` list after each of the prompt's.
fn emptied(response: &str) -> String {
    let mut response = response.to_owned();
    for name in INPUT_LISTS {
        let mut at = 0;
        while let Some(key) = response[at..].find(&format!("\"{name}\":")) {
            let start = at + key + name.len() + 3;
            let end = start + response[start..].find(",\"output_").unwrap();
            response.replace_range(start..end, "[]");
            at = start;
        }
    }
    for (key, end, empty) in
        [("\"output_token_ids_logprobs\":[", "]]", "null"), ("\"meta_info\":{", "\"id\":", "\"id\":")]
    {
        let mut at = 0;
        while let Some(found) = response[at..].find(key) {
            let start = at + found + key.len();
            if !response[start..].starts_with(empty) {
                let end = start + response[start..].find(end).unwrap() + end.len();
                response.replace_range(start..end, empty);
            }
            at = start;
        }
    }
    response
}

// Recordings of `/generate`.

#[test]
fn a_recorded_response_changes_in_prefills_lists_only() {
    for name in ["gen_logprob", "gen_logprob_default", "gen_logprob_text", "gen_batch_lists_logprob"] {
        let (prefill, decode) = (body(&format!("pd/{name}.prefill")), body(&format!("pd/{name}.decode")));
        let spliced = splice(Merge::Generate, &prefill, &decode);
        assert_eq!(parse(&spliced), merged(parse(&prefill), parse(&decode)), "{name}");
        assert_eq!(emptied(&spliced), text(decode), "{name}");
    }
}

#[test]
fn a_recorded_stream_changes_in_prefills_lists_in_every_event_only() {
    let (prefill, decode) = (body("pd/gen_logprob_stream.prefill"), body("pd/gen_logprob_stream.decode"));
    let spliced = splice_stream(Merge::Generate, &prefill, [&decode[..]]);
    let full = parse_events(&text(prefill)).remove(0);
    let expected: Vec<_> =
        parse_events(&text(decode.clone())).into_iter().map(|event| merged(full.clone(), event)).collect();
    assert_eq!(expected.len(), 6);
    assert_eq!(parse_events(&spliced), expected);
    assert_eq!(emptied(&spliced), text(decode));
}

#[test]
fn spliced_lists_equal_those_of_a_server_without_disaggregation() {
    let regular = parse_events(&text(body("reg/gen_stream_logprob")));
    let decode = body("pd/gen_logprob_stream.decode");
    let spliced =
        parse_events(&splice_stream(Merge::Generate, &body("pd/gen_logprob_stream.prefill"), [&decode[..]]));
    for event in spliced {
        for list in INPUT_LISTS {
            assert_eq!(event["meta_info"][list], regular[0]["meta_info"][list], "{list}");
        }
    }
    let decode = body("pd/gen_logprob_text.decode");
    let spliced = parse(splice(Merge::Generate, &body("pd/gen_logprob_text.prefill"), &decode));
    let regular = parse(body("reg/gen_logprob_full"));
    let list = "input_token_logprobs";
    assert_eq!(spliced["meta_info"][list], regular["meta_info"][list]);
}

/// The items of a response or of a stream's events, by their index in a batch.
fn items_by_index(response: &str) -> Vec<(u64, Value)> {
    if response.starts_with("data: ") {
        let index = |item: Value| (item["index"].as_u64().unwrap_or(0), item);
        return parse_events(response).into_iter().map(index).collect();
    }
    let mut response = parse(response);
    (0..).zip(items(&mut response).into_iter().map(|item| item.take())).collect()
}

/// Checks that every item has the lists, and if `measured` the measurements, of a server without
/// disaggregation.
fn assert_as_regular(name: &str, spliced: &str, regular: &str, measured: bool) {
    let (spliced, regular) = (items_by_index(spliced), items_by_index(regular));
    assert!(!spliced.is_empty(), "{name}");
    for (index, item) in spliced {
        let got = &item["meta_info"];
        let mut same = regular.iter().filter(|(other, _)| *other == index);
        // The last event has the most output; where the output is cut into events is up to the servers.
        let wanted = &same.next_back().unwrap_or_else(|| panic!("{name}: {index}")).1["meta_info"];
        for list in INPUT_LISTS {
            let is_empty = |info: &Value| info.get(list).is_none_or(|list| *list == json!([]));
            assert!(
                got.get(list) == wanted.get(list) || is_empty(got) && is_empty(wanted),
                "{name} {index} {list}"
            );
        }
        for list in ["output_token_logprobs", "output_token_ids_logprobs"] {
            let elements = |info: &Value| info.get(list).map(|list| list.as_array().unwrap().clone());
            let (got, wanted) = (elements(got), elements(wanted));
            assert_eq!(got.is_some(), wanted.is_some(), "{name} {index} {list}");
            let (got, wanted) = (got.unwrap_or_default(), wanted.unwrap_or_default());
            assert!(wanted.starts_with(&got), "{name} {index} {list}");
        }
        for name in MEASUREMENTS.into_iter().filter(|_| measured) {
            assert_eq!(got[name].is_number(), wanted[name].is_number(), "{name}");
        }
    }
}

fn splice_recordings(merge: Merge, folder: &str, name: &str) -> String {
    let (prefill, decode) =
        (body(&format!("{folder}/{name}.prefill")), body(&format!("{folder}/{name}.decode")));
    if decode.starts_with(b"data: ") {
        splice_stream(merge, &prefill, [&decode[..]])
    } else {
        splice(merge, &prefill, &decode)
    }
}

#[test]
fn recordings_of_a_pair_merge_into_those_of_a_regular_server() {
    for name in [
        "gen_batch_scalar_logprob",
        "gen_batch_stream_logprob",
        "gen_batch_uneven_stream_logprob",
        "gen_err_logprob_start_neg",
        "gen_logprob",
        "gen_logprob_lists",
        "gen_logprob_lists_stream",
        "gen_logprob_start2",
        "gen_logprob_start_last",
        "gen_logprob_text",
        "gen_max1_logprob",
        "gen_max1_stream_logprob",
        "gen_token_ids_logprob",
        "gen_token_ids_logprob_nostart",
    ] {
        let spliced = splice_recordings(Merge::Generate, "pd", name);
        assert_as_regular(name, &spliced, &text(body(&format!("reg/{name}"))), true);
    }
}

#[test]
fn recordings_of_a_pair_with_the_rust_front_end_merge_into_those_of_a_regular_server() {
    for (name, regular) in [
        ("gen_batch_logprob", "reg/gen_batch_scalar_logprob"),
        ("gen_batch_stream_logprob", "reg/gen_batch_stream_logprob"),
        ("gen_logprob", "reg/gen_logprob"),
        ("gen_logprob_lists", "reg/gen_logprob_lists"),
        ("gen_logprob_start2", "reg/gen_logprob_start2"),
        ("gen_logprob_stream", "rust_server/gen_stream_logprob"),
        ("gen_logprob_text", "reg/gen_logprob_text"),
        ("gen_max1_logprob", "reg/gen_max1_logprob"),
        ("gen_token_ids_logprob", "reg/gen_token_ids_logprob"),
    ] {
        let spliced = splice_recordings(Merge::Generate, "rust_pd", name);
        assert_as_regular(name, &spliced, &text(body(regular)), false);
    }
}

#[test]
fn recorded_echoes_merge_into_those_of_a_regular_server() {
    let logprobs = |response: &str| {
        let responses =
            if response.starts_with("data: ") { parse_events(response) } else { vec![parse(response)] };
        // All events of a choice together: where the output is cut into events is up to the servers.
        let mut lists: Vec<(u64, [Vec<Value>; 4])> = Vec::new();
        for choice in responses.iter().flat_map(|response| response["choices"].as_array().unwrap()) {
            let index = choice["index"].as_u64().unwrap();
            if lists.iter().all(|(other, _)| *other != index) {
                lists.push((index, Default::default()));
            }
            let (_, lists) = lists.iter_mut().find(|(other, _)| *other == index).unwrap();
            for (name, list) in ECHO_LISTS.iter().zip(lists) {
                list.extend(choice["logprobs"][name].as_array().into_iter().flatten().cloned());
            }
        }
        lists.sort_by_key(|(index, _)| *index);
        lists
    };
    for (folder, regular, name) in [
        ("pd", "reg", "cmpl_logprobs_echo"),
        ("pd", "reg", "cmpl_logprobs_echo_batch"),
        ("pd", "reg", "cmpl_logprobs_echo_batch_stream"),
        ("pd", "reg", "cmpl_logprobs_echo_stream"),
        ("rust_pd", "rust_server", "cmpl_logprobs_echo"),
        ("rust_pd", "rust_server", "cmpl_logprobs_echo_stream"),
    ] {
        let regular = logprobs(&text(body(&format!("{regular}/{name}"))));
        assert_eq!(logprobs(&splice_recordings(Merge::Echo, folder, name)), regular, "{folder}/{name}");
    }
}

#[test]
fn a_response_with_complete_lists_is_not_changed() {
    // A decode server would send this if SGLang transferred prefill's lists to it.
    let prefill = body("pd/gen_logprob.prefill");
    for name in ["reg/gen_logprob_full", "reg/gen_batch_logprob"] {
        assert_eq!(splice(Merge::Generate, &prefill, &body(name)), text(body(name)));
    }
    let stream = body("reg/gen_stream_logprob");
    assert_eq!(splice_stream(Merge::Generate, &prefill, [&stream[..]]), text(stream));
}

#[test]
fn chat_responses_have_no_prompt_logprobs() {
    for merge in [Merge::Generate, Merge::Echo] {
        let decode = body("pd/chat_logprobs.decode");
        let prefill = read(merge, &body("pd/chat_logprobs.prefill"));
        assert!(prefill.is_empty());
        assert_eq!(prefill.splice_body(&decode).into_bytes().as_ptr(), decode.as_ptr());
        let decode = body("pd/chat_logprobs_stream.decode");
        let prefill = body("pd/chat_logprobs_stream.prefill");
        assert_eq!(splice_stream(merge, &prefill, [&decode[..]]), text(decode));
    }
}

#[test]
fn frame_boundaries_do_not_change_a_spliced_stream() {
    let echo = echo_stream_of_decode();
    let cases = [
        (Merge::Generate, body("pd/gen_logprob_stream.prefill"), body("pd/gen_logprob_stream.decode")),
        (
            Merge::Generate,
            body("rust_pd/gen_logprob_stream.prefill"),
            body("rust_pd/gen_logprob_stream.decode"),
        ),
        (Merge::Echo, body("pd/cmpl_logprobs_echo.prefill"), Bytes::from(echo)),
    ];
    for (merge, prefill, decode) in cases {
        let whole = splice_stream(merge, &prefill, [&decode[..]]);
        assert_ne!(whole, text(decode.clone()));
        assert_eq!(splice_stream(merge, &prefill, decode.chunks(1)), whole);
        for cut in 0..=decode.len() {
            let (first, second) = decode.split_at(cut);
            assert_eq!(splice_stream(merge, &prefill, [first, second]), whole, "cut at {cut}");
        }
    }
}

// `/generate`, constructed.

/// An item as SGLang writes it: compact, with output lists between the others, and `index` last.
fn item(id: &str, lists: &str, index: &str) -> String {
    let output = r#""output_token_logprobs":[[-0.5,7,null]],"completion_tokens":1"#;
    format!(r#"{{"text":"t {id}","output_ids":[7],"meta_info":{{"id":"{id}",{lists}{output}}}{index}}}"#)
}

fn list(elements: &str) -> String {
    format!(r#""input_token_logprobs":{elements},"#)
}

fn event(data: impl AsRef<str>) -> String {
    format!("data: {}\n\n", data.as_ref())
}

#[test]
fn items_of_a_batch_are_matched_by_position() {
    // `return_logprob` can be a list: an item for which it is false has no lists on either side.
    let prefill = format!(
        "[{},{},{}]",
        item("p0", &list("[[0]]"), r#","index":2"#),
        item("p1", "", ""),
        item("p2", &list("[[2]]"), "")
    );
    let decode = |lists: [&str; 2]| {
        format!(
            "[{},{}, {}]\n",
            item("d0", &list(lists[0]), ""),
            item("d1", "", ""),
            item("d2", &list(lists[1]), "")
        )
    };
    assert_eq!(
        splice(Merge::Generate, prefill.as_bytes(), decode(["[]"; 2]).as_bytes()),
        decode(["[[0]]", "[[2]]"])
    );
    // An item that prefill's batch does not have stays unchanged.
    let short = format!("[{}]", item("p0", &list("[[0]]"), ""));
    assert_eq!(
        splice(Merge::Generate, short.as_bytes(), decode(["[]"; 2]).as_bytes()),
        decode(["[[0]]", "[]"])
    );
}

#[test]
fn a_list_on_one_side_only_changes_nothing() {
    let (with, without) = (item("x", &list("[]"), ""), item("x", "", ""));
    let full = item("p", &list("[[1]]"), "");
    assert_eq!(splice(Merge::Generate, full.as_bytes(), without.as_bytes()), without);
    assert_eq!(splice(Merge::Generate, without.as_bytes(), with.as_bytes()), with);
    let top_only = item("p", r#""input_top_logprobs":[null],"#, "");
    assert_eq!(splice(Merge::Generate, top_only.as_bytes(), with.as_bytes()), with);
}

#[test]
fn lists_that_decode_leaves_out_are_inserted_behind_the_empty_one() {
    let prefill = item(
        "p",
        r#""input_token_logprobs":[[1]],"input_top_logprobs":[[2]],"input_token_ids_logprobs":[[3]],"#,
        "",
    );
    let decode =
        |token: &str, more: &str| item("d", &format!(r#""input_token_logprobs":{token}{more},"#), "");
    for (before, after) in [
        ("", r#","input_top_logprobs":[[2]],"input_token_ids_logprobs":[[3]]"#),
        (r#","input_top_logprobs":[]"#, r#","input_token_ids_logprobs":[[3]],"input_top_logprobs":[[2]]"#),
        (
            r#","input_token_ids_logprobs":[[9]]"#,
            r#","input_top_logprobs":[[2]],"input_token_ids_logprobs":[[9]]"#,
        ),
    ] {
        let spliced = splice(Merge::Generate, prefill.as_bytes(), decode("[]", before).as_bytes());
        assert_eq!(spliced, decode("[[1]]", after));
    }
    // Were decode's list complete, its response would be that of a regular server.
    let complete = decode("[[9]]", "");
    assert_eq!(splice(Merge::Generate, prefill.as_bytes(), complete.as_bytes()), complete);
}

#[test]
fn the_first_tokens_listed_logprobs_are_prefills() {
    let list = |elements: &str| item("x", &format!(r#""output_token_ids_logprobs":{elements},"#), "");
    let prefill = list("[[[-1.5,10,null]]]");
    for (before, after) in [
        ("[null]", "[[[-1.5,10,null]]]"),
        ("[ null , [[-2,10,null]],null]", "[ [[-1.5,10,null]] , [[-2,10,null]],null]"),
        ("[[[-3,10,null]],null]", "[[[-3,10,null]],null]"),
        ("[]", "[]"),
        ("null", "null"),
    ] {
        let (before, after) = (list(before), list(after));
        assert_eq!(splice(Merge::Generate, prefill.as_bytes(), before.as_bytes()), after);
        let stream = splice_stream(Merge::Generate, prefill.as_bytes(), [event(&before).as_bytes()]);
        assert_eq!(stream, event(&after));
    }
    assert!(read(Merge::Generate, list("[null]").as_bytes()).is_empty());
}

#[test]
fn measurements_of_prefill_are_merged_with_lists_only() {
    let measured = r#""prefill_finished_time":1.50,"storage_prefetch_wait":0.0,"#;
    let prefill = item("p", &format!("{measured}{}", list("[[1]]")), "");
    let decode = |start: &str, of: &str| format!(r#"{{"meta_info":{{{start}"id":"d",{}"z":0}}}}"#, list(of));
    let splice = |decode: String| splice(Merge::Generate, prefill.as_bytes(), decode.as_bytes());
    assert_eq!(splice(decode("", "[]")), decode(measured, "[[1]]"));
    let own = r#""prefill_finished_time":2,"storage_prefetch_wait":null,"#;
    let kept = own.replace("null", "0.0");
    assert_eq!(splice(decode(own, "[]")), decode(&kept, "[[1]]"));
    assert_eq!(splice(r#"{"meta_info":{}}"#.into()), r#"{"meta_info":{}}"#);
    assert!(read(Merge::Generate, item("p", measured, "").as_bytes()).is_empty());
    let null = format!(r#"{{"meta_info":{{"prefill_finished_time":null,{}"z":0}}}}"#, list("[[1]]"));
    let spliced = super::tests::splice(Merge::Generate, null.as_bytes(), decode("", "[]").as_bytes());
    assert_eq!(spliced, decode("", "[[1]]"));
}

#[test]
fn a_list_of_decode_that_is_not_empty_is_kept() {
    let prefill = item("p", r#""input_token_logprobs":[[1]],"input_top_logprobs":[[2]],"#, "");
    for value in ["[[9]]", "null", r#""""#, "{}", "0"] {
        let decode = |top: &str| {
            item("d", &format!(r#""input_token_logprobs":{value},"input_top_logprobs":{top},"#), "")
        };
        assert_eq!(splice(Merge::Generate, prefill.as_bytes(), decode("[]").as_bytes()), decode("[[2]]"));
    }
}

#[test]
fn empty_output_lists_are_kept() {
    let lists = |elements: &str| {
        let names = ["output_token_ids_logprobs", "output_top_logprobs", "not_input_token_logprobs"];
        names.map(|name| format!(r#""{name}":{elements},"#)).concat()
    };
    let (prefill, decode) = (item("p", &lists("[[1]]"), ""), item("d", &lists("[]"), ""));
    assert_eq!(splice(Merge::Generate, prefill.as_bytes(), decode.as_bytes()), decode);
}

#[test]
fn flat_lists_replace_any_value_of_decode() {
    let values = [
        ("input_top_logprobs_val_flat", "[]", "[-1.5,-2]"),
        ("input_top_logprobs_idx_flat", "[]", "[3,4]"),
        ("input_top_logprobs_val_flat_b64", r#""""#, r#""AADAvwAAAMA=""#),
        ("input_top_logprobs_idx_flat_b64", r#""""#, r#""AwAAAAQAAAA=""#),
        ("input_top_logprobs_val_flat_b64_dtype", r#""float32""#, r#""float32""#),
        ("input_top_logprobs_shape", "[0,2]", "[1, 2]"),
        ("input_top_logprobs_null_prefix", "0", "1"),
        ("input_token_logprobs", "[]", "[[null,5,null]]"),
    ];
    let decode = item("d", &values.map(|(name, empty, _)| format!(r#""{name}":{empty},"#)).concat(), "");
    let full = values.map(|(name, _, full)| format!(r#""{name}":{full},"#)).concat();
    let spliced = splice(Merge::Generate, item("p", &full, "").as_bytes(), decode.as_bytes());
    assert_eq!(spliced, item("d", &full, ""));
}

#[test]
fn white_space_does_not_prevent_a_splice() {
    let prefill = "\n{ \"meta_info\" : {\"input_token_logprobs\" : [ [1, 2] ] } , \"index\" : 1 }";
    let decode = "{\"a\": 1,\t\"meta_info\": {\"input_token_logprobs\"\n:\t[ \r\n] },\n\"index\" : 1 } ";
    let expected = decode.replace("[ \r\n]", "[ [1, 2] ]");
    let batch = format!("[{{}}, {prefill}]");
    assert_eq!(
        splice(Merge::Generate, batch.as_bytes(), format!(" [ {{}} ,{decode}]").as_bytes()),
        format!(" [ {{}} ,{expected}]")
    );
    let one_line = |text: &str| format!("data:  {}\r\n\r\n", text.replace(['\n', '\r'], " "));
    let spliced = splice_stream(Merge::Generate, one_line(prefill).as_bytes(), [one_line(decode).as_bytes()]);
    assert_eq!(spliced, one_line(&expected));
}

#[test]
fn generated_text_that_looks_like_a_list_is_not_changed() {
    let prefill = item("p", &list("[[1]]"), "");
    let texts = [
        r#""input_token_logprobs":[]"#,
        r#"{"meta_info":{"input_token_logprobs":[],"input_token_logprobs":[]}}"#,
        r#","input_token_logprobs":[],"#,
        "data: [DONE]",
        "\n\ndata: [DONE]\n\n",
        r#"]}]}}"index":5}"#,
        "\\",
        r#"\"input_token_logprobs":[]"#,
    ];
    for text in texts {
        let decode = |lists: &str| item("d", lists, "").replace(r#""t d""#, &json!(text).to_string());
        assert!(parse(decode(&list("[]")))["text"] == text);
        assert_eq!(
            splice(Merge::Generate, prefill.as_bytes(), decode(&list("[]")).as_bytes()),
            decode(&list("[[1]]"))
        );
        let stream = event(decode(&list("[]"))) + &event("[DONE]");
        assert_eq!(
            splice_stream(Merge::Generate, event(&prefill).as_bytes(), [stream.as_bytes()]),
            event(decode(&list("[[1]]"))) + &event("[DONE]")
        );
    }
}

#[test]
fn strings_and_names_that_resemble_a_lists_name_are_not_matched() {
    let prefill = item("p", &list("[[1]]"), "");
    for alike in [
        r#""strings":[0,"input_token_logprobs",[]],"#,
        r#""last":"input_token_logprobs","list":[],"#,
        r#""\"input_token_logprobs":[],"#,
        r#""input_token_logprobs_more":[],"#,
        r#""my_input_token_logprobs":[],"#,
    ] {
        let decode = |of: &str| item("d", &(alike.to_owned() + &list(of)), "");
        assert_eq!(splice(Merge::Generate, prefill.as_bytes(), decode("[]").as_bytes()), decode("[[1]]"));
    }
}

#[test]
fn events_of_a_batch_are_matched_by_index() {
    let index = |index: u64| format!(r#","index":{index}"#);
    // Prefill and decode finish a batch's items in different orders.
    let prefill: String =
        [2, 0, 10].map(|i| event(item("p", &list(&format!("[[{i}]]")), &index(i)))).concat();
    let decode = |full: bool| {
        let elements = |i: u64| if full && i != 1 { format!("[[{i}]]") } else { "[]".to_owned() };
        let events = [0, 2, 1, 10, 2, 0].map(|i| event(item("d", &list(&elements(i)), &index(i)))).concat();
        // SGLang writes the index last; elsewhere it must be found too.
        let early = [10, 0]
            .map(|i| event(format!(r#"{{"index": {i} ,{}"#, &item("d", &list(&elements(i)), "")[1..])));
        events + &early.concat() + &event("[DONE]")
    };
    assert_eq!(
        splice_stream(Merge::Generate, (prefill + &event("[DONE]")).as_bytes(), [decode(false).as_bytes()]),
        decode(true)
    );
}

#[test]
fn an_index_that_is_not_a_member_of_the_item_is_ignored() {
    let prefill = format!("[{},{}]", item("p0", &list("[[0]]"), ""), item("p1", &list("[[1]]"), ""));
    for tail in [
        r#","\"index":0"#,
        r#","x":{"index":0}"#,
        r#","x":"\"index\":0""#,
        r#","index":-1"#,
        r#","index":0.5"#,
        "",
    ] {
        let decode = event(item("d", &list("[]"), tail));
        assert_eq!(splice_stream(Merge::Generate, prefill.as_bytes(), [decode.as_bytes()]), decode, "{tail}");
        let with_index = |of: &str| event(format!(r#"{{"index":1,{}"#, &item("d", &list(of), tail)[1..]));
        if !tail.starts_with(r#","index""#) {
            assert_eq!(
                splice_stream(Merge::Generate, prefill.as_bytes(), [with_index("[]").as_bytes()]),
                with_index("[[1]]"),
                "{tail}"
            );
        }
    }
}

#[test]
fn a_json_response_of_prefill_is_spliced_into_a_stream() {
    let single = item("p", &list("[[0]]"), "");
    let decode = |of: &str| event(item("d", &list(of), ""));
    assert_eq!(splice_stream(Merge::Generate, single.as_bytes(), [decode("[]").as_bytes()]), decode("[[0]]"));
    let batch = format!("[{},{}]", item("p0", &list("[[0]]"), ""), item("p1", &list("[[1]]"), ""));
    let decode = |of: &str| event(item("d", &list(of), r#","index":1"#));
    assert_eq!(splice_stream(Merge::Generate, batch.as_bytes(), [decode("[]").as_bytes()]), decode("[[1]]"));
}

#[test]
fn prefills_last_event_with_a_list_counts() {
    let prefill = ["[[1]]", "[[1],[2]]"].map(|of| event(item("p", &list(of), ""))).concat()
        + ": keep-alive\n\n"
        + &event(item("p", "", ""))
        + &event(r#"{"error":{"message":"late"}}"#)
        // A server that is stopped may leave out the blank line.
        + "data: [DONE]";
    let decode = item("d", &list("[]"), "");
    assert_eq!(
        splice(Merge::Generate, prefill.as_bytes(), decode.as_bytes()),
        item("d", &list("[[1],[2]]"), "")
    );
}

#[test]
fn events_without_an_item_are_not_changed() {
    let others = [
        "data: [DONE]\n\n",
        ": ping\n\n",
        "data: {\"error\":{\"message\":\"x\",\"code\":400}}\n\n",
        "event: e\ndata: {\"meta_info\":{\"input_token_logprobs\":[]}}\n\n",
        "data: {\"meta_info\":{\"input_token_logprobs\":[]}\ndata: }\n\n",
        "data: [{\"meta_info\":{\"input_token_logprobs\":[]}}]\n\n",
        "data: {'meta_info': {\"input_token_logprobs\":[]\n\n",
        "data: {\"meta_info\":\"input_token_logprobs\"}\n\n",
        "\n\n",
        "data: {\"choices\":[{\"index\":0,\"logprobs\":{\"tokens\":[]}]}\n\n",
        "data: {\"meta_info\":{\"input_token_logprobs\":[]}}",
    ];
    let stream = others.concat();
    let prefill = event(item("p", &list("[[1]]"), ""));
    assert_eq!(splice_stream(Merge::Generate, prefill.as_bytes(), [stream.as_bytes()]), stream);
    let prefill = body("pd/cmpl_logprobs_echo.prefill");
    assert_eq!(splice_stream(Merge::Echo, &prefill, [stream.as_bytes()]), stream);
}

#[test]
fn a_malformed_response_of_decode_is_not_changed() {
    for (merge, name) in [(Merge::Generate, "gen_batch_lists_logprob"), (Merge::Echo, "cmpl_logprobs_echo")] {
        let lists = read(merge, &body(&format!("pd/{name}.prefill")));
        let decode = body(&format!("pd/{name}.decode"));
        for end in 0..decode.len() {
            let cut = decode.slice(..end);
            assert_eq!(lists.splice_body(&cut).into_bytes(), cut);
        }
        for other in ["", "Internal Server Error", "null", r#"{"error":{"message":"x"}}"#, "[1,null]", "[[]]"]
        {
            assert_eq!(lists.splice_body(&Bytes::from(other)).into_bytes(), other);
        }
    }
}

#[test]
fn a_malformed_response_of_prefill_is_an_error() {
    for merge in [Merge::Generate, Merge::Echo] {
        for response in [
            "",
            " ",
            "Internal Server Error",
            "{",
            "{]",
            "[{}",
            "data: null?\n\ndata",
            ": only\n\n",
            "data: {\n\n",
        ] {
            let error = PromptLogprobs::read(merge, &Bytes::from(response)).err();
            assert!(
                error.is_some_and(|error| error.to_string().starts_with("malformed JSON: ")),
                "{response:?}"
            );
        }
    }
    for (merge, name) in [(Merge::Generate, "gen_batch_lists_logprob"), (Merge::Echo, "cmpl_logprobs_echo")] {
        let response = body(&format!("pd/{name}.prefill"));
        for end in 0..response.len() {
            assert!(PromptLogprobs::read(merge, &response.slice(..end)).is_err());
        }
    }
    let stream = body("pd/gen_logprob_stream.prefill");
    for end in 0..stream.len() {
        // A truncated first event is an error. After it only `[DONE]` can be missing.
        let first = stream.windows(2).position(|at| at == b"\n\n").unwrap();
        let read = PromptLogprobs::read(Merge::Generate, &stream.slice(..end));
        assert_eq!(read.is_ok_and(|lists| !lists.is_empty()), !read_fails(end, first), "{end}");
    }
}

/// Whether a stream truncated at `end` lacks a complete first event, or has part of the second's data.
fn read_fails(end: usize, first: usize) -> bool {
    let second = first + 2;
    end < first || (second + "data:".len()..second + "data: [DONE]".len()).contains(&end)
}

#[test]
fn error_responses_of_prefill_have_no_lists() {
    for response in [
        r#"{"error":{"message":"x"}}"#,
        "[]",
        r#"{"meta_info":null}"#,
        r#"{"meta_info":{"input_token_logprobs":null}}"#,
    ] {
        assert!(read(Merge::Generate, response.as_bytes()).is_empty(), "{response}");
        assert!(read(Merge::Generate, event(response).as_bytes()).is_empty(), "{response}");
    }
}

#[test]
fn a_completions_response_of_prefill_must_be_an_object() {
    assert!(read(Merge::Echo, br#"{"error":{"message":"x"}}"#).is_empty());
    assert!(PromptLogprobs::read(Merge::Echo, &Bytes::from("[]")).is_err());
}

#[test]
fn prefills_lists_are_slices_of_its_response() {
    let response = body("pd/gen_logprob_stream.prefill");
    let Lists::Generate(items) = PromptLogprobs::read(Merge::Generate, &response).unwrap().lists else {
        panic!()
    };
    let range = response.as_ptr_range();
    let lists: Vec<_> = items.iter().collect();
    assert_eq!(lists.len(), INPUT_LISTS.len() + 1 + MEASUREMENTS.len());
    assert!(lists.iter().all(|list| range.contains(&list.as_ptr())));
}

#[test]
fn unchanged_events_are_not_copied() {
    let mut splicer =
        read(Merge::Generate, item("p", &list("[[1]]"), "").as_bytes()).into_splicer(usize::MAX);
    let frame = Bytes::from(event(item("d", "", "")) + &event("[DONE]"));
    splicer.push(frame.clone());
    let sent = splicer.next().unwrap().unwrap().into_bytes();
    assert_eq!((sent.as_ptr(), sent.len()), (frame.as_ptr(), frame.len()));
    assert!(splicer.next().is_none());
}

#[test]
fn events_of_one_frame_are_sent_together_and_share_the_list() {
    let prefill = Bytes::from(item("p", &list("[[-1.5,7,null]]"), ""));
    let mut splicer = PromptLogprobs::read(Merge::Generate, &prefill).unwrap().into_splicer(usize::MAX);
    let decode = event(item("d", &list("[]"), ""));
    let cut = decode.len() / 2;
    // The first event starts in an earlier frame.
    splicer.push(Bytes::from(decode[..cut].to_owned()));
    assert!(splicer.next().is_none());
    splicer.push(Bytes::from([&decode[cut..], &decode, &decode, "data: {"].concat()));
    let mut sent = splicer.next().unwrap().unwrap();
    assert!(splicer.next().is_none());
    let (mut text, mut shared) = (Vec::new(), 0);
    while sent.has_remaining() {
        shared += usize::from(prefill.as_ptr_range().contains(&sent.chunk().as_ptr()));
        text.extend_from_slice(sent.chunk());
        sent.advance(sent.chunk().len());
    }
    assert_eq!(text, event(item("d", &list("[[-1.5,7,null]]"), "")).repeat(3).as_bytes());
    assert_eq!(shared, 3);
}

#[test]
fn a_stream_with_nothing_to_splice_is_not_split_into_events() {
    let mut splicer = read(Merge::Generate, &body("pd/gen_logprob_default.prefill")).into_splicer(1);
    let frame = Bytes::from_static(b"data: {} half an ev");
    splicer.push(frame.clone());
    assert_eq!(splicer.next().unwrap().unwrap().into_bytes().as_ptr(), frame.as_ptr());
    assert!(splicer.next().is_none());
    assert!(splicer.finish().is_none());
}

#[test]
fn an_event_over_the_limit_is_an_error_after_the_events_before_it() {
    let mut splicer = read(Merge::Generate, &body("pd/gen_logprob.prefill")).into_splicer(100);
    let before = event("[DONE]");
    splicer.push(Bytes::from(before.clone() + &"x".repeat(101)));
    assert_eq!(splicer.next().unwrap().unwrap().into_bytes(), before);
    for _ in 0..2 {
        assert_eq!(splicer.next().unwrap().unwrap_err(), EventTooLarge { limit: 100 });
    }
}

#[test]
fn an_event_that_does_not_end_is_not_changed() {
    let mut splicer = read(Merge::Generate, &body("pd/gen_logprob.prefill")).into_splicer(usize::MAX);
    let decode = item("d", &list("[]"), "");
    splicer.push(Bytes::from("data: "));
    assert!(splicer.next().is_none());
    splicer.push(Bytes::from(decode.clone()));
    assert!(splicer.next().is_none());
    assert_eq!(text(splicer.finish().unwrap()), format!("data: {decode}"));
}

// `/v1/completions` with `echo` and `logprobs`.

/// What a decode server sends: the stream of a server without disaggregation, less the first event's prompt.
fn echo_stream_of_decode() -> String {
    let mut stream = text(body("reg/cmpl_logprobs_echo_stream"));
    let prompt = [
        "-1,-1,-1,",
        "null,-7.914555549621582,-8.494573593139648,",
        r#""the"," of"," and","#,
        concat!(
            r#"null,{" back":-3.585942268371582," a":-3.773442268371582},"#,
            r#"{"e":-3.1039488315582275,"P":-3.5726988315582275},"#
        ),
    ];
    for (list, elements) in ECHO_LISTS.iter().zip(prompt) {
        let key = format!(r#""{list}":["#);
        let full = format!("{key}{elements}");
        assert!(stream.contains(&full));
        stream = stream.replacen(&full, &key, 1);
    }
    stream
}

fn echo(index: u64, tokens: &[&str]) -> String {
    let offsets: Vec<_> = tokens.iter().map(|_| -1).collect();
    let logprobs: Vec<_> =
        tokens.iter().map(|token| if *token == "first" { Value::Null } else { json!(-0.5) }).collect();
    let lists = format!(
        r#"{{"text_offset":{},"token_logprobs":{},"tokens":{},"top_logprobs":{}}}"#,
        json!(offsets),
        json!(logprobs),
        json!(tokens),
        json!(logprobs)
    );
    choices(&[(index, &lists)])
}

fn choices(choices: &[(u64, &str)]) -> String {
    let choice = |(index, lists): &(u64, &str)| {
        format!(r#"{{"index":{index},"text":"t","logprobs":{lists},"finish_reason":null}}"#)
    };
    format!(
        r#"{{"id":"x","choices":[{}],"usage":null}}"#,
        choices.iter().map(choice).collect::<Vec<_>>().join(",")
    )
}

#[test]
fn a_recorded_echo_equals_that_of_a_server_without_disaggregation() {
    let (prefill, decode) = (body("pd/cmpl_logprobs_echo.prefill"), body("pd/cmpl_logprobs_echo.decode"));
    let regular = body("reg/cmpl_logprobs_echo");
    let spliced = splice(Merge::Echo, &prefill, &decode);
    assert_eq!(parse(&spliced)["choices"], parse(&regular)["choices"]);
    // The same bytes from the choices on: what differs before them is the id and the time.
    let choices = |body: &str| body[body.find("\"choices\"").unwrap()..].to_owned();
    assert_eq!(choices(&spliced), choices(&text(regular)));
    let head = text(decode);
    assert_eq!(spliced[..spliced.find("\"choices\"").unwrap()], head[..head.find("\"choices\"").unwrap()]);
}

#[test]
fn a_recorded_echo_stream_equals_that_of_a_server_without_disaggregation() {
    let decode = echo_stream_of_decode();
    let prefill = body("pd/cmpl_logprobs_echo.prefill");
    let regular = text(body("reg/cmpl_logprobs_echo_stream"));
    assert_eq!(splice_stream(Merge::Echo, &prefill, [decode.as_bytes()]), regular);
    let prefill = event(text(prefill)) + &event(r#"{"choices":[],"usage":{}}"#) + &event("[DONE]");
    assert_eq!(splice_stream(Merge::Echo, prefill.as_bytes(), [decode.as_bytes()]), regular);
}

#[test]
fn an_echo_stream_has_each_prompt_once() {
    let prefill = [echo(1, &["first", "b", "out"]), echo(0, &["first", "a", "out"])].map(event).concat()
        // Later lists are output. Prefill generates one token only, so this is constructed.
        + &event(echo(0, &["more", "out"]));
    let null = event(choices(&[(0, "null")]));
    let usage = event(r#"{"choices":[],"usage":{"prompt_tokens":2}}"#);
    let decode = |first: [&[&str]; 2]| {
        let later = [echo(0, &["y"]), echo(1, &["y", "z"])].map(event).concat();
        null.clone()
            + &event(echo(0, first[0]))
            + &event(echo(0, &["y"]))
            + &event(echo(1, first[1]))
            + &later
            + &usage
    };
    assert_eq!(
        splice_stream(Merge::Echo, prefill.as_bytes(), [decode([&["x"], &["w"]]).as_bytes()]),
        decode([&["first", "a", "x"], &["first", "b", "w"]])
    );
}

#[test]
fn choices_are_matched_by_index_not_by_position() {
    let lists = |tokens: &str| format!(r#"{{"tokens":{tokens},"more":[]}}"#);
    let (p0, p1) = (lists(r#"["a","o"]"#), lists(r#"["b","o"]"#));
    let prefill = choices(&[(0, &p0), (1, &p1)]);
    let decode = choices(&[(1, &lists(r#"["x"]"#)), (2, &lists("[]")), (0, &lists(r#"["y"]"#))]);
    let expected = choices(&[(1, &lists(r#"["b","x"]"#)), (2, &lists("[]")), (0, &lists(r#"["a","y"]"#))]);
    assert_eq!(splice(Merge::Echo, prefill.as_bytes(), decode.as_bytes()), expected);
}

#[test]
fn a_choice_without_logprobs_does_not_affect_other_choices() {
    let lists = r#"{"tokens":["a","o"]}"#;
    let prefill = choices(&[(0, lists), (1, lists)]);
    let decode = |tokens: &str| choices(&[(0, "null"), (1, &format!(r#"{{"tokens":{tokens}}}"#))]);
    let spliced = splice(Merge::Echo, prefill.as_bytes(), decode(r#"["x"]"#).as_bytes());
    assert_eq!(spliced, decode(r#"["a","x"]"#));
}

#[test]
fn an_empty_list_of_decode_gets_no_trailing_comma() {
    // With `max_tokens` 0 prefill generates its token nevertheless.
    let prefill = echo(0, &["first", "a", "out"]);
    let decode = echo(0, &[]);
    assert_eq!(splice(Merge::Echo, prefill.as_bytes(), decode.as_bytes()), echo(0, &["first", "a"]));
    let spaced = decode.replace("[]", "[ \t ]");
    let expected = echo(0, &["first", "a"])
        .replace("\"a\"]", "\"a\" \t ]")
        .replace("-1]", "-1 \t ]")
        .replace("-0.5]", "-0.5 \t ]");
    assert_eq!(splice(Merge::Echo, prefill.as_bytes(), spaced.as_bytes()), expected);
}

#[test]
fn a_prompt_without_tokens_adds_nothing() {
    for prefill in
        [echo(0, &["out"]), echo(0, &[]), choices(&[(0, "null")]), choices(&[(0, "{}")]), choices(&[])]
    {
        let decode = echo(0, &["x"]);
        assert!(read(Merge::Echo, prefill.as_bytes()).is_empty());
        assert_eq!(splice(Merge::Echo, prefill.as_bytes(), decode.as_bytes()), decode);
    }
}

#[test]
fn an_echo_that_has_its_prompt_is_not_changed() {
    let prefill = body("pd/cmpl_logprobs_echo.prefill");
    let regular = body("reg/cmpl_logprobs_echo");
    assert_eq!(splice(Merge::Echo, &prefill, &regular), text(regular));
    let stream = body("reg/cmpl_logprobs_echo_stream");
    assert_eq!(splice_stream(Merge::Echo, &prefill, [&stream[..]]), text(stream));
}

#[test]
fn a_list_of_another_type_on_either_side_changes_nothing() {
    let prefill = choices(&[(0, r#"{"tokens":["a","o"],"top_logprobs":null,"text_offset":[-1,-1]}"#)]);
    let decode = |tokens: &str| {
        choices(&[(0, &format!(r#"{{"tokens":{tokens},"top_logprobs":[{{}}],"text_offset":null}}"#))])
    };
    assert_eq!(
        splice(Merge::Echo, prefill.as_bytes(), decode(r#"["x"]"#).as_bytes()),
        decode(r#"["a","x"]"#)
    );
}

// `routed_experts`.

fn base64(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

/// A response of chat or completions with rows.
fn sglext(choices: &str, rows: &str) -> String {
    format!(
        r#"{{"id":"x","choices":{choices},"usage":null,"sglext":{{"input_ids":[1],"routed_experts":{rows}}}}}"#
    )
}

fn rows_item(rows: &str, index: &str) -> String {
    item("x", &format!(r#""routed_experts":{rows},"#), index)
}

fn quoted(text: impl AsRef<str>) -> String {
    format!("\"{}\"", text.as_ref())
}

#[test]
fn rows_of_the_prompt_are_prefills_and_the_others_decodes() {
    let decode = b"..........output rows";
    // With 0, 1 and 2 bytes in the last group, and more rows than decode has.
    for prompt in [&b"abcdefghi"[..], b"abcdefghij", b"abcdefghijk", b"a", b"abcdefghijklmnopqrstuvwxyz"] {
        let expected = [prompt, decode.get(prompt.len()..).unwrap_or_default()].concat();
        let [prefill, decode, expected] = [prompt, &decode[..], &expected].map(|rows| quoted(base64(rows)));
        for merge in [Merge::Generate, Merge::GenerateExperts] {
            let [prefill, decode, expected] = [&prefill, &decode, &expected].map(|rows| rows_item(rows, ""));
            assert_eq!(splice(merge, prefill.as_bytes(), decode.as_bytes()), expected);
            let batch = |item: &str| format!("[{},{item}]", item_without_rows());
            let spliced = splice(merge, batch(&prefill).as_bytes(), batch(&decode).as_bytes());
            assert_eq!(spliced, batch(&expected));
        }
        for merge in [Merge::Echo, Merge::Experts] {
            let choices = r#"[{"index":0,"text":"\"routed_experts\":\"\""}]"#;
            let [prefill, decode, expected] =
                [&prefill, &decode, &expected].map(|rows| sglext(choices, rows));
            assert_eq!(splice(merge, prefill.as_bytes(), decode.as_bytes()), expected);
        }
    }
}

fn item_without_rows() -> String {
    item("other", "", "")
}

#[test]
fn rows_come_in_late_events_of_a_stream() {
    let [prefill, decode, expected] = [&b"pppp"[..], b"....oo", b"ppppoo"].map(|rows| quoted(base64(rows)));
    let token = event(choices(&[(0, "null")]));
    let stream = |rows: &str| token.repeat(2) + &event(sglext("[]", rows)) + &event("[DONE]");
    for merge in [Merge::Echo, Merge::Experts] {
        let spliced = splice_stream(merge, stream(&prefill).as_bytes(), [stream(&decode).as_bytes()]);
        assert_eq!(spliced, stream(&expected));
        for cut in 0..stream(&decode).len() {
            let decode = stream(&decode);
            let (first, second) = decode.as_bytes().split_at(cut);
            assert_eq!(splice_stream(merge, stream(&prefill).as_bytes(), [first, second]), spliced);
        }
    }
    let stream = |rows: &str| {
        let others = [1, 0].map(|index| event(item("x", "", &format!(r#","index":{index}"#)))).concat();
        others + &event(rows_item(rows, r#","index":1"#)) + &event("[DONE]")
    };
    let spliced =
        splice_stream(Merge::GenerateExperts, stream(&prefill).as_bytes(), [stream(&decode).as_bytes()]);
    assert_eq!(spliced, stream(&expected));
}

#[test]
fn rows_of_a_streamed_batch_of_completions_are_decodes() {
    // Each server sends those of the prompt that came first.
    let stream = |rows: &str| {
        event(choices(&[(1, "null")])) + &event(choices(&[(0, "null")])) + &event(sglext("[]", rows))
    };
    let (prefill, decode) = (stream(r#""AAAA""#), stream(r#""BBBBBBBB""#));
    assert!(read(Merge::Experts, prefill.as_bytes()).is_empty());
    assert_eq!(splice_stream(Merge::Experts, prefill.as_bytes(), [decode.as_bytes()]), decode);
}

#[test]
fn rows_that_are_no_base64_change_nothing() {
    for rows in [
        r#""""#,
        "null",
        "1",
        r#""AAA""#,
        r#""A===""#,
        r#""AA=AAAAA""#,
        r#""A-_A""#,
        r#""\/AAA""#,
        r#""AB==""#,
    ] {
        assert!(read(Merge::Experts, sglext("[]", rows).as_bytes()).is_empty(), "{rows}");
        assert!(read(Merge::Generate, rows_item(rows, "").as_bytes()).is_empty(), "{rows}");
    }
    for rows in ["null", "1", r#""AAAAA""#, r#""\/AAA\/AA""#, r#""AA--AAAA""#, r#""AA==AAAA""#] {
        let (prefill, decode) = (sglext("[]", r#""AA==""#), sglext("[]", rows));
        assert_eq!(splice(Merge::Experts, prefill.as_bytes(), decode.as_bytes()), decode);
    }
    // Nothing is inserted where decode has none.
    let decode = item_without_rows();
    let prefill = rows_item(r#""AAAA""#, "");
    assert_eq!(splice(Merge::Generate, prefill.as_bytes(), decode.as_bytes()), decode);
}

#[test]
fn an_echo_and_rows_are_merged_together() {
    let merged = |tokens: &str, rows: &str| {
        let lists = format!(r#"{{"tokens":{tokens}}}"#);
        sglext(&format!(r#"[{{"index":0,"logprobs":{lists}}}]"#), rows)
    };
    let (prefill, decode) = (merged(r#"["a","o"]"#, r#""AAAA""#), merged(r#"["x"]"#, r#""BBBBCCCC""#));
    let expected = merged(r#"["a","x"]"#, r#""AAAACCCC""#);
    assert_eq!(splice(Merge::Echo, prefill.as_bytes(), decode.as_bytes()), expected);
    // Members in another order.
    let [prefill, decode, expected] = [prefill, decode, expected].map(|response| {
        let at = response.find(r#""sglext""#).unwrap();
        format!("{{{},{}}}", &response[at..response.len() - 1], &response[1..at - 1])
    });
    assert_eq!(splice(Merge::Echo, prefill.as_bytes(), decode.as_bytes()), expected);
}

// Generated inputs.

/// A token's text, often one that resembles something else.
fn any_text() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<String>(),
        "[\\[\\]{}\"\\\\,:]{0,8}",
        Just("\"input_token_logprobs\":[]".to_owned()),
        Just("data: [DONE]\n\n".to_owned()),
    ]
}

/// One list of logprobs, by token.
fn any_list() -> impl Strategy<Value = Value> {
    // Multiples of 1/8 are exact in binary: serde_json is off by one bit for some other numbers.
    let entry = (any::<i16>(), any::<u16>(), prop::option::of(any_text()))
        .prop_map(|(eighths, token, text)| json!([f64::from(eighths) / 8.0, token, text]));
    prop::collection::vec(prop_oneof![Just(Value::Null), entry], 0..6).prop_map(Value::from)
}

/// Prefill's and decode's item for one prompt. Every list may be missing on either side.
fn any_item() -> impl Strategy<Value = (Value, Value)> {
    let lists = || prop::array::uniform3(prop::option::of(any_list()));
    let decodes = prop::array::uniform3(any::<bool>());
    let times = prop::array::uniform2(prop::option::of(prop::option::of(any::<u16>())));
    let drawn = (lists(), decodes, lists(), any_text(), any_text(), times, prop::option::of(any_list()));
    drawn.prop_map(|(full, empty, output, id, text, times, first)| {
        let mut prefill = json!({"text": text, "output_ids": [1], "meta_info": {"id": id}});
        let mut decode =
            json!({"text": format!("{text}{id}"), "output_ids": [1, 2], "meta_info": {"id": text}});
        for (name, list) in INPUT_LISTS.iter().zip(full) {
            list.into_iter().for_each(|list| prefill["meta_info"][name] = list);
        }
        for (name, _) in INPUT_LISTS.iter().zip(empty).filter(|(_, has)| *has) {
            decode["meta_info"][name] = json!([]);
        }
        for (name, list) in INPUT_LISTS.iter().zip(output) {
            list.into_iter().for_each(|list| decode["meta_info"][name.replace("input", "output")] = list);
        }
        first.into_iter().for_each(|list| prefill["meta_info"]["output_token_ids_logprobs"] = list);
        for (side, time) in [&mut prefill, &mut decode].into_iter().zip(times) {
            time.into_iter().for_each(|time| side["meta_info"][MEASUREMENTS[0]] = json!(time));
        }
        (prefill, decode)
    })
}

fn write(value: &Value, pretty: bool) -> Vec<u8> {
    if pretty { serde_json::to_vec_pretty(value) } else { serde_json::to_vec(value) }.unwrap()
}

fn write_event(value: &Value) -> String {
    event(value.to_string())
}

/// A recording of each kind: a batch, a stream and an echo.
const RECORDINGS: [&str; 3] = ["gen_batch_lists_logprob", "gen_logprob_stream", "cmpl_logprobs_echo"];

fn any_prompt_and_output() -> impl Strategy<Value = [Vec<String>; 2]> {
    prop::array::uniform2(prop::collection::vec(any_text(), 0..5))
}

/// Any byte, often one of JSON's syntax.
fn any_byte() -> impl Strategy<Value = u8> {
    prop_oneof![any::<u8>(), prop::sample::select(&b"[]{}\",:\\\n"[..])]
}

/// The bytes in frames of these sizes, repeated as needed.
fn split_into<'a>(mut bytes: &'a [u8], sizes: &[usize]) -> Vec<&'a [u8]> {
    let mut frames = Vec::new();
    for size in sizes.iter().cycle() {
        let (frame, rest) = bytes.split_at((*size).min(bytes.len()));
        frames.push(frame);
        bytes = rest;
        if bytes.is_empty() {
            break;
        }
    }
    frames
}

proptest! {
    #[test]
    fn merged_rows_are_prefills_bytes_and_the_rest_of_decodes(
        prefill in prop::collection::vec(any::<u8>(), 1..40),
        decode in prop::collection::vec(any::<u8>(), 0..60),
    ) {
        let expected = [&prefill[..], decode.get(prefill.len()..).unwrap_or_default()].concat();
        let [prefill, decode, expected] =
            [prefill, decode, expected].map(|rows| sglext("[]", &quoted(base64(&rows))));
        prop_assert_eq!(splice(Merge::Experts, prefill.as_bytes(), decode.as_bytes()), expected);
    }

    #[test]
    fn frames_of_any_sizes_do_not_change_a_spliced_stream(sizes in prop::collection::vec(1_usize..3000, 1..20)) {
        let (prefill, decode) = (body("pd/gen_logprob_stream.prefill"), body("pd/gen_logprob_stream.decode"));
        let whole = splice_stream(Merge::Generate, &prefill, [&decode[..]]);
        prop_assert_eq!(splice_stream(Merge::Generate, &prefill, split_into(&decode, &sizes)), whole);
    }

    #[test]
    fn spliced_responses_equal_merged_parsed_values(
        items in prop::collection::vec(any_item(), 0..4),
        pretty in prop::array::uniform2(any::<bool>()),
    ) {
        if let [(prefill, decode), ..] = &items[..] {
            let spliced = splice(Merge::Generate, &write(prefill, pretty[0]), &write(decode, pretty[1]));
            prop_assert_eq!(parse(spliced), merged(prefill.clone(), decode.clone()));
        }
        let (prefill, decode): (Vec<_>, Vec<_>) = items.into_iter().unzip();
        let (prefill, decode) = (Value::from(prefill), Value::from(decode));
        let spliced = splice(Merge::Generate, &write(&prefill, pretty[0]), &write(&decode, pretty[1]));
        prop_assert_eq!(parse(spliced), merged(prefill, decode));
    }

    #[test]
    fn spliced_batch_streams_equal_merged_parsed_values(
        items in prop::collection::vec(any_item(), 1..5),
        order in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        sizes in prop::collection::vec(1_usize..200, 1..9),
        indexed: bool,
    ) {
        let number = |(index, (mut prefill, mut decode)): (usize, (Value, Value))| {
            if indexed {
                prefill["index"] = json!(index);
                decode["index"] = json!(index);
            }
            (prefill, decode)
        };
        let count = if indexed { items.len() } else { 1 };
        let items: Vec<_> = items.into_iter().enumerate().take(count).map(number).collect();
        let prefill: String = items.iter().rev().map(|(prefill, _)| write_event(prefill)).collect();
        let order: Vec<_> = order.iter().map(|at| &items[at.index(count)]).collect();
        let decode: String = order.iter().map(|(_, decode)| write_event(decode)).collect();
        let has_lists = items.iter().any(|(prefill, _)| has_lists(prefill));
        let merged = |(prefill, decode): &&(Value, Value)| merged_if(has_lists, prefill.clone(), decode.clone());
        let expected: Vec<Value> = order.iter().map(merged).collect();
        let frames = split_into(decode.as_bytes(), &sizes);
        prop_assert_eq!(parse_events(&splice_stream(Merge::Generate, prefill.as_bytes(), frames)), expected);
    }

    #[test]
    fn a_spliced_echo_is_the_prompt_followed_by_the_output(
        prompts in prop::collection::vec(any_prompt_and_output(), 1..4),
        pretty in prop::array::uniform2(any::<bool>()),
    ) {
        let response = |tokens: Vec<Vec<String>>| {
            let choice = |(index, tokens): (usize, &Vec<String>)| json!({"index": index, "logprobs": {
                "text_offset": vec![-1; tokens.len()],
                "token_logprobs": vec![-0.5; tokens.len()],
                "tokens": tokens,
                "top_logprobs": tokens.iter().map(|token| json!({token.as_str(): -0.5})).collect::<Vec<_>>(),
            }});
            json!({"choices": tokens.iter().enumerate().map(choice).collect::<Vec<_>>()})
        };
        let output = vec!["output".to_owned()];
        let prefill = response(prompts.iter().map(|[prompt, _]| [&prompt[..], &output].concat()).collect());
        let decode = response(prompts.iter().map(|[_, output]| output.clone()).collect());
        let expected = response(prompts.iter().map(|prompt_and_output| prompt_and_output.concat()).collect());
        let spliced = splice(Merge::Echo, &write(&prefill, pretty[0]), &write(&decode, pretty[1]));
        prop_assert_eq!(parse(spliced), expected);
    }

    #[test]
    fn no_input_panics(
        name in prop::sample::select(&RECORDINGS[..]),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any_byte()), 1..9),
        end: prop::sample::Index,
        noise: Vec<u8>,
    ) {
        let (prefill, decode) = (body(&format!("pd/{name}.prefill")), body(&format!("pd/{name}.decode")));
        let corrupt = |bytes: &Bytes| {
            let mut corrupted = bytes[..=end.index(bytes.len())].to_vec();
            for (at, byte) in &changes {
                let at = at.index(corrupted.len());
                corrupted[at] = *byte;
            }
            corrupted
        };
        for merge in [Merge::Generate, Merge::Echo, Merge::Experts] {
            for decode in [corrupt(&decode), noise.clone()] {
                for prefill in [prefill.to_vec(), corrupt(&prefill), noise.clone()] {
                    let Ok(lists) = PromptLogprobs::read(merge, &prefill.into()) else {
                        continue;
                    };
                    let body = Bytes::from(decode.clone());
                    prop_assert!(lists.splice_body(&body).len() + 8 >= body.len());
                    let mut splicer = lists.into_splicer(usize::MAX);
                    splicer.push(body);
                    while splicer.next().is_some() {}
                    splicer.finish();
                }
            }
        }
    }
}
