//! Our request as the body of `POST /v1/chat/completions`.

use std::collections::BTreeMap;

use ingle_protocol::wire::v2::{Message, RefusalKind, Refused, Request, Role};
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::json;

use super::dialect::{Continue, FarSide};
use super::stream::Behind;
use crate::json::Members;

/// Members that we write ourselves: in a request's `extra` they are left out.
const OURS: [&str; 4] = ["model", "messages", "stream", "stream_options"];
/// What says that the last message is to be gone on with, and no new turn begun.
const CONTINUES: [(&str, bool); 2] = [("continue_final_message", true), ("add_generation_prompt", false)];

/// How the far side is told to go on with what was said elsewhere.
fn continuation(request: &Request, far: &FarSide) -> Result<Option<(Message, Continue)>, Refused> {
    let (content, _) = Behind::split(request);
    if request.resume.is_empty() {
        return Ok(None);
    }
    let cannot = |why: String| Err(refused(RefusalKind::UnsupportedField, "resume", why));
    let Some(how) = far.program.continues() else {
        let program = far.program.as_str();
        return cannot(format!("{program} is not known to go on with an answer that was begun elsewhere"));
    };
    if request.resume_text.is_empty() {
        return cannot(
            "an answer of which only tokens are known cannot go on at an endpoint, which takes texts".into(),
        );
    }
    if request.messages.last().is_some_and(|last| last.role == Role::Assistant) {
        return cannot("an answer behind an unfinished one of the assistant's cannot go on at an endpoint".into());
    }
    // Nothing but spaces: it may as well begin anew.
    let message = Message { role: Role::Assistant, content, extra: Vec::new() };
    Ok((!message.content.is_empty()).then_some((message, how)))
}

/// The body, asking for the model that the far side calls `model`. Always a stream: a whole answer is put together
/// where the request came in.
pub fn body(request: &Request, model: &str, far: &FarSide) -> Result<Vec<u8>, Refused> {
    let continuation = continuation(request, far)?;
    let extra = Members::parse(&request.extra)
        .map_err(|error| refused(RefusalKind::InvalidField, "extra", format!("no JSON object: {error}")))?;
    if extra.get("n").is_some_and(|n| n.get() != "1") {
        let message = "`n` must be 1: Ingle gives one answer to a request, an endpoint's models included";
        return Err(refused(RefusalKind::UnsupportedField, "n", message.into()));
    }
    let messages = request
        .messages
        .iter()
        .chain(continuation.as_ref().map(|(message, _)| message))
        .enumerate()
        .map(|(index, message)| {
            let extra = Members::parse(&message.extra).map_err(|error| {
                refused(RefusalKind::InvalidField, &format!("messages[{index}]"), format!("no JSON object: {error}"))
            })?;
            Ok(MessageBody { message, extra })
        })
        .collect::<Result<Vec<_>, Refused>>()?;
    let all = messages.iter().map(|body| body.message);
    let length: usize = all.map(|message| message.content.len() + message.extra.len() + 48).sum();
    let mut out = Vec::with_capacity(length + request.extra.len() + 512);
    let flagged = continuation.as_ref().is_some_and(|(_, how)| *how == Continue::Flagged);
    write(&mut serde_json::Serializer::new(&mut out), request, model, &messages, &extra, flagged)
        .map_err(|error| refused(RefusalKind::InvalidField, "messages", format!("cannot be passed on: {error}")))?;
    Ok(out)
}

/// Further members that are no object.
pub fn invalid_extra(error: &serde_json::Error) -> Refused {
    refused(RefusalKind::InvalidField, "extra", format!("no JSON object: {error}"))
}

fn refused(kind: RefusalKind, param: &str, message: String) -> Refused {
    Refused { kind, message, param: Some(param.to_owned()), retry_after_ms: None }
}

struct MessageBody<'a> {
    message: &'a Message,
    extra: Members<'a>,
}

