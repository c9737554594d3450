//! Request bodies, with a limit on their length and on the time that they take.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{BodyDataStream, HttpBody};
use axum::extract::Request;
use axum::http::{StatusCode, header};
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::openai::ApiError;

/// A body that is not there after so long is given up.
const DEADLINE: Duration = Duration::from_secs(30);

/// Of a body that is too long, so much is read and thrown away, for at most so long.
const DISCARDED: usize = 64 << 20;
const DISCARD_DEADLINE: Duration = Duration::from_secs(2);

/// All bodies that are being read at a time share so many KiB.
pub const MEMORY_KIB: usize = 64 << 10;

/// A body, with the memory that is set aside for it until it is dropped.
#[derive(Debug)]
pub struct Body {
    bytes: Bytes,
    _memory: OwnedSemaphorePermit,
}

impl std::ops::Deref for Body {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Reads the whole body: at most `limit` bytes, from the `memory` of [`MEMORY_KIB`] that all bodies share.
pub async fn read(request: Request, limit: usize, memory: &Arc<Semaphore>) -> Result<Body, ApiError> {
    // A body that does not say its length may become as long as it may.
    let most = request.body().size_hint().upper().map_or(limit, |upper| (upper as usize).min(limit));
    let share = u32::try_from((most >> 10) + 1).unwrap_or(u32::MAX).min(MEMORY_KIB as u32);
    let share = tokio::time::timeout(DEADLINE, memory.clone().acquire_many_owned(share)).await;
    let Ok(Ok(memory)) = share else {
        let message = "This node is reading as many request bodies as it can hold.";
        return Err(ApiError::unavailable("busy", message, Some(Duration::from_secs(2))));
    };
    Ok(Body { bytes: read_bytes(request, limit).await?, _memory: memory })
}

async fn read_bytes(request: Request, limit: usize) -> Result<Bytes, ApiError> {
    let asks_first = request.headers().contains_key(header::EXPECT);
    let body = request.into_body();
    let says_too_long = body.size_hint().lower() > limit as u64;
    let mut stream = body.into_data_stream();
    let read = if says_too_long {
        Err(ApiError::body_too_large(limit))
    } else {
        let reading = tokio::time::timeout(DEADLINE, collect(&mut stream, limit));
        reading.await.unwrap_or_else(|_| Err(ApiError::body_too_slow(DEADLINE)))
    };
    // Most clients look at the answer only when they have sent everything: closed on in the middle, they would see
    // a broken connection and not what is wrong.
    if read.as_ref().is_err_and(|error| error.status == StatusCode::PAYLOAD_TOO_LARGE) && !asks_first {
        let _ = tokio::time::timeout(DISCARD_DEADLINE, discard(&mut stream)).await;
    }
    read
}

async fn collect(stream: &mut BodyDataStream, limit: usize) -> Result<Bytes, ApiError> {
    let mut bytes = BytesMut::new();
    while let Some(part) = stream.next().await {
        let part = part.map_err(|error| ApiError::unreadable(format!("The request body broke off: {error}.")))?;
        if bytes.len() + part.len() > limit {
            return Err(ApiError::body_too_large(limit));
        }
        bytes.extend_from_slice(&part);
    }
    Ok(bytes.freeze())
}

async fn discard(stream: &mut BodyDataStream) {
    let mut left = DISCARDED;
    while let Some(Ok(part)) = stream.next().await {
        match left.checked_sub(part.len()) {
            Some(rest) => left = rest,
            None => return,
        }
    }
}
