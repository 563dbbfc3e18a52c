//! The load trace that `--trace-log` writes: what is in a line, whose lines there are, and how the file
//! is bounded.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions only, not in what they call")]

mod kit;

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use kit::program::Folder;
use kit::{
    Client, Gate, Router, RouterProcess, STREAM_HEAD, ScriptedServer, Step, chunk, json, ok_server,
    with_timeout,
};
use loadtest::fleet::live::through_mini_lb;
use loadtest::fleet::trace::{self, Request};
use loadtest::fleet::{Fleet, Reference, simulate};
use mini_lb::{Backend, Choice, Policy};
use serde_json::Value;

/// Bytes of one block of hashes, and its tokens.
const BLOCK: usize = 2_048;
const BLOCK_TOKENS: usize = 512;

/// One line, whose format is checked.
#[derive(Debug, Clone, PartialEq)]
struct Line {
    timestamp: u64,
    input: usize,
    output: u64,
    ids: Vec<u64>,
}

impl Line {
    fn parse(text: &str) -> Self {
        let line: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
        assert_eq!(line.as_object().unwrap().len(), 4, "{text}");
        let number = |name: &str| line[name].as_u64().unwrap_or_else(|| panic!("{name}: {text}"));
        let ids: Vec<u64> =
            line["hash_ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect();
        assert!(ids.iter().all(|id| *id < 1 << 53), "a double has each id: {text}");
        let input = number("input_length") as usize;
        assert_eq!(ids.len(), input.div_ceil(BLOCK_TOKENS), "{text}");
        Self { timestamp: number("timestamp"), input, output: number("output_length"), ids }
    }
}

/// The lines of a file, in its order.
fn lines(path: &Path) -> Vec<Line> {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.is_empty() || text.ends_with('\n'));
    text.lines().map(Line::parse).collect()
}

fn previous(path: &Path) -> PathBuf {
    path.with_extension("jsonl.1")
}

/// A text that no other seed has a part of.
fn text(seed: u64, length: usize) -> String {
    let mut rng = fastrand::Rng::with_seed(seed);
    (0..length).map(|at| if at % 6 == 5 { ' ' } else { rng.lowercase() }).collect()
}

