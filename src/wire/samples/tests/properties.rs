//! Properties of every merge: how streams are cut and interleaved changes nothing of what they say.

use std::collections::BTreeMap;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use serde_json::{Value, json};

use super::*;
use crate::wire::sse::{EventSplitter, single_data_line};

/// What the servers of all copies generate.
#[derive(Debug, Clone)]
struct Generated {
    dialect: Dialect,
    prompts: usize,
    copies: Vec<GeneratedCopy>,
}

#[derive(Debug, Clone)]
struct GeneratedCopy {
    /// The text of each event, and its prompt.
    events: Vec<(usize, String)>,
    tokens: u64,
}

fn text() -> impl Strategy<Value = String> {
    let tricky = select(&["", "\"index\":7", "[DONE]", "data: [DONE]\n\n", "\"error\":{}", "\\", "}"][..]);
    prop_oneof![tricky.prop_map(str::to_owned), ".{0,12}"]
}

fn generated() -> impl Strategy<Value = Generated> {
    let dialect = select(&[Dialect::Generate, Dialect::Chat, Dialect::Completions][..]);
    let copy = (vec((any::<Index>(), text()), 0..6), 0..1_000_u64);
    (dialect, 1..4_usize, vec(copy, 1..5)).prop_map(|(dialect, prompts, copies)| {
        // Chat has one prompt.
        let prompts = if dialect == Dialect::Chat { 1 } else { prompts };
        let copy = |(events, tokens): (Vec<(Index, String)>, u64)| GeneratedCopy {
            events: events.into_iter().map(|(prompt, text)| (prompt.index(prompts), text)).collect(),
            tokens,
        };
        Generated { dialect, prompts, copies: copies.into_iter().map(copy).collect() }
    })
}

impl Generated {
    /// The stream of a copy's server.
    fn stream(&self, copy: usize) -> Vec<u8> {
        let id = format!("id-{copy}");
        let event = |value: Value| format!("data: {value}\n\n");
        let GeneratedCopy { events, tokens } = &self.copies[copy];
        let mut stream = String::new();
        for (prompt, text) in events {
            stream += &event(match self.dialect {
                Dialect::Generate if self.prompts == 1 => json!({"text": text, "meta_info": {"id": id}}),
                Dialect::Generate => json!({"text": text, "meta_info": {"id": id}, "index": prompt}),
                _ => json!({"id": id, "choices": [{"text": text, "index": prompt}], "usage": null}),
            });
        }
        if self.dialect != Dialect::Generate {
            let usage = json!({"prompt_tokens": 7, "total_tokens": 7 + tokens, "completion_tokens": tokens});
            stream += &event(json!({"id": id, "choices": [], "usage": usage}));
        }
        (stream + "data: [DONE]\n\n").into_bytes()
    }

    /// The texts of each sample, in their order.
    fn texts(&self) -> BTreeMap<u64, Vec<String>> {
        let mut texts = BTreeMap::<_, Vec<_>>::new();
        for (number, copy) in self.copies.iter().enumerate() {
            for (prompt, text) in &copy.events {
                let index = prompt * self.copies.len() + number;
                texts.entry(index as u64).or_default().push(text.clone());
            }
        }
        texts
    }

    /// Feeds the streams in pieces of these lengths, each of the copy that is next.
    fn merge(&self, pieces: &[(Index, usize)]) -> Vec<u8> {
        let mut merger = StreamMerger::new(self.dialect, self.copies.len(), MAX_EVENT);
        let mut out = BytesMut::new();
        let mut streams: Vec<_> = (0..self.copies.len()).map(|copy| (copy, self.stream(copy))).collect();
        let mut pieces = pieces.iter().cycle();
        while !streams.is_empty() {
            let (index, length) = pieces.next().unwrap();
            let at = index.index(streams.len());
            let (copy, rest) = &mut streams[at];
            let piece: Vec<u8> = rest.drain(..(*length).min(rest.len())).collect();
            let progress = merger.push(*copy, &piece, &mut out).unwrap();
            if rest.is_empty() {
                streams.remove(at);
            }
            let expected = if streams.is_empty() { MergeProgress::Complete } else { MergeProgress::Open };
            assert_eq!(progress, expected);
        }
        out.to_vec()
    }
}

/// The data of all events of a stream.
fn events(stream: &[u8]) -> Vec<String> {
    let mut splitter = EventSplitter::new(usize::MAX);
    splitter.push(Bytes::copy_from_slice(stream));
    let mut events = Vec::new();
    while let Some(event) = splitter.next() {
        let event = event.unwrap();
        let data = single_data_line(&event).map_or(&event[..], |data| &event[data]);
        events.push(String::from_utf8_lossy(data).into_owned());
    }
    events
}

