use bytes::{Buf, Bytes};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

const INPUT_LISTS: [&str; 3] = ["input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs"];
const ECHO_LISTS: [&str; 4] = ["text_offset", "token_logprobs", "tokens", "top_logprobs"];

/// The recorded answer's body as the pieces it came in: its chunks, or the whole.
fn pieces(name: &str) -> Vec<Bytes> {
    let path = format!("{}/tests/fixtures/{name}.resp", env!("CARGO_MANIFEST_DIR"));
    let answer = std::fs::read(&path).expect(&path);
    let head = answer.windows(4).position(|at| at == b"\r\n\r\n").unwrap() + 4;
    let mut body = Bytes::from(answer).split_off(head);
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
    pieces(name).concat().into()
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

/// What the client gets of a stream that comes in these pieces.
fn splice_stream<'a>(merge: Merge, prefill: &[u8], decode: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut splicer = read(merge, prefill).into_splicer(usize::MAX);
    let mut sent = Vec::new();
    for piece in decode {
        splicer.push(Bytes::copy_from_slice(piece));
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

/// The JSON data of a stream's events. None of the streams here has line ends other than LF.
fn parse_events(stream: &str) -> Vec<Value> {
    let data = |event: &str| event.strip_prefix("data: ").filter(|data| *data != "[DONE]").map(parse);
    stream.split("\n\n").filter_map(data).collect()
}

/// The items of an answer, by whatever shape.
fn items(answer: &mut Value) -> Vec<&mut Value> {
    match answer {
        Value::Array(items) => items.iter_mut().collect(),
        item => vec![item],
    }
}

/// What the merged answer must be, by parsed values: `meta_info` of each item of `decode` with prefill's
/// lists.
fn merged(mut prefill: Value, mut decode: Value) -> Value {
    for (prefill, decode) in items(&mut prefill).into_iter().zip(items(&mut decode)) {
        for list in INPUT_LISTS {
            let (Some(full), Some(empty)) =
                (prefill["meta_info"].get(list).cloned(), decode["meta_info"].get_mut(list))
            else {
                continue;
            };
            assert_eq!(*empty, json!([]));
            *empty = full;
        }
    }
    decode
}

/// The text with the prompt's lists emptied. In what SGLang writes an `output_` list comes behind each.
fn emptied(answer: &str) -> String {
    let mut answer = answer.to_owned();
    for name in INPUT_LISTS {
        let mut at = 0;
        while let Some(key) = answer[at..].find(&format!("\"{name}\":")) {
            let start = at + key + name.len() + 3;
            let end = start + answer[start..].find(",\"output_").unwrap();
            answer.replace_range(start..end, "[]");
            at = start;
        }
    }
    answer
}

// Recordings of `/generate`.

#[test]
fn a_recorded_answer_gets_prefills_lists_and_is_else_the_same() {
    for name in ["gen_logprob", "gen_logprob_default", "gen_logprob_text", "gen_batch_lists_logprob"] {
        let (prefill, decode) = (body(&format!("pd/{name}.prefill")), body(&format!("pd/{name}.decode")));
        let spliced = splice(Merge::Generate, &prefill, &decode);
        assert_eq!(parse(&spliced), merged(parse(&prefill), parse(&decode)), "{name}");
        assert_eq!(emptied(&spliced), text(decode), "{name}");
    }
}

#[test]
fn a_recorded_stream_gets_prefills_lists_in_every_event_and_is_else_the_same() {
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
fn the_lists_are_those_of_a_regular_server() {
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

#[test]
fn an_answer_of_a_regular_server_stays_as_it_is() {
    // All its lists are full: what a decode server would send if SGLang handed prefill's lists over.
    let prefill = body("pd/gen_logprob.prefill");
    for name in ["reg/gen_logprob_full", "reg/gen_batch_logprob"] {
        assert_eq!(splice(Merge::Generate, &prefill, &body(name)), text(body(name)));
    }
    let stream = body("reg/gen_stream_logprob");
    assert_eq!(splice_stream(Merge::Generate, &prefill, [&stream[..]]), text(stream));
}

#[test]
fn chat_has_no_prompt_logprobs_to_splice() {
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
fn a_stream_may_be_cut_anywhere() {
    let echo = echo_stream_of_decode();
    let cases = [
        (Merge::Generate, body("pd/gen_logprob_stream.prefill"), body("pd/gen_logprob_stream.decode")),
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

// `/generate` made up.

/// One item as SGLang writes it: compact, with output lists in between, and `index` last.
fn item(id: &str, lists: &str, index: &str) -> String {
    let output = r#""output_token_logprobs":[[-0.5,7,null]],"completion_tokens":1"#;
    format!(r#"{{"text":"t {id}","output_ids":[7],"meta_info":{{"id":"{id}",{lists}{output}}}{index}}}"#)
}

fn list(of: &str) -> String {
    format!(r#""input_token_logprobs":{of},"#)
}

fn event(data: impl AsRef<str>) -> String {
    format!("data: {}\n\n", data.as_ref())
}

#[test]
fn items_of_a_batch_are_matched_by_position() {
    // `return_logprob` can be a list: an item without it has no lists on either side.
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
    // An item too many, as nobody sends it, gets nothing.
    let short = format!("[{}]", item("p0", &list("[[0]]"), ""));
    assert_eq!(
        splice(Merge::Generate, short.as_bytes(), decode(["[]"; 2]).as_bytes()),
        decode(["[[0]]", "[]"])
    );
}

#[test]
fn a_key_on_one_side_only_changes_nothing() {
    let (with, without) = (item("x", &list("[]"), ""), item("x", "", ""));
    let full = item("p", &list("[[1]]"), "");
    assert_eq!(splice(Merge::Generate, full.as_bytes(), without.as_bytes()), without);
    assert_eq!(splice(Merge::Generate, without.as_bytes(), with.as_bytes()), with);
    let top_only = item("p", r#""input_top_logprobs":[null],"#, "");
    assert_eq!(splice(Merge::Generate, top_only.as_bytes(), with.as_bytes()), with);
}

#[test]
fn a_list_of_decode_that_is_not_empty_stays() {
    let prefill = item("p", r#""input_token_logprobs":[[1]],"input_top_logprobs":[[2]],"#, "");
    for theirs in ["[[9]]", "null", r#""""#, "{}", "0"] {
        let decode = |top: &str| {
            item("d", &format!(r#""input_token_logprobs":{theirs},"input_top_logprobs":{top},"#), "")
        };
        assert_eq!(splice(Merge::Generate, prefill.as_bytes(), decode("[]").as_bytes()), decode("[[2]]"));
    }
}

#[test]
fn output_lists_stay_even_if_they_are_empty() {
    let lists = |of: &str| {
        let names = ["output_token_ids_logprobs", "output_top_logprobs", "not_input_token_logprobs"];
        names.map(|name| format!(r#""{name}":{of},"#)).concat()
    };
    let (prefill, decode) = (item("p", &lists("[[1]]"), ""), item("d", &lists("[]"), ""));
    assert_eq!(splice(Merge::Generate, prefill.as_bytes(), decode.as_bytes()), decode);
}

#[test]
fn the_flat_forms_are_replaced_whatever_decode_sends() {
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
fn white_space_does_not_matter() {
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
fn what_a_model_writes_is_text() {
    let prefill = item("p", &list("[[1]]"), "");
    let written = [
        r#""input_token_logprobs":[]"#,
        r#"{"meta_info":{"input_token_logprobs":[],"input_token_logprobs":[]}}"#,
        r#","input_token_logprobs":[],"#,
        "data: [DONE]",
        "\n\ndata: [DONE]\n\n",
        r#"]}]}}"index":5}"#,
        "\\",
        r#"\"input_token_logprobs":[]"#,
    ];
    for text in written {
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
fn a_string_or_an_escaped_key_that_looks_like_the_key_is_not_it() {
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
    // The order in which prefill finishes is its own.
    let prefill: String =
        [2, 0, 10].map(|i| event(item("p", &list(&format!("[[{i}]]")), &index(i)))).concat();
    let decode = |full: bool| {
        let of = |i: u64| if full && i != 1 { format!("[[{i}]]") } else { "[]".to_owned() };
        let events = [0, 2, 1, 10, 2, 0].map(|i| event(item("d", &list(&of(i)), &index(i)))).concat();
        // The index may be elsewhere, by which servers do not put it today.
        let early =
            [10, 0].map(|i| event(format!(r#"{{"index": {i} ,{}"#, &item("d", &list(&of(i)), "")[1..])));
        events + &early.concat() + &event("[DONE]")
    };
    assert_eq!(
        splice_stream(Merge::Generate, (prefill + &event("[DONE]")).as_bytes(), [decode(false).as_bytes()]),
        decode(true)
    );
}

#[test]
fn an_index_that_is_not_the_items_own_is_not_taken() {
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
fn prefill_may_answer_a_stream_with_json() {
    let single = item("p", &list("[[0]]"), "");
    let decode = |of: &str| event(item("d", &list(of), ""));
    assert_eq!(splice_stream(Merge::Generate, single.as_bytes(), [decode("[]").as_bytes()]), decode("[[0]]"));
    let batch = format!("[{},{}]", item("p0", &list("[[0]]"), ""), item("p1", &list("[[1]]"), ""));
    let decode = |of: &str| event(item("d", &list(of), r#","index":1"#));
    assert_eq!(splice_stream(Merge::Generate, batch.as_bytes(), [decode("[]").as_bytes()]), decode("[[1]]"));
}

#[test]
fn the_last_of_prefills_events_with_a_list_wins() {
    let prefill = ["[[1]]", "[[1],[2]]"].map(|of| event(item("p", &list(of), ""))).concat()
        + ": keep-alive\n\n"
        + &event(item("p", "", ""))
        + &event(r#"{"error":{"message":"late"}}"#)
        // Without the blank line, as a server that was stopped would leave it.
        + "data: [DONE]";
    let decode = item("d", &list("[]"), "");
    assert_eq!(
        splice(Merge::Generate, prefill.as_bytes(), decode.as_bytes()),
        item("d", &list("[[1],[2]]"), "")
    );
}

#[test]
fn events_without_an_item_pass_untouched() {
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
fn an_answer_of_decode_that_cannot_be_read_passes_untouched() {
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
fn an_answer_of_prefill_that_cannot_be_read_is_an_error() {
    for merge in [Merge::Generate, Merge::Echo] {
        for answer in [
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
            let error = PromptLogprobs::read(merge, &Bytes::from(answer)).err();
            assert!(error.is_some_and(|error| error.to_string().starts_with("malformed: ")), "{answer:?}");
        }
    }
    for (merge, name) in [(Merge::Generate, "gen_batch_lists_logprob"), (Merge::Echo, "cmpl_logprobs_echo")] {
        let answer = body(&format!("pd/{name}.prefill"));
        for end in 0..answer.len() {
            assert!(PromptLogprobs::read(merge, &answer.slice(..end)).is_err());
        }
    }
    let stream = body("pd/gen_logprob_stream.prefill");
    for end in 0..stream.len() {
        // The first event without its end, or what came before it, is no answer. Later only `[DONE]` is
        // missing.
        let first = stream.windows(2).position(|at| at == b"\n\n").unwrap();
        let read = PromptLogprobs::read(Merge::Generate, &stream.slice(..end));
        assert_eq!(read.is_ok_and(|lists| !lists.is_empty()), !read_fails(end, first), "{end}");
    }
}

/// Whether a stream that is cut at `end` has no complete first event, or the start of another's data.
fn read_fails(end: usize, first: usize) -> bool {
    let second = first + 2;
    end < first || (second + "data:".len()..second + "data: [DONE]".len()).contains(&end)
}

#[test]
fn prefills_errors_have_no_lists() {
    for answer in [
        r#"{"error":{"message":"x"}}"#,
        "[]",
        r#"{"meta_info":null}"#,
        r#"{"meta_info":{"input_token_logprobs":null}}"#,
    ] {
        assert!(read(Merge::Generate, answer.as_bytes()).is_empty(), "{answer}");
        assert!(read(Merge::Generate, event(answer).as_bytes()).is_empty(), "{answer}");
    }
}

#[test]
fn an_echo_of_prefill_is_an_object() {
    assert!(read(Merge::Echo, br#"{"error":{"message":"x"}}"#).is_empty());
    assert!(PromptLogprobs::read(Merge::Echo, &Bytes::from("[]")).is_err());
}

#[test]
fn no_list_of_prefills_is_copied_to_be_kept() {
    let answer = body("pd/gen_logprob_stream.prefill");
    let Lists::Generate(items) = PromptLogprobs::read(Merge::Generate, &answer).unwrap().lists else {
        panic!()
    };
    let range = answer.as_ptr_range();
    let kept: Vec<_> = items.lists().collect();
    assert_eq!(kept.len(), 3);
    assert!(kept.iter().all(|list| range.contains(&list.as_ptr())));
}

#[test]
fn events_that_stay_as_they_are_are_not_copied() {
    let mut splicer = read(Merge::Generate, &body("pd/gen_logprob.prefill")).into_splicer(usize::MAX);
    let frame = Bytes::from(event(item("d", "", "")) + &event("[DONE]"));
    splicer.push(frame.clone());
    let sent = splicer.next().unwrap().unwrap().into_bytes();
    assert_eq!((sent.as_ptr(), sent.len()), (frame.as_ptr(), frame.len()));
    assert!(splicer.next().is_none());
}

#[test]
fn events_that_come_together_go_together_and_share_the_list() {
    let prefill = Bytes::from(item("p", &list("[[-1.5,7,null]]"), ""));
    let mut splicer = PromptLogprobs::read(Merge::Generate, &prefill).unwrap().into_splicer(usize::MAX);
    let decode = event(item("d", &list("[]"), ""));
    let cut = decode.len() / 2;
    // The first one is begun in a frame before.
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
fn a_stream_with_nothing_to_splice_is_not_even_cut_into_events() {
    let mut splicer = read(Merge::Generate, &body("pd/gen_logprob_default.prefill")).into_splicer(1);
    let frame = Bytes::from_static(b"data: {} half an ev");
    splicer.push(frame.clone());
    assert_eq!(splicer.next().unwrap().unwrap().into_bytes().as_ptr(), frame.as_ptr());
    assert!(splicer.next().is_none());
    assert!(splicer.finish().is_none());
}

#[test]
fn an_event_that_is_too_large_is_an_error() {
    let mut splicer = read(Merge::Generate, &body("pd/gen_logprob.prefill")).into_splicer(100);
    let before = event("[DONE]");
    splicer.push(Bytes::from(before.clone() + &"x".repeat(101)));
    assert_eq!(splicer.next().unwrap().unwrap().into_bytes(), before);
    for _ in 0..2 {
        assert_eq!(splicer.next().unwrap().unwrap_err(), EventTooLarge { limit: 100 });
    }
}

#[test]
fn an_event_that_never_ended_passes_as_it_is() {
    let mut splicer = read(Merge::Generate, &body("pd/gen_logprob.prefill")).into_splicer(usize::MAX);
    let decode = item("d", &list("[]"), "");
    splicer.push(Bytes::from("data: "));
    assert!(splicer.next().is_none());
    splicer.push(Bytes::from(decode.clone()));
    assert!(splicer.next().is_none());
    assert_eq!(text(splicer.finish().unwrap()), format!("data: {decode}"));
}

// `/v1/completions` with `echo` and `logprobs`.

/// The regular server's stream, with the prompt taken out of the first event: what a decode server sends.
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
fn a_recorded_echo_gets_the_lists_of_a_regular_server() {
    let (prefill, decode) = (body("pd/cmpl_logprobs_echo.prefill"), body("pd/cmpl_logprobs_echo.decode"));
    let regular = body("reg/cmpl_logprobs_echo");
    let spliced = splice(Merge::Echo, &prefill, &decode);
    assert_eq!(parse(&spliced)["choices"], parse(&regular)["choices"]);
    // Byte for byte: all but the id and the time, in the same order.
    let choices = |answer: &str| answer[answer.find("\"choices\"").unwrap()..].to_owned();
    assert_eq!(choices(&spliced), choices(&text(regular)));
    let head = text(decode);
    assert_eq!(spliced[..spliced.find("\"choices\"").unwrap()], head[..head.find("\"choices\"").unwrap()]);
}

#[test]
fn an_echo_stream_becomes_that_of_a_regular_server() {
    let decode = echo_stream_of_decode();
    let prefill = body("pd/cmpl_logprobs_echo.prefill");
    let regular = text(body("reg/cmpl_logprobs_echo_stream"));
    assert_eq!(splice_stream(Merge::Echo, &prefill, [decode.as_bytes()]), regular);
    let prefill = event(text(prefill)) + &event(r#"{"choices":[],"usage":{}}"#) + &event("[DONE]");
    assert_eq!(splice_stream(Merge::Echo, prefill.as_bytes(), [decode.as_bytes()]), regular);
}

#[test]
fn an_echo_stream_gets_each_prompt_once() {
    let prefill = [echo(1, &["first", "b", "out"]), echo(0, &["first", "a", "out"])].map(event).concat()
        // Later lists are output, of which prefill makes no more than one token.
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
fn a_choice_without_logprobs_does_not_keep_them_from_others() {
    let lists = r#"{"tokens":["a","o"]}"#;
    let prefill = choices(&[(0, lists), (1, lists)]);
    let decode = |tokens: &str| choices(&[(0, "null"), (1, &format!(r#"{{"tokens":{tokens}}}"#))]);
    let spliced = splice(Merge::Echo, prefill.as_bytes(), decode(r#"["x"]"#).as_bytes());
    assert_eq!(spliced, decode(r#"["a","x"]"#));
}

#[test]
fn an_empty_list_of_decode_gets_the_prompt_without_a_comma_too_many() {
    // `max_tokens` 0: prefill makes its token all the same.
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
fn a_prompt_of_no_tokens_adds_nothing() {
    for prefill in
        [echo(0, &["out"]), echo(0, &[]), choices(&[(0, "null")]), choices(&[(0, "{}")]), choices(&[])]
    {
        let decode = echo(0, &["x"]);
        assert!(read(Merge::Echo, prefill.as_bytes()).is_empty());
        assert_eq!(splice(Merge::Echo, prefill.as_bytes(), decode.as_bytes()), decode);
    }
}

#[test]
fn an_echo_that_has_its_prompt_already_stays_as_it_is() {
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

// Everything, at random.

/// A token's text with what could be mistaken for something else.
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
    // serde_json reads eighths exactly, and not every number.
    let entry = (any::<i16>(), any::<u16>(), prop::option::of(any_text()))
        .prop_map(|(eighths, token, text)| json!([f64::from(eighths) / 8.0, token, text]));
    prop::collection::vec(prop_oneof![Just(Value::Null), entry], 0..6).prop_map(Value::from)
}

/// Prefill's and decode's answer for one prompt. Every list may be missing on either side.
fn any_item() -> impl Strategy<Value = (Value, Value)> {
    let lists = || prop::array::uniform3(prop::option::of(any_list()));
    let decodes = prop::array::uniform3(any::<bool>());
    (lists(), decodes, lists(), any_text(), any_text()).prop_map(|(full, empty, output, id, text)| {
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
        (prefill, decode)
    })
}

fn write(value: &Value, pretty: bool) -> Vec<u8> {
    if pretty { serde_json::to_vec_pretty(value) } else { serde_json::to_vec(value) }.unwrap()
}

fn write_event(value: &Value) -> String {
    event(value.to_string())
}

/// A recording of each kind.
const NAMES: [&str; 3] = ["gen_batch_lists_logprob", "gen_logprob_stream", "cmpl_logprobs_echo"];

fn any_prompt_and_output() -> impl Strategy<Value = [Vec<String>; 2]> {
    prop::array::uniform2(prop::collection::vec(any_text(), 0..5))
}

/// Any byte, and more often than by chance one that JSON is made of.
fn any_byte() -> impl Strategy<Value = u8> {
    prop_oneof![any::<u8>(), prop::sample::select(&b"[]{}\",:\\\n"[..])]
}

/// Any split of the bytes.
fn cut<'a>(mut bytes: &'a [u8], sizes: &[usize]) -> Vec<&'a [u8]> {
    let mut pieces = Vec::new();
    for size in sizes.iter().cycle() {
        let (piece, rest) = bytes.split_at((*size).min(bytes.len()));
        pieces.push(piece);
        bytes = rest;
        if bytes.is_empty() {
            break;
        }
    }
    pieces
}

proptest! {
    #[test]
    fn any_recorded_stream_may_be_cut_anywhere(sizes in prop::collection::vec(1_usize..3000, 1..20)) {
        let (prefill, decode) = (body("pd/gen_logprob_stream.prefill"), body("pd/gen_logprob_stream.decode"));
        let whole = splice_stream(Merge::Generate, &prefill, [&decode[..]]);
        prop_assert_eq!(splice_stream(Merge::Generate, &prefill, cut(&decode, &sizes)), whole);
    }

    #[test]
    fn any_answer_is_merged_as_its_parsed_values_are(
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
    fn any_batch_stream_is_merged_as_its_parsed_values_are(
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
        let merged = |(prefill, decode): &&(Value, Value)| merged(prefill.clone(), decode.clone());
        let expected: String = order.iter().map(merged).map(|event| write_event(&event)).collect();
        let pieces = cut(decode.as_bytes(), &sizes);
        prop_assert_eq!(splice_stream(Merge::Generate, prefill.as_bytes(), pieces), expected);
    }

    #[test]
    fn any_echo_is_the_prompt_and_then_the_output(
        prompts in prop::collection::vec(any_prompt_and_output(), 1..4),
        pretty in prop::array::uniform2(any::<bool>()),
    ) {
        let answer = |tokens: Vec<Vec<String>>| {
            let choice = |(index, tokens): (usize, &Vec<String>)| json!({"index": index, "logprobs": {
                "text_offset": vec![-1; tokens.len()],
                "token_logprobs": vec![-0.5; tokens.len()],
                "tokens": tokens,
                "top_logprobs": tokens.iter().map(|token| json!({token.as_str(): -0.5})).collect::<Vec<_>>(),
            }});
            json!({"choices": tokens.iter().enumerate().map(choice).collect::<Vec<_>>()})
        };
        let output = vec!["output".to_owned()];
        let prefill = answer(prompts.iter().map(|[prompt, _]| [&prompt[..], &output].concat()).collect());
        let decode = answer(prompts.iter().map(|[_, output]| output.clone()).collect());
        let expected = answer(prompts.iter().map(|prompt_and_output| prompt_and_output.concat()).collect());
        let spliced = splice(Merge::Echo, &write(&prefill, pretty[0]), &write(&decode, pretty[1]));
        prop_assert_eq!(parse(spliced), expected);
    }

    #[test]
    fn no_bytes_panic(
        name in prop::sample::select(&NAMES[..]),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any_byte()), 1..9),
        end: prop::sample::Index,
        noise: Vec<u8>,
    ) {
        let (prefill, decode) = (body(&format!("pd/{name}.prefill")), body(&format!("pd/{name}.decode")));
        let spoil = |bytes: &Bytes| {
            let mut spoilt = bytes[..=end.index(bytes.len())].to_vec();
            for (at, byte) in &changes {
                let at = at.index(spoilt.len());
                spoilt[at] = *byte;
            }
            spoilt
        };
        for merge in [Merge::Generate, Merge::Echo] {
            for decode in [spoil(&decode), noise.clone()] {
                for prefill in [prefill.to_vec(), spoil(&prefill), noise.clone()] {
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
