//! Tools as OpenAI has them: what a request says of them, and calls in an answer.

use ingle_actors::protocol::wire::v2::{FinishReason, Role};
use ingle_actors::tools::{AnswerPart, ToolCall, ToolCallParser, ToolFormat};
use serde::Serialize;
use serde_json::{Map, Value};

use super::ApiError;
use super::chat_completions::finish_reason;
use super::fields::{Fields, wrong_type};

/// The longest name of a function, in bytes.
const LONGEST_NAME: usize = 64;
/// Letters and digits of a call's id: Mistral's templates take no other length and no other characters.
const ID_LENGTH: usize = 9;

/// How an answer may call tools.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ToolUse {
    /// More than one in an answer.
    pub parallel: bool,
}

/// Looks at what a request says of tools. `None` where the model is to call none.
pub fn wanted(members: &Map<String, Value>) -> Result<Option<ToolUse>, ApiError> {
    let tools = match members.get("tools") {
        Some(Value::Array(tools)) if !tools.is_empty() => tools,
        Some(other) => return Err(wrong_type("tools", "an array of functions", other)),
        None => return Ok(None),
    };
    for (index, tool) in tools.iter().enumerate() {
        let mut tool = Fields::new(tool.clone(), format!("tools[{index}]"))?;
        only_functions(&mut tool)?;
        let function = function_of(&mut tool)?;
        if let Some(parameters) = function.1.filter(|parameters| !parameters.is_object()) {
            return Err(wrong_type(format!("{}.parameters", function.0), "an object", &parameters));
        }
    }
    let parallel = match members.get("parallel_tool_calls") {
        None => true,
        Some(value) => value.as_bool().ok_or_else(|| wrong_type("parallel_tool_calls", "a boolean", value))?,
    };
    // Whether the others can be had is the engine's to say.
    let none = members.get("tool_choice").is_some_and(|choice| choice == "none");
    Ok((!none).then_some(ToolUse { parallel }))
}

fn only_functions(fields: &mut Fields) -> Result<(), ApiError> {
    let path = fields.path_of("type");
    match fields.text("type")?.as_deref() {
        Some("function") => Ok(()),
        Some(other) => {
            let other: String = other.chars().take(80).collect();
            Err(ApiError::unsupported(path.clone(), format!("`{path}` is `{other}`: only `function` is supported.")))
        }
        None => Err(ApiError::invalid(path.clone(), format!("`{path}` is missing."))),
    }
}

/// The path of `function`, whose name is sound, and its `parameters`.
fn function_of(fields: &mut Fields) -> Result<(String, Option<Value>), ApiError> {
    let path = fields.path_of("function");
    let function = fields.take("function");
    let function = function.ok_or_else(|| ApiError::invalid(path.clone(), format!("`{path}` is missing.")))?;
    let mut function = Fields::new(function, path.clone())?;
    let name_path = function.path_of("name");
    match function.text("name")? {
        Some(name) if (1..=LONGEST_NAME).contains(&name.len()) => Ok((path, function.take("parameters"))),
        Some(_) => {
            let message = format!("`{name_path}` must have 1 to {LONGEST_NAME} bytes.");
            Err(ApiError::invalid(name_path, message))
        }
        None => Err(ApiError::invalid(name_path.clone(), format!("`{name_path}` is missing."))),
    }
}

