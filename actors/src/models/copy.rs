//! Copying a file from other machines of the cluster: chunk by chunk, from several at once, each chunk checked.
//!
//! What the chunks are is said by the machines themselves. A list is believed no further than the file's own SHA-256
//! at the end: where that is wrong, everybody who gave the list is left out, and the next list is tried. Within a list
//! a chunk that is wrong shows who sent it. Chunks that arrived stay through a kill -9; what is there is checked
//! against the list when the copy goes on.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use ingle_protocol::NodeId;
use ingle_protocol::wire::v2::{ChunkList, ModelState};
use sha2::{Digest, Sha256};
use tokio::time::{Instant, sleep, sleep_until};

use super::chunks::{chunks_there, write_checked};
use super::fetch::{Fetch, Shown};
use super::hash::{blocking, finish, hash_all};
use super::holders::{Holder, Holders};
use super::part::Note;
use super::source::SourceError;
use crate::platform::available_disk_space;

/// Machines that are asked for chunks at a time, and chunks that each is asked for: what is under way is in memory.
const MOST_AT_A_TIME: usize = 4;
const CHUNKS_EACH: usize = 2;
/// Chunks in a row that a machine does not give before it is left out.
const MOST_FAILURES: u32 = 2;
/// Rest before a machine that failed is asked again.
const PAUSE: Duration = Duration::from_millis(500);
/// How long the first list waits for others to agree with it.
const AGREEING: Duration = Duration::from_millis(300);
/// How often new machines are looked for.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Lists that turn out wrong before the copy is given up.
const MOST_LISTS: usize = 3;

/// What the notes of such copies have for a source. With gaps nobody else can go on with the part.
const WITH_GAPS: &str = "machines of the cluster, with gaps";
pub(super) const WITHOUT_GAPS: &str = "machines of the cluster";

/// What came of something that was asked for.
enum Event {
    List(NodeId, Result<ChunkList, String>),
    Chunk(NodeId, u32, Result<Bytes, String>),
    Written(NodeId, u32, std::io::Result<bool>),
    Rested(NodeId),
}

/// A machine that gives chunks.
struct Giver {
    holder: Arc<dyn Holder>,
    asked: usize,
    failures: u32,
    resting: bool,
    given: u64,
}

/// One copy, by one list.
struct Swarm<'a> {
    fetch: &'a Fetch<'a>,
    shown: &'a Shown<'a>,
    holders: &'a dyn Holders,
    list: ChunkList,
    file: Arc<File>,
    missing: VecDeque<u32>,
    there: Vec<bool>,
    done: u64,
    /// In use.
    givers: BTreeMap<NodeId, Giver>,
    /// Asked for their lists.
    asked: HashSet<NodeId>,
    /// All that ever gave something, for the log.
    gave: BTreeMap<String, u64>,
    events: FuturesUnordered<BoxFuture<'static, Event>>,
    failures: Vec<String>,
}

