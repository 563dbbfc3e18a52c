//! The status page in headless Chromium (Debian: `chromium`), served by the built router between simulated
//! servers. Screenshots are kept in `target/ui/`.
//!
//! `UPDATE_DOCS=1 cargo test --test status_page` also takes those of the documents again.

#[path = "status_page/browser.rs"]
mod browser;
mod kit;

use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use browser::Browser;
use kit::free_port;
use kit::processes::{ChildProcess, target};
use loadtest::sim::{Role, Sim, SimConfig};
use tokio::runtime::Runtime;

/// Time between two tokens, and between two requests.
const TOKEN: Duration = Duration::from_millis(5);

/// The folder for screenshots.
fn folder() -> PathBuf {
    let folder = target().parent().expect("a target folder").join("ui");
    fs::create_dir_all(&folder).expect("a folder");
    folder
}

/// One prefill and two decode servers; decode servers can be stopped.
struct Servers {
    runtime: Runtime,
    prefill: Sim,
    decode: Vec<Option<Sim>>,
}

impl Servers {
    fn start() -> Self {
        let runtime = Runtime::new().expect("a runtime");
        let prefill = runtime.block_on(Sim::start(quick(Role::Prefill, None))).expect("free ports");
        let decode = || runtime.block_on(Sim::start(quick(Role::Decode, None))).expect("a free port");
        let decode = vec![Some(decode()), Some(decode())];
        Self { runtime, prefill, decode }
    }

    fn decode_url(&self, which: usize) -> String {
        self.decode[which].as_ref().expect("a server that runs").url()
    }

    fn stop(&mut self, which: usize) -> SocketAddr {
        let server = self.decode[which].take().expect("a server that runs");
        let address = server.addr();
        self.runtime.block_on(server.shutdown());
        address
    }

    fn start_again(&mut self, which: usize, address: SocketAddr) {
        let server = self.runtime.block_on(Sim::start(quick(Role::Decode, Some(address))));
        self.decode[which] = Some(server.expect("the port is still free"));
    }
}

fn quick(role: Role, addr: Option<SocketAddr>) -> SimConfig {
    SimConfig { role, addr, inter_token: TOKEN, prefill_time: TOKEN, time_scale: 0.1, ..SimConfig::default() }
}

/// The ports of the clients' and the admin listener.
#[derive(Clone, Copy)]
struct Ports {
    clients: u16,
    operators: u16,
}

impl Ports {
    fn free() -> Self {
        Self { clients: free_port(), operators: free_port() }
    }

    fn page(self) -> String {
        format!("http://127.0.0.1:{}/ui", self.operators)
    }
}

/// The built router with these decode servers. The error is its output if a port was taken.
fn router_at(servers: &Servers, decode: &[&str], ports: Ports) -> Result<ChildProcess, String> {
    router_with(servers, decode, &[], ports)
}

/// The same with more arguments.
fn router_with(
    servers: &Servers,
    decode: &[&str],
    args: &[&str],
    ports: Ports,
) -> Result<ChildProcess, String> {
    let bootstrap = servers.prefill.bootstrap_port().expect("a bootstrap port").to_string();
    let prefill = servers.prefill.url();
    let of_decode = decode.iter().flat_map(|url| ["--decode", *url]);
    let servers = ["--prefill", &prefill, &bootstrap].into_iter().chain(of_decode);
    program_at(&servers.chain(args.iter().copied()).collect::<Vec<_>>(), ports)
}

/// The built router with these flags for its servers.
fn program_at(servers: &[&str], ports: Ports) -> Result<ChildProcess, String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mini-lb"));
    command.args(["--host", "127.0.0.1", "--port", &ports.clients.to_string()]);
    command.args(["--prometheus-port", &ports.operators.to_string()]);
    // Failed requests eject a server sooner than probes do, and one probe brings it back.
    command.args(["--health-check-interval-secs", "1", "--health-failure-threshold", "3"]);
    command.args(["--health-success-threshold", "1", "--shutdown-grace-period-secs", "1"]);
    command.args(servers);
    let mut program = ChildProcess::start(command);
    // Its two listeners are logged in this order.
    let listens =
        ["listening on ", "metrics and status on "].iter().all(|said| program.stderr.wait_for(said));
    if listens { Ok(program) } else { Err(program.output()) }
}

fn router(servers: &Servers, decode: &[&str]) -> (ChildProcess, Ports) {
    started(|ports| router_at(servers, decode, ports))
}

