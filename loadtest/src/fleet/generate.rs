//! Made-up loads: what traces of one service do not show.
//!
//! Each is a function of its seed. Rates are arbitrary: a load is set relative to what `random` needs.

use fastrand::Rng;

use super::trace::{BLOCK_TOKENS, Request};

/// A kind of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Generator {
    /// Agents of twelve kinds, each with a system prompt of 8k to 30k tokens; tool calls follow within
    /// seconds.
    Agents,
    /// Chats of up to twelve turns with a short system prompt that all share, and readers who think.
    Chats,
    /// Prompts of very different lengths that share nothing.
    OneOff,
    /// One prompt of 4k tokens, over and over.
    Alike,
    /// Six prefixes of 6k to 30k tokens, some asked for more often, with a short question each.
    Hot,
}

impl Generator {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Agents, Self::Chats, Self::OneOff, Self::Alike, Self::Hot];

    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Agents => "agents",
            Self::Chats => "chats",
            Self::OneOff => "one-off",
            Self::Alike => "alike",
            Self::Hot => "hot",
        }
    }

    /// `count` requests, in the order of their time.
    pub fn requests(self, count: usize, seed: u64) -> Vec<Request> {
        let mut maker = Maker { rng: Rng::with_seed(seed), next_block: 1, requests: Vec::new() };
        let mut now = 0.0;
        let shared: Vec<Prompt> = match self {
            Self::Agents => (0..12).map(|kind| maker.prompt(8_000 + kind * 2_000)).collect(),
            Self::Chats => vec![maker.prompt(600)],
            Self::OneOff => vec![maker.prompt(0)],
            Self::Alike => vec![maker.prompt(4_096)],
            Self::Hot => (1..=6).map(|kind| maker.prompt(kind * 5_000)).collect(),
        };
        while maker.requests.len() < count {
            now += maker.exponential(1.0);
            match self {
                Self::Agents => {
                    let prompt = maker.any(&shared);
                    let turns = maker.rng.u64(2..10);
                    maker.session(now, prompt, turns, 300..2_000, 3.0);
                }
                Self::Chats => {
                    let turns = maker.rng.u64(1..12);
                    maker.session(now, shared[0].clone(), turns, 100..4_000, 30.0);
                }
                Self::OneOff => {
                    let tokens = (3_000.0 * maker.normal().exp()).clamp(50.0, 60_000.0) as u64;
                    let mut prompt = shared[0].clone();
                    maker.extend(&mut prompt, tokens);
                    maker.push(now, &prompt);
                }
                Self::Alike => maker.push_same(now, &shared[0]),
                Self::Hot => {
                    // The smaller of two: some are asked for much more often.
                    let kind = maker.rng.usize(..shared.len()).min(maker.rng.usize(..shared.len()));
                    let mut prompt = shared[kind].clone();
                    let question = maker.rng.u64(50..400);
                    maker.extend(&mut prompt, question);
                    maker.push(now, &prompt);
                }
            }
        }
        let mut requests = maker.requests;
        requests.sort_by(|a, b| a.at.total_cmp(&b.at));
        // Sessions that end after the last one has started would come ever more slowly.
        requests.truncate(count);
        let start = requests[0].at;
        requests.iter_mut().for_each(|request| request.at -= start);
        requests
    }
}

/// The text of a session so far: its full blocks, and its length.
#[derive(Clone, Default)]
struct Prompt {
    full: Vec<u64>,
    tokens: u64,
}

struct Maker {
    rng: Rng,
    next_block: u64,
    requests: Vec<Request>,
}

impl Maker {
    fn prompt(&mut self, tokens: u64) -> Prompt {
        let mut prompt = Prompt::default();
        self.extend(&mut prompt, tokens);
        prompt
    }

    fn any(&mut self, shared: &[Prompt]) -> Prompt {
        shared[self.rng.usize(..shared.len())].clone()
    }

    fn block(&mut self) -> u64 {
        self.next_block += 1;
        self.next_block
    }

    /// Appends `tokens` of new text.
    fn extend(&mut self, prompt: &mut Prompt, tokens: u64) {
        prompt.tokens += tokens;
        while (prompt.full.len() as u64 + 1) * BLOCK_TOKENS <= prompt.tokens {
            let block = self.block();
            prompt.full.push(block);
        }
    }

    /// Turns that each continue the text of the one before, with its response.
    fn session(
        &mut self,
        start: f64,
        mut prompt: Prompt,
        turns: u64,
        added: std::ops::Range<u64>,
        pause: f64,
    ) {
        let mut now = start;
        for _ in 0..turns {
            let tokens = self.rng.u64(added.clone());
            self.extend(&mut prompt, tokens);
            self.push(now, &prompt);
            let output = self.requests.last().map_or(0, |request| request.output);
            self.extend(&mut prompt, output);
            now += output as f64 * 0.02 + 1.0 + self.exponential(pause);
        }
    }

    fn push(&mut self, at: f64, prompt: &Prompt) {
        let mut blocks = prompt.full.clone();
        // A block that is partly filled is another one when the text goes on.
        if !prompt.tokens.is_multiple_of(BLOCK_TOKENS) {
            blocks.push(self.block());
        }
        let output = 20 + self.exponential(200.0) as u64;
        self.requests.push(Request { at, input: prompt.tokens.max(1), output, blocks });
    }

    /// The very same prompt again.
    fn push_same(&mut self, at: f64, prompt: &Prompt) {
        self.requests.push(Request { at, input: prompt.tokens, output: 100, blocks: prompt.full.clone() });
    }

    fn exponential(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.rng.f64()).ln()
    }

    fn normal(&mut self) -> f64 {
        super::noise::normal(&mut self.rng)
    }
}
