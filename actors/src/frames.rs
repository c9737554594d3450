//! Frames over any byte stream: QUIC streams, local sockets, pipes.

use std::io;

use ingle_protocol::wire::{Body, Frame, HEAD_LEN, Head, WireError, encode};
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
    next_frame(reader, None).await
}

/// The next frame, which must be a `T`; another kind is refused before its body is read.
pub async fn read_body<T: Body, R: AsyncRead + Unpin>(reader: &mut R) -> Result<T, FrameError> {
    let frame = next_frame(reader, Some((T::KIND, T::NAME))).await?.ok_or(FrameError::Ended)?;
    Ok(frame.decode()?)
}

async fn next_frame<R: AsyncRead + Unpin>(
    reader: &mut R,
    due: Option<(u8, &'static str)>,
) -> Result<Option<Frame>, FrameError> {
    loop {
        let mut head = [0; HEAD_LEN];
        // The first byte apart from the rest: an end before it is an end, an end behind it is a cut frame.
        if reader.read(&mut head[..1]).await? == 0 {
            return Ok(None);
        }
        reader.read_exact(&mut head[1..]).await?;
        let head = Head::parse(head)?;
        match due {
            Some((kind, expected)) if head.kind != kind && !head.is_skippable_unknown() => {
                return Err(WireError::Unexpected { expected, got: head.kind }.into());
            }
            _ => {}
        }
        let mut body = vec![0; head.length as usize];
        reader.read_exact(&mut body).await?;
        if !head.is_skippable_unknown() {
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
