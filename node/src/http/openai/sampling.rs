//! How the client wants tokens to be chosen: OpenAI's members, and those of llama.cpp and vLLM for what OpenAI lacks.

use ingle_actors::gateway::{DEFAULT_TEMPERATURE, DEFAULT_TOP_P};
use ingle_actors::protocol::wire::v2::{LOGIT_BIAS_LIMIT, LogitBias, STOP_TOKENS_LIMIT, Sampling, TOP_LOGPROBS_LIMIT};
use serde_json::Value;

use super::ApiError;
use super::fields::{Fields, wrong_type};

/// The most stop texts.
const MOST_STOPS: usize = 4;
/// Tokens that llama.cpp's `repeat_penalty` looks at where `repeat_last_n` does not say.
const USUAL_WINDOW: u32 = 64;

/// Takes the members. `random_seed` is taken where the client chose no seed.
pub fn sampling(fields: &mut Fields, random_seed: u64) -> Result<Sampling, ApiError> {
    let mut number = |name: &str, range, usual: f32| {
        fields.number(name, range).map(|value| value.map_or(usual, |value| value as f32))
    };
    let temperature = number("temperature", 0.0..=2.0, DEFAULT_TEMPERATURE)?;
    let top_p = number("top_p", 0.0..=1.0, DEFAULT_TOP_P)?;
    let min_p = number("min_p", 0.0..=1.0, 0.0)?;
    let presence_penalty = number("presence_penalty", -2.0..=2.0, 0.0)?;
    let frequency_penalty = number("frequency_penalty", -2.0..=2.0, 0.0)?;
    let (repetition_penalty, repetition_window) = repetition(fields)?;
    let max_tokens = max_tokens(fields)?;
    let min_tokens = fields.whole("min_tokens", 0)?.unwrap_or(0);
    if let Some(most) = max_tokens.filter(|most| *most < min_tokens) {
        let message = format!("`min_tokens` is {min_tokens}, which is more than `max_tokens` ({most}).");
        return Err(ApiError::invalid("min_tokens", message));
    }
    Ok(Sampling {
        temperature,
        // vLLM writes −1 for "all", llama.cpp 0.
        top_k: fields.whole("top_k", -1)?.filter(|k| *k != u32::MAX).unwrap_or(0),
        top_p,
        min_p,
        repetition_penalty,
        repetition_window,
        presence_penalty,
        frequency_penalty,
        logit_bias: logit_bias(fields)?,
        seed: seed(fields)?.unwrap_or(random_seed),
        max_tokens,
        min_tokens,
        stop: stop(fields)?,
        stop_token_ids: stop_token_ids(fields)?,
        ignore_eos: fields.flag("ignore_eos")?.unwrap_or(false),
        logprobs: logprobs(fields)?,
    })
}

/// Penalty and window. vLLM's `repetition_penalty` looks at all tokens, llama.cpp's `repeat_penalty` at the last 64;
/// llama.cpp's `repeat_last_n` decides for both.
fn repetition(fields: &mut Fields) -> Result<(f32, u32), ApiError> {
    let range = 0.01..=100.0;
    let all = fields.number("repetition_penalty", range.clone())?;
    let last = fields.number("repeat_penalty", range)?;
    let window = fields.whole("repeat_last_n", -1)?;
    match (all, last) {
        (Some(all), Some(last)) if all != last => Err(ApiError::invalid(
            "repetition_penalty",
            format!("`repetition_penalty` is {all} and `repeat_penalty` is {last}: write one of the two."),
        )),
        (None, Some(last)) => Ok((last as f32, window.unwrap_or(USUAL_WINDOW))),
        (all, _) => Ok((all.unwrap_or(1.0) as f32, window.unwrap_or(u32::MAX))),
    }
}

