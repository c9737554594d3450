//! One machine of the cluster: a state directory, and a node that runs there or not.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;
use tokio::process::Child;

use super::process::{Ran, children, finish, ingle, kill};
use super::status::Status;
use super::{DEADLINE, FETCH_DEADLINE, until_or};

/// A machine. Everything that it runs is killed when it is dropped.
#[derive(Debug)]
pub struct Machine {
    pub name: String,
    folder: TempDir,
    model: String,
    quic: String,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    running: Option<Running>,
    runs: u32,
}

#[derive(Debug)]
struct Running {
    child: Child,
    pid: u32,
    http: SocketAddr,
}

impl Machine {
    /// A machine without a model whose node does not run yet.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            folder: tempfile::Builder::new().prefix("ingle-test-").tempdir().unwrap(),
            model: "none".into(),
            quic: "127.0.0.1:0".into(),
            arguments: vec!["--no-mdns".into()],
            environment: vec![("INGLE_LOG".into(), "info".into())],
            running: None,
            runs: 0,
        }
    }

    /// A machine whose node takes its model from its configuration file.
    pub fn from_settings(name: &str) -> Self {
        Self::new(name).model("")
    }

    /// Which model its node runs, as `ingle up --model` takes it.
    pub fn model(mut self, model: &str) -> Self {
        self.model = model.into();
        self
    }

    /// One more argument of `ingle up`.
    pub fn with(mut self, argument: &str) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// An environment variable of its node.
    pub fn environment(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Its configuration file.
    pub fn settings(self, text: &str) -> Self {
        std::fs::create_dir_all(self.state_dir()).unwrap();
        std::fs::set_permissions(self.state_dir(), std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        std::fs::write(self.state_dir().join("ingle.toml"), text).unwrap();
        self
    }

    /// It can be reached from other machines, and looks for them by mDNS.
    pub fn on_the_network(mut self) -> Self {
        self.quic = "0.0.0.0:0".into();
        self.arguments.retain(|argument| argument != "--no-mdns");
        self
    }

    /// The state directory.
    pub fn state_dir(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    // ------------------------------------------------------------------------------------------------------------
    // Its node

    /// Starts the node and waits until it is ready, its model included.
    pub async fn up(&mut self) {
        self.start().await;
        self.wait_for_line("Ready: ", FETCH_DEADLINE).await;
    }

    /// Waits until its model is ready.
    pub async fn wait_for_ready(&mut self) {
        self.wait_for_line("Ready: ", FETCH_DEADLINE).await;
    }

    /// Starts the node and waits until it answers HTTP.
    pub async fn start(&mut self) {
        assert!(self.running.is_none(), "the node of {} runs already", self.name);
        self.runs += 1;
        let mut command = ingle();
        command.args(["up", "--http", "127.0.0.1:0", "--name", &self.name]);
        if !self.model.is_empty() {
            command.args(["--model", &self.model]);
        }
        command.args(["--quic", &self.quic]).args(&self.arguments);
        command.arg("--state-dir").arg(self.state_dir()).envs(self.environment.iter().map(|(n, v)| (n, v)));
        let file = |kind| Stdio::from(File::create(self.log_path(kind)).unwrap());
        let child = command.stdin(Stdio::null()).stdout(file("out")).stderr(file("err")).spawn().unwrap();
        let pid = child.id().unwrap();
        self.running = Some(Running { child, pid, http: ([127, 0, 0, 1], 0).into() });
        let line = self.wait_for_line("Ingle node ", DEADLINE).await;
        let http = line.rsplit_once("http://").unwrap().1.parse().unwrap();
        if let Some(running) = &mut self.running {
            running.http = http;
        }
        // The next run listens where this one does, as a real machine's does.
        if self.quic == "127.0.0.1:0" {
            self.quic = self.status().await.node(&self.name)["address"].as_str().unwrap().to_owned();
        }
    }

    /// The first line of standard output that begins like this.
    async fn wait_for_line(&mut self, beginning: &str, limit: Duration) -> String {
        let path = self.log_path("out");
        let child = &mut self.running.as_mut().unwrap().child;
        let found = until_or(limit, &mut async || {
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            // Only whole lines.
            let lines = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
            let line = lines.map(str::trim_end).find(|line| line.starts_with(beginning)).map(str::to_owned);
            match (line, child.try_wait().unwrap()) {
                (Some(line), _) => Some(Ok(line)),
                (None, Some(status)) => Some(Err(status)),
                (None, None) => None,
            }
        })
        .await;
        match found {
            Some(Ok(line)) => line,
            Some(Err(status)) => panic!("the node of {} ended ({status}) before it said `{beginning}`", self.name),
            None => panic!("the node of {} did not say `{beginning}` within {limit:?}", self.name),
        }
    }

    /// The process id of its node.
    pub fn pid(&self) -> u32 {
        self.running.as_ref().unwrap().pid
    }

    /// The process id of its engine.
    pub async fn engine(&self) -> u32 {
        super::until("the engine process runs", async || children(self.pid()).first().copied()).await
    }

    /// The process ids of all its engines: more than one while one takes over from another.
    pub fn engines(&self) -> Vec<u32> {
        children(self.pid())
    }

    /// Sends its node a signal.
    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal);
    }

    /// Waits until its node has ended.
    pub async fn ended(&mut self) -> ExitStatus {
        let mut running = self.running.take().unwrap();
        let ended = tokio::time::timeout(DEADLINE, running.child.wait()).await;
        ended.unwrap_or_else(|_| panic!("the node of {} does not end", self.name)).unwrap()
    }

    /// Ends its node as Ctrl-C does.
    pub async fn stop(&mut self) {
        self.signal(Signal::TERM);
        let status = self.ended().await;
        assert!(status.success(), "the node of {} ended with {status}", self.name);
    }

    /// `kill -9`.
    pub async fn kill_9(&mut self) {
        self.signal(Signal::KILL);
        self.ended().await;
    }

    // ------------------------------------------------------------------------------------------------------------
    // What people type there

    /// Runs `ingle` with these arguments here.
    pub async fn ingle(&self, arguments: &[&str]) -> Ran {
        let mut command = ingle();
        command.args(arguments).arg("--state-dir").arg(self.state_dir());
        finish(command).await
    }

    /// `ingle models set` for its model: what it came to.
    pub async fn set(&self, model: &str, values: &[&str]) -> String {
        let ran = self.ingle(&[&["models", "set", model, "--json"], values].concat()).await;
        let said: Value = serde_json::from_str(&ran.ok()).unwrap();
        said["outcome"].as_str().unwrap().to_owned()
    }

    /// `ingle ps`: the models of this machine's node by their names.
    pub async fn processes(&self) -> BTreeMap<String, Value> {
        let nodes: Value = serde_json::from_str(&self.ingle(&["ps", "--json"]).await.ok()).unwrap();
        let own = nodes.as_array().unwrap().iter().find(|node| node["node"] == self.name.as_str()).unwrap();
        let models = own["models"].as_array().unwrap().iter();
        models.map(|model| (model["name"].as_str().unwrap().to_owned(), model.clone())).collect()
    }

    /// `ingle models show` of its model, by the parameters' names.
    pub async fn parameters(&self, model: &str) -> BTreeMap<String, Value> {
        let shown: Value = serde_json::from_str(&self.ingle(&["models", "show", model, "--json"]).await.ok()).unwrap();
        let parameters = shown["parameters"].as_array().unwrap().iter();
        parameters.map(|shown| (shown["name"].as_str().unwrap().to_owned(), shown.clone())).collect()
    }

    /// A token and the address to join with it.
    pub async fn token(&self) -> (String, String) {
        let token: Value = serde_json::from_str(&self.ingle(&["token", "--json"]).await.ok()).unwrap();
        let address = match token["addresses"][0].as_str() {
            // For a machine on the network the loopback address will do as well, and always works.
            Some(address) if self.quic.starts_with("0.0.0.0") => format!("127.0.0.1:{}", port_of(address)),
            Some(_) => self.quic.clone(),
            None => panic!("a token without an address: {token}"),
        };
        (token["token"].as_str().unwrap().to_owned(), address)
    }

    /// Types `ingle join` with more arguments.
    pub async fn try_join(&self, address: &str, token: &str, more: &[&str]) -> Ran {
        let mut arguments = vec!["join", address, "--token", token];
        // A running node has a name.
        if self.running.is_none() && !more.contains(&"--name") {
            arguments.extend(["--name", &self.name]);
        }
        arguments.extend(more);
        self.ingle(&arguments).await
    }

    /// Joins the cluster of the other machine.
    pub async fn join(&self, other: &Machine) {
        let (token, address) = other.token().await;
        self.try_join(&address, &token, &[]).await.ok();
    }

    /// The address of its QUIC socket.
    pub fn address(&self) -> &str {
        &self.quic
    }

    /// `ingle status --json`.
    pub async fn status(&self) -> Status {
        Status::read(&self.ingle(&["status", "--json"]).await.ok())
    }

    /// `ingle explain --json`.
    pub async fn explain(&self, request: &str) -> Value {
        serde_json::from_str(&self.ingle(&["explain", request, "--json"]).await.ok()).unwrap()
    }

    /// Asks for the status until it is as expected.
    pub async fn until(&self, what: &str, is_so: impl Fn(&Status) -> bool) -> Status {
        let mut last = None;
        let found = until_or(DEADLINE, &mut async || {
            // A node that changes its cluster has no status for a moment.
            let ran = self.ingle(&["status", "--json"]).await;
            let status = (ran.code == Some(0)).then(|| Status::read(&ran.out));
            let good = status.clone().filter(|status| is_so(status));
            last = Some((ran.err, status));
            good
        })
        .await;
        found.unwrap_or_else(|| panic!("{}: waited {DEADLINE:?} in vain: {what}\n{last:#?}", self.name))
    }

    /// Waits until it knows the others as alive.
    pub async fn until_alive(&self, others: &[&Machine]) {
        for other in others {
            let what = format!("{} is alive", other.name);
            self.until(&what, |status| status.health(&other.name) == "alive").await;
        }
    }

    /// Waits until its engine answers so many requests.
    pub async fn until_running(&self, count: u64) {
        self.until(&format!("{count} requests run"), |status| status.running(&self.name) == count).await;
    }

    // ------------------------------------------------------------------------------------------------------------
    // What programs say there

    /// `host:port` of its HTTP.
    pub fn http(&self) -> SocketAddr {
        self.running.as_ref().unwrap().http
    }

    /// The URL of a path.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.http())
    }

    // ------------------------------------------------------------------------------------------------------------
    // Logs

    fn log_path(&self, kind: &str) -> PathBuf {
        self.folder.path().join(format!("{}.{kind}", self.runs))
    }

    /// What the present or last run of the node wrote to standard error.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path("err")).unwrap_or_default()
    }

    /// What the present or last run wrote to standard output.
    pub fn output(&self) -> String {
        std::fs::read_to_string(self.log_path("out")).unwrap_or_default()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Some(running) = &self.running {
            let engines = children(running.pid);
            kill(running.pid, Signal::KILL);
            for engine in engines {
                kill(engine, Signal::KILL);
            }
        }
        if std::thread::panicking() {
            for run in 1..=self.runs {
                for kind in ["out", "err"] {
                    show(&self.name, &self.folder.path().join(format!("{run}.{kind}")));
                }
            }
        }
    }
}

fn port_of(address: &str) -> u16 {
    address.rsplit_once(':').unwrap().1.parse().unwrap()
}

/// The end of a log, for whoever has to find out why a test failed.
fn show(name: &str, path: &Path) {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    eprintln!("--- {name}, {}:", path.display());
    for line in &lines[lines.len().saturating_sub(60)..] {
        eprintln!("{line}");
    }
}
