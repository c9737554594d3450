//! Memory for keys and values, handed out in blocks. A block that is full stays findable by the tokens in it and
//! before it, also when nobody uses it any more, until its memory is needed: the block that was not used for longest
//! goes first. So whoever continues a conversation finds what was computed for it.
//!
//! Blocks count their users. Only full blocks are shared, and nobody writes to a full block.

use std::collections::{BTreeSet, HashMap};

/// The chain of nothing: what the first block of a sequence stands behind.
const ROOT: u64 = 0;

/// What a full block is found by: the chain before it and its own tokens. Compared as a whole, so that one
/// conversation never gets another's memory by a chance of hashing.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    before: u64,
    tokens: Box<[u32]>,
}

#[derive(Debug, Default)]
struct Block {
    users: u32,
    /// Set while it can be found; the chain that ends with it has this number, never given twice.
    found_by: Option<(Key, u64)>,
    last_used: u64,
}

/// The blocks of one engine.
#[derive(Debug)]
pub(super) struct BlockPool {
    size: usize,
    blocks: Vec<Block>,
    free: Vec<u32>,
    findable: HashMap<Key, u32>,
    /// Findable blocks without users, the longest unused first.
    unused: BTreeSet<(u64, u32)>,
    clock: u64,
    chains: u64,
}

/// The blocks of one sequence.
#[derive(Debug, Default)]
pub(crate) struct Table {
    pub blocks: Vec<u32>,
    /// How many of them, from the first on, are full and findable.
    findable: usize,
    chain: u64,
}

impl Table {
    /// How many of its blocks, from the first on, are full and findable.
    pub fn findable(&self) -> usize {
        self.findable
    }
}

impl BlockPool {
    /// `count` blocks of `size` tokens each.
    pub fn new(count: u32, size: u32) -> Self {
        let blocks = (0..count).map(|_| Block::default()).collect();
        let free = (0..count).rev().collect();
        let (findable, unused) = (HashMap::new(), BTreeSet::new());
        Self { size: size.max(1) as usize, blocks, free, findable, unused, clock: 0, chains: ROOT }
    }

    /// Tokens of one block.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The engine keeps its memory itself.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Blocks that nobody uses, findable ones included.
    pub fn available(&self) -> usize {
        self.free.len() + self.unused.len()
    }

    /// Starts a table with what is known of `tokens`: whole blocks, and never all tokens, as the last must be
    /// computed to get an answer.
    pub fn find(&mut self, tokens: &[u32]) -> Table {
        let mut table = Table::default();
        let most = tokens.len().saturating_sub(1) / self.size;
        for tokens in tokens.chunks_exact(self.size).take(most) {
            let key = Key { before: table.chain, tokens: tokens.into() };
            let Some(number) = self.findable.get(&key).copied() else { break };
            let block = &mut self.blocks[number as usize];
            if block.users == 0 {
                self.unused.remove(&(block.last_used, number));
            }
            block.users += 1;
            table.chain = block.found_by.as_ref().map_or(ROOT, |(_, chain)| *chain);
            table.blocks.push(number);
        }
        table.findable = table.blocks.len();
        table
    }

    /// Makes room for `tokens` in all. False where there are not enough blocks; then nothing has changed.
    pub fn extend(&mut self, table: &mut Table, tokens: usize) -> bool {
        let missing = tokens.div_ceil(self.size).saturating_sub(table.blocks.len());
        if missing > self.available() {
            return false;
        }
        for _ in 0..missing {
            let number = self.free.pop().or_else(|| {
                let (_, number) = self.unused.pop_first()?;
                if let Some((key, _)) = self.blocks[number as usize].found_by.take() {
                    self.findable.remove(&key);
                }
                Some(number)
            });
            let Some(number) = number else { return false };
            self.blocks[number as usize].users = 1;
            table.blocks.push(number);
        }
        true
    }

    /// Makes the blocks findable that are full: those of the first `computed` of `tokens`.
    pub fn publish(&mut self, table: &mut Table, tokens: &[u32], computed: usize) {
        while (table.findable + 1) * self.size <= computed {
            let from = table.findable * self.size;
            let key = Key { before: table.chain, tokens: tokens[from..from + self.size].into() };
            let number = table.blocks[table.findable];
            match self.findable.get(&key) {
                // Somebody else computed the same; ours is given back unfindable.
                Some(other) => {
                    let other = &self.blocks[*other as usize];
                    table.chain = other.found_by.as_ref().map_or(ROOT, |(_, chain)| *chain);
                }
                None => {
                    self.chains += 1;
                    self.blocks[number as usize].found_by = Some((key.clone(), self.chains));
                    self.findable.insert(key, number);
                    table.chain = self.chains;
                }
            }
            table.findable += 1;
        }
    }

