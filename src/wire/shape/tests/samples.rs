//! How many samples bodies request, and what their copies get.

use super::*;

/// How many samples a body requests, or why a regular server rejects it.
fn samples(shape: &BodyShape) -> Result<u32, (u16, &'static str)> {
    match &shape.samples {
        RequestedSamples::One => Ok(1),
        RequestedSamples::Many(many) => Ok(many.count),
        RequestedSamples::Refused(refused) => Err((refused.status, refused.message)),
    }
}

#[test]
fn n_of_chat_and_completions_is_read_as_pydantic_reads_it() {
    for (value, expected) in [
        ("1", Ok(1)),
        ("2", Ok(2)),
        ("2.0", Ok(2)),
        ("3e0", Ok(3)),
        ("\"2\"", Ok(2)),
        ("\" +3 \"", Ok(3)),
        ("\"2.00\"", Ok(2)),
        ("\"1_0\"", Ok(10)),
        ("\"1\"", Ok(1)),
        ("true", Ok(1)),
        ("-1", Ok(1)),
        ("\"-7\"", Ok(1)),
        ("4294967296", Ok(u32::MAX)),
        ("123456789012345678901234567890", Ok(u32::MAX)),
        ("\"123456789012345678901234567890\"", Ok(u32::MAX)),
        // Not JSON: SGLang says so.
        ("[nope]", Ok(1)),
        ("0", Err("n must not be 0: range() arg 3 must not be zero")),
        ("false", Err("n must not be 0: range() arg 3 must not be zero")),
        ("null", Err("n: Input should be a valid integer")),
        ("[2]", Err("n: Input should be a valid integer")),
        ("{\"n\":2}", Err("n: Input should be a valid integer")),
        ("1.5", Err("n: Input should be a valid integer, got a number with a fractional part")),
        ("1E+400", Err("n: Input should be a finite number")),
        ("\"two\"", Err("n: Input should be a valid integer, unable to parse string as an integer")),
        ("\"2.5\"", Err("n: Input should be a valid integer, unable to parse string as an integer")),
        ("\"1__0\"", Err("n: Input should be a valid integer, unable to parse string as an integer")),
        ("\"\"", Err("n: Input should be a valid integer, unable to parse string as an integer")),
    ] {
        for dialect in [Dialect::Chat, Dialect::Completions] {
            let shape = accepted(dialect, &format!("{{\"n\":{value}}}"));
            assert_eq!(samples(&shape), expected.map_err(|message| (400, message)), "{value}");
        }
        for dialect in [Dialect::Generate, Dialect::Responses, Dialect::Messages] {
            assert_eq!(accepted(dialect, &format!("{{\"n\":{value}}}")).samples, RequestedSamples::One);
        }
    }
}

#[test]
fn n_of_sampling_params_is_read_as_a_strict_integer() {
    const TYPE: Result<u32, (u16, &str)> = Err((400, "sampling_params.n: invalid type, expected i64"));
    const DIFFERENT: Result<u32, (u16, &str)> = Err((
        400,
        "sampling_params: The parallel_sample_num should be the same for all samples in sample params.",
    ));
    for (params, expected) in [
        ("{}", Ok(1)),
        ("{\"n\":1}", Ok(1)),
        ("{\"n\":0}", Ok(1)),
        ("{\"n\":-1}", Ok(1)),
        ("{\"n\":2}", Ok(2)),
        ("{\"n\":4294967297}", Ok(u32::MAX)),
        ("{\"a\":{\"n\":2}}", Ok(1)),
        ("[{\"n\":2},{ \"n\" : 2 }]", Ok(2)),
        ("[{\"n\":1},{},null]", Ok(1)),
        ("[{\"n\":1}]", Ok(1)),
        ("[[{\"n\":2}]]", Ok(1)),
        ("[]", Ok(1)),
        ("2", Ok(1)),
        ("null", Ok(1)),
        ("\"n\"", Ok(1)),
        ("{\"n\":2,\"a\":nope}", Ok(2)),
        ("{\"n\" 2}", Ok(1)),
        ("{\"n\":2.0}", TYPE),
        ("{\"n\":\"2\"}", TYPE),
        ("{\"n\":true}", TYPE),
        ("{\"n\":[2]}", TYPE),
        ("{\"n\":9223372036854775808}", TYPE),
        ("[{\"n\":2},{\"n\":\"2\"}]", TYPE),
        ("[{\"n\":2},{\"n\":1}]", DIFFERENT),
        ("[{\"n\":2},{}]", DIFFERENT),
        ("[{\"n\":2},{\"n\":null}]", DIFFERENT),
        ("{\"n\":null}", Err((500, "sampling_params.n must not be null: Internal Server Error"))),
    ] {
        let text = format!("{{\"sampling_params\":{params}}}");
        assert_eq!(samples(&accepted(Dialect::Generate, &text)), expected, "{text}");
        assert_eq!(accepted(Dialect::Chat, &text).samples, RequestedSamples::One);
    }
}

