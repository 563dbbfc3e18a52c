//! The targets with bounded inputs: random bytes, recorded exchanges, and these with a few bytes changed.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use proptest::prelude::*;
use proptest::sample::Index;

use super::*;

/// Largest seed: larger inputs make every mutation of them slow.
const MAX_SEED: usize = 16 << 10;

type Target = (&'static str, fn(&[u8]));
const TARGETS: [Target; 5] = [
    ("inspect_and_rewrite", inspect_and_rewrite),
    ("split_events", split_events),
    ("splice_logprobs", splice_logprobs),
    ("router", router),
    ("requests", requests),
];

/// One recorded exchange: the client's request as prefill saw it, and both answers.
struct Exchange {
    request: Vec<u8>,
    prefill: Vec<u8>,
    decode: Vec<u8>,
}

fn exchanges() -> Vec<Exchange> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let files = |folder: &str| std::fs::read_dir(fixtures.join(folder)).unwrap();
    let mut requests: Vec<PathBuf> =
        ["pd", "pd_fail"].into_iter().flat_map(files).map(|entry| entry.unwrap().path()).collect();
    requests.retain(|path| path.to_str().unwrap().ends_with(".prefill.req"));
    requests.sort();
    let read = |path: &Path, end: &str| {
        let path = path.to_str().unwrap().replace(".prefill.req", end);
        std::fs::read(path).unwrap_or_default()
    };
    let exchange = |path: &PathBuf| Exchange {
        request: read(path, ".prefill.req"),
        prefill: read(path, ".prefill.resp"),
        decode: read(path, ".decode.resp"),
    };
    requests.iter().map(exchange).collect()
}

/// The body of a recorded message.
fn body(message: &[u8]) -> Vec<u8> {
    if message.starts_with(b"HTTP/") {
        let answers = http::answers(message);
        return answers.into_iter().next().and_then(|answer| answer.body).unwrap_or_default();
    }
    let end = memchr::memmem::find(message, b"\r\n\r\n").map_or(message.len(), |at| at + 4);
    message[end..].to_vec()
}

/// Which of the dialects a request is in.
fn dialect(request: &[u8]) -> u8 {
    let paths = [&b"/generate"[..], b"/v1/chat", b"/v1/completions"];
    let is_in = |path: &&[u8]| memchr::memmem::find(&request[..request.len().min(40)], path).is_some();
    paths.iter().position(is_in).unwrap_or(0).try_into().unwrap()
}

/// The recordings as inputs of a target.
fn seeds(target: &str) -> Vec<Vec<u8>> {
    let seed = |options: [u8; OPTIONS], parts: &[&[u8]]| [&options[..], &parts.join(&SEPARATOR)].concat();
    let inputs = |exchange: Exchange| {
        let Exchange { request, prefill, decode } = exchange;
        let kind = dialect(&request);
        match target {
            "inspect_and_rewrite" => vec![seed([kind, 5, 0, 0], &[&body(&request)])],
            "split_events" => vec![seed([5, 200, 0, 0], &[&body(&decode)])],
            "splice_logprobs" => vec![seed([kind / 2, 5, 0, 0], &[&body(&prefill), &body(&decode)])],
            "requests" => vec![seed([7, 0, 0, 0], &[&request.repeat(2)])],
            _ => vec![
                seed([kind, 0, 0, 0], &[&body(&request), &prefill, &decode]),
                seed([kind, 7, 1, 6], &[&body(&request), &prefill, &decode]),
                seed([0x80, 8, 0, 0], &[&request, &prefill, &decode]),
                seed([kind, 9, 0x10, 0x20], &[&body(&request), &body(&prefill), &body(&decode)]),
            ],
        }
    };
    exchanges().into_iter().flat_map(inputs).filter(|seed| seed.len() <= MAX_SEED).collect()
}

static SEEDS: LazyLock<Vec<Vec<Vec<u8>>>> =
    LazyLock::new(|| TARGETS.iter().map(|(name, _)| seeds(name)).collect());

/// Changes to a seed: where, how, and to what.
type Changes = Vec<(Index, u8, u8)>;

