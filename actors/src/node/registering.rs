//! The household's models, as commands change and show them.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use ingle_engine::quantize::Target;
use ingle_protocol::names::{check_model, near};
use ingle_protocol::registry::{
    Endpoint, KeepAlive, ModelType, NewModel, Origin, Record, Registry, Source as FileSource, Value,
};
use ingle_protocol::wire::v2::{Message, ModelState, Priority, Role, Sampling, TraceContext};
use ingle_protocol::{ModelDigest, RequestId};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::setting::no_model;
use super::state_dir::check_model_file;
use super::{GivenParameters, Layers, Node, Outcome, Parameter, ParameterChanges, ParameterValue, ShownParameters};
use crate::gateway::{ChatRequest, DEFAULT_MODEL, OfferedModel, unknown_model};
use crate::registry::{
    QUANTIZATION, RegistryStatus, ShownModel, View, checked_parameters, options_of, registry_status, to_values,
};
use crate::worker::endpoint::{EndpointUrl, ask_once};

/// How long a new endpoint may take until it is known whether it answers. It goes on by itself afterwards.
const FIRST_LOOK: Duration = Duration::from_secs(10);
/// How long a model may take to be loaded that is to be the default.
const WAKE_DEADLINE: Duration = Duration::from_secs(300);

/// A model that somebody wants to register.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Registration {
    /// Its name.
    pub name: String,
    /// What it does.
    pub kind: ModelType,
    /// Where its file comes from.
    pub source: Option<String>,
    /// The server that answers for it.
    pub endpoint: Option<Endpoint>,
    /// Its file's hash, where it is known.
    pub sha256: Option<String>,
    /// Seconds for which it stays loaded when nobody asks it.
    pub keep_alive: Option<KeepAlive>,
    /// Parameters that are not the usual ones.
    pub parameters: GivenParameters,
    /// The format that its weights are converted to; `None` for that of its file.
    pub quantization: Option<String>,
    /// Names of the nodes that are to have it; empty for any, and for an endpoint this node.
    pub pins: Vec<String>,
    /// Do not ask the endpoint first whether it is there and has the model.
    pub unchecked: bool,
}

/// What became of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Registered {
    /// The model as it is registered.
    pub model: ShownModel,
}

/// A model and what is known of it here.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelDetails {
    /// Its parameters, where this node runs it or it is registered with a file.
    pub parameters: Option<ShownParameters>,
    /// What the registry and the nodes say of it; `None` where only this node's settings know it.
    pub model: Option<ShownModel>,
}

/// The name of a format that weights can be converted to.
fn format_named(text: &str) -> Result<String, String> {
    text.parse::<Target>().map(|format| format.to_string().to_ascii_lowercase())
}

/// It is loaded when somebody asks for it.
fn is_on_demand(state: &ModelState) -> bool {
    matches!(state, ModelState::Absent | ModelState::Unloaded)
}

/// A change that this node cannot make now.
fn shutting_down() -> String {
    "this node is shutting down".into()
}

impl Node {
    /// Registers a model on all nodes. When this returns it is on disk here. On an error nothing is registered.
    pub async fn register(&self, asked: Registration) -> Result<Registered, String> {
        let name = asked.name.clone();
        let new = self.check_registration(asked).await?;
        let runs_here = matches!(new.origin, Origin::Endpoint(_)) && new.pins.contains(&self.options.name);
        self.write(|registry, at| registry.add(new, at)).await?;
        if runs_here {
            let mut changes = self.workers.changes();
            let looked = async {
                while !self.own_state_of(&name).is_some_and(|state| is_settled(&state)) {
                    if changes.changed().await.is_err() {
                        return;
                    }
                }
            };
            let _ = timeout(FIRST_LOOK, looked).await;
        }
        let model =
            self.shown_model(&name)?.ok_or_else(|| format!("the model `{name}` was removed again meanwhile"))?;
        Ok(Registered { model })
    }

    fn own_state_of(&self, name: &str) -> Option<ModelState> {
        let facts = self.workers.facts(Default::default());
        facts.into_iter().find(|facts| facts.name == name).map(|facts| facts.state)
    }

