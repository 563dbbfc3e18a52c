//! The shortest way to see mini-lb work, without a GPU and without SGLang: two simulated SGLang servers, the
//! router in front of them, one streamed chat request, and what each of the servers received.
//!
//! ```sh
//! cargo run --example quickstart             # goes on serving until Ctrl-C
//! cargo run --example quickstart -- --once   # ends after the chat
//! ```

mod support;

use std::io::Write as _;
use std::time::Duration;

use loadtest::sim::{Sim, SimConfig, SimPair};
use mini_lb::{MiniLbConfig, MiniLoadBalancer};
use serde_json::Value;
use support::{Events, Result, send};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

const PATH: &str = "/v1/chat/completions";
const CHAT: &str = r#"{"model":"tiny","messages":[{"role":"user","content":"What is a router?"}],"max_tokens":14,"stream":true}"#;

#[tokio::main]
async fn main() -> Result<()> {
    let once = std::env::args().skip(1).any(|arg| arg == "--once");
    let mut interrupt = signal(SignalKind::interrupt())?;

    // Simulated servers that generate at a pace that can be watched.
    let servers = SimPair::start(
        SimConfig::prefill(),
        SimConfig {
            first_token: Duration::from_millis(200),
            inter_token: Duration::from_millis(60),
            ..SimConfig::decode()
        },
    )
    .await?;

    // The router. Each prefill server has a bootstrap port.
    let config = MiniLbConfig::new(
        "127.0.0.1",
        30_000,
        vec![(servers.prefill.url(), servers.prefill.bootstrap_port())],
        vec![servers.decode.url()],
        1_800,
    )
    // No load balancer polls this router's readiness, so it need not keep serving while it drains.
    .shutdown_lame_duck(Duration::ZERO)
    .shutdown_grace_period(Duration::from_secs(5));
    let router = MiniLoadBalancer::new(config)?;

    // `router.start()` would listen on the configured address and wait for signals. With a listener of its
    // own the example can use a free port.
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}", listener.local_addr()?);
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = tokio::spawn(async move { router.serve(listener, async { drop(stopped.await) }).await });

    println!("prefill server  {}", servers.prefill.url());
    println!("decode server   {}", servers.decode.url());
    println!("router          {url}\n");

    let result = tokio::select! {
        shown = show(&url, &servers, once) => shown,
        _ = interrupt.recv() => Ok(()),
    };

    // Requests in flight may finish, then all connections are closed.
    drop(stop);
    serving.await??;
    servers.shutdown().await;
    result
}

/// Shows the chat and what the servers received. Without `once` it then waits forever.
async fn show(url: &str, servers: &SimPair, once: bool) -> Result<()> {
    chat(url).await?;
    println!("What each server received:");
    show_leg("prefill", &servers.prefill)?;
    show_leg("decode", &servers.decode)?;
    if once {
        return Ok(());
    }
    println!("\nServing until Ctrl-C. To try it yourself:\n");
    println!("curl -N {url}{PATH} -H 'Content-Type: application/json' -d '{CHAT}'\n");
    std::future::pending().await
}

/// Sends a chat request and prints the tokens as they arrive.
async fn chat(url: &str) -> Result<()> {
    println!("POST {PATH}\n{CHAT}\n");
    let mut events = Events::of(send(url, "POST", PATH, CHAT).await?);
    while let Some(event) = events.next().await? {
        let event: Value = serde_json::from_str(&event)?;
        if let Some(token) = event["choices"][0]["delta"]["content"].as_str() {
            print!("{token}");
            std::io::stdout().flush()?;
        }
    }
    println!("\n");
    Ok(())
}

/// Prints what a server received: the client's bytes, and the three fields by which the two servers find each
/// other.
fn show_leg(role: &str, server: &Sim) -> Result<()> {
    let request = server.recorded_requests().into_iter().find(|request| request.path_and_query == PATH);
    let request = request.ok_or("the server received no request")?;
    println!("{role:<8} {} {}", request.method, request.path_and_query);
    let fields: Value = serde_json::from_slice(&request.body)?;
    let mut expected = CHAT.trim_end_matches('}').to_owned();
    for name in ["bootstrap_host", "bootstrap_port", "bootstrap_room"] {
        println!("         {name} {}", fields[name]);
        expected += &format!(r#","{name}":{}"#, fields[name]);
    }
    expected += "}";
    // The fields are inserted before the last brace. Nothing else may differ.
    if request.body != expected {
        return Err(format!("{role} received other bytes than the client sent: {:?}", request.body).into());
    }
    println!("         the rest is byte for byte what the client sent");
    Ok(())
}
