//! `ingle models add --discover`: servers on this machine, offered as endpoints.

use std::collections::BTreeSet;
use std::io::{BufRead, IsTerminal, Write};

use anyhow::anyhow;
use ingle_actors::node::{GivenParameters, Registration};
use ingle_actors::protocol::registry::{Endpoint, ModelType};
use ingle_actors::registry::{RegistryStatus, ShownModel};
use ingle_actors::worker::endpoint::{FoundServer, USUAL_PORTS, discover};
use serde::Serialize;

use super::registry::ask;
use crate::cli::AddModel;
use crate::commands::unexpected;
use crate::config::Settings;
use crate::control::{ModelsReply, ModelsRequest};
use crate::exit::UsageError;
use crate::output::{complain, print};

/// A model that could be registered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Offer {
    /// The name that it would have here; none where the server wants a key first.
    name: Option<String>,
    /// Its name there.
    model: Option<String>,
    /// What answers for it.
    server: String,
    /// Where.
    endpoint: String,
    /// The server says what it has to those with a key only.
    needs_key: bool,
    /// What registers it.
    command: String,
    /// The name under which the household has it already.
    known_as: Option<String>,
    /// It was registered just now.
    added: bool,
    /// Why not, where it was to be.
    error: Option<String>,
}

/// Looks, offers, and registers what is wanted.
pub async fn run(settings: &Settings, options: AddModel) -> anyhow::Result<()> {
    let AddModel { port, values: wanted, yes, json, pin, .. } = options;
    if let Some(value) = wanted.iter().find(|value| value.contains('=')) {
        return Err(UsageError(format!("`{value}` is a parameter: --discover takes names of models.")).into());
    }
    let ports = if port.is_empty() { USUAL_PORTS.to_vec() } else { port };
    let found = discover(&ports).await;
    // Without a node one sees what there is all the same.
    let (status, no_node) = match ask(settings, ModelsRequest::Status).await {
        Ok(ModelsReply::Status(status)) => (Some(status), None),
        Ok(_) => (None, Some(unexpected())),
        Err(error) => (None, Some(error)),
    };
    let mut offers = offers_of(&found, status.as_ref());
    if let Some(unknown) = wanted.iter().find(|name| !offers.iter().any(|offer| offer.is_called(name))) {
        let names: Vec<&str> = offers.iter().filter_map(|offer| offer.name.as_deref()).collect();
        let there = if names.is_empty() { "nothing".to_owned() } else { names.join(", ") };
        return Err(anyhow!("There is no model `{unknown}` on this machine; found was {there}."));
    }
    let asks = wanted.is_empty() && !yes && !json && std::io::stdin().is_terminal() && std::io::stderr().is_terminal();
    let is_new = |offer: &Offer| offer.name.is_some() && offer.known_as.is_none();
    if let Some(error) = no_node {
        if yes || !wanted.is_empty() {
            return Err(error);
        }
        complain(&format!("notice: nothing can be registered now: {error:#}"));
    }
    if asks && status.is_some() {
        let mut asking = Asking::default();
        for offer in offers.iter_mut().filter(|offer| is_new(offer)) {
            if asking.wants(offer)? {
                register(settings, offer, &pin).await;
                complain(&offer.outcome());
            }
        }
    } else {
        let named = |offer: &Offer| wanted.iter().any(|name| offer.is_called(name));
        for offer in offers.iter_mut().filter(|offer| is_new(offer) && (yes || named(offer))) {
            register(settings, offer, &pin).await;
        }
    }
    let failed = offers.iter().filter(|offer| offer.error.is_some()).count();
    if json {
        print(&format!("{}\n", serde_json::to_string_pretty(&offers)?))?;
    } else if !asks || status.is_none() || !offers.iter().any(is_new) {
        print(&rendered(&offers, &ports))?;
    }
    if failed > 0 { Err(anyhow!("{failed} of the models could not be registered.")) } else { Ok(()) }
}

async fn register(settings: &Settings, offer: &mut Offer, pins: &[String]) {
    let Some(name) = offer.name.clone() else { return };
    let endpoint = Endpoint { url: offer.endpoint.clone(), model: offer.model.clone(), api_key_env: None };
    let registration = Registration {
        name,
        kind: ModelType::Llm,
        source: None,
        endpoint: Some(endpoint),
        sha256: None,
        keep_alive: None,
        parameters: GivenParameters::default(),
        quantization: None,
        pins: pins.to_vec(),
        unchecked: false,
    };
    match ask(settings, ModelsRequest::Add(registration)).await {
        Ok(ModelsReply::Added(_)) => offer.added = true,
        Ok(_) => offer.error = Some("the node said something unexpected".into()),
        Err(error) => offer.error = Some(error.to_string()),
    }
}

impl Offer {
    fn is_called(&self, name: &str) -> bool {
        self.name.as_deref() == Some(name) || self.model.as_deref() == Some(name)
    }

