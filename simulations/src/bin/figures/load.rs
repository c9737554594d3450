//! Questions at a rate, whatever becomes of those before (open loop), or each after the answer to the last (closed
//! loop). Latencies run from the moment of sending; how late that was is said apart, so that a generator that cannot
//! keep up shows itself.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hdrhistogram::Histogram;
use http_body_util::BodyExt;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep_until, timeout};

use crate::Error;
use crate::http::Pool;
use crate::sse::Events;

/// More requests at a time than this are not sent, and counted as such.
const MOST_AT_ONCE: usize = 4_096;

#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Whom to ask.
    #[arg(long)]
    to: SocketAddr,
    /// For how long questions are sent.
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// Questions a second; without it as fast as they are answered.
    #[arg(long)]
    rate: Option<f64>,
    /// Arrivals as of many independent people (Poisson), not evenly.
    #[arg(long)]
    poisson: bool,
    /// The seed of the arrivals.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Without a rate: so many ask at the same time.
    #[arg(long, default_value_t = 16)]
    clients: usize,
    /// Without a rate: each asks so often at most.
    #[arg(long)]
    each: Option<u64>,
    /// The model.
    #[arg(long, default_value = "scripted")]
    model: String,
    /// What is said.
    #[arg(long, default_value = "tokens=8")]
    prompt: String,
    /// Answers are streamed.
    #[arg(long)]
    stream: bool,
    /// A request that takes longer has failed.
    #[arg(long, default_value_t = 60.0)]
    limit: f64,
    /// More headers, as `name: value`.
    #[arg(long = "header")]
    headers: Vec<String>,
}

/// In microseconds, to an hour.
#[derive(Debug)]
struct Times(Histogram<u64>);

impl Times {
    fn new() -> Result<Self, Error> {
        Ok(Self(Histogram::new_with_bounds(1, 3_600_000_000, 3)?))
    }

    fn add(&mut self, time: Duration) {
        self.0.saturating_record(u64::try_from(time.as_micros()).unwrap_or(u64::MAX).max(1));
    }

    fn json(&self) -> Value {
        let ms = |us: u64| us as f64 / 1e3;
        if self.0.is_empty() {
            return Value::Null;
        }
        json!({
            "mean": self.0.mean() / 1e3,
            "p50": ms(self.0.value_at_quantile(0.5)),
            "p90": ms(self.0.value_at_quantile(0.9)),
            "p99": ms(self.0.value_at_quantile(0.99)),
            "max": ms(self.0.max()),
        })
    }
}

#[derive(Debug)]
struct Measured {
    answered: Times,
    first_token: Times,
    gaps: Times,
    late: Times,
    sent: u64,
    ok: u64,
    not_sent: u64,
    tokens: u64,
    failures: BTreeMap<String, u64>,
    by_node: BTreeMap<String, u64>,
}

struct Asker {
    options: Options,
    pool: Pool,
    body: Bytes,
    headers: Vec<(String, String)>,
    measured: Mutex<Measured>,
}

/// Measures, and prints JSON.
#[allow(clippy::print_stdout, reason = "that is its purpose")]
pub async fn run(options: Options) -> Result<(), Error> {
    let message = json!({ "role": "user", "content": options.prompt });
    let body = json!({ "model": options.model, "messages": [message], "stream": options.stream });
    let headers = options.headers.iter().map(|header| match header.split_once(':') {
        Some((name, value)) => Ok((name.to_owned(), value.trim().to_owned())),
        None => Err(Error::from(format!("`{header}` is not `name: value`"))),
    });
    let measured = Measured {
        answered: Times::new()?,
        first_token: Times::new()?,
        gaps: Times::new()?,
        late: Times::new()?,
        sent: 0,
        ok: 0,
        not_sent: 0,
        tokens: 0,
        failures: BTreeMap::new(),
        by_node: BTreeMap::new(),
    };
    let asker = Arc::new(Asker {
        pool: Pool::new(options.to),
        body: body.to_string().into(),
        headers: headers.collect::<Result<_, _>>()?,
        measured: Mutex::new(measured),
        options,
    });
    let started = Instant::now();
    match asker.options.rate {
        Some(rate) => open_loop(&asker, rate).await,
        None => closed_loop(&asker).await,
    }
    let seconds = started.elapsed().as_secs_f64();
    let measured = asker.measured.lock().unwrap_or_else(PoisonError::into_inner);
    let result = json!({
        "seconds": seconds,
        "sent": measured.sent,
        "ok": measured.ok,
        "not_sent": measured.not_sent,
        "failures": measured.failures,
        "by_node": measured.by_node,
        "tokens": measured.tokens,
        "per_second": measured.ok as f64 / seconds,
        "ms": measured.answered.json(),
        "first_token_ms": measured.first_token.json(),
        "gap_ms": measured.gaps.json(),
        "late_ms": measured.late.json(),
    });
    println!("{result}");
    Ok(())
}

