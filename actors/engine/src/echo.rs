//! An engine without weights for tests of everything else: it repeats what the user said last. It is never chosen
//! by default; only [`crate::ModelSource::Echo`] starts it.
//!
//! It goes through the same scheduler, sampler and detokenizer as a real model: a token is a byte (so characters
//! cross token borders), ids from 256 on mark the turns, and its logits leave one token possible, and a second where
//! that one is forbidden: what would come behind it, or the text from its beginning where it would end. What it says
//! next is a function of the tokens so far, so a resumed answer goes on where it was.
//!
//! The user's message may begin with directives, up to the first `: `, which are then not echoed:
//!
//! | directive | what it does |
//! |---|---|
//! | `repeat N` | says the text N times |
//! | `every Nms` | takes N milliseconds for each token |
//! | `prefill Nms` | takes N milliseconds for each chunk of the prompt |
//! | `stall Nms after M` | takes N milliseconds more for token M (from 0) |
//! | `panic after M` | panics instead of token M |
//! | `exit after M` | ends the whole process instead of token M, with code 101 |
//!
//! Tools are accepted and not looked at; a text in Hermes's format (`<tool_call>{"name": …}</tool_call>`) is a call.
//!
//! `repeat 500 every 20ms: hello ` says "hello hello hello …" for 50 seconds (each byte is a token).

use std::time::Duration;

use ingle_protocol::wire::v2::{Message, Role};

use crate::text::{Codec, PromptError, ToolFormat, ToolSupport};
use crate::{Capabilities, EngineError, Logits, StepEngine, StepEntry};

/// Begins a turn; the role's number is added.
const TURN: u32 = 256;
const USER: u32 = TURN + 1;
const ASSISTANT: u32 = TURN + 2;
/// Ends a turn.
const END: u32 = TURN + 4;
const VOCABULARY: u32 = END + 1;
const DEFAULT_CONTEXT: u32 = 8192;
const CHUNK: u32 = 64;
/// A logit beside 0 that is never drawn by chance, but is where a bias lifts it or forbids the other.
const UNLIKELY: f32 = -80.0;
/// A wait that a directive asks for is cut here.
const LONGEST_WAIT: Duration = Duration::from_secs(600);

/// Bytes as tokens.
#[derive(Debug)]
pub struct EchoCodec {
    bytes: [u8; 256],
}

impl Default for EchoCodec {
    fn default() -> Self {
        Self { bytes: std::array::from_fn(|byte| byte as u8) }
    }
}

impl Codec for EchoCodec {
    fn prompt(&self, messages: &[Message], _extra: &[u8]) -> Result<Vec<u32>, PromptError> {
        let mut tokens = Vec::new();
        for message in messages {
            tokens.push(match message.role {
                Role::System => TURN,
                Role::User => USER,
                Role::Assistant => ASSISTANT,
                Role::Tool => TURN + 3,
            });
            tokens.extend(message.content.bytes().map(u32::from));
            tokens.push(END);
        }
        tokens.push(ASSISTANT);
        Ok(tokens)
    }

    fn continuation(&self, text: &str) -> Result<Vec<u32>, PromptError> {
        Ok(text.bytes().map(u32::from).collect())
    }

    /// It knows nothing of them, but may be asked to say a call.
    fn tools(&self) -> ToolSupport {
        ToolSupport::Known(ToolFormat::Hermes)
    }

    fn bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(id as usize).map_or(&[], std::slice::from_ref)
    }

    fn is_end(&self, id: u32) -> bool {
        id == END
    }

    fn vocabulary(&self) -> u32 {
        VOCABULARY
    }

    fn longest(&self) -> usize {
        1
    }
}

/// The engine. Its state of a sequence is the tokens themselves.
#[derive(Debug)]
pub struct Echo {
    capabilities: Capabilities,
    slots: Vec<Vec<u32>>,
}

impl Echo {
    /// With room for `slots` sequences of `context_length` tokens (8,192 where not given).
    pub fn new(slots: u32, context_length: Option<u32>) -> Self {
        let slots = slots.max(1);
        let capabilities = Capabilities {
            slots,
            context_length: context_length.unwrap_or(DEFAULT_CONTEXT).max(2),
            vocabulary: VOCABULARY,
            chunk: CHUNK,
            blocks: 0,
            block_tokens: 0,
            backend: "echo (repeats the last message, no model)".into(),
            numerics: "echo-1".into(),
        };
        Self { capabilities, slots: vec![Vec::new(); slots as usize] }
    }
}

impl StepEngine for Echo {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn step(&mut self, entries: &[StepEntry], want_logits: &[usize]) -> Result<Logits, EngineError> {
        let mut wait = Duration::ZERO;
        let mut values = vec![f32::NEG_INFINITY; want_logits.len() * VOCABULARY as usize];
        let mut rows = values.chunks_exact_mut(VOCABULARY as usize);
        for (index, entry) in entries.iter().enumerate() {
            let tokens = self
                .slots
                .get_mut(entry.slot as usize)
                .filter(|tokens| tokens.len() == entry.position as usize)
                .ok_or_else(|| EngineError::Step(format!("an impossible entry: {entry:?}")))?;
            tokens.push(entry.token);
            if want_logits.contains(&index) {
                let (next, pause) = next_token(tokens);
                wait = wait.max(pause);
                if let Some(row) = rows.next() {
                    if let Some(second) = second_token(tokens) {
                        row[second as usize] = UNLIKELY;
                    }
                    row[next as usize] = 0.0;
                }
            } else if entries.get(index + 1).is_none_or(|next| next.slot != entry.slot) {
                wait = wait.max(script_of_prompt(tokens).prefill);
            }
        }
        std::thread::sleep(wait.min(LONGEST_WAIT));
        Ok(Logits::new(values, VOCABULARY as usize))
    }

