use proptest::prelude::*;

use super::v2::*;
use super::*;
use crate::registry::{Endpoint, ModelType, NewModel, Origin, Registry, Stamp, Value};
use crate::{ClusterId, EngineId, ModelDigest, NodeId, RequestId};

mod neighbours;

fn member() -> MemberHint {
    MemberHint { node: NodeId([1; 16]), name: "tower".into(), addresses: vec!["192.168.1.20:11436".into()] }
}

fn engine() -> EngineId {
    EngineId { node: NodeId([1; 16]), index: 0, generation: 2 }
}

fn engine_pulse() -> EnginePulse {
    EnginePulse {
        engine: engine(),
        step: 77,
        busy: true,
        usual_step_ms: 21,
        silent_ms: 40,
        load: load(),
        tokens_per_second: 31.5,
        prefill_rate: 240.0,
        decode_rate: 15.75,
        full_decode_rate: 7.5,
    }
}

fn load() -> Load {
    Load { running: 2, waiting: 1, backlog_tokens: 1_400 }
}

fn facts() -> NodeFacts {
    NodeFacts {
        member: member(),
        incarnation: 1_700_000_000_000,
        version: 3,
        software: "0.1.0".into(),
        http: "127.0.0.1:11435".into(),
        hardware: Hardware {
            platform: "x86_64-linux".into(),
            cores: 2,
            memory: 25_000_000_000,
            accelerators: vec!["a GPU".into()],
        },
        models: vec![ModelFacts {
            name: "smollm2-135m-instruct".into(),
            digest: Some(ModelDigest([7; 32])),
            state: ModelState::Fetching { done: 10, total: 100 },
            engine: Some(engine()),
            backend: "cpu (burn flex, f32)".into(),
            numerics: "flex-f32".into(),
            context_length: 2048,
            slots: 4,
            features: vec!["logprobs".into()],
            is_default: true,
        }],
        members: vec![member()],
    }
}

/// A model that was changed on two nodes at a time, and removed on one of them.
fn registry_entry() -> RegistryEntry {
    let new = NewModel {
        name: "glm-4.7".into(),
        kind: ModelType::Llm,
        origin: Origin::Endpoint(Endpoint {
            url: "http://model-server:8080".into(),
            model: Some("glm".into()),
            api_key_env: Some("FAR_KEY".into()),
        }),
        sha256: Some(ModelDigest([7; 32])),
        keep_alive: Some(600),
        parameters: [("batch_size".to_owned(), Value::Number(4))].into(),
        pins: vec!["tower".into()],
    };
    let stamp = |node: u8, counter| Stamp { counter, node: NodeId([node; 16]) };
    let mut one = Registry::default();
    one.add(new, stamp(1, 1_700_000_000_000)).unwrap();
    let mut other = one.clone();
    let words = [("kv_type".to_owned(), Some(Value::Word("int8".into())))].into();
    one.set_parameters("glm-4.7", &words, stamp(1, 1_700_000_000_001)).unwrap();
    other.set_parameters("glm-4.7", &words, stamp(2, 1_700_000_000_002)).unwrap();
    other.remove("glm-4.7", stamp(2, 1_700_000_000_003)).unwrap();
    one.merge(&other.entries().next().unwrap()).unwrap();
    one.entries().next().unwrap()
}

/// Every field has a value of its own.
fn sampling() -> Sampling {
    Sampling {
        temperature: 0.7,
        top_k: 40,
        top_p: 0.9,
        min_p: 0.05,
        repetition_penalty: 1.1,
        repetition_window: 64,
        presence_penalty: 0.5,
        frequency_penalty: -0.5,
        logit_bias: vec![LogitBias { token: 300_000, bias: -100.0 }],
        seed: 42,
        max_tokens: Some(16),
        min_tokens: 2,
        stop: vec!["END".into()],
        stop_token_ids: vec![7],
        ignore_eos: true,
        logprobs: Some(5),
    }
}

fn logprob(id: u32, logprob: f32) -> Logprob {
    Logprob { id, logprob, bytes: vec![0xf0, 0x9f] }
}

fn request() -> Request {
    Request {
        request_id: RequestId([9; 16]),
        attempt: 1,
        trace: TraceContext { trace_id: [3; 16], parent_span: [4; 8], flags: 1 },
        principal: "local".into(),
        priority: Priority::Interactive,
        remaining_ms: 120_000,
        model: "default".into(),
        digest: ModelDigest([7; 32]),
        messages: vec![Message { role: Role::User, content: "héllo 🔥".into(), extra: b"{}".to_vec() }],
        sampling: sampling(),
        resume: vec![1, 2, 300_000],
        resume_text: b"so far".to_vec(),
        extra: br#"{"grammar":"x"}"#.to_vec(),
    }
}