    /// In a line.
    fn outcome(&self) -> String {
        let name = self.name.as_deref().unwrap_or_default();
        match (&self.error, self.added) {
            (Some(why), _) => format!("`{name}` is not registered: {why}"),
            (None, true) => format!("Registered `{name}` on all nodes."),
            (None, false) => String::new(),
        }
    }
}

/// Whether the household has this model of this server already: its name.
fn known_as<'a>(models: &'a [ShownModel], url: &str, there: &str) -> Option<&'a str> {
    let known = models.iter().find(|model| match &model.endpoint {
        Some(endpoint) => endpoint.url == url && endpoint.model.as_deref().is_none_or(|model| model == there),
        // One that was given to a node when that was started: its node says where it is.
        None => model.nodes.iter().any(|on| {
            let at = on.backend.strip_prefix("endpoint (").and_then(|rest| rest.strip_prefix(url));
            let is_there = at.is_some_and(|rest| rest.starts_with([',', ')']));
            is_there && (model.name == there || there.contains(&model.name) || model.name.contains(there))
        }),
    });
    known.map(|model| model.name.as_str())
}

/// The first of `name`, `name-ollama`, `name-ollama-2` … that is free.
fn free_name(name: &str, server: &str, taken: &BTreeSet<String>) -> String {
    let suffix = match server.split(' ').next().unwrap_or_default() {
        "LM" => "lmstudio".to_owned(),
        "a" => "endpoint".to_owned(),
        program => program.to_lowercase().replace('.', ""),
    };
    let second = format!("{name}-{suffix}");
    let numbered = (2u32..).map(|number| format!("{second}-{number}"));
    let mut names = [name.to_owned(), second.clone()].into_iter().chain(numbered);
    names.find(|name| !taken.contains(name)).unwrap_or(second)
}

fn offers_of(found: &[FoundServer], status: Option<&RegistryStatus>) -> Vec<Offer> {
    let models: &[ShownModel] = status.map_or(&[], |status| &status.models);
    let mut taken: BTreeSet<String> = models.iter().map(|model| model.name.clone()).collect();
    let mut offers = Vec::new();
    for server in found {
        let offer = |name: Option<String>, model: Option<String>, known_as: Option<String>| Offer {
            command: command(name.as_deref(), &server.url, model.as_deref()),
            name,
            model,
            server: server.program.clone(),
            endpoint: server.url.clone(),
            needs_key: server.needs_key,
            known_as,
            added: false,
            error: None,
        };
        if server.needs_key {
            offers.push(offer(None, None, None));
        }
        for model in &server.models {
            let known = known_as(models, &server.url, &model.there).map(str::to_owned);
            let name = known.clone().unwrap_or_else(|| free_name(&model.here, &server.program, &taken));
            taken.insert(name.clone());
            offers.push(offer(Some(name), Some(model.there.clone()), known));
        }
    }
    offers
}

/// What to type.
fn command(name: Option<&str>, url: &str, model: Option<&str>) -> String {
    let name = name.unwrap_or("NAME");
    match model {
        Some(model) => format!("ingle models add --name {name} --endpoint {url} --model {}", quoted(model)),
        None => format!("ingle models add --name {name} --endpoint {url} --model MODEL --api-key-env VARIABLE"),
    }
}

/// As a shell takes it for one word. What steers a terminal is left out: a stranger wrote it.
fn quoted(text: &str) -> String {
    let text: String = text.chars().filter(|c| !c.is_control()).collect();
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-:/@+".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text;
    }
    format!("'{}'", text.replace('\'', "'\\''"))
}

fn rendered(offers: &[Offer], ports: &[u16]) -> String {
    if offers.is_empty() {
        let ports = ports.iter().map(u16::to_string).collect::<Vec<_>>().join(", ");
        return format!(
            "No server that speaks OpenAI's HTTP was found on this machine (looked at the ports {ports}).\n"
        );
    }
    let mut text = String::new();
    let mut at = "";
    for offer in offers {
        if at != offer.endpoint {
            at = &offer.endpoint;
            text += &format!("{}{} at {at}\n", if text.is_empty() { "" } else { "\n" }, offer.server);
        }
        let name = offer.name.as_deref().unwrap_or_default();
        text += &match (&offer.known_as, offer.needs_key) {
            (_, true) => format!(
                "  it wants a key: put it into a variable where the node is started, and type\n    {}\n",
                offer.command
            ),
            (Some(known), _) => format!("  {known}: registered already, or a node's own\n"),
            (None, false) if offer.added || offer.error.is_some() => format!("  {}\n", offer.outcome()),
            (None, false) => format!("  {name}\n    {}\n", offer.command),
        };
    }
    text
}

/// What a person answered so far.
#[derive(Debug, Default)]
struct Asking {
    all: bool,
    none: bool,
}

