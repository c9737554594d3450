//! Frames over any byte stream: QUIC streams, local sockets, pipes.
//!
//! A node and its engine processes are of one build and speak the newest version of the protocol. Nodes may be of
//! different builds: what crosses between them goes through the functions that end in `_in`, which take the version.

use std::io;

use ingle_protocol::wire::{Body, Frame, HEAD_LEN, Head, Version, Versioned, WireError, encode};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Why a frame did not come or go.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The stream broke.
    #[error("the stream broke: {0}")]
    Io(#[from] io::Error),
    /// The bytes are no frame of ours.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The stream ended where a frame was due.
    #[error("the stream ended early")]
    Ended,
}

/// The next frame; `None` where the stream ends cleanly before one. Unknown skippable frames are skipped.
pub async fn read_frame<R: AsyncRead + Unpin>(reader: &mut R) -> Result<Option<Frame>, FrameError> {
    next_frame(reader, Version::NEWEST, None).await
}

/// The next frame of a peer that speaks `version`, as [`read_frame`].
pub async fn read_frame_in<R: AsyncRead + Unpin>(
    version: Version,
    reader: &mut R,
) -> Result<Option<Frame>, FrameError> {
    next_frame(reader, version, None).await
}

/// The next frame, which must be a `T`; another kind is refused before its body is read.
pub async fn read_body<T: Body, R: AsyncRead + Unpin>(reader: &mut R) -> Result<T, FrameError> {
    let frame = next_frame(reader, Version::NEWEST, Some((T::KIND, T::NAME))).await?.ok_or(FrameError::Ended)?;
    Ok(frame.decode()?)
}

/// The next frame of a peer that speaks `version`, as [`read_body`].
pub async fn read_body_in<T: Versioned, R: AsyncRead + Unpin>(
    version: Version,
    reader: &mut R,
) -> Result<T, FrameError> {
    let frame = next_frame(reader, version, Some((T::KIND, T::NAME))).await?.ok_or(FrameError::Ended)?;
    Ok(T::decode_for(&frame, version)?)
}

async fn next_frame<R: AsyncRead + Unpin>(
    reader: &mut R,
    version: Version,
    due: Option<(u8, &'static str)>,
) -> Result<Option<Frame>, FrameError> {
    loop {
        let mut head = [0; HEAD_LEN];
        // The first byte apart from the rest: an end before it is an end, an end behind it is a cut frame.
        if reader.read(&mut head[..1]).await? == 0 {
            return Ok(None);
        }
        reader.read_exact(&mut head[1..]).await?;
        let head = Head::parse(head, version)?;
        match due {
            Some((kind, expected)) if head.kind != kind && !head.is_skippable_unknown(version) => {
                return Err(WireError::Unexpected { expected, got: head.kind }.into());
            }
            _ => {}
        }
        let mut body = vec![0; head.length as usize];
        reader.read_exact(&mut body).await?;
        if !head.is_skippable_unknown(version) {
            return Ok(Some(Frame { kind: head.kind, body: body.into() }));
        }
    }
}

/// Writes one frame.
pub async fn write_frame<W: AsyncWrite + Unpin>(writer: &mut W, frame: &Frame) -> Result<(), FrameError> {
    writer.write_all(&frame.to_bytes()).await?;
    Ok(())
}

/// Writes one struct as a frame.
pub async fn write_body<T: Body, W: AsyncWrite + Unpin>(writer: &mut W, body: &T) -> Result<(), FrameError> {
    write_frame(writer, &encode(body)?).await
}

/// Writes one struct as a frame for a peer that speaks `version`.
pub async fn write_body_in<T: Versioned, W: AsyncWrite + Unpin>(
    version: Version,
    writer: &mut W,
    body: &T,
) -> Result<(), FrameError> {
    write_frame(writer, &body.encode_for(version)?).await
}
