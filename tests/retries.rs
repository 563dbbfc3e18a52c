//! A request is retried only if no backend can have read it, or for statuses that are configured.

mod kit;

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use kit::{Gate, OK, Router, ScriptedServer, Step, json, ok_server};
use mini_lb::{MiniLbConfig, RoundRobin};

const BODY: &str = r#"{"text":"a"}"#;

/// A server on whose port nothing listens.
async fn unreachable_server() -> ScriptedServer {
    let server = ok_server().await;
    server.stop_listening().await;
    server
}

#[tokio::test]
async fn unreachable_backend_is_retried_on_another() {
    for role in ["prefill", "decode"] {
        let (gone, spare, partner) = (unreachable_server().await, ok_server().await, ok_server().await);
        let both = [&gone, &spare];
        let (prefill, decode): (&[&ScriptedServer], &[&ScriptedServer]) =
            if role == "prefill" { (&both, &[&partner]) } else { (&[&partner], &both) };
        // In turns, so that the first choice is often the one that is gone.
        let router = Router::start_with(prefill, decode, |config| config.policy(RoundRobin::default)).await;
        let mut client = router.client().await;
        for _ in 0..10 {
            assert_eq!(client.post("/generate", BODY).await.status(), 200, "{role}");
        }
        router.wait_idle().await;
        // No attempt reuses a bootstrap room.
        let rooms: HashSet<u64> =
            partner.requests().iter().map(|seen| seen.json()["bootstrap_room"].as_u64().unwrap()).collect();
        assert_eq!(rooms.len(), partner.requests().len(), "{role}");
    }
}

