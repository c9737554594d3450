//! Frames of the protocol.

use ingle_protocol::wire::v1::*;
use ingle_protocol::wire::{Answer, Body, Frame, HEAD_LEN, Head, StreamKind, encode};

/// A body that decodes is encoded to bytes that decode to the same again.
fn body<T: Body>(frame: &Frame) {
    let Ok(value) = frame.decode::<T>() else { return };
    // Numbers may have come longer than they had to be, so bytes are compared from here on.
    let Ok(first) = encode(&value) else { panic!("a {} that cannot be sent again", T::NAME) };
    let second = first.decode::<T>().and_then(|value| encode(&value));
    assert_eq!(Ok(first), second);
}

/// A frame: its kind, then its body. Also the same bytes as a frame with its length, and as the start of a stream.
pub fn wire(data: &[u8]) {
    let _ = Frame::from_bytes(data);
    if let Some(head) = data.first_chunk::<HEAD_LEN>()
        && let Ok(head) = Head::parse(*head)
    {
        assert!(head.length <= DECODE_LIMIT as u32);
    }
    let Some((kind, rest)) = data.split_first() else { return };
    let _ = StreamKind::try_from(*kind);
    if limit_of(*kind).is_none_or(|limit| rest.len() > limit as usize) {
        return;
    }
    let frame = Frame { kind: *kind, body: rest.to_vec().into() };
    let _ = Answer::from_frame(&frame);
    macro_rules! bodies {
        ($($name:ident)*) => {
            match *kind {
                $($name::KIND => body::<$name>(&frame),)*
                _ => {}
            }
        };
    }
    bodies! {
        Hello Welcome NotWelcome Goodbye NodeFacts Request Accepted Refused Progress Token Finished Failed Pulse
        JoinRequest JoinGranted JoinRefused AuthorityKeyRequest AuthorityKey RenewalRequest Renewed AuthorityRefused
        EngineReport ControlProbe
    }
}
