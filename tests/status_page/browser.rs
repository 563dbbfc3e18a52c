//! Headless Chromium with one page, driven over its DevTools protocol (`--remote-debugging-pipe`: JSON, each
//! message ended by a zero byte).

#![allow(unreachable_pub, reason = "a test file is a crate of its own")]

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Far longer than anything takes, for a busy machine.
const TIMEOUT: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// Below the last element of a screenshot, in pixels.
const MARGIN: u64 = 16;
/// From the request to close to the kill.
const ENDING: Duration = Duration::from_secs(5);

/// Chromium reads from descriptor 3 and writes to 4.
const START: &str = r#"exec 3<&0 4>&1 0</dev/null 1>&2; exec "$0" "$@""#;
const FLAGS: [&str; 11] = [
    "--headless=new",
    "--remote-debugging-pipe",
    // Chromium has no sandbox as root; it loads only our own page.
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-proxy-server",
    "--hide-scrollbars",
];

pub struct Browser {
    child: Child,
    stdin: ChildStdin,
    messages: Receiver<Value>,
    calls: u64,
    session: Option<String>,
    events: Vec<Value>,
}

/// Whether Chromium is installed. Panics if it is not and `CI` is set.
pub fn is_installed() -> bool {
    let output = Command::new("chromium").arg("--version").output();
    let is_there = output.is_ok_and(|output| output.status.success());
    if !is_there {
        assert!(
            std::env::var_os("CI").is_none_or(|ci| ci.is_empty()),
            "CI is set, and chromium does not run"
        );
        // Not `eprintln!`, which is not shown for a test that passes.
        let _ =
            writeln!(io::stderr(), "NOT TESTED with chromium, which does not run (a failure if CI is set)");
    }
    is_there
}

impl Browser {
    /// Starts with an empty page and a profile of its own below `folder`.
    pub fn start(folder: &Path) -> Self {
        let profile = folder.join("profile");
        let _ = fs::remove_dir_all(&profile);
        fs::create_dir_all(&profile).expect("a folder");
        let log = File::create(folder.join("chromium.log")).expect("a file");
        let mut command = Command::new("sh");
        command.args(["-c", START, "chromium"]).args(FLAGS);
        command.arg(format!("--user-data-dir={}", profile.display())).arg("about:blank");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
        let mut child = command.spawn().expect("sh is there");
        let (stdin, stdout) = (child.stdin.take().expect("a pipe"), child.stdout.take().expect("a pipe"));
        let (sender, messages) = mpsc::channel();
        thread::spawn(move || {
            for message in BufReader::new(stdout).split(0).map_while(Result::ok) {
                let message = serde_json::from_slice(&message).expect("JSON of chromium's");
                if sender.send(message).is_err() {
                    break;
                }
            }
        });
        let mut browser = Self { child, stdin, messages, calls: 0, session: None, events: Vec::new() };
        browser.attach();
        browser
    }

    fn attach(&mut self) {
        let target = self.call("Target.createTarget", json!({ "url": "about:blank" }));
        let attach = json!({ "targetId": target["targetId"], "flatten": true });
        let attached = self.call("Target.attachToTarget", attach);
        self.session = Some(attached["sessionId"].as_str().expect("a session").to_owned());
        for domain in ["Page", "Runtime", "Log", "Network", "Accessibility"] {
            self.call(&format!("{domain}.enable"), json!({}));
        }
    }

