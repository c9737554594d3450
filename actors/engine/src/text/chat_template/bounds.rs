//! Bounds for what a chat template may do. It comes with a model file, so it is a program of somebody else's.
//!
//! minijinja's fuel pays for every instruction and every byte of a new string, but not for values that hold the same
//! value many times (`[a, a]` of `[b, b]` of …, whose text has 2ⁿ bytes) or hold themselves (a namespace put into
//! itself): printing, comparing or hashing one of those ends in an endless loop or an overflowed stack. So behind each
//! instruction that makes a value out of others we put a check of what it made: how much it weighs written out, how
//! deep it nests, and that a namespace, the only value that can change, lies in nothing else. What the checks let pass
//! can be walked by anything.

use std::time::{Duration, Instant};

use minijinja::machinery::{Instruction, Instructions, Token, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{ArgType, DynObject, ObjectRepr, Rest, Tuple, Value, ValueOrKwargs};
use minijinja::{Environment, Error, ErrorKind, State};

/// The most bytes of a template; the longest known has some 30 KiB.
const MAX_SOURCE: usize = 256 << 10;
/// The most tokens of one tag, so that its expressions cannot nest deeper than the stack allows.
const MAX_TAG: usize = 1024;
/// The most `elif`s, each of which nests one deeper.
const MAX_ELIF: usize = 256;
/// The most that a value may weigh: bytes of all its texts, written out, and [`SLOT`] for each entry.
const MAX_WEIGHT: usize = 16 << 20;
/// What an entry of a list or map weighs.
const SLOT: usize = 32;
/// The most characters of a number, written out.
const NUMBER: usize = 512;
/// How deep lists and maps may nest. The JSON of a request nests 128 deep at most.
const MAX_DEPTH: usize = 160;
/// How long a rendering may take, for what no fuel pays: comparing and sorting large values again and again.
const TIME: Duration = Duration::from_secs(5);

/// Filters that give texts, numbers, or a part of what they get.
const PART: &[&str] = &[
    "abs",
    "attr",
    "bool",
    "capitalize",
    "count",
    "d",
    "default",
    "e",
    "escape",
    "first",
    "float",
    "format",
    "indent",
    "int",
    "join",
    "last",
    "length",
    "lower",
    "max",
    "min",
    "pprint",
    "replace",
    "round",
    "safe",
    "string",
    "title",
    "tojson",
    "trim",
    "upper",
];
/// Filters that give some of the entries that they get.
const SOME: &[&str] = &["list", "reject", "rejectattr", "reverse", "select", "selectattr", "sort", "unique"];

/// Tests and filters of the checks. Templates may call them by these names too, which does them no good.
const TIMED: &str = "ingle_timed";
const LAZY: &str = "ingle_lazy";
const LIGHT: &str = "ingle_light";
const STORABLE: &str = "ingle_storable";
const LISTED: &str = "ingle_listed";

/// Adds the checks to an environment.
pub(super) fn install(environment: &mut Environment<'_>) {
    environment.add_test(TIMED, |state: &mut State, _: &Value| in_time(state).map(|()| true));
    environment.add_test(LAZY, |state: &mut State, value: &Value| in_time(state).map(|()| is_lazy(value)));
    environment.add_test(LIGHT, |state: &mut State, value: &Value| {
        in_time(state)?;
        weigh(value, Holds::Itself)?;
        Ok::<_, Error>(is_lazy(value))
    });
    environment.add_test(STORABLE, |value: &Value| weigh(value, Holds::Plain).map(|()| true));
    environment.add_filter(LISTED, listed);
    environment.add_filter("format", format);
    environment.set_unknown_method_callback(method);
    environment.add_global("ingle_one", 1);
    // It prints all variables at once, however often they hold the same.
    environment.remove_global("debug");
}

/// The source as it may be compiled: one that would nest too deep is refused, and products get a factor of one that
/// is no constant. The compiler works out constants by itself, and `[1] * 1000000000000 == …` would keep it busy.
pub(super) fn check_source(source: &str, syntax: &SyntaxConfig) -> Result<String, String> {
    if source.len() > MAX_SOURCE {
        return Err(format!("it has {} bytes, where {MAX_SOURCE} are possible", source.len()));
    }
    let mut out = String::with_capacity(source.len());
    let (mut in_tag, mut elifs, mut taken) = (0, 0, 0);
    let mut operand = false;
    for token in tokenize(source, false, syntax.clone()) {
        let Ok((token, span)) = token else { break }; // The parser says it better.
        match token {
            Token::VariableStart | Token::BlockStart => in_tag = 0,
            Token::Ident("elif") => elifs += 1,
            // Else it spreads a list over arguments.
            Token::Mul if operand => {
                let end = span.end_offset as usize;
                out.push_str(source.get(taken..end).ok_or("its tags cannot be told apart")?);
                out.push_str(" ingle_one *");
                taken = end;
            }
            _ => {}
        }
        in_tag += 1;
        operand = !matches!(token, Token::ParenOpen | Token::BracketOpen | Token::Comma);
        if in_tag > MAX_TAG {
            return Err(format!("one of its tags has more than {MAX_TAG} words and signs"));
        }
        if elifs > MAX_ELIF {
            return Err(format!("it has more than {MAX_ELIF} elif"));
        }
    }
    out.push_str(source.get(taken..).ok_or("its tags cannot be told apart")?);
    Ok(out)
}

/// The same instructions with a check behind each that makes a value.
pub(super) fn checked<'s>(from: &Instructions<'s>) -> Result<Instructions<'s>, String> {
    let count = (0..).take_while(|at| from.get(*at).is_some()).count() as u32;
    let get = |at| from.get(at).into_iter();
    // Where each instruction goes to; jumps may lead behind the last one.
    let mut places = Vec::with_capacity(count as usize + 1);
    let mut place = 0;
    for instruction in (0..count).flat_map(get) {
        match instruction {
            // It would keep what it is given, a loop that keeps itself for ever.
            Instruction::CallMethod("changed", _) => return Err("loop.changed is not supported".into()),
            // minijinja divides by their number.
            Instruction::CallMethod("cycle", None | Some(0 | 1)) => return Err("loop.cycle needs values".into()),
            _ => places.push(place),
        }
        let (before, behind) = checks(instruction, 0);
        place += (before.len() + 1 + behind.len()) as u32;
    }
    places.push(place);
    let mut out = Instructions::new(from.name(), from.source());
    for (at, instruction) in (0..count).flat_map(|at| get(at).map(move |instruction| (at, instruction))) {
        let mut add = |instruction| match (from.get_span(at), from.get_line(at)) {
            (Some(span), _) => out.add_with_span(instruction, span),
            (None, Some(line)) => out.add_with_line(instruction, line.min(u16::MAX.into()) as u16),
            (None, None) => out.add(instruction),
        };
        let next = places[at as usize + 1];
        let (before, behind) = checks(instruction, next);
        for check in before {
            add(check);
        }
        let mut moved = instruction.clone();
        if let Some(target) = target(&mut moved) {
            *target = places.get(*target as usize).copied().unwrap_or(place);
        }
        add(moved);
        for check in behind {
            add(check);
        }
    }
    Ok(out)
}

