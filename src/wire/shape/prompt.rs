//! The fingerprint of a prompt: what policies may know of it, taken while the body is scanned.
//!
//! The bytes of the prompt's value are hashed where they lie, in blocks, each hash covering all blocks before
//! its own. No text is kept, parsed or tokenized. Which server has which block is not known here.

use std::cell::RefCell;

use super::Dialect;

/// Bytes that are hashed at a time: four lanes of two words each, so that four multiplications are under way.
const STRIPE: usize = 64;
const STRIPES_PER_BLOCK: usize = Prompt::BLOCK_BYTES / STRIPE;

/// Most blocks of a prompt that are hashed. 2 MiB are about 500,000 tokens, more than a server takes.
const MAX_BLOCKS: usize = 1_024;
const MAX_HASHED: u64 = (MAX_BLOCKS * Prompt::BLOCK_BYTES) as u64;

/// Most free lists of hashes that a thread keeps: 8 KiB each at most.
const MAX_POOLED_LISTS: usize = 64;

/// How many blocks the hash of the beginning covers.
const PREFIX_BLOCKS: usize = 2;

/// How many fields there are of [`PromptField::Seed`] and of [`PromptField::Key`].
const SEEDS: usize = 7;
const KEYS: usize = 2;

/// The prompt of a request: its size, and hashes of its beginnings.
///
/// Two prompts with the same [`block`](Self::block) have the same bytes up to the end of that block, the same
/// model and the same tools. Hashes are keyed at random in each process, but for that of the
/// [beginning](Self::prefix) if it was asked for. Of a batch they are those of its first prompt and what
/// follows it.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Prompt {
    bytes: u64,
    blocks: BlockList,
    /// Of all of it, up to its last byte. 0 of a prompt with more than [`MAX_BLOCKS`] blocks.
    whole: u64,
    /// Of its beginning, with a key that is the same in every process.
    stable_prefix: Option<u64>,
    seed: u64,
    key: Option<u64>,
}

impl Prompt {
    /// Bytes of JSON in one block: about 512 tokens of English.
    pub const BLOCK_BYTES: usize = 2 << 10;

    /// The length of the prompt's JSON in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The number of its whole blocks, up to 1,024.
    pub fn blocks(&self) -> usize {
        self.blocks.0.len()
    }

    /// The hash of everything up to the end of block `number`, which must be less than
    /// [`blocks`](Self::blocks).
    pub fn block(&self, number: usize) -> u64 {
        fold(self.blocks.0[number] ^ self.seed, LANES[0])
    }

    /// A hash of the prompt's first 4 KiB: two of its blocks, or as much as there is. It is the same in every
    /// process if a policy [needs](crate::Needs) keys.
    pub fn prefix(&self) -> u64 {
        if let Some(hash) = self.stable_prefix {
            return fold(hash ^ self.seed, LANES[0]);
        }
        match self.prefix_blocks() {
            0 => fold(self.whole ^ self.seed, LANES[0]),
            blocks => self.block(blocks - 1),
        }
    }

    /// How many whole blocks [`prefix`](Self::prefix) covers.
    pub(crate) fn prefix_blocks(&self) -> usize {
        self.blocks().min(PREFIX_BLOCKS)
    }

    /// The hashes of all that is hashed, block by block: also of the last block, which may be incomplete.
    pub(crate) fn hashes(&self) -> impl Iterator<Item = u64> + '_ {
        let has_rest = self.hashed_bytes() > (self.blocks() * Self::BLOCK_BYTES) as u64;
        let rest = has_rest.then(|| fold(self.whole ^ self.seed, LANES[0]));
        (0..self.blocks()).map(|number| self.block(number)).chain(rest)
    }

    /// The bytes that [`hashes`](Self::hashes) cover: of a longer prompt the first [`MAX_BLOCKS`] blocks.
    pub(crate) fn hashed_bytes(&self) -> u64 {
        self.bytes.min(MAX_HASHED)
    }

    /// The hash of the name that the body gives to its conversation.
    pub(crate) fn key(&self) -> Option<u64> {
        self.key
    }
}

/// Odd constants with as many ones as zeros: the first digits of pi's fraction.
const LANES: [u64; 4] =
    [0x243f_6a88_85a3_08d3, 0x1319_8a2e_0370_7345, 0xa409_3822_299f_31d1, 0x082e_fa98_ec4e_6c89];