fn changed(mut input: Vec<u8>, changes: Changes) -> Vec<u8> {
    // What steers the code that reads these texts.
    const SPECIAL: &[u8] = b"\"\\{}[],: \r\n0-\xFF\xEF\x00n";
    for (at, how, byte) in changes {
        let at = at.index(input.len());
        let special = SPECIAL[usize::from(byte) % SPECIAL.len()];
        match how % 5 {
            0 => input[at] = byte,
            1 => input[at] = special,
            2 => input.insert(at, special),
            3 => drop(input.drain(at..(at + usize::from(byte)).min(input.len() - 1).max(at))),
            _ => input.truncate(at.max(OPTIONS)),
        }
    }
    input
}

fn inputs(target: usize) -> impl Strategy<Value = Vec<u8>> {
    let changes = || prop::collection::vec(any::<(Index, u8, u8)>(), 0..6);
    let seed = (any::<Index>(), any::<[u8; OPTIONS]>(), any::<bool>(), changes());
    let from_seed = seed.prop_map(move |(seed, options, chosen, changes)| {
        let mut input = seed.get(&SEEDS[target]).clone();
        if chosen {
            input[..OPTIONS].copy_from_slice(&options);
        }
        changed(input, changes)
    });
    prop_oneof![4 => from_seed, 1 => prop::collection::vec(any::<u8>(), 0..200)]
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases) }
}

proptest! {
    #![proptest_config(config(600))]

    #[test]
    fn any_body_is_read_alike_however_it_is_cut(input in inputs(0)) {
        inspect_and_rewrite(&input);
    }

    #[test]
    fn any_stream_is_split_without_loss(input in inputs(1)) {
        split_events(&input);
    }

    #[test]
    fn any_lists_are_spliced_without_harm(input in inputs(2)) {
        splice_logprobs(&input);
    }

    #[test]
    fn the_router_survives_anything(input in inputs(3)) {
        router(&input);
    }

    #[test]
    fn requests_are_read_alike_however_they_are_cut_and_as_hyper_reads_them(input in inputs(4)) {
        requests(&input);
    }
}

#[test]
fn every_recording_passes_its_targets() {
    for ((name, target), seeds) in TARGETS.iter().zip(SEEDS.iter()) {
        assert!(seeds.len() > 20, "{name} has {} seeds", seeds.len());
        seeds.iter().for_each(|seed| target(seed));
    }
}

/// Not a test: `fuzz/seed.sh` makes the corpora with it.
#[test]
#[ignore = "writes the fuzzer's corpora"]
fn write_corpora() {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    for ((name, _), seeds) in TARGETS.iter().zip(SEEDS.iter()) {
        std::fs::create_dir_all(corpora.join(name)).unwrap();
        for (number, seed) in seeds.iter().enumerate() {
            std::fs::write(corpora.join(name).join(format!("seed-{number:03}")), seed).unwrap();
        }
    }
}

/// A length that hyper had not gone by cut the body off, and made it look complete.
#[test]
fn a_length_beside_an_unknown_encoding_is_not_the_bodys() {
    let request = b"POST /generate HTTP/1.1\r\nhost: r\r\ncontent-length: 2\r\n\r\n{}";
    let prefill = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}";
    let decode = b"HTTP/1.1 200 OK\r\ntransfer-encoding: x\r\ncontent-length: 2\r\n\r\nabcd";
    router(&[&[0x80, 0, 0, 0][..], request, b"\xFF", prefill, b"\xFF", decode].concat());
}

/// The event that tells why a stream broke off made up for what was missing of its announced length.
#[test]
fn an_error_event_does_not_complete_an_announced_length() {
    let prefill = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}";
    let decode =
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 40\r\n\r\ndata: {}\n\n";
    // Decode's connection is closed behind what it has sent.
    router(&[&[0, 0, 0, 4][..], b"{}\xFF", prefill, b"\xFF", decode].concat());
}

/// Prefill's lists are taken from any success: the check knew only a 200.
#[test]
fn lists_come_with_any_success() {
    let request = br#"{"return_logprob":true,"logprob_start_len":0}"#;
    let prefill = b"HTTP/1.1 201 Created\r\ncontent-length: 2\r\n\r\n{}";
    let decode = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}";
    router(&[&[0, 0, 0, 0][..], request, b"\xFF", prefill, b"\xFF", decode].concat());
}
