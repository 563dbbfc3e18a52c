//! How long a client may take: for a request head, within a body, between requests, and to read a response.

mod kit;

use std::time::Duration;

use kit::raw::{Setup, assert_final_error, read_to_end, send_and_read_to_end};
use kit::{Client, Gate, Router, STREAM_HEAD, ScriptedServer, Step, chunk, json, with_timeout};
use mini_lb::MiniLbConfig;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{Instant, sleep};

const GOOD: &str = r#"{"text":"a"}"#;
/// Over soon, so that a test waits for it.
const SHORT: Duration = Duration::from_millis(300);
/// Longer than any test.
const LONG: Duration = Duration::from_secs(60);

/// The timeouts for a request head, between two reads of a body, and between two requests.
fn timeouts(head: Duration, body: Duration, idle: Duration) -> impl FnOnce(MiniLbConfig) -> MiniLbConfig {
    move |config| config.request_head_timeout(head).request_body_idle_timeout(body).client_idle_timeout(idle)
}

async fn post(client: &mut Client) {
    assert_eq!(client.post("/generate", GOOD).await.status(), 200);
}

// Request heads and idle connections.

#[tokio::test]
async fn idle_connections_are_closed_without_a_response() {
    // Longer than any of these clients may be held up between two of its steps by a busy machine.
    let setup = Setup::start(timeouts(LONG, LONG, SHORT * 3)).await;
    let mut clients = Vec::new();
    for number in 0..200 {
        let mut client = setup.router.client().await;
        match number % 4 {
            0 => {}
            1 => assert_eq!(client.get("/health").await.status(), 200),
            2 => post(&mut client).await,
            // A body in another packet than its head.
            _ => {
                client.send("POST /generate HTTP/1.1\r\nhost: r\r\ncontent-length: 12\r\n\r\n").await;
                client.send(GOOD).await;
                assert_eq!(client.response().await.status(), 200);
            }
        }
        clients.push(client);
    }
    for mut client in clients {
        assert!(client.head_or_eof().await.is_none());
        assert!(!client.has_unread_bytes());
    }
}

#[tokio::test]
async fn idle_timeout_counts_from_the_last_response() {
    let idle = SHORT * 3;
    let setup = Setup::start(timeouts(LONG, LONG, idle)).await;
    let mut client = setup.router.client().await;
    let started = Instant::now();
    // Pauses of a ninth: a busy machine may lengthen them.
    while started.elapsed() < idle * 2 {
        post(&mut client).await;
        sleep(idle / 9).await;
    }
    assert!(client.head_or_eof().await.is_none());
}

