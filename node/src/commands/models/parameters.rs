//! `ingle models show` and `ingle models set`.

use std::time::Duration;

use ingle_actors::node::{
    Change, GivenParameters, ModelDetails, ModelParameters, Outcome, Parameter, ParameterChanges, ParameterValue,
    ShownParameters, Source, set_offline, show_offline,
};
use serde_json::json;

use super::registry::{about, ask, keep_alive_seconds};
use crate::cli::{SetParameters, ShowParameters};
use crate::commands::{explain_error, unexpected};
use crate::config::Settings;
use crate::control::{Client, ControlError, ModelsReply, ModelsRequest, Reply, Request};
use crate::exit::UsageError;
use crate::output::{complain, print};

/// A node that says nothing for so long hangs: it says how far it is every few seconds.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);
/// What takes a parameter back.
const DEFAULT: &str = "default";

/// Shows what holds: for the running node, or where none runs for its next start.
pub async fn show(settings: &Settings, options: ShowParameters) -> anyhow::Result<()> {
    let request = Request::Models(ModelsRequest::Show { model: options.model.clone() });
    let ModelDetails { parameters, model } = match Client::ask(&settings.state_dir, &request).await {
        Ok(mut client) => match client.next(SILENCE_LIMIT).await? {
            Reply::Models(reply) => match *reply {
                ModelsReply::Details(details) => details,
                _ => return Err(unexpected()),
            },
            _ => return Err(unexpected()),
        },
        Err(ControlError::NoNode) => {
            complain("No node runs here now: this is what its next start takes.");
            let (state_dir, model) = (&settings.state_dir, settings.model.as_ref());
            let shown = show_offline(state_dir, model, &settings.parameters, &options.model)?;
            ModelDetails { parameters: Some(shown), model: None }
        }
        Err(error) => return Err(explain_error(settings, error)),
    };
    if options.json {
        let name = model.as_ref().map(|model| &model.name).or(parameters.as_ref().map(|shown| &shown.model));
        let shown = parameters.as_ref().map(|shown| shown.parameters.as_slice()).unwrap_or_default();
        let all = json!({ "model": name, "parameters": shown, "registry": model });
        return print(&format!("{}\n", serde_json::to_string_pretty(&all)?));
    }
    let known = model.filter(|model| model.registered).map(|model| about(&model)).unwrap_or_default();
    print(&(parameters.as_ref().map(table).unwrap_or_default() + &known))
}

/// Sets parameters and waits until they hold.
pub async fn set(settings: &Settings, mut options: SetParameters) -> anyhow::Result<()> {
    let requests = of_the_registry(&options.model, &mut options.values)?;
    let changes = changes(&options.values)?;
    let is_done = changes.is_empty() && !requests.is_empty();
    for request in requests {
        let ModelsReply::Changed = ask(settings, request).await? else { return Err(unexpected()) };
    }
    if is_done && options.json {
        return print(&format!("{}\n", json!({ "model": options.model, "outcome": Outcome::Live })));
    }
    if is_done {
        return print("Set for all nodes. `ingle models status` shows when a model has it.\n");
    }
    let request =
        Request::SetParameters { model: options.model.clone(), changes: changes.clone(), restart: options.restart };
    let outcome = match Client::ask(&settings.state_dir, &request).await {
        Ok(mut client) => loop {
            match client.next(SILENCE_LIMIT).await? {
                Reply::Progress(text) => complain(&text),
                Reply::ParametersSet(outcome) => break outcome,
                _ => return Err(unexpected()),
            }
        },
        Err(ControlError::NoNode) => {
            let (state_dir, model) = (&settings.state_dir, settings.model.as_ref());
            set_offline(state_dir, model, &settings.parameters, &options.model, &changes)?;
            Outcome::Stored
        }
        Err(error) => return Err(explain_error(settings, error)),
    };
    if options.json {
        return print(&format!("{}\n", json!({ "model": options.model, "outcome": outcome })));
    }
    print(&format!("{}\n", in_words(outcome)))
}

/// Takes one value out of those that are typed.
pub(super) fn take(values: &mut Vec<String>, name: &str) -> Option<String> {
    let index = values.iter().position(|text| text.split_once('=').is_some_and(|(known, _)| known == name))?;
    values.remove(index).split_once('=').map(|(_, value)| value.to_owned())
}

