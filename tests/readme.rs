//! The documents are true: their commands run, their links resolve, their flags, codes and files exist.
//! `docs/FAILURES.md` is compared with its tests in `tests/failures.rs`, `docs/METRICS.md` with a scrape in
//! `tests/metrics.rs`.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions only, not in what they call")]

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

/// A README that takes longer to read than a newcomer stays does not help one.
const MAX_README_WORDS: usize = 1_300;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn file(path: &str) -> String {
    fs::read_to_string(root().join(path)).expect(path)
}

/// All files below a folder of the project.
fn files_below(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect()
}

/// The source of the only module with this file name, wherever it is in `src`.
fn source(name: &str) -> String {
    let found: Vec<PathBuf> =
        files_below(&root().join("src")).into_iter().filter(|path| path.ends_with(name)).collect();
    assert_eq!(found.len(), 1, "{name}: {found:?}");
    fs::read_to_string(&found[0]).unwrap()
}

/// The README and all Markdown files in `docs`, with their paths.
fn documents() -> Vec<(PathBuf, String)> {
    let in_docs = files_below(&root().join("docs"));
    let paths = in_docs.into_iter().chain(["README.md", "CHANGELOG.md"].map(|name| root().join(name)));
    let documents = paths.filter(|path| path.extension().is_some_and(|extension| extension == "md"));
    documents.map(|path| (path.clone(), fs::read_to_string(path).unwrap())).collect()
}

/// The code blocks of one language.
fn blocks<'a>(text: &'a str, language: &str) -> Vec<&'a str> {
    let fence = format!("```{language}\n");
    let mut blocks = Vec::new();
    let mut rest = text;
    while let Some((_, after)) = rest.split_once(&fence) {
        let (block, behind) = after.split_once("```").expect("the end of a block");
        blocks.push(block);
        rest = behind;
    }
    blocks
}

/// What stands between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The cells of a column of the table that follows a heading, without its header.
fn column<'a>(text: &'a str, heading: &str, column: usize) -> Vec<&'a str> {
    let (_, after) = text.split_once(&format!("\n{heading}\n")).unwrap_or_else(|| panic!("no {heading}"));
    let lines =
        after.lines().skip_while(|line| !line.starts_with('|')).take_while(|line| line.starts_with('|'));
    lines.skip(2).map(|row| row.split('|').nth(column + 1).expect("a cell").trim()).collect()
}

fn program(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mini-lb")).args(args).output().unwrap()
}

/// The words of `text` that are flags.
fn flags(text: &str) -> BTreeSet<String> {
    let is_part = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let words = text.split(|c: char| !is_part(c)).filter(|word| word.starts_with("--") && word.len() > 3);
    words.map(str::to_owned).collect()
}

#[test]
fn the_readme_is_short() {
    let words = file("README.md").split_whitespace().count();
    assert!(words <= MAX_README_WORDS, "{words} words");
}

/// The first line of each block of commands in the README, and what runs it.
const RUN_BY: [(&str, &str); 6] = [
    ("pip install mini-lb openai", ".ci/dist-test"),
    ("cargo run --example quickstart", "tests/examples.rs, and .ci/release with `-- --once`"),
    ("cargo build --release", ".ci/dist, for a static target"),
    (SERVE, "the test below"),
    ("python examples/python_client.py http://127.0.0.1:8000", "tests/examples.rs, on a free port"),
    ("cargo test --workspace", ".ci/run"),
];

const SERVE: &str =
    "target/release/mini-lb --prefill http://prefill-1:30000 8998 --decode http://decode-1:30000 --port 8000";

