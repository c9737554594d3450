//! Request bodies, with a limit on their length and on the time that they take.

use std::time::Duration;

use axum::body::HttpBody;
use axum::extract::Request;
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;

use super::openai::ApiError;

/// A body that is not there after so long is given up.
const DEADLINE: Duration = Duration::from_secs(30);

/// Reads the whole body: at most `limit` bytes.
pub async fn read(request: Request, limit: usize) -> Result<Bytes, ApiError> {
    let body = request.into_body();
    // What says beforehand that it is too long is not read at all.
    if body.size_hint().lower() > limit as u64 {
        return Err(ApiError::body_too_large(limit));
    }
    let reading = async {
        let mut stream = body.into_data_stream();
        let mut bytes = BytesMut::new();
        while let Some(part) = stream.next().await {
            let part = part.map_err(|error| ApiError::unreadable(format!("The request body broke off: {error}.")))?;
            if bytes.len() + part.len() > limit {
                return Err(ApiError::body_too_large(limit));
            }
            bytes.extend_from_slice(&part);
        }
        Ok(bytes.freeze())
    };
    tokio::time::timeout(DEADLINE, reading).await.unwrap_or_else(|_| Err(ApiError::body_too_slow(DEADLINE)))
}