/// Where an instruction leads to, if it leads away.
fn target<'i>(instruction: &'i mut Instruction<'_>) -> Option<&'i mut u32> {
    match instruction {
        Instruction::Jump(target)
        | Instruction::JumpIfFalse(target)
        | Instruction::JumpIfFalseOrPop(target)
        | Instruction::JumpIfTrueOrPop(target)
        | Instruction::Iterate(target)
        | Instruction::BuildMacro(_, target, _) => Some(target),
        _ => None,
    }
}

/// What to put before and behind an instruction; `next` is the place of the one that follows in the source.
fn checks(instruction: &Instruction<'_>, next: u32) -> (Vec<Instruction<'static>>, Vec<Instruction<'static>>) {
    use Instruction::*;
    let test = |name| PerformTest(name, Some(1), !0);
    let timed = || (vec![], vec![DupTop, test(TIMED), DiscardTop]);
    // A lazy value becomes a list, so that one of another of another does not nest unseen.
    let made = |name| (vec![], vec![DupTop, test(name), JumpIfFalse(next), ApplyFilter(LISTED, Some(1), !0)]);
    match instruction {
        // Named arguments are no value yet, and those that are constants are no larger than they were written.
        LoadConst(value) if value.as_object().is_some_and(|object| !object.type_name().contains("Kwargs")) => {
            made(LIGHT)
        }
        BuildMap(_) | BuildList(_) | BuildTuple(_) | Add | Mul => made(LIGHT),
        CallFunction(..) | CallObject(_) => made(LIGHT),
        CallMethod("get" | "strip" | "lstrip" | "rstrip" | "replace" | "startswith" | "endswith", _) => timed(),
        CallMethod(..) => made(LIGHT),
        ApplyFilter(name, ..) if PART.contains(name) => timed(),
        ApplyFilter(name, ..) if SOME.contains(name) => made(LAZY),
        ApplyFilter(..) => made(LIGHT),
        Slice => made(LAZY),
        StringConcat
        | Eq
        | Ne
        | Gt
        | Gte
        | Lt
        | Lte
        | In
        | CompareAndPreserve(_)
        | PerformTest(..)
        | GetItem
        | Iterate(_) => timed(),
        // The value lies below the namespace.
        SetAttr(_) => (vec![Swap, DupTop, test(STORABLE), DiscardTop, Swap], vec![]),
        _ => (vec![], vec![]),
    }
}