#[test]
fn lists_of_logprob_options_do_not_go_with_several_samples() {
    let of = |field: &str, value: &str, n: usize| {
        let text = format!("{{\"{field}\":{value},\"sampling_params\":{{\"n\":{n}}}}}");
        samples(&accepted(Dialect::Generate, &text))
    };
    for (field, message) in [
        ("return_logprob", "Cannot use list return_logprob with parallel_sample_num > 1"),
        ("logprob_start_len", "Cannot use list logprob_start_len with parallel_sample_num > 1"),
        ("top_logprobs_num", "Cannot use list top_logprobs_num with parallel_sample_num > 1"),
    ] {
        assert_eq!(of(field, "[1,0]", 2), Err((400, message)));
        assert_eq!(of(field, "[1,0]", 1), Ok(1));
        assert_eq!(of(field, "1", 2), Ok(2));
        // The last of duplicates counts.
        let text = format!("{{\"{field}\":[1],\"sampling_params\":{{\"n\":2}},\"{field}\":1}}");
        assert_eq!(samples(&accepted(Dialect::Generate, &text)), Ok(2));
    }
    let message = "Cannot use list token_ids_logprob with parallel_sample_num > 1";
    assert_eq!(of("token_ids_logprob", "[[1],[2]]", 2), Err((400, message)));
    assert_eq!(of("token_ids_logprob", "[1,2]", 2), Ok(2));
    assert_eq!(of("token_ids_logprob", "[]", 2), Ok(2));
}

#[test]
fn a_list_of_ids_does_not_go_with_several_samples_of_a_single_prompt() {
    let of = |prompt: &str, rid: &str, n: usize| {
        let text = format!("{{{prompt},\"rid\":{rid},\"sampling_params\":{{\"n\":{n}}}}}");
        samples(&inspect(Dialect::Generate, text.as_bytes(), &[text.len()]).unwrap())
    };
    let message = "rid: The specified rids length mismatch with the batch_size for batch processing.";
    for prompt in ["\"text\":\"a\"", "\"input_ids\":[1,2]"] {
        assert_eq!(of(prompt, "[\"a\",\"b\"]", 2), Err((400, message)));
        assert_eq!(of(prompt, "[\"a\"]", 2), Ok(2));
        assert_eq!(of(prompt, "\"a\"", 2), Ok(2));
        assert_eq!(of(prompt, "[\"a\",\"b\"]", 1), Ok(1));
    }
    for prompts in ["\"text\":[\"a\",\"b\"]", "\"input_ids\":[[1],[2]]"] {
        assert_eq!(of(prompts, "[\"a\",\"b\"]", 2), Ok(2));
    }
}

#[test]
fn a_copy_has_all_but_n_and_the_ids_that_servers_take_only_once() {
    let copy = |dialect, text: &str, ids| {
        let shape = accepted(dialect, text);
        let RequestedSamples::Many(samples) = &shape.samples else { panic!("{text}") };
        let plan = RequestPlan::sglang_sample(&shape.fields, samples, ids);
        String::from_utf8(planned(text.as_bytes(), &plan, &[7])).unwrap()
    };
    let own = OwnIds { rid: Some("r-1"), request_id: None };
    for (text, expected) in [
        (r#"{"n":3,"a": 1}"#, r#"{"a": 1"#),
        (r#"{"a": 1, "n" : "2" }"#, r#"{"a": 1 "#),
        (r#"{"n":0,"n":2,"a":1,"rid":"x"}"#, r#"{"a":1"#),
    ] {
        for dialect in [Dialect::Chat, Dialect::Completions] {
            assert_eq!(copy(dialect, text, OwnIds::default()), format!("{expected},{FIELDS}}}"));
        }
    }
    assert_eq!(copy(Dialect::Chat, r#"{"rid":"x","n":2}"#, own), format!("{{\"rid\":\"r-1\",{FIELDS}}}"));
    for (params, expected) in [
        (r#"{"n":2}"#, "{}"),
        (r#"{"a": 1, "n": 2, "b" : {"n":2} }"#, r#"{"a": 1, "b" : {"n":2} }"#),
        (r#"{ "n": 2, "a":1}"#, r#"{"a":1}"#),
        (r#"{"a":1,"\u006e":1,"n":2}"#, r#"{"a":1}"#),
        (r#"[{"a":1,"n":2}, {"n":2}]"#, r#"[{"a":1}, {}]"#),
        // A server takes no list for a single prompt.
        (r#"[ {"a":1,"n":2} ]"#, r#"{"a":1}"#),
    ] {
        let text = format!("{{\"sampling_params\" : {params},\"text\":\"a\",\"rid\":\"x\"}}");
        let expected = format!("{{\"sampling_params\" : {expected},\"text\":\"a\",{FIELDS}}}");
        assert_eq!(copy(Dialect::Generate, &text, OwnIds::default()), expected);
    }
}
