//! The model's own chat template (Jinja), rendered as Hugging Face transformers renders it.

use std::sync::LazyLock;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, Error, ErrorKind, context};
use regex::{Captures, Regex};
use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter, PrettyFormatter};

use super::{Conversation, PromptError, ToolSupport};

/// Instructions of one rendering: a template that loops for ever ends in an error.
const FUEL: u64 = 5_000_000;

/// A compiled template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
    tools: ToolSupport,
}

impl ChatTemplate {
    /// Compiles `source`. `bos` and `eos` are the texts of the tokens that begin and end a sequence.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self, String> {
        let mut environment = Environment::new();
        environment.set_syntax(
            SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(|error| describe(&error))?,
        );
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", to_json);
        environment.add_template_owned("chat", without_training_marks(source)?).map_err(|error| describe(&error))?;
        Ok(Self { environment, bos: bos.into(), eos: eos.into(), tools: ToolSupport::of_template(source) })
    }

    /// What it knows of tools.
    pub fn tools(&self) -> ToolSupport {
        self.tools
    }

    /// The conversation as text, ready for the assistant's turn.
    pub fn render(&self, conversation: &Conversation) -> Result<String, PromptError> {
        let Conversation { messages, tools } = conversation;
        let template = self.environment.get_template("chat").map_err(|error| PromptError(describe(&error)))?;
        let (bos_token, eos_token) = (&self.bos, &self.eos);
        template
            .render(context! { messages, tools, add_generation_prompt => true, bos_token, eos_token })
            .map_err(|error| PromptError(format!("the model's chat template refuses this: {}", describe(&error))))
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
fn to_json(value: &Value, kwargs: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let _: Option<bool> = kwargs.get("ensure_ascii")?;
    kwargs.assert_all_used()?;
    let text = match indent {
        Some(width) => write_json(value, PrettyFormatter::with_indent(" ".repeat(width.min(16)).as_bytes())),
        None => write_json(value, PythonFormatter(CompactFormatter)),
    };
    text.map(Value::from_safe_string).map_err(|why| Error::new(ErrorKind::BadSerialization, why))
}

fn write_json(value: &Value, formatter: impl Formatter) -> Result<String, String> {
    let mut bytes = Vec::new();
    value
        .serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, formatter))
        .map_err(|error| error.to_string())?;
    String::from_utf8(bytes).map_err(|error| error.to_string())
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
    use ingle_protocol::wire::v1::{Message, Role};

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