/// Python's methods. Those that no fuel pays for before they have made their value get only what they can bear.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let length = value.as_str().map_or(0, str::len);
    match name {
        "format" => check_format(value, args)?,
        "split" | "splitlines" if length > MAX_WEIGHT / SLOT => {
            return Err(too_much("it takes a text apart that is too large"));
        }
        _ => {}
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

/// minijinja's filter, for what can be borne.
fn format(state: &mut State, text: &Value, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let args: Vec<Value> = args.0.into_iter().map(ValueOrKwargs::into_value).collect();
    check_format(text, &args)?;
    let args = args.iter().map(|arg| ValueOrKwargs::from_value(Some(arg))).collect::<Result<Vec<_>, _>>()?;
    minijinja::filters::format(state, text, Rest(args))
}

/// Refuses a format whose result might be too large: each field may be as wide as the numbers in the format say and
/// hold any of the arguments.
fn check_format(text: &Value, args: &[Value]) -> Result<(), Error> {
    let Some(text) = text.as_str() else { return Ok(()) };
    let fields = text.bytes().filter(|byte| matches!(byte, b'{' | b'%')).count();
    let numbers = text.split(|character: char| !character.is_ascii_digit()).filter(|digits| !digits.is_empty());
    let wide = numbers.map(|digits| digits.parse().unwrap_or(usize::MAX)).fold(0, usize::saturating_add);
    let mut largest = NUMBER;
    for arg in args {
        let mut rest = MAX_WEIGHT;
        weigh_entry(arg, MAX_DEPTH, &mut rest)?;
        largest = largest.max(MAX_WEIGHT - rest);
    }
    match fields.saturating_mul(largest).saturating_add(wide) <= MAX_WEIGHT {
        true => Ok(()),
        false => Err(too_much("it formats a text that would be too large")),
    }
}

fn too_much(what: &str) -> Error {
    Error::new(ErrorKind::OutOfFuel, what.to_string())
}

fn in_time(state: &mut State) -> Result<(), Error> {
    let begin = state.get_or_insert_extension_with(|| Begin(Instant::now()));
    if begin.0.elapsed() <= TIME { Ok(()) } else { Err(too_much("it takes too long")) }
}

/// When the first check of a rendering came.
struct Begin(Instant);

/// What a value may be or hold.
#[derive(Clone, Copy, PartialEq)]
enum Holds {
    /// It may be a namespace or a loop.
    Itself,
    /// Neither.
    Plain,
}

/// Namespaces change, and a loop shows other entries in each round: what held one would weigh what was never weighed.
/// The types are private to minijinja, so their names must do; tests fail where they change.
fn changes(object: &DynObject) -> bool {
    matches!(object.type_name().rsplit("::").next(), Some("Namespace" | "Loop"))
}

/// Is made of others each time it is walked.
fn is_lazy(value: &Value) -> bool {
    let Some(object) = value.as_object() else { return false };
    match object.repr() {
        ObjectRepr::Plain => false,
        ObjectRepr::Map => !changes(object) && !object.type_name().contains("IndexMap"),
        _ => value.downcast_object_ref::<Vec<Value>>().is_none() && value.downcast_object_ref::<Tuple>().is_none(),
    }
}

/// A lazy value, made once and for all. It was weighed.
fn listed(value: &Value) -> Result<Value, Error> {
    match value.as_object() {
        Some(object) if object.repr() == ObjectRepr::Map => {
            Ok(Value::from_pairs(object.try_iter_pairs().into_iter().flatten()))
        }
        _ => value.try_iter()?.checked().collect::<Result<Vec<_>, _>>().map(Value::from),
    }
}

/// Refuses a value that weighs too much, nests too deep, or holds what may change.
fn weigh(value: &Value, holds: Holds) -> Result<(), Error> {
    let Some(object) = value.as_object() else { return Ok(()) };
    if holds == Holds::Plain && changes(object) {
        return Err(Error::new(ErrorKind::InvalidOperation, "a namespace cannot hold a namespace or a loop"));
    }
    let mut rest = MAX_WEIGHT;
    weigh_object(object, MAX_DEPTH, &mut rest)
}

fn weigh_object(object: &DynObject, depth: usize, rest: &mut usize) -> Result<(), Error> {
    if depth == 0 {
        return Err(too_much("it makes a value that nests too deep"));
    }
    if let Some(items) = object.downcast_ref::<Vec<Value>>() {
        return items.iter().try_for_each(|item| weigh_entry(item, depth, rest));
    }
    match object.repr() {
        ObjectRepr::Plain => Ok(()),
        ObjectRepr::Map => object.try_iter_pairs().into_iter().flatten().try_for_each(|(key, value)| {
            weigh_entry(&key, depth, rest)?;
            weigh_entry(&value, depth, rest)
        }),
        _ => object.try_iter().into_iter().flatten().try_for_each(|item| weigh_entry(&item, depth, rest)),
    }
}

fn weigh_entry(value: &Value, depth: usize, rest: &mut usize) -> Result<(), Error> {
    let bytes = value.as_bytes().map_or(0, <[u8]>::len);
    *rest = rest.checked_sub(SLOT + bytes).ok_or_else(|| too_much("it makes a value that is too large"))?;
    match value.as_object() {
        Some(object) if changes(object) => {
            Err(Error::new(ErrorKind::InvalidOperation, "a list or map cannot hold a namespace or a loop"))
        }
        Some(object) => weigh_object(object, depth - 1, rest),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
