//! What an engine has probably read before: hashes of the beginnings of conversations that were sent there.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use crate::ModelDigest;
use crate::wire::v2::Message;

/// Beginnings of a conversation, one for each message: a hash over all messages so far, and their bytes.
pub fn beginnings(model: &ModelDigest, messages: &[Message]) -> Vec<(u64, u32)> {
    let mut hasher = DefaultHasher::new();
    model.0.hash(&mut hasher);
    let mut bytes = 0u32;
    let mut list = Vec::with_capacity(messages.len());
    for message in messages {
        (message.role.as_str(), &message.content, &message.extra).hash(&mut hasher);
        bytes = bytes.saturating_add(u32::try_from(message.content.len()).unwrap_or(u32::MAX));
        list.push((hasher.finish(), bytes));
    }
    list
}

/// The beginnings that one engine has read. Bounded: the oldest are forgotten.
#[derive(Debug, Clone, Default)]
pub struct PrefixMemory {
    seen: HashMap<u64, u64>,
    clock: u64,
}

impl PrefixMemory {
    /// Beginnings that are remembered.
    pub const MOST: usize = 4_096;

    /// The conversation was sent there.
    pub fn remember(&mut self, beginnings: &[(u64, u32)]) {
        for (hash, _) in beginnings.iter().rev().take(Self::MOST / 4).rev() {
            self.clock += 1;
            self.seen.insert(*hash, self.clock);
        }
        if self.seen.len() > Self::MOST {
            let oldest = self.clock.saturating_sub(Self::MOST as u64 / 2);
            self.seen.retain(|_, at| *at > oldest);
        }
    }

    /// Bytes of the longest beginning that it has read.
    pub fn known_bytes(&self, beginnings: &[(u64, u32)]) -> u32 {
        beginnings.iter().rev().find(|(hash, _)| self.seen.contains_key(hash)).map_or(0, |(_, bytes)| *bytes)
    }

    /// The engine was started anew and knows nothing.
    pub fn forget(&mut self) {
        self.seen.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::v2::Role;

    fn said(texts: &[&str]) -> Vec<Message> {
        let message = |text: &&str| Message { role: Role::User, content: (*text).to_owned(), extra: Vec::new() };
        texts.iter().map(message).collect()
    }

    #[test]
    fn a_conversation_that_goes_on_is_known_as_far_as_it_was_sent() {
        let model = ModelDigest::default();
        let mut memory = PrefixMemory::default();
        let first = beginnings(&model, &said(&["aaaa", "bb"]));
        assert_eq!(memory.known_bytes(&first), 0);
        memory.remember(&first);
        assert_eq!(memory.known_bytes(&first), 6);
        assert_eq!(memory.known_bytes(&beginnings(&model, &said(&["aaaa", "bb", "ccc"]))), 6);
        assert_eq!(memory.known_bytes(&beginnings(&model, &said(&["aaaa", "other"]))), 4);
        assert_eq!(memory.known_bytes(&beginnings(&model, &said(&["aaa", "abb"]))), 0);
        assert_eq!(memory.known_bytes(&beginnings(&ModelDigest([1; 32]), &said(&["aaaa"]))), 0);
    }

    #[test]
    fn it_stays_small_and_keeps_the_newest() {
        let mut memory = PrefixMemory::default();
        for number in 0..50_000u64 {
            memory.remember(&[(number, 1)]);
            assert!(memory.seen.len() <= PrefixMemory::MOST);
        }
        assert_eq!(memory.known_bytes(&[(49_999, 7)]), 7);
        assert_eq!(memory.known_bytes(&[(0, 7)]), 0);
    }
}
