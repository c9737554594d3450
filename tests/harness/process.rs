//! Processes: how to start commands, find children and listening sockets, and send signals.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::Stdio;

use rustix::process::{Pid, Signal};

use super::DEADLINE;

/// A command that has ended.
#[derive(Debug)]
pub struct Ran {
    /// Its exit code; `None` where a signal ended it.
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Ran {
    /// What it printed, where it ended well.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{self:?}");
        self.out
    }

    /// What it complained of, where it ended with `code`.
    #[track_caller]
    pub fn fails_with(self, code: i32) -> String {
        assert_eq!(self.code, Some(code), "{self:?}");
        self.err
    }
}

/// The binary under test, away from whatever `INGLE_*` says outside (the model cache excepted).
pub fn ingle() -> tokio::process::Command {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_ingle"));
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        if name.starts_with("INGLE_") && name != "INGLE_MODEL_CACHE" {
            command.env_remove(&*name);
        }
    }
    command.kill_on_drop(true);
    command
}

/// Runs `ingle` to its end.
pub async fn run(arguments: &[&str]) -> Ran {
    let mut command = ingle();
    command.args(arguments);
    finish(command).await
}

/// Runs a command to its end.
pub async fn finish(mut command: tokio::process::Command) -> Ran {
    let output = command.stdin(Stdio::null()).output();
    let output = tokio::time::timeout(2 * DEADLINE, output).await;
    let output = output.unwrap_or_else(|_| panic!("{command:?} does not end")).unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("a command prints UTF-8");
    Ran { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
}

/// Sends a signal. That the process has gone already is no error.
pub fn kill(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// State and parent, from `/proc/<pid>/stat`; the name in it may contain anything.
fn stat(pid: u32) -> Option<(char, u32)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

/// The process runs: it is neither gone nor a zombie that nobody has buried yet.
pub fn is_alive(pid: u32) -> bool {
    stat(pid).is_some_and(|(state, _)| !matches!(state, 'Z' | 'X'))
}

/// The living children of a process.
pub fn children(parent: u32) -> Vec<u32> {
    let folders = std::fs::read_dir("/proc").unwrap();
    let pids = folders.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| is_alive(*pid) && stat(*pid).is_some_and(|(_, of)| of == parent)).collect()
}

/// The TCP sockets that a process listens at.
pub fn listening_ports(pid: u32) -> Vec<(IpAddr, u16)> {
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let links = descriptors.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
    let inodes: HashSet<String> = links
        .filter_map(|link| Some(link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect();
    ["tcp", "tcp6"]
        .iter()
        .flat_map(|table| std::fs::read_to_string(format!("/proc/net/{table}")).unwrap_or_default().lines().skip(1).map(str::to_owned).collect::<Vec<_>>())
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_ascii_whitespace().collect();
            let (address, state, inode) = (*fields.get(1)?, *fields.get(3)?, *fields.get(9)?);
            let (ip, port) = address.split_once(':')?;
            (state == "0A" && inodes.contains(inode)).then_some((address_of(ip)?, u16::from_str_radix(port, 16).ok()?))
        })
        .collect()
}

/// The kernel prints addresses as 32-bit words in the machine's own byte order.
fn address_of(hex: &str) -> Option<IpAddr> {
    let words: Option<Vec<[u8; 4]>> = (0..hex.len() / 8)
        .map(|word| u32::from_str_radix(hex.get(word * 8..word * 8 + 8)?, 16).ok().map(u32::to_ne_bytes))
        .collect();
    let bytes = words?.concat();
    match bytes.len() {
        4 => Some(IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?))),
        _ => Some(IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?))),
    }
}
