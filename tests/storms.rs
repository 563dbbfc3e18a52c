//! The built program after a storm: file descriptors, threads and memory are back where they were.
//!
//! What a process holds is read from `/proc`, so these tests are for Linux.

#![cfg(target_os = "linux")]

#[path = "clients/harness.rs"]
mod harness;
mod kit;

use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use harness::Program;
use kit::{Client, Seen, Step, Upstream, json};
use socket2::{Domain, Socket, Type};
use tokio::sync::{Mutex, watch};

/// One storm at a time: each measures a process, and they share the machine.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

/// How often a condition is looked at that nothing announces.
const LOOK: Duration = Duration::from_millis(10);

const OK: &str = r#"{"text":"hi"}"#;

/// The built router, with a bound on its descriptors.
struct Router {
    program: Program,
    address: SocketAddr,
    /// What it has open when nobody is there.
    descriptors: usize,
    threads: usize,
}

impl Router {
    async fn start(prefill: &Upstream, decode: &Upstream, descriptors: usize) -> Self {
        // Another process may take a free port before the router does.
        for _ in 0..5 {
            let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
            let address = free.expect("a free port");
            let mut command = limited(descriptors, env!("CARGO_BIN_EXE_mini-lb"));
            command.args(["--host", "127.0.0.1", "--port", &address.port().to_string()]);
            command.args(["--worker-threads", "2", "--prefill", &prefill.url(), "none"]);
            // Probes have descriptors too.
            command.args(["--decode", &decode.url(), "--disable-health-check"]);
            let mut program = Program::start(command);
            if program.stderr.wait_for("listening on ") {
                let mut router = Self { program, address, descriptors: 0, threads: 0 };
                // Whoever is answered knows that all threads have what they need.
                let mut client = router.client().await;
                assert_eq!(client.get("/health").await.status(), 200);
                router.descriptors = router.open_descriptors() - 1;
                router.threads = router.status("Threads");
                return router;
            }
            assert!(program.stderr.text().contains("in use"), "{}", program.stderr.text());
        }
        panic!("every free port was taken by others");
    }

    async fn client(&self) -> Client {
        Client::connect(self.address).await
    }

    /// A request like any other, on a connection of its own.
    async fn answers(&self) {
        let answer = self.client().await.post("/generate", r#"{"text":"a"}"#).await;
        assert_eq!((answer.status(), answer.text()), (200, OK), "{}", self.program.said());
    }

    fn proc(&self, file: &str) -> String {
        let path = format!("/proc/{}/{file}", self.program.id());
        fs::read_to_string(path).expect("the router runs")
    }

    fn open_descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.program.id())).expect("the router runs").count()
    }

    /// Waits until so many descriptors more are open than when nobody was there. A connection ends when both of its
    /// ends have noticed, and an idle one to a server after 4 s.
    async fn has_descriptors(&self, more: usize) {
        let deadline = Instant::now() + kit::PATIENCE;
        loop {
            let start = Instant::now();
            let more_now = self.open_descriptors() as isize - self.descriptors as isize;
            if more_now == more as isize {
                return;
            }
            assert!(Instant::now() < deadline, "{more_now} descriptors more than at first instead of {more}");
            // To count them takes the kernel's time, which the router needs.
            tokio::time::sleep(LOOK.max(4 * start.elapsed())).await;
        }
    }

    /// All is as it was when nobody had been there yet, but for memory.
    async fn is_as_at_first(&self) {
        self.has_descriptors(0).await;
        assert_eq!(self.status("Threads"), self.threads);
    }

    fn status(&self, name: &str) -> usize {
        let status = self.proc("status");
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let number = line.and_then(|value| value.split_whitespace().next()).expect("a value");
        number.parse().expect("a number")
    }

    fn resident_mib(&self) -> usize {
        self.status("VmRSS") >> 10
    }

    /// What the router has computed so far.
    fn cpu_time(&self) -> Duration {
        let stat = self.proc("stat");
        // The program's name, in parentheses, may have spaces.
        let fields = stat.rsplit_once(") ").expect("a name").1.split(' ');
        // User and system time, the 14th and 15th field of all, in hundredths of a second.
        let ticks = fields.skip(11).take(2).map(|field| field.parse::<u64>().expect("a number"));
        Duration::from_millis(10 * ticks.sum::<u64>())
    }
}

/// A program that may have so many descriptors open.
fn limited(descriptors: usize, program: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -n \"$0\" && exec \"$@\"", &descriptors.to_string(), program]);
    command
}

/// When a client leaves.
const MOMENTS: [&str; 6] =
    ["after the head", "mid body", "at once", "before the answer", "mid stream", "mid answer"];

