//! Servers' answers: taken out of their framing, split into events, and given the
//! prompt's logprobs.

use bytes::Bytes;
use divan::Bencher;
use divan::counter::BytesCount;
use mini_lb::internals;

/// A stream as a decode server sends it, an event a frame.
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

fn answer(headers: &str, body: &[u8]) -> Bytes {
    let head =
        format!("HTTP/1.1 200 OK\r\ndate: Sun, 22 Nov 2026 00:00:00 GMT\r\nserver: uvicorn\r\n{headers}");
    [head.as_bytes(), b"\r\n\r\n", body].concat().into()
}

fn chunk(event: &Bytes) -> Bytes {
    [format!("{:x}\r\n", event.len()).as_bytes(), event, b"\r\n"].concat().into()
}

#[divan::bench]
fn read_answer_300b(bencher: Bencher<'_, '_>) {
    let headers = "content-length: 300\r\ncontent-type: application/json";
    let answer = [answer(headers, &[b'x'; 300])];
    bencher.bench_local(|| internals::read_answer(&answer));
}

/// Each event is a chunk, and is read by itself.
#[divan::bench]
fn read_answer_of_64_events(bencher: Bencher<'_, '_>) {
    let headers = "content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked";
    let mut pieces = vec![answer(headers, b"")];
    pieces.extend(events(64).iter().map(chunk));
    pieces.push(Bytes::from_static(b"0\r\n\r\n"));
    bencher.counter(length(&pieces)).bench_local(|| internals::read_answer(&pieces));
}

/// Each event is a frame.
#[divan::bench]
fn split_events_of_64_tokens(bencher: Bencher<'_, '_>) {
    let frames = events(64);
    assert_eq!(internals::split_events(&frames), 65);
    bencher.counter(length(&frames)).bench_local(|| internals::split_events(&frames));
}

/// As it comes when nobody waits for it: in frames of 64 KiB.
#[divan::bench]
fn split_events_of_16k_tokens(bencher: Bencher<'_, '_>) {
    let stream = Bytes::from(events(16 << 10).concat());
    let starts = (0..stream.len()).step_by(64 << 10);
    let frames: Vec<_> =
        starts.map(|start| stream.slice(start..stream.len().min(start + (64 << 10)))).collect();
    assert_eq!(internals::split_events(&frames), (16 << 10) + 1);
    bencher.counter(length(&frames)).bench_local(|| internals::split_events(&frames));
}

/// Logprobs of so many tokens.
fn logprobs(tokens: usize) -> String {
    let token = |number: usize| format!("[-{}.{:015},{},null]", number % 9, number * 7_919, number * 31);
    format!("[{}]", (0..tokens).map(token).collect::<Vec<_>>().join(","))
}

/// An answer to `/generate`, with the lists of the prompt's logprobs that prefill has, and decode has not.
fn generated(prompt: &str, output: &str) -> String {
    format!(
        "{{\"text\":\" a token\",\"output_ids\":[264,4037],\"meta_info\":{{\"id\":\"7c1e\",\"finish_reason\":null,\
         \"prompt_tokens\":512,\"input_token_logprobs\":{prompt},\"output_token_logprobs\":{output},\
         \"completion_tokens\":2,\"cached_tokens\":0,\"e2e_latency\":0.01}}}}"
    )
}

#[divan::bench]
fn splice_512_tokens(bencher: Bencher<'_, '_>) {
    let (prompt, output) = (logprobs(512), logprobs(16));
    let prefill = Bytes::from(generated(&prompt, "[]"));
    let decode = Bytes::from(generated("[]", &output));
    assert!(internals::splice_body(&prefill, &decode) > prompt.len() + output.len());
    bencher
        .counter(BytesCount::new(prefill.len() + decode.len()))
        .bench_local(|| internals::splice_body(&prefill, &decode));
}

#[divan::bench]
fn splice_512_tokens_into_16_events(bencher: Bencher<'_, '_>) {
    let event = |prompt: &str, tokens| format!("data: {}\n\n", generated(prompt, &logprobs(tokens)));
    let done = "data: [DONE]\n\n".to_owned();
    let prompt = logprobs(512);
    let prefill = Bytes::from(event(&prompt, 1) + &done);
    let frames: Vec<_> = (1..=16).map(|tokens| event("[]", tokens)).chain([done]).map(Bytes::from).collect();
    let decodes = frames.iter().map(Bytes::len).sum::<usize>();
    assert!(internals::splice_stream(&prefill, &frames) > decodes + prompt.len() - 10);
    bencher
        .counter(BytesCount::new(prefill.len() + decodes))
        .bench_local(|| internals::splice_stream(&prefill, &frames));
}