/// `{"50256": -100}`.
fn logit_bias(fields: &mut Fields) -> Result<Vec<LogitBias>, ApiError> {
    let members = match fields.take("logit_bias") {
        None => return Ok(vec![]),
        Some(Value::Object(members)) => members,
        Some(other) => return Err(wrong_type("logit_bias", "an object of token ids and numbers", &other)),
    };
    if members.len() > LOGIT_BIAS_LIMIT {
        let message = format!("`logit_bias` has {} tokens: at most {LOGIT_BIAS_LIMIT} are possible.", members.len());
        return Err(ApiError::invalid("logit_bias", message));
    }
    let entry = |(name, value): (String, Value)| {
        // One spelling for each token, so that none stands there twice.
        let Some(token) = name.parse::<u32>().ok().filter(|token| token.to_string() == name) else {
            let name: String = name.chars().take(80).collect();
            let message = format!("`logit_bias` has the key `{name}`: each must be a token's id, a whole number.");
            return Err(ApiError::invalid("logit_bias", message));
        };
        let path = format!("logit_bias.{token}");
        match value.as_f64() {
            Some(bias) if (-100.0..=100.0).contains(&bias) => Ok(LogitBias { token, bias: bias as f32 }),
            Some(bias) => {
                Err(ApiError::invalid(path.clone(), format!("`{path}` is {bias}: it must be between -100 and 100.")))
            }
            None => Err(wrong_type(path, "a number", &value)),
        }
    };
    members.into_iter().map(entry).collect()
}

fn stop_token_ids(fields: &mut Fields) -> Result<Vec<u32>, ApiError> {
    let items = match fields.take("stop_token_ids") {
        None => return Ok(vec![]),
        Some(Value::Array(items)) => items,
        Some(other) => return Err(wrong_type("stop_token_ids", "an array of token ids", &other)),
    };
    if items.len() > STOP_TOKENS_LIMIT {
        let message = format!("`stop_token_ids` has {} tokens: at most {STOP_TOKENS_LIMIT} are possible.", items.len());
        return Err(ApiError::invalid("stop_token_ids", message));
    }
    let id = |(index, item): (usize, Value)| {
        let id = item.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| {
            let path = format!("stop_token_ids[{index}]");
            ApiError::invalid(path.clone(), format!("`{path}` is {item}: it must be a token's id, a whole number."))
        })
    };
    items.into_iter().enumerate().map(id).collect()
}

/// How many alternatives to say with each token; `None` to say nothing.
fn logprobs(fields: &mut Fields) -> Result<Option<u8>, ApiError> {
    let wanted = fields.flag("logprobs")?.unwrap_or(false);
    let top = fields.whole("top_logprobs", 0)?.unwrap_or(0);
    match u8::try_from(top) {
        Ok(1..) if !wanted => Err(ApiError::invalid("top_logprobs", "`top_logprobs` needs `logprobs` to be true.")),
        Ok(top) if top <= TOP_LOGPROBS_LIMIT => Ok(wanted.then_some(top)),
        _ => {
            let message = format!("`top_logprobs` is {top}: it must be between 0 and {TOP_LOGPROBS_LIMIT}.");
            Err(ApiError::invalid("top_logprobs", message))
        }
    }
}

/// `max_completion_tokens` or its older name.
fn max_tokens(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let old = fields.count("max_tokens")?;
    let new = fields.count("max_completion_tokens")?;
    match (old, new) {
        (Some(old), Some(new)) if old != new => Err(ApiError::invalid(
            "max_tokens",
            format!("`max_tokens` is {old} and `max_completion_tokens` is {new}: write one of the two."),
        )),
        (old, new) => Ok(new.or(old)),
    }
}

fn seed(fields: &mut Fields) -> Result<Option<u64>, ApiError> {
    let Some(value) = fields.take("seed") else { return Ok(None) };
    // Negative seeds are seeds like all others: two's complement keeps them apart.
    let seed = value.as_i64().map(|seed| seed as u64).or(value.as_u64());
    seed.map(Some).ok_or_else(|| wrong_type("seed", "a whole number of 64 bits", &value))
}

fn stop(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let items = match fields.take("stop") {
        None => return Ok(vec![]),
        Some(Value::Array(items)) => items,
        Some(Value::String(text)) if text.is_empty() => {
            return Err(ApiError::invalid("stop", "`stop` is empty: every answer would end before it begins."));
        }
        Some(Value::String(text)) => return Ok(vec![text]),
        Some(other) => return Err(wrong_type("stop", "a string or an array of strings", &other)),
    };
    if items.len() > MOST_STOPS {
        let message = format!("`stop` has {} texts: at most {MOST_STOPS} are possible.", items.len());
        return Err(ApiError::invalid("stop", message));
    }
    let text = |(index, item)| match item {
        Value::String(text) if !text.is_empty() => Ok(text),
        other => Err(wrong_type(format!("stop[{index}]"), "a string that is not empty", &other)),
    };
    items.into_iter().enumerate().map(text).collect()
}