/// One sample of each frame: its bytes are golden.
fn samples() -> Vec<(&'static str, Frame)> {
    fn sample<T: Body + PartialEq + std::fmt::Debug>(body: T) -> (&'static str, Frame) {
        let frame = encode(&body).unwrap();
        assert_eq!(frame.decode::<T>().unwrap(), body);
        (T::NAME, frame)
    }
    vec![
        sample(Hello { cluster: ClusterId([5; 16]), facts: facts() }),
        sample(Welcome { facts: facts(), observed: "192.168.1.30:11436".into() }),
        sample(NotWelcome { why: "another cluster".into(), duplicate: false }),
        sample(Goodbye { why: "shutting down".into() }),
        sample(facts()),
        sample(registry_entry()),
        sample(request()),
        sample(Accepted { prompt_tokens: 1500, cached_tokens: 1024, context_length: 2048, load: load() }),
        sample(Refused {
            kind: RefusalKind::UnsupportedField,
            message: "not supported".into(),
            param: Some("logprobs".into()),
            retry_after_ms: Some(1500),
        }),
        sample(Progress::Prefilled { done: 64, total: 1500 }),
        sample(Token {
            position: 300,
            id: 49_151,
            text: "🔥".as_bytes().to_vec(),
            logprobs: Some(Logprobs { chosen: logprob(49_151, -0.5), top: vec![logprob(7, -0.25)] }),
            extra: br#"{"delta":{"x":1}}"#.to_vec(),
        }),
        sample(Finished {
            reason: FinishReason::Length,
            usage: Usage { prompt_tokens: 1500, cached_tokens: 1024, completion_tokens: 16 },
            load: load(),
            extra: br#"{"chunk":{"y":2}}"#.to_vec(),
        }),
        sample(Failed { kind: FailureKind::EngineDied, message: "killed".into(), retryable: false, migratable: true }),
        sample(Pulse { sequence: 12, engines: vec![engine_pulse()] }),
        sample(JoinRequest {
            token_id: [1; 8],
            proof: [2; 32],
            csr: vec![0x30, 0x82],
            name: "mini".into(),
            guest: true,
            clock_ms: 1_700_000_000_000,
        }),
        sample(JoinGranted {
            node: NodeId([2; 16]),
            certificate: vec![1, 2],
            authority: vec![3, 4],
            members: vec![member()],
        }),
        sample(JoinRefused { kind: JoinRefusalKind::Used, message: "used".into() }),
        sample(AuthorityKeyRequest {}),
        sample(AuthorityKey { pkcs8: vec![1, 2, 3] }),
        sample(RenewalRequest { csr: vec![0x30] }),
        sample(Renewed { certificate: vec![0x31] }),
        sample(AuthorityRefused { why: "a guest".into() }),
        sample(EngineReport {
            state: ModelState::Failed { why: "no memory".into() },
            backend: "cpu".into(),
            numerics: "flex-f32".into(),
            context_length: 2048,
            slots: 4,
            features: vec![],
            pulse: engine_pulse(),
            missing_memory: 1 << 30,
        }),
        sample(SetParameters {
            number: 3,
            parameters: LiveParameters { batch_size: 16, max_tokens: Some(300), prefill_budget: 256, threads: None },
        }),
        sample(ParametersSet { number: 3, refused: Some("no".into()) }),
        sample(ControlProbe { nonce: 99 }),
        sample(DrainRequest { limit_ms: 20_000, undo: false }),
        sample(DrainReply { running: 5, moved: 1 }),
        sample(HeldFiles { files: vec![ModelDigest([7; 32])] }),
        sample(Capability { memory_bandwidth: 60_000_000_000, room: 8 << 30, on_card: false, takes_models: true }),
        sample(ChunkListRequest { file: ModelDigest([7; 32]) }),
        sample(ListProgress { done: 300, size: 5_000_000_000 }),
        sample(ChunkList { size: CHUNK_BYTES + 1, hashes: vec![[8; 32], [9; 32]] }),
        sample(ChunkRequest { file: ModelDigest([7; 32]), index: 300 }),
        sample(ChunkFollows { length: 4 << 20 }),
        sample(FileRefused { why: "not here".into() }),
    ]
}

/// A line of a golden file.
fn line(name: &str, frame: &Frame) -> String {
    let hex: String = frame.to_bytes().iter().map(|b| format!("{b:02x}")).collect();
    format!("{name} {hex}\n")
}

/// A change of these bytes breaks every cluster in which not all nodes are updated at once. Never edit the file
/// after a release: make a `v3`. Before the release: `INGLE_WRITE_GOLDEN=1 cargo test -p ingle-protocol golden`.
#[test]
fn golden_bytes_of_every_frame_stay_what_they_are() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/golden/v2.txt");
    let now: String = samples().iter().map(|(name, frame)| line(name, frame)).collect();
    if std::env::var_os("INGLE_WRITE_GOLDEN").is_some() {
        std::fs::write(path, &now).unwrap();
    }
    let golden = std::fs::read_to_string(path).unwrap();
    for (was, is) in golden.lines().zip(now.lines()) {
        assert_eq!(was, is);
    }
    assert_eq!(golden, now);
}

#[test]
fn every_kind_has_a_golden_sample() {
    let sampled: Vec<u8> = samples().iter().map(|(_, frame)| frame.kind).collect();
    for kind in 0..=u8::MAX {
        assert_eq!(limit_of(kind).is_some(), sampled.contains(&kind), "kind {kind:#04x}");
    }
}

