//! What tells two prompts apart, and what does not.

use super::*;
use crate::wire::shape::BodyInspector;

const BLOCK: usize = Prompt::BLOCK_BYTES;

fn key() -> HashKey {
    HashKey::from_random(7)
}

fn read_in(dialect: Dialect, body: &str, size: usize) -> Prompt {
    let mut inspector = BodyInspector::new(dialect).with_prompt(key());
    body.as_bytes().chunks(size).for_each(|chunk| inspector.feed(chunk).unwrap());
    inspector.finish().unwrap().prompt.expect("it was asked for")
}

/// The prompt of a body, which must be the same however the body is cut.
fn read(dialect: Dialect, body: &str) -> Prompt {
    let whole = read_in(dialect, body, body.len());
    for size in [1, 63, 64, 65, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 3] {
        assert_eq!(read_in(dialect, body, size), whole, "in chunks of {size}");
    }
    whole
}

fn generate(body: &str) -> Prompt {
    read(Dialect::Generate, body)
}

/// Text that does not repeat itself.
fn text(length: usize) -> String {
    let words = (0..).map(|number: u64| format!("{:x} ", number.wrapping_mul(LANES[0])));
    let mut text = String::new();
    words.take_while(|_| true).find(|word| {
        text.push_str(word);
        text.len() >= length
    });
    text.truncate(length);
    text
}

fn blocks(prompt: &Prompt) -> Vec<u64> {
    (0..prompt.blocks()).map(|number| prompt.block(number)).collect()
}

/// How many blocks two prompts have in common.
fn shared(one: &Prompt, other: &Prompt) -> usize {
    blocks(one).iter().zip(blocks(other)).take_while(|(one, other)| **one == *other).count()
}