#[tokio::test]
async fn client_timeouts_do_not_apply_while_a_response_is_awaited() {
    let gates = [Gate::new(), Gate::new()];
    let steps = {
        let [first, second] = gates.clone();
        move |_: &_| {
            let event = |text| Step::Send(chunk(text));
            let head = Step::Send(STREAM_HEAD.into());
            let end = Step::Send(b"0\r\n\r\n".to_vec());
            vec![
                Step::Wait(first.clone()),
                head,
                event("data: a\n\n"),
                Step::Wait(second.clone()),
                event("b"),
                end,
            ]
        }
    };
    let (prefill, decode) =
        (ScriptedServer::always(json("200 OK", "{}")).await, ScriptedServer::start(steps).await);
    let router = Router::start_with(&[&prefill], &[&decode], timeouts(SHORT, SHORT, SHORT)).await;
    let mut client = router.client().await;
    client.send_request("POST", "/generate", &[], br#"{"text":"a","stream":true}"#).await;
    sleep(SHORT * 3).await;
    gates[0].open();
    client.read_until("data: a").await;
    sleep(SHORT * 3).await;
    gates[1].open();
    let response = client.response().await;
    assert_eq!((response.text(), response.complete), ("data: a\n\nb", true));
    // The connection is still usable.
    post(&mut client).await;
}

#[tokio::test]
async fn slowly_read_response_is_not_cut_off_by_the_idle_timeout() {
    // Small kernel buffers, so that the response waits in the router.
    const SIZE: usize = 300 << 10;
    const KERNEL: usize = 8 << 10;
    let whole = json("200 OK", &"x".repeat(SIZE));
    let (prefill, decode) =
        (ScriptedServer::always(json("200 OK", "{}")).await, ScriptedServer::always(whole).await);
    // Shorter than the whole takes, 30 pauses of a twentieth, and much longer than a pause.
    let idle = SHORT * 3;
    let options = |config| timeouts(SHORT, SHORT, idle)(config).socket_buffer_size(KERNEL);
    let router = Router::start_with(&[&prefill], &[&decode], options).await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(u32::try_from(KERNEL).unwrap()).unwrap();
    let mut socket = socket.connect(router.address()).await.unwrap();
    let request = format!("POST /generate HTTP/1.1\r\nhost: r\r\ncontent-length: 12\r\n\r\n{GOOD}");
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut piece = vec![0; SIZE / 30];
    for _ in 0..30 {
        sleep(idle / 20).await;
        with_timeout("more of the response", socket.read_exact(&mut piece)).await.unwrap();
    }
    assert!(read_to_end(&mut socket).await.ends_with('x'), "the rest, and then the idle timeout");
}

#[tokio::test]
async fn slow_request_head_gets_408() {
    let setup = Setup::start(timeouts(SHORT * 3, LONG, LONG)).await;
    // The router's clock cannot start before this one.
    let started = Instant::now();
    let mut socket = TcpStream::connect(setup.router.address()).await.unwrap();
    let mut response = String::new();
    // Byte by byte, without a pause that would be a timeout by itself.
    for byte in b"POST /generate HTTP/1.1\r\nhost: router\r\n".iter().cycle() {
        let mut buffer = [0; 1024];
        if let Ok(read) = tokio::time::timeout(Duration::from_millis(100), socket.read(&mut buffer)).await {
            response += std::str::from_utf8(&buffer[..read.unwrap()]).unwrap();
            break;
        }
        assert!(started.elapsed() < SHORT * 30, "the head is endless");
        socket.write_all(&[*byte]).await.unwrap();
    }
    response += &read_to_end(&mut socket).await;
    assert!(started.elapsed() >= SHORT * 3);
    assert_final_error(&response, "408 Request Timeout", "request_timeout");
    assert!(response.contains("the rest of the request head did not arrive within 900ms"), "{response}");
}

#[tokio::test]
async fn stalled_request_head_gets_408_at_any_position() {
    let setup = Setup::start(timeouts(SHORT, LONG, LONG)).await;
    let part = "GET /health HT";
    let whole = "GET /health HTTP/1.1\r\nhost: r\r\n\r\n";
    let with_body = format!("POST /generate HTTP/1.1\r\nhost: r\r\ncontent-length: 12\r\n\r\n{GOOD}");
    let behind_a_request = [whole, &with_body, &whole.repeat(3)];
    // hyper does not tell how much of what it has read is behind a request.
    let only_alone =
        kit::skip_on_hyper("a partial head that came with the request before it has the idle timeout");
    let behind = behind_a_request.into_iter().filter(|_| !only_alone);
    for before in ["", "\r\n"].into_iter().chain(behind) {
        // In one write, so that the partial head is read together with what precedes it.
        let all = send_and_read_to_end(&setup.router, format!("{before}{part}")).await;
        let last = &all[all.rfind("HTTP/1.1 ").unwrap()..];
        assert_final_error(last, "408 Request Timeout", "request_timeout");
        assert_eq!(all.matches("HTTP/1.1 200 OK\r\n").count(), before.matches("HTTP/1.1").count());
    }
    // In a write of its own.
    let mut client = setup.router.client().await;
    post(&mut client).await;
    client.send(part).await;
    assert_eq!(client.response().await.status(), 408);
    client.wait_closed().await;
}

#[tokio::test]
async fn head_that_begins_while_a_request_is_in_flight_gets_408() {
    if kit::skip_on_hyper("a partial head that came with the request before it has the idle timeout") {
        return;
    }
    let prefill = ScriptedServer::always(json("200 OK", "{}")).await;
    let gate = Gate::new();
    let script = {
        let gate = gate.clone();
        move |_: &_| vec![Step::Wait(gate.clone()), Step::Send(json("200 OK", "{}"))]
    };
    let decode = ScriptedServer::start(script).await;
    let router = Router::start_with(&[&prefill], &[&decode], timeouts(SHORT, LONG, LONG)).await;
    let mut client = router.client().await;
    client.send(format!("POST /generate HTTP/1.1\r\nhost: r\r\ncontent-length: 12\r\n\r\n{GOOD}")).await;
    decode.wait_for_requests(1).await;
    client.send("GET /health HT").await;
    sleep(SHORT * 2).await;
    gate.open();
    assert_eq!(client.response().await.status(), 200);
    assert_eq!(client.response().await.status(), 408);
}

#[tokio::test]
async fn empty_lines_between_requests_do_not_start_the_head_timeout() {
    let setup = Setup::start(timeouts(SHORT, LONG, SHORT * 6)).await;
    let mut client = setup.router.client().await;
    post(&mut client).await;
    client.send("\r\n").await;
    sleep(SHORT * 2).await;
    post(&mut client).await;
    client.send("\r\n").await;
    assert!(client.head_or_eof().await.is_none());
}

// Request bodies.

#[tokio::test]
async fn slow_body_is_accepted_while_bytes_arrive() {
    // Shorter than the body takes, 12 pauses of a ninth, and much longer than a pause.
    let limit = SHORT * 3;
    let setup = Setup::start(timeouts(limit, limit, limit)).await;
    let mut client = setup.router.client().await;
    client.send("POST /generate HTTP/1.1\r\nhost: r\r\ncontent-length: 12\r\n\r\n").await;
    for byte in GOOD.as_bytes() {
        sleep(limit / 9).await;
        client.send([*byte]).await;
    }
    assert_eq!(client.response().await.status(), 200);
    assert_eq!(setup.decode.only_request().await.json()["text"], "a");
    post(&mut client).await;
}

#[tokio::test]
async fn slow_large_body_is_accepted_while_bytes_arrive() {
    // Shorter than the body takes, 11 pauses of a ninth, and much longer than a pause.
    let limit = SHORT * 3;
    let setup = Setup::start(timeouts(limit, limit, limit)).await;
    let body = format!(r#"{{"text":"{}"}}"#, "a".repeat(300 << 10));
    let mut client = setup.router.client().await;
    client
        .send(format!("POST /generate HTTP/1.1\r\nhost: r\r\ncontent-length: {}\r\n\r\n", body.len()))
        .await;
    for piece in body.as_bytes().chunks(30 << 10) {
        sleep(limit / 9).await;
        client.send(piece).await;
    }
    assert_eq!(client.response().await.status(), 200);
    let seen = setup.decode.only_request().await.body;
    assert!(
        seen.starts_with(body.trim_end_matches('}').as_bytes()) && seen.ends_with(b"}"),
        "the whole body arrives"
    );
    post(&mut client).await;
}

#[tokio::test]
async fn stalled_request_body_gets_408() {
    let setup = Setup::start(timeouts(LONG, SHORT, LONG)).await;
    for (target, begun) in [
        ("/generate", "content-length: 12\r\n\r\n{\"text\""),
        ("/generate", "content-length: 12\r\n\r\n"),
        ("/generate", "content-length: 1000000\r\n\r\n{\"text\""),
        ("/v1/completions", "transfer-encoding: chunked\r\n\r\n3\r\n{\"a\r\n"),
        // A body that no handler reads.
        ("/flush_cache", "content-length: 12\r\n\r\n{"),
    ] {
        let response =
            send_and_read_to_end(&setup.router, format!("POST {target} HTTP/1.1\r\nhost: r\r\n{begun}"))
                .await;
        assert_final_error(&response, "408 Request Timeout", "request_timeout");
        assert!(response.contains("more of the request body did not arrive within 300ms"), "{response}");
    }
    assert!(setup.prefill.requests().is_empty() && setup.decode.requests().is_empty());
}

#[tokio::test]
async fn a_body_that_drips_gets_408_after_its_time_as_a_whole() {
    let whole = SHORT * 3;
    let drips = |config| timeouts(LONG, LONG, LONG)(config).request_body_timeout(whole);
    let setup = Setup::start(drips).await;
    // The last one is discarded, after its error.
    for (begun, byte, is_rejected) in [
        ("content-length: 1000000\r\n\r\n{\"text\":\"", "a", false),
        ("transfer-encoding: chunked\r\n\r\n9\r\n{\"text\":\"\r\n", "1\r\na\r\n", false),
        ("content-length: 1000000\r\n\r\nnonsense", "a", true),
    ] {
        let mut client = setup.router.client().await;
        let started = Instant::now();
        client.send(format!("POST /generate HTTP/1.1\r\nhost: r\r\n{begun}")).await;
        if is_rejected {
            assert_eq!(client.response().await.error_code(), "invalid_json");
        }
        // Without a pause that would be a timeout by itself.
        let end = loop {
            assert!(started.elapsed() < whole * 20, "{begun}: the body is endless");
            match tokio::time::timeout(SHORT / 10, client.head_or_eof()).await {
                Ok(end) => break end,
                Err(_) => drop(client.try_send(byte.as_bytes()).await),
            }
        };
        assert!(started.elapsed() >= whole, "{begun}");
        let Some(head) = end else {
            assert!(is_rejected, "{begun}: the connection ends without a response");
            continue;
        };
        let response = client.finish_response(head).await;
        assert_eq!((response.status(), response.error_code()), (408, "request_timeout".into()));
        assert!(response.text().contains("the whole request body did not arrive within 900ms"), "{begun}");
    }
    assert!(setup.prefill.requests().is_empty() && setup.decode.requests().is_empty());
}

#[tokio::test]
async fn unread_response_is_cut_off_after_the_idle_timeout() {
    // More than the kernel buffers for a client that does not read.
    const SIZE: usize = 8 << 20;
    let endless = |_: &_| {
        let chunk = format!("{:x}\r\n{}\r\n", 64 << 10, "x".repeat(64 << 10));
        let chunks = (0..SIZE / (64 << 10)).map(|_| Step::Send(chunk.clone().into_bytes()));
        std::iter::once(Step::Send(STREAM_HEAD.into())).chain(chunks).chain([Step::Hang]).collect()
    };
    for step in ["stream", "whole"] {
        let (prefill, decode) = (
            ScriptedServer::always(json("200 OK", "{}")).await,
            match step {
                "stream" => ScriptedServer::start(endless).await,
                _ => ScriptedServer::always(json("200 OK", &"x".repeat(SIZE))).await,
            },
        );
        let router = Router::start_with(&[&prefill], &[&decode], timeouts(LONG, LONG, SHORT)).await;
        let mut client = router.client().await;
        // Before the answer begins, and so before the idle time does.
        let started = Instant::now();
        client.send_request("POST", "/generate", &[], GOOD.as_bytes()).await;
        decode.wait_for_requests(1).await;
        // The backend connection is closed although the client is still connected.
        decode.wait_closed(1).await;
        assert!(started.elapsed() >= SHORT, "{step}: {:?}", started.elapsed());
    }
}