/// What is no parameter of an engine, and is set like one: how long a model stays, and the format of its weights.
fn of_the_registry(model: &str, values: &mut Vec<String>) -> Result<Vec<ModelsRequest>, UsageError> {
    let given = |value: String| Some(value).filter(|value| value != DEFAULT);
    let mut requests = Vec::new();
    if let Some(value) = take(values, "keep_alive") {
        let keep_alive = given(value).as_deref().map(keep_alive_seconds).transpose()?;
        requests.push(ModelsRequest::KeepAlive { model: model.to_owned(), keep_alive });
    }
    if let Some(value) = take(values, "quantization") {
        requests.push(ModelsRequest::Quantization { model: model.to_owned(), to: given(value) });
    }
    Ok(requests)
}

pub(super) fn changes(values: &[String]) -> Result<ParameterChanges, UsageError> {
    let mut changes = ParameterChanges::new();
    for text in values {
        let (name, value) = text
            .split_once('=')
            .ok_or_else(|| UsageError(format!("`{text}` sets nothing: write it as in `max_tokens=400`.")))?;
        let parameter: Parameter = name.parse().map_err(|error| UsageError(format!("{error}.")))?;
        let value = (value != DEFAULT).then(|| ParameterValue::from(value));
        if changes.insert(parameter, value).is_some() {
            return Err(UsageError(format!("{parameter} is given twice.")));
        }
    }
    // What no engine could have needs no node to be refused.
    let possible = GivenParameters::default().with(&changes).over(ModelParameters::default());
    possible.map_err(|error| UsageError(format!("{error}.")))?;
    Ok(changes)
}

fn in_words(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Unchanged => "These values hold already; nothing had to change.",
        Outcome::Live => "Set: the running engine has taken it.",
        Outcome::Moved => "Set: another engine has taken over, without a gap. The one before finishes its answers.",
        Outcome::Restarted => "Set: the engine finished its answers and was started anew.",
        Outcome::Stored => "Set: it holds when the model starts.",
    }
}

fn table(shown: &ShownParameters) -> String {
    let mut text = format!("{}\n\n{:<16}{:<12}{:<9}CHANGE\n", shown.model, "PARAMETER", "VALUE", "FROM");
    for parameter in &shown.parameters {
        let source = match parameter.source {
            Source::Set => "set",
            Source::Config => "config",
            Source::Default => "default",
        };
        let change = match parameter.change {
            Change::Reload => "reload",
            Change::Live | Change::Nothing => "live",
        };
        let note = if parameter.note.is_empty() { String::new() } else { format!(" ({})", parameter.note) };
        text +=
            &format!("{:<16}{:<12}{source:<9}{change}{note}\n", parameter.name.as_str(), parameter.value.to_string());
    }
    text
}

#[cfg(test)]
mod tests {
    use ingle_actors::node::ShownParameter;

    use super::*;

    fn parsed(values: &[&str]) -> Result<ParameterChanges, String> {
        changes(&values.iter().map(|value| (*value).to_owned()).collect::<Vec<_>>()).map_err(|error| error.0)
    }

    #[test]
    fn what_is_typed_is_understood_or_named() {
        let changes = parsed(&["max_tokens=40", "kv_type=int8", "threads=default", "kv_memory_mib=none"]).unwrap();
        assert_eq!(changes[&Parameter::MaxTokens], Some(ParameterValue::Number(40)));
        assert_eq!(changes[&Parameter::KvType], Some(ParameterValue::Word("int8".into())));
        assert_eq!(changes[&Parameter::Threads], None);
        assert_eq!(changes[&Parameter::KvMemoryMib], Some(ParameterValue::Word("none".into())));
        assert!(parsed(&["max_tokens"]).unwrap_err().contains("`max_tokens` sets nothing"));
        assert!(parsed(&["tokens=3"]).unwrap_err().contains("no parameter `tokens`"));
        assert!(parsed(&["batch_size=none"]).unwrap_err().contains("batch_size is none"));
        assert!(parsed(&["threads=3", "threads=4"]).unwrap_err().contains("threads is given twice"));
    }

    #[test]
    fn the_table_says_value_source_and_change() {
        let shown = |name, value: &str, source, change, note: &str| ShownParameter {
            name,
            value: value.into(),
            source,
            change,
            note: note.into(),
        };
        let shown = ShownParameters {
            model: "m".into(),
            parameters: vec![
                shown(Parameter::BatchSize, "4", Source::Set, Change::Live, "up to 16, reload above"),
                shown(Parameter::KvType, "int8", Source::Config, Change::Reload, ""),
            ],
        };
        assert_eq!(
            table(&shown),
            "m\n\nPARAMETER       VALUE       FROM     CHANGE\n\
             batch_size      4           set      live (up to 16, reload above)\n\
             kv_type         int8        config   reload\n"
        );
    }
}