#[test]
fn lengths_are_refused_before_anything_is_allocated() {
    let mut head = [0x14, 0, 0, 0, 0];
    head[1..].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(Head::parse(head, Version::NEWEST), Err(WireError::TooLong { .. })));
    assert_eq!(Head::parse([0x7f, 0, 0, 0, 0], Version::NEWEST), Err(WireError::UnknownKind(0x7f)));
    assert!(Head::parse([0xff, 1, 0, 0, 0], Version::NEWEST).is_ok(), "an unknown skippable kind");
    // A vector that claims 2^60 entries in a body of a few bytes.
    let lie = Frame { kind: Renewed::KIND, body: Bytes::from_static(&[253, 0, 0, 0, 0, 0, 0, 0, 16]) };
    assert!(matches!(lie.decode::<Renewed>(), Err(WireError::Body { .. })));
}

#[test]
fn trailing_bytes_and_other_kinds_are_refused() {
    let mut frame = encode(&ControlProbe { nonce: 1 }).unwrap();
    frame.body = [&frame.body[..], &[0]].concat().into();
    assert_eq!(frame.decode::<ControlProbe>(), Err(WireError::Trailing { kind: 0x50, bytes: 1 }));
    assert!(matches!(frame.decode::<Token>(), Err(WireError::Unexpected { .. })));
    let whole = encode(&ControlProbe { nonce: 1 }).unwrap();
    assert_eq!(Frame::from_bytes(&whole.to_bytes(), Version::NEWEST), Ok(whole.clone()));
    let long = [&whole.to_bytes()[..], &[0]].concat();
    assert!(matches!(Frame::from_bytes(&long, Version::NEWEST), Err(WireError::Trailing { .. })));
}

#[test]
fn a_body_over_its_limit_is_not_sent() {
    let token = Token { position: 0, id: 0, text: vec![b'x'; 330_000], logprobs: None, extra: vec![] };
    assert!(matches!(encode(&token), Err(WireError::TooLong { .. })));
}

#[test]
fn a_token_with_all_that_may_come_with_it_fits() {
    let longest = Logprob { id: u32::MAX, logprob: -1.0, bytes: vec![b'x'; LOGPROB_BYTES_LIMIT] };
    let top = vec![longest.clone(); usize::from(TOP_LOGPROBS_LIMIT)];
    let logprobs = Some(Logprobs { chosen: longest, top });
    let token = Token { position: 0, id: 0, text: vec![b'x'; 32 << 10], logprobs, extra: vec![b'x'; EXTRA_LIMIT] };
    assert!(encode(&token).is_ok());
}

#[test]
fn the_lists_of_the_largest_files_and_of_all_files_fit() {
    let list = ChunkList { size: MOST_CHUNKS as u64 * CHUNK_BYTES, hashes: vec![[0xff; 32]; MOST_CHUNKS] };
    assert!(list.is_whole());
    assert_eq!(encode(&list).unwrap().decode::<ChunkList>().unwrap(), list);
    let short = ChunkList { size: CHUNK_BYTES + 1, hashes: vec![[1; 32]] };
    assert!(!short.is_whole() && !ChunkList { size: 0, hashes: vec![] }.is_whole());
    assert_eq!((short.place(1), short.place(2)), (Some((CHUNK_BYTES, 1)), None));
    assert!(encode(&HeldFiles { files: vec![ModelDigest([0xff; 32]); MOST_HELD_FILES] }).is_ok());
}

/// Found by the fuzzer: 20 MB of room for a text of a report of 22 bytes.
#[test]
fn a_short_frame_cannot_claim_much() {
    let long_text = [&[8, 9][..], &[0xfc], &(19u32 << 20).to_le_bytes(), b"text"].concat();
    let frame = Frame { kind: NotWelcome::KIND, body: [&[0xfc][..], &long_text[3..]].concat().into() };
    let error = frame.decode::<NotWelcome>().unwrap_err();
    assert!(error.to_string().contains("imit"), "{error}");
}

proptest! {
    #[test]
    fn no_bytes_make_the_decoder_panic(kind: u8, body in proptest::collection::vec(any::<u8>(), 0..512)) {
        let frame = Frame { kind, body: body.clone().into() };
        let _ = (frame.decode::<Request>(), frame.decode::<NodeFacts>(), frame.decode::<EngineReport>());
        for known in [Request::KIND, Token::KIND, Hello::KIND, Pulse::KIND, JoinGranted::KIND, Refused::KIND] {
            let frame = Frame { kind: known, body: body.clone().into() };
            let _ = (frame.decode::<Request>(), frame.decode::<Hello>(), frame.decode::<Pulse>());
            let _ = (frame.decode::<JoinGranted>(), frame.decode::<Refused>(), frame.decode::<Token>());
        }
        let _ = Frame::from_bytes(&body, Version::NEWEST);
    }

    #[test]
    fn cut_frames_never_decode(cut in 1usize..100) {
        for (_, frame) in samples() {
            let bytes = frame.to_bytes();
            if cut < bytes.len() {
                prop_assert!(Frame::from_bytes(&bytes[..bytes.len() - cut], Version::NEWEST).is_err());
            }
        }
    }
}