impl Fetch<'_> {
    /// Copies the file from machines that have it. `Ok(None)` where there are none.
    pub(super) async fn copy_from(&self, holders: &dyn Holders) -> Result<Option<PathBuf>, SourceError> {
        holders.settled(&self.model.digest).await;
        if holders.of(&self.model.digest).is_empty() {
            return Ok(None);
        }
        let shown = Shown::new(self);
        let (mut liars, mut failures) = (HashSet::new(), Vec::new());
        for _ in 0..MOST_LISTS {
            let Some((list, givers)) = self.agreed_list(holders, &mut liars, &mut failures).await else { break };
            self.make_room(list.size).await?;
            let mut swarm = Swarm::begin(self, &shown, holders, list, givers, &liars).await?;
            let finished = swarm.run().await;
            let members: Vec<NodeId> = swarm.givers.keys().copied().collect();
            failures.append(&mut swarm.failures);
            if !finished? {
                swarm.close_gaps().await?;
                break;
            }
            match swarm.publish().await {
                Err(error @ SourceError::Altered { .. }) => {
                    failures.push(error.to_string());
                    liars.extend(members);
                }
                other => return other.map(Some),
            }
        }
        Err(SourceError::Refused(if failures.is_empty() { "none gave the file".into() } else { failures.join("; ") }))
    }

    /// What most of the machines say that the file consists of, and who says so.
    async fn agreed_list(
        &self,
        holders: &dyn Holders,
        liars: &mut HashSet<NodeId>,
        failures: &mut Vec<String>,
    ) -> Option<(ChunkList, Vec<Arc<dyn Holder>>)> {
        let (file, size) = (self.model.digest, self.model.size);
        let honest = holders.of(&file).into_iter().filter(|holder| !liars.contains(&holder.node()));
        let mut asking: FuturesUnordered<_> =
            honest.map(|holder| async move { (holder.chunk_list(file).await, holder) }.boxed()).collect();
        let mut lists: Vec<(ChunkList, Vec<Arc<dyn Holder>>)> = Vec::new();
        let mut until = None;
        loop {
            let enough = async {
                match until {
                    Some(until) => sleep_until(until).await,
                    None => std::future::pending().await,
                }
            };
            let answer = tokio::select! {
                answer = asking.next() => answer,
                () = enough => None,
            };
            let Some((list, holder)) = answer else { break };
            match list.and_then(|list| fitting(list, size)) {
                Ok(list) => {
                    until = until.or(Some(Instant::now() + AGREEING));
                    match lists.iter_mut().find(|(known, _)| *known == list) {
                        Some((_, who)) => who.push(holder),
                        None => lists.push((list, vec![holder])),
                    }
                }
                Err(why) => {
                    failures.push(format!("{}: {why}", holder.name()));
                    liars.insert(holder.node());
                }
            }
        }
        lists.into_iter().max_by_key(|(_, who)| who.len())
    }
}

/// A list can be used for a file of this size.
fn fitting(list: ChunkList, size: Option<u64>) -> Result<ChunkList, String> {
    match size {
        _ if !list.is_whole() => Err("its list of chunks is not whole".into()),
        Some(size) if size != list.size => Err(format!("has a file of {} bytes where {size} were expected", list.size)),
        _ => Ok(list),
    }
}

impl<'a> Swarm<'a> {
    /// Looks what is there of the file already.
    async fn begin(
        fetch: &'a Fetch<'a>,
        shown: &'a Shown<'a>,
        holders: &'a dyn Holders,
        list: ChunkList,
        givers: Vec<Arc<dyn Holder>>,
        liars: &HashSet<NodeId>,
    ) -> Result<Self, SourceError> {
        let (part, lock, wanted) = (fetch.part.clone(), fetch.lock.clone(), list.clone());
        let looking = blocking(move |left| {
            let _lock = lock;
            let file = part.open_for_chunks(wanted.size)?;
            let there = chunks_there(&file, &wanted, left)?;
            part.set_note(Some(&Note { source: WITH_GAPS.into(), tag: String::new(), size: wanted.size }))?;
            Ok((file, there))
        });
        let (file, there) = looking.await.map_err(SourceError::io("looking at the partial file"))?;
        let length = |index| list.place(index).map_or(0, |(_, length)| length);
        let (missing, here): (Vec<u32>, Vec<u32>) = (0..).zip(&there).map(|(index, there)| (index, *there)).fold(
            (vec![], vec![]),
            |(mut missing, mut here), (index, there)| {
                if there {
                    here.push(index)
                } else {
                    missing.push(index)
                }
                (missing, here)
            },
        );
        let done = here.iter().map(|index| length(*index)).sum();
        shown.set_total(list.size);
        shown.show(done);
        let (needed, available) = (
            list.size - done,
            available_disk_space(fetch.store.dir()).map_err(SourceError::io("asking for free disk space"))?,
        );
        if available < needed {
            return Err(SourceError::NoSpace { needed, available });
        }
        if done > 0 {
            tracing::info!(model = fetch.model.name, done, of = list.size, "goes on with a copy");
        }
        let mut swarm = Self {
            fetch,
            shown,
            holders,
            list,
            file: Arc::new(file),
            missing: missing.into(),
            there,
            done,
            givers: BTreeMap::new(),
            asked: liars.clone(),
            gave: BTreeMap::new(),
            events: FuturesUnordered::new(),
            failures: Vec::new(),
        };
        for holder in givers {
            swarm.asked.insert(holder.node());
            swarm.add(holder);
        }
        Ok(swarm)
    }

