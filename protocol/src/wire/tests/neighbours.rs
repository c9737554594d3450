//! The frames of the last version as it was shipped, and the way there and back.

use super::*;
use crate::wire::v1;

fn old_pulse() -> v1::EnginePulse {
    v1::EnginePulse {
        engine: engine(),
        step: 77,
        running: 2,
        waiting: 1,
        tokens_per_second: 31.5,
        prefill_rate: 240.0,
        decode_rate: 15.75,
    }
}

/// The samples of the frames that version 1 has in another form, as they were when it was shipped.
fn old_samples() -> Vec<(&'static str, Frame)> {
    fn sample<T: Body + PartialEq + std::fmt::Debug>(body: T) -> (&'static str, Frame) {
        let frame = encode(&body).unwrap();
        assert_eq!(frame.decode::<T>().unwrap(), body);
        (T::NAME, frame)
    }
    vec![
        sample(v1::Request {
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
            extra: br#"{"grammar":"x"}"#.to_vec(),
        }),
        sample(v1::Accepted { prompt_tokens: 1500, cached_tokens: 1024, context_length: 2048 }),
        sample(v1::Token {
            position: 300,
            id: 49_151,
            text: "🔥".as_bytes().to_vec(),
            logprobs: Some(Logprobs { chosen: logprob(49_151, -0.5), top: vec![logprob(7, -0.25)] }),
        }),
        sample(v1::Finished {
            reason: FinishReason::Length,
            usage: Usage { prompt_tokens: 1500, cached_tokens: 1024, completion_tokens: 16 },
        }),
        sample(v1::Pulse { sequence: 12, engines: vec![old_pulse()] }),
        sample(v1::EngineReport {
            state: ModelState::Failed { why: "no memory".into() },
            backend: "cpu".into(),
            numerics: "flex-f32".into(),
            context_length: 2048,
            slots: 4,
            features: vec![],
            pulse: old_pulse(),
        }),
    ]
}

/// `golden/v1.txt` is what version 1 was shipped with. Nothing writes it.
#[test]
fn golden_bytes_of_version_1_stay_what_they_are() {
    let golden = include_str!("../../../golden/v1.txt");
    let old = old_samples();
    let form_in_v1 = |(name, frame): (&'static str, Frame)| {
        old.iter().find(|(other, _)| *other == name).cloned().unwrap_or((name, frame))
    };
    let known = samples().into_iter().filter(|(_, frame)| v1::limit_of(frame.kind).is_some());
    let lines: String = known.map(form_in_v1).map(|(name, frame)| line(name, &frame)).collect();
    for (was, is) in golden.lines().zip(lines.lines()) {
        assert_eq!(was, is);
    }
    assert_eq!(golden, lines);
}

/// What a node of the newest version writes for an old one is byte for byte what the old one would write.
#[test]
fn frames_for_an_old_peer_have_its_golden_bytes() {
    let golden = include_str!("../../../golden/v1.txt");
    let mut checked = 0;
    let mut check = |name: &str, frame: Result<Frame, WireError>| {
        let line = line(name, &frame.unwrap());
        assert!(golden.contains(&line), "{line}");
        checked += 1;
    };
    for (name, frame) in samples() {
        macro_rules! crossing {
            ($($body:ident)*) => {
                match frame.kind {
                    $($body::KIND => check(name, frame.decode::<$body>().unwrap().encode_for(Version::V1)),)*
                    _ => {}
                }
            };
        }
        crossing! {
            Hello Welcome NotWelcome Goodbye NodeFacts Request Accepted Refused Progress Token Finished Failed Pulse
            JoinRequest JoinGranted JoinRefused AuthorityKeyRequest AuthorityKey RenewalRequest Renewed
            AuthorityRefused ControlProbe
        }
    }
    // All but the report of an engine, which stays on its machine.
    assert_eq!(checked + 1, golden.lines().count());
}

