//! `ingle models add`, `rm`, `set-default`, `pin`, `ls` and `status`.

use std::time::Duration;

use ingle_actors::node::Registration;
use ingle_actors::protocol::registry::{Endpoint, FOREVER, ModelType};
use ingle_actors::registry::{RegistryStatus, ShownModel};
use serde_json::json;

use super::parameters::{changes, take};
use crate::cli::{AddModel, ListModels, PinModel, RemoveModel, SetDefault};
use crate::commands::status::table;
use crate::commands::{explain_error, unexpected};
use crate::config::Settings;
use crate::control::{Client, ModelsReply, ModelsRequest, Reply, Request};
use crate::exit::UsageError;
use crate::output::{complain, print};

/// A new endpoint is asked before it is registered, and waited for.
const DEADLINE: Duration = Duration::from_secs(40);
/// A model that is to be the default is loaded first.
const LOAD_DEADLINE: Duration = Duration::from_secs(310);

/// Asks the node.
pub async fn ask(settings: &Settings, request: ModelsRequest) -> anyhow::Result<ModelsReply> {
    let deadline = if matches!(request, ModelsRequest::SetDefault { .. }) { LOAD_DEADLINE } else { DEADLINE };
    let asked = Client::ask(&settings.state_dir, &Request::Models(request)).await;
    match asked.map_err(|error| explain_error(settings, error))?.next(deadline).await? {
        Reply::Models(reply) => Ok(*reply),
        _ => Err(unexpected()),
    }
}

/// Registers a model.
pub async fn add(settings: &Settings, options: AddModel) -> anyhow::Result<()> {
    if options.discover {
        return super::discover::run(settings, options).await;
    }
    let json = options.json;
    let waits = options.source.is_some() && !options.unchecked;
    let ModelsReply::Added(added) = ask(settings, ModelsRequest::Add(registration(options)?)).await? else {
        return Err(unexpected());
    };
    let mut model = added.model;
    if waits {
        model = super::first_load::until_settled(settings, model).await?;
    }
    if json {
        return print(&format!("{}\n", serde_json::to_string_pretty(&model)?));
    }
    let states = model.nodes.iter().map(|on| format!("{} on {}", on.state, on.node)).collect::<Vec<_>>().join(", ");
    let states = if states.is_empty() { "on no node yet".into() } else { states };
    print(&format!("Registered `{}` on all nodes: {states}.\n", model.name))
}

fn registration(options: AddModel) -> Result<Registration, UsageError> {
    let AddModel {
        name,
        kind,
        source,
        endpoint,
        model,
        api_key_env,
        unchecked,
        sha256,
        pin,
        keep_alive,
        mut values,
        ..
    } = options;
    let quantization = take(&mut values, "quantization");
    let known = ModelType::ALL.into_iter().find(|known| known.as_str() == kind);
    let kind = known.ok_or_else(|| UsageError(format!("There is no type `{kind}`: write llm or embedding.")))?;
    let given = changes(&values)?.into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
    Ok(Registration {
        // clap has asked for it.
        name: name.unwrap_or_default(),
        kind,
        source,
        endpoint: endpoint.map(|url| Endpoint { url, model, api_key_env }),
        sha256,
        keep_alive: keep_alive.as_deref().map(keep_alive_seconds).transpose()?,
        parameters: ingle_actors::node::GivenParameters(given),
        quantization,
        pins: pin,
        unchecked,
    })
}

/// A time in which nobody asks a model, as it is typed.
pub(super) fn keep_alive_seconds(text: &str) -> Result<u32, UsageError> {
    if text == "forever" {
        return Ok(FOREVER);
    }
    let time = crate::duration::parse(text).map_err(|why| UsageError(format!("keep-alive: {why}.")))?;
    u32::try_from(time.as_secs()).map_err(|_| UsageError("keep-alive is too long: write `forever`.".into()))
}

/// Removes a model.
pub async fn remove(settings: &Settings, options: RemoveModel) -> anyhow::Result<()> {
    let RemoveModel { model, json } = options;
    let ModelsReply::Removed { was_default } = ask(settings, ModelsRequest::Remove { model: model.clone() }).await?
    else {
        return Err(unexpected());
    };
    if was_default {
        complain(&format!("notice: `{model}` was the default model; none is chosen now"));
    }
    if json {
        return print(&format!("{}\n", json!({ "removed": model, "was_default": was_default })));
    }
    print(&format!("Removed `{model}` on all nodes. Answers that it gives now may finish.\n"))
}

/// Chooses what `default` means.
pub async fn set_default(settings: &Settings, options: SetDefault) -> anyhow::Result<()> {
    let SetDefault { model, force, json, .. } = options;
    let ModelsReply::Changed = ask(settings, ModelsRequest::SetDefault { model: model.clone(), force }).await? else {
        return Err(unexpected());
    };
    if json {
        return print(&format!("{}\n", json!({ "default": model })));
    }
    print(&match model {
        Some(model) => format!("Requests that name no model get `{model}` from now on, on all nodes.\n"),
        None => "No default model is chosen now: each node decides by itself.\n".into(),
    })
}