    fn add(&mut self, holder: Arc<dyn Holder>) {
        let giver = Giver { holder, asked: 0, failures: 0, resting: false, given: 0 };
        self.givers.insert(giver.holder.node(), giver);
    }

    /// Until all chunks are there, or nobody is left who gives any. True for the first.
    async fn run(&mut self) -> Result<bool, SourceError> {
        let mut look = tokio::time::interval(LOOK_EVERY);
        loop {
            self.ask();
            if self.done == self.list.size {
                return Ok(true);
            }
            tokio::select! {
                Some(event) = self.events.next() => self.take(event)?,
                _ = look.tick() => self.look_for_more(),
                else => return Ok(false),
            }
            if self.givers.is_empty() && self.events.is_empty() {
                return Ok(false);
            }
        }
    }

    /// Everybody in use has something to do.
    fn ask(&mut self) {
        let file = self.fetch.model.digest;
        for (node, giver) in self.givers.iter_mut().take(MOST_AT_A_TIME) {
            while giver.asked < CHUNKS_EACH && !giver.resting {
                let Some(index) = self.missing.pop_front() else { return };
                let Some((_, length)) = self.list.place(index) else { continue };
                giver.asked += 1;
                let (node, chunk) = (*node, giver.holder.chunk(file, index, length));
                self.events.push(async move { Event::Chunk(node, index, chunk.await) }.boxed());
            }
        }
    }

    /// Machines that came, or have got the file, since.
    fn look_for_more(&mut self) {
        let file = self.fetch.model.digest;
        for holder in self.holders.of(&file) {
            if self.asked.insert(holder.node()) {
                let (node, list) = (holder.node(), holder.chunk_list(file));
                self.events.push(async move { Event::List(node, list.await) }.boxed());
            }
        }
    }

    fn take(&mut self, event: Event) -> Result<(), SourceError> {
        match event {
            Event::List(node, list) => {
                let holder = self.holders.of(&self.fetch.model.digest).into_iter().find(|holder| holder.node() == node);
                match (list, holder) {
                    (Ok(list), Some(holder)) if list == self.list => self.add(holder),
                    (Err(why), Some(holder)) => self.failures.push(format!("{}: {why}", holder.name())),
                    _ => {}
                }
            }
            Event::Chunk(node, index, Ok(bytes)) => {
                let (Some((begin, _)), Some(hash)) = (self.list.place(index), self.list.hashes.get(index as usize))
                else {
                    return Ok(());
                };
                let (file, lock, hash) = (self.file.clone(), self.fetch.lock.clone(), *hash);
                let writing = blocking(move |_| {
                    let _lock = lock;
                    write_checked(&file, begin, &bytes, &hash)
                });
                self.events.push(async move { Event::Written(node, index, writing.await) }.boxed());
            }
            Event::Chunk(node, index, Err(why)) => {
                self.missing.push_front(index);
                self.failed(node, &why);
            }
            Event::Written(node, index, Ok(true)) => {
                let length = self.list.place(index).map_or(0, |(_, length)| length);
                self.done += length;
                if let Some(there) = self.there.get_mut(index as usize) {
                    *there = true;
                }
                if let Some(giver) = self.givers.get_mut(&node) {
                    (giver.asked, giver.failures, giver.given) =
                        (giver.asked.saturating_sub(1), 0, giver.given + length);
                    let (name, given) = (giver.holder.name(), giver.given);
                    if self.gave.insert(name, given).is_none() {
                        let names: Vec<&str> = self.gave.keys().map(String::as_str).collect();
                        self.fetch.store.origin().set(names.join(" and "));
                    }
                }
                self.shown.show(self.done);
            }
            Event::Written(node, index, Ok(false)) => {
                self.missing.push_front(index);
                self.leave_out(node, &format!("gave wrong bytes for chunk {index}"));
            }
            Event::Written(_, _, Err(error)) => return Err(SourceError::io("writing a chunk")(error)),
            Event::Rested(node) => {
                if let Some(giver) = self.givers.get_mut(&node) {
                    giver.resting = false;
                }
            }
        }
        Ok(())
    }

