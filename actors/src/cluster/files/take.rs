//! Files from members that have them.

use std::collections::HashMap;
use std::net::{Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use ingle_protocol::wire::v2::{ChunkFollows, ChunkList, ChunkListRequest, ChunkRequest, FileRefused, ListProgress};
use ingle_protocol::wire::{Body as _, Frame, Version, Versioned as _, WireError};
use ingle_protocol::{ModelDigest, NodeId};
use quinn::{Connection, RecvStream, SendStream};
use tokio::time::{Instant, sleep, timeout};

use super::super::accept::certified_peer;
use super::super::endpoint::plain;
use super::super::{Mesh, bind};
use crate::frames::{FrameError, read_frame_in, write_body_in};
use crate::models::{Holder, Holders};

/// How long members may take to be connected and to say what they have.
const SETTLING: Duration = Duration::from_secs(6);
const CONNECT_DEADLINE: Duration = Duration::from_secs(3);
/// The longest silence of a member that owes something.
const SILENCE: Duration = Duration::from_secs(5);
/// The longest time for one chunk, and for the list of a file that is hashed first.
const CHUNK_DEADLINE: Duration = Duration::from_secs(60);
const LIST_DEADLINE: Duration = Duration::from_secs(20 * 60);
/// How much of a stream is read at once.
const READ: usize = 256 << 10;

/// The members that have files.
#[derive(Debug)]
pub struct PeerFiles {
    mesh: Arc<ArcSwapOption<Mesh>>,
    /// A socket of its own for all copies, made when it is first needed.
    endpoint: Arc<OnceLock<quinn::Endpoint>>,
    /// A connection lives as long as somebody copies over it.
    slots: Mutex<HashMap<NodeId, Weak<Slot>>>,
}

/// The one connection for files to a member.
type Slot = tokio::sync::Mutex<Option<Connection>>;

impl PeerFiles {
    /// Those of the mesh that is there at the time.
    pub fn new(mesh: Arc<ArcSwapOption<Mesh>>) -> Self {
        Self { mesh, endpoint: Arc::default(), slots: Mutex::default() }
    }

    fn slot(&self, node: NodeId) -> Arc<Slot> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.retain(|_, slot| slot.strong_count() > 0);
        let standing = slots.get(&node).and_then(Weak::upgrade);
        standing.unwrap_or_else(|| {
            let slot = Arc::new(Slot::default());
            slots.insert(node, Arc::downgrade(&slot));
            slot
        })
    }

    /// Waiting tells us nothing more.
    fn is_settled(&self) -> bool {
        let Some(mesh) = self.mesh.load_full() else { return false };
        let members = mesh.roster.lock();
        let told = |member: &super::super::Member| {
            member.link.as_ref().is_some_and(|link| link.version < Version::OF_FILES || member.files.is_some())
        };
        (!members.is_empty() || mesh.peers.is_empty()) && members.values().all(told)
    }
}

impl Holders for PeerFiles {
    fn settled<'a>(&'a self, file: &'a ModelDigest) -> BoxFuture<'a, ()> {
        let settling = async move {
            while self.of(file).is_empty() && !self.is_settled() {
                sleep(Duration::from_millis(50)).await;
            }
        };
        timeout(SETTLING, settling).map(|_| ()).boxed()
    }

    fn of(&self, file: &ModelDigest) -> Vec<Arc<dyn Holder>> {
        let Some(mesh) = self.mesh.load_full() else { return Vec::new() };
        let members = mesh.roster.lock();
        let having = members.iter().filter_map(|(node, member)| {
            let link = member.link.as_ref().filter(|link| link.version >= Version::OF_FILES)?;
            let has_it = member.files.as_ref().is_some_and(|files| files.contains(file));
            has_it.then(|| PeerHolder {
                node: *node,
                name: member.name.clone(),
                address: plain(link.connection.remote_address()),
                mesh: mesh.clone(),
                endpoint: self.endpoint.clone(),
                slot: self.slot(*node),
            })
        });
        having.map(|holder| Arc::new(holder) as Arc<dyn Holder>).collect()
    }
}

/// A member that has a file.
#[derive(Debug, Clone)]
struct PeerHolder {
    node: NodeId,
    name: String,
    address: SocketAddr,
    mesh: Arc<Mesh>,
    endpoint: Arc<OnceLock<quinn::Endpoint>>,
    slot: Arc<Slot>,
}

impl Holder for PeerHolder {
    fn node(&self) -> NodeId {
        self.node
    }

    fn name(&self) -> String {
        self.name.clone()
    }

