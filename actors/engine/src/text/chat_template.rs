//! The model's own chat template (Jinja), rendered as Hugging Face transformers renders it.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use minijinja::machinery::{self, CodeGenerator, Instructions, make_string_output, parse};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, context};
use regex::{Captures, Regex};
use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter, PrettyFormatter};

use super::{Conversation, PromptError, ToolSupport};

mod bounds;

/// Instructions of one rendering, with one more for each 64 bytes of new texts: a template that loops for ever, or
/// makes texts of more than 320 MB in all, ends in an error.
const FUEL: u64 = 5_000_000;

/// A template that can be compiled.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    syntax: SyntaxConfig,
    source: String,
    bos: String,
    eos: String,
    tools: ToolSupport,
}

/// Instructions of a template and of its blocks.
type Compiled<'s> = (Instructions<'s>, BTreeMap<&'s str, Instructions<'s>>);

impl ChatTemplate {
    /// Compiles `source`. `bos` and `eos` are the texts of the tokens that begin and end a sequence.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self, String> {
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        let syntax = syntax.map_err(|error| describe(&error))?;
        let mut environment = Environment::new();
        environment.set_debug(false);
        environment.set_fuel(Some(FUEL));
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", to_json);
        bounds::install(&mut environment);
        let tools = ToolSupport::of_template(source);
        let source = bounds::check_source(&without_training_marks(source)?, &syntax)?;
        let template = Self { environment, syntax, source, bos: bos.into(), eos: eos.into(), tools };
        template.compile()?;
        Ok(template)
    }

    /// What it knows of tools.
    pub fn tools(&self) -> ToolSupport {
        self.tools
    }

    /// Compiled anew for each rendering: instructions borrow the source, and all of it takes less time than a token.
    fn compile(&self) -> Result<Compiled<'_>, String> {
        let tree = parse(&self.source, "chat", self.syntax.clone()).map_err(|error| describe(&error))?;
        let mut generator = CodeGenerator::new("chat", &self.source);
        generator.compile_stmt(&tree);
        let (instructions, blocks) = generator.finish();
        let blocks = blocks.iter().map(|(name, block)| Ok((*name, bounds::checked(block)?)));
        Ok((bounds::checked(&instructions)?, blocks.collect::<Result<_, String>>()?))
    }

    /// The conversation as text, ready for the assistant's turn.
    pub fn render(&self, conversation: &Conversation) -> Result<String, PromptError> {
        let Conversation { messages, tools } = conversation;
        let refused = |why| PromptError(format!("the model's chat template refuses this: {why}"));
        let (instructions, blocks) = self.compile().map_err(PromptError)?;
        let (bos_token, eos_token) = (&self.bos, &self.eos);
        let values = context! { messages, tools, add_generation_prompt => true, bos_token, eos_token };
        let mut text = String::new();
        let mut out = make_string_output(&mut text);
        machinery::eval(&self.environment, &instructions, values, &blocks, &mut out, AutoEscape::None)
            .map_err(|error| refused(describe(&error)))?;
        Ok(text)
    }
}

/// transformers' own blocks `{% generation %}…{% endgeneration %}` say in training what the assistant wrote.
fn without_training_marks(source: &str) -> Result<String, String> {
    static MARK: LazyLock<Result<Regex, regex::Error>> =
        LazyLock::new(|| Regex::new(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})"));
    let mark = MARK.as_ref().map_err(ToString::to_string)?;
    let block = |found: &Captures<'_>| {
        let word = if found.get(2).is_some() { "endif" } else { "if true" };
        format!("{}{word}{}", &found[1], &found[3])
    };
    Ok(mark.replace_all(source, block).into_owned())
}

fn describe(error: &Error) -> String {
    let line = error.line().map(|line| format!(" (line {line} of the template)")).unwrap_or_default();
    match error.detail() {
        Some(detail) => format!("{detail}{line}"),
        None if error.kind() == ErrorKind::OutOfFuel => format!("it takes too much time or memory{line}"),
        None => format!("{}{line}", error.kind()),
    }
}

fn raise_exception(message: &str) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.to_string()))
}