/// What hashes are keyed with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HashKey([u64; 4]);

impl HashKey {
    /// The same in every process, so that routers which share nothing agree.
    pub(crate) const STABLE: Self = Self(LANES);

    /// Keyed by a random number: nobody outside can look for two prompts with one hash.
    pub(crate) fn from_random(number: u64) -> Self {
        let mut word = number;
        Self(LANES.map(|lane| {
            word = fold(word ^ lane, LANES[3]);
            word ^ lane.rotate_left(32)
        }))
    }
}

/// The hash of a conversation's name, as [`PromptReader`] finds it in a body.
pub(crate) fn key_hash(name: &[u8]) -> u64 {
    let mut hasher = StreamHasher::new(HashKey::STABLE);
    hasher.feed(name, |_| {});
    // As the body's value, which is read up to its closing quote.
    hasher.feed(b"\"", |_| {});
    hasher.digest()
}

/// Multiplies to 128 bits and folds the halves: each bit of the result depends on every bit of both.
#[inline]
fn fold(a: u64, b: u64) -> u64 {
    halves(u128::from(a) * u128::from(b))
}

#[inline]
fn halves(product: u128) -> u64 {
    product as u64 ^ (product >> 64) as u64
}

/// Hashes a stream of bytes, whatever its pieces.
#[derive(Debug)]
struct StreamHasher {
    key: HashKey,
    lanes: [u64; 4],
    stripes: usize,
    length: u64,
    /// The last bytes, less than a stripe.
    rest: [u8; STRIPE],
    rest_length: usize,
}

impl StreamHasher {
    fn new(key: HashKey) -> Self {
        Self { key, lanes: key.0, stripes: 0, length: 0, rest: [0; STRIPE], rest_length: 0 }
    }

    fn restart(&mut self, key: HashKey) {
        (self.key, self.lanes) = (key, key.0);
        (self.stripes, self.length, self.rest_length) = (0, 0, 0);
    }

    /// Hashes more bytes; `block` gets the hash at the end of each block.
    fn feed(&mut self, mut bytes: &[u8], mut block: impl FnMut(u64)) {
        self.length += bytes.len() as u64;
        if self.rest_length > 0 {
            let (first, others) = bytes.split_at(bytes.len().min(STRIPE - self.rest_length));
            self.rest[self.rest_length..][..first.len()].copy_from_slice(first);
            self.rest_length += first.len();
            bytes = others;
            if self.rest_length < STRIPE {
                return;
            }
            let stripe = self.rest;
            self.stripes(&[stripe], &mut block);
            self.rest_length = 0;
        }
        let (stripes, rest) = bytes.as_chunks::<STRIPE>();
        self.stripes(stripes, &mut block);
        self.rest[..rest.len()].copy_from_slice(rest);
        self.rest_length = rest.len();
    }

    fn stripes(&mut self, mut stripes: &[[u8; STRIPE]], block: &mut impl FnMut(u64)) {
        while !stripes.is_empty() {
            let to_end_of_block = STRIPES_PER_BLOCK - self.stripes % STRIPES_PER_BLOCK;
            let (now, later) = stripes.split_at(stripes.len().min(to_end_of_block));
            self.lanes = mixed(self.lanes, &self.key.0, now);
            self.stripes += now.len();
            stripes = later;
            if self.stripes.is_multiple_of(STRIPES_PER_BLOCK) {
                block(self.of_lanes());
            }
        }
    }

    /// The hash of all whole stripes.
    fn of_lanes(&self) -> u64 {
        let [a, b, c, d] = self.lanes;
        fold(fold(a ^ LANES[1], b ^ LANES[2]) ^ c, d ^ LANES[3])
    }

    /// The hash of everything.
    fn digest(&mut self) -> u64 {
        self.rest[self.rest_length..].fill(0);
        self.lanes = mixed(self.lanes, &self.key.0, &[self.rest]);
        fold(self.of_lanes() ^ self.length, LANES[2])
    }
}

/// The lanes after these stripes.
#[inline]
fn mixed(lanes: [u64; 4], key: &[u64; 4], stripes: &[[u8; STRIPE]]) -> [u64; 4] {
    // As products that are folded only when they are needed: of lanes in words the compiler makes vectors,
    // out of which it must move each factor, which takes twice as long.
    let mut products = lanes.map(u128::from);
    for stripe in stripes {
        let (words, _) = stripe.as_chunks::<8>();
        for lane in 0..4 {
            let first = u64::from_le_bytes(words[2 * lane]) ^ halves(products[lane]);
            let second = u64::from_le_bytes(words[2 * lane + 1]) ^ key[lane];
            products[lane] = u128::from(first) * u128::from(second);
        }
    }
    products.map(halves)
}

