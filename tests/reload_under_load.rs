//! Reloads under a fixed rate of requests lose none and cause no error.

mod kit;

use std::time::Duration;

use kit::program::{Folder, Program, client, free_port};
use loadtest::canned::{Canned, Plan, Role};
use loadtest::load::{Load, Mode, Request, RequestKind, Until};

const RATE: u64 = 500;
const RELOADS: u64 = 20;
/// Between two reloads.
const PAUSE: Duration = Duration::from_millis(350);

#[tokio::test(flavor = "multi_thread")]
async fn twenty_reloads_at_500_requests_per_second_lose_none() {
    let plan = Plan { tokens: 4, interval: Duration::from_millis(20), ..Plan::default() };
    let start = |role| Canned::start(role, ([127, 0, 0, 1], 0).into(), plan).expect("a free port");
    let prefill = [start(Role::Prefill), start(Role::Prefill)];
    let decode = [start(Role::Decode), start(Role::Decode)];
    // Each backend is removed and added again, and options change.
    let text = |turn: u64| {
        let pick = |servers: &[Canned; 2]| match turn % 3 {
            0 => vec![servers[0].url()],
            1 => vec![servers[1].url()],
            _ => servers.iter().map(Canned::url).collect(),
        };
        format!(
            "prefill = {:?}\ndecode = {:?}\nmax_payload_size = {}\nrequest_timeout_secs = {}\nhealth_failure_threshold = {}\n",
            pick(&prefill),
            pick(&decode),
            100_000 + turn,
            30 + turn,
            3 + turn,
        )
    };
    let texts: Vec<String> = (0..=RELOADS).map(text).collect();
    let (folder, port) = (Folder::new("load"), free_port());
    let file = folder.put("mini-lb.toml", &texts[0]);
    let flags = ["--host", "127.0.0.1", "--prometheus-port", "0", "--port", &port.to_string()];
    let program = Program::start(["--config", file.to_str().expect("UTF-8")].into_iter().chain(flags));
    program.wait_for("listening on ");
    drop(client(port).await);

    let target = ([127, 0, 0, 1], port).into();
    let requests = [RequestKind::ChatStream, RequestKind::Chat];
    let mut load =
        Load::new(target, Request::new(target, RequestKind::Chat, 300, plan.tokens), 64, Duration::ZERO);
    load.requests = requests.map(|kind| Request::new(target, kind, 300, plan.tokens)).into();
    load.mode = Mode::Open { rate: RATE as f64 };
    let count = RATE * (RELOADS + 1) * PAUSE.as_millis() as u64 / 1_000;
    load.until = Until::Count(count);

    let reloads = tokio::task::spawn_blocking(move || {
        for (turn, text) in texts.iter().enumerate().skip(1) {
            std::thread::sleep(PAUSE);
            folder.put("mini-lb.toml", text);
            let line = program.reload();
            let said = "reloaded (SIGHUP): servers +";
            assert!(line.contains(said) && line.contains("request-timeout-secs"), "{turn}: {line}");
        }
        program
    });
    let report = load.run().await.expect("a run");
    let _program = reloads.await.expect("twenty reloads");
    assert_eq!((report.requests, report.errors, report.unmerged), (count, 0, 0), "{report:?}");
    for servers in [prefill, decode] {
        let seen = servers.map(|server| server.counts().requests);
        assert_eq!(seen.iter().sum::<u64>(), count, "{seen:?}");
        assert!(seen.iter().all(|part| *part > count / 5), "both served: {seen:?}");
    }
}
