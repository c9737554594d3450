//! Frames of the protocol.

use ingle_protocol::wire::v2::*;
use ingle_protocol::wire::{Answer, Body, Frame, HEAD_LEN, Head, StreamKind, Version, Versioned, encode, v1};

/// A body that decodes is encoded to bytes that decode to the same again.
fn body<T: Body>(frame: &Frame) {
    let Ok(value) = frame.decode::<T>() else { return };
    // Numbers may have come longer than they had to be, so bytes are compared from here on.
    let Ok(first) = encode(&value) else { panic!("a {} that cannot be sent again", T::NAME) };
    let second = first.decode::<T>().and_then(|value| encode(&value));
    assert_eq!(Ok(first), second);
}

/// The same for a peer of each version. What came from it can go back to it, and loses nothing on the way.
fn versions<T: Versioned>(frame: &Frame) {
    body::<T>(frame);
    for version in Version::ALL {
        if version.limit_of(T::KIND).is_none_or(|limit| frame.body.len() > limit as usize) {
            continue;
        }
        let Ok(value) = T::decode_for(frame, *version) else { continue };
        let Ok(first) = value.encode_for(*version) else { panic!("a {} that cannot be sent back", T::NAME) };
        let second = T::decode_for(&first, *version).and_then(|value| value.encode_for(*version));
        assert_eq!(Ok(first), second);
    }
}

/// A frame: its kind, then its body. Also the same bytes as a frame with its length, and as the start of a stream.
pub fn wire(data: &[u8]) {
    for version in Version::ALL {
        let _ = Frame::from_bytes(data, *version);
        if let Some(head) = data.first_chunk::<HEAD_LEN>()
            && let Ok(head) = Head::parse(*head, *version)
        {
            assert!(head.length <= DECODE_LIMIT as u32);
        }
    }
    let Some((kind, rest)) = data.split_first() else { return };
    let _ = StreamKind::try_from(*kind);
    let frame = Frame { kind: *kind, body: rest.to_vec().into() };
    for version in Version::ALL {
        if version.limit_of(*kind).is_some_and(|limit| rest.len() <= limit as usize) {
            let _ = Answer::decode_for(&frame, *version);
        }
    }
    if limit_of(*kind).is_none_or(|limit| rest.len() > limit as usize) {
        return;
    }
    macro_rules! bodies {
        ($($name:ident)*; $($own:ident)*) => {
            match *kind {
                $($name::KIND => versions::<$name>(&frame),)*
                EngineReport::KIND => {
                    body::<EngineReport>(&frame);
                    body::<v1::EngineReport>(&frame);
                }
                $($own::KIND => body::<$own>(&frame),)*
                _ => {}
            }
        };
    }
    bodies! {
        Hello Welcome NotWelcome Goodbye NodeFacts Request Accepted Refused Progress Token Finished Failed Pulse
        JoinRequest JoinGranted JoinRefused AuthorityKeyRequest AuthorityKey RenewalRequest Renewed AuthorityRefused
        ControlProbe DrainRequest DrainReply RegistryEntry HeldFiles ChunkListRequest ListProgress ChunkList ChunkRequest
        ChunkFollows FileRefused Capability;
        SetParameters ParametersSet
    }
}