/// Looks at the members of a message that have to do with tools.
pub fn check_message(role: Role, members: &Map<String, Value>, path: &str) -> Result<(), ApiError> {
    if role == Role::Tool {
        let path = format!("{path}.tool_call_id");
        return match members.get("tool_call_id") {
            Some(Value::String(_)) => Ok(()),
            Some(other) => Err(wrong_type(path, "a string", other)),
            None => {
                Err(ApiError::invalid(path.clone(), format!("`{path}` is missing: it says which call this answers.")))
            }
        };
    }
    let path = format!("{path}.tool_calls");
    let calls = match members.get("tool_calls") {
        Some(Value::Array(calls)) => calls,
        Some(other) => return Err(wrong_type(path, "an array", other)),
        None => return Ok(()),
    };
    for (index, call) in calls.iter().enumerate() {
        let mut call = Fields::new(call.clone(), format!("{path}[{index}]"))?;
        let id_path = call.path_of("id");
        if call.text("id")?.is_none() {
            return Err(ApiError::invalid(id_path.clone(), format!("`{id_path}` is missing.")));
        }
        only_functions(&mut call)?;
        let arguments = call.path_of("function.arguments");
        let function = calls[index].get("function").and_then(|function| function.get("arguments"));
        function_of(&mut call)?;
        match function {
            Some(Value::String(_)) => {}
            Some(other) => return Err(wrong_type(arguments, "a string of JSON", other)),
            None => return Err(ApiError::invalid(arguments.clone(), format!("`{arguments}` is missing."))),
        }
    }
    Ok(())
}

/// A call in an answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CallBody {
    /// Its place among the answer's calls; in streams only.
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<u32>,
    id: String,
    r#type: &'static str,
    function: FunctionBody,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct FunctionBody {
    name: String,
    arguments: String,
}

/// A part of an answer, as it is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// Text.
    Text(String),
    /// A call, whole.
    Call(CallBody),
}

/// Reads calls out of an answer.
#[derive(Debug)]
pub struct AnswerTools {
    parser: ToolCallParser,
    parallel: bool,
    calls: u32,
}

impl AnswerTools {
    /// `None` where nothing in the answer can be a call. `features` are those of the engine that answers.
    pub fn new(wanted: Option<ToolUse>, features: &[String]) -> Option<Self> {
        let (wanted, format) = (wanted?, ToolFormat::among(features)?);
        Some(Self { parser: ToolCallParser::new(format), parallel: wanted.parallel, calls: 0 })
    }

    /// What is certain after more text.
    pub fn push(&mut self, text: &str) -> Vec<Part> {
        let parts = self.parser.push(text);
        self.written(parts)
    }

    /// The rest of the answer.
    pub fn finish(&mut self) -> Vec<Part> {
        let parts = self.parser.finish();
        self.written(parts)
    }

    /// Why the answer ended, where the model said `reason`.
    pub fn finish_reason(&self, reason: FinishReason) -> &'static str {
        match reason {
            FinishReason::Stop if self.calls > 0 => "tool_calls",
            other => finish_reason(other),
        }
    }

    /// Where one call is allowed, the answer ends with it.
    fn written(&mut self, parts: Vec<AnswerPart>) -> Vec<Part> {
        let mut written = Vec::with_capacity(parts.len());
        for part in parts {
            if self.calls > 0 && !self.parallel {
                break;
            }
            written.push(match part {
                AnswerPart::Text(text) => Part::Text(text),
                AnswerPart::Call(ToolCall { name, arguments }) => {
                    self.calls += 1;
                    Part::Call(CallBody {
                        index: Some(self.calls - 1),
                        id: new_id(crate::ingress::random_seed()),
                        r#type: "function",
                        function: FunctionBody { name, arguments },
                    })
                }
            });
        }
        written
    }
}

/// Splits a whole answer into its text and its calls.
pub fn split(tools: &mut AnswerTools, text: &str) -> (String, Vec<CallBody>) {
    let (mut content, mut calls) = (String::new(), Vec::new());
    let parts = tools.push(text).into_iter();
    for part in parts.chain(tools.finish()).collect::<Vec<_>>() {
        match part {
            Part::Text(text) => content += &text,
            Part::Call(call) => calls.push(CallBody { index: None, ..call }),
        }
    }
    (content, calls)
}

fn new_id(mut random: u64) -> String {
    const CHARACTERS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    let mut next = || {
        let character = CHARACTERS[(random % 62) as usize];
        random /= 62;
        char::from(character)
    };
    (0..ID_LENGTH).map(|_| next()).collect()
}

#[cfg(test)]
#[path = "tools_tests.rs"]
mod tests;
