//! Frames over any byte stream: QUIC streams, local sockets, pipes.
//!
//! A node and its engine processes are of one build and speak the newest version of the protocol. Nodes may be of
//! different builds: what crosses between them goes through the functions that end in `_in`, which take the version.

use std::io;

use bytes::{Buf, BytesMut};
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

/// Reads the frames of a peer that speaks one version, as many from one read as there are. A read that is given up
/// loses nothing.
#[derive(Debug)]
pub struct FrameReader {
    version: Version,
    buffer: BytesMut,
}

impl FrameReader {
    /// Room that a read has at least: several frames of a token each.
    const ROOM: usize = 512;

    /// A reader that has read nothing.
    pub fn new(version: Version) -> Self {
        Self { version, buffer: BytesMut::new() }
    }

    /// The next frame; `None` where the stream ends cleanly before one. Unknown skippable frames are skipped.
    pub async fn next<R: AsyncRead + Unpin>(&mut self, reader: &mut R) -> Result<Option<Frame>, FrameError> {
        loop {
            if let Some(frame) = self.parse()? {
                return Ok(Some(frame));
            }
            self.buffer.reserve(Self::ROOM);
            if reader.read_buf(&mut self.buffer).await? == 0 {
                return if self.buffer.is_empty() { Ok(None) } else { Err(FrameError::Ended) };
            }
        }
    }

    /// A frame that has been read already. A length that its kind cannot have is refused before its body comes.
    fn parse(&mut self) -> Result<Option<Frame>, FrameError> {
        while let Some(head) = self.buffer.first_chunk::<HEAD_LEN>() {
            let head = Head::parse(*head, self.version)?;
            let length = head.length as usize;
            if self.buffer.len() < HEAD_LEN + length {
                break;
            }
            self.buffer.advance(HEAD_LEN);
            let body = self.buffer.split_to(length).freeze();
            if !head.is_skippable_unknown(self.version) {
                return Ok(Some(Frame { kind: head.kind, body }));
            }
        }
        Ok(None)
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

#[cfg(test)]
mod tests {
    use ingle_protocol::wire::v2::{Progress, Token};
    use ingle_protocol::wire::{Answer, SKIPPABLE};
    use tokio::io::AsyncWriteExt;

    use super::*;

    fn frames() -> Vec<Answer> {
        let token = |position: u32, length: usize| {
            let text = vec![b'x'; length];
            Answer::Token(Token { position, id: 7, text, logprobs: None, extra: vec![] })
        };
        vec![Answer::Progress(Progress::Queued { ahead: 3 }), token(0, 1), token(1, 5_000), token(2, 0)]
    }

    #[tokio::test]
    async fn frames_come_whole_however_they_are_cut_and_however_often_a_read_is_given_up() {
        let mut bytes = Vec::new();
        for (index, answer) in frames().iter().enumerate() {
            if index == 1 {
                bytes.extend_from_slice(&[SKIPPABLE | 0x7f, 3, 0, 0, 0, 1, 2, 3]);
            }
            bytes.extend_from_slice(&answer.encode_for(Version::NEWEST).unwrap().to_bytes());
        }
        for piece in [1, 2, 3, 7, 600, bytes.len()] {
            let (mut writer, mut reader) = tokio::io::duplex(piece);
            let pieces: Vec<Vec<u8>> = bytes.chunks(piece).map(<[u8]>::to_vec).collect();
            let writing = tokio::spawn(async move {
                for piece in pieces {
                    writer.write_all(&piece).await.unwrap();
                    tokio::task::yield_now().await;
                }
            });
            let mut frames_read = Vec::new();
            let mut frames_in = FrameReader::new(Version::NEWEST);
            loop {
                // Given up whenever it has to wait.
                let read = tokio::select! {
                    biased;
                    read = frames_in.next(&mut reader) => read,
                    () = tokio::task::yield_now() => continue,
                };
                let Some(frame) = read.unwrap() else { break };
                frames_read.push(Answer::decode_for(&frame, Version::NEWEST).unwrap());
            }
            assert_eq!(frames_read, frames(), "in pieces of {piece}");
            writing.await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_stream_that_ends_within_a_frame_has_ended_early_and_a_length_that_cannot_be_is_refused_at_once() {
        let whole = frames()[1].encode_for(Version::NEWEST).unwrap().to_bytes();
        for end in 1..whole.len() {
            let mut cut = &whole[..end];
            let error = FrameReader::new(Version::NEWEST).next(&mut cut).await.unwrap_err();
            assert!(matches!(error, FrameError::Ended), "{end}: {error}");
        }
        let mut huge = &[whole[0], 0xff, 0xff, 0xff, 0xff][..];
        let error = FrameReader::new(Version::NEWEST).next(&mut huge).await.unwrap_err();
        assert!(matches!(error, FrameError::Wire(WireError::TooLong { .. })), "{error}");
        let mut nothing = &[][..];
        assert!(FrameReader::new(Version::NEWEST).next(&mut nothing).await.unwrap().is_none());
    }
}