    pub fn call(&mut self, method: &str, params: Value) -> Value {
        self.calls += 1;
        let mut message = json!({ "id": self.calls, "method": method, "params": params });
        if let Some(session) = &self.session {
            message["sessionId"] = json!(session);
        }
        let mut bytes = message.to_string().into_bytes();
        bytes.push(0);
        self.stdin.write_all(&bytes).expect("chromium reads");
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let message =
                self.messages.recv_timeout(left).unwrap_or_else(|_| panic!("no response to {method}"));
            if message["id"] != json!(self.calls) {
                self.events.push(message);
            } else {
                assert!(message["error"].is_null(), "{method}: {message}");
                return message["result"].clone();
            }
        }
    }

    pub fn open(&mut self, url: &str) {
        let opened = self.call("Page.navigate", json!({ "url": url }));
        assert!(opened["errorText"].is_null(), "{url}: {opened}");
    }

    fn evaluate(&mut self, expression: &str) -> Value {
        let params = json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        self.call("Runtime.evaluate", params)
    }

    /// The value of a JavaScript expression in the page.
    pub fn value(&mut self, expression: &str) -> Value {
        let response = self.evaluate(expression);
        assert!(response["exceptionDetails"].is_null(), "{expression}: {response}");
        response["result"]["value"].clone()
    }

    /// Waits until an expression is true. It may throw while the page is loading.
    pub fn until(&mut self, expression: &str) {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let response = self.evaluate(expression);
            if response["result"]["value"] == true {
                return;
            }
            if Instant::now() > deadline {
                let page = self.value("document.body.innerText");
                let page = page.as_str().unwrap_or_default();
                panic!("never: {expression}\n{response}\n{page}\n{:#?}", self.console_messages());
            }
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// Resizes the window, in CSS pixels.
    pub fn resize(&mut self, width: u32, height: u32, is_phone: bool) {
        let scale = if is_phone { 2 } else { 1 };
        let size =
            json!({ "width": width, "height": height, "deviceScaleFactor": scale, "mobile": is_phone });
        self.call("Emulation.setDeviceMetricsOverride", size);
    }

    /// Sets the preferred color scheme: `dark` or `light`.
    pub fn set_color_scheme(&mut self, scheme: &str) {
        let features = json!([{ "name": "prefers-color-scheme", "value": scheme }]);
        self.call("Emulation.setEmulatedMedia", json!({ "features": features }));
    }

    /// Writes a screenshot of the whole page to a file.
    pub fn screenshot(&mut self, file: &Path) {
        self.capture(json!({ "format": "png", "captureBeyondViewport": true }), file);
    }

    /// The same without what is below an element, as WebP, which is a third of PNG here and as easy to read.
    pub fn screenshot_down_to(&mut self, id: &str, file: &Path) {
        let bottom = format!("Math.ceil(document.getElementById('{id}').getBoundingClientRect().bottom)");
        let (height, width) = (self.value(&bottom), self.value("innerWidth"));
        let height = height.as_u64().expect("pixels") + MARGIN;
        let clip = json!({ "x": 0, "y": 0, "width": width, "height": height, "scale": 1 });
        let params = json!({ "format": "webp", "quality": 80, "captureBeyondViewport": true, "clip": clip });
        self.capture(params, file);
    }

    fn capture(&mut self, params: Value, file: &Path) {
        let picture = self.call("Page.captureScreenshot", params);
        fs::write(file, from_base64(picture["data"].as_str().expect("base64"))).expect("a file");
    }

    /// The number of nodes with a role in the accessibility tree.
    pub fn accessible_nodes(&mut self, role: &str) -> usize {
        let tree = self.call("Accessibility.getFullAXTree", json!({}));
        let nodes = tree["nodes"].as_array().expect("nodes");
        nodes.iter().filter(|node| node["ignored"] == false && node["role"]["value"] == role).count()
    }

    fn events(&mut self, method: &str) -> Vec<Value> {
        self.events.extend(self.messages.try_iter());
        let of_it = self.events.iter().filter(|event| event["method"] == method);
        of_it.map(|event| event["params"].clone()).collect()
    }

    /// The URLs that the page has requested.
    pub fn requested_urls(&mut self) -> Vec<String> {
        let sent = self.events("Network.requestWillBeSent");
        sent.iter().map(|event| event["request"]["url"].as_str().expect("a URL").to_owned()).collect()
    }

    /// All messages and exceptions of the console.
    pub fn console_messages(&mut self) -> Vec<String> {
        let methods = ["Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"];
        methods.iter().flat_map(|method| self.events(method)).map(|event| event.to_string()).collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let close = json!({ "id": self.calls + 1, "method": "Browser.close" }).to_string() + "\0";
        // Fails if it has ended.
        let _ = self.stdin.write_all(close.as_bytes());
        let deadline = Instant::now() + ENDING;
        while self.child.try_wait().is_ok_and(|status| status.is_none()) && Instant::now() < deadline {
            thread::sleep(POLL_INTERVAL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn from_base64(text: &str) -> Vec<u8> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digits = text.bytes().filter(|byte| *byte != b'=');
    let values: Vec<u32> = digits
        .map(|byte| DIGITS.iter().position(|digit| *digit == byte).expect("a digit of base64") as u32)
        .collect();
    let group = |group: &[u32]| {
        let bits = (0..4).fold(0, |bits, place| bits << 6 | group.get(place).copied().unwrap_or(0));
        bits.to_be_bytes()[1..group.len()].to_vec()
    };
    values.chunks(4).flat_map(group).collect()
}
