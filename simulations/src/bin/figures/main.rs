//! The tools behind the figures of `docs/benchmarks.md`: a scripted OpenAI-compatible server, a load generator, and the
//! two floors that Ingle's path is measured against. The scripts `tests/measure_*.py` start them; each prints one line
//! `Listening at ADDRESS` where it listens, or one JSON object with what it measured.
//!
//! They bind to loopback only and end by themselves after `--seconds`.

mod http;
mod load;
mod quic_relay;
mod sse;
mod tcp_relay;
mod upstream;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use clap::{Parser, Subcommand};
use tokio::net::TcpListener;

/// What goes wrong here ends the program with its text.
type Error = Box<dyn std::error::Error + Send + Sync>;

#[derive(Debug, Parser)]
#[command(about = "Tools of the figures in docs/benchmarks.md", rename_all = "kebab-case")]
struct Arguments {
    /// A server ends after so many seconds, whatever happens to whoever started it.
    #[arg(long, global = true, default_value_t = 3_600)]
    lifetime: u64,
    #[command(subcommand)]
    tool: Tool,
}

#[derive(Debug, Subcommand)]
enum Tool {
    /// A server that speaks OpenAI's HTTP and does what the question says.
    Upstream(upstream::Options),
    /// Asks questions at a rate, or as fast as they are answered, and prints what it measured as JSON.
    Load(load::Options),
    /// Passes TCP connections on: the least that a hop can cost.
    TcpRelay(tcp_relay::Options),
    /// HTTP in, one QUIC stream with frames for each request out: the least that Ingle's first hop can cost.
    QuicIngress(quic_relay::IngressOptions),
    /// Frames in, HTTP out: the least that Ingle's second hop can cost.
    QuicWorker(quic_relay::WorkerOptions),
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let Arguments { lifetime, tool } = Arguments::parse();
    // Fails only where a provider stands already, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let work = async {
        match tool {
            Tool::Upstream(options) => upstream::run(options).await,
            Tool::Load(options) => load::run(options).await,
            Tool::TcpRelay(options) => tcp_relay::run(options).await,
            Tool::QuicIngress(options) => quic_relay::ingress(options).await,
            Tool::QuicWorker(options) => quic_relay::worker(options).await,
        }
    };
    match tokio::time::timeout(Duration::from_secs(lifetime), work).await {
        Ok(done) => done,
        Err(_) => Err("the lifetime is over".into()),
    }
}

/// A loopback address with a port that the system chooses.
fn any_port() -> SocketAddr {
    (IpAddr::V4(Ipv4Addr::LOCALHOST), 0).into()
}

/// A listener on loopback; prints where.
async fn listen(port: u16) -> Result<TcpListener, Error> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await?;
    announce(listener.local_addr()?);
    Ok(listener)
}

/// What the scripts wait for.
#[allow(clippy::print_stdout, reason = "that is its purpose")]
fn announce(address: SocketAddr) {
    println!("Listening at {address}");
}