#[test]
fn every_command_is_run_by_a_test_or_by_ci() {
    let known: Vec<&str> = RUN_BY.iter().map(|(command, _)| *command).collect();
    let readme = file("README.md");
    let commands: Vec<&str> =
        blocks(&readme, "sh").into_iter().map(|block| block.lines().next().unwrap_or_default()).collect();
    assert_eq!(commands, known);
    let ci = file(".ci/run") + &file(".ci/release") + &file(".ci/dist");
    for part in [
        "cargo test --workspace",
        "cargo build --release",
        "--example quickstart -- --once",
        "step .ci/dist",
        ".ci/release",
        ".ci/dist-test",
    ] {
        assert!(ci.contains(part), "{part}");
    }
    let examples = file("tests/examples.rs");
    assert!(examples.contains("python_client.py") && examples.contains(r#""quickstart""#));
}

/// Every command line of the program, in a block or between backticks, is one that it accepts.
#[test]
fn every_command_line_is_accepted() {
    let mut checked = 0;
    for (path, text) in documents() {
        let in_blocks = ["sh", "text"].into_iter().flat_map(|language| blocks(&text, language));
        let lines: Vec<&str> = in_blocks.flat_map(str::lines).chain(quoted(&text)).collect();
        for line in lines {
            let line = line.trim();
            let args = line.strip_prefix("target/release/mini-lb ").or_else(|| line.strip_prefix("mini-lb "));
            let Some(args) = args.filter(|args| args.starts_with("--")) else { continue };
            let example = root().join("deploy/config.toml").display().to_string();
            let at = |word: &str| ["FILE", "/etc/mini-lb/config.toml"].contains(&word);
            let words = args.split_whitespace().filter(|word| *word != "FLAGS");
            let mut words: Vec<&str> = words.map(|word| if at(word) { &example } else { word }).collect();
            if !words.contains(&"--check-config") && !words.contains(&"--help") {
                words.push("--check-config");
            }
            let said = program(&words);
            assert!(said.status.success(), "{path:?}: {line}: {}", String::from_utf8_lossy(&said.stderr));
            checked += 1;
        }
    }
    assert!(checked >= 5, "{checked}");
}

/// Ends the process when a test fails.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

#[test]
fn the_line_for_a_real_pair_starts_a_router() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut words = SERVE.split(' ').skip(1).collect::<Vec<_>>();
    let free = port.to_string();
    *words.last_mut().unwrap() = &free;
    let router =
        Command::new(env!("CARGO_BIN_EXE_mini-lb")).args(words).args(["--host", "127.0.0.1"]).spawn();
    let _router = Running(router.unwrap());
    let give_up = Instant::now() + Duration::from_secs(20);
    let mut stream = loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(stream) => break stream,
            Err(error) => assert!(Instant::now() < give_up, "{error}"),
        }
        std::thread::yield_now();
    };
    stream.write_all(b"GET /health HTTP/1.1\r\nhost: r\r\nconnection: close\r\n\r\n").unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).unwrap();
    assert!(response.starts_with("HTTP/1.1 200 OK\r\n"), "{response}");
}

/// Each file shows some keys; servers are added to one that names none.
#[test]
fn every_configuration_file_is_valid_and_means_what_it_says() {
    let mut printed = String::new();
    let mut checked = 0;
    for (path, text) in documents() {
        for block in blocks(&text, "toml") {
            let name = format!("documents-{}-{checked}.toml", std::process::id());
            let config = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
            fs::write(&config, block).unwrap();
            let config_path = config.display().to_string();
            let mut args = vec!["--check-config", "--config", &config_path];
            for (key, flag) in [("prefill", "--prefill"), ("decode", "--decode")] {
                if !block.lines().any(|line| line.starts_with(key)) {
                    args.extend([flag, "http://127.0.0.1:1"]);
                }
            }
            let said = program(&args);
            fs::remove_file(&config).unwrap();
            assert_eq!(String::from_utf8(said.stderr).unwrap(), "", "{path:?}:\n{block}");
            printed += &String::from_utf8(said.stdout).unwrap();
            checked += 1;
        }
    }
    assert!(checked >= 2, "{checked}");
    for line in ["port = 8000  # ", "retry_on_status = [429, 503]  # ", "max_concurrent_requests = 2000  # "]
    {
        assert!(printed.contains(&format!("\n{line}")), "{line}: {printed}");
    }
    assert!(printed.contains("[\"http://prefill-3:30000\", 8998]]  # "), "{printed}");
}