fn completion(prompt: &str) -> String {
    format!(r#"{{"prompt":"{prompt}","max_tokens":3}}"#)
}

/// The response to a completion of this many tokens.
fn usage(tokens: usize) -> Vec<u8> {
    json("200 OK", &format!(r#"{{"choices":[{{"text":"x"}}],"usage":{{"completion_tokens":{tokens}}}}}"#))
}

/// The program between these servers, and the file of its trace.
async fn start(servers: [&ScriptedServer; 2], folder: &Folder, args: &[&str]) -> (RouterProcess, PathBuf) {
    let path = folder.path("load.jsonl");
    let args = [&["--trace-log", path.to_str().unwrap()], args].concat();
    (RouterProcess::between(servers[0], servers[1], &args).await, path)
}

async fn post(client: &mut Client, target: &str, body: &str) -> u16 {
    client.post(target, body).await.status()
}

#[tokio::test]
async fn prompts_that_begin_alike_share_ids_and_a_next_turn_adds_to_them() {
    let servers = [ok_server().await, ScriptedServer::always(usage(7)).await];
    let folder = Folder::new("trace-ids");
    let (program, path) = start([&servers[0], &servers[1]], &folder, &["--policy", "random"]).await;
    let mut client = program.client().await;
    let turn = |role: &str, text: &str| format!(r#"{{"role":"{role}","content":"{text}"}}"#);
    let chat = |turns: &[String]| format!(r#"{{"model":"m","messages":[{}]}}"#, turns.join(","));
    let system = turn("system", &text(1, 3 * BLOCK));
    let first = [system.clone(), turn("user", &text(2, 2 * BLOCK))];
    let next = [first.to_vec(), vec![turn("assistant", &text(3, 900)), turn("user", "go on")]].concat();
    let other = [system, turn("user", &text(4, 2 * BLOCK))];
    let alone = [turn("user", &text(5, 5 * BLOCK))];
    for turns in [&first[..], &next, &other, &alone] {
        assert_eq!(post(&mut client, "/v1/chat/completions", &chat(turns)).await, 200);
    }
    program.stop().await;
    let written = fs::read_to_string(&path).unwrap();
    let [first, next, other, alone]: [Line; 4] = lines(&path).try_into().unwrap();
    let shared = |one: &Line, other: &Line| {
        one.ids.iter().zip(&other.ids).take_while(|(one, other)| one == other).count()
    };
    assert_eq!((first.ids.len(), shared(&first, &next), shared(&first, &other)), (6, 5, 3));
    assert_eq!((shared(&first, &alone), next.ids.len(), alone.output), (0, 6, 7));
    // The rest of a prompt has an id of its own, and no two blocks have the same one.
    let all: HashSet<u64> =
        [&first, &next, &other, &alone].iter().flat_map(|line| line.ids.clone()).collect();
    assert_eq!(all.len(), 6 + 1 + 3 + 6);
    assert!((5 * BLOCK / 4..6 * BLOCK / 4).contains(&first.input), "{first:?}");
    assert_eq!(first.timestamp, 0, "the trace begins with its first request");
    // Digits, and the names of the fields.
    for seed in 1..=5 {
        let text = text(seed, 3 * BLOCK);
        let mut words = text.split(' ').filter(|word| word.len() == 5);
        assert!(words.all(|word| !written.contains(word)), "{written}");
    }
    for word in ["system", "user", "go on", "messages", "/v1", "127.0.0.1"] {
        assert!(!written.contains(word), "{word} in {written}");
    }
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

/// Prompts whose JSON ends in each place of the first and the second block.
#[tokio::test]
async fn there_is_an_id_for_each_begun_block_of_512_tokens() {
    let servers = [ok_server().await, ok_server().await];
    let folder = Folder::new("trace-lengths");
    let (program, path) = start([&servers[0], &servers[1]], &folder, &[]).await;
    let mut client = program.client().await;
    // The closing quote is a byte of the prompt's JSON.
    let lengths = [0, 1, 2, 3, 4, BLOCK - 2, BLOCK - 1, BLOCK, 2 * BLOCK - 1, 2 * BLOCK, 1_100 * BLOCK];
    for length in lengths {
        post(&mut client, "/v1/completions", &completion(&text(9, length))).await;
    }
    for body in [r#"{"max_tokens":1}"#, r#"{"prompt":null}"#, r#"{"prompt":"x","n":99}"#, "no"] {
        post(&mut client, "/v1/completions", body).await;
    }
    client.get("/v1/models").await;
    post(&mut client, "/flush_cache", "").await;
    program.stop().await;
    let lines = lines(&path);
    let inputs: Vec<usize> = lines.iter().map(|line| line.input).collect();
    // The empty one has no prompt, and of the longest 2 MiB are hashed.
    let expected: Vec<usize> =
        lengths[1..].iter().map(|length| (length + 1).min(1_024 * BLOCK).div_ceil(4)).collect();
    assert_eq!(inputs, expected);
    assert!(lines.windows(2).all(|pair| pair[0].timestamp <= pair[1].timestamp));
}

fn stream(events: &[&str]) -> Vec<u8> {
    let chunks = events.iter().map(|event| chunk(&format!("data: {event}\n\n")));
    [&[STREAM_HEAD.as_bytes().to_vec()][..], &chunks.collect::<Vec<_>>(), &[b"0\r\n\r\n".to_vec()]]
        .concat()
        .concat()
}

/// An event of a chat with one token.
const TOKEN: &str = r#"{"id":"0","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":" a"},"finish_reason":null}]}"#;

#[tokio::test]
async fn the_output_is_what_the_server_has_counted_or_else_estimated() {
    let of_generate = |tokens: usize| {
        format!(
            r#"{{"text":"{}","meta_info":{{"completion_tokens":{tokens},"cached_tokens":0}}}}"#,
            "a".repeat(tokens)
        )
    };
    let events: Vec<String> = (1..=9).map(of_generate).collect();
    let events: Vec<&str> = events.iter().map(String::as_str).chain(["[DONE]"]).collect();
    let with_usage = [TOKEN, TOKEN, r#"{"choices":[],"usage":{"completion_tokens":41}}"#, "[DONE]"];
    let without = [&[TOKEN; 700][..], &["[DONE]"]].concat();
    let text = format!(r#"{{"choices":[{{"text":"{}"}}]}}"#, "b".repeat(4_000));
    let cases: Vec<(&str, bool, Vec<u8>, std::ops::RangeInclusive<u64>)> = vec![
        ("/v1/completions", false, usage(23), 23..=23),
        ("/generate", false, json("200 OK", &of_generate(3_000)), 3_000..=3_000),
        ("/generate", true, stream(&events), 9..=9),
        ("/v1/chat/completions", true, stream(&with_usage), 41..=41),
        ("/v1/chat/completions", true, stream(&without), 693..=707),
        ("/v1/completions", false, json("200 OK", &text), 1_000..=1_020),
        ("/v1/completions", false, json("400 Bad Request", &text), 0..=0),
    ];
    for (target, is_stream, response, expected) in cases {
        let servers = [ok_server().await, ScriptedServer::always(response).await];
        let folder = Folder::new("trace-output");
        let (program, path) = start([&servers[0], &servers[1]], &folder, &[]).await;
        let body = format!(r#"{{"stream":{is_stream},"text":"x","prompt":"x","messages":["x"]}}"#);
        post(&mut program.client().await, target, &body).await;
        program.stop().await;
        let output = lines(&path)[0].output;
        assert!(expected.contains(&output), "{target}: {output} is not in {expected:?}");
    }
}

#[tokio::test]
async fn requests_that_fail_or_are_cancelled_are_in_the_trace_with_what_they_got() {
    let prompt = |seed: u64| completion(&text(seed, 3 * BLOCK));
    let streamed = |seed: u64| prompt(seed).replacen('{', r#"{"stream":true,"#, 1);
    let three = [STREAM_HEAD.as_bytes(), &chunk(&format!("data: {TOKEN}\n\n").repeat(3))].concat();
    let (three_sent, hanging) = (Gate::new(), Gate::new());
    let (sent, arrived) = (three_sent.clone(), hanging.clone());
    // A step for each request, in their order.
    let scripts = Mutex::new(vec![
        vec![Step::Open(arrived), Step::Hang],
        vec![Step::Send(three.clone()), Step::Open(sent), Step::Hang],
        vec![Step::Send(three), Step::Close],
        vec![Step::Close],
    ]);
    let decode = ScriptedServer::start(move |_| scripts.lock().unwrap().pop().unwrap()).await;
    let prefill = ScriptedServer::start(|_| vec![Step::Hang]).await;
    let folder = Folder::new("trace-failures");
    let (program, path) = start([&prefill, &decode], &folder, &[]).await;
    // Decode closes without a response, and within one.
    assert_eq!(post(&mut program.client().await, "/v1/completions", &prompt(1)).await, 502);
    post(&mut program.client().await, "/v1/completions", &streamed(2)).await;
    // The client leaves within a response, and before one.
    let mut client = program.client().await;
    client.send_request("POST", "/v1/completions", &[], streamed(3).as_bytes()).await;
    client.read_until(TOKEN).await;
    with_timeout("three tokens", three_sent.wait()).await;
    drop(client);
    decode.wait_closed(3).await;
    let mut client = program.client().await;
    client.send_request("POST", "/v1/completions", &[], prompt(4).as_bytes()).await;
    with_timeout("the request", hanging.wait()).await;
    drop(client);
    decode.wait_closed(4).await;
    // No server takes the last one.
    decode.stop_listening().await;
    assert_eq!(post(&mut program.client().await, "/v1/completions", &prompt(5)).await, 502);
    program.stop().await;
    let lines = lines(&path);
    let outputs: Vec<u64> = lines.iter().map(|line| line.output).collect();
    // An error event counts as one.
    assert!(matches!(outputs[..], [0, 3..=4, 3, 0, 0]), "{outputs:?}");
    assert!(lines.iter().all(|line| line.input == (3 * BLOCK + 1).div_ceil(4)), "{lines:?}");
}

#[tokio::test]
async fn another_file_has_other_ids_for_the_same_prompt_and_the_one_before_is_kept() {
    let servers = [ok_server().await, ok_server().await];
    let folder = Folder::new("trace-keys");
    let prompt = completion(&text(7, 5 * BLOCK));
    for (policy, before) in
        [("cache_aware", None), ("consistent_hash", Some(1)), ("consistent_hash", Some(1))]
    {
        let old = fs::read_to_string(folder.path("load.jsonl")).ok();
        let (program, path) = start([&servers[0], &servers[1]], &folder, &["--policy", policy]).await;
        let mut client = program.client().await;
        for _ in 0..2 {
            post(&mut client, "/v1/completions", &prompt).await;
        }
        program.stop().await;
        let [one, again]: [Line; 2] = lines(&path).try_into().unwrap();
        assert_eq!((one.ids.len(), &one.ids), (6, &again.ids));
        assert_eq!(fs::read_to_string(previous(&path)).ok(), old, "as it was");
        assert_eq!(old.map(|_| 1), before);
        if before.is_some() {
            let earlier = &lines(&previous(&path))[0];
            assert_eq!(earlier.input, one.input);
            assert!(earlier.ids.iter().all(|id| !one.ids.contains(id)), "{earlier:?} {one:?}");
        }
    }
}

#[tokio::test]
async fn a_full_file_makes_room_for_the_next_and_both_stay_within_the_bound() {
    const BOUND: u64 = 64 << 10;
    let servers = [ok_server().await, ok_server().await];
    let folder = Folder::new("trace-rotation");
    let bound = BOUND.to_string();
    let args = ["--trace-log-max-bytes", bound.as_str()];
    let (program, path) = start([&servers[0], &servers[1]], &folder, &args).await;
    let mut client = program.client().await;
    // Of 40 blocks: lines of 700 bytes, of which three files are not enough.
    let prompt = completion(&text(8, 40 * BLOCK));
    let longest = completion(&text(8, 1_024 * BLOCK));
    for number in 0..300 {
        post(&mut client, "/v1/completions", if number % 100 == 50 { &longest } else { &prompt }).await;
    }
    let said = program.stop().await;
    assert!(!said.iter().any(|line| line.contains("trace lines")), "{said:?}");
    let [last, before] =
        [path.clone(), previous(&path)].map(|path| (fs::metadata(&path).unwrap().len(), lines(&path)));
    assert!(last.0 <= BOUND && before.0 <= BOUND && before.0 > BOUND / 2, "{} {}", last.0, before.0);
    assert!(!last.1.is_empty() && last.1.len() + before.1.len() < 250);
    // A prompt has one id in a file, and the clock goes on from file to file.
    assert_eq!(last.1[0].ids[..30], last.1.last().unwrap().ids[..30]);
    assert!(before.1[0].ids.iter().all(|id| !last.1[0].ids.contains(id)));
    assert!(before.1[0].timestamp > 0 && before.1.last().unwrap().timestamp <= last.1[0].timestamp);
    assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 2);
}

#[tokio::test]
async fn a_file_that_another_process_has_put_there_is_not_replaced() {
    let servers = [ok_server().await, ok_server().await];
    let folder = Folder::new("trace-other");
    let args = ["--trace-log-max-bytes", "65536"];
    let (program, path) = start([&servers[0], &servers[1]], &folder, &args).await;
    folder.put("load.jsonl", "another's\n");
    let mut client = program.client().await;
    let prompt = completion(&text(8, 1_000 * BLOCK));
    for _ in 0..8 {
        assert_eq!(post(&mut client, "/v1/completions", &prompt).await, 200);
    }
    program.line("trace lines could not be written: ").await;
    assert_eq!(fs::read_to_string(&path).unwrap(), "another's\n");
    // When it is gone the trace goes on, and the log says what is missing.
    fs::remove_file(&path).unwrap();
    assert_eq!(post(&mut client, "/v1/completions", &prompt).await, 200);
    program.line("trace lines were lost lost=").await;
    let said = program.stop().await;
    assert!(said.iter().any(|line| line.contains("is another process's now")), "{said:?}");
    assert!(!lines(&path).is_empty());
}

#[tokio::test]
async fn a_thousand_requests_of_many_clients_are_a_thousand_lines() {
    let servers = [ok_server().await, ScriptedServer::always(usage(2)).await];
    let folder = Folder::new("trace-thousand");
    let (program, path) = start([&servers[0], &servers[1]], &folder, &["--worker-threads", "2"]).await;
    let program = Arc::new(program);
    let clients = (0..10).map(|seed| {
        let program = Arc::clone(&program);
        tokio::spawn(async move {
            let mut client = program.client().await;
            for number in 0..100 {
                let prompt = completion(&text(1_000 * seed + number, 100));
                assert_eq!(post(&mut client, "/v1/completions", &prompt).await, 200);
            }
        })
    });
    for client in clients.collect::<Vec<_>>() {
        client.await.unwrap();
    }
    Arc::into_inner(program).unwrap().stop().await;
    let lines = lines(&path);
    let ids: HashSet<u64> = lines.iter().map(|line| line.ids[0]).collect();
    assert_eq!((lines.len(), ids.len()), (1_000, 1_000));
    assert!(lines.iter().all(|line| (line.input, line.output) == (26, 2)));
}

#[tokio::test]
async fn a_file_that_cannot_be_written_is_named_at_the_start() {
    let folder = Folder::new("trace-unwritable");
    let nowhere = folder.path("none/load.jsonl");
    for (path, why) in [(nowhere.to_str().unwrap(), "No such file"), ("/dev/null", "not a regular file")] {
        let mut program = RouterProcess::spawn("http://a:1", "http://b:1", &["--trace-log", path]);
        assert_eq!(program.exit_code().await, Some(2));
        let said = program.lines();
        assert!(said[0].starts_with(&format!("error: --trace-log {path}: ")), "{said:?}");
        assert!(said[0].contains(why), "{said:?}");
    }
    assert!(!fs::metadata("/dev/null").unwrap().is_file());
}

/// Notes whether it was told of a prompt, though it has not asked.
struct Curious(Arc<Mutex<Vec<bool>>>);

impl Policy for Curious {
    fn pick<'a>(&self, choice: &Choice<'a>) -> &'a Arc<Backend> {
        self.0.lock().unwrap().push(choice.prompt().is_some());
        &choice.servers()[0]
    }
}

#[tokio::test]
async fn prompts_are_hashed_for_a_trace_and_without_one_only_for_a_policy() {
    let servers = [ok_server().await, ok_server().await];
    for is_traced in [false, true] {
        let (told, traced) = (Arc::default(), Arc::new(Mutex::new(Vec::new())));
        let (tells, traces) = (Arc::clone(&told), Arc::clone(&traced));
        let router = Router::start_with(&[&servers[0]], &[&servers[1]], |config| {
            let config = config.policy(move || Curious(Arc::clone(&tells)));
            match is_traced {
                false => config,
                true => config.trace_log(move |line| {
                    let hashes: Vec<u64> = line.hashes().collect();
                    traces.lock().unwrap().push((line.input_length, line.output_length, hashes));
                }),
            }
        })
        .await;
        let prompt = completion(&text(3, 2 * BLOCK));
        assert_eq!(post(&mut router.client().await, "/v1/completions", &prompt).await, 200);
        router.wait_shutdown().await;
        assert_eq!(*told.lock().unwrap(), [is_traced; 2]);
        let traced = traced.lock().unwrap();
        assert_eq!(traced.len(), usize::from(is_traced));
        assert!(
            traced.iter().all(|(input, output, hashes)| {
                (*input, *output, hashes.len()) == (BLOCK as u64 / 2 + 1, 4, 3)
            }),
            "{traced:?}"
        );
    }
}

/// Chats of some turns, sent to the program and then replayed through another one.
#[test]
fn the_fleet_lab_replays_what_the_program_has_written() {
    const CHATS: u64 = 4;
    const TURNS: usize = 5;
    let folder = Folder::new("trace-replay");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let path = runtime.block_on(async {
        let servers = [ok_server().await, ScriptedServer::always(usage(7)).await];
        let (program, path) = start([&servers[0], &servers[1]], &folder, &[]).await;
        let mut client = program.client().await;
        for turn in 1..=TURNS {
            for chat in 0..CHATS {
                let prompt = text(chat, turn * 3 * BLOCK);
                assert_eq!(post(&mut client, "/v1/completions", &completion(&prompt)).await, 200);
            }
        }
        program.stop().await;
        path
    });
    let requests: Vec<Request> = trace::read(&path).unwrap();
    assert_eq!(requests.len(), CHATS as usize * TURNS);
    assert!(requests.is_sorted_by(|one, next| one.at <= next.at) && requests[0].at == 0.0);
    let fleet = Fleet { prefill: 2, decode: 2, warm_up: 0.0, ..Fleet::default() };
    let mut oracle = Reference::Oracle.router(fleet.prefill, fleet.decode, &fleet.model, fleet.seed);
    let outcome = simulate(&fleet, &requests, &mut *oracle);
    // Of each chat 3 + 6 + 9 + 12 of 3 + 6 + 9 + 12 + 15 blocks were there before.
    let expected = 30.0 / 45.0;
    assert!((outcome.hit_rate() - expected).abs() < 0.01, "{}", outcome.hit_rate());
    let program = Path::new(env!("CARGO_BIN_EXE_mini-lb"));
    let out = folder.path("");
    let live = through_mini_lb(program, "round_robin", fleet, &requests, 10.0, &out).unwrap();
    assert_eq!((live.ttft.len(), live.failed, live.prompt_tokens), (20, 0, outcome.prompt_tokens));
}