    async fn check_registration(&self, asked: Registration) -> Result<NewModel, String> {
        let Registration { name, kind, source, endpoint, sha256, keep_alive, pins, unchecked, .. } = asked;
        let Registration { parameters, quantization, .. } = asked;
        check_model(&name).map_err(|error| error.to_string())?;
        if self.registry.model(&name).is_some() {
            return Err(ingle_protocol::registry::RegistryError::Exists(name).to_string());
        }
        if !matches!(kind, ModelType::Llm | ModelType::Embedding) {
            return Err(format!("models of the type {} are not built yet: there are llm and embedding", kind.as_str()));
        }
        let sha256 = sha256.map(|text| {
            text.parse::<ModelDigest>().map_err(|_| "sha256 must be 64 digits of lower-case hex".to_owned())
        });
        let sha256 = sha256.transpose()?;
        checked_parameters(&parameters, endpoint.is_some())?;
        self.check_nodes(&pins)?;
        let here = |pins: &[String]| pins.is_empty() || pins.contains(&self.options.name);
        let (origin, pins) = match (source, endpoint) {
            (Some(source), None) => {
                let read: FileSource =
                    source.parse().map_err(|error: ingle_protocol::registry::SourceError| error.to_string())?;
                if let FileSource::File(path) = &read {
                    if !here(&pins) {
                        return Err(format!(
                            "{path} is a file of this machine, which others copy from it: pin the model to `{}` too, or \
                             type this on the machine that has the file",
                            self.options.name
                        ));
                    }
                    check_file(path.clone()).await?;
                }
                (Origin::Source(read.to_string()), pins)
            }
            (None, Some(endpoint)) => {
                let pins = if pins.is_empty() { vec![self.options.name.clone()] } else { pins };
                let slots = slots_in(&parameters);
                let embeds = kind == ModelType::Embedding;
                let asked = !unchecked && here(&pins);
                (Origin::Endpoint(self.check_endpoint(&name, endpoint, slots, embeds, asked).await?), pins)
            }
            _ => return Err("a model has either a source or an endpoint".into()),
        };
        let mut parameters: BTreeMap<String, Value> =
            parameters.0.iter().map(|(name, value)| (name.as_str().to_owned(), value.into())).collect();
        if let Some(to) = quantization {
            if matches!(origin, Origin::Endpoint(_)) {
                return Err("the far server's weights are its own business: an endpoint has no quantization".into());
            }
            parameters.insert(QUANTIZATION.into(), Value::Word(format_named(&to)?));
        }
        Ok(NewModel { name, kind, origin, sha256, keep_alive, parameters, pins })
    }

    /// The endpoint with its model's name there. One that is `asked` must be there.
    async fn check_endpoint(
        &self,
        name: &str,
        endpoint: Endpoint,
        slots: Option<u32>,
        embeds: bool,
        asked: bool,
    ) -> Result<Endpoint, String> {
        let taken = self.gateway.models().into_iter().find(|model| model.name == name);
        if let Some(OfferedModel { nodes, .. }) = taken {
            let at = if nodes.is_empty() { String::new() } else { format!(" (on {})", nodes.join(", ")) };
            return Err(format!("a node has a model `{name}` already{at}: choose another name"));
        }
        let address: EndpointUrl =
            endpoint.url.parse().map_err(|error| format!("the endpoint's address cannot be used: {error}"))?;
        let endpoint = Endpoint { url: address.to_string(), ..endpoint };
        if !asked {
            return Ok(endpoint);
        }
        let options = options_of(name, &endpoint, slots, embeds, None)?;
        let found = ask_once(&options).await.map_err(|why| {
            format!("nothing is registered, because the endpoint {address} cannot answer now: {why} (with --unchecked it is registered all the same)")
        })?;
        Ok(Endpoint { model: Some(found), ..endpoint })
    }

    /// Every name is that of a node of the cluster.
    fn check_nodes(&self, names: &[String]) -> Result<(), String> {
        let mut known = vec![self.options.name.clone()];
        if let Some(mesh) = self.mesh.load_full() {
            known.extend(mesh.roster.lock().values().map(|member| member.name.clone()));
        }
        match names.iter().find(|name| !known.contains(name)) {
            Some(name) => Err(format!("there is no node `{name}` in this cluster; there is {}", known.join(", "))),
            None => Ok(()),
        }
    }

    /// Removes a model on all nodes. True where it was the default one.
    pub async fn unregister(&self, name: &str) -> Result<bool, String> {
        self.known_model(name)?;
        let was_default = self.registry.default_route().name.as_deref() == Some(name);
        self.write(|registry, at| registry.remove(name, at)).await?;
        Ok(was_default)
    }

