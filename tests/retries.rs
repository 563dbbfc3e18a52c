//! A request is sent again only if no server can have seen it.

mod kit;

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use kit::{Gate, Router, Step, Upstream, json};
use mini_lb::{MiniLbConfig, RoundRobin};

const BODY: &str = r#"{"text":"a"}"#;
const OK: &str = r#"{"text":"hi"}"#;

async fn answering() -> Upstream {
    Upstream::always(json("200 OK", OK)).await
}

/// A server that nobody can reach.
async fn gone() -> Upstream {
    let server = answering().await;
    server.stop_listening().await;
    server
}

#[tokio::test]
async fn a_server_that_cannot_be_reached_is_left_for_another() {
    for role in ["prefill", "decode"] {
        let (gone, spare, partner) = (gone().await, answering().await, answering().await);
        let both = [&gone, &spare];
        let (prefill, decode): (&[&Upstream], &[&Upstream]) =
            if role == "prefill" { (&both, &[&partner]) } else { (&[&partner], &both) };
        // In turns: the first choice is the one that is gone, again and again.
        let router = Router::start_with(prefill, decode, |config| config.policy(RoundRobin::default)).await;
        let mut client = router.client().await;
        for _ in 0..10 {
            assert_eq!(client.post("/generate", BODY).await.status(), 200, "{role}");
        }
        router.idle().await;
        // The partner never sees a room twice, whichever attempt it was.
        let rooms: HashSet<u64> =
            partner.seen().iter().map(|seen| seen.json()["bootstrap_room"].as_u64().unwrap()).collect();
        assert_eq!(rooms.len(), partner.seen().len(), "{role}");
    }
}

