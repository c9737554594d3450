//! Files for members that copy them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ingle_protocol::ModelDigest;
use ingle_protocol::wire::v2::{ChunkFollows, ChunkListRequest, ChunkRequest, FileRefused, ListProgress};
use ingle_protocol::wire::{Body as _, Version, Versioned as _, WireError};
use quinn::{Connection, RecvStream, SendStream};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{sleep, timeout};

use super::super::Mesh;
use super::super::link::STREAM_DEADLINE;
use super::FileShare;
use crate::frames::{FrameError, read_frame_in, write_body_in};
use crate::identity::CertifiedName;

/// How long a member may take to take a piece of a chunk.
const PIECE_DEADLINE: Duration = Duration::from_secs(10);
const PIECE: usize = 256 << 10;
/// How often a member hears how far the hashing of a file is: it gives up where it hears nothing.
const SAY_EVERY: Duration = Duration::from_secs(1);

/// Answers a member until it closes the connection or the mesh ends.
pub async fn serve(mesh: Arc<Mesh>, connection: Connection, peer: CertifiedName, _place: OwnedSemaphorePermit) {
    tracing::info!(peer = %peer.node, "copies files");
    let serving = async {
        while let Ok((send, receive)) = connection.accept_bi().await {
            let share = mesh.share.clone();
            let answering = mesh.cancel.clone().run_until_cancelled_owned(async move {
                if let Err(error) = answer(&share, send, receive).await {
                    tracing::debug!(%error, "a chunk was not given");
                }
            });
            mesh.tasks.spawn(answering);
        }
    };
    if mesh.cancel.run_until_cancelled(serving).await.is_none() {
        connection.close(0u32.into(), b"the node leaves");
    }
}

async fn answer(share: &FileShare, mut send: SendStream, mut receive: RecvStream) -> Result<(), FrameError> {
    let reading = read_frame_in(Version::OF_FILES, &mut receive);
    let frame = timeout(STREAM_DEADLINE, reading).await.map_err(|_| FrameError::Ended)??.ok_or(FrameError::Ended)?;
    match frame.kind {
        ChunkListRequest::KIND => {
            let request = ChunkListRequest::decode_for(&frame, Version::OF_FILES)?;
            give_list(share, request.file, &mut send).await?;
        }
        ChunkRequest::KIND => {
            let request = ChunkRequest::decode_for(&frame, Version::OF_FILES)?;
            give_chunk(share, request, &mut send).await?;
        }
        got => return Err(WireError::Unexpected { expected: "a request for a file", got }.into()),
    }
    let _ = send.finish();
    let _ = timeout(PIECE_DEADLINE, send.stopped()).await;
    Ok(())
}

async fn refuse(send: &mut SendStream, why: String) -> Result<(), FrameError> {
    write_body_in(Version::OF_FILES, send, &FileRefused { why }).await
}

async fn give_list(share: &FileShare, file: ModelDigest, send: &mut SendStream) -> Result<(), FrameError> {
    let Some(store) = share.store() else { return refuse(send, "has no model files".into()).await };
    let done = Arc::new(AtomicU64::new(0));
    let counted = done.clone();
    let making = async {
        let _one_at_a_time = share.hashing.acquire().await;
        store.chunk_list(file, counted).await
    };
    tokio::pin!(making);
    let list = loop {
        tokio::select! {
            list = &mut making => break list,
            () = sleep(SAY_EVERY) => {
                let progress = ListProgress { done: done.load(Ordering::Relaxed), size: 0 };
                write_body_in(Version::OF_FILES, send, &progress).await?;
            }
            // Nobody waits any more.
            _ = send.stopped() => return Ok(()),
        }
    };
    match list {
        Ok(list) => write_body_in(Version::OF_FILES, send, &list).await,
        Err(error) => refuse(send, format!("cannot give the file: {error}")).await,
    }
}

async fn give_chunk(share: &FileShare, request: ChunkRequest, send: &mut SendStream) -> Result<(), FrameError> {
    let _room = share.chunks.acquire().await;
    let Some(store) = share.store() else { return refuse(send, "has no model files".into()).await };
    let bytes = match store.chunk(request.file, request.index).await {
        Ok(bytes) => bytes,
        Err(error) => return refuse(send, format!("cannot give the chunk: {error}")).await,
    };
    // A chunk is 4 MiB at most.
    let length = bytes.len() as u32;
    write_body_in(Version::OF_FILES, send, &ChunkFollows { length }).await?;
    for piece in bytes.chunks(PIECE) {
        share.pace(piece.len()).await;
        let written = timeout(PIECE_DEADLINE, send.write_all(piece)).await.map_err(|_| FrameError::Ended)?;
        written.map_err(std::io::Error::from)?;
    }
    Ok(())
}