/// Pieces of a stream that is nearly one of a server's.
fn nearly_events() -> impl Strategy<Value = Vec<u8>> {
    let token = select(
        &[
            "data: ",
            "data: [DONE]\n\n",
            "data: {\"choices\":[],\"usage\":{\"completion_tokens\":2}}\n\n",
            "data: {\"error\":{}}\n\n",
            "data: {\"id\":1,\"choices\":[{\"index\":0}]}\n\n",
            "\n",
            "\r",
            ":",
            "{",
            "}",
            "[",
            "]",
            ",",
            "\"index\":",
            "\"usage\":",
            "\"choices\":",
            "\"meta_info\":",
            "\"finish_reason\":",
            "1",
            "\"",
            "\\",
        ][..],
    );
    let token =
        prop_oneof![12 => token.prop_map(|token| token.as_bytes().to_vec()), 1 => vec(any::<u8>(), 1..3)];
    vec(token, 0..12).prop_map(|tokens| tokens.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn every_event_comes_once_with_its_index_however_streams_are_cut(
        generated in generated(), pieces in vec((any::<Index>(), prop_oneof![1..20_usize, 1..400_usize]), 1..40),
    ) {
        let merged = events(&generated.merge(&pieces));
        let (done, chunks) = merged.split_last().unwrap();
        prop_assert_eq!(done, "[DONE]");
        let mut chunks: Vec<Value> =
            chunks.iter().map(|chunk| serde_json::from_str(chunk).expect(chunk)).collect();
        if generated.dialect != Dialect::Generate {
            let tokens: u64 = generated.copies.iter().map(|copy| copy.tokens).sum();
            let usage = chunks.pop().unwrap();
            let expected = json!({
                "prompt_tokens": 7, "total_tokens": 7 + tokens, "completion_tokens": tokens
            });
            prop_assert_eq!(&usage["usage"], &expected);
            prop_assert!(chunks.iter().all(|chunk| chunk["id"] == usage["id"]));
        }
        let mut texts = BTreeMap::<_, Vec<_>>::new();
        for chunk in chunks {
            let sample = chunk["choices"].get(0).unwrap_or(&chunk);
            let text = sample["text"].as_str().unwrap().to_owned();
            texts.entry(sample["index"].as_u64().unwrap()).or_default().push(text);
        }
        prop_assert_eq!(texts, generated.texts());
    }

    #[test]
    fn pieces_of_any_length_are_merged_alike(
        generated in generated(), order in vec(any::<Index>(), 1..20), lengths in vec(1..9_usize, 1..10),
    ) {
        // One event at a time, whole or in pieces.
        let mut streams: Vec<_> = (0..generated.copies.len())
            .map(|copy| {
                let stream = String::from_utf8(generated.stream(copy)).unwrap();
                stream.split_inclusive("\n\n").map(str::to_owned).collect::<std::collections::VecDeque<_>>()
            })
            .collect();
        let merger = || StreamMerger::new(generated.dialect, generated.copies.len(), MAX_EVENT);
        let (mut whole, mut cut) = (merger(), merger());
        let (mut whole_out, mut cut_out) = (BytesMut::new(), BytesMut::new());
        for index in order.iter().cycle() {
            if streams.iter().all(|stream| stream.is_empty()) {
                break;
            }
            let copy = (index.index(streams.len())..streams.len())
                .chain(0..streams.len())
                .find(|copy| !streams[*copy].is_empty())
                .unwrap();
            let event = streams[copy].pop_front().unwrap();
            let progress = whole.push(copy, event.as_bytes(), &mut whole_out).unwrap();
            let (mut rest, mut last) = (event.as_bytes(), MergeProgress::Open);
            for length in lengths.iter().cycle() {
                let (piece, others) = rest.split_at((*length).min(rest.len()));
                last = cut.push(copy, piece, &mut cut_out).unwrap();
                rest = others;
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(last, progress);
            prop_assert_eq!(&cut_out, &whole_out);
        }
    }

    #[test]
    fn bodies_have_all_samples_in_order(
        samples in (1..4_usize, 1..5_usize).prop_flat_map(|(prompts, copies)| vec(vec(text(), prompts), copies)),
        is_generate: bool,
    ) {
        let copies = samples.len();
        let bodies = samples.iter().map(|texts| {
            let choices: Vec<_> = (0..).zip(texts).map(|(at, text): (u64, _)| {
                if is_generate { json!({"text": text}) } else { json!({"text": text, "index": at}) }
            }).collect();
            let body = match is_generate {
                true => Value::from(choices),
                false => json!({"choices": choices}),
            };
            Bytes::from(body.to_string())
        });
        let dialect = if is_generate { Dialect::Generate } else { Dialect::Completions };
        let merged = merge_bodies(dialect, bodies.collect()).unwrap();
        let merged: Value = serde_json::from_slice(&merged).unwrap();
        let merged = if is_generate { &merged } else { &merged["choices"] }.as_array().unwrap();
        prop_assert_eq!(merged.len(), copies * samples[0].len());
        for (at, sample) in merged.iter().enumerate() {
            prop_assert_eq!(sample["text"].as_str().unwrap(), &samples[at % copies][at / copies]);
            prop_assert!(is_generate || sample["index"] == at);
        }
    }

    #[test]
    fn no_bytes_panic_or_end_a_stream_twice(
        fed in vec((0..3_usize, nearly_events()), 0..8), is_generate: bool, limit in 0..200_usize,
    ) {
        let dialect = if is_generate { Dialect::Generate } else { Dialect::Chat };
        let mut merger = StreamMerger::new(dialect, 3, limit);
        let mut out = BytesMut::new();
        for (copy, data) in &fed {
            if merger.push(*copy, data, &mut out).is_err() {
                break;
            }
        }
        for copy in 0..3 {
            let _ = merger.end(copy, &mut out);
        }
        prop_assert!(events(&out).iter().filter(|event| *event == "[DONE]").count() <= 1);
        let bodies = fed.iter().map(|(_, data)| Bytes::from(data.clone())).collect();
        let _ = merge_bodies(dialect, bodies);
    }
}
