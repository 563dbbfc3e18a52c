//! One request over loopback sockets: directly to a server, and through the router to a pair.
//!
//! `cargo bench --bench loopback`. The difference is the latency that the router adds when nothing else runs:
//! a second pair of sockets, a second leg, and its own work. It shows nothing of throughput.

use divan::Bencher;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::body::Bytes;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use loadtest::sim::{Role, Sim, SimConfig, SimPair};
use mini_lb::{MiniLbConfig, MiniLoadBalancer};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;

const BODY: &str = r#"{"model":"tiny","messages":[{"role":"user","content":"hello"}],"max_tokens":1}"#;

fn main() {
    divan::main();
}

/// A server of `role`. It does not record its requests: the record would grow with each sample.
fn config(role: Role) -> SimConfig {
    SimConfig { role, record: false, ..SimConfig::default() }
}

#[divan::bench]
fn chat_300b_direct(bencher: Bencher<'_, '_>) {
    let runtime = Runtime::new().expect("a runtime");
    let server = runtime.block_on(Sim::start(config(Role::Regular))).expect("a free port");
    measure(bencher, &runtime, &server.addr().to_string());
}

#[divan::bench]
fn chat_300b_routed(bencher: Bencher<'_, '_>) {
    let runtime = Runtime::new().expect("a runtime");
    let pair = SimPair::start(config(Role::Prefill), config(Role::Decode));
    let pair = runtime.block_on(pair).expect("free ports");
    let prefill = vec![(pair.prefill.url(), pair.prefill.bootstrap_port())];
    let router = MiniLbConfig::new("127.0.0.1", 30_000, prefill, vec![pair.decode.url()], 60)
        // One connection is served by one worker in any case.
        .worker_threads(1);
    let router = MiniLoadBalancer::new(router).expect("a valid configuration");
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a free port");
    let address = listener.local_addr().expect("a bound address").to_string();
    runtime.spawn(async move { router.serve(listener, std::future::pending()).await });
    measure(bencher, &runtime, &address);
}

fn measure(bencher: Bencher<'_, '_>, runtime: &Runtime, address: &str) {
    let mut sender = runtime.block_on(connect(address));
    bencher.bench_local(|| runtime.block_on(exchange(&mut sender)));
}

async fn connect(address: &str) -> SendRequest<Full<Bytes>> {
    let stream = TcpStream::connect(address).await.expect("a listening server");
    stream.set_nodelay(true).expect("TCP_NODELAY");
    let (sender, connection) = handshake(TokioIo::new(stream)).await.expect("an HTTP connection");
    tokio::spawn(connection);
    sender
}

async fn exchange(sender: &mut SendRequest<Full<Bytes>>) {
    let request = Request::post("/v1/chat/completions")
        .header("host", "bench")
        .header("content-type", "application/json")
        .body(Full::from(BODY))
        .expect("a request");
    sender.ready().await.expect("an open connection");
    let response = sender.send_request(request).await.expect("a response");
    assert!(response.status().is_success());
    response.into_body().collect().await.expect("a complete body");
}