fn started(start: impl Fn(Ports) -> Result<ChildProcess, String>) -> (ChildProcess, Ports) {
    // Another process may take a free port before the router does.
    for _ in 0..5 {
        let ports = Ports::free();
        match start(ports) {
            Ok(program) => return (program, ports),
            Err(said) => assert!(said.contains("in use"), "{said}"),
        }
    }
    panic!("every free port was taken by others");
}

/// Generates `tokens` tokens and returns the whole response.
fn generate(port: u16, tokens: u32, is_stream: bool) -> io::Result<String> {
    let mut response = String::new();
    open(port, tokens, is_stream)?.read_to_string(&mut response)?;
    Ok(response)
}

fn open(port: u16, tokens: u32, is_stream: bool) -> io::Result<TcpStream> {
    open_for(port, "hello", tokens, is_stream)
}

fn open_for(port: u16, prompt: &str, tokens: u32, is_stream: bool) -> io::Result<TcpStream> {
    let body = format!(
        r#"{{"text":"{prompt}","stream":{is_stream},"sampling_params":{{"max_new_tokens":{tokens},"ignore_eos":true}}}}"#
    );
    let mut client = TcpStream::connect(("127.0.0.1", port))?;
    client.set_read_timeout(Some(kit::processes::DEADLINE))?;
    write!(
        client,
        "POST /generate HTTP/1.1\r\nhost: router\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    )?;
    Ok(client)
}

/// Sends requests one after the other until it is dropped. Some of them may fail.
struct Traffic {
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Traffic {
    fn start(port: u16) -> Self {
        Self::of(move |number| generate(port, number % 20 + 1, number % 2 == 0))
    }

    /// Of requests by their number.
    fn of(request: impl Fn(u32) -> io::Result<String> + Send + 'static) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let notified = Arc::clone(&is_over);
        let run = move || {
            let mut number = 0_u32;
            while !notified.load(Relaxed) {
                // Fails when a server or the router is stopped.
                let _ = request(number);
                number = number.wrapping_add(1);
                thread::sleep(TOKEN);
            }
        };
        Self { is_over, thread: Some(thread::spawn(run)) }
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.is_over.store(true, Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// A JavaScript expression for the text of a cell in a server's row.
fn cell(role: &str, url: &str, label: &str) -> String {
    format!(
        "[...document.querySelectorAll('#servers tr')].find((row) => row.children[0].innerText === '{url}' \
         && row.children[1].innerText === '{role}')?.querySelector('[data-label=\"{label}\"]').innerText.trim()"
    )
}

fn health(role: &str, url: &str, wanted: &str) -> String {
    format!("{} === '{wanted}'", cell(role, url, "Health"))
}

#[test]
fn page_shows_plain_servers_as_the_only_role() {
    if !browser::is_installed() {
        return;
    }
    let runtime = Runtime::new().expect("a runtime");
    let sim = runtime.block_on(Sim::start(quick(Role::Regular, None))).expect("a free port");
    let url = sim.url();
    let (_program, ports) = started(|ports| program_at(&["--worker-urls", &url], ports));
    let mut browser = Browser::start(&folder().join("plain"));
    browser.open(&ports.page());
    browser.until("document.getElementById('state').innerText === 'ready'");
    browser.until(&health("regular", &url, "healthy"));
    browser.until("document.getElementById('first-role').innerText === 'Servers healthy'");
    browser.until("document.getElementById('prefill').innerText === '1 of 1'");
    for id in ["second-role", "pairs-title", "pairs-table", "pairs-note"] {
        browser.until(&format!("document.getElementById('{id}').offsetHeight === 0"));
    }
    generate(ports.clients, 3, false).expect("a response");
    browser.until(&format!("parseFloat({}) > 0", cell("regular", &url, "Requests/s")));
    assert_eq!(browser.console_messages(), [""; 0]);
}

#[test]
fn page_shows_backends_traffic_and_health_changes() {
    if !browser::is_installed() {
        return;
    }
    let mut servers = Servers::start();
    let urls = [servers.decode_url(0), servers.decode_url(1)];
    let [first, second] = urls.each_ref().map(String::as_str);
    let (mut program, ports) = router(&servers, &[first, second]);
    let folder = folder();
    let mut browser = Browser::start(&folder);
    browser.resize(1280, 900, false);
    browser.open(&ports.page());

    shows_servers_and_traffic(&mut browser, &servers, &urls, ports);
    let traffic = Traffic::start(ports.clients);
    follows_health(&mut browser, &mut servers, &folder);
    reads_on_a_phone(&mut browser, &folder);
    assert_eq!(browser.console_messages(), [""; 0]);
    calculates(&mut browser);
    drop(traffic);

    program.signal("TERM");
    program.wait();
    browser.until("document.getElementById('state').innerText.startsWith('the router does not respond')");
    browser.until("document.body.classList.contains('stale')");
    // With one server less, and counters that restart at zero.
    let _program = router_at(&servers, &[second], ports).expect("the ports are still free");
    browser.until("document.getElementById('state').innerText === 'ready'");
    browser.until(&format!("{} === undefined", cell("decode", first, "Health")));
    for said in
        ["the router responds again", "the router was restarted", &format!("decode {first} was removed")]
    {
        browser.until(&format!("document.getElementById('changes').innerText.includes('{said}')"));
    }
    generate(ports.clients, 1, false).expect("a response");
    browser.until("parseFloat(document.getElementById('rate').innerText) > 0");

    let origin = format!("http://127.0.0.1:{}/", ports.operators);
    let asked = browser.requested_urls();
    assert!(asked.len() > 5, "{asked:?}");
    for url in asked {
        assert!(
            url == format!("{origin}ui") || url == format!("{origin}metrics") || url == "data:,",
            "{url}"
        );
    }
}

fn shows_servers_and_traffic(browser: &mut Browser, servers: &Servers, decode: &[String], ports: Ports) {
    browser.until("document.getElementById('state').innerText === 'ready'");
    assert_eq!(browser.value("document.getElementById('encoding').hidden"), true, "there are no encoders");
    let prefill = servers.prefill.url();
    browser.until(&health("prefill", &prefill, "healthy"));
    for url in decode {
        browser.until(&health("decode", url, "healthy"));
    }
    browser.until("document.getElementById('version').innerText.match(/^[0-9]+[.][0-9]+/) !== null");
    browser.until("document.getElementById('uptime').innerText.match(/^up [0-9]+ (s|min)/) !== null");
    browser.until("document.getElementById('queue').innerText.startsWith('0')");
    browser.until(&format!("{} === '0'", cell("prefill", &prefill, "In flight")));

    let stream = open(ports.clients, 1_000_000, true).expect("a stream");
    let on = |url: &str| cell("decode", url, "In flight");
    browser.until(&format!("[{}, {}].sort().join() === '0,1'", on(&decode[0]), on(&decode[1])));
    browser.until("document.getElementById('flight').innerText.startsWith('1')");
    drop(stream);
    browser.until(&format!("[{}, {}].sort().join() === '0,0'", on(&decode[0]), on(&decode[1])));
    browser.until("document.getElementById('wrong').innerText.includes('cancelled: client_left')");
}

fn follows_health(browser: &mut Browser, servers: &mut Servers, folder: &Path) {
    let url = servers.decode_url(0);
    browser.until("parseFloat(document.getElementById('rate').innerText) > 1");
    browser.until(&format!("parseFloat({}) > 0", cell("decode", &url, "Requests/s")));
    browser.until("document.querySelectorAll('#pairs tr').length === 2");
    let pair = "document.querySelector('#pairs tr').innerText";
    browser.until(&format!("{pair}.match(/[0-9.]+ (µs|ms|s) [/] [0-9.]+ (µs|ms|s)/) !== null"));
    for plot in ["requests", "first", "duration", "own"] {
        // Long enough to be visible.
        browser.until(&format!("document.querySelector('#{plot} .plot .first').getBBox().width > 30"));
        let label = format!("document.querySelector('#{plot} .plot').getAttribute('aria-label')");
        browser.until(&format!("{label}.match(/[0-9.]+( (µs|ms|s)|[/]s)/) !== null"));
    }
    // Short prompts, of which nothing is believed cached; of decode that is not told.
    browser.until(
        "/^0 % *servers (do not tell|told)/.test(document.getElementById('cached').innerText.replace(/\\s+/g, ' '))",
    );
    browser.until("/^[0-9.]+ ([KM]iB|B)/.test(document.getElementById('work').innerText)");
    let prefill = servers.prefill.url();
    browser.until(&format!("{} === '0 %'", cell("prefill", &prefill, "In its cache, last minute")));
    browser.until(&format!("{} === '–'", cell("decode", &url, "In its cache, last minute")));
    browser.until(&format!("/^[0-9.]+ ([KM]iB|B)$/.test({})", cell("prefill", &prefill, "Work")));
    browser.screenshot(&folder.join("desktop.png"));

    let address = servers.stop(0);
    browser.until(&health("decode", &url, "unhealthy"));
    browser.until(&health("decode", &servers.decode_url(1), "healthy"));
    browser.until("document.getElementById('decode').innerText.includes('1 of 2')");
    browser.until(&format!("/[a-z]+ [0-9]+/.test({})", cell("decode", &url, "Failures, last minute")));
    browser.screenshot(&folder.join("desktop-server-stopped.png"));

    servers.start_again(0, address);
    browser.until(&health("decode", &url, "healthy"));
    browser.until("document.getElementById('decode').innerText.includes('2 of 2')");
    servers.decode[0].as_ref().expect("a server that runs").drain();
    browser.until(&health("decode", &url, "draining"));
    browser.until("document.getElementById('decode').innerText.includes('1 of 2')");
    let address = servers.stop(0);
    browser.until(&health("decode", &url, "unhealthy"));
    servers.start_again(0, address);
    browser.until(&health("decode", &url, "healthy"));
    for health in ["unhealthy", "healthy", "draining"] {
        let said = format!("decode {url} is {health}");
        browser.until(&format!("document.getElementById('changes').innerText.includes('{said}')"));
    }
    browser.screenshot(&folder.join("desktop-server-started.png"));
}

fn reads_on_a_phone(browser: &mut Browser, folder: &Path) {
    let rows = browser.accessible_nodes("row");
    assert_eq!(rows, 2 + 3 + 2, "heads, servers and pairs");
    // No horizontal scrolling at any width.
    for width in [320, 760, 1024] {
        browser.resize(width, 740, true);
        assert_eq!(browser.value("document.documentElement.scrollWidth"), width);
    }
    browser.resize(360, 740, true);
    // The plots are redrawn for this width.
    browser.until("document.querySelector('#own .plot').viewBox.baseVal.width < 360");
    assert_eq!(browser.value("document.documentElement.scrollWidth"), 360);
    // Styled as cards, but a table for screen readers: every part has an explicit role.
    let parts =
        ["table", "thead", "tbody", "tr", "th", "td"].map(|part| format!("{part}:not([role])")).join(", ");
    assert_eq!(browser.value(&format!("document.querySelectorAll('{parts}').length")), 0);
    assert_eq!((browser.accessible_nodes("row"), browser.accessible_nodes("columnheader")), (rows, 15));
    browser.screenshot(&folder.join("phone.png"));
    browser.set_color_scheme("dark");
    browser.screenshot(&folder.join("phone-dark.png"));
    let background = browser.value("getComputedStyle(document.body).backgroundColor");
    assert_eq!(background, "rgb(18, 21, 26)");
    browser.resize(1280, 900, false);
    browser.until("document.querySelector('#own .plot').viewBox.baseVal.width > 360");
    browser.screenshot(&folder.join("desktop-dark.png"));
}

/// The page's own calculations, with edge cases that no server produces.
fn calculates(browser: &mut Browser) {
    for sum in [
        r#"labelsOf('{a="x\\"y\\\\z\\n",b="",c=","}').a === 'x"y\\z\n'"#,
        "quantile(.5, [[1, 0], [2, 10], [Infinity, 10]]) === 1.5",
        "quantile(.99, [[1, 0], [2, 10], [Infinity, 1000]]) === 2",
        "quantile(.5, [[1, 0], [Infinity, 0]]) === null && quantile(.5, []) === null",
        "growth({ index: 0 }, { values: [7] }, { values: [5] }) === 2",
        "growth({ index: 0 }, { values: [3] }, { values: [5] }) === 3",
        "growth({ index: 0 }, { values: [3] }, { values: [] }) === 3",
        "rate(30, { at: 5000 }, { at: 2000 }) === 10 && rate(30, { at: 5000 }, { at: 5000 }) === null",
        "[2e-6, 1.5e-3, 2, 250].map(seconds).join() === '2 µs,1.5 ms,2 s,250 s'",
        "[59, 3599, 7260, 90000].map(uptime).join() === '59 s,59 min,2 h 1 min,1 d 1 h'",
    ] {
        assert_eq!(browser.value(sum), true, "{sum}");
    }
}

#[test]
fn page_shows_how_much_of_the_prompts_is_believed_cached() {
    if !browser::is_installed() {
        return;
    }
    let runtime = Runtime::new().expect("a runtime");
    let start = |role| {
        let config = SimConfig { prefix_cache: true, ..quick(role, None) };
        runtime.block_on(Sim::start(config)).expect("a free port")
    };
    let (prefill, decode) = (start(Role::Prefill), start(Role::Decode));
    let (url, decode_url) = (prefill.url(), decode.url());
    let bootstrap = prefill.bootstrap_port().expect("a bootstrap port").to_string();
    let args = ["--prefill", &url, &bootstrap, "--decode", &decode_url];
    let (_program, ports) = started(|ports| program_at(&args, ports));
    let folder = folder().join("caches");
    fs::create_dir_all(&folder).expect("a folder");
    let mut browser = Browser::start(&folder);
    browser.open(&ports.page());
    // Ready once the servers have described themselves, and with that their caches.
    browser.until("document.getElementById('state').innerText === 'ready'");
    let prompt = "the same words again ".repeat(500);
    let _traffic = Traffic::of(move |_| {
        let mut response = String::new();
        open_for(ports.clients, &prompt, 1, false)?.read_to_string(&mut response)?;
        Ok(response)
    });
    browser.until(
        "/^[1-9][0-9]* % *servers told [1-9][0-9]* %/\
         .test(document.getElementById('cached').innerText.replace(/\\s+/g, ' '))",
    );
    browser.until(&format!("parseInt({}) > 0", cell("prefill", &url, "In its cache, last minute")));
    assert_eq!(browser.console_messages(), [""; 0]);
}

#[test]
fn page_shows_encoders_where_there_are_some() {
    if !browser::is_installed() {
        return;
    }
    let servers = Servers::start();
    let ports = Ports::free();
    let encoder = servers.runtime.block_on(Sim::start(quick(Role::Encoder, None))).expect("a free port");
    let url = encoder.url();
    let decode = servers.decode_url(0);
    let program = router_with(&servers, &[&decode], &["--encode", &url], ports).expect("free ports");
    // Its profile is not that of the other test's browser.
    let folder = folder().join("encoders");
    fs::create_dir_all(&folder).expect("a folder");
    let mut browser = Browser::start(&folder);
    browser.open(&ports.page());
    let cell = |label: &str| {
        format!("document.querySelector('#encoders tr [data-label=\"{label}\"]').innerText.trim()")
    };
    browser.until("document.querySelector('#encoders tr') !== null");
    browser.until(&format!("{} === '{url}'", cell("Encoder")));
    browser.until(&format!("{} === 'healthy'", cell("Health")));
    // The prefill server is not language-only.
    let registered = cell("Registrations");
    browser.until(&format!("{registered} === 'refused 1'"));
    browser.until("document.getElementById('state').innerText === 'ready'");
    for width in [320, 1024] {
        browser.resize(width, 740, true);
        assert_eq!(browser.value("document.documentElement.scrollWidth"), width);
    }
    assert_eq!(browser.console_messages(), [""; 0]);
    drop(program);
}

/// The head of a response, in lower case, and its body.
fn ask(port: u16, request: &str) -> (String, String) {
    let mut client = TcpStream::connect(("127.0.0.1", port)).expect("the operators' listener");
    client.set_read_timeout(Some(kit::processes::DEADLINE)).expect("a timeout");
    write!(client, "{request} HTTP/1.1\r\nhost: router\r\nconnection: close\r\n\r\n").expect("it reads");
    let mut response = String::new();
    client.read_to_string(&mut response).expect("a response");
    let (head, body) = response.split_once("\r\n\r\n").expect("a head");
    (head.to_ascii_lowercase(), body.to_owned())
}

#[test]
fn page_has_security_headers() {
    let servers = Servers::start();
    let (_program, ports) = router(&servers, &[&servers.decode_url(0)]);
    let (head, body) = ask(ports.operators, "GET /ui");
    assert!(head.starts_with("http/1.1 200 "), "{head}");
    for header in [
        "content-type: text/html; charset=utf-8",
        "content-security-policy: default-src 'none'; connect-src 'self'; ",
        "x-content-type-options: nosniff",
        "cache-control: no-store",
        "referrer-policy: no-referrer",
    ] {
        assert!(head.contains(&format!("\r\n{header}")), "{header} in {head}");
    }
    assert!(body.starts_with("<!doctype html>") && body.ends_with("</html>\n"));
    assert!(!body.contains("//127") && !body.contains("innerHTML"));
    let (head_only, nothing) = ask(ports.operators, "HEAD /ui");
    assert!(head_only.contains(&format!("\r\ncontent-length: {}", body.len())), "{head_only}");
    assert_eq!(nothing, "");
    let (refused, _) = ask(ports.operators, "POST /ui");
    assert!(refused.starts_with("http/1.1 405 ") && refused.contains("\r\nallow: get, head"), "{refused}");
}

/// The pictures of `docs/images`. Larger ones are slow to load, and stay in the repository's history.
const PICTURES: [&str; 3] =
    ["status-under-load.webp", "status-with-a-failed-server.webp", "status-on-a-phone.webp"];
const MAX_PICTURE: usize = 150_000;

/// Writes the pictures if `UPDATE_DOCS` is set.
#[test]
fn documents_show_the_page() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/images");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        assert!(browser::is_installed());
        take_pictures(&PICTURES.map(|name| folder.join(name)));
    }
    let text = include_str!("../docs/OPERATIONS.md");
    for name in PICTURES {
        let picture = fs::read(folder.join(name)).expect("a picture");
        assert!(picture.starts_with(b"RIFF") && picture[8..].starts_with(b"WEBP"), "{name}");
        assert!(picture.len() <= MAX_PICTURE, "{name} has {} bytes", picture.len());
        let (before, _) = text.split_once(&format!("](images/{name})")).expect("it is shown");
        let (_, instead) = before.rsplit_once("![").expect("the text for those who do not see it");
        assert!(instead.len() > 30, "{name}: {instead}");
    }
}

/// A fleet of two prefill and three decode servers for a minute, and after one of them has stopped.
fn take_pictures([under_load, failed, on_a_phone]: &[PathBuf; 3]) {
    let runtime = Runtime::new().expect("a runtime");
    let start = |role, last| {
        let addr = Some(SocketAddr::from(([127, 0, 10, last], 30_000)));
        let inter_token = Duration::from_millis(20);
        let config = SimConfig { inter_token, record: false, prefix_cache: true, ..quick(role, addr) };
        runtime.block_on(Sim::start(config)).expect("a free port")
    };
    let prefill = [1, 2].map(|last| start(Role::Prefill, last));
    let [first, second, third] = [11, 12, 13].map(|last| start(Role::Decode, last));
    let mut args = vec!["--policy".to_owned(), "cache_aware".to_owned()];
    for server in &prefill {
        let port = server.bootstrap_port().expect("a bootstrap port").to_string();
        args.extend(["--prefill".to_owned(), server.url(), port]);
    }
    args.extend([&first, &second, &third].iter().flat_map(|server| ["--decode".to_owned(), server.url()]));
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let (_program, ports) = started(|ports| program_at(&args, ports));
    let mut browser = Browser::start(&folder().join("pictures"));
    browser.resize(1100, 900, false);
    browser.open(&ports.page());
    let _traffic: Vec<Traffic> = (0..8)
        .map(|client| {
            Traffic::of(move |number| {
                // Each prompt comes three times, and no two others begin alike: simulated servers cache whole
                // prompts, and the router believes in a common beginning.
                let prompt =
                    format!("{client} {} {}", number / 3, "You are a helpful assistant. ".repeat(400));
                let mut response = String::new();
                open_for(ports.clients, &prompt, number % 40 + 10, number % 4 != 0)?
                    .read_to_string(&mut response)?;
                Ok(response)
            })
        })
        .collect();
    browser.until("parseInt(document.getElementById('uptime').innerText.slice(3)) >= 50");
    browser.screenshot_down_to("pairs-title", under_load);

    let url = third.url();
    runtime.block_on(third.shutdown());
    browser.until(&health("decode", &url, "unhealthy"));
    browser.until("document.getElementById('decode').innerText.includes('2 of 3')");
    browser.until(&format!("/[a-z]+ [0-9]+/.test({})", cell("decode", &url, "Failures, last minute")));
    browser.screenshot_down_to("changes", failed);
    browser.resize(390, 844, false);
    browser.until("document.querySelector('#own .plot').viewBox.baseVal.width < 390");
    browser.screenshot_down_to("requests", on_a_phone);
}