/// Pins a model.
pub async fn pin(settings: &Settings, options: PinModel) -> anyhow::Result<()> {
    let PinModel { model, nodes, json, .. } = options;
    let request = ModelsRequest::Pin { model: model.clone(), nodes: nodes.clone() };
    let ModelsReply::Changed = ask(settings, request).await? else { return Err(unexpected()) };
    if json {
        return print(&format!("{}\n", json!({ "model": model, "pinned": nodes })));
    }
    let to = if nodes.is_empty() { "no node: any may have it".into() } else { nodes.join(", ") };
    print(&format!("`{model}` is pinned to {to}.\n"))
}

pub(super) async fn status_of(settings: &Settings) -> anyhow::Result<RegistryStatus> {
    match ask(settings, ModelsRequest::Status).await? {
        ModelsReply::Status(status) => Ok(status),
        _ => Err(unexpected()),
    }
}

/// Lists the models.
pub async fn list(settings: &Settings, options: ListModels) -> anyhow::Result<()> {
    let status = status_of(settings).await?;
    if options.json {
        return print(&format!("{}\n", serde_json::to_string_pretty(&status.models)?));
    }
    print(&listed(&status))
}

fn listed(status: &RegistryStatus) -> String {
    let mut rows = vec![["MODEL", "TYPE", "FROM", "READY ON"].map(str::to_owned).to_vec()];
    for model in &status.models {
        let ready: Vec<&str> = model.nodes.iter().filter(|on| on.state == "ready").map(|on| on.node.as_str()).collect();
        let ready = if ready.is_empty() { "-".into() } else { ready.join(", ") };
        rows.push(vec![name_of(model), kind_of(model), origin_of(model), ready]);
    }
    table(&rows, usize::MAX)
}

/// Shows how the models are on all nodes.
pub async fn status(settings: &Settings, options: ListModels, verbose: bool) -> anyhow::Result<()> {
    let status = status_of(settings).await?;
    if options.json {
        return print(&format!("{}\n", serde_json::to_string_pretty(&status)?));
    }
    print(&rendered(&status, verbose))
}

fn rendered(status: &RegistryStatus, verbose: bool) -> String {
    let mut rows = vec![["MODEL", "TYPE", "NODE", "IS", "RUN", "WAIT"].map(str::to_owned).to_vec()];
    for model in &status.models {
        let mut first = vec![name_of(model), kind_of(model)];
        for on in &model.nodes {
            let state = if on.state.starts_with("failed (") { "failed".into() } else { on.state.clone() };
            let row = [on.node.clone(), state, on.running.to_string(), on.waiting.to_string()];
            rows.push(first.iter().cloned().chain(row).collect());
            first = vec![String::new(); 2];
        }
        if model.nodes.is_empty() {
            rows.push(first.into_iter().chain(["-", "-", "-", "-"].map(str::to_owned)).collect());
        }
    }
    let mut text = table(&rows, 4);
    for model in &status.models {
        for on in &model.nodes {
            if let Some(why) = on.state.strip_prefix("failed (").and_then(|why| why.strip_suffix(')')) {
                text += &format!("\n{} on {} has failed: {why}\n", model.name, on.node);
            }
        }
        if verbose {
            text += &about(model);
        }
        for other in &model.overruled {
            text += &format!(
                "\n{}: `{}` was set to {} by {} at the same time; it does not hold. Set it again to settle it.\n",
                model.name, other.field, other.value, other.by
            );
        }
    }
    for other in &status.default_overruled {
        text += &format!("\nThe default model was set to {} by {} at the same time.\n", other.value, other.by);
    }
    text
}

/// What the registry says of a model, a line each.
pub(super) fn about(model: &ShownModel) -> String {
    let mut lines = Vec::new();
    if !model.registered {
        lines.push("not registered: given to a node when it was started".to_owned());
    }
    lines.extend(model.source.iter().map(|source| format!("source      {source}")));
    if let Some(endpoint) = &model.endpoint {
        lines.push(format!("endpoint    {}", endpoint.url));
        lines.extend(endpoint.model.iter().map(|name| format!("there       {name}")));
        lines.extend(endpoint.api_key_env.iter().map(|variable| format!("key in      ${variable}")));
    }
    lines.extend(model.sha256.iter().map(|sha256| format!("sha256      {sha256}")));
    lines.extend(model.keep_alive_s.map(|seconds| match seconds {
        FOREVER => "keep-alive  forever".to_owned(),
        seconds => format!("keep-alive  {seconds} s"),
    }));
    if !model.pinned.is_empty() {
        lines.push(format!("pinned to   {}", model.pinned.join(", ")));
    }
    let parameters = model.parameters.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>();
    if !parameters.is_empty() {
        lines.push(format!("parameters  {}", parameters.join(" ")));
    }
    let placements = model.nodes.iter().filter_map(|on| Some((&on.node, on.placement.as_ref()?)));
    lines.extend(placements.map(|(node, placement)| format!("{node:11} {placement}")));
    lines.extend(model.changed_by.iter().map(|by| format!("changed by  {by}")));
    let lines: String = lines.iter().map(|line| format!("  {}\n", plain(line))).collect();
    format!("\n{}\n{lines}", plain(&model.name))
}