/// Python's `datetime.now().strftime(format)`, in UTC so that every node renders the same.
fn strftime_now(format: &str) -> Result<String, Error> {
    let bad = |why: String| Error::new(ErrorKind::InvalidOperation, why);
    let items = time::format_description::parse_strftime_borrowed(format).map_err(|why| bad(why.to_string()))?;
    time::OffsetDateTime::now_utc().format(&items).map_err(|why| bad(why.to_string()))
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`.
fn to_json(state: &State, value: &Value, kwargs: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let _: Option<bool> = kwargs.get("ensure_ascii")?;
    kwargs.assert_all_used()?;
    // What the rest of the fuel pays for.
    let limit = state.fuel_levels().map_or(u64::MAX, |(_, left)| left.saturating_mul(64));
    let out = Limited { bytes: Vec::new(), limit: usize::try_from(limit).unwrap_or(usize::MAX) };
    let text = match indent {
        Some(width) => write_json(out, value, PrettyFormatter::with_indent(" ".repeat(width.min(16)).as_bytes())),
        None => write_json(out, value, PythonFormatter(CompactFormatter)),
    };
    text.map(Value::from_safe_string).map_err(|why| Error::new(ErrorKind::BadSerialization, why))
}

/// Bytes, up to a limit.
struct Limited {
    bytes: Vec<u8>,
    limit: usize,
}

impl std::io::Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if bytes.len() > self.limit - self.bytes.len() {
            return Err(std::io::Error::other("the JSON takes too much memory"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn write_json(mut out: Limited, value: &Value, formatter: impl Formatter) -> Result<String, String> {
    value
        .serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
        .map_err(|error| error.to_string())?;
    String::from_utf8(out.bytes).map_err(|error| error.to_string())
}

/// JSON on one line with a space behind each comma and colon.
struct PythonFormatter(CompactFormatter);

impl Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }
    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }
    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ingle_protocol::wire::v2::{Message, Role};

    fn render(source: &str, content: &str) -> Result<String, PromptError> {
        let template = ChatTemplate::new(source, "<s>", "</s>").map_err(PromptError)?;
        let message = Message { role: Role::User, content: content.into(), extra: vec![] };
        template.render(&Conversation::new(&[message], b"")?)
    }

    #[test]
    fn blocks_are_trimmed_as_transformers_does() {
        let source = "{{ bos_token }}{% for m in messages %}\n  {% if m.role == 'user' %}\n[{{ m['content'] | trim }}]\n  {% endif %}\n{% endfor %}\n";
        assert_eq!(render(source, "  hi ").unwrap(), "<s>[hi]\n");
    }

    #[test]
    fn marks_for_training_are_passed_over() {
        let source = "a\n{%- generation %}\n{{ messages[0].content }}  {%- endgeneration -%}\n b";
        assert_eq!(render(source, "x").unwrap(), "ax b".replace(' ', ""));
    }

    #[test]
    fn python_methods_and_json_work() {
        let source = "{{ messages[0].content.strip().upper() }} {{ messages | tojson }}";
        assert_eq!(render(source, " é ").unwrap(), "É [{\"role\": \"user\", \"content\": \" é \"}]");
        assert_eq!(
            render("{{ [1, [], {'a': none}] | tojson(indent=2) }}", "").unwrap(),
            "[\n  1,\n  [],\n  {\n    \"a\": null\n  }\n]"
        );
    }

    #[test]
    fn a_template_can_refuse_and_cannot_hang() {
        let error = render("{{ raise_exception('roles must alternate') }}", "").unwrap_err();
        assert!(error.0.contains("roles must alternate"), "{error}");
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{{ b }}{% endfor %}{% endfor %}";
        assert!(render(endless, "").is_err());
        assert!(render("{% if %}", "").is_err());
    }

    #[test]
    fn the_date_is_there() {
        let date = render("{{ strftime_now('%Y-%m-%d') }}", "").unwrap();
        assert_eq!(date.len(), 10, "{date}");
        assert!(date.starts_with("20"));
    }
}

#[cfg(test)]
mod reference_tests;
