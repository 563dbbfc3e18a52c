//! Backends' responses: decoded from their framing, split into events, and merged with prompt logprobs.

use bytes::Bytes;
use divan::Bencher;
use divan::counter::BytesCount;
use mini_lb::internals;

/// A chat stream as a decode server sends it: one event per token, and `[DONE]`.
fn events(count: usize) -> Vec<Bytes> {
    let event = |number| {
        format!(
            "data: {{\"id\":\"7c1e5f0b2a9d4e63\",\"object\":\"chat.completion.chunk\",\"created\":1795305600,\
             \"model\":\"llama\",\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\" token{number}\"}},\
             \"logprobs\":null,\"finish_reason\":null,\"matched_stop\":null}}]}}\n\n"
        )
    };
    (0..count).map(event).chain(["data: [DONE]\n\n".to_owned()]).map(Bytes::from).collect()
}

fn length(frames: &[Bytes]) -> BytesCount {
    BytesCount::new(frames.iter().map(Bytes::len).sum::<usize>())
}

fn response(headers: &str, body: &[u8]) -> Bytes {
    let head =
        format!("HTTP/1.1 200 OK\r\ndate: Sun, 22 Nov 2026 00:00:00 GMT\r\nserver: uvicorn\r\n{headers}");
    [head.as_bytes(), b"\r\n\r\n", body].concat().into()
}

fn chunk(event: &Bytes) -> Bytes {
    [format!("{:x}\r\n", event.len()).as_bytes(), event, b"\r\n"].concat().into()
}

#[divan::bench]
fn decode_response_300b(bencher: Bencher<'_, '_>) {
    let headers = "content-length: 300\r\ncontent-type: application/json";
    let reads = [response(headers, &[b'x'; 300])];
    bencher.bench_local(|| internals::decode_response(&reads));
}

/// Each event is a chunk of its own read, as when tokens are generated one at a time.
#[divan::bench]
fn decode_response_64_events(bencher: Bencher<'_, '_>) {
    let headers = "content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked";
    let mut reads = vec![response(headers, b"")];
    reads.extend(events(64).iter().map(chunk));
    reads.push(Bytes::from_static(b"0\r\n\r\n"));
    bencher.counter(length(&reads)).bench_local(|| internals::decode_response(&reads));
}

/// Each event is a frame of its own.
#[divan::bench]
fn split_64_events(bencher: Bencher<'_, '_>) {
    let frames = events(64);
    assert_eq!(internals::split_events(&frames), 65);
    bencher.counter(length(&frames)).bench_local(|| internals::split_events(&frames));
}

/// In frames of 64 KiB, as a connection reads a stream that was buffered.
#[divan::bench]
fn split_16k_events(bencher: Bencher<'_, '_>) {
    let stream = Bytes::from(events(16 << 10).concat());
    let starts = (0..stream.len()).step_by(64 << 10);
    let frames: Vec<_> =
        starts.map(|start| stream.slice(start..stream.len().min(start + (64 << 10)))).collect();
    assert_eq!(internals::split_events(&frames), (16 << 10) + 1);
    bencher.counter(length(&frames)).bench_local(|| internals::split_events(&frames));
}

/// The streams of 3 copies of a request for several samples, each event a frame of its own.
#[divan::bench]
fn merge_64_events_of_3_samples(bencher: Bencher<'_, '_>) {
    let frames = events(64);
    assert_eq!(internals::merge_samples(3, &frames), 3 * frames[..64].concat().len() + frames[64].len());
    bencher.counter(length(&frames)).bench_local(|| internals::merge_samples(3, &frames));
}

/// The list of logprobs of `tokens` tokens, each with the digits of a 64-bit float.
fn logprobs(tokens: usize) -> String {
    let token = |number: usize| format!("[-{}.{:015},{},null]", number % 9, number * 7_919, number * 31);
    format!("[{}]", (0..tokens).map(token).collect::<Vec<_>>().join(","))
}

/// A response to `/generate` with these lists; the prompt's is empty in decode's.
fn generate_response(prompt: &str, output: &str) -> String {
    format!(
        "{{\"text\":\" a token\",\"output_ids\":[264,4037],\"meta_info\":{{\"id\":\"7c1e\",\"finish_reason\":null,\
         \"prompt_tokens\":512,\"input_token_logprobs\":{prompt},\"output_token_logprobs\":{output},\
         \"completion_tokens\":2,\"cached_tokens\":0,\"e2e_latency\":0.01}}}}"
    )
}

#[divan::bench]
fn splice_512_logprobs(bencher: Bencher<'_, '_>) {
    let (prompt, output) = (logprobs(512), logprobs(16));
    let prefill = Bytes::from(generate_response(&prompt, "[]"));
    let decode = Bytes::from(generate_response("[]", &output));
    assert!(internals::splice_body(&prefill, &decode) > prompt.len() + output.len());
    bencher
        .counter(BytesCount::new(prefill.len() + decode.len()))
        .bench_local(|| internals::splice_body(&prefill, &decode));
}

#[divan::bench]
fn splice_512_logprobs_into_16_events(bencher: Bencher<'_, '_>) {
    let event = |prompt: &str, tokens| format!("data: {}\n\n", generate_response(prompt, &logprobs(tokens)));
    let done = "data: [DONE]\n\n".to_owned();
    let prompt = logprobs(512);
    let prefill = Bytes::from(event(&prompt, 1) + &done);
    let frames: Vec<_> = (1..=16).map(|tokens| event("[]", tokens)).chain([done]).map(Bytes::from).collect();
    let decode_length = frames.iter().map(Bytes::len).sum::<usize>();
    // Every event gets the list in place of its `[]`.
    let expected = decode_length + 16 * (prompt.len() - "[]".len());
    assert_eq!(internals::splice_stream(&prefill, &frames), expected);
    bencher
        .counter(BytesCount::new(prefill.len() + decode_length))
        .bench_local(|| internals::splice_stream(&prefill, &frames));
}
