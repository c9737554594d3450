//! Copies from machines in this process, with faults. Real ones over real connections are in `tests/`.

use std::fs;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use ingle_protocol::ModelDigest;
use ingle_protocol::wire::v2::CHUNK_BYTES;
use tokio_util::sync::CancellationToken;

use super::super::catalog::CatalogModel;
use super::super::source::SourceSettings;
use super::super::store::{FetchError, ModelStore};
use super::*;

/// Three chunks and a bit.
fn content() -> Vec<u8> {
    (0..3 * CHUNK_BYTES as u32 + 1000).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

fn list_of(content: &[u8]) -> ChunkList {
    let hashes = content.chunks(CHUNK_BYTES as usize).map(|chunk| Sha256::digest(chunk).into()).collect();
    ChunkList { size: content.len() as u64, hashes }
}

#[derive(Debug, Clone)]
struct Machine {
    node: NodeId,
    content: Arc<Vec<u8>>,
    list: ChunkList,
    /// Gives so many chunks, then none.
    gives: u32,
    given: Arc<AtomicU32>,
}

impl Machine {
    fn new(n: u8, content: Vec<u8>) -> Self {
        let list = list_of(&content);
        Self { node: NodeId([n; 16]), content: Arc::new(content), list, gives: u32::MAX, given: Arc::default() }
    }
}

impl Holder for Machine {
    fn node(&self) -> NodeId {
        self.node
    }

    fn name(&self) -> String {
        format!("m{}", self.node.0[0])
    }

    fn chunk_list(&self, _: ModelDigest) -> BoxFuture<'static, Result<ChunkList, String>> {
        let list = self.list.clone();
        async move { Ok(list) }.boxed()
    }

    fn chunk(&self, _: ModelDigest, index: u32, length: u64) -> BoxFuture<'static, Result<Bytes, String>> {
        let machine = self.clone();
        async move {
            sleep(Duration::from_millis(5)).await;
            if machine.given.fetch_add(1, Ordering::SeqCst) >= machine.gives {
                return Err("the connection is gone".into());
            }
            let begin = index as usize * CHUNK_BYTES as usize;
            Ok(Bytes::copy_from_slice(&machine.content[begin..begin + length as usize]))
        }
        .boxed()
    }
}

#[derive(Debug, Default)]
struct Machines(Mutex<Vec<Machine>>);

impl Holders for Machines {
    fn settled<'a>(&'a self, _: &'a ModelDigest) -> BoxFuture<'a, ()> {
        async {}.boxed()
    }

    fn of(&self, _: &ModelDigest) -> Vec<Arc<dyn Holder>> {
        self.0.lock().unwrap().iter().map(|machine| Arc::new(machine.clone()) as Arc<dyn Holder>).collect()
    }
}

fn model() -> CatalogModel {
    let content = content();
    let digest = ModelDigest(Sha256::digest(&content).into());
    CatalogModel { name: "m".into(), digest, size: Some(content.len() as u64), sources: vec![] }
}

fn store(dir: &std::path::Path, machines: Vec<Machine>) -> ModelStore {
    let store = ModelStore::open_with(dir, SourceSettings::default()).unwrap();
    store.with_holders(Arc::new(Machines(Mutex::new(machines))))
}

async fn ensure(store: &ModelStore) -> Result<PathBuf, FetchError> {
    store.ensure(&model(), &|_| (), &CancellationToken::new()).await
}

#[tokio::test]
async fn several_give_and_one_that_dies_or_lies_is_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let mut wrong = content();
    wrong[5] ^= 1;
    wrong[CHUNK_BYTES as usize + 5] ^= 1;
    let (honest, mut dying) = (Machine::new(1, content()), Machine::new(2, content()));
    dying.gives = 1;
    // Tells the right list and gives other bytes.
    let liar = Machine { list: list_of(&content()), ..Machine::new(3, wrong) };
    let path = ensure(&store(folder.path(), vec![liar, dying.clone(), honest.clone()])).await.unwrap();
    assert_eq!(fs::read(path).unwrap(), content());
    assert!(dying.given.load(Ordering::SeqCst) >= 1 && honest.given.load(Ordering::SeqCst) >= 1);
}

#[tokio::test]
async fn a_list_that_lies_is_found_out_at_the_end_and_the_next_one_is_tried() {
    let folder = tempfile::tempdir().unwrap();
    let mut wrong = content();
    wrong[7] ^= 1;
    let liars = [1, 2].map(|n| Machine::new(n, wrong.clone()));
    let machines = || liars.iter().cloned().chain([Machine::new(3, content())]).collect();
    let path = ensure(&store(folder.path(), machines())).await.unwrap();
    assert_eq!(fs::read(path).unwrap(), content());

    let folder = tempfile::tempdir().unwrap();
    let error = ensure(&store(folder.path(), liars.to_vec())).await.unwrap_err().to_string();
    assert!(error.contains("damaged or altered"), "{error}");
    let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|file| file.unwrap().path()).collect();
    assert!(!left.iter().any(|path| path.extension().is_some_and(|e| e == "gguf")), "{left:?}");
}

#[tokio::test]
async fn what_is_there_is_not_copied_again() {
    let folder = tempfile::tempdir().unwrap();
    let mut dying = Machine::new(1, content());
    dying.gives = 2;
    let error = ensure(&store(folder.path(), vec![dying])).await.unwrap_err().to_string();
    assert!(error.contains("m1: the connection is gone"), "{error}");
    let whole = Machine::new(2, content());
    ensure(&store(folder.path(), vec![whole.clone()])).await.unwrap();
    assert_eq!(whole.given.load(Ordering::SeqCst), 2, "two of four were there");
}

#[tokio::test]
async fn a_list_of_another_file_is_refused_before_a_chunk_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let other = Machine::new(1, content()[..1000].to_vec());
    let error = ensure(&store(folder.path(), vec![other.clone()])).await.unwrap_err().to_string();
    assert!(error.contains("has a file of 1000 bytes where"), "{error}");
    assert_eq!(other.given.load(Ordering::SeqCst), 0);
}