    /// Chooses what `default` means on all nodes; `None` takes the choice back. A model that nobody could ask is not
    /// chosen unless `force`.
    pub async fn set_default(&self, name: Option<String>, force: bool) -> Result<(), String> {
        if let Some(name) = &name {
            let models = self.gateway.models();
            let offered = models.iter().find(|model| model.name == *name);
            if offered.is_none() {
                self.known_model(name)?;
            }
            let is_asleep = offered.is_some_and(|model| model.nodes.is_empty() && is_on_demand(&model.state));
            let woken = if is_asleep && !force { self.wake(name).await } else { Ok(()) };
            let models = self.gateway.models();
            let offered = models.iter().find(|model| model.name == *name);
            let state = match offered {
                Some(offered) if !offered.nodes.is_empty() => None,
                Some(offered) => Some(offered.state.words()),
                None => Some("loaded on no machine".into()),
            };
            // One that is there, and has no answer to such a question, is there.
            if state.is_some() {
                woken?;
            }
            if let (Some(state), false) = (state, force) {
                return Err(format!(
                    "`{name}` cannot answer now (it is {state}), and every request without a model would fail: with \
                     --force it is made the default all the same"
                ));
            }
        }
        self.write(|registry, at| registry.set_default(name, at)).await
    }

    /// Asks a model that is known and not loaded for a token: it is loaded for that, so that nobody who asks for the
    /// default has to wait.
    async fn wake(&self, name: &str) -> Result<(), String> {
        let request = ChatRequest {
            request_id: RequestId(rand::random()),
            trace: TraceContext::default(),
            principal: "local".into(),
            priority: Priority::Interactive,
            deadline: WAKE_DEADLINE,
            model: name.to_owned(),
            messages: vec![Message { role: Role::User, content: "Hello".into(), extra: vec![] }],
            sampling: Sampling { temperature: 0.0, max_tokens: Some(1), ..Sampling::default() },
            extra: vec![],
        };
        let asked = Box::pin(self.chat(request)).await;
        asked.map(drop).map_err(|error| format!("`{name}` is not loaded, and loading it failed: {error}"))
    }

    /// Pins a model to exactly these nodes.
    pub async fn pin(&self, name: &str, nodes: Vec<String>) -> Result<(), String> {
        let record = self.known_model(name)?;
        self.check_nodes(&nodes)?;
        if record.endpoint().is_some() && nodes.is_empty() {
            return Err(format!("`{name}` is an endpoint, which needs a node that asks it: name one, or remove it"));
        }
        self.write(|registry, at| registry.set_pins(name, &nodes, at)).await
    }

    /// Says how long a registered model stays loaded when nobody asks it; `None` for as long as its memory is not
    /// needed.
    pub async fn set_keep_alive(&self, asked: &str, keep_alive: Option<KeepAlive>) -> Result<(), String> {
        let name = self.meant(asked);
        if self.known_model(&name)?.endpoint().is_some() {
            return Err(format!("`{name}` is an endpoint: its server decides what it keeps loaded"));
        }
        self.write(|registry, at| registry.set_keep_alive(&name, keep_alive, at)).await
    }

    /// Has the weights of a registered model converted to a format, wherever it is loaded; `None` for that of its file.
    /// Another version of it takes over where it is loaded.
    pub async fn set_quantization(&self, asked: &str, to: Option<&str>) -> Result<(), String> {
        let name = self.meant(asked);
        if self.known_model(&name)?.endpoint().is_some() {
            return Err(format!("`{name}` is an endpoint: its weights are its server's business"));
        }
        let value = to.map(format_named).transpose()?.map(Value::Word);
        let changes = BTreeMap::from([(QUANTIZATION.to_owned(), value)]);
        self.write(|registry, at| registry.set_parameters(&name, &changes, at)).await
    }

    /// All models, registered or not, with how they are on all nodes.
    pub fn registry_status(&self) -> Result<RegistryStatus, String> {
        let default = self.gateway.models().into_iter().find(|model| model.is_default).map(|model| model.name);
        let registry = self.registry.snapshot();
        let default = registry.default_model().name().map(str::to_owned).or(default);
        let mesh = self.mesh.load_full().ok_or("this node is changing its cluster; ask again in a moment")?;
        let view = View::of(&mesh, *self.workers.capability().borrow());
        Ok(registry_status(&registry, &self.status()?, default.as_deref(), &view))
    }

    fn shown_model(&self, name: &str) -> Result<Option<ShownModel>, String> {
        Ok(self.registry_status()?.models.into_iter().find(|model| model.name == name))
    }

    /// Everything that is known of a model here; `default` means the default one.
    pub fn model_details(&self, asked: &str) -> Result<ModelDetails, String> {
        let name = self.meant(asked);
        let model = self.shown_model(&name)?;
        let own = self.models.get(&name);
        let parameters = match (own, self.registry.model(&name)) {
            (Some(own), _) => Some(own.parameters()),
            (None, Some(record)) if record.endpoint().is_none() => Some(parameters_of(&record)?),
            _ => None,
        };
        match (&model, &parameters) {
            (None, None) => Err(self.no_model(&name)),
            _ => Ok(ModelDetails { parameters, model }),
        }
    }

