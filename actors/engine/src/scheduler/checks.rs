//! Whether a request asks for what this engine can do. The dialects check most of it as well; an engine believes none
//! of them.

use ingle_protocol::wire::v2::{
    LOGIT_BIAS_LIMIT, RefusalKind, Refused, Request, Role, STOP_TOKENS_LIMIT, Sampling, TOP_LOGPROBS_LIMIT,
};
use serde_json::{Map, Value};

use crate::text::ToolSupport;

/// The most stop texts of a request.
const MAX_STOPS: usize = 16;
/// The most bytes of one.
const MAX_STOP_BYTES: usize = 1024;

/// Refuses impossible values. Token ids are below `vocabulary`.
pub(super) fn check_sampling(sampling: &Sampling, vocabulary: u32) -> Result<(), Refused> {
    check_numbers(sampling)?;
    let Sampling { max_tokens, min_tokens, stop, stop_token_ids, logit_bias, logprobs, .. } = sampling;
    if *max_tokens == Some(0) {
        return Err(invalid("max_tokens", "it is 0, but must be at least 1"));
    }
    if let Some(most) = max_tokens.filter(|most| most < min_tokens) {
        return Err(invalid("min_tokens", &format!("it is {min_tokens}, but max_tokens is {most}")));
    }
    if stop.len() > MAX_STOPS {
        return Err(invalid("stop", &format!("there are {} stop texts, at most {MAX_STOPS} are possible", stop.len())));
    }
    if stop.iter().any(|text| text.is_empty() || text.len() > MAX_STOP_BYTES) {
        return Err(invalid("stop", &format!("a stop text must have 1 to {MAX_STOP_BYTES} bytes")));
    }
    let biased: Vec<u32> = logit_bias.iter().map(|entry| entry.token).collect();
    for (field, ids, most) in
        [("stop_token_ids", stop_token_ids, STOP_TOKENS_LIMIT), ("logit_bias", &biased, LOGIT_BIAS_LIMIT)]
    {
        if ids.len() > most {
            return Err(invalid(field, &format!("there are {} tokens, at most {most} are possible", ids.len())));
        }
        if let Some(id) = ids.iter().find(|id| **id >= vocabulary) {
            let message = format!("token {id} does not exist: the model's tokens are 0 to {}", vocabulary - 1);
            return Err(invalid(field, &message));
        }
    }
    if logprobs.is_some_and(|top| top > TOP_LOGPROBS_LIMIT) {
        return Err(invalid("top_logprobs", &format!("it must be from 0 to {TOP_LOGPROBS_LIMIT}")));
    }
    Ok(())
}

fn check_numbers(sampling: &Sampling) -> Result<(), Refused> {
    let bias = sampling.logit_bias.iter().map(|entry| entry.bias).find(|bias| !(-100.0..=100.0).contains(bias));
    for (field, value, [least, most]) in [
        ("temperature", sampling.temperature, [0.0, 2.0]),
        ("top_p", sampling.top_p, [0.0, 1.0]),
        ("min_p", sampling.min_p, [0.0, 1.0]),
        ("repetition_penalty", sampling.repetition_penalty, [0.01, 100.0]),
        ("presence_penalty", sampling.presence_penalty, [-2.0, 2.0]),
        ("frequency_penalty", sampling.frequency_penalty, [-2.0, 2.0]),
        ("logit_bias", bias.unwrap_or(0.0), [-100.0, 100.0]),
    ] {
        // Also false for what is no number.
        if !(least..=most).contains(&value) {
            return Err(invalid(field, &format!("it is {value}, but must be from {least} to {most}")));
        }
    }
    Ok(())
}