    fn failed(&mut self, node: NodeId, why: &str) {
        let Some(giver) = self.givers.get_mut(&node) else { return };
        (giver.asked, giver.failures) = (giver.asked.saturating_sub(1), giver.failures + 1);
        // Two that were asked for at once fail at once: that is one failure.
        let most = MOST_FAILURES * CHUNKS_EACH as u32;
        if giver.failures >= most {
            self.leave_out(node, why);
        } else if !std::mem::replace(&mut giver.resting, true) {
            self.events.push(async move { sleep(PAUSE).map(|()| Event::Rested(node)).await }.boxed());
        }
    }

    fn leave_out(&mut self, node: NodeId, why: &str) {
        let Some(giver) = self.givers.remove(&node) else { return };
        let name = giver.holder.name();
        tracing::warn!(model = self.fetch.model.name, peer = name, why, "no more chunks from this machine");
        self.failures.push(format!("{name}: {why}"));
    }

    /// Makes what is there something that a source can go on with: the part up to the first gap.
    async fn close_gaps(&mut self) -> Result<(), SourceError> {
        let whole = self.there.iter().take_while(|there| **there).count() as u64;
        let end = self.list.place(whole as u32).map_or(self.list.size, |(begin, _)| begin);
        let (file, part, size) = (self.file.clone(), self.fetch.part.clone(), self.list.size);
        let lock = self.fetch.lock.clone();
        let closing = blocking(move |_| {
            let _lock = lock;
            file.set_len(end)?;
            part.set_note(Some(&Note { source: WITHOUT_GAPS.into(), tag: String::new(), size }))
        });
        closing.await.map_err(SourceError::io("closing the gaps of the partial file"))
    }

    /// Checks the whole file and makes it the store's.
    async fn publish(&mut self) -> Result<PathBuf, SourceError> {
        (self.fetch.progress)(ModelState::Verifying);
        let (store, expected, part) = (self.fetch.store.clone(), self.fetch.model.digest, self.fetch.part.clone());
        let (lock, file) = (self.fetch.lock.clone(), self.file.clone());
        let check = blocking(move |left| {
            let _lock = lock;
            let mut hasher = Sha256::new();
            hash_all(File::open(&part.path)?, &mut hasher, left)?;
            let got = finish(hasher);
            if got != expected {
                let moved_to = store.corrupt_path(&expected);
                part.move_aside(&moved_to)?;
                return Ok(Err(SourceError::Altered { got, expected, moved_to }));
            }
            let path = store.path_of(&expected);
            part.publish(&file, &path)?;
            store.remember(&path, expected);
            Ok(Ok(path))
        });
        let path = check.await.map_err(SourceError::io("checking the copy"))??;
        let gave: Vec<String> = self.gave.iter().map(|(name, bytes)| format!("{name} {bytes}")).collect();
        tracing::info!(model = self.fetch.model.name, bytes = gave.join(", "), "copied from the cluster");
        Ok(path)
    }
}

#[cfg(test)]
#[path = "copy_tests.rs"]
mod tests;
