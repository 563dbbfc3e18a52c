//! Images, audio and video: both servers get the client's bytes, whatever their size.

mod kit;

use kit::media::{base64, data_uri, mp4, png, wav};
use kit::{Router, RouterProcess, ScriptedServer, ok_server};
use serde_json::{Value, json};

/// One body for each way to send media, with its path.
fn bodies() -> Vec<(&'static str, Value)> {
    let image = data_uri("image/png", &png(64, 64));
    let (sound, film) = (data_uri("audio/wav", &wav()), data_uri("video/mp4", &mp4()));
    let parts = json!([
        { "type": "text", "text": "What is \"image_url\"? ü" },
        { "type": "image_url", "image_url": { "url": image, "detail": "high" } },
        { "type": "video_url", "video_url": { "url": film } },
        { "type": "audio_url", "audio_url": { "url": sound } },
        { "type": "input_audio", "input_audio": { "data": base64(&wav()), "format": "wav" } },
    ]);
    let input = json!([{ "role": "user", "content": [
        { "type": "input_text", "text": "t" }, { "type": "input_image", "image_url": image },
    ] }]);
    let source = json!({ "type": "base64", "media_type": "image/png", "data": base64(&png(8, 8)) });
    let blocks = json!([{ "type": "image", "source": source }, { "type": "text", "text": "t" }]);
    vec![
        ("/v1/chat/completions", json!({ "model": "m", "messages": [{ "role": "user", "content": parts }] })),
        ("/v1/responses", json!({ "model": "m", "input": input, "request_id": "r" })),
        (
            "/v1/messages",
            json!({ "model": "m", "max_tokens": 1, "messages": [{ "role": "user", "content": blocks }] }),
        ),
        ("/generate", json!({ "text": "<image>", "image_data": image })),
        (
            "/generate",
            json!({ "text": ["a", "b"], "image_data": [[image], [image, image]], "video_data": [null, film],
                    "audio_data": [sound, null] }),
        ),
    ]
}

/// Checks that a server has got exactly this body with the three fields behind it.
async fn assert_unchanged(server: &ScriptedServer, sent: &str, number: usize) {
    server.wait_for_requests(number + 1).await;
    let received = server.requests().swap_remove(number).body;
    let end = sent.len() - 1;
    // Not compared by `assert_eq`, which would print megabytes.
    assert!(received[..end] == sent.as_bytes()[..end], "the client's bytes");
    let added = std::str::from_utf8(&received[end..]).expect("UTF-8");
    let (fields, room) = added.rsplit_once(':').expect("the room");
    assert_eq!(fields, r#","bootstrap_host":"127.0.0.1","bootstrap_port":8998,"bootstrap_room""#);
    assert!(room.trim_end_matches('}').parse::<u64>().is_ok_and(|room| room > 0), "{added}");
}

#[tokio::test]
async fn media_go_through_both_legs_unchanged() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    for (number, (path, body)) in bodies().into_iter().enumerate() {
        // `\/` is the same to a parser, and must stay as it is.
        let written = body.to_string().replace("data:image/", "data:image\\/");
        assert_eq!(client.post(path, &written).await.status(), 200, "{path}");
        assert_unchanged(&prefill, &written, number).await;
        assert_unchanged(&decode, &written, number).await;
    }
}

/// Peak resident memory of a process, in bytes.
fn peak_memory(process: &RouterProcess) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.id())).expect("the process runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("VmHWM");
    line.split_whitespace().next().and_then(|kib| kib.parse::<usize>().ok()).expect("a number") << 10
}

#[tokio::test]
async fn a_body_of_32_megabytes_is_held_once_and_sent_twice() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let process = RouterProcess::between(&prefill, &decode, &[]).await;
    let image = data_uri("image/png", &png(1_000, 1_000));
    let part = json!({ "type": "image_url", "image_url": { "url": image } });
    let message = json!({ "role": "user", "content": vec![part; 25] });
    let body = json!({ "model": "m", "messages": [message] }).to_string();
    assert!(body.len() > 32_000_000, "{}", body.len());
    let before = peak_memory(&process);
    let mut client = process.client().await;
    for number in 0..2 {
        assert_eq!(client.post("/v1/chat/completions", &body).await.status(), 200);
        assert_unchanged(&prefill, &body, number).await;
        assert_unchanged(&decode, &body, number).await;
    }
    let grown = peak_memory(&process) - before;
    // Once, with what the allocator keeps of the first. Twice would be a copy for each server.
    println!("{} MB more for {} MB", grown / 1_000_000, body.len() / 1_000_000);
    assert!(grown < body.len() * 7 / 4, "{} MB more for {} MB", grown / 1_000_000, body.len() / 1_000_000);
}