#[tokio::test]
async fn retry_sends_the_same_bytes_but_for_the_bootstrap_room() {
    let (gone, spare, decode) = (unreachable_server().await, ok_server().await, ok_server().await);
    let router = Router::start_with(&[&gone, &spare], &[&decode], |config| {
        config.prefill_policy(RoundRobin::default())
    })
    .await;
    let body = r#"{ "text":"a", "bootstrap_room":1, "x":1.0 }"#;
    assert_eq!(router.client().await.post("/generate?q=1", body).await.status(), 200);
    let sent = String::from_utf8(spare.only_request().await.body).unwrap();
    assert!(sent.starts_with(r#"{ "text":"a", "x":1.0 ,"bootstrap_host":"#), "{sent}");
    assert_eq!(spare.only_request().await.target(), "/generate?q=1");
}

#[tokio::test]
async fn retries_are_bounded_and_can_be_disabled() {
    for (retries, tries) in [(0, 1), (1, 2), (3, 4)] {
        let (prefill, gone) = (ScriptedServer::start(|_| vec![Step::Hang]).await, unreachable_server().await);
        let router = Router::start_with(&[&prefill], &[&gone], |config| config.max_retries(retries)).await;
        let response = router.client().await.post("/generate", BODY).await;
        assert_eq!((response.status(), response.error_code()), (502, "decode_connect".into()));
        // An attempt may fail before it connects to prefill.
        assert!(prefill.connections() <= tries, "{} of {tries}", prefill.connections());
    }
}

#[tokio::test]
async fn request_a_backend_may_have_read_is_not_retried() {
    for step in [Step::Close, Step::Reset, Step::Send(b"garbage\r\n\r\n".to_vec())] {
        let prefill = ScriptedServer::start(|_| vec![Step::Hang]).await;
        let decode = ScriptedServer::start(move |_| vec![step.clone(), Step::Close]).await;
        let router = Router::start(&[&prefill], &[&decode]).await;
        assert_eq!(router.client().await.post("/generate", BODY).await.status(), 502);
        assert_eq!(decode.requests().len(), 1);
    }
}

#[tokio::test]
async fn partial_response_on_a_reused_connection_is_not_retried() {
    let turn = AtomicUsize::new(0);
    let decode = ScriptedServer::start(move |_| match turn.fetch_add(1, Ordering::SeqCst) {
        0 => vec![Step::Send(json("200 OK", OK))],
        _ => vec![Step::Send(b"HTTP/1.1 2".to_vec()), Step::Close],
    })
    .await;
    let prefill = ok_server().await;
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    assert_eq!(client.post("/generate", BODY).await.status(), 200);
    router.wait_idle().await;
    assert_eq!(client.post("/generate", BODY).await.error_code(), "decode_closed");
    assert_eq!((decode.connections(), decode.requests().len()), (1, 2));
}

/// A server whose accept queue is full, so that the kernel accepts no more connections.
fn full_backlog() -> (socket2::Socket, Vec<std::net::TcpStream>, String) {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    socket.listen(0).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    // A SYN gets no reply when the queue is full.
    let connect = || std::net::TcpStream::connect_timeout(&address, Duration::from_millis(200)).ok();
    let waiting: Vec<_> = std::iter::from_fn(connect).take(16).collect();
    assert!(waiting.len() < 16, "the queue is never full");
    (socket, waiting, format!("http://{address}"))
}

#[tokio::test]
async fn connect_timeout_is_504_and_the_partner_gets_nothing() {
    for role in ["prefill", "decode"] {
        let (_socket, _waiting, url) = full_backlog();
        let partner = ok_server().await;
        let (prefill, decode) = if role == "prefill" { (url, partner.url()) } else { (partner.url(), url) };
        let config = MiniLbConfig::new("127.0.0.1", 1, vec![(prefill, None)], vec![decode], 60)
            .connect_timeout(Duration::from_millis(200))
            .max_retries(1);
        let router = Router::start_with_config(config).await;
        let response = router.client().await.post("/generate", r#"{"text":"a","rid":"mine"}"#).await;
        assert_eq!((response.status(), response.error_code()), (504, format!("{role}_connect_timeout")));
        // Nothing was written, so the connection is still good: the second attempt uses it again.
        assert_eq!((partner.requests().len(), partner.connections()), (0, 1), "{role}");
        assert_eq!(partner.closed_connections(), 0, "{role}");
    }
}

/// An idle connection that its server closes while the other leg's connection is opened.
#[tokio::test]
async fn connection_closed_while_its_partner_connects_is_replaced() {
    let (socket, waiting, url) = full_backlog();
    let prefill = ScriptedServer::start(|seen| {
        let idle = if seen.json()["text"] == "first" { 100 } else { 10_000 };
        vec![Step::Send(json("200 OK", OK)), Step::CloseAfter(Duration::from_millis(idle))]
    })
    .await;
    let decode = ok_server().await;
    let servers = |decode: Vec<String>| {
        MiniLbConfig::new("127.0.0.1", 1, vec![(prefill.url(), None)], decode, 60)
            .worker_threads(1)
            .health_checks(false)
    };
    let router = Router::start_with_config(servers(vec![decode.url()])).await;
    let mut client = router.client().await;
    assert_eq!(client.post("/generate", r#"{"text":"first"}"#).await.status(), 200);
    // From now on decode is the server that accepts nothing, until its queue is emptied.
    router.reload(servers(vec![url])).expect("decode changes");
    let response = tokio::spawn(async move { client.post("/generate", r#"{"text":"second"}"#).await });
    prefill.wait_closed(1).await;
    drop(waiting);
    socket.set_nonblocking(true).unwrap();
    let listener = tokio::net::TcpListener::from_std(socket.into()).unwrap();
    tokio::spawn(async move {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        while let Ok((mut accepted, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut request = [0; 4096];
                // The connections that filled the queue send nothing.
                while accepted.read(&mut request).await.is_ok_and(|count| count > 0) {
                    let _ = accepted.write_all(&json("200 OK", OK)).await;
                }
            });
        }
    });
    assert_eq!(response.await.unwrap().status(), 200);
    assert_eq!((prefill.requests().len(), prefill.connections()), (2, 2));
}

/// A server that ends the connection `delay` after a request with the text "kills".
async fn server_that_dies(delay: Duration) -> ScriptedServer {
    ScriptedServer::start(move |seen| match &seen.json()["text"] {
        text if text == "kills" => vec![Step::Pause(delay), Step::Close],
        _ => vec![Step::Send(json("200 OK", OK))],
    })
    .await
}

/// A server that never answers a request with the text "kills".
async fn server_that_waits() -> ScriptedServer {
    ScriptedServer::start(|seen| match &seen.json()["text"] {
        text if text == "kills" => vec![Step::Hang],
        _ => vec![Step::Send(json("200 OK", OK))],
    })
    .await
}

/// How many requests with the text "kills" these servers got.
fn killing(servers: &[&ScriptedServer]) -> usize {
    let all = servers.iter().flat_map(|server| server.requests());
    all.filter(|seen| seen.json()["text"] == "kills").count()
}

const KILLS: &str = r#"{"text":"kills"}"#;

#[tokio::test]
async fn request_that_may_have_run_is_never_sent_again() {
    for role in ["prefill", "decode"] {
        let delay = Duration::from_millis(300);
        let (first, second) = (server_that_dies(delay).await, server_that_dies(delay).await);
        let (third, fourth) = (server_that_waits().await, server_that_waits().await);
        let (dying, waiting) = ([&first, &second], [&third, &fourth]);
        let (prefill, decode) = if role == "prefill" { (dying, waiting) } else { (waiting, dying) };
        let options = |config: MiniLbConfig| config.policy(RoundRobin::default).max_retries(3);
        let router = Router::start_with(&prefill, &decode, options).await;
        let mut client = router.client().await;
        // So that each server has a kept-alive connection.
        for _ in 0..4 {
            assert_eq!(client.post("/generate", BODY).await.status(), 200);
            router.wait_idle().await;
        }
        let response = client.post("/generate", KILLS).await;
        assert_eq!((response.status(), response.error_code()), (502, format!("{role}_closed")));
        assert_eq!((killing(&prefill), killing(&decode)), (1, 1), "{role}");
    }
}

#[tokio::test]
async fn idle_close_race_goes_to_the_same_server_once() {
    for role in ["prefill", "decode"] {
        let turn = AtomicUsize::new(0);
        let racing = ScriptedServer::start(move |_| match turn.fetch_add(1, Ordering::SeqCst) {
            1 => vec![Step::Close],
            _ => vec![Step::Send(json("200 OK", OK))],
        })
        .await;
        // Late, so that it does not settle the response before the race is noticed.
        let late = [Step::Pause(Duration::from_millis(200)), Step::Send(json("200 OK", OK))];
        let partner = ScriptedServer::start(move |_| late.to_vec()).await;
        let (prefill, decode) = if role == "prefill" { (&racing, &partner) } else { (&partner, &racing) };
        let router = Router::start_with(&[prefill], &[decode], |config| config.max_retries(0)).await;
        let mut client = router.client().await;
        for turn in 0..3 {
            assert_eq!(client.post("/generate", BODY).await.status(), 200, "{role} {turn}");
            router.wait_idle().await;
        }
        // The second request was closed upon and came again, in the same room; its partner got it once.
        assert_eq!((racing.requests().len(), partner.requests().len()), (4, 3), "{role}");
        let rooms: HashSet<u64> =
            racing.requests().iter().map(|seen| seen.json()["bootstrap_room"].as_u64().unwrap()).collect();
        assert_eq!(rooms.len(), 3, "{role}");
        assert_eq!(router.backend(&racing).ended(mini_lb::Outcome::Stale), 1, "{role}");
        assert_eq!(router.backend(&racing).ended(mini_lb::Outcome::Completed), 3, "{role}");
    }
}

/// A server that takes one connection, answers the first request and closes upon the second. It takes no
/// other connection.
async fn server_with_one_connection() -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let (mut accepted, _) = listener.accept().await.unwrap();
        drop(listener);
        let mut request = [0; 4096];
        let _head = accepted.read(&mut request).await.unwrap();
        accepted.write_all(&json("200 OK", OK)).await.unwrap();
        let _next = accepted.read(&mut request).await.unwrap();
    });
    url
}

#[tokio::test]
async fn server_that_is_gone_after_the_idle_close_race_is_a_failure() {
    let (prefill, spare) = (server_that_waits().await, ok_server().await);
    let gone = server_with_one_connection().await;
    let config = |decode| {
        MiniLbConfig::new("127.0.0.1", 1, vec![(prefill.url(), None)], decode, 60)
            .policy(RoundRobin::default)
            .health_checks(false)
            .max_retries(3)
    };
    let router = Router::start_with_config(config(vec![gone.clone()])).await;
    let mut client = router.client().await;
    assert_eq!(client.post("/generate", BODY).await.status(), 200);
    router.wait_idle().await;
    router.reload(config(vec![gone, spare.url()])).expect("a server more");
    // Those that the spare gets succeed; the first that the other gets fails, and goes nowhere else.
    let mut successes = 0;
    let failed = loop {
        let response = client.post("/generate", KILLS).await;
        router.wait_idle().await;
        if response.status() != 200 {
            break response;
        }
        successes += 1;
        assert!(successes < 10, "the other server is never chosen");
    };
    assert_eq!((failed.status(), failed.error_code()), (502, "decode_connect".into()));
    assert_eq!(killing(&[&spare]), successes);
}

const BUSY: &str = r#"{"object":"error","message":"busy"}"#;

/// A server that responds 503.
async fn busy_server() -> ScriptedServer {
    ScriptedServer::always(json("503 Service Unavailable", BUSY)).await
}

#[tokio::test]
async fn only_listed_statuses_are_retried() {
    for (named, expected) in [(vec![], 503), (vec![429, 500], 503), (vec![429, 503], 200)] {
        for role in ["prefill", "decode"] {
            let (busy, spare) = (busy_server().await, ok_server().await);
            // Decode never responds before prefill; without the pause the partner's 200 could win over the
            // 503.
            let later = [Step::Pause(Duration::from_millis(500)), Step::Send(json("200 OK", "{}"))];
            let partner = ScriptedServer::start(move |_| later.to_vec()).await;
            let both = [&busy, &spare];
            let (prefill, decode): (&[&ScriptedServer], &[&ScriptedServer]) =
                if role == "prefill" { (&both, &[&partner]) } else { (&[&partner], &both) };
            let options =
                |config: MiniLbConfig| config.policy(RoundRobin::default).retry_on_status(named.clone());
            let router = Router::start_with(prefill, decode, options).await;
            let response = router.client().await.post("/generate", BODY).await;
            assert_eq!(response.status(), expected, "{role} {named:?}");
            router.wait_idle().await;
            assert_eq!(busy.requests().len(), 1, "{role} {named:?}");
            // A new attempt has a new bootstrap room.
            let rooms: HashSet<u64> = partner
                .requests()
                .iter()
                .map(|seen| seen.json()["bootstrap_room"].as_u64().unwrap())
                .collect();
            assert_eq!(rooms.len(), partner.requests().len(), "{role} {named:?}");
        }
    }
}

#[tokio::test]
async fn status_retries_are_bounded_and_the_last_response_is_returned() {
    let (prefill, decode) = (ScriptedServer::start(|_| vec![Step::Hang]).await, busy_server().await);
    let router =
        Router::start_with(&[&prefill], &[&decode], |config| config.retry_on_status([503]).max_retries(2))
            .await;
    let response = router.client().await.post("/generate", BODY).await;
    assert_eq!((response.status(), response.text()), (503, BUSY));
    assert_eq!(decode.requests().len(), 3);
    // The other leg of each attempt is closed.
    prefill.wait_closed(prefill.connections()).await;
}

#[tokio::test]
async fn started_stream_is_not_retried() {
    let prefill = ScriptedServer::start(|_| vec![Step::Wait(Gate::new())]).await;
    let decode = ScriptedServer::start(|_| {
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
        vec![Step::Send(head.into()), Step::Send(b"a\r\ndata: {}\n\n\r\n".to_vec()), Step::Close]
    })
    .await;
    let options = |config: MiniLbConfig| config.retry_on_status([502, 503]).max_retries(3);
    let router = Router::start_with(&[&prefill], &[&decode], options).await;
    let response = router.client().await.post("/generate", BODY).await;
    assert!(response.status() == 200 && !response.complete);
    assert_eq!(decode.requests().len(), 1);
}

/// The race of every keep-alive pool: the backend closes an idle connection just as a request is sent on it.
#[tokio::test]
async fn stale_idle_connection_is_replaced_without_a_client_error() {
    let closing = || {
        let turn = AtomicUsize::new(0);
        ScriptedServer::start(move |_| {
            let pause = Duration::from_millis(turn.fetch_add(1, Ordering::SeqCst) as u64 % 5);
            vec![Step::Send(json("200 OK", OK)), Step::CloseAfter(pause)]
        })
    };
    let (prefill, decode) = (closing().await, closing().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    for count in 0..1_000_u64 {
        assert_eq!(client.post("/generate", BODY).await.status(), 200, "request {count}");
        // Different delays, to hit every moment of the race.
        tokio::time::sleep(Duration::from_micros(count * 37 % 5_000)).await;
    }
}