/// As GitHub makes one of a heading.
fn anchor(heading: &str) -> String {
    let kept = heading.to_lowercase().replace(' ', "-");
    kept.chars().filter(|c| c.is_alphanumeric() || "-_".contains(*c)).collect()
}

/// The targets of Markdown links, without those in code blocks.
fn links(text: &str) -> Vec<&str> {
    let prose = text.split("```").step_by(2);
    prose.flat_map(|part| part.split("](").skip(1)).map(|rest| rest.split(')').next().unwrap()).collect()
}

#[test]
fn every_relative_link_resolves() {
    let mut checked = 0;
    for (path, text) in documents() {
        for link in links(&text).into_iter().filter(|link| !link.starts_with("http")) {
            let (target, fragment) = link.split_once('#').unwrap_or((link, ""));
            let target = if target.is_empty() { path.clone() } else { path.parent().unwrap().join(target) };
            assert!(target.exists(), "{path:?} links to {link}");
            if !fragment.is_empty() {
                let linked = fs::read_to_string(&target).unwrap();
                let mut headings = linked.lines().filter(|line| line.starts_with('#'));
                let is_it = |line: &str| anchor(line.trim_start_matches('#').trim()) == fragment;
                assert!(headings.any(is_it), "{path:?} links to {link}");
            }
            checked += 1;
        }
    }
    assert!(checked > 40, "{checked}");
}

/// Paths of the project that a document or a comment of `deploy` names in plain text.
#[test]
fn every_document_that_is_named_exists() {
    let in_src = files_below(&root().join("src")).into_iter().chain(files_below(&root().join("deploy")));
    let named =
        in_src.filter_map(|path| fs::read_to_string(path).ok()).chain(documents().into_iter().map(|d| d.1));
    let is_part = |c: char| c.is_ascii_alphanumeric() || "/_.-".contains(c);
    let mut checked = 0;
    for text in named {
        for word in text.split(|c: char| !is_part(c)) {
            let word = word.trim_end_matches('.');
            if ["docs/", "tests/", "deploy/", "loadtest/"].iter().any(|folder| word.starts_with(folder)) {
                assert!(root().join(word).exists(), "{word}");
                checked += 1;
            }
        }
    }
    assert!(checked > 30, "{checked}");
}

/// A flag that a document names is one of the program's, or of another program that is named here.
#[test]
fn every_flag_in_the_documents_exists() {
    let help = String::from_utf8(program(&["--help"]).stdout).unwrap();
    // SGLang's, sglang-router's of later versions, cargo's and those of other tools in command lines.
    let others = [
        "--disaggregation-bootstrap-port",
        "--disaggregation-mode",
        "--model-path",
        "--enable-pd-role-switch",
        "--epd-disaggregation",
        "--example",
        "--release",
        "--workspace",
        "--once",
        "--features",
        "--lib",
        "--locked",
        "--open",
        "--write",
        "--file",
        "--tag",
        "--kustomize",
        // Of helm.
        "--namespace",
        "--create-namespace",
        "--values",
        "--now",
        "--test",
        // Of SGLang's servers.
        "--disaggregation-transfer-backend",
        "--kv-cache-dtype",
        "--page-size",
        "--disable-radix-cache",
        "--enable-cache-report",
        "--encoder-only",
        "--encoder-register-urls",
        "--encoder-urls",
        "--language-only",
        "--model",
        "--role",
        // Of podman and systemd's tools, in OPERATIONS.md.
        "--input",
        "--publish",
        "--read-only",
        "--volume",
        // Of kubectl.
        "--as",
        "--flatten",
        "--minify",
        "--namespace",
        "--raw",
        // Of cargo, in OPERATIONS.md.
        "--path",
        // Of cargo and the fleet lab, in ROUTING.md.
        "--bench",
        "--nocapture",
        "--load",
        "--trace",
        "--generate",
        "--scenario",
        "--times",
        "--peers",
        "--router",
        "--compare",
        "--plots",
        "--loads",
        // cargo's.
        "--path",
    ];
    let unsupported = flags(&source("unsupported.rs"));
    let mut known = flags(&help);
    known.extend(others.map(str::to_owned));
    // RELEASING.md is about other programs.
    for (path, text) in documents().into_iter().filter(|(path, _)| !path.ends_with("RELEASING.md")) {
        let of_others =
            ["MIGRATING.md", "CHANGELOG.md", "CONFIGURATION.md"].iter().any(|name| path.ends_with(name));
        for flag in flags(&text) {
            assert!(known.contains(&flag) || of_others && unsupported.contains(&flag), "{path:?}: {flag}");
        }
    }
}