impl Serialize for MessageBody<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { message, extra } = self;
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("role", message.role.as_str())?;
        // Parts that are no text stand in `extra`.
        if !extra.has("content") {
            let only_calls = message.content.is_empty() && message.role == Role::Assistant && !extra.0.is_empty();
            map.serialize_entry("content", &(!only_calls).then_some(&message.content))?;
        }
        for (name, value) in extra.0.iter().filter(|(name, _)| name != "role") {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

/// Values that mean "off" are left out, so that servers which do not know a field are not asked about it. Where one
/// thing has two names, both are written: servers ignore names that they do not know.
fn write<S: Serializer>(
    serializer: S,
    request: &Request,
    model: &str,
    messages: &[MessageBody<'_>],
    extra: &Members<'_>,
    flagged: bool,
) -> Result<S::Ok, S::Error> {
    let sampling = &request.sampling;
    let said = u32::try_from(request.resume.len()).unwrap_or(u32::MAX);
    let mut map = serializer.serialize_map(None)?;
    map.serialize_entry("model", model)?;
    map.serialize_entry("messages", messages)?;
    map.serialize_entry("stream", &true)?;
    map.serialize_entry("stream_options", &json!({ "include_usage": true }))?;
    map.serialize_entry("temperature", &sampling.temperature)?;
    map.serialize_entry("top_p", &sampling.top_p)?;
    // Its bits: a negative seed of a client is that again.
    map.serialize_entry("seed", &sampling.seed.cast_signed())?;
    if let Some(most) = sampling.max_tokens {
        map.serialize_entry("max_tokens", &most.saturating_sub(said).max(1))?;
    }
    if !sampling.stop.is_empty() {
        map.serialize_entry("stop", &sampling.stop)?;
    }
    for (name, penalty) in
        [("presence_penalty", sampling.presence_penalty), ("frequency_penalty", sampling.frequency_penalty)]
    {
        if penalty != 0.0 {
            map.serialize_entry(name, &penalty)?;
        }
    }
    if !sampling.logit_bias.is_empty() {
        let biases: BTreeMap<u32, f32> = sampling.logit_bias.iter().map(|bias| (bias.token, bias.bias)).collect();
        map.serialize_entry("logit_bias", &biases)?;
    }
    if let Some(top) = sampling.logprobs {
        map.serialize_entry("logprobs", &true)?;
        map.serialize_entry("top_logprobs", &top)?;
    }
    // From here on OpenAI itself knows none of them; llama.cpp and vLLM do.
    if sampling.top_k != 0 {
        map.serialize_entry("top_k", &sampling.top_k)?;
    }
    if sampling.min_p != 0.0 {
        map.serialize_entry("min_p", &sampling.min_p)?;
    }
    if sampling.repetition_penalty != 1.0 {
        map.serialize_entry("repetition_penalty", &sampling.repetition_penalty)?;
        map.serialize_entry("repeat_penalty", &sampling.repetition_penalty)?;
        let window = i64::from(sampling.repetition_window);
        map.serialize_entry("repeat_last_n", &if window == i64::from(u32::MAX) { -1 } else { window })?;
    }
    if sampling.min_tokens > said {
        map.serialize_entry("min_tokens", &(sampling.min_tokens - said))?;
    }
    if !sampling.stop_token_ids.is_empty() {
        map.serialize_entry("stop_token_ids", &sampling.stop_token_ids)?;
    }
    if sampling.ignore_eos {
        map.serialize_entry("ignore_eos", &true)?;
    }
    let is_ours =
        |name: &str| OURS.contains(&name) || (flagged && CONTINUES.iter().any(|(continues, _)| *continues == name));
    for (name, value) in extra.0.iter().filter(|(name, _)| !is_ours(name)) {
        map.serialize_entry(name, value)?;
    }
    if flagged {
        for (name, value) in CONTINUES {
            map.serialize_entry(name, &value)?;
        }
    }
    map.end()
}

#[cfg(test)]
mod tests {
    use ingle_protocol::wire::v2::{LogitBias, Priority, Sampling, TraceContext};
    use ingle_protocol::{ModelDigest, RequestId};

    use super::super::dialect::Program;
    use super::*;

    fn message(role: Role, content: &str, extra: &str) -> Message {
        Message { role, content: content.into(), extra: extra.into() }
    }

    fn request(sampling: Sampling, messages: Vec<Message>, extra: &str) -> Request {
        Request {
            request_id: RequestId([1; 16]),
            attempt: 0,
            trace: TraceContext::default(),
            principal: "local".into(),
            priority: Priority::Normal,
            remaining_ms: 1_000,
            model: "here".into(),
            digest: ModelDigest::default(),
            messages,
            sampling,
            embed: None,
            resume: vec![],
            resume_text: vec![],
            extra: extra.into(),
        }
    }

    fn of(program: Program) -> FarSide {
        FarSide { program, ..FarSide::default() }
    }

    fn text(request: &Request) -> String {
        String::from_utf8(body(request, "there", &FarSide::default()).unwrap()).unwrap()
    }

    #[test]
    fn a_plain_request_has_plain_members() {
        let sampling = Sampling { temperature: 0.7, top_p: 0.9, seed: 5, ..Sampling::default() };
        assert_eq!(
            text(&request(sampling, vec![message(Role::User, "hé\"", "")], "")),
            r#"{"model":"there","messages":[{"role":"user","content":"hé\""}],"stream":true,"stream_options":{"include_usage":true},"temperature":0.7,"top_p":0.9,"seed":5}"#
        );
    }

    #[test]
    fn all_that_can_be_said_arrives_as_it_was_written() {
        let sampling = Sampling {
            seed: (-5i64).cast_unsigned(),
            top_k: 40,
            min_p: 0.05,
            repetition_penalty: 1.1,
            presence_penalty: 0.5,
            logit_bias: vec![LogitBias { token: 7, bias: -100.0 }],
            max_tokens: Some(16),
            min_tokens: 2,
            stop: vec!["END".into()],
            stop_token_ids: vec![9],
            ignore_eos: true,
            logprobs: Some(3),
            ..Sampling::default()
        };
        let calls =
            r#"{"tool_calls":[{"id":"c1","type":"function","function":{"name":"f","arguments":"{\"b\": 1.0}"}}]}"#;
        let parts = r#"{"content":[{"type":"image_url","image_url":{"url":"data:,"}}]}"#;
        let messages = vec![
            message(Role::User, "", parts),
            message(Role::Assistant, "", calls),
            message(Role::Tool, "12", r#"{"tool_call_id":"c1"}"#),
        ];
        let extra = r#"{"tools":[{"z":1.0,"a":{"y":1,"b":2}}],"stream":false,"model":"other","n":1}"#;
        let text = text(&request(sampling, messages, extra));
        for expected in [
            r#"{"role":"user","content":[{"type":"image_url","image_url":{"url":"data:,"}}]}"#,
            r#"{"role":"assistant","content":null,"tool_calls":[{"id":"c1","type":"function","function":{"name":"f","arguments":"{\"b\": 1.0}"}}]}"#,
            r#"{"role":"tool","content":"12","tool_call_id":"c1"}"#,
            r#""seed":-5,"max_tokens":16,"stop":["END"],"presence_penalty":0.5,"logit_bias":{"7":-100.0},"logprobs":true,"top_logprobs":3,"top_k":40,"min_p":0.05,"repetition_penalty":1.1,"repeat_penalty":1.1,"repeat_last_n":-1,"min_tokens":2,"stop_token_ids":[9],"ignore_eos":true,"tools":[{"z":1.0,"a":{"y":1,"b":2}}],"n":1}"#,
        ] {
            assert!(text.contains(expected), "{expected}\nis not in\n{text}");
        }
        assert!(!text.contains("other") && !text.contains("false"), "{text}");
    }

    #[test]
    fn what_an_endpoint_cannot_do_is_refused_by_name() {
        let of = |request: Request| body(&request, "there", &FarSide::default()).unwrap_err();
        let user = || vec![message(Role::User, "x", "")];
        let resumed = Request { resume: vec![1], resume_text: "so".into(), ..request(Sampling::default(), user(), "") };
        let unknown = of(resumed);
        assert_eq!(unknown.param.as_deref(), Some("resume"));
        assert!(unknown.message.contains("unknown make"), "{}", unknown.message);
        let two = of(request(Sampling::default(), user(), r#"{"n":2}"#));
        assert_eq!((two.kind, two.param.as_deref()), (RefusalKind::UnsupportedField, Some("n")));
        assert_eq!(of(request(Sampling::default(), user(), "[]")).kind, RefusalKind::InvalidField);
        let bad = vec![message(Role::User, "x", "{")];
        assert_eq!(of(request(Sampling::default(), bad, "")).param.as_deref(), Some("messages[0]"));
    }

    #[test]
    fn an_answer_that_was_begun_stands_at_the_end_as_each_program_wants_it() {
        let sampling = Sampling { max_tokens: Some(9), min_tokens: 4, ..Sampling::default() };
        let extra = r#"{"add_generation_prompt":true,"tools":[]}"#;
        let begun = Request {
            resume: vec![u32::MAX, 5],
            resume_text: "so far \n".into(),
            ..request(sampling, vec![message(Role::User, "x", "")], extra)
        };
        let json = |request: &Request, program| -> serde_json::Value {
            serde_json::from_slice(&body(request, "there", &of(program)).unwrap()).unwrap()
        };
        for program in [Program::LlamaCpp, Program::Vllm, Program::Ollama] {
            let body = json(&begun, program);
            let said =
                serde_json::json!([{"role": "user", "content": "x"}, {"role": "assistant", "content": "so far"}]);
            assert_eq!(body["messages"], said, "{program:?}");
            assert_eq!((&body["max_tokens"], &body["min_tokens"]), (&7.into(), &2.into()));
            let flags = (&body["continue_final_message"], &body["add_generation_prompt"]);
            match program {
                Program::Ollama => assert_eq!(flags, (&serde_json::Value::Null, &true.into())),
                _ => assert_eq!(flags, (&true.into(), &false.into())),
            }
        }
        // Nothing but a space was said: it begins anew, with what is left.
        let spaces = Request { resume_text: " ".into(), ..begun.clone() };
        assert_eq!(json(&spaces, Program::Vllm)["messages"].as_array().unwrap().len(), 1);
        assert_eq!(json(&spaces, Program::Vllm)["continue_final_message"], serde_json::Value::Null);
        let refused = |request: &Request, program| body(request, "there", &of(program)).unwrap_err();
        for program in [Program::LmStudio, Program::Ingle, Program::Unknown] {
            assert_eq!(refused(&begun, program).param.as_deref(), Some("resume"));
        }
        let without_text = Request { resume_text: vec![], ..begun.clone() };
        assert!(refused(&without_text, Program::Vllm).message.contains("only tokens"));
        let behind = Request { messages: vec![message(Role::Assistant, "I say ", "")], ..begun };
        assert!(refused(&behind, Program::Vllm).message.contains("unfinished"));
    }
}