    fn chunk_list(&self, file: ModelDigest) -> BoxFuture<'static, Result<ChunkList, String>> {
        let holder = self.clone();
        let asking = async move {
            let (mut send, mut receive) = holder.open().await?;
            write_body_in(Version::OF_FILES, &mut send, &ChunkListRequest { file }).await?;
            loop {
                let frame = next(&mut receive).await?;
                match frame.kind {
                    ListProgress::KIND => {}
                    ChunkList::KIND => return Ok(ChunkList::decode_for(&frame, Version::OF_FILES)?),
                    _ => return Err(refusal(&frame)),
                }
            }
        };
        within(LIST_DEADLINE, asking).boxed()
    }

    fn chunk(&self, file: ModelDigest, index: u32, length: u64) -> BoxFuture<'static, Result<Bytes, String>> {
        let holder = self.clone();
        let asking = async move {
            let (mut send, mut receive) = holder.open().await?;
            write_body_in(Version::OF_FILES, &mut send, &ChunkRequest { file, index }).await?;
            let frame = next(&mut receive).await?;
            if frame.kind != ChunkFollows::KIND {
                return Err(refusal(&frame));
            }
            let follows = ChunkFollows::decode_for(&frame, Version::OF_FILES)?;
            if u64::from(follows.length) != length {
                return Err(TakeError(format!("gives {} bytes for a chunk of {length}", follows.length)));
            }
            let mut bytes = BytesMut::with_capacity(length as usize);
            while (bytes.len() as u64) < length {
                let reading = timeout(SILENCE, receive.read_chunk(READ, true)).await;
                let piece = reading.map_err(|_| silent())?.map_err(|error| TakeError(error.to_string()))?;
                let Some(piece) = piece else { return Err(TakeError("a chunk that ends early".into())) };
                if bytes.len() + piece.bytes.len() > length as usize {
                    return Err(TakeError("a chunk that is too long".into()));
                }
                bytes.extend_from_slice(&piece.bytes);
            }
            Ok(bytes.freeze())
        };
        within(CHUNK_DEADLINE, asking).boxed()
    }
}

impl PeerHolder {
    async fn open(&self) -> Result<(SendStream, RecvStream), TakeError> {
        let connection = self.connection().await?;
        let opening = timeout(SILENCE, connection.open_bi()).await.map_err(|_| silent())?;
        opening.map_err(|error| TakeError(super::super::link::describe(&error)))
    }

    /// The connection that stands, or a new one. Whoever comes second waits for the first.
    async fn connection(&self) -> Result<Connection, TakeError> {
        let mut slot = timeout(CONNECT_DEADLINE, self.slot.lock()).await.map_err(|_| silent())?;
        if let Some(standing) = slot.as_ref().filter(|connection| connection.close_reason().is_none()) {
            return Ok(standing.clone());
        }
        let client = self.mesh.files_client.load_full().as_ref().clone();
        let connecting = self
            .endpoint()?
            .connect_with(client, self.address, crate::identity::SERVER_NAME)
            .map_err(|error| TakeError(error.to_string()))?;
        let connection = timeout(CONNECT_DEADLINE, connecting).await.map_err(|_| silent())?;
        let connection = connection.map_err(|error| TakeError(super::super::link::describe(&error)))?;
        if certified_peer(&connection).map(|peer| peer.node) != Some(self.node) {
            connection.close(1u32.into(), b"another node");
            return Err(TakeError("another node answers at its address".into()));
        }
        *slot = Some(connection.clone());
        Ok(connection)
    }

    fn endpoint(&self) -> Result<&quinn::Endpoint, TakeError> {
        if let Some(endpoint) = self.endpoint.get() {
            return Ok(endpoint);
        }
        let any = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 0);
        let endpoint = bind(any).map_err(|error| TakeError(format!("no socket for copies: {error}")))?;
        Ok(self.endpoint.get_or_init(|| endpoint))
    }
}

/// Why a member gives nothing, in words.
struct TakeError(String);

impl From<FrameError> for TakeError {
    fn from(error: FrameError) -> Self {
        Self(error.to_string())
    }
}

impl From<WireError> for TakeError {
    fn from(error: WireError) -> Self {
        Self(error.to_string())
    }
}

fn silent() -> TakeError {
    TakeError(format!("said nothing for {} s", SILENCE.as_secs()))
}

async fn within<T>(limit: Duration, asking: impl Future<Output = Result<T, TakeError>>) -> Result<T, String> {
    let begin = Instant::now();
    match timeout(limit, asking).await {
        Ok(result) => result.map_err(|error| error.0),
        Err(_) => Err(format!("took longer than {} s", begin.elapsed().as_secs())),
    }
}

async fn next(receive: &mut RecvStream) -> Result<Frame, TakeError> {
    let frame = timeout(SILENCE, read_frame_in(Version::OF_FILES, receive)).await.map_err(|_| silent())??;
    frame.ok_or_else(|| FrameError::Ended.into())
}

fn refusal(frame: &Frame) -> TakeError {
    match FileRefused::decode_for(frame, Version::OF_FILES) {
        Ok(refused) => TakeError(refused.why.chars().take(300).collect()),
        Err(error) => error.into(),
    }
}