#[test]
fn flags_for_those_who_migrate_are_those_that_the_program_rejects() {
    let migrating = file("docs/MIGRATING.md");
    let unsupported = source("unsupported.rs");
    let list = |name: &str| {
        let (_, after) = unsupported.split_once(&format!("const {name}:")).unwrap();
        after.split_once("];").unwrap().0.to_owned()
    };
    let in_column = |heading: &str| -> BTreeSet<String> {
        column(&migrating, heading, 0).iter().flat_map(|cell| quoted(cell)).map(str::to_owned).collect()
    };
    // An advice may name flags of this program: only those at the beginning of an entry are refused.
    let refused = list("REFUSED");
    let entries = |text: &str| -> BTreeSet<String> {
        let entries = text.split('(').filter_map(|entry| entry.trim_start().strip_prefix('"'));
        entries.map(|entry| entry.split('"').next().unwrap().to_owned()).collect()
    };
    let refused = entries(&refused);
    assert_eq!(in_column("## Flags that are rejected"), refused);
    let mut accepted = flags(&list("ACCEPTED"));
    accepted.extend(entries(&list("WITHOUT_EFFECT")));
    assert_eq!(in_column("## Flags that are accepted without effect"), accepted);
    let (_, policies) = migrating.split_once("Policies that are rejected: ").unwrap();
    let policies: BTreeSet<&str> = quoted(policies.split_once(". ").unwrap().0).collect();
    let listed = entries(&list("POLICIES"));
    assert_eq!(policies, listed.iter().map(String::as_str).collect());
    // What is said to exist here does.
    let help = flags(&String::from_utf8(program(&["--help"]).stdout).unwrap());
    let (_, same) = migrating.split_once("## Flags with the same name").unwrap();
    let same = flags(same.split("\n## ").next().unwrap());
    assert!(same.len() > 35 && same.is_subset(&help), "{:?}", same.difference(&help));
    // Every flag of sglang-router 0.3.2 is in one of the lists.
    let cli = file("tests/cli.rs");
    let (_, theirs) = cli.split_once("SGLANG_ROUTER_0_3_2: &str = \"").unwrap();
    for flag in theirs.split('"').next().unwrap().split_whitespace().map(|name| format!("--{name}")) {
        let lists = [&same, &refused, &accepted].into_iter().filter(|list| list.contains(&flag));
        assert_eq!(lists.count(), 1, "{flag}");
    }
    // And what replaces a rejected flag does, too.
    for instead in column(&migrating, "## Flags that are rejected", 1) {
        let named: BTreeSet<String> = quoted(instead).flat_map(flags).collect();
        assert!(named.is_subset(&help), "{instead}");
    }
}

#[test]
fn the_error_codes_are_those_of_the_source() {
    let api = file("docs/API.md");
    let documented: BTreeSet<&str> = column(&api, "## Error codes", 0).into_iter().flat_map(quoted).collect();
    let error = file("src/error.rs");
    let codes = error.split("fn code(").skip(1).map(|rest| rest.split("\n    }").next().unwrap());
    let mut in_source: BTreeSet<String> =
        codes.flat_map(|body| body.split('"').skip(1).step_by(2)).map(str::to_owned).collect();
    // The codes of responses that are made of several servers' responses.
    let endpoints = source("endpoints.rs") + &source("fan_out.rs");
    for code in ["unhealthy", "flush_cache_failed", "fan_out_failed"] {
        assert!(endpoints.contains(&format!("\"{code}\"")));
        in_source.insert(code.to_owned());
    }
    assert_eq!(documented, in_source.iter().map(String::as_str).collect());
}

