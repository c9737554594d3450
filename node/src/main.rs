//! The binary `ingle`: command line, configuration, HTTP and what people see. It only calls.

mod cli;
mod commands;
mod config;
mod control;
mod duration;
mod exit;
mod http;
mod ingress;
mod logging;
mod output;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    // Two TLS providers may be linked in through dependencies; rustls wants to be told which one counts.
    let _ = rustls::crypto::ring::default_provider().install_default();
    exit::code_of(commands::run(cli))
}