#[tokio::test]
async fn a_retry_has_the_same_bytes_but_for_the_room() {
    let (gone, spare, decode) = (gone().await, answering().await, answering().await);
    let router = Router::start_with(&[&gone, &spare], &[&decode], |config| {
        config.prefill_policy(RoundRobin::default())
    })
    .await;
    let body = r#"{ "text":"a", "bootstrap_room":1, "x":1.0 }"#;
    assert_eq!(router.client().await.post("/generate?q=1", body).await.status(), 200);
    let sent = String::from_utf8(spare.only().await.body).unwrap();
    assert!(sent.starts_with(r#"{ "text":"a", "x":1.0 ,"bootstrap_host":"#), "{sent}");
    assert_eq!(spare.only().await.target(), "/generate?q=1");
}

#[tokio::test]
async fn retries_are_bounded_and_can_be_switched_off() {
    for (retries, tries) in [(0, 1), (1, 2), (3, 4)] {
        let (prefill, gone) = (Upstream::start(|_| vec![Step::Hang]).await, gone().await);
        let router = Router::start_with(&[&prefill], &[&gone], |config| config.max_retries(retries)).await;
        let answer = router.client().await.post("/generate", BODY).await;
        assert_eq!((answer.status(), answer.code()), (502, "decode_connect".into()));
        // Each try has opened a connection to prefill, or was over before that.
        assert!(prefill.opened() <= tries, "{} of {tries}", prefill.opened());
    }
}

#[tokio::test]
async fn what_a_server_may_have_seen_is_not_sent_again() {
    for step in [Step::Close, Step::Reset, Step::Send(b"garbage\r\n\r\n".to_vec())] {
        let prefill = Upstream::start(|_| vec![Step::Hang]).await;
        let decode = Upstream::start(move |_| vec![step.clone(), Step::Close]).await;
        let router = Router::start(&[&prefill], &[&decode]).await;
        assert_eq!(router.client().await.post("/generate", BODY).await.status(), 502);
        assert_eq!(decode.seen().len(), 1);
    }
}

#[tokio::test]
async fn a_kept_connection_that_answers_in_part_is_not_tried_again() {
    let turn = AtomicUsize::new(0);
    let decode = Upstream::start(move |_| match turn.fetch_add(1, Ordering::SeqCst) {
        0 => vec![Step::Send(json("200 OK", OK))],
        _ => vec![Step::Send(b"HTTP/1.1 2".to_vec()), Step::Close],
    })
    .await;
    let prefill = answering().await;
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    assert_eq!(client.post("/generate", BODY).await.status(), 200);
    router.idle().await;
    assert_eq!(client.post("/generate", BODY).await.code(), "decode_closed");
    assert_eq!((decode.opened(), decode.seen().len()), (1, 2));
}

/// A server that is so busy that the kernel takes no more connections for it.
fn full() -> (socket2::Socket, Vec<std::net::TcpStream>, String) {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    socket.listen(0).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    // Whoever comes when the queue is full gets no answer at all.
    let connect = || std::net::TcpStream::connect_timeout(&address, Duration::from_millis(200)).ok();
    let waiting: Vec<_> = std::iter::from_fn(connect).take(16).collect();
    assert!(waiting.len() < 16, "the queue is never full");
    (socket, waiting, format!("http://{address}"))
}

#[tokio::test]
async fn a_server_that_takes_no_connection_in_time_is_a_504_and_its_partner_is_told() {
    for role in ["prefill", "decode"] {
        let (_socket, _waiting, url) = full();
        let partner = Upstream::start(|_| vec![Step::Hang]).await;
        let (prefill, decode) = if role == "prefill" { (url, partner.url()) } else { (partner.url(), url) };
        let config = MiniLbConfig::new("127.0.0.1", 1, vec![(prefill, None)], vec![decode], 60)
            .connect_timeout(Duration::from_millis(200));
        let router = Router::serve(config).await;
        let answer = router.client().await.post("/generate", BODY).await;
        assert_eq!((answer.status(), answer.code()), (504, format!("{role}_connect_timeout")));
        partner.closed(partner.opened()).await;
    }
}

const BUSY: &str = r#"{"object":"error","message":"busy"}"#;

/// A server that has too much to do.
async fn busy() -> Upstream {
    Upstream::always(json("503 Service Unavailable", BUSY)).await
}

#[tokio::test]
async fn a_status_is_sent_again_only_if_it_is_named() {
    for (named, expected) in [(vec![], 503), (vec![429, 500], 503), (vec![429, 503], 200)] {
        for role in ["prefill", "decode"] {
            let (busy, spare) = (busy().await, answering().await);
            // No decode server has an answer before prefill has; this one would be done as soon as the refusal comes.
            let later = [Step::Pause(Duration::from_millis(500)), Step::Send(json("200 OK", "{}"))];
            let partner = Upstream::start(move |_| later.to_vec()).await;
            let both = [&busy, &spare];
            let (prefill, decode): (&[&Upstream], &[&Upstream]) =
                if role == "prefill" { (&both, &[&partner]) } else { (&[&partner], &both) };
            let options =
                |config: MiniLbConfig| config.policy(RoundRobin::default).retry_on_status(named.clone());
            let router = Router::start_with(prefill, decode, options).await;
            let answer = router.client().await.post("/generate", BODY).await;
            assert_eq!(answer.status(), expected, "{role} {named:?}");
            router.idle().await;
            assert_eq!(busy.seen().len(), 1, "{role} {named:?}");
            // The partner of a new attempt gets a new room.
            let rooms: HashSet<u64> =
                partner.seen().iter().map(|seen| seen.json()["bootstrap_room"].as_u64().unwrap()).collect();
            assert_eq!(rooms.len(), partner.seen().len(), "{role} {named:?}");
        }
    }
}

#[tokio::test]
async fn a_status_is_sent_again_as_often_as_other_failures_and_the_last_is_the_answer() {
    let (prefill, decode) = (Upstream::start(|_| vec![Step::Hang]).await, busy().await);
    let router =
        Router::start_with(&[&prefill], &[&decode], |config| config.retry_on_status([503]).max_retries(2))
            .await;
    let answer = router.client().await.post("/generate", BODY).await;
    assert_eq!((answer.status(), answer.text()), (503, BUSY));
    assert_eq!(decode.seen().len(), 3);
    // Each attempt's other leg is closed, the first ones before the next begins.
    prefill.closed(prefill.opened()).await;
}

#[tokio::test]
async fn a_stream_that_has_begun_is_not_sent_again() {
    let prefill = Upstream::start(|_| vec![Step::Wait(Gate::new())]).await;
    let decode = Upstream::start(|_| {
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
        vec![Step::Send(head.into()), Step::Send(b"a\r\ndata: {}\n\n\r\n".to_vec()), Step::Close]
    })
    .await;
    let options = |config: MiniLbConfig| config.retry_on_status([502, 503]).max_retries(3);
    let router = Router::start_with(&[&prefill], &[&decode], options).await;
    let answer = router.client().await.post("/generate", BODY).await;
    assert!(answer.status() == 200 && !answer.complete);
    assert_eq!(decode.seen().len(), 1);
}

/// The race of every keep-alive pool: the server closes an idle connection just as a request is sent on it.
#[tokio::test]
async fn servers_that_close_idle_connections_at_a_bad_moment_fail_no_request() {
    let closing = || {
        let turn = AtomicUsize::new(0);
        Upstream::start(move |_| {
            let pause = Duration::from_millis(turn.fetch_add(1, Ordering::SeqCst) as u64 % 5);
            vec![Step::Send(json("200 OK", OK)), Step::CloseAfter(pause)]
        })
    };
    let (prefill, decode) = (closing().await, closing().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    for count in 0..1_000_u64 {
        assert_eq!(client.post("/generate", BODY).await.status(), 200, "request {count}");
        // Each moment of the race comes to pass: time is what is tested.
        tokio::time::sleep(Duration::from_micros(count * 37 % 5_000)).await;
    }
}