#[test]
fn what_a_version_does_not_know_is_neither_sent_nor_read() {
    let drain = DrainRequest { limit_ms: 1, undo: false };
    let unknown = WireError::NotInVersion { frame: "DrainRequest", version: Version::V1 };
    assert_eq!(drain.encode_for(Version::V1), Err(unknown.clone()));
    let frame = drain.encode_for(Version::V2).unwrap();
    assert_eq!(DrainRequest::decode_for(&frame, Version::V1), Err(unknown));
    assert_eq!(Frame::from_bytes(&frame.to_bytes(), Version::V1), Err(WireError::UnknownKind(DrainRequest::KIND)));
    assert_eq!(Frame::from_bytes(&frame.to_bytes(), Version::V2), Ok(frame));
    let embed = embed_request();
    let unknown = WireError::NotInVersion { frame: "Request for embeddings", version: Version::V1 };
    assert_eq!(embed.encode_for(Version::V1), Err(unknown));
    assert_eq!(Request::decode_for(&embed.encode_for(Version::V2).unwrap(), Version::V2), Ok(embed));
    assert!(Embedding { index: 0, values: vec![] }.encode_for(Version::V1).is_err());
    // Version 1 has shorter tokens.
    let long = Token { position: 0, id: 0, text: vec![b'x'; 70_000], logprobs: None, extra: vec![] };
    assert!(matches!(long.encode_for(Version::V1), Err(WireError::TooLong { .. })));
    let long = long.encode_for(Version::V2).unwrap().to_bytes();
    assert!(matches!(Frame::from_bytes(&long, Version::V1), Err(WireError::TooLong { .. })));
}

#[test]
fn versions_are_offered_newest_first_and_have_names_of_their_own() {
    assert!(Version::ALL.is_sorted_by(|a, b| a > b));
    assert_eq!(Version::ALL.first(), Some(&Version::NEWEST));
    for version in Version::ALL {
        assert_eq!(Version::of_alpn(version.alpn()), Some(*version));
        assert_eq!(version.alpn(), format!("ingle/{}", version.number()).as_bytes());
    }
    assert_eq!((Version::of_alpn(JOIN_ALPN), Version::of_alpn(b"ingle/3")), (None, None));
}

fn texts() -> impl Strategy<Value = String> {
    ".{0,12}"
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(any::<u8>(), 0..24)
}

prop_compose! {
    fn messages()(role in 0..4usize, content in texts(), extra in bytes()) -> Message {
        Message { role: [Role::System, Role::User, Role::Assistant, Role::Tool][role], content, extra }
    }
}

prop_compose! {
    fn samplings()(
        temperature in 0.0..2.0f32, top_k: u32, seed: u64, max_tokens: Option<u32>, ignore_eos: bool,
        stop in proptest::collection::vec(texts(), 0..3), stop_token_ids in proptest::collection::vec(any::<u32>(), 0..3),
        bias in proptest::option::of((any::<u32>(), -100.0..100.0f32)), logprobs: Option<u8>,
    ) -> Sampling {
        let logit_bias = bias.into_iter().map(|(token, bias)| LogitBias { token, bias }).collect();
        let some = Sampling { temperature, top_k, seed, max_tokens, ignore_eos, ..sampling() };
        Sampling { stop, stop_token_ids, logit_bias, logprobs, ..some }
    }
}

prop_compose! {
    fn requests()(
        ids: ([u8; 16], [u8; 16], [u8; 8]), flags: u8, digest: [u8; 32], attempt: u32, priority in 0..3usize,
        remaining_ms: u64, model in texts(), principal in texts(), sampling in samplings(),
        messages in proptest::collection::vec(messages(), 0..4), resume in proptest::collection::vec(any::<u32>(), 0..9),
        resume_text in bytes(), extra in bytes(),
    ) -> Request {
        let (request_id, trace_id, parent_span) = ids;
        Request {
            request_id: RequestId(request_id), attempt, trace: TraceContext { trace_id, parent_span, flags }, principal,
            priority: [Priority::Background, Priority::Normal, Priority::Interactive][priority], remaining_ms, model,
            digest: ModelDigest(digest), messages, sampling, embed: None, resume, resume_text, extra,
        }
    }
}

