//! A configuration that changes while the program serves: by SIGHUP, and by its file.

mod kit;

use std::time::Duration;

use kit::program::{Folder, Program, client, free_port};
use kit::{Gate, ScriptedServer, Step, TIMEOUT, json, with_timeout};

const BODY: &str = r#"{"text":"a","stream":true}"#;
const HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";

async fn server(name: &str) -> ScriptedServer {
    ScriptedServer::always(json("200 OK", &format!(r#"{{"from":"{name}"}}"#))).await
}

/// A configuration of such servers, and `more`.
fn of(prefill: &[&ScriptedServer], decode: &[&ScriptedServer], more: &str) -> String {
    let urls = |servers: &[&ScriptedServer]| servers.iter().map(|server| server.url()).collect::<Vec<_>>();
    format!(
        "prefill = {:?}\ndecode = {:?}\ndisable_health_check = true\n{more}\n",
        urls(prefill),
        urls(decode)
    )
}

struct Running {
    program: Program,
    folder: Folder,
    port: u16,
}

impl Running {
    fn start(name: &str, text: &str) -> Self {
        let (folder, port) = (Folder::new(name), free_port());
        let file = folder.put("mini-lb.toml", text);
        let program = Self::of_file(file.to_str().unwrap(), port);
        Self { program, folder, port }
    }

    fn of_file(file: &str, port: u16) -> Program {
        let program = Program::start([
            "--config",
            file,
            "--host",
            "127.0.0.1",
            "--prometheus-port",
            "0",
            "--port",
            &port.to_string(),
        ]);
        program.wait_for("listening on ");
        program
    }

    /// Replaces the file, and reloads it.
    fn reload(&self, text: &str) -> String {
        self.folder.put("mini-lb.toml", text);
        self.program.reload()
    }

    async fn response(&self) -> String {
        client(self.port).await.post("/generate", BODY).await.text().to_owned()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sighup_changes_servers_and_interrupts_no_stream() {
    let (prefill, new) = (server("prefill").await, server("new").await);
    let gate = Gate::new();
    let held = gate.clone();
    let old = ScriptedServer::start(move |_| {
        let event = |text: &str| Step::Send(format!("{:x}\r\n{text}\r\n", text.len()).into());
        vec![
            Step::Send(HEAD.into()),
            event("data: 1\n\n"),
            Step::Wait(held.clone()),
            event("data: 2\n\n"),
            Step::Send("0\r\n\r\n".into()),
        ]
    })
    .await;
    let running = Running::start("sighup", &of(&[&prefill], &[&old], ""));
    let mut open = client(running.port).await;
    open.send_request("POST", "/generate", &[], BODY.as_bytes()).await;
    open.read_until("data: 1").await;
    let line = running.reload(&of(&[&prefill], &[&new], ""));
    assert!(line.ends_with("reloaded (SIGHUP): servers +1 -1"), "{line}");
    assert_eq!(running.response().await, r#"{"from":"new"}"#);
    let line = running.reload(&of(&[&prefill], &[&new, &old], "policy = \"round_robin\""));
    assert!(line.ends_with(": servers +1 -0, prefill-policy, decode-policy"), "{line}");
    gate.open();
    let response = open.response().await;
    assert!(response.complete, "{response:?}");
    assert_eq!(response.text(), "data: 1\n\ndata: 2\n\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_file_is_read_without_a_signal() {
    let (prefill, old, new) = (server("prefill").await, server("old").await, server("new").await);
    let running = Running::start("file", &of(&[&prefill], &[&old], ""));
    assert_eq!(running.response().await, r#"{"from":"old"}"#);
    running.folder.put("mini-lb.toml", &of(&[&prefill], &[&new], ""));
    let line = running.program.wait_for("reloaded (");
    assert!(line.contains("mini-lb.toml has changed): servers +1 -1"), "{line}");
    assert_eq!(running.response().await, r#"{"from":"new"}"#);
    // Written in place, and gone for a moment.
    let path = running.folder.path("mini-lb.toml");
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, of(&[&prefill], &[&old], "")).unwrap();
    let line = running.program.wait_for("reloaded (");
    assert!(line.contains("mini-lb.toml has changed): servers +1 -1"), "{line}");
    assert_eq!(running.response().await, r#"{"from":"old"}"#);
}

/// As the kubelet does it: the file is a symbolic link through `..data`, which is replaced by another link.
#[tokio::test(flavor = "multi_thread")]
async fn a_config_map_that_changes_is_read() {
    let (prefill, old, new) = (server("prefill").await, server("old").await, server("new").await);
    let (folder, port) = (Folder::new("configmap"), free_port());
    for (version, decode) in [("..1", &old), ("..2", &new)] {
        std::fs::create_dir(folder.path(version)).unwrap();
        folder.put(&format!("{version}/mini-lb.toml"), &of(&[&prefill], &[decode], ""));
    }
    std::os::unix::fs::symlink("..1", folder.path("..data")).unwrap();
    std::os::unix::fs::symlink("..data/mini-lb.toml", folder.path("mini-lb.toml")).unwrap();
    let program = Running::of_file(folder.path("mini-lb.toml").to_str().unwrap(), port);
    std::os::unix::fs::symlink("..2", folder.path("..data_tmp")).unwrap();
    std::fs::rename(folder.path("..data_tmp"), folder.path("..data")).unwrap();
    let line = program.wait_for("reloaded (");
    assert!(line.contains("mini-lb.toml has changed): servers +1 -1"), "{line}");
    assert_eq!(client(port).await.post("/generate", BODY).await.text(), r#"{"from":"new"}"#);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_file_is_refused_and_logged_and_the_running_configuration_stays() {
    let (prefill, old, new) = (server("prefill").await, server("old").await, server("new").await);
    let running = Running::start("bad", &of(&[&prefill], &[&old], "max_payload_size = 100"));
    for (more, why) in [
        ("prot = 1", "mini-lb.toml:4: prot: unknown key; did you mean port?"),
        ("port = ", "mini-lb.toml:4: not TOML: "),
        ("max_merge_size = 0", "mini-lb.toml:4: --max-merge-size 0: the value must be at least 1"),
    ] {
        let line = running.reload(&of(&[&prefill], &[&new], more));
        assert!(line.contains("ERROR") && line.contains(why), "{line}");
        assert!(line.contains("reload failed (SIGHUP), keeping the running configuration: "), "{line}");
        assert_eq!(running.response().await, r#"{"from":"old"}"#);
    }
    // The deleted file is noticed without a signal, and reported once.
    std::fs::remove_file(running.folder.path("mini-lb.toml")).unwrap();
    let line = running.program.wait_for("reload failed (");
    assert!(
        line.contains("mini-lb.toml has changed), keeping the running configuration: ")
            && line.contains("cannot be read"),
        "{line}"
    );
    assert_eq!(running.response().await, r#"{"from":"old"}"#);
    running.folder.put("mini-lb.toml", &of(&[&prefill], &[&new], "max_payload_size = 100"));
    let line = running.program.wait_for("reloaded (");
    assert!(line.contains("has changed): servers +1 -1"), "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_take_effect_with_the_next_request() {
    let (prefill, decode) = (server("prefill").await, server("decode").await);
    let running = Running::start("limits", &of(&[&prefill], &[&decode], "max_payload_size = 100"));
    let mut kept = client(running.port).await;
    assert_eq!(kept.post("/generate", BODY).await.status(), 200);
    let line = running.reload(&of(&[&prefill], &[&decode], "max_payload_size = 10"));
    assert!(line.ends_with("reloaded (SIGHUP): max-payload-size"), "{line}");
    assert_eq!(kept.post("/generate", BODY).await.status(), 413);
    let line = running.program.reload();
    assert!(line.ends_with("reloaded (SIGHUP): nothing has changed"), "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_replaced_in_its_file_takes_effect() {
    let (prefill, decode) = (server("prefill").await, server("decode").await);
    let keys = Folder::new("keys");
    let file = keys.put("clients", "the old one\n");
    let named = format!("api_key_file = {file:?}");
    let running = Running::start("key", &of(&[&prefill], &[&decode], &named));
    let mut kept = client(running.port).await;
    let mut status = async |key: &str| {
        let headers = [("authorization", format!("Bearer {key}"))];
        let headers = headers.each_ref().map(|(name, value)| (*name, value.as_str()));
        kept.send_request("POST", "/generate", &headers, BODY.as_bytes()).await;
        kept.response().await.status()
    };
    assert_eq!((status("the old one").await, status("the new one").await), (200, 401));
    keys.put("clients", "the new one\n");
    let line = running.program.reload();
    assert!(line.ends_with("reloaded (SIGHUP): api-key"), "{line}");
    assert_eq!((status("the old one").await, status("the new one").await), (401, 200));
}

#[tokio::test(flavor = "multi_thread")]
async fn options_that_need_a_restart_are_reported_each_time() {
    let (prefill, decode) = (server("prefill").await, server("decode").await);
    let text = |more: &str| of(&[&prefill], &[&decode], more);
    let running = Running::start("restart", &text(""));
    let more = "worker_threads = 7\nlog_level = \"debug\"\nmax_payload_size = 99";
    let line = running.reload(&text(more));
    let waits = "; needs a restart: worker-threads, log-level";
    assert!(line.ends_with(&format!("reloaded (SIGHUP): max-payload-size{waits}")), "{line}");
    let line = running.program.reload();
    assert!(line.ends_with(&format!("reloaded (SIGHUP): nothing has changed{waits}")), "{line}");
    let line = running.reload(&text(""));
    assert!(line.ends_with("reloaded (SIGHUP): max-payload-size"), "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn sighup_before_there_is_a_file_does_not_end_the_program() {
    let port = free_port();
    let typed =
        format!("--prefill http://127.0.0.1:1 --decode http://127.0.0.1:2 --host 127.0.0.1 --port {port}");
    let program = Program::start(typed.split(' '));
    program.wait_for("listening on ");
    assert!(program.reload().ends_with("nothing has changed"));
    let health = with_timeout("an answer", async { client(port).await.get("/health").await.status() });
    assert_eq!(tokio::time::timeout(TIMEOUT + Duration::from_secs(1), health).await, Ok(200));
}
