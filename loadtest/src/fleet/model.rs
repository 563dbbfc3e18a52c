//! The model of a server: how long a prompt takes, what it finds in the cache, how fast tokens come.
//!
//! Seconds of the model are plain numbers. Nothing here knows a router, a socket or a real clock, so the
//! simulation and the servers on loopback share it.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::cache::PrefixCache;
use super::trace::{BLOCK_TOKENS, Request};

/// The constants of the model. The default is a 70B model on eight A800 at half of their peak: 2 FLOP a
/// parameter and token, and attention that doubles the cost at 54k tokens of context.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Model {
    /// Seconds of a prefill before its first token.
    pub prefill_base: f64,
    /// Tokens a second of a prompt without context.
    pub prefill_rate: f64,
    /// Context at which attention doubles the cost of a token.
    pub attention_tokens: f64,
    /// σ of the lognormal noise of a prefill's time.
    pub noise: f64,
    /// Tokens of KV cache of a prefill server.
    pub cache_tokens: u64,
    /// Tokens of a chunk of prefill; only the last one's transfer is not hidden by the next one's work.
    pub chunk_tokens: u64,
    /// Seconds of a transfer before its first token.
    pub transfer_base: f64,
    /// Seconds a token of the transfer.
    pub transfer_token: f64,
    /// Seconds between two tokens of a request that decodes alone.
    pub decode_base: f64,
    /// Seconds that another request of the batch adds.
    pub decode_request: f64,
    /// Seconds that a token of the batch's KV cache adds.
    pub decode_kv_token: f64,
}

impl Default for Model {
    fn default() -> Self {
        Self {
            prefill_base: 0.030,
            prefill_rate: 8_900.0,
            attention_tokens: 54_000.0,
            noise: 0.1,
            cache_tokens: 1_000_000,
            chunk_tokens: 8_192,
            transfer_base: 0.030,
            transfer_token: 12.8e-6,
            decode_base: 0.015,
            decode_request: 0.1e-3,
            decode_kv_token: 33e-9,
        }
    }
}

impl Model {
    /// Seconds that `new` tokens after `cached` ones take.
    pub fn prefill_seconds(&self, cached: u64, new: u64) -> f64 {
        let (cached, new) = (cached as f64, new as f64);
        self.prefill_base + new / self.prefill_rate * (1.0 + (cached + new / 2.0) / self.attention_tokens)
    }

    /// Seconds from the end of prefill until decode has the KV cache of all `new` tokens.
    pub fn transfer_seconds(&self, new: u64) -> f64 {
        let last_chunk = (new.max(1) - 1) % self.chunk_tokens + 1;
        self.transfer_base + self.transfer_token * last_chunk as f64
    }
}

/// What a prefill server will do with a request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prefilled {
    /// When its computation starts: the queue is first come, first served.
    pub start: f64,
    /// When it ends.
    pub finish: f64,
    /// When decode has the KV cache, and prefill answers.
    pub transferred: f64,
    /// Tokens of the prompt that were in the cache.
    pub cached: u64,
}

/// A prefill server: one prompt after the other, and a prefix cache.
pub struct PrefillServer {
    model: Model,
    cache: PrefixCache,
    speed: f64,
    free_at: f64,
    /// Whether it takes requests.
    pub(super) up: bool,
    /// Restarts so far: what was promised before the last one does not come.
    pub(super) epoch: u32,
    /// When the last one was.
    pub(super) stopped_at: f64,
    /// Seconds that it computed.
    pub(super) busy: f64,
    /// Requests that it took.
    pub(super) requests: u64,
    /// When its queue changed, and when it would have been empty from then on.
    pub(super) queue: Vec<(f64, f64)>,
}

impl PrefillServer {
    /// An idle server with an empty cache, `speed` times as fast as the model.
    pub fn new(model: Model, speed: f64) -> Self {
        let blocks = usize::try_from(model.cache_tokens / BLOCK_TOKENS).unwrap_or(usize::MAX);
        let cache = PrefixCache::new(blocks);
        Self {
            model,
            cache,
            speed,
            free_at: 0.0,
            up: true,
            epoch: 0,
            stopped_at: 0.0,
            busy: 0.0,
            requests: 0,
            queue: Vec::new(),
        }
    }