fn loads() -> impl Strategy<Value = Load> {
    any::<(u32, u32, u32)>().prop_map(|(running, waiting, backlog_tokens)| Load { running, waiting, backlog_tokens })
}

prop_compose! {
    fn tokens()(
        position: u32, id: u32, text in bytes(), extra in bytes(),
        top in proptest::option::of(proptest::collection::vec((any::<u32>(), -50.0..0.0f32), 0..4)),
    ) -> Token {
        let likely = |top: Vec<(u32, f32)>| Logprobs {
            chosen: logprob(id, -0.5), top: top.into_iter().map(|(id, value)| logprob(id, value)).collect(),
        };
        Token { position, id, text, logprobs: top.map(likely), extra }
    }
}

prop_compose! {
    fn ends()(length: bool, usage: (u32, u32, u32), load in loads(), extra in bytes()) -> Finished {
        let (prompt_tokens, cached_tokens, completion_tokens) = usage;
        let reason = if length { FinishReason::Length } else { FinishReason::Stop };
        Finished { reason, usage: Usage { prompt_tokens, cached_tokens, completion_tokens }, load, extra }
    }
}

prop_compose! {
    fn engine_pulses()(
        node: [u8; 16], index: u16, generation: u32, step: u64, busy: bool, times: (u32, u32), load in loads(),
        rates in [0.0..1e6f32, 0.0..1e6f32, 0.0..1e6f32, 0.0..1e6f32],
    ) -> EnginePulse {
        let [tokens_per_second, prefill_rate, decode_rate, full_decode_rate] = rates;
        EnginePulse {
            engine: EngineId { node: NodeId(node), index, generation }, step, busy, usual_step_ms: times.0,
            silent_ms: times.1, load, tokens_per_second, prefill_rate, decode_rate, full_decode_rate,
        }
    }
}

/// What comes out behind a peer of version 1, and once more: the way there takes away what that version lacks, the way
/// back nothing, and a second time changes nothing.
fn through_v1<T: Versioned + PartialEq + std::fmt::Debug>(body: &T) -> T {
    let through = |body: &T| T::decode_for(&body.encode_for(Version::V1).unwrap(), Version::V1).unwrap();
    let once = through(body);
    assert_eq!(through(&once), once, "what version 1 can carry survives");
    once
}

proptest! {
    #[test]
    fn a_request_keeps_all_but_the_text_to_resume_from(request in requests()) {
        let carried = Request { resume_text: vec![], ..request.clone() };
        prop_assert_eq!(through_v1(&request), carried);
    }

    #[test]
    fn an_answer_keeps_all_but_its_load_and_what_endpoints_say(
        counts: (u32, u32, u32), load in loads(), token in tokens(), end in ends(),
    ) {
        let (prompt_tokens, cached_tokens, context_length) = counts;
        let accepted = Accepted { prompt_tokens, cached_tokens, context_length, load };
        prop_assert_eq!(through_v1(&accepted), Accepted { load: Load::default(), ..accepted });
        prop_assert_eq!(through_v1(&token), Token { extra: vec![], ..token });
        prop_assert_eq!(through_v1(&end), Finished { load: Load::default(), extra: vec![], ..end });
    }

    #[test]
    fn a_pulse_keeps_its_counters_and_the_speeds_that_version_1_has(
        sequence: u64, engines in proptest::collection::vec(engine_pulses(), 0..4),
    ) {
        let carried = engines.iter().map(|engine| EnginePulse {
            busy: false, usual_step_ms: 0, silent_ms: 0, full_decode_rate: 0.0,
            load: Load { backlog_tokens: 0, ..engine.load }, ..*engine
        }).collect();
        prop_assert_eq!(through_v1(&Pulse { sequence, engines }), Pulse { sequence, engines: carried });
    }
}
