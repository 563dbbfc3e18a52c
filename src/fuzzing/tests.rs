//! The targets with a bounded number of inputs: random bytes, recorded exchanges, and mutations of these.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use proptest::prelude::*;
use proptest::sample::Index;

use super::*;

/// The largest seed: each mutation of a larger one would be slow.
const MAX_SEED: usize = 16 << 10;

type Target = (&'static str, fn(&[u8]));
const TARGETS: [Target; 6] = [
    ("inspect_and_rewrite", inspect_and_rewrite),
    ("split_events", split_events),
    ("splice_logprobs", splice_logprobs),
    ("router", router),
    ("requests", requests),
    ("merge_samples", merge_samples),
];

/// One recorded exchange: the request as prefill received it, and both responses.
struct RecordedExchange {
    request: Vec<u8>,
    prefill: Vec<u8>,
    decode: Vec<u8>,
}

fn recorded_exchanges() -> Vec<RecordedExchange> {
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
    let exchange = |path: &PathBuf| RecordedExchange {
        request: read(path, ".prefill.req"),
        prefill: read(path, ".prefill.resp"),
        decode: read(path, ".decode.resp"),
    };
    requests.iter().map(exchange).collect()
}

/// The body of a recorded message.
fn body(message: &[u8]) -> Vec<u8> {
    if message.starts_with(b"HTTP/") {
        let responses = http::parse_responses(message);
        return responses.into_iter().next().and_then(|response| response.body).unwrap_or_default();
    }
    let end = memchr::memmem::find(message, b"\r\n\r\n").map_or(message.len(), |at| at + 4);
    message[end..].to_vec()
}

/// The position of a request's API in [`DIALECTS`].
fn dialect(request: &[u8]) -> u8 {
    let paths = [&b"/generate"[..], b"/v1/chat", b"/v1/completions"];
    let is_in_head = |path: &&[u8]| memchr::memmem::find(&request[..request.len().min(40)], path).is_some();
    paths.iter().position(is_in_head).unwrap_or(0).try_into().unwrap()
}

/// The recordings as inputs of a target.
fn seeds(target: &str) -> Vec<Vec<u8>> {
    let seed = |options: [u8; OPTIONS], parts: &[&[u8]]| [&options[..], &parts.join(&SEPARATOR)].concat();
    let inputs = |exchange: RecordedExchange| {
        let RecordedExchange { request, prefill, decode } = exchange;
        let kind = dialect(&request);
        match target {
            "inspect_and_rewrite" => vec![seed([kind, 5, 0, 0], &[&body(&request)])],
            "split_events" => vec![seed([5, 200, 0, 0], &[&body(&decode)])],
            "splice_logprobs" => vec![seed([kind / 2, 5, 0, 0], &[&body(&prefill), &body(&decode)])],
            // A server's response to several samples is no copy's, but another one of what servers send.
            "merge_samples" => {
                vec![seed([kind, 5, 0x20, 0], &[&body(&decode), &body(&decode), &body(&decode)])]
            }
            "requests" => vec![seed([7, 0, 0, 0], &[&request.repeat(2)])],
            _ => vec![
                seed([kind, 0, 0, 0], &[&body(&request), &prefill, &decode]),
                seed([kind, 7, 1, 6], &[&body(&request), &prefill, &decode]),
                seed([0x80, 8, 0, 0], &[&request, &prefill, &decode]),
                seed([kind, 9, 0x10, 0x20], &[&body(&request), &body(&prefill), &body(&decode)]),
            ],
        }
    };
    recorded_exchanges().into_iter().flat_map(inputs).filter(|seed| seed.len() <= MAX_SEED).collect()
}

static SEEDS: LazyLock<Vec<Vec<Vec<u8>>>> =
    LazyLock::new(|| TARGETS.iter().map(|(name, _)| seeds(name)).collect());

/// Mutations of a seed: the position, the kind and the byte.
type Mutations = Vec<(Index, u8, u8)>;

fn mutate(mut input: Vec<u8>, mutations: Mutations) -> Vec<u8> {
    // The bytes on which parsers branch.
    const SPECIAL: &[u8] = b"\"\\{}[],: \r\n0-\xFF\xEF\x00n";
    for (at, kind, byte) in mutations {
        let at = at.index(input.len());
        let special = SPECIAL[usize::from(byte) % SPECIAL.len()];
        match kind % 5 {
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
    let mutations = || prop::collection::vec(any::<(Index, u8, u8)>(), 0..6);
    let seed = (any::<Index>(), any::<[u8; OPTIONS]>(), any::<bool>(), mutations());
    let from_seed = seed.prop_map(move |(seed, options, replaces_options, mutations)| {
        let mut input = seed.get(&SEEDS[target]).clone();
        if replaces_options {
            input[..OPTIONS].copy_from_slice(&options);
        }
        mutate(input, mutations)
    });
    prop_oneof![4 => from_seed, 1 => prop::collection::vec(any::<u8>(), 0..200)]
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases) }
}

proptest! {
    #![proptest_config(config(600))]

    #[test]
    fn chunk_boundaries_do_not_change_how_a_body_is_rewritten(input in inputs(0)) {
        inspect_and_rewrite(&input);
    }

    #[test]
    fn events_are_split_without_losing_a_byte(input in inputs(1)) {
        split_events(&input);
    }

    #[test]
    fn splicing_changes_nothing_but_lists(input in inputs(2)) {
        splice_logprobs(&input);
    }

    #[test]
    fn no_truncated_response_looks_complete_to_the_client(input in inputs(3)) {
        router(&input);
    }

    #[test]
    fn merged_samples_are_what_copies_sent(input in inputs(5)) {
        merge_samples(&input);
    }

    #[test]
    fn the_router_and_hyper_parse_the_same_requests(input in inputs(4)) {
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

/// Not a test: `fuzz/seed.sh` writes the corpora with it.
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

/// Found by fuzzing: a length that does not apply was forwarded, and truncated the body for the client.
#[test]
fn a_length_beside_an_unknown_transfer_encoding_is_not_forwarded() {
    let request = b"POST /generate HTTP/1.1\r\nhost: r\r\ncontent-length: 2\r\n\r\n{}";
    let prefill = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}";
    let decode = b"HTTP/1.1 200 OK\r\ntransfer-encoding: x\r\ncontent-length: 2\r\n\r\nabcd";
    router(&[&[0x80, 0, 0, 0][..], request, b"\xFF", prefill, b"\xFF", decode].concat());
}

/// Found by fuzzing: the error event of a broken stream filled it up to its `Content-Length`, so that it
/// looked complete.
#[test]
fn an_error_event_does_not_complete_a_stream_with_a_length() {
    let prefill = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}";
    let decode =
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 40\r\n\r\ndata: {}\n\n";
    // Option 4: decode closes its connection after what it sent.
    router(&[&[0, 0, 0, 4][..], b"{}\xFF", prefill, b"\xFF", decode].concat());
}

/// Found by fuzzing: the target expected lists in a 200 only.
#[test]
fn lists_are_read_from_any_success_status() {
    let request = br#"{"return_logprob":true,"logprob_start_len":0}"#;
    let prefill = b"HTTP/1.1 201 Created\r\ncontent-length: 2\r\n\r\n{}";
    let decode = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}";
    router(&[&[0, 0, 0, 0][..], request, b"\xFF", prefill, b"\xFF", decode].concat());
}