impl Asking {
    /// Asks about one model.
    fn wants(&mut self, offer: &Offer) -> anyhow::Result<bool> {
        if self.all || self.none {
            return Ok(self.all);
        }
        let name = offer.name.as_deref().unwrap_or_default();
        let mut err = std::io::stderr().lock();
        write!(err, "Register `{name}` ({} at {})? [y]es, [n]o, [a]ll, [q]uit: ", offer.server, offer.endpoint)?;
        err.flush()?;
        let mut line = String::new();
        if std::io::stdin().lock().read_line(&mut line)? == 0 {
            line = "q".into();
        }
        Ok(self.understand(&line))
    }

    fn understand(&mut self, line: &str) -> bool {
        let answer = line.trim().to_lowercase();
        self.all |= matches!(answer.as_str(), "a" | "all");
        self.none |= matches!(answer.as_str(), "q" | "quit");
        self.all || matches!(answer.as_str(), "y" | "yes")
    }
}

#[cfg(test)]
mod tests {
    use ingle_actors::registry::{OnNode, ShownEndpoint};
    use ingle_actors::worker::endpoint::FoundName;

    use super::*;

    fn server(program: &str, port: u16, models: &[&str]) -> FoundServer {
        let models = models.iter().map(|name| FoundName { there: (*name).into(), here: (*name).into() }).collect();
        FoundServer { program: program.into(), url: format!("http://127.0.0.1:{port}"), needs_key: false, models }
    }

    fn shown(name: &str, endpoint: Option<ShownEndpoint>, backend: &str) -> ShownModel {
        ShownModel {
            name: name.into(),
            kind: Some(ModelType::Llm),
            registered: endpoint.is_some(),
            is_default: false,
            source: None,
            endpoint,
            sha256: None,
            keep_alive_s: None,
            pinned: vec![],
            parameters: Default::default(),
            changed_by: None,
            changed_ms: None,
            overruled: vec![],
            nodes: vec![OnNode {
                node: "tower".into(),
                state: "ready".into(),
                backend: backend.into(),
                running: 0,
                waiting: 0,
                placement: None,
            }],
        }
    }

    fn names(offers: &[Offer]) -> Vec<(&str, Option<&str>)> {
        offers.iter().map(|offer| (offer.name.as_deref().unwrap_or("-"), offer.known_as.as_deref())).collect()
    }

    #[test]
    fn every_model_is_offered_under_a_name_that_nobody_has() {
        let found = [
            server("Ollama 0.5.1", 11434, &["llama3", "qwen"]),
            server("llama.cpp b1", 8080, &["llama3"]),
            server("llama.cpp b1", 8081, &["llama3"]),
            server("llama.cpp b1", 8082, &["llama3"]),
        ];
        let endpoint =
            ShownEndpoint { url: "http://127.0.0.1:11434".into(), model: Some("qwen".into()), api_key_env: None };
        let models = vec![
            shown("mine", Some(endpoint), ""),
            shown("llama3", None, "cpu"),
            shown("llama3-x", None, "endpoint (http://127.0.0.1:80, vLLM)"),
        ];
        let status = RegistryStatus { default: None, default_overruled: vec![], models };
        let offers = offers_of(&found, Some(&status));
        assert_eq!(
            names(&offers),
            [
                ("llama3-ollama", None),
                ("mine", Some("mine")),
                ("llama3-llamacpp", None),
                ("llama3-llamacpp-2", None),
                ("llama3-llamacpp-3", None),
            ]
        );
        assert_eq!(
            offers[0].command,
            "ingle models add --name llama3-ollama --endpoint http://127.0.0.1:11434 --model llama3"
        );
        // One that a node was started with is known by its address.
        let given = vec![shown("llama3", None, "endpoint (http://127.0.0.1:8080, llama.cpp b1)")];
        let status = RegistryStatus { models: given, ..status };
        assert_eq!(names(&offers_of(&found[1..2], Some(&status))), [("llama3", Some("llama3"))]);
        assert_eq!(names(&offers_of(&found[2..3], Some(&status))), [("llama3-llamacpp", None)]);
    }

    #[test]
    fn what_is_printed_can_be_typed() {
        assert_eq!(quoted("llama3.2:3b"), "llama3.2:3b");
        assert_eq!(quoted("a b'; rm -rf /\u{1b}[2J"), "'a b'\\''; rm -rf /[2J'");
        let locked = FoundServer { needs_key: true, ..server("vLLM 0.6", 8000, &[]) };
        let offers = offers_of(&[locked, server("Ollama", 11434, &["qwen"])], None);
        let text = rendered(&offers, &USUAL_PORTS);
        for part in [
            "vLLM 0.6 at http://127.0.0.1:8000\n  it wants a key",
            "--api-key-env VARIABLE\n\nOllama at http://127.0.0.1:11434\n  qwen\n    ingle models add --name qwen",
        ] {
            assert!(text.contains(part), "{text}");
        }
        assert!(rendered(&[], &[1, 2]).contains("the ports 1, 2"));
    }

    #[test]
    fn answers_are_understood() {
        let mut asking = Asking::default();
        assert!(asking.understand("Y\n") && !asking.understand("n") && !asking.understand("\n"));
        assert!(asking.understand("all\n") && asking.all);
        assert!(!Asking::default().understand("q"));
    }
}