/// Which part of the fingerprint a field's value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PromptField {
    /// The prompt itself.
    Text,
    /// What is part of the prompt without being in its value: the same messages make another prompt with it.
    Seed(usize),
    /// The name of the conversation. The first counts.
    Key(usize),
}

impl PromptField {
    fn of(name: &[u8], dialect: Dialect) -> Option<Self> {
        match (name, dialect) {
            (b"messages", Dialect::Chat | Dialect::Messages)
            | (b"input", Dialect::Responses)
            | (b"prompt", Dialect::Completions)
            | (b"text" | b"input_ids", Dialect::Generate) => Some(Self::Text),
            (b"model", _) => Some(Self::Seed(0)),
            (b"lora_path", _) => Some(Self::Seed(1)),
            (b"cache_salt", _) => Some(Self::Seed(2)),
            (b"extra_key", _) => Some(Self::Seed(3)),
            (b"tools", _) => Some(Self::Seed(4)),
            (b"chat_template_kwargs", _) => Some(Self::Seed(5)),
            // What the prompt begins with, on APIs where it is no message.
            (b"system", Dialect::Messages) | (b"instructions", Dialect::Responses) => Some(Self::Seed(6)),
            (b"prompt_cache_key", _) => Some(Self::Key(0)),
            (b"session_id", _) => Some(Self::Key(1)),
            _ => None,
        }
    }
}

/// Takes the fingerprint of a body's prompt. It is told of fields and values by the scanner.
#[derive(Debug)]
pub(super) struct PromptReader {
    key: HashKey,
    /// What the current field is, from its name to the end of its value.
    field: Option<PromptField>,
    /// Where in the current chunk the value starts whose bytes are hashed.
    from: Option<usize>,
    /// Nothing of the value was hashed yet.
    is_leading: bool,
    hasher: StreamHasher,
    /// Hashes the beginning once more, where blocks are hashed with another key.
    prefix: Option<Box<PrefixHasher>>,
    prompt: Prompt,
    seeds: [u64; SEEDS],
    keys: [Option<u64>; KEYS],
}

impl PromptReader {
    pub(super) fn new(key: HashKey) -> Self {
        Self {
            key,
            field: None,
            from: None,
            is_leading: true,
            hasher: StreamHasher::new(key),
            prefix: None,
            prompt: Prompt::default(),
            seeds: [0; SEEDS],
            keys: [None; KEYS],
        }
    }

    /// Hashes the prompt's beginning with the key that is the same in every process.
    pub(super) fn with_stable_prefix(mut self) -> Self {
        self.prefix = Some(Box::default());
        self
    }

    /// A field of the top level begins. Its name has no escapes.
    pub(super) fn field(&mut self, name: &[u8], dialect: Dialect) {
        self.field = PromptField::of(name, dialect);
    }

    /// Its value begins with `byte`, at this place of the chunk. Of duplicate fields the last counts.
    pub(super) fn value_started(&mut self, byte: u8, at: usize) {
        let Some(field) = self.field else { return };
        match field {
            PromptField::Text => {
                self.prompt.blocks.0.clear();
                (self.prompt.bytes, self.prompt.whole) = (0, 0);
                if let Some(prefix) = &mut self.prefix {
                    **prefix = PrefixHasher::default();
                }
            }
            PromptField::Seed(number) => self.seeds[number] = 0,
            PromptField::Key(number) => self.keys[number] = None,
        }
        // `null` is the same as no value, and a number names no conversation.
        if byte != b'"' && (byte == b'n' || matches!(field, PromptField::Key(_))) {
            self.field = None;
            return;
        }
        let is_stable = match field {
            PromptField::Text => false,
            // They are a part of the prefix.
            PromptField::Seed(_) => self.prefix.is_some(),
            // The hash is to be that of a header's value.
            PromptField::Key(_) => true,
        };
        self.hasher.restart(if is_stable { HashKey::STABLE } else { self.key });
        (self.from, self.is_leading) = (Some(at), true);
    }