#[test]
fn a_longer_prompt_has_the_blocks_of_a_shorter_one_and_more() {
    let all = text(10 * BLOCK);
    let prompt = |length: usize| generate(&format!(r#"{{"text":"{}"}}"#, &all[..length]));
    let (short, long) = (prompt(4 * BLOCK + 100), prompt(9 * BLOCK));
    assert_eq!((short.blocks(), long.blocks()), (4, 9));
    assert_eq!(shared(&short, &long), 4);
    assert_eq!(short.bytes(), 4 * BLOCK as u64 + 101, "with the closing quote");
    assert_eq!(short.prefix(), long.prefix());
    // A byte that differs changes its own block and all later ones.
    let mut other = all.clone();
    other.replace_range(3 * BLOCK + 5..3 * BLOCK + 6, "#");
    let other = generate(&format!(r#"{{"text":"{}"}}"#, &other[..9 * BLOCK]));
    assert_eq!(shared(&other, &long), 3);
    assert!(blocks(&other)[3..].iter().zip(&blocks(&long)[3..]).all(|(one, other)| one != other));
}

#[test]
fn a_prompt_is_the_same_alone_and_first_in_a_batch() {
    let prompt = text(3 * BLOCK + 9);
    let alone = generate(&format!(r#"{{"text":"{prompt}"}}"#));
    let batch = generate(&format!(r#"{{"text": [ "{prompt}", "other"]}}"#));
    assert_eq!(shared(&alone, &batch), 3);
    let ids = text(3 * BLOCK).bytes().map(|byte| byte.to_string()).collect::<Vec<_>>().join(",");
    let alone = generate(&format!(r#"{{"input_ids":[{ids}]}}"#));
    let batch = generate(&format!(r#"{{"input_ids":[[{ids}],[1,2]]}}"#));
    assert_eq!(shared(&alone, &batch), alone.blocks());
    assert!(alone.blocks() > 5);
}

#[test]
fn a_conversation_that_goes_on_keeps_its_blocks() {
    let turn = |role: &str, text: &str| format!(r#"{{"role":"{role}","content":"{text}"}}"#);
    let first = [turn("system", &text(BLOCK)), turn("user", "hello")].join(",");
    let next = [first.clone(), turn("assistant", &text(3 * BLOCK)), turn("user", "go on")].join(",");
    let chat = |messages: &str| read(Dialect::Chat, &format!(r#"{{"model":"m","messages":[{messages}]}}"#));
    let (first, next) = (chat(&first), chat(&next));
    assert_eq!((first.blocks(), shared(&first, &next)), (1, 1));
    assert_eq!(next.blocks(), 4);
}

#[test]
fn what_else_is_in_the_prompt_changes_it_in_any_order() {
    let messages = format!(r#""messages":[{{"role":"user","content":"{}"}}]"#, text(2 * BLOCK));
    let chat = |fields: &str| read(Dialect::Chat, &format!("{{{fields}}}"));
    let plain = chat(&messages);
    let before = chat(&format!(r#""tools":[{{"a":1}}],"model":"m",{messages}"#));
    let after = chat(&format!(r#"{messages},"model":"m","tools":[{{"a":1}}]"#));
    assert_eq!(blocks(&before), blocks(&after));
    assert_eq!(shared(&plain, &before), 0);
    let names = ["model", "lora_path", "cache_salt", "extra_key", "tools", "chat_template_kwargs"];
    // The last one is for what other APIs have beside the messages.
    assert_eq!(names.len() + 1, SEEDS);
    for name in names {
        let one = chat(&format!(r#"{messages},"{name}":"x""#));
        assert_eq!(shared(&plain, &one), 0, "{name}");
        assert_ne!(plain.prefix(), one.prefix(), "{name}");
        let other = chat(&format!(r#"{messages},"{name}":"y""#));
        assert_eq!(shared(&other, &one), 0, "{name}");
        assert_eq!(blocks(&chat(&format!(r#"{messages},"{name}":null"#))), blocks(&plain), "{name}");
    }
    let swapped = [r#""model":"a","cache_salt":"b""#, r#""model":"b","cache_salt":"a""#];
    let [one, other] = swapped.map(|fields| chat(&format!("{fields},{messages}")));
    assert_eq!(shared(&one, &other), 0);
    // What does not change the prompt does not count.
    assert_eq!(blocks(&chat(&format!(r#""temperature":1,{messages},"user":"u""#))), blocks(&plain));
}

#[test]
fn keys_are_the_same_in_a_body_and_in_a_header() {
    let chat = |fields: &str| read(Dialect::Chat, &format!("{{{fields}}}")).key();
    let hash = Some(key_hash(b"session-12"));
    assert_eq!(chat(r#""prompt_cache_key":"session-12""#), hash);
    assert_eq!(chat(r#""session_id": "session-12","messages":[]"#), hash);
    assert_eq!(chat(r#""session_id":"x","prompt_cache_key":"session-12""#), hash);
    assert_ne!(chat(r#""prompt_cache_key":"session-1""#), hash);
    for none in [r#""prompt_cache_key":null"#, r#""session_id":7"#, r#""user":"session-12""#] {
        assert_eq!(chat(none), None, "{none}");
    }
}

#[test]
fn the_last_of_duplicate_fields_counts() {
    let (one, other) = (text(2 * BLOCK), text(3 * BLOCK).to_uppercase());
    let body = format!(r#"{{"text":"{one}","text":"{other}"}}"#);
    assert_eq!(blocks(&generate(&body)), blocks(&generate(&format!(r#"{{"text":"{other}"}}"#))));
    let key = read(Dialect::Generate, r#"{"session_id":"a","session_id":null}"#).key();
    assert_eq!(key, None);
}

#[test]
fn a_long_prompt_has_a_bounded_list_of_blocks() {
    let body = format!(r#"{{"text":"{}"}}"#, text((MAX_BLOCKS + 5) * BLOCK));
    let prompt = read_in(Dialect::Generate, &body, 100_000);
    assert_eq!(prompt.blocks(), MAX_BLOCKS);
    assert_eq!(prompt.bytes(), ((MAX_BLOCKS + 5) * BLOCK) as u64 + 1);
}

#[test]
fn the_last_block_has_a_hash_although_it_is_incomplete() {
    let all = text(3 * BLOCK);
    let hashes = |length: usize| {
        let prompt = generate(&format!(r#"{{"text":"{}"}}"#, &all[..length]));
        let hashes: Vec<u64> = prompt.hashes().collect();
        assert_eq!(hashes[..prompt.blocks()], blocks(&prompt));
        // As many as a trace has for that many tokens, of which a block has 512.
        assert_eq!(hashes.len(), prompt.hashed_bytes().div_ceil(4).div_ceil(512) as usize, "{length}");
        hashes
    };
    // The closing quote is a byte too.
    let [short, shorter] = [100, 99].map(hashes);
    assert!(short.len() == 1 && shorter.len() == 1 && short != shorter);
    assert_eq!([0, BLOCK - 1, BLOCK].map(|length| hashes(length).len()), [0, 1, 2]);
    let [long, longer] = [2 * BLOCK + 7, 2 * BLOCK + 8].map(hashes);
    assert_eq!(long[..2], longer[..2]);
    assert_ne!(long[2], longer[2]);
    assert_eq!(long, hashes(2 * BLOCK + 7));
    let body = format!(r#"{{"text":"{}"}}"#, text((MAX_BLOCKS + 5) * BLOCK + 9));
    let prompt = read_in(Dialect::Generate, &body, 100_000);
    assert_eq!(prompt.hashes().count(), MAX_BLOCKS);
    assert_eq!(prompt.hashed_bytes(), (MAX_BLOCKS * BLOCK) as u64);
}

#[test]
fn hashes_spread_and_their_key_is_in_them() {
    let mut seen = std::collections::HashSet::new();
    for number in 0..20_000u64 {
        let mut bytes = [b'a'; BLOCK];
        bytes[1_000..1_008].copy_from_slice(&number.to_le_bytes());
        for key in [HashKey::STABLE, HashKey::from_random(1)] {
            let mut hasher = StreamHasher::new(key);
            hasher.feed(&bytes, |hash| assert!(seen.insert(hash)));
        }
    }
    // Each bit is set in about half of them.
    for bit in 0..64 {
        let set = seen.iter().filter(|hash| *hash >> bit & 1 == 1).count();
        assert!(set.abs_diff(20_000) < 600, "bit {bit}: {set} of 40,000");
    }
}

#[test]
fn a_stable_prefix_is_that_of_a_process_in_which_all_hashes_are_stable() {
    for length in [1, 63, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 9, 90 * BLOCK] {
        let body = format!(r#"{{"text":"x","model":"m","text":"{}","cache_salt":"s"}}"#, text(length));
        let read = |key: HashKey, is_stable: bool, size: usize| {
            let mut inspector = BodyInspector::new(Dialect::Generate).with_prompt(key);
            if is_stable {
                inspector = inspector.with_stable_prefix();
            }
            body.as_bytes().chunks(size).for_each(|chunk| inspector.feed(chunk).unwrap());
            inspector.finish().unwrap().prompt.unwrap()
        };
        let stable = read(HashKey::STABLE, false, body.len());
        for size in [7, 64, 3 * BLOCK, body.len()] {
            let random = read(key(), true, size);
            assert_eq!(random.prefix(), stable.prefix(), "{length} bytes in chunks of {size}");
            assert_ne!(random.prefix(), read(key(), false, size).prefix());
            assert!((0..random.blocks()).all(|number| random.block(number) != stable.block(number)));
        }
    }
}

#[test]
fn lists_of_blocks_are_used_again() {
    let body = format!(r#"{{"text":"{}"}}"#, text(40 * BLOCK));
    let list = |prompt: &Prompt| prompt.blocks.0.as_ptr();
    let first = read_in(Dialect::Generate, &body, body.len());
    let memory = list(&first);
    drop(first);
    assert_eq!(list(&read_in(Dialect::Generate, &body, body.len())), memory);
}

#[test]
fn responses_and_messages_have_a_prompt_with_what_stands_beside_it() {
    for (dialect, prompt, beside) in
        [(Dialect::Responses, "input", "instructions"), (Dialect::Messages, "messages", "system")]
    {
        let text = text(3 * BLOCK);
        let of = |beside: &str| read(dialect, &format!(r#"{{"{prompt}":"{text}"{beside}}}"#));
        let (plain, one, other) =
            (of(""), of(&format!(r#","{beside}":"x""#)), of(&format!(r#","{beside}":"y""#)));
        assert_eq!(plain.blocks(), 3);
        assert_eq!((shared(&plain, &one), shared(&one, &other)), (0, 0));
        assert_eq!(blocks(&one), blocks(&of(&format!(r#","{beside}":"x""#))));
    }
}