    /// Takes a request. `noise` is a factor of its time.
    ///
    /// The whole future of a request is known when it arrives: the queue is served in order, so the cache
    /// will have seen exactly the requests before this one when it starts.
    pub fn arrive(&mut self, now: f64, request: &Request, noise: f64) -> Prefilled {
        let cached = self.cached_tokens(request);
        let new = request.input - cached;
        self.cache.insert(&request.blocks);
        let seconds = self.model.prefill_seconds(cached, new) * noise / self.speed;
        let start = self.free_at.max(now);
        let finish = start + seconds;
        self.free_at = finish;
        self.queue.push((now, finish));
        self.busy += seconds;
        self.requests += 1;
        Prefilled { start, finish, transferred: finish + self.model.transfer_seconds(new), cached }
    }

    /// Tokens of the request that it will not compute. The last token is always computed.
    pub fn cached_tokens(&self, request: &Request) -> u64 {
        let blocks = self.cache.matched(&request.blocks) as u64;
        (blocks * BLOCK_TOKENS).min(request.input.saturating_sub(1))
    }

    /// Seconds until it would start another request.
    pub fn wait(&self, now: f64) -> f64 {
        (self.free_at - now).max(0.0)
    }

    /// Its speed relative to the model.
    pub fn speed(&self) -> f64 {
        self.speed
    }

    /// Loses queue and cache.
    pub(super) fn stop(&mut self, now: f64) {
        self.busy -= self.wait(now);
        (self.up, self.free_at) = (false, now);
        self.queue.push((now, now));
        self.epoch += 1;
        self.stopped_at = now;
        self.cache.clear();
    }
}

/// A request that decodes, ordered by when it ends.
#[derive(Clone, Copy, PartialEq)]
struct Decoding {
    /// The tokens that the server has made, of any request that was there all the time, when this one ends.
    end: f64,
    id: usize,
    kv_tokens: f64,
}

impl Eq for Decoding {}

impl PartialOrd for Decoding {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Decoding {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.end.total_cmp(&other.end).then(self.id.cmp(&other.id))
    }
}

/// A decode server: all requests of its batch get a token in each step, and a step takes longer with more
/// requests and more context.
pub struct DecodeServer {
    model: Model,
    batch: BinaryHeap<Reverse<Decoding>>,
    kv_tokens: f64,
    /// Steps so far, as of `at`.
    steps: f64,
    at: f64,
    /// Requests that it took.
    pub(super) requests: u64,
}

impl DecodeServer {
    /// An idle server.
    pub fn new(model: Model) -> Self {
        Self { model, batch: BinaryHeap::new(), kv_tokens: 0.0, steps: 0.0, at: 0.0, requests: 0 }
    }

    /// Adds a request to the batch and returns when its first token is out.
    pub fn join(&mut self, now: f64, id: usize, input: u64, output: u64) -> f64 {
        self.advance(now);
        let output = output.max(1) as f64;
        // Its mean over the request's life: the context grows by one token a step.
        let kv_tokens = input as f64 + output / 2.0;
        self.kv_tokens += kv_tokens;
        self.batch.push(Reverse(Decoding { end: self.steps + output, id, kv_tokens }));
        self.requests += 1;
        now + self.step()
    }

    /// When the next request ends if none joins before.
    pub fn next_end(&self) -> Option<f64> {
        let Reverse(first) = self.batch.peek()?;
        Some(self.at + (first.end - self.steps).max(0.0) * self.step())
    }

    /// Ends the request of [`next_end`](Self::next_end), and returns its id.
    pub fn end(&mut self, now: f64) -> Option<usize> {
        self.advance(now);
        let Reverse(first) = self.batch.pop()?;
        self.kv_tokens -= first.kv_tokens;
        Some(first.id)
    }

    /// Tokens of KV cache of all requests in the batch.
    pub(super) fn kv_tokens(&self) -> f64 {
        self.kv_tokens
    }

    /// Requests in the batch.
    pub fn batch(&self) -> usize {
        self.batch.len()
    }

    /// Seconds of a step.
    fn step(&self) -> f64 {
        let model = &self.model;
        model.decode_base
            + model.decode_request * self.batch.len() as f64
            + model.decode_kv_token * self.kv_tokens
    }

    fn advance(&mut self, now: f64) {
        self.steps += (now - self.at).max(0.0) / self.step();
        self.at = self.at.max(now);
    }
}