    /// The model that a name means: `default` is the chosen one, else this node's own.
    pub(super) fn meant(&self, asked: &str) -> String {
        if asked != DEFAULT_MODEL {
            return asked.to_owned();
        }
        let chosen = self.registry.default_route().name;
        let chosen = chosen.or_else(|| self.models.own().map(|model| model.name()));
        let offered = || self.gateway.models().into_iter().find(|model| model.is_default).map(|model| model.name);
        chosen.or_else(offered).unwrap_or_else(|| asked.to_owned())
    }

    fn no_model(&self, name: &str) -> String {
        let mut known = self.registry.names();
        known.extend(self.gateway.models().into_iter().map(|model| model.name));
        known.sort_unstable();
        known.dedup();
        if known.is_empty() {
            return no_model(name);
        }
        let near: Vec<String> = near(name, known.iter().map(String::as_str)).into_iter().map(str::to_owned).collect();
        unknown_model(name, &near, &known)
    }

    fn known_model(&self, name: &str) -> Result<Record, String> {
        self.registry.model(name).ok_or_else(|| {
            let known = self.registry.names();
            let near = near(name, known.iter().map(String::as_str)).join(" or ");
            let hint = if near.is_empty() { String::new() } else { format!(" (did you mean {near}?)") };
            let is_own = self.gateway.models().iter().any(|model| model.name == name);
            let own = if is_own { ": it was given to a node when that was started" } else { "" };
            format!("no model `{}` is registered{own}{hint}", name.chars().take(100).collect::<String>())
        })
    }

    /// Notes parameters of a registered model, for every node that runs it.
    pub(super) async fn register_parameters(&self, name: &str, changes: &ParameterChanges) -> Result<Outcome, String> {
        let record = self.known_model(name)?;
        let given = given_in(&record).with(changes);
        checked_parameters(&given, record.endpoint().is_some())?;
        let values = to_values(changes);
        let before = record.all_parameters();
        let is_news = values.iter().any(|(name, value)| before.get(name.as_str()).copied().flatten() != value.as_ref());
        if !is_news {
            return Ok(Outcome::Unchanged);
        }
        self.write(|registry, at| registry.set_parameters(name, &values, at)).await?;
        Ok(Outcome::Stored)
    }

    async fn write(
        &self,
        change: impl FnOnce(
            &mut Registry,
            ingle_protocol::registry::Stamp,
        ) -> Result<(), ingle_protocol::registry::RegistryError>,
    ) -> Result<(), String> {
        if !self.is_accepting() {
            return Err(shutting_down());
        }
        let mesh = self.mesh.load_full().ok_or("this node is changing its cluster; ask again in a moment")?;
        self.registry.write(mesh.own_id(), change).await.map_err(|error| error.to_string())
    }

    /// What is wrong with registered models on this node, in words.
    pub(super) fn registry_problems(&self) -> Vec<String> {
        let registry = self.registry.snapshot();
        let facts = self.workers.facts(Default::default()).into_iter();
        let failed = facts.filter_map(|facts| match facts.state {
            ModelState::Failed { why } if registry.model(&facts.name)?.endpoint().is_some() => {
                Some(format!("the model {} on {}: {why}", facts.name, facts.backend))
            }
            _ => None,
        });
        self.registry.problem().into_iter().chain(failed).collect()
    }
}

fn is_settled(state: &ModelState) -> bool {
    matches!(state, ModelState::Ready | ModelState::Failed { .. })
}

fn slots_in(parameters: &GivenParameters) -> Option<u32> {
    match parameters.0.get(&Parameter::BatchSize) {
        Some(ParameterValue::Number(slots)) => u32::try_from(*slots).ok(),
        _ => None,
    }
}

async fn check_file(path: String) -> Result<(), String> {
    // A disk may take its time.
    let checking = tokio::task::spawn_blocking(move || check_model_file(Path::new(&path)));
    checking.await.map_err(|error| error.to_string())?.map_err(|error| error.to_string())
}

/// The parameters of a registered model that this build knows.
fn given_in(record: &Record) -> GivenParameters {
    let set = record.parameters().into_iter();
    GivenParameters(set.filter_map(|(name, value)| Some((name.parse().ok()?, value.into()))).collect())
}

/// The parameters that a registered model would start with.
fn parameters_of(record: &Record) -> Result<ShownParameters, String> {
    let layers = Layers { config: GivenParameters::default(), set: given_in(record) };
    let values = layers.resolve().map_err(|error| error.to_string())?;
    Ok(ShownParameters { model: record.name().to_owned(), parameters: layers.shown(&values) })
}