async fn open_loop(asker: &Arc<Asker>, rate: f64) {
    let mut random = StdRng::seed_from_u64(asker.options.seed);
    let room = Arc::new(Semaphore::new(MOST_AT_ONCE));
    let mut running = JoinSet::new();
    let started = tokio::time::Instant::now();
    let (end, mut due) = (started + Duration::from_secs_f64(asker.options.seconds), started);
    loop {
        let wait = if asker.options.poisson { -(1.0 - random.random::<f64>()).ln() / rate } else { 1.0 / rate };
        due += Duration::from_secs_f64(wait);
        if due >= end {
            break;
        }
        sleep_until(due).await;
        while running.try_join_next().is_some() {}
        asker.with(|measured| measured.late.add(due.elapsed()));
        let Ok(place) = room.clone().try_acquire_owned() else {
            asker.with(|measured| measured.not_sent += 1);
            continue;
        };
        let asker = asker.clone();
        running.spawn(async move {
            let _place = place;
            asker.ask().await;
        });
    }
    running.join_all().await;
}

async fn closed_loop(asker: &Arc<Asker>) {
    let end = Instant::now() + Duration::from_secs_f64(asker.options.seconds);
    let mut clients = JoinSet::new();
    for _ in 0..asker.options.clients.min(MOST_AT_ONCE) {
        let asker = asker.clone();
        clients.spawn(async move {
            let mut left = asker.options.each.unwrap_or(u64::MAX);
            while Instant::now() < end && left > 0 {
                asker.ask().await;
                left -= 1;
            }
        });
    }
    clients.join_all().await;
}

impl Asker {
    fn with(&self, change: impl FnOnce(&mut Measured)) {
        change(&mut self.measured.lock().unwrap_or_else(PoisonError::into_inner));
    }

    async fn ask(&self) {
        self.with(|measured| measured.sent += 1);
        let limit = Duration::from_secs_f64(self.options.limit);
        let failed = match timeout(limit, self.exchange()).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(_) => "too late".to_owned(),
        };
        self.with(|measured| *measured.failures.entry(failed).or_default() += 1);
    }

    async fn exchange(&self) -> Result<(), Error> {
        let mut lease = self.pool.connection().await?;
        let sent = Instant::now();
        let response = self.pool.post(&mut lease, self.body.clone(), &self.headers).await?;
        let status = response.status();
        let node = response.headers().get("x-ingle-node").and_then(|node| node.to_str().ok()).map(str::to_owned);
        let mut body = response.into_body();
        let (mut events, mut last, mut tokens) = (Events::default(), None::<Instant>, 0);
        while let Some(piece) = body.frame().await {
            let Ok(piece) = piece?.into_data() else { continue };
            if !self.options.stream {
                continue;
            }
            let came = events.push(&piece);
            if came > 0 {
                let now = Instant::now();
                self.with(|measured| match last {
                    None => measured.first_token.add(now - sent),
                    Some(last) => measured.gaps.add(now - last),
                });
                last = Some(now);
                tokens += u64::from(came);
            }
        }
        let took = sent.elapsed();
        self.pool.give_back(lease).await;
        if !status.is_success() {
            return Err(format!("HTTP {}", status.as_u16()).into());
        }
        if self.options.stream && (events.error || !events.done) {
            return Err(if events.error { "an error event" } else { "truncated" }.into());
        }
        self.with(|measured| {
            measured.ok += 1;
            measured.tokens += tokens;
            measured.answered.add(took);
            if let Some(node) = node {
                *measured.by_node.entry(node).or_default() += 1;
            }
        });
        Ok(())
    }
}
