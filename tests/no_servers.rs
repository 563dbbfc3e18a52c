//! A router that starts without servers, which come later: by the workers API, in either of its forms, or
//! with the configuration file.

mod kit;

use kit::program::{Folder, Program, client, free_port};
use kit::{Client, ScriptedServer, json, with_timeout};
use serde_json::json as value;

const BODY: &str = r#"{"text":"a"}"#;
const NO_FILE: &str = "disable_health_check = true\n";

struct Running {
    program: Program,
    folder: Folder,
    port: u16,
}

/// The program without a server.
fn start(name: &str, more: &str) -> Running {
    let (folder, port) = (Folder::new(name), free_port());
    let file = folder.put("mini-lb.toml", more);
    let arguments = ["--config", file.to_str().unwrap(), "--host", "127.0.0.1", "--prometheus-port", "0"];
    let program = Program::start(arguments.into_iter().chain(["--port", &port.to_string()]));
    for role in ["prefill", "decode"] {
        let warned = program.wait_for(&format!("there is no {role} server"));
        assert!(warned.contains("WARN") && warned.contains(&format!("--{role}-dns")), "{warned}");
    }
    Running { program, folder, port }
}

async fn server(name: &str) -> ScriptedServer {
    ScriptedServer::always(json("200 OK", &format!(r#"{{"from":"{name}"}}"#))).await
}

async fn post(client: &mut Client, target: &str) -> (u16, String) {
    client.send_request("POST", target, &[], b"").await;
    let response = client.response().await;
    (response.status(), response.text().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_get_503_until_there_are_servers() {
    let running = start("no-servers-api", NO_FILE);
    let mut client = client(running.port).await;
    let refused = client.post("/generate", BODY).await;
    assert_eq!((refused.status(), refused.error_code().as_str()), (503, "prefill_unavailable"));
    assert_eq!(refused.head.header("retry-after"), Some("1"));
    assert_eq!(client.get("/ready").await.status(), 503);
    assert_eq!(client.get("/health").await.status(), 200);
    assert_eq!(client.get("/v1/models").await.status(), 503);
    assert_eq!(client.get("/list_workers").await.text(), r#"{"urls":[]}"#);
    assert_eq!(client.get("/get_loads").await.text(), r#"{"workers":[]}"#);

    let (prefill, decode) = (server("prefill").await, server("decode").await);
    let body = value!({ "url": prefill.url(), "worker_type": "prefill" }).to_string();
    assert_eq!(client.post("/workers", &body).await.status(), 202);
    let refused = client.post("/generate", BODY).await;
    assert_eq!((refused.status(), refused.error_code().as_str()), (503, "decode_unavailable"));
    assert_eq!(refused.head.header("retry-after"), Some("1"));
    let body = value!({ "url": decode.url(), "worker_type": "decode" }).to_string();
    assert_eq!(client.post("/workers", &body).await.status(), 202);
    assert_eq!(client.get("/ready").await.status(), 200);
    assert_eq!(client.post("/generate", BODY).await.text(), r#"{"from":"decode"}"#);
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_that_come_with_the_file_are_used_at_once() {
    let running = start("no-servers-file", NO_FILE);
    let (prefill, decode) = (server("prefill").await, server("decode").await);
    let servers = format!("prefill = [{:?}]\ndecode = [{:?}]\n", prefill.url(), decode.url());
    running.folder.put("mini-lb.toml", &(servers + NO_FILE));
    running.program.reload();
    let mut client = client(running.port).await;
    assert_eq!(client.post("/generate", BODY).await.text(), r#"{"from":"decode"}"#);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_comes_first_gets_requests_after_its_first_probe() {
    let running = start("no-servers-probed", "");
    let (prefill, decode) = (server("prefill").await, server("decode").await);
    let mut client = client(running.port).await;
    for (role, server) in [("prefill", &prefill), ("decode", &decode)] {
        let target = format!("/add_worker?url={}&worker_type={role}&bootstrap_port=8998", server.url());
        let expected = format!("Successfully added worker: {}", server.url());
        assert_eq!(post(&mut client, &target).await, (200, expected));
    }
    with_timeout("servers that are ready", async { while client.get("/ready").await.status() != 200 {} })
        .await;
    assert_eq!(client.post("/generate", BODY).await.text(), r#"{"from":"decode"}"#);
}

#[tokio::test(flavor = "multi_thread")]
async fn trainers_add_list_and_remove_workers_by_url() {
    let running = start("no-servers-trainer", NO_FILE);
    let mut client = client(running.port).await;
    let loads = r#"{"loads":[{"num_total_tokens":5},{"num_total_tokens":7}]}"#;
    let prefill = ScriptedServer::always(json("200 OK", loads)).await;
    let decode = ScriptedServer::always(json("500 Internal Server Error", "{}")).await;
    let (of_prefill, of_decode) = (prefill.url(), decode.url().replace(':', "%3A").replace('/', "%2F"));
    let added = post(&mut client, &format!("/add_worker?url={of_prefill}&worker_type=prefill")).await;
    assert_eq!(added, (200, format!("Successfully added worker: {of_prefill}")));
    let added = post(&mut client, &format!("/add_worker?worker_type=decode&url={of_decode}")).await;
    assert_eq!(added, (200, format!("Successfully added worker: {}", decode.url())));
    // A trainer may try again.
    assert_eq!(post(&mut client, &format!("/add_worker?worker_type=decode&url={of_decode}")).await.0, 200);

    let urls = value!({ "urls": [prefill.url(), decode.url()] });
    assert_eq!(client.get("/list_workers").await.json(), urls);
    let expected = value!({ "workers": [
        { "worker": prefill.url(), "load": 12 },
        { "worker": decode.url(), "load": -1 },
    ] });
    assert_eq!(client.get("/get_loads").await.json(), expected);
    assert_eq!(prefill.requests().last().expect("a request").target(), "/v1/loads");

    let (status, text) = post(&mut client, &format!("/remove_worker?url={of_prefill}")).await;
    assert_eq!((status, text), (200, format!("Successfully removed worker: {of_prefill}")));
    assert_eq!(client.get("/list_workers").await.json(), value!({ "urls": [decode.url()] }));
    assert_eq!(post(&mut client, &format!("/remove_worker?url={of_prefill}")).await.0, 404);
    for target in ["/add_worker", "/add_worker?url=h:1&worker_type=decode", "/remove_worker?uri=http://h:1"] {
        assert_eq!(post(&mut client, target).await.0, 400, "{target}");
    }
    assert_eq!(client.get("/add_worker?url=http://h:1").await.status(), 405);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_an_operator_may_add_workers() {
    let running = start("no-servers-key", "admin_api_key = \"secret\"\n");
    let mut client = client(running.port).await;
    for target in ["/add_worker?url=http://127.0.0.1:1&worker_type=decode", "/remove_worker?url=http://h:1"] {
        assert_eq!(post(&mut client, target).await.0, 401, "{target}");
    }
    assert_eq!(client.get("/list_workers").await.status(), 401);
}