    /// Takes a table's blocks back. What is findable stays so for as long as there is room.
    pub fn release(&mut self, table: &mut Table) {
        // From the last to the first, so that the end of a conversation goes before its begin.
        for number in table.blocks.drain(..).rev() {
            let block = &mut self.blocks[number as usize];
            block.users -= 1;
            if block.users > 0 {
                continue;
            }
            if block.found_by.is_some() {
                self.clock += 1;
                block.last_used = self.clock;
                self.unused.insert((self.clock, number));
            } else {
                self.free.push(number);
            }
        }
        *table = Table::default();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What must always hold, given the tables that are in use.
    fn check(pool: &BlockPool, tables: &[Table]) {
        let mut users = vec![0u32; pool.blocks.len()];
        tables.iter().flat_map(|table| &table.blocks).for_each(|number| users[*number as usize] += 1);
        for (number, block) in pool.blocks.iter().enumerate() {
            let number = number as u32;
            assert_eq!(block.users, users[number as usize]);
            let free = pool.free.contains(&number);
            let unused = pool.unused.contains(&(block.last_used, number));
            assert_eq!(free, block.users == 0 && block.found_by.is_none());
            assert_eq!(unused, block.users == 0 && block.found_by.is_some());
            if let Some((key, _)) = &block.found_by {
                assert_eq!(pool.findable.get(key), Some(&number));
            }
        }
        assert_eq!(pool.findable.len(), pool.blocks.iter().filter(|block| block.found_by.is_some()).count());
    }

    #[test]
    fn a_conversation_that_goes_on_finds_its_blocks() {
        let mut pool = BlockPool::new(8, 4);
        let tokens: Vec<u32> = (0..11).collect();
        let mut first = pool.find(&tokens);
        assert!(first.blocks.is_empty() && pool.extend(&mut first, 11));
        pool.publish(&mut first, &tokens, 11);
        let shared = first.blocks[..2].to_vec();
        let mut second = pool.find(&(0..12).collect::<Vec<_>>());
        assert_eq!(second.blocks, shared);
        pool.release(&mut first);
        pool.release(&mut second);
        check(&pool, &[]);
        // The last token is always left to be computed.
        let mut third = pool.find(&tokens[..8]);
        assert_eq!(third.blocks, shared[..1]);
        // Another begin finds nothing, though its second block has the same tokens.
        let other: Vec<u32> = [9, 9, 9, 9, 4, 5, 6, 7, 8].to_vec();
        assert!(pool.find(&other).blocks.is_empty());
        pool.release(&mut third);
        check(&pool, &[]);
    }

    #[test]
    fn the_longest_unused_goes_first_and_ends_before_begins() {
        let mut pool = BlockPool::new(4, 2);
        let (a, b) = ([1, 1, 2, 2, 0], [3, 3, 4, 4, 0]);
        for tokens in [a, b] {
            let mut table = pool.find(&tokens);
            assert!(pool.extend(&mut table, 4));
            pool.publish(&mut table, &tokens, 4);
            pool.release(&mut table);
        }
        let mut table = Table::default();
        assert!(pool.extend(&mut table, 2));
        let mut found = pool.find(&a);
        assert_eq!(found.blocks.len(), 1, "the end of the older conversation is gone, its begin is not");
        pool.release(&mut found);
        let mut found = pool.find(&b);
        assert_eq!(found.blocks.len(), 2);
        assert!(!pool.extend(&mut found, 100));
        check(&pool, &[table, found]);
    }

    proptest! {
        #[test]
        fn nothing_is_lost_or_shared_by_mistake(
            moves in proptest::collection::vec((0u8..4, 0usize..6, 1usize..14, 0u32..3), 1..120),
        ) {
            let mut pool = BlockPool::new(12, 3);
            let mut tables: Vec<Table> = Vec::new();
            let mut contents: Vec<Vec<u32>> = Vec::new();
            for (what, which, length, kind) in moves {
                match what {
                    0 | 1 => {
                        let tokens: Vec<u32> = (0..length as u32).map(|n| n / (kind + 1)).collect();
                        let mut table = pool.find(&tokens);
                        prop_assert!(table.blocks.len() * 3 < tokens.len());
                        if pool.extend(&mut table, tokens.len()) {
                            tables.push(table);
                            contents.push(tokens);
                        } else {
                            pool.release(&mut table);
                        }
                    }
                    2 if which < tables.len() => {
                        let computed = contents[which].len();
                        pool.publish(&mut tables[which], &contents[which], computed);
                    }
                    3 if which < tables.len() => {
                        pool.release(&mut tables.remove(which));
                        contents.remove(which);
                    }
                    _ => {}
                }
                check(&pool, &tables);
            }
            tables.iter_mut().for_each(|table| pool.release(table));
            prop_assert_eq!(pool.available(), 12);
        }
    }
}