const STREAM: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n8\r\ndata: 1\n\r\n";
const HALF: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{\"text\":\"data: 1";

/// Bytes of an abandoned request's body: 6,000 of them that are not let go are 47 MiB.
const BODY: usize = 8 << 10;

fn abandoned_body(moment: &str) -> String {
    let stream = moment == "mid stream";
    format!(r#"{{"moment":"{moment}","stream":{stream},"text":"{}"}}"#, "x".repeat(BODY))
}

/// What a server does for a request that will be abandoned, and for any other.
fn until_abandoned(seen: &Seen, waiting: &watch::Sender<usize>, is_decode: bool) -> Vec<Step> {
    match seen.json()["moment"].as_str() {
        None => vec![Step::Send(json("200 OK", OK))],
        Some("mid stream") if is_decode => vec![Step::Send(STREAM.into()), Step::Hang],
        Some("mid answer") if is_decode => vec![Step::Send(HALF.into()), Step::Hang],
        Some("before the answer") => {
            waiting.send_modify(|count| *count += 1);
            vec![Step::Hang]
        }
        Some(_) => vec![Step::Hang],
    }
}

/// Sends a request, or a part of it, and leaves. `both_wait` ends when all that leave before the answer have arrived.
async fn abandon(address: SocketAddr, moment: &'static str, both_wait: impl Future<Output = ()>) {
    let mut client = Client::connect(address).await;
    let body = abandoned_body(moment);
    let head = format!("POST /generate HTTP/1.1\r\nhost: router\r\ncontent-length: {}\r\n\r\n", body.len());
    client.send(&head).await;
    match moment {
        "after the head" => return,
        "mid body" => return client.send(&body[..BODY / 2]).await,
        _ => client.send(&body).await,
    }
    match moment {
        "before the answer" => both_wait.await,
        "mid stream" | "mid answer" => {
            client.read_until("data: 1").await;
        }
        _ => {}
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_6_000_abandoned_requests_nothing_of_them_is_left() {
    const WAVE: usize = 198;
    const WAVES: usize = 31;
    /// By all waves but the first, which warms up the allocator. The bodies alone that arrive whole are 31 MiB.
    const MAX_GROWTH_MIB: usize = 16;

    let _turn = ONE_AT_A_TIME.lock().await;
    let waiting = Arc::new(watch::Sender::new(0));
    let (at_prefill, at_decode) = (Arc::clone(&waiting), Arc::clone(&waiting));
    let prefill = Upstream::start(move |seen| until_abandoned(seen, &at_prefill, false)).await;
    let decode = Upstream::start(move |seen| until_abandoned(seen, &at_decode, true)).await;
    let router = Router::start(&prefill, &decode, 1_024).await;
    let mut warm = 0;
    for wave in 1..=WAVES {
        // At both servers.
        let expected = 2 * wave * WAVE / MOMENTS.len();
        let clients: Vec<_> = (0..WAVE)
            .map(|client| {
                let mut arrived = waiting.subscribe();
                let all = async move {
                    kit::patiently("requests at both servers", arrived.wait_for(|count| *count >= expected))
                        .await
                        .expect("the servers run");
                };
                tokio::spawn(abandon(router.address, MOMENTS[client % MOMENTS.len()], all))
            })
            .collect();
        for client in clients {
            client.await.expect("a client gets as far as it means to");
        }
        if wave == 1 {
            router.is_as_at_first().await;
            warm = router.resident_mib();
        }
    }
    router.is_as_at_first().await;
    prefill.closed(prefill.opened()).await;
    decode.closed(decode.opened()).await;
    let grown = router.resident_mib().saturating_sub(warm);
    assert!(grown <= MAX_GROWTH_MIB, "{grown} MiB more than the {warm} MiB after the first wave");
    router.answers().await;
}

/// Connections that nothing is sent on, but for every tenth, which has had an answer.
const IDLE: usize = 19_000;
/// What a process has open besides.
const SPARE: usize = 200;
/// Where the clients below find the router, and how many they are.
const STORM: &str = "MINI_LB_TEST_IDLE_CLIENTS";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_19_000_idle_connections_nothing_of_them_is_left() {
    /// 3 KiB a connection: each takes more than ten times as much while it is there.
    const MAX_GROWTH_MIB: usize = 64;

    let _turn = ONE_AT_A_TIME.lock().await;
    let count = idle_connections();
    let prefill = Upstream::always(json("200 OK", OK)).await;
    let decode = Upstream::always(json("200 OK", OK)).await;
    let router = Router::start(&prefill, &decode, count + SPARE).await;
    let before = router.resident_mib();
    let test = std::env::current_exe().expect("a path");
    let mut command = limited(count + SPARE, test.to_str().expect("UTF-8"));
    command.args(["--exact", "idle_clients", "--ignored", "--nocapture"]);
    command.env(STORM, format!("{} {count}", router.address));
    let mut clients = Program::start(command);
    clients.wait_for("all are open");
    router.has_descriptors(count).await;
    let start = Instant::now();
    router.answers().await;
    let took = start.elapsed();
    assert!(took < Duration::from_secs(1), "a request beside {count} idle connections took {took:?}");
    let with_them = router.resident_mib();
    clients.go_on();
    clients.succeed();
    router.is_as_at_first().await;
    // The allocator gives memory back as it is used.
    let deadline = Instant::now() + kit::PATIENCE;
    while router.resident_mib() > before + MAX_GROWTH_MIB {
        let now = router.resident_mib();
        assert!(Instant::now() < deadline, "{before} MiB before, {with_them} with them, {now} after them");
        router.answers().await;
    }
    router.answers().await;
}

/// How many connections two processes may have here: one has all the clients, the other is the router.
fn idle_connections() -> usize {
    let limit = Command::new("sh").args(["-c", "ulimit -H -n"]).output().expect("a shell").stdout;
    let limit = String::from_utf8(limit).expect("UTF-8").trim().parse().unwrap_or(usize::MAX);
    let possible = IDLE.min(limit.saturating_sub(SPARE));
    if possible < IDLE {
        assert!(
            std::env::var_os("CI").is_none_or(|ci| ci.is_empty()),
            "CI is set, and a process may have no more than {limit} descriptors"
        );
        // Not `eprintln!`, which is not shown for a test that passes.
        let _ = writeln!(io::stderr(), "NOT TESTED with {IDLE} idle connections but with {possible}");
    }
    possible
}

/// The clients of the test above, in a process of their own because of its descriptors.
#[test]
#[ignore = "a part of another test"]
fn idle_clients() {
    let Ok(storm) = std::env::var(STORM) else { return };
    let (address, count) = storm.split_once(' ').expect("an address and a count");
    let address = address.parse().expect("an address");
    let clients: Vec<TcpStream> = (0..count.parse().expect("a number"))
        .map(|number: usize| {
            let mut client = connect_from(number, address);
            if number.is_multiple_of(10) {
                client.write_all(b"GET /health HTTP/1.1\r\nhost: router\r\n\r\n").expect("the router reads");
                let mut answer = [0; 12];
                client.read_exact(&mut answer).expect("the router answers");
                assert_eq!(&answer, b"HTTP/1.1 200");
            }
            client
        })
        .collect();
    println!("all are open");
    io::stdin().read_line(&mut String::new()).expect("the test goes on");
    drop(clients);
}

/// Connects from one of several local addresses: the kernel takes long to find a free port where most are taken.
fn connect_from(number: usize, address: SocketAddr) -> TcpStream {
    let local = SocketAddr::from(([127, 0, 0, 1 + (number % 8) as u8], 0));
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a descriptor");
    socket.bind(&local.into()).expect("a free port");
    socket.connect(&address.into()).expect("the router accepts");
    socket.into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_without_a_descriptor_left_rests_and_recovers_by_itself() {
    const DESCRIPTORS: usize = 64;

    let _turn = ONE_AT_A_TIME.lock().await;
    let prefill = Upstream::always(json("200 OK", OK)).await;
    let decode = Upstream::always(json("200 OK", OK)).await;
    let mut router = Router::start(&prefill, &decode, DESCRIPTORS).await;
    let mut first = router.client().await;
    assert_eq!(first.get("/health").await.status(), 200);
    let mut clients = Vec::new();
    for _ in 0..2 * DESCRIPTORS {
        clients.push(router.client().await);
    }
    assert!(router.program.stderr.wait_for("no connection could be accepted"), "{}", router.program.said());
    assert!(router.open_descriptors() >= DESCRIPTORS);
    // Time is what is tested: a router that tries again and again uses all of it.
    let before = router.cpu_time();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let used = router.cpu_time() - before;
    assert!(used < Duration::from_millis(500), "{used:?} of a second");
    // Who is connected is served, as far as that is possible.
    assert_eq!(first.get("/health").await.status(), 200);
    let answer = first.post("/generate", r#"{"text":"a"}"#).await;
    assert_eq!(answer.status(), 502);
    assert!(answer.code().ends_with("_connect"), "{}", answer.text());
    drop((first, clients));
    router.answers().await;
    router.is_as_at_first().await;
}