    fn release(&mut self, slot: u32) {
        if let Some(tokens) = self.slots.get_mut(slot as usize) {
            tokens.clear();
        }
    }
}

/// What comes next, and after how long.
fn next_token(tokens: &[u32]) -> (u32, Duration) {
    let Some(turn) = tokens.iter().rposition(|token| *token == ASSISTANT) else { return (END, Duration::ZERO) };
    let script = script_of_prompt(&tokens[..turn]);
    let said = tokens.len() - turn - 1;
    let mut pause = script.every + if said == 0 { script.prefill } else { Duration::ZERO };
    match script.mishap {
        Some((Mishap::Stall(time), at)) if at == said => pause += time,
        Some((Mishap::Panic, at)) if at == said => panic!("the message asked for it"),
        Some((Mishap::Exit, at)) if at == said => std::process::exit(101),
        _ => {}
    }
    let total = script.text.len().saturating_mul(script.repeat);
    (if said < total { script.text[said % script.text.len()] } else { END }, pause)
}

/// What comes where the next token must not.
fn second_token(tokens: &[u32]) -> Option<u32> {
    let turn = tokens.iter().rposition(|token| *token == ASSISTANT)?;
    let Script { text, repeat, .. } = script_of_prompt(&tokens[..turn]);
    let said = tokens.len() - turn - 1;
    let ends = said >= text.len().saturating_mul(repeat);
    text.get(if ends { said } else { said + 1 }.checked_rem(text.len())?).copied()
}

#[derive(Debug, Default, PartialEq)]
struct Script {
    text: Vec<u32>,
    repeat: usize,
    every: Duration,
    prefill: Duration,
    mishap: Option<(Mishap, usize)>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Mishap {
    Stall(Duration),
    Panic,
    Exit,
}

/// What the last user message asks for.
fn script_of_prompt(tokens: &[u32]) -> Script {
    let Some(start) = tokens.iter().rposition(|token| *token == USER) else { return Script::default() };
    let text: Vec<u32> = tokens[start + 1..].iter().copied().take_while(|token| *token < TURN).collect();
    let colon = text.windows(2).position(|pair| pair == [u32::from(b':'), u32::from(b' ')]);
    let directives = colon.and_then(|colon| {
        let bytes: Vec<u8> = text[..colon].iter().map(|token| *token as u8).collect();
        Some((parse(std::str::from_utf8(&bytes).ok()?)?, colon + 2))
    });
    match directives {
        Some((script, from)) => Script { text: text[from..].to_vec(), ..script },
        None => Script { text, repeat: 1, ..Script::default() },
    }
}

/// `None` where it is anything but directives: then it is said like any other text.
fn parse(directives: &str) -> Option<Script> {
    let mut script = Script { repeat: 1, ..Script::default() };
    let mut words = directives.split_ascii_whitespace();
    let ms = |word: &str| Some(Duration::from_millis(word.strip_suffix("ms")?.parse().ok()?));
    while let Some(word) = words.next() {
        match word {
            "repeat" => script.repeat = words.next()?.parse().ok()?,
            "every" => script.every = ms(words.next()?)?,
            "prefill" => script.prefill = ms(words.next()?)?,
            "stall" | "panic" | "exit" => {
                let mishap = match word {
                    "stall" => Mishap::Stall(ms(words.next()?)?),
                    "panic" => Mishap::Panic,
                    _ => Mishap::Exit,
                };
                (words.next()? == "after").then_some(())?;
                script.mishap = Some((mishap, words.next()?.parse().ok()?));
            }
            _ => return None,
        }
    }
    Some(script)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn says(content: &str) -> String {
        let codec = EchoCodec::default();
        let message = Message { role: Role::User, content: content.into(), extra: vec![] };
        let mut tokens = codec.prompt(&[message], b"").unwrap();
        let prompt = tokens.len();
        loop {
            let (next, _) = next_token(&tokens);
            if codec.is_end(next) || tokens.len() > 10_000 {
                let bytes: Vec<u8> = tokens[prompt..].iter().flat_map(|id| codec.bytes(*id)).copied().collect();
                return String::from_utf8(bytes).unwrap();
            }
            tokens.push(next);
        }
    }

    #[test]
    fn it_says_what_was_said() {
        assert_eq!(says("héllo 😀"), "héllo 😀");
        assert_eq!(says(""), "");
        assert_eq!(says("note: not a directive"), "note: not a directive");
        assert_eq!(says("repeat 3: ab "), "ab ab ab ");
        assert_eq!(says("repeat x: ab"), "repeat x: ab");
    }

    #[test]
    fn directives_are_understood() {
        let script = parse("repeat 500 every 20ms prefill 300ms stall 5000ms after 10").unwrap();
        assert_eq!(script.repeat, 500);
        assert_eq!(script.every, Duration::from_millis(20));
        assert_eq!(script.prefill, Duration::from_millis(300));
        assert_eq!(script.mishap, Some((Mishap::Stall(Duration::from_secs(5)), 10)));
        assert!(parse("every 20").is_none());
    }
}