    /// The scanner has come to the end of a chunk.
    pub(super) fn chunk_ended(&mut self, chunk: &[u8]) {
        if let Some(from) = self.from {
            self.read(&chunk[from..]);
            self.from = Some(0);
        }
    }

    /// The value ends before `chunk[end]`.
    pub(super) fn value_ended(&mut self, chunk: &[u8], end: usize) {
        let (Some(from), Some(field)) = (self.from.take(), self.field) else { return };
        self.read(&chunk[from..end]);
        self.field = None;
        match field {
            // Not all of it was hashed, and how much depends on the pieces that it came in.
            PromptField::Text if self.prompt.bytes > MAX_HASHED => {}
            PromptField::Text => self.prompt.whole = self.hasher.digest(),
            PromptField::Seed(number) => {
                // Each kind with a number of its own: a model and a salt of the same name differ.
                self.seeds[number] = fold(self.hasher.digest() ^ number as u64, LANES[1]);
            }
            PromptField::Key(number) => self.keys[number] = Some(self.hasher.digest()),
        }
    }

    fn read(&mut self, mut bytes: &[u8]) {
        if self.is_leading {
            // So that a prompt has the same blocks alone and as the first of a batch.
            let is_leading = |byte: &u8| matches!(byte, b'[' | b'"' | b' ' | b'\t' | b'\r' | b'\n');
            let Some(start) = bytes.iter().position(|byte| !is_leading(byte)) else { return };
            (bytes, self.is_leading) = (&bytes[start..], false);
        }
        if self.field != Some(PromptField::Text) {
            self.hasher.feed(bytes, |_| {});
            return;
        }
        self.prompt.bytes += bytes.len() as u64;
        if let Some(prefix) = &mut self.prefix {
            prefix.feed(bytes);
        }
        if self.prompt.blocks() < MAX_BLOCKS {
            let blocks = &mut self.prompt.blocks;
            self.hasher.feed(bytes, |hash| blocks.push(hash));
        }
    }

    pub(super) fn finish(mut self) -> Prompt {
        // In any order: fields come as the client likes.
        self.prompt.seed = self.seeds.iter().fold(0, |seed, of_field| seed ^ of_field);
        self.prompt.key = self.keys.iter().find_map(|key| *key);
        self.prompt.stable_prefix = self.prefix.map(|prefix| prefix.finish());
        self.prompt
    }
}

/// Hashes the beginning of a prompt, as [`Prompt::prefix`] covers it.
#[derive(Debug)]
struct PrefixHasher {
    hasher: StreamHasher,
    /// At the end of the last block.
    block: Option<u64>,
}

impl Default for PrefixHasher {
    fn default() -> Self {
        Self { hasher: StreamHasher::new(HashKey::STABLE), block: None }
    }
}

impl PrefixHasher {
    fn feed(&mut self, bytes: &[u8]) {
        let left = PREFIX_BLOCKS * Prompt::BLOCK_BYTES - self.hasher.length as usize;
        let bytes = &bytes[..bytes.len().min(left)];
        self.hasher.feed(bytes, |hash| self.block = Some(hash));
    }

    fn finish(mut self) -> u64 {
        match self.block {
            Some(hash) => hash,
            // 0 where there is no prompt, as for the whole of it.
            None if self.hasher.length == 0 => 0,
            None => self.hasher.digest(),
        }
    }
}

thread_local! {
    /// Lists that were used before, so that a request allocates none.
    static FREE_LISTS: RefCell<Vec<Vec<u64>>> = const { RefCell::new(Vec::new()) };
}

/// The hashes of up to [`MAX_BLOCKS`] blocks, in memory that is used again.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct BlockList(Vec<u64>);

impl BlockList {
    fn push(&mut self, hash: u64) {
        if self.0.capacity() == 0 {
            self.0 = FREE_LISTS.with_borrow_mut(Vec::pop).unwrap_or_default();
        }
        if self.0.len() < MAX_BLOCKS {
            self.0.push(hash);
        }
    }
}

impl Drop for BlockList {
    fn drop(&mut self) {
        if self.0.capacity() == 0 {
            return;
        }
        let mut list = std::mem::take(&mut self.0);
        list.clear();
        // It fails while the thread ends, where the list is freed instead.
        let _ = FREE_LISTS.try_with(|free| {
            let mut free = free.borrow_mut();
            if free.len() < MAX_POOLED_LISTS {
                free.push(list);
            }
        });
    }
}

#[cfg(test)]
mod tests;
