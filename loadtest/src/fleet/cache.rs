//! The prefix cache of one prefill server: blocks of tokens in the order of their last use.

use std::collections::HashMap;

/// No neighbour in the list.
const NONE: u32 = u32::MAX;

struct Node {
    block: u64,
    newer: u32,
    older: u32,
}

/// A cache of prompt blocks that forgets the least recently used leaf first.
///
/// A block's number stands for the block and all before it, so a chain of blocks is a path in a tree. A chain
/// is touched from its end to its start: a block is then always newer than those that continue it, and the
/// oldest block of all is a leaf.
pub struct PrefixCache {
    capacity: usize,
    index: HashMap<u64, u32>,
    nodes: Vec<Node>,
    free: Vec<u32>,
    newest: u32,
    oldest: u32,
}

impl PrefixCache {
    /// An empty cache for `capacity` blocks.
    pub fn new(capacity: usize) -> Self {
        let (index, nodes, free) = (HashMap::new(), Vec::new(), Vec::new());
        Self { capacity, index, nodes, free, newest: NONE, oldest: NONE }
    }

    /// How many blocks at the start of `chain` it holds.
    pub fn matched(&self, chain: &[u64]) -> usize {
        chain.iter().take_while(|block| self.index.contains_key(block)).count()
    }

    /// Adds `chain` as the most recently used, and forgets what no longer fits.
    pub fn insert(&mut self, chain: &[u64]) {
        for block in chain.iter().rev() {
            let node = match self.index.get(block) {
                Some(&node) => {
                    self.unlink(node);
                    node
                }
                None => self.add(*block),
            };
            self.link_newest(node);
        }
        while self.index.len() > self.capacity {
            let oldest = self.oldest;
            self.unlink(oldest);
            self.index.remove(&self.nodes[oldest as usize].block);
            self.free.push(oldest);
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Self::new(self.capacity);
    }

    /// The number of blocks that it holds.
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    fn add(&mut self, block: u64) -> u32 {
        let node = Node { block, newer: NONE, older: NONE };
        let at = if let Some(at) = self.free.pop() {
            self.nodes[at as usize] = node;
            at
        } else {
            self.nodes.push(node);
            u32::try_from(self.nodes.len() - 1).expect("fewer than 2^32 blocks")
        };
        self.index.insert(block, at);
        at
    }

    fn link_newest(&mut self, at: u32) {
        let next = self.newest;
        self.nodes[at as usize].newer = NONE;
        self.nodes[at as usize].older = next;
        if next == NONE {
            self.oldest = at;
        } else {
            self.nodes[next as usize].newer = at;
        }
        self.newest = at;
    }

    fn unlink(&mut self, at: u32) {
        let Node { newer, older, .. } = self.nodes[at as usize];
        if newer == NONE {
            self.newest = older;
        } else {
            self.nodes[newer as usize].older = older;
        }
        if older == NONE {
            self.oldest = newer;
        } else {
            self.nodes[older as usize].newer = newer;
        }
    }
}