/// Statuses are numbers (tests of the router compare them with what it sends), and both texts are sentences.
#[test]
fn every_error_code_says_what_to_do() {
    let api = file("docs/API.md");
    let (codes, statuses) = (column(&api, "## Error codes", 0), column(&api, "## Error codes", 1));
    for (code, status) in codes.iter().zip(&statuses) {
        let is_one = status.split(", ").all(|part| part == "…" || part == "–" || part.parse::<u16>().is_ok());
        assert!(is_one, "{code}: {status}");
    }
    for column_of_text in [2, 3] {
        for text in column(&api, "## Error codes", column_of_text) {
            assert!(text.ends_with('.'), "{text}");
        }
    }
}

#[test]
fn every_endpoint_of_the_source_is_documented() {
    let api = file("docs/API.md");
    let documented: BTreeSet<&str> = ["## Client listener", "## Admin listener"]
        .into_iter()
        .flat_map(|heading| column(&api, heading, 0))
        .flat_map(quoted)
        .map(|endpoint| endpoint.split_once(' ').map_or(endpoint, |(_, path)| path))
        .collect();
    let paths = |text: &str| -> BTreeSet<String> {
        let code = text.split("#[cfg(test)]").next().unwrap();
        let strings = code.split('"').skip(1).step_by(2).filter(|string| {
            let rest = string.strip_prefix('/');
            let is_in_path = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_-./{*}".contains(c);
            rest.is_some_and(|rest| rest.chars().all(is_in_path))
        });
        strings.map(|path| without_names(path).to_owned()).collect()
    };
    let folders = ["src/admin", "src/server"].map(|folder| files_below(&root().join(folder)));
    let modules = folders.into_iter().flatten().filter(|path| path.extension().is_some_and(|e| e == "rs"));
    let in_source: BTreeSet<String> =
        modules.flat_map(|path| paths(&fs::read_to_string(path).unwrap())).collect();
    assert!(in_source.len() > 15, "{in_source:?}");
    let documented: BTreeSet<&str> = documented.into_iter().map(without_names).collect();
    let others = [
        // Prefill servers have these; the router asks for them.
        "/list_encoder_urls",
        "/register_encoder_url",
        "/unregister_encoder_url",
        // A folder.
        "/var/run/secrets/kubernetes.io/serviceaccount",
    ];
    for path in in_source.iter().filter(|path| !others.contains(&path.as_str())) {
        assert!(documented.contains(path.as_str()), "{path} is not in docs/API.md");
    }
    for path in documented {
        assert!(in_source.contains(path), "{path} is not in the source");
    }
}

/// A path up to its first placeholder, without a slash at its end.
fn without_names(path: &str) -> &str {
    path.split("/{").next().unwrap().trim_end_matches('/')
}

#[test]
fn every_term_of_the_glossary_has_one_meaning() {
    let glossary = file("docs/GLOSSARY.md");
    let mut terms = BTreeSet::new();
    for line in glossary.lines().filter(|line| line.starts_with("**")) {
        let (term, meaning) = line[2..].split_once("**").unwrap();
        assert!(terms.insert(term.to_lowercase()), "{term} is there twice");
        assert!(meaning.ends_with('.') && meaning.len() > 10, "{term}: {meaning}");
    }
    assert!(terms.len() > 150, "{}", terms.len());
}

#[test]
fn tested_clients_are_listed_with_their_versions() {
    let api = file("docs/API.md");
    let python = file("tests/real_clients/requirements.txt");
    let harness = file("tests/real_clients/requirements-lm-eval.txt");
    let harness = harness.lines().filter(|line| line.starts_with("lm_eval"));
    let node: serde_json::Value =
        serde_json::from_str(&file("tests/real_clients/package.json")).expect("JSON");
    let node = format!("openai=={}", node["dependencies"]["openai"].as_str().expect("a version"));
    for pin in python.lines().chain(harness).chain([node.as_str()]) {
        let (name, version) = pin.split_once("==").expect("a pin");
        let listed = |line: &str| line.starts_with(&format!("| `{name}`")) && line.contains(version);
        assert!(api.lines().any(listed), "docs/API.md does not list {pin}");
    }
}