/// Texts come from other machines: they must not steer the terminal.
fn plain(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).collect()
}

fn name_of(model: &ShownModel) -> String {
    if model.is_default { format!("{} (default)", model.name) } else { model.name.clone() }
}

fn kind_of(model: &ShownModel) -> String {
    model.kind.map_or("-", ModelType::as_str).to_owned()
}

fn origin_of(model: &ShownModel) -> String {
    match (&model.source, &model.endpoint) {
        (Some(source), _) => source.clone(),
        (_, Some(endpoint)) => endpoint.url.clone(),
        _ => "a node's settings".into(),
    }
}

#[cfg(test)]
mod tests {
    use ingle_actors::registry::{OnNode, Overruled, ShownEndpoint};

    use super::*;

    fn status() -> RegistryStatus {
        let on = |node: &str, state: &str| OnNode {
            node: node.into(),
            state: state.into(),
            backend: String::new(),
            running: 2,
            waiting: 0,
            placement: Some("choice 1 of 2, 28.1 GB/s of memory".into()),
        };
        let far = ShownModel {
            name: "glm-4.7".into(),
            kind: Some(ModelType::Llm),
            registered: true,
            is_default: true,
            source: None,
            endpoint: Some(ShownEndpoint {
                url: "http://box:8080".into(),
                model: Some("glm".into()),
                api_key_env: Some("FAR_KEY".into()),
            }),
            sha256: None,
            keep_alive_s: Some(FOREVER),
            pinned: vec!["tower".into()],
            parameters: [("batch_size".to_owned(), 4u64.to_string().as_str().into())].into(),
            changed_by: Some("mini".into()),
            changed_ms: Some(1),
            overruled: vec![Overruled { field: "batch_size".into(), value: "9".into(), by: "attic".into() }],
            nodes: vec![on("tower", "ready"), on("mini", "failed (it is away)")],
        };
        let own = ShownModel {
            name: "echo".into(),
            kind: None,
            registered: false,
            is_default: false,
            endpoint: None,
            nodes: vec![],
            overruled: vec![],
            ..far.clone()
        };
        RegistryStatus { default: Some("glm-4.7".into()), default_overruled: vec![], models: vec![far, own] }
    }

    #[test]
    fn the_tables_say_where_a_model_is_and_what_does_not_hold() {
        assert_eq!(
            listed(&status()),
            "MODEL              TYPE  FROM               READY ON\n\
             glm-4.7 (default)  llm   http://box:8080    tower\n\
             echo               -     a node's settings  -\n"
        );
        let text = rendered(&status(), true);
        for part in [
            "glm-4.7 (default)  llm   tower  ready     2     0\n                         mini   failed    2     0\n",
            "glm-4.7 on mini has failed: it is away",
            "  endpoint    http://box:8080\n  there       glm\n  key in      $FAR_KEY\n  keep-alive  forever\n",
            "`batch_size` was set to 9 by attic at the same time",
            "not registered",
            "  tower       choice 1 of 2, 28.1 GB/s of memory\n",
        ] {
            assert!(text.contains(part), "{text}");
        }
        assert!(!rendered(&status(), false).contains("FAR_KEY"));
    }

    #[test]
    fn what_is_typed_becomes_a_registration_or_is_named() {
        let typed = |more: &[&str]| {
            use clap::Parser;
            let all = ["ingle", "models", "add", "--name", "m"].iter().chain(more);
            match crate::cli::Cli::try_parse_from(all).map_err(|error| error.to_string())?.command {
                crate::cli::Command::Models(models) => match models.command {
                    crate::cli::ModelsCommand::Add(add) => registration(add).map_err(|error| error.0),
                    _ => Err("another command".into()),
                },
                _ => Err("another command".into()),
            }
        };
        let good = typed(&["--endpoint", "http://a", "--pin", "x", "--pin", "y", "--keep-alive", "2m", "batch_size=3"]);
        let good = good.unwrap();
        assert_eq!((good.keep_alive, good.pins, good.kind), (Some(120), vec!["x".into(), "y".into()], ModelType::Llm));
        assert_eq!(good.parameters.0.len(), 1);
        for (more, expected) in [
            (&[][..], "--source"),
            (&["--endpoint", "http://a", "--source", "file:/x"], "cannot be used with"),
            // clap drops `requires` where what is required is ruled out by something else: both are said there.
            (&["--source", "file:/x", "--api-key-env", "K"], "cannot be used with"),
            (&["--api-key-env", "K"], "--endpoint"),
            (&["--source", "file:/x", "--type", "poem"], "no type `poem`"),
            (&["--source", "file:/x", "--keep-alive", "soon"], "keep-alive"),
            (&["--source", "file:/x", "colour=3"], "no parameter"),
        ] {
            let error = typed(more).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