/// Refuses every member that this engine would have to ignore, by name.
pub(super) fn check_extra(request: &Request, tools: ToolSupport) -> Result<(), Refused> {
    let members = members_of(&request.extra, "extra")?;
    let wants_tools = members.get("tools").is_some_and(|tools| tools.as_array().is_none_or(|all| !all.is_empty()))
        && members.get("tool_choice").and_then(Value::as_str) != Some("none");
    if wants_tools {
        check_tools(tools, "tools")?;
        check_tool_choice(members.get("tool_choice"))?;
    }
    let is_known = |name: &str, value: &Value| match name {
        "tools" => value.is_array(),
        "tool_choice" => members.contains_key("tools"),
        // A model may call several or one; which, nobody promises here.
        "parallel_tool_calls" => value.is_boolean() && members.contains_key("tools"),
        _ => is_usual(name, value),
    };
    refuse_unknown(&members, "", is_known)?;
    for (index, message) in request.messages.iter().enumerate() {
        let path = format!("messages[{index}]");
        let members = members_of(&message.extra, &path)?;
        let of_tools: &[&str] = match message.role {
            Role::Assistant => &["tool_calls"],
            Role::Tool => &["tool_call_id", "name"],
            Role::System | Role::User => &[],
        };
        if let Some(name) = of_tools.iter().find(|name| members.get(**name).is_some_and(|value| !value.is_null())) {
            check_tools(tools, &format!("{path}.{name}"))?;
        }
        refuse_unknown(&members, &format!("{path}."), |name, _| of_tools.contains(&name))?;
    }
    Ok(())
}

fn check_tools(tools: ToolSupport, param: &str) -> Result<(), Refused> {
    let why = match tools {
        ToolSupport::Known(_) => return Ok(()),
        ToolSupport::None => "this model's template has no tools",
        ToolSupport::Unknown => "this model's template has tools, but how the model calls them is not known here",
    };
    Err(refuse(RefusalKind::UnsupportedField, Some(param), format!("'{param}' is not supported: {why}")))
}

/// Refuses every further member by name: a request for embeddings has none that this engine would know.
pub(super) fn check_no_extra(request: &Request) -> Result<(), Refused> {
    refuse_unknown(&members_of(&request.extra, "extra")?, "", |_, _| false)
}

/// What would have to constrain the answer is refused: nothing does.
fn check_tool_choice(choice: Option<&Value>) -> Result<(), Refused> {
    match choice {
        None | Some(Value::Null) => Ok(()),
        Some(choice) if choice == "auto" => Ok(()),
        Some(_) => {
            let message = "'tool_choice' can be `auto` or `none`: this engine cannot force a model to call a tool";
            Err(refuse(RefusalKind::UnsupportedField, Some("tool_choice"), message.into()))
        }
    }
}

fn members_of(json: &[u8], whole: &str) -> Result<Map<String, Value>, Refused> {
    if json.is_empty() {
        return Ok(Map::new());
    }
    serde_json::from_slice(json).map_err(|why| invalid(whole, &format!("not a JSON object: {why}")))
}

fn refuse_unknown(
    members: &Map<String, Value>,
    prefix: &str,
    is_known: impl Fn(&str, &Value) -> bool,
) -> Result<(), Refused> {
    match members.iter().find(|(name, value)| !value.is_null() && !is_known(name, value)) {
        None => Ok(()),
        Some((name, _)) => {
            let param = format!("{prefix}{name}");
            let message = match name.as_str() {
                // What is no text stands here, a message's own text does not.
                "content" if !prefix.is_empty() => {
                    format!("'{param}' has parts that are no text, which this model cannot read")
                }
                _ => format!("'{param}' is not supported by this model's engine"),
            };
            Err(refuse(RefusalKind::UnsupportedField, Some(&param), message))
        }
    }
}

/// The member asks for what happens anyway (some client libraries always send these).
fn is_usual(name: &str, value: &Value) -> bool {
    match name {
        "n" => value.as_f64() == Some(1.0),
        "response_format" => *value == serde_json::json!({ "type": "text" }),
        _ => false,
    }
}

/// A field with an impossible value.
pub(super) fn invalid(param: &str, message: &str) -> Refused {
    refuse(RefusalKind::InvalidField, Some(param), format!("Invalid '{param}': {message}"))
}

/// Any refusal.
pub(super) fn refuse(kind: RefusalKind, param: Option<&str>, message: String) -> Refused {
    Refused { kind, message, param: param.map(ToString::to_string), retry_after_ms: None }
}
